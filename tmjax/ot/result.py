"""The result of every solver: a plan, a certificate of its marginals, its costs."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from tmjax.ot.plan import EntropicPlan, LinearMap, Plan
from tmjax.ot.problem import Problem
from tmjax.ot.row_blocks import scan_rows
from tmjax.typing import Array, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class OTResult:
    """Plan and certificate of one or, with leading axes, many problems.

    `error_a`, `error_b`: L1 distance of the plan's marginals from a and b, computed from the plan returned, not taken
    from the solver. `converged`: they are within the solver's threshold (see `certify`). `transport_cost`: <cost, Q>,
    for every solver the problem's linear cost (1 - |rho| and |Q| for signed plans), whatever it minimises itself;
    `regularised_cost`: <cost, Q> - epsilon H(Q) with H(Q) = -sum Q (ln Q - 1), epsilon being 0 for exact solvers.
    `fallback`: the solver had to leave its usual form for a slower one (scalings that would overflow).
    """

    plan: Plan
    iterations: Array
    converged: Array
    error_a: Array
    error_b: Array
    transport_cost: Array
    regularised_cost: Array
    fallback: Array

    def matrix(self) -> Array:
        """The coupling Q [..., n, k] (signed or a map, if that is what the solver finds)."""
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


#: float32 noise never excuses more than this part of the mass, however large the potentials.
MAX_ROUNDING = 1e-2


@functools.partial(jax.jit, static_argnames="judged")
def certify(
    problem: Problem,
    plan: Plan,
    *,
    iterations: Array | int,
    threshold: float,
    epsilon: float = 0.0,
    judged: str = "ab",
    solver_converged: Array | bool = True,
    exponents: Array | float = 1.0,
    fallback: Array | bool = False,
) -> OTResult:
    """The result of one problem (no leading axes), its marginal errors and costs recomputed from the plan.

    A plan stored as potentials is evaluated in blocks of rows. This function decides `converged`, not the solver, which
    tests one marginal inside its loop: the errors of the `judged` marginals must be within twice the threshold plus the
    rounding of float32. The rounding is a unit in the last place of the entries' exponents for a plan stored as
    potentials (or made from potentials, `exponents` being the largest exponent), and of the mass for any other plan.
    `solver_converged` is a further condition of the solver. A plan with NaN or infinity anywhere is never converged.
    """
    n, k = problem.cost.shape
    size = plan.measured_rows((n, k))

    def step(carry: tuple[Array, ...], start: Array | int, fresh: Array) -> tuple[Array, ...]:
        error_a, columns, transport, negative_entropy, finite, highest = carry
        q, log_q, price = plan.measure(problem, start, size)
        # Without the barrier every sum below would make the exponentials again.
        q = jax.lax.optimization_barrier(jnp.where(fresh[:, None], q, 0.0))
        rows = jnp.sum(q, axis=1)
        masses = jax.lax.dynamic_slice_in_dim(problem.a, start, size)
        return (
            error_a + jnp.sum(jnp.where(fresh, jnp.abs(rows - masses), 0.0)),
            columns + jnp.sum(q, axis=0),
            transport + jnp.sum(price * q),
            negative_entropy + jnp.sum(jnp.where(q > 0, q * (log_q - 1.0), 0.0)),
            finite & jnp.isfinite(rows).all(),
            jnp.maximum(highest, jnp.max(jnp.abs(price))),
        )

    zero = jnp.float32(0)
    start = (zero, jnp.zeros((k,)), zero, zero, jnp.asarray(True), zero)
    error_a, columns, transport, negative_entropy, finite, highest = scan_rows(n, size, step, start)
    error_b = jnp.sum(jnp.abs(columns - problem.b))
    largest = exponents
    if isinstance(plan, EntropicPlan):
        largest = (jnp.max(jnp.abs(plan.f)) + jnp.max(jnp.abs(plan.g)) + highest) / plan.epsilon
    rounding = jnp.minimum(jnp.finfo(jnp.float32).eps * largest, MAX_ROUNDING)
    errors = {"a": error_a, "b": error_b}
    worst = functools.reduce(jnp.maximum, (errors[side] for side in judged), jnp.float32(0))
    finite = functools.reduce(
        jnp.logical_and, (jnp.isfinite(x).all() for x in jax.tree.leaves((plan, transport, columns))), finite
    )
    return OTResult(
        plan=plan,
        iterations=jnp.asarray(iterations, jnp.int32),
        converged=(worst <= 2 * threshold + rounding) & finite & solver_converged,
        error_a=error_a,
        error_b=error_b,
        transport_cost=transport,
        regularised_cost=transport + epsilon * negative_entropy,
        fallback=jnp.asarray(fallback),
    )


def certify_map(plan: LinearMap) -> OTResult:
    """The result of a solver that finds maps: no marginals and no transport cost (NaN), converged if all is finite."""
    none = jnp.float32(jnp.nan)
    finite = jnp.isfinite(plan.to_target).all() & jnp.isfinite(plan.to_source).all()
    return OTResult(plan, jnp.int32(1), finite, none, none, none, none, jnp.asarray(False))
