"""Checks of an output's place: no file, no dangling link, not above or below an input."""

import os
from collections.abc import Iterable
from pathlib import Path

from tmjax.errors import InputError

#: Suffix of outputs that are being written.
PARTIAL = ".partial"


def refuse_name(path: Path | str) -> Path:
    """The real path of an output; raises InputError where no directory can be."""
    path = Path(path).expanduser()
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path} is a symbolic link to {os.readlink(path)}, which does not exist; make that directory or choose"
            " another output"
        )
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_dir():
        raise InputError(f"{path} is a file; choose another output")
    above = next((folder for folder in real.parents if folder.exists() or folder.is_symlink()), None)
    if above is not None and not above.is_dir():
        raise InputError(f"{path} cannot be made: {above} is not a directory")
    if not real.name:
        raise InputError(f"{path} is the root of the file system; choose another output")
    if real.name.endswith(PARTIAL):
        raise InputError(f"{path}: names that end in {PARTIAL} are of unfinished outputs; choose another name")
    return real


def refuse_overlap(out: Path | str, inputs: Iterable[tuple[str, Path | str | None]]) -> None:
    """Raises InputError if an input (name, path) is the output, or lies inside it, or contains it.

    Inputs that do not exist on this machine, such as hub ids, are skipped.
    """
    real = Path(os.path.realpath(Path(out).expanduser()))
    for name, given in inputs:
        if given is None or not Path(given).expanduser().exists():
            continue
        place = Path(os.path.realpath(Path(given).expanduser()))
        if place == real:
            raise InputError(f"{name} {given} is the output; choose another output directory")
        if place.is_relative_to(real):
            raise InputError(f"{name} lies inside the output {out}; choose another output directory")
        if real.is_relative_to(place):
            raise InputError(f"the output {out} lies inside {name} {given}; choose another output directory")
