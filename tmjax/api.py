"""The functions of tmjax: the verbs of the command line, with its defaults.

from tmjax import api

target, source = api.load_model("target"), api.load_model("source")
alignment = api.align(target, source, api.read_texts("texts.jsonl"))
merged = api.fuse(alignment, target, source, alpha=0.05)
api.export(merged.model, "merged")
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from tmjax.activations.blocks import paired_blocks
from tmjax.activations.capture import CaptureOptions
from tmjax.activations.extract import extract_activations
from tmjax.align.alignment import Alignment, needed_sites
from tmjax.align.alignment import align as align_activations
from tmjax.align.sizes import row_budget, sites_of
from tmjax.align.streaming import align_moments, gather, require_streamable
from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.in_python import adapt
from tmjax.commands.convert import convert
from tmjax.commands.merge.run import MERGED, Merge
from tmjax.commands.steps.run import Steps
from tmjax.commands.vocabulary_transplant import VocabularyRequest, new_vocabulary
from tmjax.evaluate.bits import evaluate
from tmjax.recipes.merge import ActivationOptions, AlignmentOptions
from tmjax.recipes.steps_recipe import build_steps_recipe
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import pair_rows, sample_rows
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.fuse import fuse
from tmjax.transfer.recipe import build_recipe

__all__ = [
    "adapt",
    "align",
    "convert",
    "evaluate",
    "export",
    "fuse",
    "load_model",
    "merge",
    "read_texts",
    "run",
    "vocabulary",
]


def align(
    target: Model,
    source: Model,
    texts: Texts,
    *,
    options: AlignmentOptions | None = None,
    activations: ActivationOptions | None = None,
) -> Alignment:
    """Aligns the units and layers of two models by their activations on the same texts, as `tmjax align` does.

    Both models read the texts, their activations are paired at the same pieces of text, and optimal transport couples
    the units of every site for the pairs of layers that the options ask for. Activations are kept in a temporary
    folder until the plans are solved, or only as sums with `activations.keep` false.

    Args:
        target: The target, whose architecture is kept.
        source: The source.
        texts: Calibration texts.
        options: Section `alignment` of a recipe: solver, costs, structure.
        activations: Section `activations` of a recipe: pooling, number of texts and tokens.

    Returns:
        Plans of every site, statistics of units and layer plans, for every projection of the target; input of `fuse`.

    Raises:
        InputError: The models share no piece of the texts, or the options do not suit each other or the models.
        NonFiniteError: An activation is NaN or infinite.
    """
    options, reading = options or AlignmentOptions(), activations or ActivationOptions()
    texts, projections = texts.first(reading.max_texts), target.projections
    sites = needed_sites(projections.values(), options.structure)
    models = (target.spec, target.params), (source.spec, source.params)
    widths = sites_of(target, source, projections, options.structure)
    max_rows = row_budget(widths, (target.spec.layers, source.spec.layers), reading)
    capture = CaptureOptions(sites, reading.batch_tokens, reading.memory_mib)
    if reading.keep:
        with tempfile.TemporaryDirectory(prefix="tmjax-") as folder:
            path = Path(folder) / "activations"
            pair = extract_activations(
                target,
                source,
                texts,
                path,
                pooling=reading.pooling,
                max_tokens=reading.max_tokens,
                max_rows=max_rows,
                options=capture,
            )
            return align_activations(*pair, projections, options, models=models)
    require_streamable(options)
    tokenizers = [load_tokenizer(model.directory, model.spec.vocab) for model in (target, source)]
    rows, documents = pair_rows(texts, tokenizers, pooling=reading.pooling, max_tokens=reading.max_tokens)
    if max_rows is not None:
        rows, documents = sample_rows(rows, documents, max_rows, seed=0)
    blocks = paired_blocks(
        *((*model, read) for model, read in zip(models, documents, strict=True)),
        rows,
        capture,
        block_rows=reading.block_rows,
    )
    sums = gather(blocks, projections.values(), structure=options.structure)
    return align_moments(sums, projections, options, models=models)


def merge(*, overwrite: bool = False, **recipe: Any) -> tuple[Model, dict[str, Any]]:
    """Merges a source into a target as `tmjax merge` does.

    Stages that have finished in `out` are not run again. Warnings of the run are Python warnings.

    Args:
        overwrite: Whether another run in `out` is replaced.
        **recipe: The keys of the recipe: at least `source`, `target`, `texts` and `out`, mostly `valid` and `test`. The
            preset is `predictions` unless given. Paths are as on the command line.

    Returns:
        The merged model and the run's manifest.

    Raises:
        InputError: Keys or inputs are wrong.
        NoTransferError: Nothing measurable came from the source.
    """
    values = {name: str(value) if isinstance(value, Path) else value for name, value in recipe.items()}
    run = Merge(build_recipe(values), overwrite=overwrite, warn=lambda message: warnings.warn(message, stacklevel=2))
    try:
        manifest = run.all()
    finally:
        run.run.close()
    return load_model(run.run.path / MERGED, placement=run.inputs.layout.place), manifest


def run(*, overwrite: bool = False, **recipe: Any) -> dict[str, Any]:
    """Runs the steps of a recipe in one run directory, as `tmjax run` does.

    Steps that have finished in `out` are not run again. Warnings of the run are Python warnings.

    Args:
        overwrite: Whether finished steps that the recipe has changed, and those after them, are replaced.
        **recipe: The keys of the recipe: `out`, `steps`, and the inputs that the steps share. A step is a mapping of
            its kind to its settings, such as `{"adapt": {"mode": "sft"}}`. Paths are as on the command line.

    Returns:
        The run's manifest: facts and model of every step in `steps`, scores on the test texts in `evaluation`.

    Raises:
        InputError: Keys or inputs are wrong; names the step.
        NoTransferError: Nothing measurable came from the source of a merge.
    """
    settings = build_steps_recipe(_plain(recipe))
    steps = Steps(settings, overwrite=overwrite, warn=lambda message: warnings.warn(message, stacklevel=2))
    try:
        return steps.all()
    finally:
        steps.run.close()


def vocabulary(
    target: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    add: int | None = None,
    texts: str | Path | None = None,
    init: str = "mean",
    source: str | Path | None = None,
    multiple_of: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model with another vocabulary, as `tmjax vocabulary` does.

    Args:
        target: Checkpoint whose vocabulary changes: directory or hub id.
        out: Output directory.
        tokenizer: The new tokenizer: directory or hub id.
        add: Number of tokens that are learnt from `texts` instead.
        texts: Texts of the language or domain.
        init: Initialisation of new rows: `mean`, `similar`, `source` or `pursuit`.
        source: A model that knows the new tokens, for `source` and `pursuit`.
        multiple_of: Rows are padded to a multiple of this.
        overwrite: Whether an existing output of tmjax is replaced.

    Returns:
        Numbers of rows by kind, notes and, with texts, tokens per byte before and after.

    Raises:
        InputError: The request is incomplete, or an input is wrong.
    """
    new, given, other = (None if each is None else str(each) for each in (tokenizer, texts, source))
    request = VocabularyRequest(str(target), new, add, given, init, other, multiple_of)
    return new_vocabulary(request, out, overwrite=overwrite, warn=lambda message: warnings.warn(message, stacklevel=2))


def _plain(value: Any) -> Any:
    """Returns nested values with the names of paths."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
