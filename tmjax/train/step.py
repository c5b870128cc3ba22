"""One training step: the loss of a batch, its gradient, AdamW. Pure functions, jitted once a shape.

Decoupled weight decay: Loshchilov and Hutter 2019 (arXiv:1711.05101), on matrices only.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tmjax.errors import InputError
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.layers import einsum
from tmjax.models.spec import DecoderSpec
from tmjax.train.data import Batch, Guide
from tmjax.train.loss import Teaching, summed_losses
from tmjax.train.modes import Frozen, Mode, Plain
from tmjax.typing import Array, ArrayLike, Params

#: What paths of the maps that tie target to source features begin with; they are trained, but no part of the model.
GUIDE = "guide."
#: Paths of the tables with a row per token.
VOCABULARY = ("embed.weight", "head.weight")


@dataclass(frozen=True)
class TrainConfig:
    """Steps and optimiser; hashable, so it is a static argument of the jitted step.

    The learning rate rises linearly to `lr` over `warmup` steps and falls along a cosine to `lr * final_lr`.
    `clip` bounds the global norm of the gradient, `weight_decay` shrinks matrices (not norms and biases). A step is
    made of `accumulate` batches of `tokens_per_step` tokens. Parameters and optimiser are float32; `dtype` is what the
    forward and backward pass compute in. `remat` keeps only the residual stream between blocks for the backward pass.
    `unroll` layers make one turn of the loop over them, which takes longer to compile and runs faster. `guide_weight`
    and `teach_weight` are the weights of guidance and of a teacher's probabilities in the loss, where batches have
    them; along a cosine they come to `anneal` times that at the last step.
    """

    steps: int
    tokens_per_step: int = 4096
    lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    accumulate: int = 1
    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1
    guide_weight: float = 0.0
    teach_weight: float = 0.0
    anneal: float = 1.0

    def __post_init__(self) -> None:
        bad = [
            n for n in ("steps", "tokens_per_step", "lr", "clip", "accumulate", "unroll") if not getattr(self, n) > 0
        ]
        if bad:
            raise InputError(f"training needs positive {', '.join(bad)}")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"a warm-up of {self.warmup} steps does not fit into {self.steps} steps")


@dataclass(frozen=True)
class Objective:
    """What is minimised over what: architecture, optimiser, how parameters arise from trained arrays, mesh.

    `padding` are ranges [start, end) of the vocabulary's rows that are no tokens; those stay as they are.
    """

    spec: DecoderSpec
    config: TrainConfig
    mode: Mode = Plain()  # noqa: RUF009  (frozen, without fields)
    mesh: Mesh | None = None
    padding: tuple[tuple[int, int], ...] = ()

    def compiled(self) -> "Objective":
        """What programs depend on: any number of steps and learning rates share those of one architecture."""
        same = replace(self.config, steps=1, tokens_per_step=1, accumulate=1, lr=1.0, warmup=0, final_lr=0.0)
        same = replace(same, guide_weight=0.0, teach_weight=0.0, anneal=1.0)
        return replace(self, config=same)


class State(NamedTuple):
    """Trained arrays and optimiser; `healthy` turns false at the first loss or gradient that is not a number.

    From then on nothing else changes: the state stays the last good one.
    """

    trained: dict[str, Array]
    optimizer: optax.OptState
    healthy: Array


class Losses(NamedTuple):
    """Means in nats: `text`, cross entropy per token that counts; `taught`, divergence from the teacher per position.

    `guide` is the squared error per standardised feature, `norm` that of the gradient, before clipping.
    """

    text: Array
    guide: Array
    taught: Array
    norm: Array


class Weights(NamedTuple):
    """Weights of guidance and teacher in the loss."""

    guide: ArrayLike = 0.0
    taught: ArrayLike = 0.0

    @classmethod
    def at(cls, config: TrainConfig, count: int) -> "Weights":
        """Those of the step that follows `count` steps."""
        fallen = 0.5 - 0.5 * np.cos(np.pi * count / max(1, config.steps - 1))
        scale = 1.0 - (1.0 - config.anneal) * fallen
        return cls(np.float32(config.guide_weight * scale), np.float32(config.teach_weight * scale))


class Share(NamedTuple):
    """One over the number of tokens, spans and taught positions in a whole step."""

    text: ArrayLike
    guide: ArrayLike
    taught: ArrayLike


def padding_of(known: np.ndarray | None) -> tuple[tuple[int, int], ...]:
    """The ranges [start, end) of rows that are no tokens, of the mask of those that are (None: all are)."""
    if known is None:
        return ()
    edges = np.flatnonzero(np.diff(np.concatenate([[True], known, [True]]).astype(np.int8)))
    return tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))


def decayed(params: Params) -> dict[str, bool]:
    """Which parameters weight decay acts on: those that are matrices within a layer; no maps of the guidance."""
    return {
        path: not path.startswith(GUIDE) and value.ndim - ("blocks." in path) >= 2 for path, value in params.items()
    }


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Learning rate of the step that follows `count` steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / (config.warmup + 1),
        peak_value=config.lr,
        warmup_steps=config.warmup,
        decay_steps=config.steps,
        end_value=config.lr * config.final_lr,
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Global-norm clipping and AdamW, for a learning rate of 1: what it gives is still to be multiplied by -rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def guide_error(trained: Params, frozen_mean: Array, frozen_scale: Array, states_lbre: Array, guide: Guide) -> Array:
    """Sum over the spans of the mean squared error, over layers and source units, of the predicted source features.

    Target features [L, B, R, embed] are standardised by `frozen_mean` and `frozen_scale` [L, embed] and mapped by
    `guide.weight` [L, k, embed] and `guide.bias` [L, k]; all in float32.
    """
    z = (states_lbre.astype(jnp.float32) - frozen_mean[:, None, None]) / frozen_scale[:, None, None]
    predicted = einsum("lbre,lke->lbrk", z, trained[f"{GUIDE}weight"]) + trained[f"{GUIDE}bias"][:, None, None]
    return jnp.sum(jnp.mean(jnp.square(predicted - guide.source_lbrk), axis=(0, 3)) * guide.mask_br)


def _losses(
    objective: Objective, trained: Params, frozen: Frozen, batch: Batch, share: Share, weights: Weights
) -> tuple[Array, tuple[Array, Array, Array]]:
    """What is minimised and its parts over a batch: sums times `share`."""
    spec, config, mesh = objective.spec, objective.config, objective.mesh
    maps = {path: value for path, value in frozen.items() if path.startswith(GUIDE)}
    held = {path: value for path, value in frozen.items() if path not in maps}
    own = {path: value for path, value in trained.items() if not path.startswith(GUIDE)}
    model = bind(spec, objective.mode.params(own, held))
    guide, teaching = batch.guide, batch.teaching

    def pick(states_bte: Array) -> Array:
        return jnp.take_along_axis(states_bte, guide.position_br[..., None], axis=1)

    sites = () if guide is None else ("resid",)
    plan = ForwardPlan(jnp.dtype(config.dtype), sites, pick, mesh, config.remat, config.unroll)
    hidden, captured, _ = model.run(batch.ids_bt, plan)
    if teaching is not None:
        scale = weights.taught * share.taught
        teaching = Teaching(teaching.ids_btk, teaching.weight_btk, teaching.mask_bt * scale)
    total, text, taught = summed_losses(
        spec, model.unembedding, hidden, batch.targets_bt, batch.mask_bt * share.text, teaching
    )
    taught = taught / jnp.maximum(weights.taught, 1e-30)
    if guide is None:
        return total, (text, jnp.zeros(()), taught)
    error = guide_error(trained, maps[f"{GUIDE}mean"], maps[f"{GUIDE}scale"], captured["resid"], guide) * share.guide
    return total + weights.guide * error, (text, error, taught)


_gradients = jax.value_and_grad(_losses, argnums=1, has_aux=True)


def _share(batches: Sequence[Batch]) -> Share:
    """One over the numbers of a step of `batches`; computed where the batches are."""
    tokens = sum(jnp.sum(batch.mask_bt) for batch in batches)
    spans = sum(0.0 if batch.guide is None else jnp.sum(batch.guide.mask_br) for batch in batches)
    taught = sum(0.0 if batch.teaching is None else jnp.sum(batch.teaching.mask_bt) for batch in batches)
    return Share(*(1 / jnp.maximum(jnp.float32(count), 1.0) for count in (tokens, spans, taught)))


@functools.partial(jax.jit, static_argnames=("spec",))
def next_token_loss(spec: DecoderSpec, params: Params, batch: Batch) -> Array:
    """Mean cross entropy, in nats, of the tokens that count."""
    objective = Objective(spec, TrainConfig(steps=1, warmup=0))
    plain = batch._replace(guide=None, teaching=None)
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
            trained[path] = jnp.where(padded[:, None], state.trained[path], trained[path])
    return State(trained, jax.tree.map(keep, moved, state.optimizer), healthy), Losses(*parts, norm)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("state",))
def train_step(
    objective: Objective, state: State, frozen: Frozen, batch: Batch, rate: Array, weights: Weights
) -> tuple[State, Losses]:
    """One update from one batch; returns the new state and the losses before the update. Donates the old state."""
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
    """One update from an accumulated gradient."""
    return _update(objective, state, rate, *total)


def step(
    objective: Objective,
    state: State,
    frozen: Frozen,
    batches: list[Batch],
    rate: float,
    weights: Weights | None = None,
) -> tuple[State, Losses]:
    """One update from `batches` with a learning rate: the mean is over all of their tokens, as if they were one.

    `weights` are those of guidance and teacher at this step; unless given, what the configuration begins with.
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
    """The state before the first step: optimiser moments zero, laid out like what they belong to."""
    state = State(trained, optimizer(objective.config).init(trained), jnp.asarray(True))
    if objective.mesh is None:
        return state
    everywhere = NamedSharding(objective.mesh, PartitionSpec())
    # Counters too, or the second step, which finds them on the mesh, would be compiled again.
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere), state)


@functools.partial(jax.jit, static_argnames=("mode",))
def fold(mode: Mode, trained: Params, frozen: Frozen) -> dict[str, Array]:
    """The parameters of the model that was trained: residuals and low-rank updates added, guidance left out."""
    parts = ({path: x for path, x in each.items() if not path.startswith(GUIDE)} for each in (trained, frozen))
    return mode.params(*parts)
