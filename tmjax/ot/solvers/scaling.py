"""Batched Sinkhorn in the scaling form: two matrix-vector products per iteration instead of exponentials.

Sinkhorn & Knopp 1967 and Cuturi 2013 (u = a / Kv, v = b / K^T u); absorption of the scalings into potentials as in
Schmitzer 2019, "Stabilized sparse scaling algorithms for entropy regularized transport problems"; over-relaxation as in
Thibault et al. 2017 and Lehmann et al. 2022, "A note on overrelaxation in the Sinkhorn algorithm".
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from tmjax.errors import InputError
from tmjax.ot.plan import EntropicPlan, coupling
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.base import Capabilities
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
#: L1 error at which a bfloat16 kernel has given what it can: scalings rounded to 8 bits alone leave about 2e-3.
BFLOAT16_ERROR = 1e-2


class _State(NamedTuple):
    """Potentials f [n], g [k] of one problem, iterations done and the L1 marginal error after them."""

    f: Array
    g: Array
    iterations: Array
    error: Array


@functools.partial(jax.jit, static_argnames="epsilon")
def log_domain_needed(problem: Problem, epsilon: float) -> Array:
    """Whether `scaling` solves the problems [...] in the log domain: costs, less the minima of their rows and columns,
    that reach beyond KERNEL_RANGE epsilon, so that entries of the kernel would underflow.
    """
    batch = problem.cost.shape[:-2]
    flat = problem.cost.reshape(-1, *problem.cost.shape[-2:])
    return jax.lax.map(lambda cost: _start(cost, _spread(cost), epsilon)[2] > KERNEL_RANGE, flat).reshape(batch)


def _spread(cost: Array) -> tuple[Array, Array]:
    """The least and the largest cost [...] of costs [..., n, k]."""
    return jnp.min(cost, axis=(-2, -1)), jnp.max(cost, axis=(-2, -1))


def _start(cost: Array, spread: tuple[Array, Array], epsilon: float) -> tuple[Array, Array, Array]:
    """Potentials f [n], g [k] that shift the costs [n, k] into the kernel's range, and the largest exponent left.

    Minima of rows and columns cost passes over the costs; they are taken only where the plain spread is too wide.
    """
    n, k = cost.shape
    low, high = spread

    def plain() -> tuple[Array, Array, Array]:
        # The middle becomes exp(0): half the range on either side of 1.
        return jnp.full((n,), (low + high) / 2), jnp.zeros((k,)), (high - low) / epsilon

    def minima() -> tuple[Array, Array, Array]:
        f = jnp.min(cost, axis=1)
        g = jnp.min(cost - f[:, None], axis=0)
        return f, g, jnp.max(cost - f[:, None] - g) / epsilon

    return jax.lax.cond((high - low) / epsilon <= KERNEL_RANGE, plain, minima)


@dataclass(frozen=True)
class Scaling:
    """Sinkhorn on scalings: stops when the L1 marginal error is below `threshold` or after `max_iterations`.

    The error is known from the iteration itself and is tested every `check_every` iterations. `relaxation` in [1, 2) is
    the exponent of over-relaxed updates. `kernel_dtype` "bfloat16" halves what the first iterations read, where memory
    is the limit (accelerators); the last iterations use float32, so that the certificate holds. Problems whose costs
    spread too far for float32 exponentials are solved in the log domain (`log_domain_needed` tells which), and so are
    those where scalings overflowed. Raises InputError for options out of range.
    """

    name: ClassVar[str] = "scaling"
    capabilities: ClassVar[Capabilities] = Capabilities(exact_limit=True, entropic=True)

    epsilon: float = 0.1
    threshold: float = 1e-6
    max_iterations: int = 2000
    check_every: int = 1
    relaxation: float = 1.0
    kernel_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuses options out of range."""
        if not self.epsilon > 0 or not self.threshold >= 0 or self.max_iterations < 1 or self.check_every < 1:
            raise InputError("scaling needs epsilon > 0, threshold >= 0, max_iterations >= 1 and check_every >= 1")
        if not 1 <= self.relaxation < 2:
            raise InputError(f"relaxation {self.relaxation} is not in [1, 2)")
        if self.kernel_dtype not in ("float32", "bfloat16"):
            raise InputError(f"kernel_dtype {self.kernel_dtype!r} is neither 'float32' nor 'bfloat16'")

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        return jax.tree.map(lambda x: x[0], self.solve_batch(jax.tree.map(lambda x: x[None], problem)))

    def solve_batch(self, problem: Problem) -> OTResult:
        """Solves problems [B, n, k] in turn under `jit`, each with its own number of iterations."""
        f, g, iterations = self.potentials(problem)

        def check(item: tuple[Problem, Array, Array, Array]) -> OTResult:
            one, f, g, count = item
            plan = EntropicPlan(f, g, jnp.float32(self.epsilon))
            return certify(one, plan, iterations=count, threshold=self.threshold, epsilon=self.epsilon)

        return jax.lax.map(check, (problem, f, g, iterations))

    def potentials(self, problem: Problem) -> tuple[Array, Array, Array]:
        """Potentials f [B, n], g [B, k] and iterations [B] of problems [B, n, k], without their certificates."""
        spread = _spread(problem.cost)

        def one(index: Array) -> tuple[Array, Array, Array]:
            # Indexed here and not by `map`, which would copy each cost before use.
            single = jax.tree.map(lambda x: x[index], problem)
            return self._solve(single, (spread[0][index], spread[1][index]))

        return jax.lax.map(one, jnp.arange(problem.cost.shape[0]))

    def _solve(self, problem: Problem, spread: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        f, g, exponent = _start(problem.cost, spread, self.epsilon)
        start = _State(f, g, jnp.int32(0), jnp.float32(jnp.inf))
        wide = exponent > KERNEL_RANGE
        state = start
        if self.kernel_dtype == "bfloat16":
            rough = self._scale(problem, state, wide, jnp.bfloat16, max(self.threshold, BFLOAT16_ERROR))
            # The error of the rounded kernel certifies nothing.
            state = rough._replace(error=jnp.float32(jnp.inf))
        state = self._scale(problem, state, wide, jnp.float32, self.threshold)
        lost = ~(jnp.isfinite(state.error) & jnp.isfinite(state.f).all() & jnp.isfinite(state.g).all())
        state = jax.tree.map(lambda new, old: jnp.where(lost, old, new), state, start)
        state = self._log_domain(problem, state, wide | lost)
        # Only f + g counts: equal means keep both small, and so their rounding.
        shift = (jnp.mean(state.f) - jnp.mean(state.g)) / 2
        return state.f - shift, state.g + shift, state.iterations

    def _scale(self, problem: Problem, start: _State, skip: Array, dtype: jnp.dtype, threshold: float) -> _State:
        """Iterations in the scaling form; the outer loop builds the kernel, again whenever scalings grew too large."""
        omega = self.relaxation

        def update(old: Array, wanted: Array, sums: Array) -> Array:
            new = wanted / sums
            new = new if omega == 1 else new * (old / new) ** (1 - omega)
            return new.astype(dtype).astype(jnp.float32)

        def product(subscripts: str, kernel: Array, scaling: Array) -> Array:
            highest = jax.lax.Precision.HIGHEST
            scaling = scaling.astype(dtype)
            return jnp.einsum(subscripts, kernel, scaling, precision=highest, preferred_element_type=jnp.float32)

        n, k = problem.cost.shape
        blocks = BLOCKS if n % BLOCKS == 0 else 1

        def step(kernel: Array, carry: tuple) -> tuple:
            u, v, rows, _ = carry
            u = update(u, problem.a, rows)
            columns = jnp.sum(product("bnk,bn->bk", kernel.reshape(blocks, -1, k), u.reshape(blocks, -1)), axis=0)
            v = update(v, problem.b, columns)
            return u, v, product("nk,k->n", kernel, v), columns

        def iterate(kernel: Array, carry: tuple) -> tuple:
            inner, count, _, _, best, stalled = carry
            inner = jax.lax.fori_loop(0, self.check_every, lambda _, c: step(kernel, c), inner)
            u, v, rows, columns = inner
            # Exact marginals of diag(u) K diag(v), from the products that the iteration makes anyway.
            error = jnp.maximum(jnp.sum(jnp.abs(u * rows - problem.a)), jnp.sum(jnp.abs(v * columns - problem.b)))
            size = jnp.maximum(jnp.max(jnp.abs(jnp.log(u))), jnp.max(jnp.abs(jnp.log(v))))
            stalled = jnp.where((error < best) | (error > STALL), 0, stalled + 1)
            return inner, count + self.check_every, error, size, jnp.minimum(error, best), stalled

        def unfinished(count: Array, error: Array) -> Array:
            # An error that is NaN ends the loop; infinity is the start.
            return (error > threshold) & (count < self.max_iterations)

        def round_(state: _State) -> tuple[_State, Array]:
            kernel = coupling(state.f, state.g, problem.cost, self.epsilon).astype(dtype)
            u, v = jnp.ones_like(state.f), jnp.ones_like(state.g)
            inner = (u, v, product("nk,k->n", kernel, v), jnp.zeros_like(v))
            infinity = jnp.float32(jnp.inf)
            (u, v, *_), count, error, _, _, stalled = jax.lax.while_loop(
                lambda c: unfinished(c[1], c[2]) & (c[3] <= ABSORB) & (c[5] < PATIENCE),
                lambda c: iterate(kernel, c),
                (inner, state.iterations, infinity, jnp.float32(0), infinity, jnp.int32(0)),
            )
            f, g = state.f + self.epsilon * jnp.log(u), state.g + self.epsilon * jnp.log(v)
            return _State(f, g, count, error), stalled >= PATIENCE

        return jax.lax.while_loop(
            lambda c: ~skip & ~c[1] & unfinished(c[0].iterations, c[0].error),
            lambda c: round_(c[0]),
            (start, jnp.asarray(False)),
        )[0]

    def _log_domain(self, problem: Problem, start: _State, needed: Array) -> _State:
        """Iterations on potentials by log-sum-exp; slower, right for every epsilon.

        Below what float32 rounds away of the exponents there is nothing to gain: `certify` allows for as much.
        """
        log_a, log_b = self.epsilon * jnp.log(problem.a), self.epsilon * jnp.log(problem.b)
        rounding = jnp.finfo(jnp.float32).eps / self.epsilon
        largest = jnp.max(jnp.abs(problem.cost))

        def softmin(potential: Array, cost: Array, axis: int) -> Array:
            return -self.epsilon * jax.nn.logsumexp((potential - cost) / self.epsilon, axis=axis)

        def step(state: _State) -> _State:
            f = log_a + softmin(state.g, problem.cost, 1)
            g = log_b + softmin(f[:, None], problem.cost, 0)
            # The rows of (f_old, g_old) have the sums a exp((f_old - f) / epsilon), its columns are exact.
            error = jnp.sum(problem.a * jnp.abs(jnp.expm1((state.f - f) / self.epsilon)))
            return _State(f, g, state.iterations + 1, jnp.where(state.iterations == 0, jnp.inf, error))

        def unfinished(state: _State) -> Array:
            floor = rounding * (largest + jnp.max(jnp.abs(state.f)) + jnp.max(jnp.abs(state.g))) / 2
            return needed & ~(state.error <= self.threshold + floor) & (state.iterations < self.max_iterations)

        return jax.lax.while_loop(unfinished, step, start)
