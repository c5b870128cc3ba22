"""The alignment engine as a whole: devices, compilations, memory, room on disk, sums instead of rows."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

from tmjax import cli, ot
from tmjax.activations.store import Layers
from tmjax.align import moments, plans
from tmjax.align import storage as store
from tmjax.align.alignment import Alignment
from tmjax.align.features import CorrelationSite, FeatureSite
from tmjax.align.plans import solve_pairs, solve_site
from tmjax.errors import InputError
from tmjax.ot import make_solver
from tmjax.sharding.mesh import Layout

SOLVER = make_solver("scaling", epsilon=0.05, threshold=1e-6)


def activations(layers: int, sources: int, rows: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Of all layers of two models that share latent directions; one unit of the target is constant."""
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(rows, 8))
    x, y = (
        latent @ generator.normal(size=(count, 8, units)) + 2 * generator.normal(size=(count, rows, units))
        for count, units in ((layers, n), (sources, k))
    )
    x[:, :, 1] = 3.0
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("name", ["scaling", "sinkhorn", "signed", "greedy", "ridge"])
def test_pairs_are_split_over_devices(name: str) -> None:
    x, y = activations(3, 5, 60, 12, 20)
    options = {} if name in ("greedy", "ridge") else {"epsilon": 0.05, "threshold": 1e-6}
    solver = make_solver(name, **options)
    one = solve_site(x, y, solver, gain=True, feature_dtype="float32")
    eight = solve_site(x, y, solver, gain=True, feature_dtype="float32", mesh=Layout("data=2,fsdp=2,tensor=2").mesh)
    assert one.stored == eight.stored and one.converged.all() == eight.converged.all()
    for field in ("layer_cost", "weight_target", "weight_source"):
        a, b = (np.asarray(getattr(found, field)) for found in (one, eight))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    for layer, source in np.ndindex(3, 5):
        q = np.asarray(one.plan(layer, source))
        np.testing.assert_allclose(eight.plan(layer, source), q, atol=1e-5 * q.max())


def test_compilations_do_not_grow_with_the_number_of_pairs(monkeypatch) -> None:
    monkeypatch.setattr(plans, "CHUNK", 8)
    x, y = activations(8, 12, 30, 16, 24)

    def compiled(layers: int, sources: int) -> int:
        jax.clear_caches()
        wanted = np.zeros((8, 12), bool)
        wanted[:layers, :sources] = True
        solve_site(x, y, SOLVER, pair_mask_lm=wanted)
        return plans.solve_chunk._cache_size()

    assert compiled(2, 5) == compiled(8, 12) == 1


