"""Batched Sinkhorn in the scaling form: two matrix-vector products per iteration instead of exponentials.

Sinkhorn & Knopp 1967 and Cuturi 2013 (u = a / Kv, v = b / K^T u); absorption of the scalings into potentials as in
Schmitzer 2019, "Stabilized sparse scaling algorithms for entropy regularized transport problems"; over-relaxation as in
Thibault et al. 2017 and Lehmann et al. 2022, "A note on overrelaxation in the Sinkhorn algorithm".
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from tmjax import backend
from tmjax.errors import InputError
from tmjax.ot.cost import Cost, FeatureCost, cost_bounds, cost_matrix, cost_rows
from tmjax.ot.plan import EntropicPlan, coupling
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.row_blocks import BLOCK_ENTRIES, block_size, scan_rows
from tmjax.ot.solvers.base import ResultProperties
from tmjax.ot.solvers.log_domain import Potentials, iterate_potentials
from tmjax.typing import Array

#: The exponents (C - shifts) / epsilon that the kernel may hold: float32 reaches exp(-87), and sums need some room.
KERNEL_RANGE = 80.0
#: Scalings beyond exp(+-ABSORB) are absorbed into the potentials.
ABSORB = 60.0
#: Row blocks whose partial sums K^T u are added at the end: as fast, and a tenth of the rounding of one running sum.
BLOCKS = 16
#: Errors below STALL that did not improve for PATIENCE tests are float32's rounding; `certify` tells what was reached.
STALL = 2e-5
PATIENCE = 10
#: L1 error below which a bfloat16 kernel cannot improve: scalings rounded to 8 bits alone leave about 2e-3.
BFLOAT16_ERROR = 1e-2


@functools.partial(jax.jit, static_argnames="epsilon")
def log_domain_needed(problem: Problem, epsilon: float) -> Array:
    """Whether `scaling` solves the problems [...] in the log domain: costs, less the minima of their rows and columns,
    that reach beyond KERNEL_RANGE epsilon, so that entries of the kernel would underflow.
    """
    batch = problem.cost.shape[:-2]
    flat = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[len(batch) :]), problem.cost)
    return jax.lax.map(lambda cost: _start(cost, epsilon)[2][0], flat).reshape(batch)


def _start(cost: Cost, epsilon: float) -> tuple[Array, Array, Array]:
    """Potentials f [B, n], g [B, k] that shift the costs [B, n, k] into the kernel's range; where that fails [B].

    Minima of rows and columns cost passes over the costs; they are taken only where the plain spread is too wide.
    """
    batch, n, k = cost.shape
    low, high = cost_bounds(cost)

    def plain() -> tuple[Array, Array, Array]:
        # The middle becomes exp(0): half the range on either side of 1.
        f = jnp.broadcast_to(((low + high) / 2)[:, None], (batch, n))
        return f, jnp.zeros((batch, k)), (high - low) / epsilon

    def minima() -> tuple[Array, Array, Array]:
        def lower(carry: tuple[Array, Array], start: Array | int, fresh: Array) -> tuple[Array, Array]:
            f, g = carry
            some = cost_rows(cost, start, fresh.shape[0])
            row_minima = jnp.min(some, axis=2)
            return _put(f, row_minima, start), jnp.minimum(g, jnp.min(some - row_minima[:, :, None], axis=1))

        def largest(highest: Array, start: Array | int, fresh: Array) -> Array:
            left = cost_rows(cost, start, fresh.shape[0]) - _take(f, start, fresh.shape[0])[:, :, None] - g[:, None, :]
            return jnp.maximum(highest, jnp.max(left, axis=(1, 2)))

        size = _rows_at_once(cost)
        f, g = scan_rows(n, size, lower, (jnp.zeros((batch, n)), jnp.full((batch, k), jnp.inf)))
        return f, g, scan_rows(n, size, largest, jnp.zeros((batch,))) / epsilon

    if isinstance(cost, FeatureCost) and 2.0 / epsilon <= KERNEL_RANGE:
        f, g, exponent = plain()
    else:
        f, g, exponent = jax.lax.cond(jnp.all((high - low) / epsilon <= KERNEL_RANGE), plain, minima)
    return f, g, exponent > KERNEL_RANGE


def _rows_at_once(cost: Cost) -> int:
    """All rows of costs that are written out; blocks of those that are made."""
    return block_size(*cost.shape[-2:]) if isinstance(cost, FeatureCost) else cost.shape[-2]


def _take(x: Array, start: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x: Array, some: Array, start: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, some, start, axis=1)


def _kernel(cost: Cost, f: Array, g: Array, epsilon: float, dtype: jnp.dtype) -> Array:
    """exp((f + g - cost) / epsilon) [B, n, k]."""
    batch, n, k = cost.shape

    def some(out: Array, start: Array | int, fresh: Array) -> Array:
        rows = fresh.shape[0]
        return _put(out, coupling(_take(f, start, rows), g, cost_rows(cost, start, rows), epsilon).astype(dtype), start)

    if not isinstance(cost, FeatureCost):
        return coupling(f, g, cost, epsilon).astype(dtype)
    return scan_rows(n, _rows_at_once(cost), some, jnp.zeros((batch, n, k), dtype))


def _where(condition: Array, new: Array, old: Array) -> Array:
    """Per problem (leading axis), the new or the old value."""
    return jnp.where(condition.reshape(condition.shape + (1,) * (new.ndim - 1)), new, old)


@dataclass(frozen=True)
class Scaling:
    """Sinkhorn on scalings: stops when the L1 marginal error is below `threshold` or after `max_iterations`.

    The error is known from the iteration itself and is tested every `check_every` iterations. `relaxation` in [1, 2) is
    the exponent of over-relaxed updates. `kernel_dtype` "bfloat16" halves what the first iterations read, where memory
    is the limit (accelerators); the last iterations use float32, so that the certificate holds.

    Problems whose costs spread too far for float32 exponentials are solved in the log domain (`log_domain_needed` tells
    which), and so are those where scalings overflowed and those whose kernel alone exceeds `memory_mib`;
    `OTResult.fallback` says so. A cost given as `FeatureCost` is written out if it fits beside the kernel. `together`
    problems are iterated at a time, each until it is done: 0 is one on the CPU, where that is fastest, and as many as
    the memory takes on accelerators, which one problem does not fill.

    Raises InputError for options out of range.
    """

    name: ClassVar[str] = "scaling"
    properties: ClassVar[ResultProperties] = ResultProperties(exact_limit=True, entropic=True, potentials=True)

    epsilon: float = 0.1
    threshold: float = 1e-6
    max_iterations: int = 2000
    check_every: int = 1
    relaxation: float = 1.0
    kernel_dtype: Literal["float32", "bfloat16"] = "float32"
    together: int = 0
    memory_mib: int = 4096

    def __post_init__(self) -> None:
        """Refuses options out of range."""
        if not self.epsilon > 0 or not self.threshold >= 0 or self.max_iterations < 1 or self.check_every < 1:
            raise InputError("scaling needs epsilon > 0, threshold >= 0, max_iterations >= 1 and check_every >= 1")
        if not 1 <= self.relaxation < 2:
            raise InputError(f"relaxation {self.relaxation} is not in [1, 2)")
        if self.kernel_dtype not in ("float32", "bfloat16"):
            raise InputError(f"kernel_dtype {self.kernel_dtype!r} is neither 'float32' nor 'bfloat16'")
        if self.together < 0 or self.memory_mib < 1:
            raise InputError("scaling needs together >= 0 and memory_mib >= 1")

    def form(self, shape: tuple[int, int], count: int, rows: int = 0) -> tuple[bool, bool, int]:
        """Whether the cost and the kernel of `count` problems fit into memory, and how many problems fit together.

        `rows` is N of costs given as features. Raises InputError if not even their blocks fit.
        """
        kept = 4 * shape[0] * shape[1]
        # One pair's features, as they are kept and widened to float32.
        own = 8 * rows * sum(shape)
        # Beside the blocks of the certificate.
        fixed = 6 * 4 * min(shape[0] * shape[1], BLOCK_ENTRIES)
        free = self.memory_mib * 2**20 - fixed
        if free < own:
            raise InputError(
                f"memory_mib {self.memory_mib} is too little for {shape[0]} x {shape[1]} units and {rows} rows:"
                f" at least {-(-(fixed + own) // 2**20)} are needed"
            )
        requested = self.together or (1 if backend.platform() == "cpu" else count)
        # A cost, its kernel, and the memory of the product that makes the cost.
        together = min(free // (3 * kept + own), requested, count)
        return free >= 3 * kept + own, free >= kept + own, int(max(1, together))

    def with_memory(self, mib: int) -> "Scaling":
        """The same solver with another `memory_mib`."""
        return replace(self, memory_mib=mib)

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        return jax.tree.map(lambda x: x[0], self.solve_batch(jax.tree.map(lambda x: x[None], problem)))

    def solve_batch(self, problem: Problem) -> OTResult:
        """Solves problems [B, n, k] under `jit`, each with its own number of iterations."""
        return self.solve_each(
            lambda index: jax.tree.map(lambda x: x[index], problem),
            problem.a.shape[0],
            lambda _index, _problem, result: result,
        )

    def solve_each(
        self, get: Callable[[Array], Problem], count: int, finish: Callable[[Array, Problem, OTResult], object]
    ) -> object:
        """`finish(index, problem, result)` of the problems `get(0)` .. `get(count - 1)`, stacked; under `jit`."""

        def certified(index: Array, problem: Problem, solution: tuple[Array, ...]) -> object:
            f, g, iterations, fallback = solution
            plan = EntropicPlan(f, g, jnp.float32(self.epsilon))
            result = certify(
                problem,
                plan,
                iterations=iterations,
                threshold=self.threshold,
                epsilon=self.epsilon,
                fallback=fallback,
            )
            return finish(index, problem, result)

        def solved(problems: Problem) -> tuple[Problem, tuple[Array, ...]]:
            if keep_cost:
                problems = replace(problems, cost=cost_matrix(problems.cost))
            return problems, self._potentials(problems, scale=keep_kernel)

        def some(indices: Array) -> object:
            problems, solutions = solved(jax.vmap(get)(indices))
            return jax.lax.map(lambda item: certified(*item), (indices, problems, solutions))

        def one(index: Array) -> object:
            problems, solution = solved(jax.tree.map(lambda x: x[None], get(index)))
            return certified(index, *jax.tree.map(lambda x: x[0], (problems, solution)))

        cost = jax.eval_shape(lambda: get(jnp.int32(0))).cost
        rows = cost.zx.shape[-2] if isinstance(cost, FeatureCost) else 0
        keep_cost, keep_kernel, size = self.form(cost.shape, count, rows)
        if size == 1:
            return jax.lax.map(one, jnp.arange(count))
        groups = jnp.minimum(jnp.arange(-(-count // size) * size), count - 1).reshape(-1, size)
        results = jax.lax.map(some, groups)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)

    def potentials(self, problem: Problem) -> tuple[Array, Array, Array]:
        """Potentials f [B, n], g [B, k] and iterations [B] of problems [B, n, k], without their certificates."""

        def one(index: Array) -> tuple[Array, Array, Array]:
            # Indexed here and not by `map`, which would copy each cost before use.
            solution = self._potentials(jax.tree.map(lambda x: x[index][None], problem), scale=True)
            return jax.tree.map(lambda x: x[0], solution[:3])

        return jax.lax.map(one, jnp.arange(problem.a.shape[0]))

    def _potentials(self, problem: Problem, *, scale: bool) -> tuple[Array, Array, Array, Array]:
        """f [B, n], g [B, k], iterations [B] of problems [B, n, k], and which were solved in the log domain [B]."""
        batch = problem.a.shape[0]
        none, infinity = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), jnp.inf)
        if scale:
            f, g, wide = _start(problem.cost, self.epsilon)
            start = Potentials(f, g, none, infinity)
            state = self._scalings(problem, start, wide)
            lost = ~(jnp.isfinite(state.error) & jnp.isfinite(state.f).all(1) & jnp.isfinite(state.g).all(1))
            state = jax.tree.map(functools.partial(_where, lost), start, state)
            needed = wide | lost
        else:
            state = Potentials(jnp.zeros_like(problem.a), jnp.zeros_like(problem.b), none, infinity)
            needed = jnp.ones((batch,), bool)

        def slow(index: Array) -> Potentials:
            one, start = jax.tree.map(lambda x: x[index], (problem, state))
            return iterate_potentials(
                one,
                start,
                epsilon=self.epsilon,
                threshold=self.threshold,
                max_iterations=self.max_iterations,
                needed=needed[index],
            )

        state = jax.lax.map(slow, jnp.arange(batch))
        # Only f + g counts: equal means keep both small, and so their rounding.
        shift = (jnp.mean(state.f, axis=1) - jnp.mean(state.g, axis=1))[:, None] / 2
        return state.f - shift, state.g + shift, state.iterations, needed

    def _scalings(self, problem: Problem, start: Potentials, skip: Array) -> Potentials:
        """All iterations in the scaling form, those with a rounded kernel first."""
        if self.kernel_dtype == "bfloat16":
            rough = self._scale(problem, start, skip, jnp.bfloat16, max(self.threshold, BFLOAT16_ERROR))
            # The error of the rounded kernel certifies nothing.
            start = rough._replace(error=jnp.full_like(rough.error, jnp.inf))
        return self._scale(problem, start, skip, jnp.float32, self.threshold)

    def _scale(
        self, problem: Problem, start: Potentials, skip: Array, dtype: jnp.dtype, threshold: float
    ) -> Potentials:
        """Iterations with one kernel dtype; the outer loop builds the kernel, again whenever scalings grew too large.

        Problems [B, n, k] that are done (or `skip`) stay as they are while others go on.
        """
        omega = self.relaxation
        batch, n, k = problem.cost.shape

        def update(old: Array, marginal: Array, sums: Array) -> Array:
            new = marginal / sums
            new = new if omega == 1 else new * (old / new) ** (1 - omega)
            return new.astype(dtype).astype(jnp.float32)

        def product(subscripts: str, kernel: Array, scaling: Array) -> Array:
            highest = jax.lax.Precision.HIGHEST
            scaling = scaling.astype(dtype)
            return jnp.einsum(subscripts, kernel, scaling, precision=highest, preferred_element_type=jnp.float32)

        blocks = BLOCKS if n % BLOCKS == 0 else 1

        def step(kernel: Array, carry: tuple) -> tuple:
            u, v, rows, _ = carry
            u = update(u, problem.a, rows)
            parts = kernel.reshape(batch, blocks, -1, k), u.reshape(batch, blocks, -1)
            columns = jnp.sum(product("zbnk,zbn->zbk", *parts), axis=1)
            v = update(v, problem.b, columns)
            return u, v, product("znk,zk->zn", kernel, v), columns

        def active(count: Array, error: Array, stalled: Array) -> Array:
            # An error that is NaN ends the loop; infinity is the start.
            return ~skip & (error > threshold) & (count < self.max_iterations) & (stalled < PATIENCE)

        def iterate(kernel: Array, carry: tuple) -> tuple:
            inner, count, error, _, best, stalled = carry
            new = jax.lax.fori_loop(0, self.check_every, lambda _, c: step(kernel, c), inner)
            u, v, rows, columns = new
            # Exact marginals of diag(u) K diag(v), from the products that the iteration makes anyway.
            wrong_a = jnp.sum(jnp.abs(u * rows - problem.a), axis=1)
            now = jnp.maximum(wrong_a, jnp.sum(jnp.abs(v * columns - problem.b), axis=1))
            size = jnp.maximum(jnp.max(jnp.abs(jnp.log(u)), axis=1), jnp.max(jnp.abs(jnp.log(v)), axis=1))
            waited = jnp.where((now < best) | (now > STALL), 0, stalled + 1)
            next_carry = (new, count + self.check_every, now, size, jnp.minimum(now, best), waited)
            return jax.tree.map(functools.partial(_where, active(count, error, stalled)), next_carry, carry)

        def goes_on(carry: tuple) -> Array:
            _, count, error, size, _, stalled = carry
            going = active(count, error, stalled)
            # One whose scalings grew too large asks for a new kernel, for all of them.
            return jnp.any(going) & ~jnp.any(going & (size > ABSORB))

        def round_(carry: tuple[Potentials, Array]) -> tuple[Potentials, Array]:
            state, stalled = carry
            kernel = _kernel(problem.cost, state.f, state.g, self.epsilon, dtype)
            u, v = jnp.ones_like(state.f), jnp.ones_like(state.g)
            inner = (u, v, product("znk,zk->zn", kernel, v), jnp.zeros_like(v))
            fresh = (jnp.zeros((batch,)), jnp.full((batch,), jnp.inf))
            (u, v, *_), count, error, _, _, stalled = jax.lax.while_loop(
                goes_on,
                functools.partial(iterate, kernel),
                (inner, state.iterations, state.error, *fresh, stalled),
            )
            f, g = state.f + self.epsilon * jnp.log(u), state.g + self.epsilon * jnp.log(v)
            return Potentials(f, g, count, error), stalled

        return jax.lax.while_loop(
            lambda c: jnp.any(active(c[0].iterations, c[0].error, c[1])),
            round_,
            (start, jnp.zeros((batch,), jnp.int32)),
        )[0]
