"""Our Sinkhorn on scalings against POT in float64: absorption, log domain, bfloat16, batches, odd shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest

from tmjax import ot
from tmjax.errors import InputError
from tmjax.ot.solvers import scaling


def _costs(batch: tuple[int, ...], n: int, k: int, seed: int = 0, rows: int = 200) -> np.ndarray:
    """Costs 1 - correlation of activations that share some latent directions, as two models' do."""
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(*batch, rows, 12))
    x = latent @ generator.normal(size=(*batch, 12, n)) + 2 * generator.normal(size=(*batch, rows, n))
    y = latent @ generator.normal(size=(*batch, 12, k)) + 2 * generator.normal(size=(*batch, rows, k))
    x, y = ((z - z.mean(-2, keepdims=True)) for z in (x, y))
    x, y = (z / np.sqrt((z * z).sum(-2, keepdims=True)) for z in (x, y))
    return (1 - np.swapaxes(x, -1, -2) @ y).astype(np.float32)


def _truth(cost: np.ndarray, epsilon: float) -> np.ndarray:
    n, k = cost.shape
    return pot.bregman.sinkhorn_log(
        np.full(n, 1 / n), np.full(k, 1 / k), cost.astype(np.float64), epsilon, stopThr=1e-13, numItermax=100000
    )


def _solve(cost: np.ndarray, **options) -> ot.OTResult:
    return ot.solve(ot.Problem.with_uniform_marginals(jnp.asarray(cost)), ot.make_solver("scaling", **options))


def _matrix(result: ot.OTResult) -> np.ndarray:
    """The plan in float64, from its potentials."""
    f, g, epsilon, cost = (np.asarray(x, np.float64) for x in jax.tree.leaves(result.plan))
    return np.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon[..., None, None])


def _assert_right(result: ot.OTResult, truth: np.ndarray, tolerance: float = 1e-5) -> None:
    q = _matrix(result)
    assert np.abs(q - truth).max() <= tolerance * truth.max()
    assert bool(result.converged)


@pytest.mark.parametrize(
    ("shape", "epsilon"), [((48, 64), 0.1), ((48, 64), 0.03), ((80, 8), 0.1), ((80, 8), 0.03), ((1, 9), 0.1)]
)
def test_coupling_and_costs_match_pot(shape: tuple[int, int], epsilon: float) -> None:
    cost = _costs((), *shape)
    result, truth = _solve(cost, epsilon=epsilon), _truth(cost, epsilon)
    assert not bool(scaling.log_domain_needed(ot.Problem.with_uniform_marginals(jnp.asarray(cost)), epsilon))
    # The last contraction may be slow: an error of 1e-6 in the marginals is more in the plan.
    _assert_right(result, truth, 1e-4 if epsilon == 0.03 else 1e-5)
    assert float(result.marginal_error) <= 2e-6
    np.testing.assert_allclose(result.transport_cost, (cost * truth).sum(), rtol=1e-5)
    entropy = -(truth * (np.log(truth) - 1)).sum()
    np.testing.assert_allclose(result.regularised_cost, (cost * truth).sum() - epsilon * entropy, rtol=1e-4, atol=1e-5)


def test_batch_equals_singles_and_stops_per_problem() -> None:
    cost = (_costs((2, 2), 32, 48) * np.asarray([1.0, 3.0])[:, None, None, None]).astype(np.float32)
    batch = _solve(cost, epsilon=0.1)
    assert batch.plan.f.shape == (2, 2, 32) and batch.plan.g.shape == (2, 2, 48) and batch.converged.all()
    assert len(set(np.asarray(batch.iterations).ravel().tolist())) > 1
    for index in np.ndindex(2, 2):
        single = _solve(cost[index], epsilon=0.1)
        assert int(single.iterations) == int(batch.iterations[index])
        np.testing.assert_allclose(_matrix(batch)[index], _matrix(single), rtol=1e-5)


def _hub(far: float) -> np.ndarray:
    """Two thirds of the rows are near to one third of the columns only: half of their mass must go far."""
    cost = np.random.default_rng(1).uniform(0, 0.05, (30, 30))
    cost[:20, 10:] += far
    return cost.astype(np.float32)


