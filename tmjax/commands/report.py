"""`tmjax report RUN`: the page of a finished merge, made again from what the run directory holds."""

import os
from pathlib import Path
from typing import Any

from tmjax.align import storage as alignment_store
from tmjax.checkpoints.hub import read_json
from tmjax.checkpoints.load import load_model
from tmjax.commands.merge.samples import sample_texts
from tmjax.commands.progress import Warn
from tmjax.errors import InputError, TmjaxError
from tmjax.files.atomic import partial_name, remove
from tmjax.files.lock import OutputLock
from tmjax.recipes.base import read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.report.html import write_report
from tmjax.runs.manifest import read_manifest
from tmjax.runs.run_files import RECIPE
from tmjax.text.documents import read_texts
from tmjax.transfer.recipe import build_recipe

REPORT = "report.html"
SAMPLES = "samples.json"


def rebuild_report(run: Path, warn: Warn = lambda message: None) -> Path:
    """Writes `report.html` anew and returns its path; nothing is fitted or measured again.

    Samples of text that the run does not hold are drawn now, if its target and texts can still be read; else `warn`
    says so and the page goes without. Raises InputError if `run` is not a run with a merge in it.
    """
    manifest = read_manifest(run)
    if manifest is None:
        raise InputError(f"{run} is not a run of tmjax (no manifest.json)")
    if not (run / "alignment").is_dir() or not (run / "merged").is_dir():
        raise InputError(f"{run} holds no finished merge; `tmjax merge` or `tmjax fuse` makes one, with its report")
    recipe = build_recipe(read_recipe(run / RECIPE) | {"out": str(run)})
    with OutputLock(run):
        return _rebuild(run, recipe, manifest, warn)


def _rebuild(run: Path, recipe: Recipe, manifest: dict[str, Any], warn: Warn) -> Path:
    page = run / REPORT
    partial = partial_name(page)
    try:
        write_report(
            partial, run, recipe, manifest, alignment_store.load(run / "alignment"), _samples(run, recipe, warn)
        )
        os.replace(partial, page)
    finally:
        remove(partial)
    return page


def _samples(run: Path, recipe: Recipe, warn: Warn) -> list[dict[str, Any]]:
    if (run / SAMPLES).is_file():
        return read_json(run / SAMPLES)["samples"]
    try:
        models = {"target": load_model(recipe.place(recipe.target)), "merged": load_model(run / "merged")}
        return sample_texts(models, read_texts(recipe.place(recipe.test or recipe.valid or recipe.texts)), recipe.seed)
    except TmjaxError as error:
        warn(f"no samples of text in the report: {error}")
        return []
