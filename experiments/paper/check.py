"""`--dry-run`: everything about a recipe that can be known without a network, before anything is downloaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schema import HERE, PaperRecipe

from tmjax.align.sizes import sites_of
from tmjax.checkpoints.hub import CONFIG_NAME, read_config
from tmjax.commands.doctor.estimate import Reading, memory
from tmjax.commands.doctor.side import Side
from tmjax.errors import InputError, summarise
from tmjax.evaluate.tasks import task_manager
from tmjax.models.families import family_of
from tmjax.recipes.base import read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.transfer.chain import chain_of, chain_projections
from tmjax.transfer.recipe import build_recipe

#: What is known of models and data sets on the hub, so that a recipe can be checked without it.
MODELS, DATASETS = HERE / "recorded_models.yaml", HERE / "recorded_datasets.yaml"
#: Tokens of a chat text that estimates assume; whitespace-delimited pieces of it.
TOKENS, PIECES = 400, 250


def model_side(name: str) -> Side:
    """A model as its config describes it: a local directory's own, or the recorded one of a hub id.

    Raises InputError for an id that is not recorded.
    """
    if (Path(name) / CONFIG_NAME).is_file():
        config = read_config(Path(name))
    else:
        recorded = read_recipe(MODELS)
        if name not in recorded["models"]:
            raise InputError(f"model {name} is not recorded in {MODELS.name}; add its id and its config's shape there")
        config = recorded["configs"][recorded["models"][name]]
    family = family_of(config)
    spec = family.spec(config)
    return Side(name, Path(name), config, spec, family.params(spec), "missing")


def check_columns(recipe: PaperRecipe) -> None:
    """Raises InputError if the recipe reads a column or a split that the data set is not recorded to have."""
    data = recipe.data
    if data.dataset is None:
        files = [Path(str(name)) for name in (data.calibration, data.valid, data.test)]
        gone = [str(file) for file in files if not file.is_file()]
        if gone:
            raise InputError(f"{recipe.name}: no such texts: {summarise(gone)}")
        return
    recorded = read_recipe(DATASETS)
    if data.dataset not in recorded:
        raise InputError(f"{recipe.name}: data set {data.dataset} is not recorded in {DATASETS.name}; add its columns")
    known = recorded[data.dataset]
    wrong = [name for name in data.columns if name not in known["columns"]]
    if wrong:
        raise InputError(
            f"{recipe.name}: data set {data.dataset} has no column {summarise(wrong)}; it has"
            f" {', '.join(known['columns'])}"
        )
    if data.split not in known["splits"]:
        raise InputError(f"{recipe.name}: data set {data.dataset} has no split {data.split}")


def merge_recipe(recipe: PaperRecipe, preset: str, source: str, files: Mapping[str, str], out: str) -> Recipe:
    """The merge of a recipe under a preset: at its fixed alpha if that is the paper's, else as validation chooses."""
    ours = recipe.merge | {"activations": {"max_texts": recipe.span_texts} | recipe.merge.get("activations", {})}
    return build_recipe(
        {
            "source": source,
            "target": recipe.target,
            "texts": files["calibration"],
            "valid": files["valid"],
            "test": files["test"],
            "out": out,
            "other_texts": list(recipe.other_texts),
            "preset": preset,
            "seed": recipe.seed,
            **({"alpha": recipe.fuse_alpha} if preset == "paper" else ours),
            # As printed, next to nothing of the source arrives; the table is to show that.
            "allow_negligible": True,
            "controls": True,
        }
    )


def estimate(recipe: PaperRecipe) -> dict[str, dict[str, int]]:
    """Bytes at the peak and of the stored alignment, by preset, from sizes alone.

    Raises InputError for a model that is not known or not supported.
    """
    target, *sources = (model_side(name) for name in (recipe.target, recipe.source, *recipe.sources))
    files = {"calibration": "-", "valid": "-", "test": "-"}
    found = {}
    for preset in recipe.presets:
        merge = merge_recipe(recipe, preset, recipe.source, files, "-")
        documents = recipe.data.calibration if isinstance(recipe.data.calibration, int) else 1000
        documents = min(documents, merge.activations.max_texts or documents)
        rows = documents if merge.activations.pooling == "sequence" else documents * PIECES
        reading = Reading(rows, documents * TOKENS, documents * TOKENS, assumed=True)
        chosen = chain_projections(chain_of(merge), target.rows, sources[0].rows)
        held = memory(target, sources[0], sites_of(target, sources[0], chosen), reading, merge, 1)
        found[preset] = {"peak": held["peak"], "alignment": held["stages"]["alignment (on disk)"]}
    return found


def dry_run(recipe: PaperRecipe) -> dict[str, Any]:
    """Checks models, columns and task names; returns what was found. Raises InputError with one line otherwise."""
    check_columns(recipe)
    estimates = estimate(recipe)
    task_manager(recipe.task_names, recipe.tasks_folder)
    return {"recipe": recipe.name, "tasks": recipe.task_names, "memory": estimates}
