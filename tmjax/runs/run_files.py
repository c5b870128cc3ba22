"""Files of a run in its directory: those that its manifest names, and a few others."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.files.owned import RECORD, recorded, walk
from tmjax.files.paths import PARTIAL
from tmjax.runs.manifest import MANIFEST

RECIPE = "recipe.yaml"
#: Names of files that are not the output of a stage.
_BESIDE = re.compile(
    rf"{MANIFEST}|{RECIPE}|adapter|results\.parquet|solvers\.html"
    r"|plots/(arms|coefficients|coefficient_maps|heads|layer_plan|solvers|sweep|training)\.png"
    r"|settings/[0-9a-f]{64}\.json"
    r"|training/[^/]+/[^/]+/(log\.csv|log\.csv\.new|checkpoints/.+)"
)
#: Ending of outputs that are written for people, who may edit them.
EDITED = ".md"
#: Folders of further runs below a run.
_NESTED = re.compile(r"merge|sources/[^/]+|[1-9]\d*-(merge|adapt)")
#: Folders below a run that have a record of their own files.
_RECORDED = re.compile(r"adapter|scores/[^/]+|[1-9]\d*-(vocabulary|convert|evaluate)")


def split(path: Path, manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Splits the names of all files below a run directory into the run's own and others."""
    own, others = [], []
    folders = [place.relative_to(path).as_posix() for place in (*path.glob("*"), *path.glob("s*/*")) if place.is_dir()]
    nested = {
        name: nested_manifest
        for name in folders
        if _NESTED.fullmatch(name) and (nested_manifest := _manifest(path / name)) is not None
    }
    below = {name: set(split(path / name, nested_manifest)[0]) for name, nested_manifest in nested.items()}
    stage_files = listed(path, manifest)
    records = {name: {*recorded(path / name), RECORD} for name in folders if _RECORDED.fullmatch(name)}
    for name in walk(path):
        inside = next((top for top in (*below, *records) if name.startswith(f"{top}/")), None)
        nested_own = inside is not None and name.removeprefix(f"{inside}/") in (below | records)[inside]
        (own if nested_own or is_own(name, stage_files) else others).append(name)
    return own, sorted(others)


def own_files(path: Path) -> list[str]:
    """Lists the files below a directory that tmjax wrote: those of a run, or those that its record names."""
    manifest = _manifest(path)
    names = [*recorded(path), RECORD] if manifest is None else split(path, manifest)[0]
    return [name for name in names if (path / name).is_file()]


def is_own(name: str, listed: set[str]) -> bool:
    """Whether a file below a run is one of these, was written beside them, or is part of an unfinished output."""
    if name in listed or _BESIDE.fullmatch(name):
        return True
    final = partial_of(name)
    return final is not None and (final in listed or _BESIDE.fullmatch(final) is not None)


def partial_of(name: str) -> str | None:
    """Returns the output whose unfinished form a file below a run is, or belongs to; None for other files."""
    parts = name.split("/")
    at = next((number for number, part in enumerate(parts) if part.endswith(PARTIAL)), None)
    return None if at is None else "/".join([*parts[:at], parts[at].removesuffix(PARTIAL)])


def listed(path: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Lists files that the stages of a run have written, and the outputs unfinished when it ended.

    An edited text (of another size now) belongs to the user and is left out.
    """
    written = [pair for entry in manifest.get("outputs", {}).values() for pair in entry["files"].items()]
    names = {name for name, size in written if not (name.endswith(EDITED) and is_edited(path / name, size))}
    unfinished = manifest.get("unfinished")
    return names if not unfinished else names | {unfinished["output"], *unfinished["files"]}


def is_edited(file: Path, size: int) -> bool:
    """Whether a file exists with another size."""
    return file.is_file() and file.stat().st_size != size


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "tmjax" in manifest and "stages" in manifest else None
