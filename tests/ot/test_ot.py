"""Solvers against POT in float64, the certificate, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmjax import ot
from tmjax.errors import InputError, NonFiniteError


def _costs(batch: tuple[int, ...], n: int, k: int, seed: int = 0, rows: int = 200) -> np.ndarray:
    """Costs 1 - correlation of activations that share some latent directions, as two models' do."""
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(*batch, rows, 12))
    x = latent @ generator.normal(size=(*batch, 12, n)) + 2 * generator.normal(size=(*batch, rows, n))
    y = latent @ generator.normal(size=(*batch, 12, k)) + 2 * generator.normal(size=(*batch, rows, k))
    return 1 - np.asarray(ot.correlation(ot.standardise(jnp.asarray(x)), ot.standardise(jnp.asarray(y))))


@pytest.mark.parametrize("epsilon", [0.1, 0.03])
@pytest.mark.parametrize("shape", [(30, 50), (64, 17), (1, 9), (8, 8)])
def test_coupling_matches_pot(epsilon: float, shape: tuple[int, int]) -> None:
    cost = _costs((), *shape)
    solver = ot.make_solver("sinkhorn", epsilon=epsilon, threshold=1e-6, max_iterations=5000)
    result = ot.solve(ot.Problem.with_uniform_marginals(jnp.asarray(cost)), solver)
    n, k = shape
    truth = pot.sinkhorn(
        np.full(n, 1 / n), np.full(k, 1 / k), cost.astype(np.float64), epsilon, stopThr=1e-12, numItermax=100000
    )
    assert bool(result.converged)
    assert np.abs(result.matrix() - truth).max() <= 1e-5 * truth.max()
    assert float(result.marginal_error) <= (2e-6 if epsilon == 0.1 else 1e-5)
    np.testing.assert_allclose(result.transport_cost, (cost * truth).sum(), rtol=1e-5)
    entropy = -(truth * (np.log(truth) - 1)).sum()
    np.testing.assert_allclose(result.regularised_cost, (cost * truth).sum() - epsilon * entropy, rtol=1e-4, atol=1e-5)


def test_batch_stops_per_problem_and_equals_single_solves() -> None:
    cost = jnp.asarray(_costs((2, 3), 20, 31) * np.asarray([1.0, 4.0])[:, None, None, None])
    solver = ot.make_solver("sinkhorn", epsilon=0.1, threshold=1e-5)
    batch = ot.solve(ot.Problem.with_uniform_marginals(cost), solver)
    assert batch.plan.f.shape == (2, 3, 20) and batch.plan.g.shape == (2, 3, 31) and batch.converged.all()
    assert len(set(np.asarray(batch.iterations).ravel().tolist())) > 1
    for index in np.ndindex(2, 3):
        single = ot.solve(ot.Problem.with_uniform_marginals(cost[index]), solver)
        assert int(single.iterations) == int(batch.iterations[index])
        np.testing.assert_allclose(batch.matrix()[index], single.matrix(), atol=1e-8)


def test_apply_equals_matrix_product() -> None:
    result = ot.solve(ot.Problem.with_uniform_marginals(jnp.asarray(_costs((2,), 6, 9))), ot.make_solver("sinkhorn"))
    x, y = jax.random.normal(jax.random.key(0), (2, 9, 3)), jax.random.normal(jax.random.key(1), (2, 6, 3))
    matrix = np.asarray(result.matrix(), np.float64)
    np.testing.assert_allclose(result.apply(x), matrix @ np.asarray(x), atol=1e-6)
    np.testing.assert_allclose(result.apply_transpose(y), np.swapaxes(matrix, 1, 2) @ np.asarray(y), atol=1e-6)


def test_too_few_iterations_are_not_called_converged() -> None:
    problem = ot.Problem.with_uniform_marginals(jnp.asarray(_costs((), 40, 60)))
    result = ot.solve(problem, ot.make_solver("sinkhorn", epsilon=0.01, threshold=1e-7, max_iterations=10))
    assert not bool(result.converged) and float(result.marginal_error) > 1e-5


def test_nan_cost_and_wrong_marginals_are_refused() -> None:
    cost = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    with pytest.raises(NonFiniteError, match="NaN"):
        ot.solve(ot.Problem.with_uniform_marginals(cost), ot.make_solver("sinkhorn"))
    with pytest.raises(InputError, match="do not fit"):
        ot.solve(ot.Problem(jnp.ones((3, 4)), ot.uniform(4), ot.uniform(4)), ot.make_solver("sinkhorn"))
    with pytest.raises(InputError, match=r"known are assignment, .*sinkhorn"):
        ot.make_solver("simplex")


def test_constant_units_correlate_with_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    x[:, 1] = 3.7
    rho = np.asarray(ot.correlation(ot.standardise(jnp.asarray(x)), ot.standardise(jnp.asarray(x))))
    np.testing.assert_array_equal(rho[1], 0)
    np.testing.assert_allclose(rho[[0, 2, 3]][:, [0, 2, 3]], np.corrcoef(x[:, [0, 2, 3]].T), atol=1e-5)


# Few shapes: every shape is a compilation.
@given(st.sampled_from([(1, 1), (1, 7), (5, 11), (9, 9)]), st.integers(0, 10**6))
def test_coupling_has_its_marginals_and_swaps_with_its_sides(shape: tuple[int, int], seed: int) -> None:
    n, k = shape
    cost = np.random.default_rng(seed).uniform(0, 2, (n, k)).astype(np.float32)
    solver = ot.make_solver("sinkhorn", epsilon=0.2, threshold=1e-6, max_iterations=20000)
    result = ot.solve(ot.Problem.with_uniform_marginals(jnp.asarray(cost)), solver)
    swapped = ot.solve(ot.Problem.with_uniform_marginals(jnp.asarray(cost.T)), solver)
    q = np.asarray(result.matrix(), np.float64)
    assert bool(result.converged)
    np.testing.assert_allclose(q.sum(0), np.full(k, 1 / k), atol=2e-6)
    np.testing.assert_allclose(q.sum(1), np.full(n, 1 / n), atol=2e-6)
    np.testing.assert_allclose(q, np.asarray(swapped.matrix()).T, atol=3e-6)
