"""`tmjax solvers`: the same real problems for every solver, resumable, and a page."""

import json

import numpy as np
import ot as pot
import pytest

from tmjax import cli
from tmjax.activations import store
from tmjax.align.plans import solve_site
from tmjax.commands.solvers.run import parse_solver
from tmjax.commands.solvers.variants import SolverProblem, held_out, measure_site, split_rows
from tmjax.errors import InputError
from tmjax.ot import make_solver, standardise
from tmjax.recipes.merge import AlignmentOptions
from tmjax.runs.run_files import split

NAMES = ["sinkhorn:epsilon=0.1", "scaling:epsilon=0.1", "greedy", "ridge"]


@pytest.fixture(scope="module")
def compared(small_flags, recipe_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("solvers") / "run"
    arguments = ["solvers", recipe_file, *small_flags, "--out", str(out), "--solvers", ",".join(NAMES), "--json"]
    assert cli.run(arguments) == 0
    return out, arguments


def test_every_solver_has_its_line(compared) -> None:
    out, _ = compared
    manifest = json.loads((out / "manifest.json").read_text())
    lines = {line["solver"]: line for line in manifest["solvers"]}
    assert list(lines) == NAMES and len(manifest["solver_sites"]) == 9 * len(NAMES)
    sinkhorn, scaling, greedy, ridge = lines.values()
    assert all(line["problems"] == 9 * 6 and line["seconds"] > 0 for line in lines.values())
    # Two ways to the same plans, and so to the same merge.
    assert scaling["bits_per_byte"] == pytest.approx(sinkhorn["bits_per_byte"], abs=2e-4)
    assert scaling["transport_cost"] == pytest.approx(sinkhorn["transport_cost"], rel=1e-3)
    assert scaling["explained_target_gain"] == pytest.approx(sinkhorn["explained_target_gain"], abs=1e-3)
    assert greedy["bits_per_byte"] is not None and greedy["iterations_max"] <= 1
    assert ridge["marginal_error"] is None and ridge["explained_target"] < 1
    assert ridge["bits_per_byte"] is not None and 0 < scaling["distance_to_exact"] < 1
    assert split(out, manifest)[1] == []
    page = (out / "solvers.html").read_text()
    assert all(name in page for name in NAMES) and "data:image/png" in page and "http" not in page.split("<body>")[1]


@pytest.mark.slow
def test_a_second_start_measures_only_new_solvers(compared, capsys) -> None:
    _, arguments = compared
    capsys.readouterr()
    more = [",".join([*NAMES, "signed"]) if item == ",".join(NAMES) else item for item in arguments]
    assert cli.run(more) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [name for name, stage in stages.items() if not stage["reused"]] == ["solver:signed"]


@pytest.mark.parametrize(("name", "settings"), [("sinkhorn", {"epsilon": 0.1, "threshold": 1e-5}), ("ridge", {})])
def test_explained_variance_is_that_of_held_out_rows(compared, name, settings) -> None:
    out, _ = compared
    target, source = (store.read(out / "activations" / side) for side in ("target", "source"))
    solver = make_solver(name, **settings)
    problem = SolverProblem.of("v", target, source)
    row = measure_site("x", solver, problem, repeats=1)
    fit, test = split_rows(target.rows.document)
    assert len(fit) + len(test) == len(target.rows) and not set(target.rows.document[fit]) & set(
        target.rows.document[test]
    )
    if name != "ridge":  # which transports nothing
        uncentred = measure_site("x", solver, SolverProblem.of("v", target, source, centred=False), repeats=1)
        assert abs(uncentred.transport_cost - row.transport_cost) > 1e-4
    x, y = target.site("v").astype(float), source.site("v").astype(float)
    plans = solve_site(target.site("v")[:, fit], source.site("v")[:, fit], solver, gain=True)
    shares = []
    for layer in range(x.shape[0]):
        for m in range(y.shape[0]):
            zx, zy = held_out(x[:, fit], x[:, test])[layer], held_out(y[:, fit], y[:, test])[m]
            plan, weight, _ = plans.pair(layer, m)
            predicted = zy @ np.asarray(plan.matrix(), float).T * np.asarray(weight)
            shares.append(np.mean(1 - ((zx - predicted) ** 2).sum(0) / (zx**2).sum(0)))
    assert row.explained_target_gain == pytest.approx(np.mean(shares), abs=1e-4)


def test_distance_to_the_optimal_plan(compared) -> None:
    out, _ = compared
    target, source = (store.read(out / "activations" / side) for side in ("target", "source"))
    problem = SolverProblem.of("v", target, source)
    assert len(problem.exact) == target.layers
    (layer, m), (plan, cost) = list(problem.exact.items())[1]
    zx, zy = (np.asarray(standardise(z[i]), float) for z, i in ((problem.x_fit, layer), (problem.y_fit, m)))
    n, k = plan.shape
    assert cost == pytest.approx(pot.emd2(np.full(n, 1 / n), np.full(k, 1 / k), 1 - zx.T @ zy), rel=1e-4)
    rows = {
        name: measure_site(name, make_solver(name, **options), problem, repeats=1)
        for name, options in (("network_simplex", {}), ("scaling", {"epsilon": 0.02}), ("sinkhorn", {"epsilon": 0.5}))
    }
    exact, sharp, blurred = (row.distance_to_exact for row in rows.values())
    assert exact < 1e-3 < sharp < blurred < 1
    assert rows["network_simplex"].exact_cost <= rows["scaling"].transport_cost
    assert not SolverProblem.of("v", target, source, exact_entries=10).exact


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "solver 'magic' is not known"),
        ("sinkhorn:epsilon", "write name:key=value"),
        ("sinkhorn:speed=11", "has no option 'speed'"),
        ("sinkhorn:epsilon=-1", "epsilon: Input should be greater than 0"),
    ],
)
def test_wrong_solver_names_and_options(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_solver(text, AlignmentOptions())
