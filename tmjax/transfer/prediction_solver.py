"""Rounds of ridge regressions toward wanted predictions: what the source says comes next, beside what comes in truth.

At every position of the calibration texts the true next token, and the source's probabilities where both models read
the same text so far, say how logits and the last residual stream should change. The change of a projection that turns
its inputs x into the wanted changes y is a ridge regression in closed form,

    dW = Y (A + lambda tr(A) / n I)^-1,  Y = mean of y x^T,  A = mean of x x^T,

as Benzing (2022) steps in FOOF; the read-out is solved per token with its own curvature, the mean of p (1 - p). What
writes the residual stream is solved as if nothing came after it, so nothing is propagated back through a block.
Validation text says how much of a change is taken, and what the source's word weighs. There is no optimiser; read
strictly, what a round does to the read-out and to the last block is one damped Gauss-Newton step.
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

from tmjax.activations.joined import Joined, run_joined
from tmjax.errors import NonFiniteError
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.recipes.base import Positive, PositiveFloat, Section
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.typing import Array, ArrayLike, Params

#: What the source's word weighs beside the true tokens, position for position.
WEIGHTS = (0.0, 0.3, 1.0, 3.0)
#: What an arm without a source multiplies its steps by where others try weights: as many trials for all.
STEPS_FOR_WEIGHTS = (1.0, 0.25, 0.7, 2.0)
#: First steps (read-out, projections), and what later trials of a round multiply them by.
STEPS = (0.12, 0.05)
FACTORS = ((0.5, 1.0), (1.0, 0.5), (1.5, 1.5))
#: Projections that write the residual stream.
WRITERS = ("o", "down")
#: Logits are made for about this many entries (token x vocabulary) at a time: of a batch on an accelerator, of a part
#: of one on a CPU, whose caches hold about so many; but for at least so many tokens.
LOGIT_ENTRIES, CPU_ENTRIES, LEAST_TOKENS = 2**26, 2**20, 512
_EXACT = jax.lax.Precision.HIGHEST


def batch_tokens(vocab: int, most: int) -> int:
    """Tokens of a batch, at most `most` of them unless that is too few to read the unembedding for."""
    return max(LEAST_TOKENS, min(most, LOGIT_ENTRIES // vocab))


class PredictionTargets(NamedTuple):
    """A batch of texts, joined in rows, and the source's probabilities of their next tokens.

    `own`: whether the texts' own next tokens are targets too. At every token of the rows [B, T], `token` [B, T, K]
    int32 and their probabilities `weight` [B, T, K] float32, zero where the source has no say.
    """

    texts: Joined
    own: bool
    token: ArrayLike
    weight: ArrayLike


class Sums(NamedTuple):
    """Means over positions: wanted changes times inputs, of the true tokens and of the source's word; input Grams.

    `wanted` [2, V, embed] and `gram` [embed, embed] are the read-out's, `curvature` [V] its mean of p (1 - p);
    `inner` [2, L, out, in] by path and `grams` [L, in, in] by input site the projections'. `count` [3]: positions
    of the true tokens, of the source's word, of all texts.
    """

    wanted: Array
    gram: Array
    curvature: Array
    inner: dict[str, Array]
    grams: dict[str, Array]
    count: Array


class SolvedArrays(NamedTuple):
    """Arrays that are solved: the path of the read-out, and (path, input site) of the projections that move."""

    readout: str
    writers: tuple[tuple[str, str], ...]


def logits_at_once(vocab: int, tokens: int) -> int:
    """Tokens of a batch of `tokens` whose logits are made at the same time."""
    return tokens if jax.default_backend() != "cpu" else min(tokens, max(LEAST_TOKENS, CPU_ENTRIES // vocab))


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
    """Adds up one batch for the arrays that are solved."""
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
        found, back, states = jax.vjp(logits, jnp.asarray(params[readout], jnp.float32), stream, has_aux=True)
        p = jax.nn.softmax(found)
        row, place = jnp.ogrid[: p.shape[0], : p.shape[1]]
        said = jnp.sum(weight, axis=-1)
        # What is wanted of the logits: minus the slope of the loss, q - p as often as a token is wanted.
        wanted = [(-said[..., None] * p).at[row[..., None], place[..., None], token].add(weight)]
        if own:
            wanted.insert(0, (-real[..., None] * p).at[row, place, jnp.maximum(label, 0)].add(real))
        moved, asked = zip(*map(back, wanted), strict=True)
        total = total[0] + jnp.stack(moved), total[1] + jnp.sum(real[..., None] * p * (1 - p), axis=(0, 1))
        return total, (jnp.stack(asked, axis=2).astype(jnp.float32), states.astype(jnp.float32))

    kinds = 1 + own
    start = jnp.zeros((kinds, *params[readout].shape)), jnp.zeros(spec.vocab)
    parts = tuple(map(cut, (last, jnp.asarray(texts.label), real, token, weight)))
    (wanted, curvature), pieces = jax.lax.scan(piece, start, parts)
    asked, states = map(whole, pieces)
    hidden = states * real[..., None]
    inputs = {site: x.astype(jnp.float32) * real[:, :, None] for site, x in captured.items()}

    def both(x: Array) -> Array:
        """For the true tokens and for the source's word, the former zero if they are not wanted."""
        return x if own else jnp.concatenate([jnp.zeros_like(x), x])

    return Sums(
        both(wanted),
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
        both(sums.wanted),
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
    held = gram + ridge * mean[..., None, None] * jnp.eye(n)
    # Both right-hand sides as more rows of one.
    rows = jnp.moveaxis(values, 0, -3).reshape(*gram.shape[:-2], -1, n)
    solved = jnp.swapaxes(jnp.linalg.solve(held, jnp.swapaxes(rows, -1, -2)), -1, -2)
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
    """The tensors after `step` (in units of their norms) in the mixed direction, each within `trust` of its start."""
    found = {}
    for path, value in now.items():
        change = direction[path][0] + weight * direction[path][1]
        value = value + step[path] * change * _norm(value) / jnp.maximum(_norm(change), 1e-30)
        if trust is not None:
            first = start[path].astype(jnp.float32)
            far, limit = _norm(value - first), trust * _norm(first)
            value = first + (value - first) * jnp.where(far > limit, limit / jnp.maximum(far, 1e-30), 1.0)
        found[path] = value
    return found


def finite(loss: Callable[[Params], float], params: Params) -> float:
    """The loss, infinity if it is not finite: of a step too far, worse than any other and no reason to end a merge."""
    try:
        found = loss(params)
    except NonFiniteError:
        return math.inf
    return found if math.isfinite(found) else math.inf


class _Trial(NamedTuple):
    """Validation bits per byte at a weight of the source's word and steps (read-out, projections)."""

    loss: float
    weight: float
    steps: tuple[float, float]


@dataclass(frozen=True)
class Solved:
    """What the rounds came to: parameters, validation bits per byte before and after each, choices, trials made.

    `positions`: of the true tokens, of the source's word (by its probability), of all texts.
    """

    params: Params
    losses: list[float]
    chosen: list[dict[str, float]]
    trials: int
    positions: tuple[float, ...]

    @property
    def from_source(self) -> bool:
        """Whether any round that was taken listened to the source."""
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
    """Solves a model's read-out, and with `scope: direct` what writes its residual stream.

    `start` are the parameters that the trust cap is about. `known` [V] bool are the rows of the read-out that are
    tokens, where some are not: those stay as they are.
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
        """Path of the read-out, which may be the embeddings too."""
        return "embed.weight" if self.spec.tied_embeddings else "head.weight"

    @property
    def writers(self) -> tuple[tuple[str, str], ...]:
        """(path, input site) of the projections that move."""
        rows = projections(self.rows)
        roles = WRITERS if self.options.scope == "direct" else ()
        return tuple((rows[role].path, rows[role].input_site) for role in roles if role in rows)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of everything that moves."""
        return (self.readout, *(path for path, _ in self.writers))

    def sums(self, params: Params, batches: Sequence[PredictionTargets]) -> Sums:
        """What the solve needs of the texts under these parameters."""
        total: Sums | None = None
        how = SolvedArrays(self.readout, self.writers), self.dtype, self.layout.mesh
        for batch in batches:
            place = self.layout.place_batch
            arrays = Joined(*map(place, batch.texts)), place(batch.token), place(batch.weight)
            found = _sums(self.spec, params, *arrays, batch.own, *how)
            total = jax.block_until_ready(found if total is None else _added(total, found))
        assert total is not None
        return jax.block_until_ready(_means(total))

    def directions(self, sums: Sums) -> dict[str, Array]:
        """The solved changes by path, [2, ...]: for the true tokens, for the source's word."""
        ridge = self.options.ridge
        seen = sums.curvature + self.options.prior_tokens / sums.count[2]
        readout = _right_solve(sums.gram, sums.wanted, ridge) / seen[:, None]
        found = {self.readout: readout if self.known is None else jnp.where(self.known[:, None], readout, 0.0)}
        for path, site in self.writers:
            # One at a time: several LAPACK calls in one program can lock up the thread pool of XLA's CPU backend.
            found[path] = jax.block_until_ready(_right_solve(sums.grams[site], sums.inner[path], ridge))
        return found

    def moved(
        self, params: Params, directions: dict[str, Array], weight: float, steps: tuple[float, float]
    ) -> dict[str, ArrayLike]:
        """The parameters after steps of these sizes (read-out, projections)."""
        sizes = {path: jnp.float32(steps[path != self.readout]) for path in self.paths}
        now, first = ({path: held[path] for path in self.paths} for held in (params, self.start))
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
        """All weights at these steps, then other steps at the best weight; without a source, steps for weights.

        In every round: the first ones often take the true tokens alone, and hear the source once these are learnt.
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
        """At most `rounds` solves; every arm tries as many weights of the source's word and steps on `loss`.

        With a `screen`, a cheaper loss, a round's trials are compared by that, and the best of them is held to `loss`.
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
