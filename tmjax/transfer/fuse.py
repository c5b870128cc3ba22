"""`fuse` in memory: an alignment and two models in, a merged model and its update table out."""

from collections.abc import Callable, Sequence
from typing import Any

from tmjax.align.alignment import Alignment
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.recipes.merge import CoefficientOptions
from tmjax.transfer.chain import Merged, apply_chain
from tmjax.transfer.contribution import Context
from tmjax.transfer.operator import read_chain
from tmjax.transfer.source_view import PairedActivations, SourceView
from tmjax.typing import Params


def fuse(
    alignment: Alignment,
    target: Model,
    source: Model,
    *,
    operators: Sequence[Any] = ({"transport": {}},),
    alpha: float | None = None,
    loss: Callable[[Params], float] | None = None,
    coefficients: CoefficientOptions | None = None,
    activations: PairedActivations | None = None,
) -> Merged:
    """Merges a source into a target in memory, from an alignment of the two.

    Operators that need token maps or teacher data are those of a run: use `merge`.

    Args:
        alignment: Alignment of the two models.
        target: The target, whose architecture is kept.
        source: The source.
        operators: Operators in order, as a recipe lists them.
        alpha: Fixed coefficient of everything that is transported.
        loss: Bits per byte of parameters on validation text, by which alpha and beta are chosen; needed unless alpha is
            given.
        coefficients: How they are chosen.
        activations: Activations of target and source at paired rows, for operators that need them.

    Returns:
        The merged model in the target's dtypes, the coefficients, manifest entries and the update table.

    Raises:
        InputError: An operator is not known or lacks what it needs, or there is neither alpha nor loss.
    """
    view = SourceView(source, alignment=lambda: alignment)
    if activations is not None:
        view = SourceView(source, alignment=lambda: alignment, activations=lambda: activations)
    context = Context(
        target=target,
        loss=loss,
        alpha=alpha,
        coefficients=coefficients or CoefficientOptions(),
        load_model=load_model,
    )
    return apply_chain(read_chain(operators), view, context)
