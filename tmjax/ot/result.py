"""What every solver returns: potentials, a certificate of the marginals, costs, and the coupling on demand."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.ot.problem import Problem
from tmjax.typing import Array


def coupling(f: Array, g: Array, cost: Array, epsilon: Array | float) -> Array:
    """Q = exp((f + g - cost) / epsilon) [..., n, k], the entropic coupling of potentials f [..., n] and g [..., k]."""
    return jnp.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OTResult:
    """Potentials and certificate of one or, with leading axes, many problems.

    `error_a`, `error_b`: L1 distance of the coupling's marginals from a and b, computed from the potentials returned,
    not taken from the solver. `converged`: they are within the solver's threshold (see `certify`). `transport_cost`:
    <cost, Q>; `regularised_cost`: <cost, Q> - epsilon H(Q) with H(Q) = -sum Q (ln Q - 1).
    """

    problem: Problem
    f: Array
    g: Array
    epsilon: Array
    iterations: Array
    converged: Array
    error_a: Array
    error_b: Array
    transport_cost: Array
    regularised_cost: Array

    def matrix(self) -> Array:
        """The coupling Q [..., n, k]."""
        return coupling(self.f, self.g, self.problem.cost, self.epsilon[..., None, None])

    def apply(self, x: Array) -> Array:
        """Q x for x [..., k, d]: moves values on the second side to the first."""
        return jnp.einsum("...nk,...kd->...nd", self.matrix(), x, precision=jax.lax.Precision.HIGHEST)

    def apply_transpose(self, x: Array) -> Array:
        """Q^T x for x [..., n, d]: moves values on the first side to the second."""
        return jnp.einsum("...nk,...nd->...kd", self.matrix(), x, precision=jax.lax.Precision.HIGHEST)

    @property
    def marginal_error(self) -> Array:
        """The larger of the two L1 marginal errors, per problem."""
        return jnp.maximum(self.error_a, self.error_b)


def certify(problem: Problem, f: Array, g: Array, epsilon: float, iterations: Array, threshold: float) -> OTResult:
    """The result of one problem, its marginal errors and costs recomputed from the potentials.

    `converged` is decided here, not by the solver, which tests one marginal inside its loop: the certificate must be
    within twice the threshold plus what float32 rounds away, a few units in the last place of the exponents' terms.
    """
    q = coupling(f, g, problem.cost, epsilon)
    error_a = jnp.sum(jnp.abs(jnp.sum(q, axis=1) - problem.a))
    error_b = jnp.sum(jnp.abs(jnp.sum(q, axis=0) - problem.b))
    transport = jnp.sum(problem.cost * q)
    regularised = transport + epsilon * jnp.sum(q * ((f[:, None] + g[None, :] - problem.cost) / epsilon - 1.0))
    largest = sum(jnp.max(jnp.abs(term)) for term in (f, g, problem.cost)) / epsilon
    converged = jnp.maximum(error_a, error_b) <= 2 * threshold + jnp.finfo(jnp.float32).eps * largest
    return OTResult(
        problem, f, g, jnp.float32(epsilon), iterations, converged, error_a, error_b, transport, regularised
    )
