"""Numbers of the authors' released code, stored: costs, plans, layer plans and the transported sum (Eq. 16)."""

import numpy as np
import ot as pot
import pytest

from tmjax.align.alignment import Alignment
from tmjax.align.features import FeatureSite
from tmjax.align.layer_plan import LayerPlan, layer_plan
from tmjax.align.plans import solve_site
from tmjax.align.statistics import statistics
from tmjax.models.spec import ParamSpec
from tmjax.ot import cost_matrix, make_solver
from tmjax.recipes.merge import AlignmentOptions
from tmjax.transfer.operators.transport import transport_projection


@pytest.fixture(scope="module")
def stored(repo):
    return np.load(repo / "tests/data/released_code_outputs.npz")


def _solve(stored, epsilon: float):
    x = np.stack([stored[f"X{i}"] for i in range(3)])
    y = np.stack([stored[f"Y{i}"] for i in range(5)])
    solver = make_solver("sinkhorn", epsilon=epsilon, threshold=1e-6, max_iterations=10000)
    return x, y, solve_site(x, y, solver, memory_mib=1, feature_dtype="float32")


def _couplings(plans) -> np.ndarray:
    return np.stack([np.stack([np.asarray(plans.plan(layer, m)) for m in range(5)]) for layer in range(3)])


def _close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("epsilon", [0.1, 0.03])
def test_plans_and_layer_plans(stored, epsilon: float) -> None:
    x, y, plans = _solve(stored, epsilon)
    assert plans.converged.all() and plans.stored == "potentials, features"
    _close(cost_matrix(FeatureSite.of(x, y, centred=True).problem(0, 0).cost), stored["cost_00"])
    # At 0.03 the stored plan stopped 1.7e-5 short of convergence.
    _close(_couplings(plans), stored[f"Q_eps{epsilon}"], 1e-5 if epsilon == 0.1 else 5e-5)
    _close(plans.layer_cost, stored[f"C_layer_eps{epsilon}"])
    for eta in (0.1, 0.5):
        options = AlignmentOptions(layer_epsilon=eta, layer_cost_scale="median", layer_threshold=1e-6)
        _close(layer_plan(plans.layer_cost, options).matrix(), stored[f"P_eps{epsilon}_eta{eta}"])


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_layer_plan_matches_pot(stored, eta: float) -> None:
    cost = np.asarray(stored["C_layer_eps0.1"], np.float64)
    scaled = (cost - cost.min()) / np.median(cost - cost.min())
    truth = pot.sinkhorn(np.full(3, 1 / 3), np.full(5, 1 / 5), scaled, eta, stopThr=1e-13, numItermax=100000)
    result = layer_plan(cost, AlignmentOptions(layer_epsilon=eta))
    assert bool(result.converged)
    _close(result.matrix(), truth)


def test_layer_plan_without_the_unprinted_scaling_is_another_one(stored) -> None:
    theirs = stored["P_eps0.1_eta0.1"]
    options = AlignmentOptions(layer_epsilon=0.1, layer_cost_scale="none")
    assert np.abs(layer_plan(stored["C_layer_eps0.1"], options).matrix() - theirs).max() > 0.3 * theirs.max()


def test_transported_sum(stored) -> None:
    x, y, plans = _solve(stored, 0.1)
    row = ParamSpec("w", "w", ("embed", "embed"), role="q", input_site="in", output_site="out")
    coupling = np.asarray(layer_plan(plans.layer_cost, AlignmentOptions(layer_epsilon=0.1)).matrix())
    site = {"in": plans, "out": plans}
    alignment = Alignment(
        True,
        len(x[0]),
        site,
        dict.fromkeys(site, statistics(x)),
        dict.fromkeys(site, statistics(y)),
        {"q": LayerPlan(coupling, coupling, coupling, coupling, np.zeros(3))},
        {},
    )
    weight, bias = transport_projection(alignment, row, stored["W_source"], None, kind="paper")
    _close(weight, stored["delta_eq16_eps0.1_eta0.1"])
    np.testing.assert_array_equal(bias, 0)


@pytest.mark.parametrize("solver", ["sinkhorn", "scaling"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plans_from_kept_features(stored, solver: str, dtype: str) -> None:
    """What is kept on disk depends on size only: with few rows the features are smaller than the costs."""
    x = np.stack([stored[f"X{i}"][:10] for i in range(3)])
    y = np.stack([stored[f"Y{i}"][:10] for i in range(5)])
    plans = solve_site(x, y, make_solver(solver, epsilon=0.1, threshold=1e-6), feature_dtype=dtype)
    solutions = plans.solutions
    assert plans.stored == "potentials, features" and solutions.zx.shape == (3, 10, 24) and solutions.zx.dtype == dtype
    # Whatever the rounding, the plans are those of the activations that are kept.
    costs = 1 - np.einsum("lrn,mrk->lmnk", solutions.zx.astype(float), solutions.zy.astype(float))
    f, g = (x.astype(float).reshape(3, 5, -1) for x in (solutions.f, solutions.g))
    dense = np.exp((f[..., None] + g[..., None, :] - costs) / 0.1)
    _close(_couplings(plans), dense)
    assert np.abs(dense.sum(-1) - 1 / 24).sum(-1).max() < 3e-6
    exact = _couplings(solve_site(x, y, make_solver("sinkhorn", epsilon=0.1, threshold=1e-6), feature_dtype="float32"))
    _close(_couplings(plans), exact, 1e-5 if dtype == "float32" else 5e-3)