@pytest.mark.parametrize(
    ("mib", "rows", "log_domain"),
    [
        (28, 100, False),
        pytest.param(14, 100, False, marks=pytest.mark.slow),
        (5, 100, True),
        pytest.param(40, 600, False, marks=pytest.mark.slow),
        pytest.param(26, 600, False, marks=pytest.mark.slow),
        pytest.param(17, 600, True, marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_what_was_given(mib: int, rows: int, log_domain: bool, monkeypatch) -> None:
    """Cost and kernel, kernel alone, neither: XLA's own account of what the compiled program needs beside its input."""
    monkeypatch.setattr(ot.row_blocks, "BLOCK_ENTRIES", 2**16)
    monkeypatch.setattr(ot.solvers.scaling, "BLOCK_ENTRIES", 2**16)
    jax.clear_caches()
    x, y = activations(2, 3, rows, 1024, 2048)
    site = FeatureSite.of(x, y, centred=True, dtype="float16")
    solver = dataclasses.replace(SOLVER, memory_mib=mib)
    pairs = jnp.asarray(np.argwhere(np.ones((2, 3))).astype(np.int32))
    program = plans.solve_chunk.lower(site, pairs, solver, False, "potentials", None, None).compile()
    account = program.memory_analysis()
    assert account.temp_size_in_bytes <= mib * 2**20
    found = solve_pairs(site, solver, memory_mib=mib)
    assert found.converged.all() and found.fallback.all() == log_domain
    with pytest.raises(InputError, match="memory_mib 1 is too little for 1024 x 2048 units"):
        solve_pairs(site, solver, memory_mib=1)
    full = solve_pairs(site, SOLVER, memory_mib=512)
    np.testing.assert_allclose(found.layer_cost, full.layer_cost, rtol=1e-5)
    jax.clear_caches()


@pytest.mark.slow
def test_problems_solved_together_equal_problems_solved_in_turn() -> None:
    x, y = activations(3, 4, 60, 48, 64)
    y[2] *= np.linspace(1, 5, 60)[:, None]  # one layer that takes longer
    cost = np.stack([1 - np.corrcoef(a.T[2:], b.T)[:46, 46:] for a in x for b in y]).astype(np.float32)
    cost[5] *= 3
    problem = ot.Problem.with_uniform_marginals(jnp.asarray(cost))
    for options in ({}, {"kernel_dtype": "bfloat16"}, {"epsilon": 0.02}):
        solver = dataclasses.replace(SOLVER, **options)
        turn, together = (ot.solve(problem, dataclasses.replace(solver, together=size)) for size in (1, 5))
        assert turn.converged.all() and together.converged.all()
        np.testing.assert_allclose(together.matrix(), turn.matrix(), atol=1e-5 * float(turn.matrix().max()))
        if not options:
            assert len(set(np.asarray(together.iterations).tolist())) > 1
            # The last iterations are at the edge of what float32 can tell.
            np.testing.assert_allclose(together.iterations, turn.iterations, atol=5)


def test_a_site_of_a_large_model_takes_a_twentieth_of_its_plans(tmp_path) -> None:
    """16 x 32 layers, 2048 x 4096 units, 2000 rows: computed; and a site that has a quarter of layers and units."""
    layers, sources, n, k, rows = 16, 32, 2048, 4096, 2000
    big = jax.eval_shape(
        lambda: FeatureSite(*(jnp.zeros(s, "float16") for s in ((layers, rows, n), (sources, rows, k))))
    )
    potentials = 4 * layers * sources * (n + k + 8)
    dense = 4 * layers * sources * n * k
    assert (plans.features_bytes(big) + potentials) * 20 <= dense
    x, y = activations(4, 8, 125, 512, 1024)  # so many rows that features to plans are as in the large site
    found = solve_site(x, y, make_solver("scaling", epsilon=0.1, threshold=1e-4))
    assert found.stored == "potentials, features"
    store.save(Alignment(True, 125, {"q": found}, {}, {}, {}, {}), tmp_path)
    size = (tmp_path / store.ARRAYS).stat().st_size
    assert size * 20 <= 4 * 32 * 512 * 1024
    jax.tree.map(np.testing.assert_array_equal, store.load(tmp_path).plans["q"], found)


def test_plans_from_sums_equal_plans_from_rows() -> None:
    x, y = activations(2, 3, 700, 12, 20)
    state = moments.start(2, 3, 12, 20)
    for first in range(0, 700, 100):
        state = moments.update(state, x[:, first : first + 100], y[:, first : first + 100], np.ones(100, bool))
    for centred in (True, False):
        whole = solve_site(x, y, SOLVER, centred=centred)
        summed = solve_pairs(CorrelationSite(moments.correlations(state, centred=centred)), SOLVER)
        assert summed.stored == "dense"
        np.testing.assert_allclose(summed.layer_cost, whole.layer_cost, rtol=1e-5)
        np.testing.assert_allclose(summed.plan(1, 2), whole.plan(1, 2), atol=1e-5 * np.asarray(whole.plan(1, 2)).max())
    with pytest.raises(InputError, match="which were not kept"):
        solve_pairs(CorrelationSite(moments.correlations(state)), make_solver("gw"))


@pytest.mark.slow
def test_a_run_without_kept_activations(flags, recipe_file, plain, tmp_path, capsys) -> None:
    recipe = tmp_path / "r.yaml"
    told = yaml.safe_load(Path(recipe_file).read_text()) | {"activations": {"keep": False, "block_rows": 128}}
    recipe.write_text(yaml.safe_dump(told))
    out = tmp_path / "run"
    capsys.readouterr()
    assert cli.run(["merge", str(recipe), *flags, "--out", str(out), "--controls", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert not (out / "activations").exists() and (out / "moments/source.safetensors").exists()
    assert {item["stored"] for item in manifest["alignment"].values()} == {"dense"}
    with_rows, summed = (safetensors.numpy.load_file(run / "merged/model.safetensors") for run in (plain, out))
    for name, value in with_rows.items():
        assert np.abs(value - summed[name]).max() <= 2e-5 * np.abs(value).max(), name
    # The controls are other alignments of the same target.
    arms = ("random_source", "shuffled_rows")
    held = [safetensors.numpy.load_file(out / f"moments/{arm}.safetensors") for arm in ("source", *arms)]
    np.testing.assert_allclose(held[2]["q/target/mean/high"], held[0]["q/target/mean/high"], rtol=1e-5)
    np.testing.assert_allclose(held[2]["q/source/mean/high"], held[0]["q/source/mean/high"], rtol=1e-4, atol=1e-5)
    assert np.abs(held[2]["q/cross/high"]).mean() < 0.5 * np.abs(held[0]["q/cross/high"]).mean()
    assert np.abs(held[1]["q/source/mean/high"] - held[0]["q/source/mean/high"]).max() > 0.1
    for flag in ("gw", "sinkhorn"):
        recipe.write_text(yaml.safe_dump(told | {"alignment": {"solver": flag, "gain": flag == "sinkhorn"}}))
        assert cli.run(["merge", str(recipe), *flags, "--out", str(tmp_path / "other")]) == 2
        assert "activations.keep: true" in capsys.readouterr().err


@pytest.mark.parametrize("centred", [True, False])
def test_correlations_take_the_place_of_activations_that_are_larger(centred, tmp_path):
    """The same plans, from layers that are read one at a time and never stand together."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(1, 1, (layers, 9000, units)).astype(np.float32) for layers, units in ((2, 6), (3, 10)))
    order = rng.permutation(9000)
    y[:, order, :6] += 2 * x[:1]
    np.save(tmp_path / "y.npy", y)
    how = {"centred": centred, "feature_dtype": "float32"}
    whole = solve_site(x, y[:, order], SOLVER, memory_mib=512, **how)
    small = solve_site(x, Layers(tmp_path / "y.npy", order), SOLVER, memory_mib=1, **how)
    assert whole.stored == small.stored == "dense"
    for layer, other in np.ndindex(2, 3):
        np.testing.assert_allclose(small.plan(layer, other), whole.plan(layer, other), atol=2e-6)
    np.testing.assert_allclose(small.layer_cost, whole.layer_cost, rtol=1e-5)
    assert np.ptp(whole.layer_cost) > 0.01


def test_no_more_than_a_layer_of_the_source_is_read_at_once(monkeypatch):
    read = []

    class Watched:
        shape = (3, 9000, 10)

        def __len__(self):
            return 3

        def __getitem__(self, layer):
            if layer >= 3:
                raise IndexError
            read.append(layer)
            return np.random.default_rng(layer).normal(0, 1, (9000, 10)).astype(np.float32)

    monkeypatch.setattr(FeatureSite, "of", lambda *told, **how: pytest.fail("all activations are held"))
    x = np.random.default_rng(9).normal(0, 1, (2, 9000, 6)).astype(np.float32)
    solve_site(x, Watched(), SOLVER, memory_mib=1)
    assert read == [0, 1, 2]
