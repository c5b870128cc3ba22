"""Rounds of ridge regressions toward prediction targets: the true next tokens and the teacher probabilities.

The targets of a position of the calibration texts are the true next token, and the source's probabilities wherever both
models have read the same text. The residuals of the targets give the changes y of the logits and of the last residual
stream. The change of a projection that maps its inputs x to the changes y is a ridge regression in closed form,

    dW = Y (A + lambda tr(A) / n I)^-1,  Y = mean of y x^T,  A = mean of x x^T,

as in FOOF (Benzing, 2022). The read-out is solved per token with its own curvature, the mean of p (1 - p). A projection
that writes the residual stream is solved as if no block followed it, so nothing is propagated back through a block.
The step sizes and the weight of the teacher probabilities are chosen on validation text. There is no optimiser; a round
is one damped Gauss-Newton step of the read-out and of the last block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from pydantic import Field

from tmjax import backend
from tmjax.activations.joined import Joined, run_joined
from tmjax.errors import NonFiniteError
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.recipes.base import Positive, PositiveFloat, Section
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.typing import Array, ArrayLike, Params

#: Weights tried for the teacher probabilities, relative to the true next tokens.
WEIGHTS = (0.0, 0.3, 1.0, 3.0)
#: Step factors that an arm without a source tries in place of weights, so that all arms have as many trials.
STEPS_FOR_WEIGHTS = (1.0, 0.25, 0.7, 2.0)
#: Initial steps (read-out, projections), and the factors of the later trials of a round.
STEPS = (0.12, 0.05)
FACTORS = ((0.5, 1.0), (1.0, 0.5), (1.5, 1.5))
#: Projections that write the residual stream.
WRITERS = ("o", "down")
#: Entries (token x vocabulary) of the logits made at a time: of a batch on an accelerator, of a part of one on a CPU,
#: whose caches hold about that many; and the smallest number of tokens.
LOGIT_ENTRIES, CPU_ENTRIES, LEAST_TOKENS = 2**26, 2**20, 512
_EXACT = jax.lax.Precision.HIGHEST


def batch_tokens(vocab: int, max_tokens: int) -> int:
    """Returns the tokens of a batch: at most `max_tokens`, unless that is too few to read the unembedding for."""
    return max(LEAST_TOKENS, min(max_tokens, LOGIT_ENTRIES // vocab))


class PredictionTargets(NamedTuple):
    """A batch of texts, joined in rows, and the source's probabilities of their next tokens.

    `own`: whether the texts' own next tokens are targets too. At every token of the rows [B, T], `token` [B, T, K]
    int32 and their probabilities `weight` [B, T, K] float32, zero where the source has no distribution.
    """

    texts: Joined
    own: bool
    token: ArrayLike
    weight: ArrayLike


class Sums(NamedTuple):
    """Sums or means over positions: target changes times inputs, of true tokens and of the teacher; Grams of inputs.

    `cross` [2, V, embed] and `gram` [embed, embed] belong to the read-out, `curvature` [V] is its mean of p (1 - p);
    `inner` [2, L, out, in] by path and `grams` [L, in, in] by input site belong to the projections. `count` [3]:
    positions of the true tokens, of the teacher (by its probability), of all texts.
    """

    cross: Array
    gram: Array
    curvature: Array
    inner: dict[str, Array]
    grams: dict[str, Array]
    count: Array


class SolvedArrays(NamedTuple):
    """Arrays that are solved: the path of the read-out, and (path, input site) of the projections that change."""

    readout: str
    writers: tuple[tuple[str, str], ...]


def logits_at_once(vocab: int, tokens: int) -> int:
    """Returns the number of tokens, of a batch of `tokens`, whose logits are made at the same time."""
    return tokens if backend.platform() != "cpu" else min(tokens, max(LEAST_TOKENS, CPU_ENTRIES // vocab))


@functools.partial(jax.jit, static_argnames=("spec", "own", "solved", "dtype", "mesh"))
def _sums(
    spec: DecoderSpec,
    params: Params,
    texts: Joined,
    token: Array,
    weight: Array,
    own: bool,
    solved: SolvedArrays,
    dtype: jnp.dtype,
    mesh: Mesh | None,
) -> Sums:
    """Sums one batch for the arrays that are solved."""
    readout, writers = solved
    real = (texts.text >= 0).astype(jnp.float32)
    sites = ("resid", *dict.fromkeys(site for _, site in writers))
    captured = run_joined(bind(spec, params), texts, ForwardPlan(dtype, sites, mesh=mesh)).captured
    last = captured.pop("resid")[-1]
    rows, tokens, _ = last.shape
    # Parts of the token axis, not of the batch: the batch is what a mesh splits.
    count = -(-tokens // max(1, logits_at_once(spec.vocab, rows * tokens) // rows))
    size = -(-tokens // count)

    def logits(weight: Array, stream: Array) -> tuple[Array, Array]:
        decoder = bind(spec, {**params, readout: weight})
        states = decoder.norm(stream)
        return decoder.logits(states), states

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, count * size - tokens), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    def whole(x: Array) -> Array:
        """[pieces, B, size, ...] as [B, T, ...]."""
        return jnp.moveaxis(x, 0, 1).reshape(rows, count * size, *x.shape[3:])[:, :tokens]

    def piece(total: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        stream, label, real, token, weight = part
        scores, back, states = jax.vjp(logits, jnp.asarray(params[readout], jnp.float32), stream, has_aux=True)
        p = jax.nn.softmax(scores)
        row, place = jnp.ogrid[: p.shape[0], : p.shape[1]]
        mass = jnp.sum(weight, axis=-1)
        # Residuals of the logits, the negative gradient of the loss: q - p, weighted by the mass of the target.
        residuals = [(-mass[..., None] * p).at[row[..., None], place[..., None], token].add(weight)]
        if own:
            residuals.insert(0, (-real[..., None] * p).at[row, place, jnp.maximum(label, 0)].add(real))
        moved, asked = zip(*map(back, residuals), strict=True)
        total = total[0] + jnp.stack(moved), total[1] + jnp.sum(real[..., None] * p * (1 - p), axis=(0, 1))
        return total, (jnp.stack(asked, axis=2).astype(jnp.float32), states.astype(jnp.float32))

    kinds = 1 + own
    start = jnp.zeros((kinds, *params[readout].shape)), jnp.zeros(spec.vocab)
    parts = tuple(map(cut, (last, jnp.asarray(texts.label), real, token, weight)))
    (cross, curvature), pieces = jax.lax.scan(piece, start, parts)
    asked, states = map(whole, pieces)
    hidden = states * real[..., None]
    inputs = {site: x.astype(jnp.float32) * real[:, :, None] for site, x in captured.items()}

    def both(x: Array) -> Array:
        """Returns [true tokens, teacher]; the former is zero if true tokens are no targets."""
        return x if own else jnp.concatenate([jnp.zeros_like(x), x])

    return Sums(
        both(cross),
        jnp.einsum("bte,btf->ef", hidden, hidden, precision=_EXACT),
        curvature,
        {path: both(jnp.einsum("btso,lbti->sloi", asked, inputs[site], precision=_EXACT)) for path, site in writers},
        {site: jnp.einsum("lbti,lbtj->lij", x, x, precision=_EXACT) for site, x in inputs.items()},
        jnp.stack([own * jnp.sum(real), jnp.sum(weight), jnp.sum(real)]),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _added(total: Sums, more: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, more)


@jax.jit
def _means(sums: Sums) -> Sums:
    seen = sums.count[2]
    each = jnp.maximum(sums.count[:2], 1e-30)

    def both(x: Array) -> Array:
        return x / each.reshape(2, *[1] * (x.ndim - 1))

    return Sums(
        both(sums.cross),
        sums.gram / seen,
        sums.curvature / seen,
        {path: both(x) for path, x in sums.inner.items()},
        {site: x / seen for site, x in sums.grams.items()},
        sums.count,
    )


@functools.partial(jax.jit, static_argnames="ridge")
def _right_solve(gram: Array, values: Array, ridge: float) -> Array:
    """values (gram + ridge tr(gram) / n I)^-1 for symmetric gram [..., n, n] and values [2, ..., out, n]."""
    n = gram.shape[-1]
    mean = jnp.trace(gram, axis1=-2, axis2=-1) / n
    damped = gram + ridge * mean[..., None, None] * jnp.eye(n)
    # Both right-hand sides as more rows of one.
    rows = jnp.moveaxis(values, 0, -3).reshape(*gram.shape[:-2], -1, n)
    solved = jnp.swapaxes(jnp.linalg.solve(damped, jnp.swapaxes(rows, -1, -2)), -1, -2)
    return jnp.moveaxis(solved.reshape(*gram.shape[:-2], 2, -1, n), -3, 0)


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


@functools.partial(jax.jit, static_argnames="trust")
def _moved(
    now: dict[str, Array],
    start: dict[str, ArrayLike],
    direction: dict[str, Array],
    step: dict[str, Array],
    weight: Array,
    trust: float | None,
) -> dict[str, Array]:
    """Moves tensors by `step` (in units of their norms) in the mixed direction, each within `trust` of its start."""
    result = {}
    for path, value in now.items():
        change = direction[path][0] + weight * direction[path][1]
        value = value + step[path] * change * _norm(value) / jnp.maximum(_norm(change), 1e-30)
        if trust is not None:
            first = start[path].astype(jnp.float32)
            far, limit = _norm(value - first), trust * _norm(first)
            value = first + (value - first) * jnp.where(far > limit, limit / jnp.maximum(far, 1e-30), 1.0)
        result[path] = value
    return result


def finite(loss: Callable[[Params], float], params: Params) -> float:
    """Returns the loss, or infinity if it is not finite: too large a step loses its trial and does not end a merge."""
    try:
        value = loss(params)
    except NonFiniteError:
        return math.inf
    return value if math.isfinite(value) else math.inf


class _Trial(NamedTuple):
    """Validation bits per byte at a weight of the teacher probabilities and steps (read-out, projections)."""

    loss: float
    weight: float
    steps: tuple[float, float]


@dataclass(frozen=True)
class Solved:
    """Result of the rounds: parameters, validation bits per byte before and after each, choices, number of trials.

    `positions`: of the true tokens, of the teacher (by its probability), of all texts.
    """

    params: Params
    losses: list[float]
    chosen: list[dict[str, float]]
    trials: int
    positions: tuple[float, ...]

    @property
    def from_source(self) -> bool:
        """Whether any accepted round gave the teacher probabilities a weight."""
        return any(item["weight"] > 0 for item in self.chosen)


class PredictionOptions(Section):
    """Options of the operator `predictions`."""

    scope: Annotated[
        Literal["readout", "direct"],
        Field(
            description="`readout` solves for the read-out alone, `direct` also for the output projections of "
            "attention and MLP of every layer, each as if nothing came after it."
        ),
    ] = "direct"
    rounds: Annotated[Positive, Field(description="Largest number of rounds, in each of which all is solved.")] = 20
    ridge: Annotated[PositiveFloat, Field(description="Penalty, in units of the inputs' mean square.")] = 0.1
    prior_tokens: Annotated[
        PositiveFloat, Field(description="Tokens that each token of the vocabulary counts as seen before any text.")
    ] = 30.0
    patience: Annotated[Positive, Field(description="Rounds without a better trial that end the solve.")] = 2
    generated_texts: Annotated[
        int,
        Field(ge=0, description="Texts that the source generates, read beside the calibration texts; 0: none."),
    ] = 3000
    tokens: Annotated[Positive, Field(description="Longest generated text, in tokens of the source.")] = 96
    trust: Annotated[
        PositiveFloat | None,
        Field(description="Largest change of a tensor from where the solve began, as a part of its norm."),
    ] = None


@dataclass(frozen=True)
class Solver:
    """Solves a model's read-out, and with `scope: direct` the projections that write its residual stream.

    `start` are the parameters that the trust cap is relative to. `known` [V] bool marks the rows of the read-out that
    are tokens, if some are not; the other rows stay unchanged.
    """

    spec: DecoderSpec
    rows: tuple[ParamSpec, ...]
    start: Params
    options: PredictionOptions
    dtype: jnp.dtype = jnp.float32
    layout: Layout = field(default_factory=Layout)
    known: np.ndarray | None = None

    @property
    def readout(self) -> str:
        """Path of the read-out; with tied embeddings, that of the embeddings."""
        return "embed.weight" if self.spec.tied_embeddings else "head.weight"

    @property
    def writers(self) -> tuple[tuple[str, str], ...]:
        """(path, input site) of the projections that change."""
        rows = projections(self.rows)
        roles = WRITERS if self.options.scope == "direct" else ()
        return tuple((rows[role].path, rows[role].input_site) for role in roles if role in rows)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all tensors that change."""
        return (self.readout, *(path for path, _ in self.writers))

    def sums(self, params: Params, batches: Sequence[PredictionTargets]) -> Sums:
        """Computes the means over the texts that the solve needs, under these parameters."""
        total: Sums | None = None
        how = SolvedArrays(self.readout, self.writers), self.dtype, self.layout.mesh
        for batch in batches:
            place = self.layout.place_batch
            arrays = Joined(*map(place, batch.texts)), place(batch.token), place(batch.weight)
            batch_sums = _sums(self.spec, params, *arrays, batch.own, *how)
            total = jax.block_until_ready(batch_sums if total is None else _added(total, batch_sums))
        assert total is not None
        return jax.block_until_ready(_means(total))

    def directions(self, sums: Sums) -> dict[str, Array]:
        """Solves for the changes by path, [2, ...]: for the true tokens, for the teacher probabilities."""
        ridge = self.options.ridge
        seen = sums.curvature + self.options.prior_tokens / sums.count[2]
        readout = _right_solve(sums.gram, sums.cross, ridge) / seen[:, None]
        changes = {self.readout: readout if self.known is None else jnp.where(self.known[:, None], readout, 0.0)}
        for path, site in self.writers:
            # One at a time: several LAPACK calls in one program can lock up the thread pool of XLA's CPU backend.
            changes[path] = jax.block_until_ready(_right_solve(sums.grams[site], sums.inner[path], ridge))
        return changes

    def moved(
        self, params: Params, directions: dict[str, Array], weight: float, steps: tuple[float, float]
    ) -> dict[str, ArrayLike]:
        """Returns the parameters after steps of these sizes (read-out, projections)."""
        sizes = {path: jnp.float32(steps[path != self.readout]) for path in self.paths}
        now, first = ({path: each[path] for path in self.paths} for each in (params, self.start))
        return {**params, **_moved(now, first, directions, sizes, jnp.float32(weight), self.options.trust)}

    def _tried(
        self,
        params: Params,
        directions: dict[str, Array],
        steps: tuple[float, float],
        loss: Callable[[Params], float],
        *,
        with_source: bool,
    ) -> list[_Trial]:
        """Tries all weights at these steps, then other steps at the best weight; without a source, steps for weights.

        Weights are tried in every round: the first rounds often choose weight 0, later ones a positive weight.
        """

        def attempt(weight: float, step: tuple[float, float]) -> _Trial:
            return _Trial(finite(loss, self.moved(params, directions, weight, step)), weight, step)

        if with_source:
            tried = [attempt(other, steps) for other in WEIGHTS]
        else:
            tried = [attempt(0.0, (a * steps[0], a * steps[1])) for a in STEPS_FOR_WEIGHTS]
        _, weight, taken = min(tried)
        return tried + [attempt(weight, (a * taken[0], b * taken[1])) for a, b in FACTORS]

    def solve(
        self,
        params: Params,
        batches: Sequence[PredictionTargets],
        loss: Callable[[Params], float],
        progress: Callable[[int, int], None] = lambda done, total: None,
        screen: Callable[[Params], float] | None = None,
    ) -> Solved:
        """Solves at most `rounds` times; every arm has as many trials of weights and steps, compared by `loss`.

        With a `screen`, a cheaper loss, the trials of a round are compared by it and only the best is scored by `loss`.
        A round without a better trial halves the steps. Raises NonFiniteError if no trial of a round has a finite loss.
        """
        params = {**params, **{path: jnp.asarray(params[path], jnp.float32) for path in self.paths}}
        with_source = any(np.any(batch.weight) for batch in batches)
        steps, failures, trials = STEPS, 0, 0
        losses, chosen, positions = [loss(params)], [], ()
        for number in range(self.options.rounds):
            sums = self.sums(params, batches)
            positions = tuple(float(x) for x in to_host(sums.count))
            directions = self.directions(sums)
            tried = self._tried(params, directions, steps, screen or loss, with_source=with_source)
            trials += len(tried)
            best = min(tried)
            if math.isinf(best.loss):
                raise NonFiniteError("the predictions of the model that is solved for are not finite")
            moved = self.moved(params, directions, best.weight, best.steps)
            if screen is not None:
                best = best._replace(loss=finite(loss, moved))
            if best.loss < losses[-1]:
                params = moved
                steps, failures = best.steps, 0
                losses.append(best.loss)
                chosen.append({"weight": best.weight, "readout": best.steps[0], "projections": best.steps[1]})
            else:
                steps, failures = (steps[0] / 2, steps[1] / 2), failures + 1
            progress(number + 1, self.options.rounds)
            if failures == self.options.patience:
                break
        progress(self.options.rounds, self.options.rounds)
        return Solved(params, losses, chosen, trials, positions)
