"""Optimal transport problems; leading axes are independent problems."""

from dataclasses import dataclass

import jax.numpy as jnp

from tmjax.ot.cost import Cost
from tmjax.typing import Array, pytree_dataclass


def uniform(size: int) -> Array:
    """The uniform marginal [size], mass 1."""
    return jnp.full((size,), 1.0 / size, jnp.float32)


@pytree_dataclass
@dataclass(frozen=True)
class Problem:
    """min over couplings Q of <cost, Q>: cost [..., n, k], marginals a [..., n] and b [..., k] of equal mass.

    The cost may be a `FeatureCost`. `features`, standardised activations zx [..., N, n] and zy [..., N, k], are for
    solvers that compare units within each side or fit maps; `start`, potentials f [..., n] and g [..., k], is a warm
    start. Solvers that have no use for them never see them (see `tmjax.ot.solvers.base`).
    """

    cost: Cost
    a: Array
    b: Array
    features: tuple[Array, Array] | None = None
    start: tuple[Array, Array] | None = None

    @classmethod
    def with_uniform_marginals(cls, cost: Cost, features: tuple[Array, Array] | None = None) -> "Problem":
        """The problem with marginals 1/n and 1/k."""
        n, k = cost.shape[-2:]
        batch = cost.shape[:-2]
        a, b = jnp.broadcast_to(uniform(n), (*batch, n)), jnp.broadcast_to(uniform(k), (*batch, k))
        return cls(cost, a, b, features)
