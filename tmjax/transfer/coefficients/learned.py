"""Coefficients learned by the target's own loss: alpha and beta per tensor, head or unit, stopped early."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tmjax.errors import InputError, NonFiniteError
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.recipes.merge import LearningOptions
from tmjax.transfer.coefficients.grid_search import Fit, Trial
from tmjax.transfer.contribution import BatchLoss, Rule
from tmjax.transfer.masks import READS_NEURONS
from tmjax.typing import Array, Params

#: Parameters from what is fused (any tree of arrays) and coefficients, traceable.
Combine = Callable[[Any, Any], Params]
#: Learned arrays: alpha and beta by role, in the shape of `coefficient_shape`.
Learned = Mapping[str, tuple[Array, Array]]


def coefficient_shape(spec: DecoderSpec, row: ParamSpec, granularity: str) -> tuple[int, int, int]:
    """Shape of a projection's coefficients: layers, and heads or units on the side where its neurons lie.

    Those are the outputs, but for o and down the inputs. The MLP has no heads: there it is one per tensor.
    """
    side = 1 if row.role in READS_NEURONS else 0
    counts = [1, 1]
    if granularity == "unit":
        counts[side] = row.shape(spec)[side]
    elif granularity == "head" and row.axes[side] in ("heads", "kv_heads"):
        counts[side] = row.shape(spec)[side] // spec.head_dim
    return (spec.layers, *counts)


def expand(value: Array, shape: tuple[int, ...]) -> Array:
    """Coefficients [L, a, b] as they broadcast to a stacked weight [L, out, in]: heads repeated for their units."""
    for axis in (1, 2):
        if 1 < value.shape[axis] < shape[axis]:
            value = jnp.repeat(value, shape[axis] // value.shape[axis], axis=axis)
    return value


def start(
    spec: DecoderSpec, rows: Mapping[str, ParamSpec], roles: Iterable[str], granularity: str
) -> dict[str, tuple[Array, Array]]:
    """alpha = beta = 0, the target itself; a number each for roles that are no projections."""
    shapes = {role: coefficient_shape(spec, rows[role], granularity) if role in rows else () for role in roles}
    return {role: (jnp.zeros(shape), jnp.zeros(shape)) for role, shape in shapes.items()}


def expanded(spec: DecoderSpec, rows: Mapping[str, ParamSpec], learned: Learned) -> dict[str, tuple[Array, Array]]:
    """Learned coefficients as `fuse_params` takes them."""
    return {
        role: tuple(expand(x, rows[role].stacked_shape(spec)) if role in rows else x for x in pair)
        for role, pair in learned.items()
    }


@dataclass(frozen=True)
class FuseLearned:
    """`combine` of a merge; hashable, so that every arm of a comparison runs the same compiled program.

    It takes the parameters and the items of all contributions, each with its rule.
    """

    spec: DecoderSpec
    param_specs: tuple[ParamSpec, ...]
    rules: tuple[Rule, ...]

    def __call__(self, arrays: tuple[Params, tuple[Any, ...]], learned: Learned) -> Params:
        """Returns the fused parameters."""
        params, contributions = arrays
        wide = expanded(self.spec, projections(self.param_specs), learned)
        for rule, items in zip(self.rules, contributions, strict=True):
            params = rule(params, items, wide)
        return params


@functools.partial(jax.jit, static_argnames="combine")
def _combined(combine: Combine, arrays: Any, learned: Learned) -> Params:
    return combine(arrays, learned)


@functools.partial(jax.jit, static_argnames=("combine", "loss", "lr"))
def _step(
    combine: Combine, loss: BatchLoss, lr: float, arrays: Any, learned: Learned, state: optax.OptState, batch: Any
) -> tuple[Learned, optax.OptState, Array]:
    value, gradient = jax.value_and_grad(lambda x: loss(combine(arrays, x), batch))(learned)
    updates, state = optax.adam(lr).update(gradient, state)
    return optax.apply_updates(learned, updates), state, value


def learn(
    combine: Combine,
    arrays: Any,
    begin: Learned,
    batches: Iterable[Any],
    loss: BatchLoss,
    valid: Callable[[Params], float],
    options: LearningOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Learns coefficients from `begin` by Adam on `loss(combine(arrays, coefficients), batch)`.

    `valid` scores the parameters before the first step and after every `check_every`; the best is returned, so that it
    is never worse there than where it began. `trials` are these scores. Raises InputError if the batches end early,
    NonFiniteError if the loss is no number any more.
    """
    learned, state = begin, optax.adam(options.lr).init(begin)
    best = (valid(_combined(combine, arrays, begin)), 0, begin)
    trials = [Trial(_means(begin), best[0])]
    source = iter(batches)
    for number in range(1, options.steps + 1):
        batch = next(source, None)
        if batch is None:
            raise InputError(f"the calibration batches ended after {number - 1} of {options.steps} steps")
        learned, state, value = _step(combine, loss, options.lr, arrays, learned, state, batch)
        progress(number, options.steps)
        if number % options.check_every and number < options.steps:
            continue
        if not np.isfinite(float(value)):
            raise NonFiniteError(f"the loss became {float(value)} while coefficients were learned; lower learning.lr")
        score = valid(_combined(combine, arrays, learned))
        trials.append(Trial(_means(learned), score))
        if score < best[0]:
            best = (score, number, learned)
        elif number - best[1] >= options.patience * options.check_every:
            break
    return Fit(best[2], best[0], trials)


def _means(learned: Learned) -> dict[str, tuple[float, float]]:
    return {role: (float(jnp.mean(alpha)), float(jnp.mean(beta))) for role, (alpha, beta) in learned.items()}
