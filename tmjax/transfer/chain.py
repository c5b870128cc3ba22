"""`fuse`: an alignment and two models in, a merged model and the table of what happened out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.alignment import Alignment
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec
from tmjax.recipes.merge import FusionOptions
from tmjax.sharding.mesh import Layout
from tmjax.transfer.apply import Coefficients, fuse_params, transport_model, without_source
from tmjax.transfer.coefficients.grid import Fit, fit, fixed
from tmjax.transfer.coefficients.learned import BatchLoss, FuseLearned, expanded, learn, start
from tmjax.transfer.operators.embeddings import Blended, Lexicon, blend
from tmjax.transfer.operators.predictions import Solved, Solver, Wanted
from tmjax.transfer.operators.regression import regress_projection
from tmjax.transfer.operators.residual_stream import fuse_stream, stream_table, stream_without_source, transport_stream
from tmjax.transfer.update_table import update_table, with_blended, with_solved
from tmjax.typing import Array, Params


@dataclass(frozen=True)
class Fused:
    """The merged model (in the target's dtypes), the chosen coefficients, the per-tensor table of `update_table`.

    `blended`: what blending the source's embeddings came to, `solved`: what solving for its predictions did, where the
    options have it.
    """

    model: Model
    fit: Fit
    table: dict[str, dict[str, float]]
    blended: Blended | None = None
    solved: Solved | None = None


@dataclass(frozen=True)
class Regressed:
    """What `transport: regression` needs: activations of target and source, and the order of the source's rows."""

    target: Activations
    source: Activations
    source_rows: np.ndarray | None = None


def fuse(
    alignment: Alignment,
    target: Model,
    source: Model,
    options: FusionOptions | None = None,
    *,
    alpha: float | None = None,
    loss: Callable[[Params], float] | None = None,
    screen: Callable[[Params], float] | None = None,
    training: tuple[Iterable[Any], BatchLoss] | None = None,
    activations: Regressed | None = None,
    lexicon: Lexicon | None = None,
    wanted: Sequence[Wanted] | None = None,
    source_params: Params | None = None,
    permutations: dict[str, np.ndarray] | None = None,
    zero_source: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
    known: np.ndarray | None = None,
) -> Fused:
    """Transports the source's projections through the alignment and fuses them into the target.

    `alpha` fixes the coefficient; without it `loss` (of fused parameters, on validation text) chooses from the options'
    grid, or, with `options.fit: learned`, stops the learning on `training` (batches, and the loss of parameters on
    one). With a `screen`, a cheaper loss (on a part of that text), candidates are compared by that, and the best of
    them is held to `loss`. `activations` are for `options.transport: regression`, `lexicon` (the target's tokens as the
    source reads them) for `options.lexical`, `wanted` (texts and what the source says follows) for `options.solve`; a
    fixed alpha leaves the last two out. `dtype` and `layout` are those of the solve's forward passes. `known` [V] bool
    are the rows of the target's embedding that are tokens, where some are not: those stay as they are. The other three
    are for controls: other source weights, permuted source units, a source contribution of zero. Raises InputError if
    what the options need is not given, or a role is missing in a model. Refusing a merge in which nothing came from the
    source is `require_transfer`'s, on the table.
    """
    options = options or FusionOptions()
    params = source.params if source_params is None else source_params
    transported = transport_model(
        alignment,
        target.rows,
        target.params,
        source.rows,
        params,
        options,
        permutations=permutations,
        base=_base(options, target),
        instead=_regression(alignment, target, options, activations, permutations),
    )
    stream = transport_stream(alignment, target, source, options, source_params=params, permutations=permutations)
    if zero_source:
        transported, stream = without_source(transported), stream_without_source(stream)

    def combine(coefficients: Coefficients) -> Params:
        fused = fuse_params(
            target.rows, target.params, transported, coefficients, bias_rule=options.bias, trust=options.trust
        )
        return fuse_stream(fused, stream, coefficients)

    roles = (*transported, *stream)
    if alpha is not None:
        chosen = fixed(alpha, options, roles)
    elif loss is None:
        raise InputError("fuse needs alpha or a loss to choose it by")
    elif options.fit == "learned":
        if training is None:
            raise InputError("fusion.fit: learned needs calibration batches: pass training to fuse")
        begin = start(target.spec, target.projections, roles, options.learning.granularity)
        how = FuseLearned(target.spec, target.rows, options.bias, options.trust)
        chosen = learn(
            how, (dict(target.params), transported, stream), begin, *training, loss, options.learning, progress
        )
        chosen = replace(chosen, coefficients=expanded(target.spec, target.projections, chosen.coefficients))
    else:
        short = None if screen is None else (lambda coefficients: screen(combine(coefficients)))
        chosen = fit(options, lambda coefficients: loss(combine(coefficients)), progress, roles, short)
    fused, blended, solved = combine(chosen.coefficients), None, None
    if options.lexical is not None and alpha is None:
        if lexicon is None or loss is None:
            raise InputError("fusion.lexical needs both tokenizers: pass lexicon to fuse, or set lexical: null")
        how = {"screen": screen, "zero_source": zero_source, "progress": progress}
        blended = blend(fused, params, lexicon, options.lexical, loss, **how)
        fused = blended.params
    if options.solve is not None and alpha is None:
        if not wanted or loss is None:
            raise InputError("fusion.solve needs what the source says follows: pass wanted to fuse, or set solve: null")
        solver = Solver(
            target.spec,
            target.rows,
            target.params,
            options.solve,
            silent=zero_source,
            trust=options.trust,
            dtype=jnp.dtype(dtype),
            layout=layout or Layout(),
            known=known,
        )
        solved = solver.solve(fused, wanted, loss, progress, screen)
        fused, before = solved.params, fused
    table = update_table(target.spec, target.rows, target.params, fused, transported, chosen.coefficients)
    table |= stream_table(target, fused, stream, chosen.coefficients)
    if blended is not None and not zero_source:
        table = with_blended(table, target, blended)
    if solved is not None:
        table = with_solved(table, target, before, solved, solver.paths)
    return Fused(target.with_params(fused), chosen, table, blended, solved)


def _base(options: FusionOptions, target: Model) -> Params | None:
    """The parameters of the common base; raises InputError if it is not of the target's architecture."""
    if options.base is None:
        return None
    base = load_model(options.base)
    if base.spec != target.spec:
        raise InputError(f"fusion.base {options.base} is not of the target's architecture")
    return base.params


def _regression(
    alignment: Alignment,
    target: Model,
    options: FusionOptions,
    held: Regressed | None,
    permutations: dict[str, np.ndarray] | None,
) -> Callable[[ParamSpec], tuple[Array, Array]] | None:
    if options.transport == "weights":
        return None
    if held is None:
        raise InputError("fusion.transport: regression needs the activations; set activations.keep: true")
    return lambda row: regress_projection(
        alignment,
        row,
        target.params[row.path],
        held.target,
        held.source,
        ridge=options.ridge,
        source_rows=held.source_rows,
        permutations=permutations,
    )
