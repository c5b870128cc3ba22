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
from tmjax.evaluate.bits import evaluate
from tmjax.recipes.merge import ActivationOptions, AlignmentOptions
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import pair_rows, sample_rows
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.fuse import fuse
from tmjax.transfer.recipe import build_recipe

__all__ = ["adapt", "align", "convert", "evaluate", "export", "fuse", "load_model", "merge", "read_texts"]


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
