"""`tmjax report RUN`: the page of a finished merge, made again from its run directory."""

import os
from pathlib import Path
from typing import Any

from tmjax.align import storage as alignment_store
from tmjax.align.alignment import Alignment
from tmjax.checkpoints.hub import read_json
from tmjax.checkpoints.load import load_model
from tmjax.commands.callbacks import Warn
from tmjax.commands.merge.samples import sample_texts
from tmjax.commands.result_pages import REPORT
from tmjax.errors import InputError, TmjaxError
from tmjax.files.atomic import partial_name, remove
from tmjax.files.lock import OutputLock
from tmjax.recipes.base import read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.report.html import write_report
from tmjax.runs.manifest import read_manifest
from tmjax.runs.provenance import MERGED
from tmjax.runs.run_files import RECIPE
from tmjax.text.documents import read_texts
from tmjax.transfer.chain import chain_of, needs_of
from tmjax.transfer.recipe import build_recipe

SAMPLES = "samples.json"
_UNFINISHED = "{} holds no finished merge; `tmjax merge` or `tmjax fuse` makes one, with its report"


def rebuild_report(run: Path, warn: Warn = lambda message: None) -> Path:
    """Writes `report.html` anew and returns its path; nothing is fitted or measured again.

    Missing samples of text are generated now if target and texts can still be read; otherwise `warn` is called and the
    page has none. Raises InputError if `run` is not a run with a merge in it.
    """
    manifest = read_manifest(run)
    if manifest is None:
        raise InputError(f"{run} is not a run of tmjax (no manifest.json)")
    if not (run / MERGED).is_dir():
        raise InputError(_UNFINISHED.format(run))
    recipe = build_recipe(read_recipe(run / RECIPE) | {"out": str(run)})
    with OutputLock(run):
        return _rebuild(run, recipe, manifest, warn)


def _alignment(run: Path, recipe: Recipe) -> Alignment | None:
    """Reads the alignment of a run; None where no operator needs one."""
    if "alignment" not in needs_of(chain_of(recipe)):
        return None
    if not (run / "alignment").is_dir():
        raise InputError(_UNFINISHED.format(run))
    return alignment_store.load(run / "alignment")


def _rebuild(run: Path, recipe: Recipe, manifest: dict[str, Any], warn: Warn) -> Path:
    page = run / REPORT
    partial = partial_name(page)
    try:
        write_report(partial, run, recipe, manifest, _alignment(run, recipe), _samples(run, recipe, warn))
        os.replace(partial, page)
    finally:
        remove(partial)
    return page


def _samples(run: Path, recipe: Recipe, warn: Warn) -> list[dict[str, Any]]:
    if (run / SAMPLES).is_file():
        return read_json(run / SAMPLES)["samples"]
    try:
        models = {"target": load_model(recipe.place(recipe.target)), "merged": load_model(run / MERGED)}
        return sample_texts(models, read_texts(recipe.place(recipe.test or recipe.valid or recipe.texts)), recipe.seed)
    except TmjaxError as error:
        warn(f"no samples of text in the report: {error}")
        return []