def test_large_scalings_are_absorbed(monkeypatch) -> None:
    cost, epsilon = _hub(1.95), 0.025
    solver = ot.make_solver("scaling", epsilon=epsilon)
    problem = jax.tree.map(lambda x: x[None], ot.Problem.with_uniform_marginals(jnp.asarray(cost)))
    assert not bool(scaling.log_domain_needed(problem, epsilon)[0])
    rounds = []
    original = scaling.coupling

    def counted(f, *rest):
        jax.debug.callback(lambda f: rounds.append(np.asarray(f)), f)
        return original(f, *rest)

    monkeypatch.setattr(scaling, "coupling", counted)
    f, g, iterations = jax.jit(solver.potentials)(problem)
    jax.effects_barrier()
    assert len(rounds) > 1 and int(iterations[0]) < solver.max_iterations
    truth = _truth(cost, epsilon)
    q = np.exp((np.asarray(f[0], np.float64)[:, None] + np.asarray(g[0], np.float64) - cost) / epsilon)
    assert np.abs(q - truth).max() <= 1e-4 * truth.max()


def test_tiny_epsilon_is_solved_in_the_log_domain() -> None:
    cost, epsilon = _hub(1.95), 0.003
    assert bool(scaling.log_domain_needed(ot.Problem.with_uniform_marginals(jnp.asarray(cost)), epsilon))
    result = _solve(cost, epsilon=epsilon, max_iterations=20000)
    _assert_right(result, _truth(cost, epsilon), 3e-4)


def test_log_domain_is_chosen_per_problem() -> None:
    costs = np.stack([_costs((), 30, 30), _hub(1.95)])
    problem = ot.Problem.with_uniform_marginals(jnp.asarray(costs))
    assert scaling.log_domain_needed(problem, 0.02).tolist() == [False, True]
    result = _solve(costs, epsilon=0.02, max_iterations=20000)
    for i in range(2):
        _assert_right(jax.tree.map(lambda x, i=i: x[i], result), _truth(costs[i], 0.02), 2e-4)


def test_wide_offsets_alone_need_no_log_domain() -> None:
    cost = _costs((), 48, 64) + np.linspace(0, 50, 48)[:, None].astype(np.float32)
    assert not bool(scaling.log_domain_needed(ot.Problem.with_uniform_marginals(jnp.asarray(cost)), 0.1))
    _assert_right(_solve(cost, epsilon=0.1), _truth(cost, 0.1), 1e-4)


@pytest.mark.parametrize("options", [{"kernel_dtype": "bfloat16"}, {"relaxation": 1.3, "check_every": 3}])
def test_options_change_the_way_not_the_result(options: dict) -> None:
    cost = _costs((), 48, 64)
    result = _solve(cost, epsilon=0.03, **options)
    _assert_right(result, _truth(cost, 0.03), 1e-4)
    assert float(result.marginal_error) <= 2e-6


def test_duplicate_units_are_treated_alike() -> None:
    cost = _costs((), 48, 64)
    cost[5] = cost[4]
    cost[:, 9] = cost[:, 8]
    q = _matrix(_solve(cost))
    np.testing.assert_allclose(q[5], q[4], rtol=1e-5)
    np.testing.assert_allclose(q[:, 9], q[:, 8], rtol=1e-5)
    _assert_right(_solve(cost), _truth(cost, 0.1))


def test_too_few_iterations_are_not_called_converged() -> None:
    for epsilon in (0.03, 0.003):
        result = _solve(_hub(1.95), epsilon=epsilon, threshold=1e-7, max_iterations=2)
        assert not bool(result.converged) and np.isfinite(_matrix(result)).all()


def test_float32_noise_does_not_keep_it_iterating() -> None:
    result = _solve(_costs((), 48, 64), threshold=0.0)
    assert int(result.iterations) < 100 and float(result.marginal_error) < 1e-6


def test_more_problems_compile_nothing_new() -> None:
    solver = ot.make_solver("scaling", epsilon=0.1)
    compiled = functools.partial(jax.jit, static_argnames="solver")(lambda problem, solver: solver.solve_batch(problem))
    costs = jnp.asarray(_costs((12,), 8, 80))
    for start in range(0, 12, 4):
        assert compiled(ot.Problem.with_uniform_marginals(costs[start : start + 4]), solver).converged.all()
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "options", [{"epsilon": 0.0}, {"relaxation": 2.0}, {"kernel_dtype": "float16"}, {"check_every": 0}]
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        ot.make_solver("scaling", **options)
