"""One training step: the loss of a batch, its gradient, an update. Pure functions, jitted once a shape."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tmjax.models.blocks.primitives import einsum
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.spec import DecoderSpec
from tmjax.train.data import Batch, Guide
from tmjax.train.loss import TeacherTokens, summed_losses
from tmjax.train.modes import Frozen, Mode, Plain
from tmjax.train.optimizer import GUIDE, TrainConfig, Weights, optimizer
from tmjax.typing import Array, ArrayLike, Params

#: Paths of the parameters with a row or an entry per token.
VOCABULARY = ("embed.weight", "head.weight", "head.bias")


@dataclass(frozen=True)
class Objective:
    """A training problem: architecture, optimiser, the map from trained arrays to parameters, mesh.

    `padding` are ranges [start, end) of the vocabulary's rows that are no tokens; those stay as they are.
    """

    spec: DecoderSpec
    config: TrainConfig
    mode: Mode = Plain()  # noqa: RUF009  (frozen, without fields)
    mesh: Mesh | None = None
    padding: tuple[tuple[int, int], ...] = ()

    def compiled(self) -> "Objective":
        """Returns the part that compiled programs depend on, without numbers of steps and learning rates."""
        same = replace(self.config, steps=1, tokens_per_step=1, accumulate=1, lr=1.0, warmup=0, final_lr=0.0)
        same = replace(same, guide_weight=0.0, teacher_weight=0.0, anneal=1.0)
        return replace(self, config=same)


class State(NamedTuple):
    """Trained arrays and optimiser; `healthy` turns false at the first loss or gradient that is not a number.

    From then on nothing else changes: the state stays the last good one. `average` is the exponential moving average of
    the trained arrays, empty unless `TrainConfig.average` asks for one.
    """

    trained: dict[str, Array]
    optimizer: optax.OptState
    healthy: Array
    average: dict[str, Array]


class Losses(NamedTuple):
    """Means in nats: `text`, cross entropy per token that counts; `teacher`, divergence from the teacher per position.

    `guide` is the squared error per standardised feature, `norm` that of the gradient, before clipping.
    """

    text: Array
    guide: Array
    teacher: Array
    norm: Array


class Share(NamedTuple):
    """One over the number of tokens, spans and positions with a teacher in a whole step."""

    text: ArrayLike
    guide: ArrayLike
    teacher: ArrayLike


def padding_of(known: np.ndarray | None) -> tuple[tuple[int, int], ...]:
    """Returns the ranges [start, end) of rows that are no tokens, given the mask of those that are (None: all are)."""
    if known is None:
        return ()
    edges = np.flatnonzero(np.diff(np.concatenate([[True], known, [True]]).astype(np.int8)))
    return tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))


def guide_error(trained: Params, frozen_mean: Array, frozen_scale: Array, states_lbre: Array, guide: Guide) -> Array:
    """Sums over spans the mean squared error of predicted source features, over layers and source units.

    Target features [L, B, R, embed] are standardised by `frozen_mean` and `frozen_scale` [L, embed] and mapped by
    `guide.weight` [L, k, embed] and `guide.bias` [L, k]; all in float32.
    """
    z = (states_lbre.astype(jnp.float32) - frozen_mean[:, None, None]) / frozen_scale[:, None, None]
    predicted = einsum("lbre,lke->lbrk", z, trained[f"{GUIDE}weight"]) + trained[f"{GUIDE}bias"][:, None, None]
    return jnp.sum(jnp.mean(jnp.square(predicted - guide.source_lbrk), axis=(0, 3)) * guide.mask_br)


def _losses(
    objective: Objective, trained: Params, frozen: Frozen, batch: Batch, share: Share, weights: Weights
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Computes the loss of a batch and its parts: sums times `share`."""
    spec, config, mesh = objective.spec, objective.config, objective.mesh
    maps = {path: value for path, value in frozen.items() if path.startswith(GUIDE)}
    others = {path: value for path, value in frozen.items() if path not in maps}
    own = {path: value for path, value in trained.items() if not path.startswith(GUIDE)}
    model = bind(spec, objective.mode.params(own, others))
    guide, teacher = batch.guide, batch.teacher

    def pick(states_bte: Array) -> Array:
        return jnp.take_along_axis(states_bte, guide.position_br[..., None], axis=1)

    sites = () if guide is None else ("resid",)
    plan = ForwardPlan(jnp.dtype(config.dtype), sites, pick, mesh, config.remat, config.unroll)
    hidden, captured, _ = model.run(batch.ids_bt, plan)
    if teacher is not None:
        scale = weights.teacher * share.teacher
        teacher = TeacherTokens(teacher.ids_btk, teacher.weight_btk, teacher.mask_bt * scale)
    total, text, divergence = summed_losses(
        spec, model.readout, hidden, batch.targets_bt, batch.mask_bt * share.text, teacher, mesh
    )
    divergence = divergence / jnp.maximum(weights.teacher, 1e-30)
    if guide is None:
        return total, (text, jnp.zeros(()), divergence)
    error = guide_error(trained, maps[f"{GUIDE}mean"], maps[f"{GUIDE}scale"], captured["resid"], guide) * share.guide
    return total + weights.guide * error, (text, error, divergence)


_gradients = jax.value_and_grad(_losses, argnums=1, has_aux=True)


