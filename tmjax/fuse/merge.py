"""`fuse`: an alignment and two models in, a merged model and the table of what happened out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.convert.model import Model
from tmjax.errors import InputError
from tmjax.fuse.apply import Coefficients, fuse_params, transport_model, without_source
from tmjax.fuse.coefficients import Fit, fit, fixed
from tmjax.fuse.diagnostics import update_table
from tmjax.fuse.stream import fuse_stream, stream_table, stream_without_source, transport_stream
from tmjax.recipe import FusionOptions
from tmjax.typing import Params


@dataclass(frozen=True)
class Fused:
    """The merged model (in the target's dtypes), the chosen coefficients, the per-tensor table of `update_table`."""

    model: Model
    fit: Fit
    table: dict[str, dict[str, float]]


def fuse(
    alignment: Alignment,
    target: Model,
    source: Model,
    options: FusionOptions | None = None,
    *,
    alpha: float | None = None,
    loss: Callable[[Params], float] | None = None,
    source_params: Params | None = None,
    permutations: dict[str, np.ndarray] | None = None,
    zero_source: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fused:
    """Transports the source's projections through the alignment and fuses them into the target.

    `alpha` fixes the coefficient; without it `loss` (of fused parameters, on validation text) chooses from the options'
    grid. The last three are for controls: other source weights, permuted source units, a source contribution of zero.
    Raises InputError if neither alpha nor loss is given, or a role is missing in a model. Refusing a merge in which
    nothing came from the source is `require_transfer`'s, on the table.
    """
    options = options or FusionOptions()
    params = source.params if source_params is None else source_params
    transported = transport_model(
        alignment, target.rows, target.params, source.rows, params, options, permutations=permutations
    )
    stream = transport_stream(alignment, target, source, options, source_params=params, permutations=permutations)
    if zero_source:
        transported, stream = without_source(transported), stream_without_source(stream)

    def combine(coefficients: Coefficients) -> Params:
        fused = fuse_params(target.rows, target.params, transported, coefficients, bias_rule=options.bias)
        return fuse_stream(fused, stream, coefficients)

    roles = (*transported, *stream)
    if alpha is not None:
        chosen = fixed(alpha, options, roles)
    elif loss is not None:
        chosen = fit(options, lambda coefficients: loss(combine(coefficients)), progress, roles)
    else:
        raise InputError("fuse needs alpha or a loss to choose it by")
    fused = combine(chosen.coefficients)
    table = update_table(target.spec, target.rows, target.params, fused, transported, chosen.coefficients)
    table |= stream_table(target, fused, stream, chosen.coefficients)
    return Fused(target.with_params(fused), chosen, table)
