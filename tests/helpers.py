"""What several test files share: small specs, and checkpoints as the safetensors library and `json` see them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.numpy

from tmjax.convert.model import load_model
from tmjax.errors import CheckpointError
from tmjax.hub.tensors import SINGLE_NAME
from tmjax.models.spec import DecoderSpec

SPEC = DecoderSpec(vocab=50, hidden=24, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=40, max_positions=64)
QWEN2 = dataclasses.replace(SPEC, qkv_bias=True, tied_embeddings=True)


def stored(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of every file, as the safetensors library parses it."""
    held = [item for file in directory.glob("*.safetensors") for item in safetensors.deserialize(file.read_bytes())]
    assert len({name for name, _ in held}) == len(held)
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in held}


def read_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def edit_config(directory: Path, **changes) -> None:
    config = {key: value for key, value in (read_config(directory) | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    """Rewrites a single-file checkpoint after `change(tensors)`."""
    tensors = safetensors.numpy.load_file(directory / SINGLE_NAME)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})


def refused(directory: Path, *fragments: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