def _share(batches: Sequence[Batch]) -> Share:
    """One over the numbers of a step of `batches`; computed where the batches are."""
    tokens = sum(jnp.sum(batch.mask_bt) for batch in batches)
    spans = sum(0.0 if batch.guide is None else jnp.sum(batch.guide.mask_br) for batch in batches)
    positions = sum(0.0 if batch.teacher is None else jnp.sum(batch.teacher.mask_bt) for batch in batches)
    return Share(*(1 / jnp.maximum(jnp.float32(count), 1.0) for count in (tokens, spans, positions)))


@functools.partial(jax.jit, static_argnames=("spec",))
def next_token_loss(spec: DecoderSpec, params: Params, batch: Batch) -> Array:
    """Computes the mean cross entropy, in nats, of the tokens that count."""
    objective = Objective(spec, TrainConfig(steps=1, warmup=0))
    plain = batch._replace(guide=None, teacher=None)
    return _losses(objective, params, {}, plain, _share([plain]), Weights())[0]


def _update(
    objective: Objective, state: State, rate: Array, gradient: dict[str, Array], parts: tuple[Array, Array, Array]
) -> tuple[State, Losses]:
    norm = optax.tree.norm(gradient)
    updates, moved = optimizer(objective.config).update(gradient, state.optimizer, state.trained)
    healthy = state.healthy & jnp.isfinite(sum(parts)) & jnp.isfinite(norm)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(healthy, new, old)

    trained = jax.tree.map(lambda x, update: keep(x - rate * update, x), state.trained, updates)
    for path in VOCABULARY if objective.padding else ():
        if path in trained:
            padded = jnp.zeros(objective.spec.vocab, bool)
            for start, end in objective.padding:
                padded = padded.at[start:end].set(True)
            mask = padded.reshape(-1, *[1] * (trained[path].ndim - 1))
            trained[path] = jnp.where(mask, state.trained[path], trained[path])
    part = 1.0 - objective.config.average
    # As a difference, so that rows that are never trained stay equal bit for bit.
    average = {path: keep(old + part * (trained[path] - old), old) for path, old in state.average.items()}
    return State(trained, jax.tree.map(keep, moved, state.optimizer), healthy, average), Losses(*parts, norm)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("state",))
def train_step(
    objective: Objective, state: State, frozen: Frozen, batch: Batch, rate: Array, weights: Weights
) -> tuple[State, Losses]:
    """Makes one update from one batch; returns the new state and the losses before the update. Donates the state."""
    (_, parts), gradient = _gradients(objective, state.trained, frozen, batch, _share([batch]), weights)
    return _update(objective, state, rate, gradient, parts)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("total",))
def add_gradient(
    objective: Objective,
    trained: Params,
    frozen: Frozen,
    batch: Batch,
    share: Share,
    weights: Weights,
    total: tuple[dict[str, Array], tuple[Array, Array, Array]],
) -> tuple[dict[str, Array], tuple[Array, Array, Array]]:
    """Adds one batch's gradient and losses to those of a step of several; `share` are the step's inverse numbers."""
    (_, parts), gradient = _gradients(objective, trained, frozen, batch, share, weights)
    return jax.tree.map(jnp.add, total, (gradient, parts))


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("state",))
def apply_gradient(
    objective: Objective, state: State, rate: Array, total: tuple[dict[str, Array], tuple[Array, Array, Array]]
) -> tuple[State, Losses]:
    """Makes one update from an accumulated gradient."""
    return _update(objective, state, rate, *total)


def step(
    objective: Objective,
    state: State,
    frozen: Frozen,
    batches: list[Batch],
    rate: float,
    weights: Weights | None = None,
) -> tuple[State, Losses]:
    """Makes one update from several batches as if they were one: means are over all of their tokens.

    Args:
        objective: The training problem.
        state: Trained arrays and optimiser; donated.
        frozen: Arrays that are not trained.
        batches: The batches of the step.
        rate: Learning rate.
        weights: Weights of guidance and teacher at this step; the initial ones unless given.

    Returns:
        The new state and the losses before the update.
    """
    weights = Weights.at(objective.config, 0) if weights is None else weights
    objective = objective.compiled()
    if len(batches) == 1:
        return train_step(objective, state, frozen, batches[0], np.float32(rate), weights)
    share = _share(batches)
    zero = jnp.zeros((), jnp.float32)
    total = (jax.tree.map(jnp.zeros_like, state.trained), (zero, zero.copy(), zero.copy()))
    for batch in batches:
        total = add_gradient(objective, state.trained, frozen, batch, share, weights, total)
    return apply_gradient(objective, state, np.float32(rate), total)


def start(objective: Objective, trained: dict[str, Array]) -> State:
    """Returns the state before the first step: optimiser moments are zero, laid out like their parameters."""
    average = {path: jnp.copy(value) for path, value in trained.items()} if objective.config.average else {}
    state = State(trained, optimizer(objective.config).init(trained), jnp.asarray(True), average)
    if objective.mesh is None:
        return state
    everywhere = NamedSharding(objective.mesh, PartitionSpec())
    # Counters too, or the second step, which finds them on the mesh, would be compiled again.
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere), state)


@functools.partial(jax.jit, static_argnames=("mode",))
def fold(mode: Mode, trained: Params, frozen: Frozen) -> dict[str, Array]:
    """Returns the parameters of the trained model: residuals and low-rank updates added, guidance left out."""
    parts = ({path: x for path, x in each.items() if not path.startswith(GUIDE)} for each in (trained, frozen))
    return mode.params(*parts)
