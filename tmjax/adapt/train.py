"""Causal-LM training of a decoder: masked next-token cross entropy, AdamW with warm-up and cosine decay, one step.

Decoupled weight decay: Loshchilov and Hutter 2019 (arXiv:1711.05101), on matrices only.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tmjax.adapt.data import Batch
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.decoder import forward
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array, Params

#: Told the number of steps done, counting from 1, and the loss of the last one.
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class TrainConfig:
    """Steps and optimiser; hashable, so it is a static argument of the jitted step.

    The learning rate rises linearly to `lr` over `warmup` steps and falls along a cosine to `lr * final_lr`.
    `clip` bounds the global norm of the gradient, `weight_decay` shrinks matrices (not norms and biases).
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

    def __post_init__(self) -> None:
        bad = [name for name in ("steps", "tokens_per_step", "lr", "clip") if not getattr(self, name) > 0]
        if bad:
            raise InputError(f"training needs positive {', '.join(bad)}")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"a warm-up of {self.warmup} steps does not fit into {self.steps} steps")


class TrainResult(NamedTuple):
    """Parameters after the last step, and the loss of every step."""

    params: dict[str, Array]
    losses: np.ndarray


def decayed(params: Params) -> dict[str, bool]:
    """Which parameters weight decay acts on: those that are matrices within a layer."""
    return {path: value.ndim - path.startswith("blocks.") >= 2 for path, value in params.items()}


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
    """Global-norm clipping and AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
        ),
    )


def next_token_loss(spec: DecoderSpec, params: Params, batch: Batch) -> Array:
    """Mean cross entropy, in nats, of the tokens that count."""
    logits = forward(spec, params, batch.ids_bt)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_bt)
    return jnp.sum(losses * batch.mask_bt) / jnp.maximum(jnp.sum(batch.mask_bt), 1.0)


@functools.partial(jax.jit, static_argnames=("spec", "config"), donate_argnames=("params", "state"))
def train_step(
    spec: DecoderSpec, config: TrainConfig, params: dict[str, Array], state: optax.OptState, batch: Batch
) -> tuple[dict[str, Array], optax.OptState, Array]:
    """One update; returns new parameters, optimiser state and the loss before the update. Donates what it replaces."""
    loss, gradient = jax.value_and_grad(next_token_loss, argnums=1)(spec, params, batch)
    updates, state = optimizer(config).update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(
    spec: DecoderSpec,
    params: Params,
    data: Iterable[Batch],
    config: TrainConfig,
    *,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains a float32 copy of `params` for `config.steps` batches of `data`.

    The result depends only on the arguments: the same ones give the same bits on the same machine.
    Raises InputError if `data` ends early, NonFiniteError if the loss stops being a number.
    """
    held = {path: jnp.array(value, jnp.float32, copy=True) for path, value in params.items()}
    state = optimizer(config).init(held)
    losses: list[Array] = []
    for step, batch in zip(range(1, config.steps + 1), data, strict=False):
        held, state, loss = train_step(spec, config, held, state, batch)
        losses.append(loss)
        if progress is not None:
            progress(step, float(loss))
    if len(losses) < config.steps:
        raise InputError(f"the training data ended after {len(losses)} of {config.steps} steps")
    values = np.asarray(jnp.stack(losses))
    if not np.isfinite(values).all():
        raise NonFiniteError(f"the loss became {values[~np.isfinite(values)][0]} at step {_first_bad(values)}")
    return TrainResult(held, values)


def _first_bad(losses: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
