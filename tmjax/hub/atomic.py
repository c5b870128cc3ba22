"""Nothing half-written: output goes to a `*.partial` name and is renamed once it is whole."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tmjax.errors import InputError

PARTIAL = ".partial"


def partial_name(path: Path) -> Path:
    """The temporary sibling that `path` is written under."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty `path.partial` directory and renames it to `path` on success; on error nothing remains.

    Raises InputError if `path` exists and holds anything, unless `overwrite`.
    """
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        _discard(partial)
        raise
    remove(path)
    os.replace(partial, path)


def _discard(partial: Path) -> None:
    """Deletes a directory in which a library's threads may still be finishing what has failed."""
    for _ in range(20):
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists():
            return
        time.sleep(0.1)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises InputError if `path` is a file or a directory with content and `overwrite` is false."""
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise InputError(f"{path} exists; choose another output or pass --overwrite")


def remove(path: Path) -> None:
    """Deletes a file or a directory tree; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    partial = partial_name(path)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a binary file under a temporary name, then renames it."""
    partial = partial_name(path)
    partial.write_bytes(data)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON (indented, UTF-8, keys in the order given) atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
