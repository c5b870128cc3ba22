"""Linear optimal transport problems; leading axes are independent problems."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.typing import Array


def uniform(size: int) -> Array:
    """The uniform marginal [size], mass 1."""
    return jnp.full((size,), 1.0 / size, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """min over couplings Q of <cost, Q>: cost [..., n, k], marginals a [..., n] and b [..., k] of equal mass."""

    cost: Array
    a: Array
    b: Array

    @classmethod
    def with_uniform_marginals(cls, cost: Array) -> "Problem":
        """The problem with marginals 1/n and 1/k."""
        n, k = cost.shape[-2:]
        batch = cost.shape[:-2]
        return cls(cost, jnp.broadcast_to(uniform(n), (*batch, n)), jnp.broadcast_to(uniform(k), (*batch, k)))
