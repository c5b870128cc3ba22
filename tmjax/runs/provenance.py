"""The record of a result's origin: `tmjax.json` beside the weights, which ends every merge and adaptation."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.errors import InputError
from tmjax.files.atomic import write_json
from tmjax.recipes.base import read_recipe
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import MANIFEST, Manifest, load_manifest
from tmjax.runs.run_files import EDITED, RECIPE

#: Folder of the result in a run directory.
MERGED = "merged"
PROVENANCE = "tmjax.json"
STAGE = "provenance"
#: Number of the layout of the file.
FORMAT = 1
#: Stages that write the result, each of another command.
_RESULTS = ("fuse", "train:adapted")
_FACTS = {"tmjax", "versions", "seed", "inputs", "commands"}


def provenance_key(manifest: Manifest, parents: Mapping[str, Any]) -> object:
    """Returns the input hash of the record: facts of the run, and the keys of the result and its pages."""
    keys = {name: manifest.outputs[name].key for name in (*_RESULTS, "card", "report") if name in manifest.outputs}
    return [keys, manifest.to_json({"inputs", "key", "commands"}), dict(parents)]


def write_provenance(
    file: Path, run: Path, manifest: Manifest, recipe: Mapping[str, Any], parents: Mapping[str, Any]
) -> None:
    """Writes the record of a run's result.

    Args:
        file: The file.
        run: The run directory.
        manifest: Its manifest.
        recipe: Its recipe without the author's directories.
        parents: Facts of the parents, by name.
    """
    names = [name for name in result_files(manifest) if not name.endswith((EDITED, f"/{PROVENANCE}"))]
    hashes = {name.removeprefix(f"{MERGED}/"): sha256_file(run / name) for name in names}
    facts = {"format": FORMAT, **manifest.to_json(_FACTS), "recipe_sha256": manifest.key["recipe"]}
    write_json(file, facts | {"recipe": dict(recipe), "parents": dict(parents), "files": hashes})


def result_files(manifest: Manifest) -> dict[str, int]:
    """Returns the files of a run's result with their sizes, by their names in the run directory."""
    files = {name: size for entry in manifest.outputs.values() for name, size in entry.files.items()}
    return {name: files[name] for name in sorted(files) if name.startswith(f"{MERGED}/")}


def lora_files(run: Path, manifest: Manifest) -> list[Path]:
    """Returns the files of the LoRA of a finished run; raises InputError if it has none, or none of its result."""
    entry, rank = manifest.outputs.get("lora"), None if manifest.lora is None else manifest.lora.rank
    export = read_recipe(run / RECIPE).get("export") or {}
    if entry is None or rank is None or export.get("lora") != rank:
        raise InputError(
            f"{run} has no LoRA of its result: its command with `export: {{lora: 32}}` in the recipe adds one"
        )
    for name, size in entry.files.items():
        if not (run / name).is_file() or (run / name).stat().st_size != size:
            raise InputError(f"{run}: {name} is missing or damaged; give the command that made it again")
    return [run / name for name in sorted(entry.files)]


def result_run(run: Path) -> Path:
    """Returns the directory of the run that has the result: of several steps the last merge or adaptation.

    Args:
        run: A run directory.

    Raises:
        InputError: No step is a merge or an adaptation.
    """
    manifest = load_manifest(run)
    if manifest is None or manifest.steps is None:
        return run
    runs = [name for name, facts in manifest.steps.items() if facts.kind in ("merge", "adapt")]
    if not runs:
        raise InputError(f"{run} has no finished step that is a merge or an adaptation, of which there is a result")
    return run / runs[-1]


def require_finished(run: Path, parents: Mapping[str, Any] | None = None) -> Manifest:
    """Returns the manifest of a run whose result is finished and intact.

    Args:
        run: The run directory.
        parents: Facts of the parents in the record, once it has been read.

    Raises:
        InputError: The path is no run, or the run is not finished; says what to do.
    """
    manifest = load_manifest(run)
    if manifest is None:
        raise InputError(f"{run} is not a run of tmjax (no {MANIFEST})")
    advice = "give the command that made it again, which resumes"
    if not any(name in manifest.outputs for name in _RESULTS):
        raise InputError(f"{run} has no result: only finished runs of tmjax merge, fuse and adapt have one")
    entry = manifest.outputs.get(STAGE)
    if manifest.unfinished is not None or entry is None:
        raise InputError(f"{run} is not finished; {advice}")
    if parents is not None and entry.key != digest(provenance_key(manifest, parents)):
        raise InputError(f"{run} is not finished: its result is newer than its {PROVENANCE}; {advice}")
    for name, size in result_files(manifest).items():
        now = (run / name).stat().st_size if (run / name).is_file() else None
        if now is None or (now != size and not name.endswith(EDITED)):
            raise InputError(f"{run}: {name} is {'missing' if now is None else 'damaged'}; {advice}")
    return manifest


def sha256_file(file: Path) -> str:
    """Returns the SHA-256 of the contents of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
