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
from tmjax.files.lock import OutputLock
from tmjax.files.owned import (
    INSIDE,
    RECORD,
    delete,
    has_record,
    mark_unfinished,
    recorded,
    refuse_existing,
    write_record,
)
from tmjax.files.paths import PARTIAL


def partial_name(path: Path) -> Path:
    """The temporary sibling that `path` is written under."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty `path.partial` directory and renames it to `path` on success; on error nothing remains.

    Holds the lock of `path`, and leaves in it a record of the files that were written (`hub.owned`). Raises InputError
    if `path` exists and holds anything, unless `overwrite` and tmjax wrote all of it.
    """
    with OutputLock(path):
        real = refuse_existing(path, overwrite=overwrite)
        # The working directory and mount points keep their place: their contents are exchanged.
        kept = real.is_dir() and (os.path.ismount(real) or Path.cwd().is_relative_to(real))
        partial = real / INSIDE if kept else partial_name(real)
        if partial.is_dir() and any(partial.iterdir()) and not has_record(partial):
            raise InputError(f"{partial}, where {path} would be prepared, holds what tmjax did not write; move it away")
        if partial.exists() and not partial.is_dir():
            raise InputError(f"{partial}, where {path} would be prepared, is a file; move it away")
        _discard(partial)
        partial.mkdir(parents=True)
        try:
            mark_unfinished(partial)
            yield partial
            write_record(partial)
            if not kept:
                refuse_existing(path, overwrite=overwrite, contents=False)  # files that have appeared meanwhile
                _exchange(partial, real)
            else:
                _move_into(partial, real)
        except BaseException:
            _discard(partial)
            raise


def _exchange(partial: Path, real: Path) -> None:
    """Renames a finished directory into place, then deletes what it replaces."""
    old = real.with_name(f".{real.name}.tmjax-old")
    _delete_recorded(old)  # of a write that was killed here
    if real.is_dir() and any(real.iterdir()):
        os.rename(real, old)
        os.replace(partial, real)
        _delete_recorded(old)  # files that appeared at the last moment stay
    else:
        os.replace(partial, real)


def _move_into(partial: Path, real: Path) -> None:
    """Moves the contents of a finished directory, that lies in another one, up into that one."""
    delete(real, recorded(real))
    shutil.copyfile(partial / RECORD, real / RECORD)  # names what follows, so that a killed write can be replaced
    for entry in list(partial.iterdir()):
        if entry.name != RECORD:
            os.replace(entry, real / entry.name)
    _discard(partial)


def _delete_recorded(directory: Path) -> None:
    if directory.is_dir():
        delete(directory, [*recorded(directory), RECORD])
        with contextlib.suppress(OSError):
            directory.rmdir()


def _discard(partial: Path) -> None:
    """Deletes a directory in which a library's threads may still be finishing what has failed."""
    for _ in range(20):
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists():
            return
        time.sleep(0.1)


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
