"""Hashes of recipes and inputs, which identify runs and stages."""

import hashlib
import json
from pathlib import Path

from tmjax.checkpoints.formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from tmjax.checkpoints.formats.weights import weight_files
from tmjax.checkpoints.hub import COMPANIONS, CONFIG_NAME, adapter_base, extra_templates, is_adapter
from tmjax.checkpoints.orbax import MARKER, is_orbax

_BLOCK = 2**22


def digest(value: object) -> str:
    """Computes the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_files(files: list[Path]) -> str:
    """Computes the SHA-256 over names and contents of files, in the order of names."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        total.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                total.update(block)
    return total.hexdigest()


def sha256_checkpoint(directory: Path) -> str:
    """Hashes a checkpoint directory: weights, index, config and tokenizer; every file of an orbax directory.

    Of an adapter its two files and its base model count. The record of a merged checkpoint's origin does not count.
    """
    if is_adapter(directory):
        base = adapter_base(directory, Adapter(directory))
        own = sha256_files([directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS])
        return digest([own, sha256_checkpoint(base)])
    named = {directory / name for name in (CONFIG_NAME, *COMPANIONS, *([MARKER] if is_orbax(directory) else []))}
    files = [*(file for file in named if file.is_file()), *weight_files(directory)]
    nested = [file for name in ("params", "hf") for file in (directory / name).rglob("*") if file.is_file()]
    return sha256_files(files + nested + extra_templates(directory))
