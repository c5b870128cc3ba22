"""What every solver returns: a plan, a certificate of its marginals, its costs."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from tmjax.ot.plan import EntropicPlan, Plan
from tmjax.ot.problem import Problem
from tmjax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OTResult:
    """Plan and certificate of one or, with leading axes, many problems.

    `error_a`, `error_b`: L1 distance of the plan's marginals from a and b, computed from the plan returned, not taken
    from the solver. `converged`: they are within the solver's threshold (see `certify`). `transport_cost`: <cost, Q>;
    `regularised_cost`: <cost, Q> - epsilon H(Q) with H(Q) = -sum Q (ln Q - 1), epsilon being 0 for exact solvers.
    """

    plan: Plan
    iterations: Array
    converged: Array
    error_a: Array
    error_b: Array
    transport_cost: Array
    regularised_cost: Array

    def matrix(self) -> Array:
        """The coupling Q [..., n, k]."""
        return self.plan.matrix()

    def apply(self, x: Array) -> Array:
        """Q x for x [..., k, d]: moves values on the second side to the first."""
        return self.plan.apply(x)

    def apply_transpose(self, x: Array) -> Array:
        """Q^T x for x [..., n, d]: moves values on the first side to the second."""
        return self.plan.apply_transpose(x)

    @property
    def marginal_error(self) -> Array:
        """The larger of the two L1 marginal errors, per problem."""
        return jnp.maximum(self.error_a, self.error_b)

    def attach(self, problem: Problem) -> "OTResult":
        """The result with its plan complete (see `Plan.attach`)."""
        return replace(self, plan=self.plan.attach(problem))


def certify(
    problem: Problem, plan: Plan, *, iterations: Array | int, threshold: float, epsilon: float = 0.0
) -> OTResult:
    """The result of one problem (no leading axes), its marginal errors and costs recomputed from the plan.

    `converged` is decided here, not by the solver, which tests one marginal inside its loop: the certificate must be
    within twice the threshold plus what float32 rounds away: a unit in the last place of the entries' exponents for a
    plan kept as potentials, of the mass for any other.
    """
    q = plan.attach(problem).matrix()
    error_a = jnp.sum(jnp.abs(jnp.sum(q, axis=1) - problem.a))
    error_b = jnp.sum(jnp.abs(jnp.sum(q, axis=0) - problem.b))
    transport = jnp.sum(problem.cost * q)
    negative_entropy = jnp.sum(jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1.0)) - 1.0), 0.0))
    largest = 1.0
    if isinstance(plan, EntropicPlan):
        largest = sum(jnp.max(jnp.abs(term)) for term in (plan.f, plan.g, problem.cost)) / plan.epsilon
    rounding = jnp.finfo(jnp.float32).eps * largest
    return OTResult(
        plan=plan,
        iterations=jnp.asarray(iterations, jnp.int32),
        converged=jnp.maximum(error_a, error_b) <= 2 * threshold + rounding,
        error_a=error_a,
        error_b=error_b,
        transport_cost=transport,
        regularised_cost=transport + epsilon * negative_entropy,
    )
