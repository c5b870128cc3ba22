"""Record of the files that tmjax wrote into a directory: no other file is ever replaced or deleted.

`.tmjax-files.json` names every file with its size and a SHA-256. The SHA-256 of a large file covers blocks spread over
it, so that a checkpoint is not read a second time. A file that the record does not name, or whose contents have changed
since, is the user's.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tmjax.errors import InputError
from tmjax.files.lock import SUFFIX
from tmjax.files.paths import PARTIAL, refuse_name

RECORD = ".tmjax-files.json"
#: The directory inside an output that cannot be renamed in which its contents are prepared.
INSIDE = f".tmjax{PARTIAL}"
_SHOWN = 4
_BLOCK, _BLOCKS = 2**16, 256


def walk(directory: Path) -> Iterator[str]:
    """Relative paths of all files and links below a directory; links are not followed."""
    for folder, folders, files in os.walk(directory):
        place = Path(folder).relative_to(directory)
        yield from ((place / name).as_posix() for name in files if not name.endswith(SUFFIX))
        yield from ((place / name).as_posix() for name in folders if (Path(folder) / name).is_symlink())


def describe(file: Path) -> dict[str, Any]:
    """Size of a file and SHA-256 of its contents, or of `_BLOCKS` blocks spread evenly from its first to its last."""
    size, total = file.stat().st_size, hashlib.sha256()
    starts = range(0, size, _BLOCK)
    if len(starts) > _BLOCKS:
        starts = [number * (size - _BLOCK) // (_BLOCKS - 1) for number in range(_BLOCKS)]
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            total.update(stream.read(_BLOCK))
    return {"size": size, "sha256": total.hexdigest()}


def write_record(directory: Path) -> None:
    """Records all files of a directory that tmjax alone has written."""
    names = sorted(name for name in walk(directory) if name != RECORD)
    record = {"files": {name: describe(directory / name) for name in names}}
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def mark_unfinished(directory: Path) -> None:
    """Marks a directory as tmjax's own while it is being written."""
    (directory / RECORD).write_text(json.dumps({"files": {}}) + "\n", encoding="utf-8")


def has_record(directory: Path) -> bool:
    """Whether tmjax has begun to write a directory."""
    return "files" in _record(directory)


def recorded(directory: Path) -> list[str]:
    """Names of the files that tmjax wrote into a directory."""
    return list(_record(directory).get("files", {}))


def _record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else {}


def foreign(directory: Path, *, contents: bool = True) -> list[str]:
    """Names below a directory that tmjax did not write, or that were changed since; all of them without a record.

    Without `contents` only names are looked at.
    """
    entries = _record(directory).get("files", {})
    begun = has_record(directory / INSIDE)
    return sorted(
        name
        for name in walk(directory)
        if not (name == RECORD or (begun and name.startswith(f"{INSIDE}/")))
        and (name not in entries or (contents and not _unchanged(directory / name, entries[name])))
    )


def _unchanged(file: Path, entry: dict[str, Any]) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size != entry.get("size"):
        return False
    return describe(file) == entry


def delete(directory: Path, names: Iterable[str]) -> None:
    """Deletes files below a directory, and the directories below it that this leaves empty."""
    folders = set()
    for name in list(names):
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()
        folders |= {parent for parent in Path(name).parents if parent != Path(".")}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):
            (directory / folder).rmdir()


def refuse_foreign(path: Path, names: list[str]) -> None:
    """Raises InputError with the names of files that are not tmjax's, if there are any."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise InputError(
            f"{path} holds what tmjax did not write or what was changed since ({', '.join(names[:_SHOWN])}{more});"
            " only what it wrote is ever replaced: move that away or choose another output"
        )


def refuse_existing(path: Path, *, overwrite: bool, contents: bool = True) -> Path:
    """The real path of an output directory that may be written.

    Raises InputError if it is a file or not empty; with `overwrite` only if it holds files that tmjax did not write
    (without `contents`, judged by the names alone).
    """
    real = refuse_name(path)
    begun = has_record(real / INSIDE)
    if real.is_dir() and any(not (e.name.endswith(SUFFIX) or (begun and e.name == INSIDE)) for e in real.iterdir()):
        if not overwrite:
            raise InputError(f"{path} exists; choose another output or pass --overwrite")
        refuse_foreign(path, foreign(real, contents=contents))
    return real
