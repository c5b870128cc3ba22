"""Transport, masks, fusion and diagnostics against float64 NumPy written from the formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QWEN2, SPEC

from tmjax import ot
from tmjax.align import storage as store
from tmjax.align.alignment import Alignment, assemble, needed_sites, plan_site, solver_of
from tmjax.align.features import FeatureSite
from tmjax.align.layer_plan import combine
from tmjax.align.pairs import band, coarse_costs, most_of_the_mass
from tmjax.align.plans import solve_site
from tmjax.align.site_plans import SitePlans
from tmjax.align.statistics import statistics
from tmjax.errors import InputError, NoTransferError
from tmjax.models.decoder import init_params
from tmjax.models.families import FAMILIES
from tmjax.models.sites import SITES
from tmjax.models.spec import biases, projections
from tmjax.ot import make_solver, row_blocks
from tmjax.recipes.base import ALL_ROLES
from tmjax.recipes.merge import AlignmentOptions, CoefficientOptions
from tmjax.transfer.coefficients.grid_search import candidates, fit, fixed
from tmjax.transfer.controls import derangement, unit_permutations
from tmjax.transfer.masks import top_neurons
from tmjax.transfer.operators.transport import TransportOptions, transport_model, transport_projection
from tmjax.transfer.projections import FuseProjections, fuse_params, projection_rows
from tmjax.transfer.update_table import joined_table, require_transfer

TARGET = QWEN2  # 3 layers, with q, k, v biases
SOURCE = dataclasses.replace(SPEC, layers=4, hidden=32, heads=4, head_dim=8, mlp=56, qkv_bias=True, o_bias=True)
TARGET_ROWS, SOURCE_ROWS = FAMILIES["qwen2"].params(TARGET), FAMILIES["llama"].params(SOURCE)
OPTIONS = AlignmentOptions(epsilon=0.1, threshold=1e-5, feature_dtype="float32")


def _sharp(spec, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {row.path: row.stacked_shape(spec) for row in FAMILIES["llama"].params(spec) if row.tied_to is None}
    return {path: generator.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """Blocks of 8 rows in this module, so that whatever works in blocks of rows does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "BLOCK_ENTRIES", 24)
        jax.clear_caches()  # what was traced with another size
        yield
    jax.clear_caches()


@functools.cache
def _activations(rows: int = 60) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of both models by site: latent directions that turn with depth, means and scales far from 0 and 1."""
    generator = np.random.default_rng(0)
    first, last = generator.normal(size=(2, rows, 6))

    def activations(layers: int, units: int) -> np.ndarray:
        turn = np.linspace(0, np.pi / 2, layers)[:, None, None]
        latent = np.cos(turn) * first + np.sin(turn) * last
        x = latent @ generator.normal(size=(layers, 6, units)) + generator.normal(size=(layers, rows, units))
        x = x * generator.uniform(0.5, 3, (layers, 1, units)) + generator.normal(size=(layers, 1, units))
        return x.astype(np.float32)

    sites = needed_sites(projections(TARGET_ROWS).values())
    return {
        site: tuple(activations(spec.layers, spec.axis_size(SITES[site])) for spec in (TARGET, SOURCE))
        for site in sites
    }


def _align(options: AlignmentOptions, rows: int = 60, roles: tuple[str, ...] = ALL_ROLES) -> Alignment:
    held = _activations(rows)

    def solve(site: str, wanted: np.ndarray | None) -> SitePlans:
        names = ("gain", "feature_dtype")
        some = {name: getattr(options, name) for name in names} | {"top_k": options.plan_top_k}
        return solve_site(*held[site], solver_of(options), pair_mask_lm=wanted, **some)

    return assemble(
        {role: projections(TARGET_ROWS)[role] for role in roles},
        options,
        rows,
        measure=lambda site: tuple(statistics(x) for x in held[site]),
        guess=lambda site: coarse_costs(FeatureSite.of(*held[site], centred=True), options),
        solve=solve,
    )


@pytest.fixture(scope="module")
def pair() -> tuple[Alignment, dict, dict]:
    return _align(OPTIONS), _sharp(TARGET, 1), _sharp(SOURCE, 2)


def _q(alignment: Alignment, site: str, layer: int, m: int) -> np.ndarray:
    return np.asarray(alignment.plans[plan_site(site)].plan(layer, m), np.float64)


def _maps(alignment, site: str, layer: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """M [n, k] and N [k, n] of a pair of layers (DESIGN section 4)."""
    plan, weight_target, weight_source = alignment.plans[plan_site(site)].pair(layer, m)
    q = np.asarray(plan.matrix(), np.float64)
    back = np.asarray(plan.to_source, np.float64) if isinstance(plan, ot.LinearMap) else q.T
    s, s_source = (np.asarray(side[site].std, np.float64) for side in (alignment.target, alignment.source))
    rows = q.shape[0] if weight_target is None else np.asarray(weight_target, np.float64)
    columns = q.shape[1] if weight_source is None else np.asarray(weight_source, np.float64)
    to_target = (s[layer] * rows)[:, None] * q / s_source[m]
    return to_target, (s_source[m] * columns)[:, None] * back / s[layer]


def _reference(alignment, row, w, b, *, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """METHOD section 1.5 and DESIGN section 4, one layer pair at a time."""
    plan, (site_in, site_out) = alignment.layer_plans[row.role], (row.input_site, row.output_site)
    t_in, t_out, s_in, s_out = (
        getattr(alignment, side)[site] for side in ("target", "source") for site in (site_in, site_out)
    )
    weights = np.asarray(plan.effective if kind == "paper" else plan.weights, np.float64)
    all_w, all_b = [], []
    for layer in range(weights.shape[0]):
        total_w, total_b = 0.0, 0.0
        for m in np.nonzero(weights[layer])[0]:
            if kind == "paper":
                q_in, q_out = _q(alignment, site_in, layer, m), _q(alignment, site_out, layer, m)
                w_hat, b_hat = q_out @ w[m] @ q_in.T, q_out @ b[m]
            else:
                m_out, n_in = _maps(alignment, site_out, layer, m)[0], _maps(alignment, site_in, layer, m)[1]
                w_hat = m_out @ w[m] @ n_in
                inner = b[m] - s_out.mean[m] + w[m] @ (s_in.mean[m] - n_in @ t_in.mean[layer])
                b_hat = t_out.mean[layer] + m_out @ inner
            total_w, total_b = total_w + weights[layer, m] * w_hat, total_b + weights[layer, m] * b_hat
        all_w.append(total_w)
        all_b.append(total_b)
    return np.stack(all_w), np.stack(all_b)


def _assert_formula(alignment: Alignment, source: dict, role: str, kind: str) -> None:
    row, rows = projections(TARGET_ROWS)[role], projections(SOURCE_ROWS)
    w = source[rows[role].path]
    b = source[biases(SOURCE_ROWS)[role].path] if role in biases(SOURCE_ROWS) else np.zeros(w.shape[:2], np.float32)
    weight, bias = transport_projection(alignment, row, w, b, kind=kind)
    truth_w, truth_b = _reference(alignment, row, w.astype(float), b.astype(float), kind=kind)
    np.testing.assert_allclose(weight, truth_w, atol=1e-5 * np.abs(truth_w).max())
    np.testing.assert_allclose(bias, truth_b, atol=1e-5 * np.abs(truth_b).max())


@pytest.mark.parametrize("kind", ["paper", "barycentric"])
@pytest.mark.parametrize(
    "role", ["q", pytest.param("o", marks=pytest.mark.slow), pytest.param("gate", marks=pytest.mark.slow), "down"]
)
def test_transport_is_the_formula(pair, kind: str, role: str) -> None:
    _assert_formula(pair[0], pair[2], role, kind)


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"gain": True}, "dense"),
        pytest.param({"solver": "greedy"}, "matches", marks=pytest.mark.slow),
        pytest.param({"solver": "ridge"}, "maps", marks=pytest.mark.slow),
        pytest.param({"solver": "unbalanced", "gain": True}, "dense", marks=pytest.mark.slow),
        pytest.param(
            {"solver": "lowrank", "epsilon": 0.03, "solver_options": {"rank": 3}}, "factors", marks=pytest.mark.slow
        ),
        ({"plan_top_k": 3}, "sparse"),
        pytest.param({"layer_top_k": 2}, "dense", marks=pytest.mark.slow),
        pytest.param({"layer_pairs": "coarse", "layer_mass": 0.6}, "dense", marks=pytest.mark.slow),
        pytest.param({"layer_pairs": "band", "layer_band": 0.3}, "dense", marks=pytest.mark.slow),
        pytest.param({"rows": 8}, "potentials, features", marks=pytest.mark.slow),
        ({"rows": 8, "solver": "signed", "feature_dtype": "float32"}, "potentials, features"),
        pytest.param({"rows": 8, "layer_top_k": 2, "gain": True}, "potentials, features", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_transport_is_the_formula_for_every_form_of_plan(options: dict, stored: str) -> None:
    told = {"epsilon": 0.1, "threshold": 1e-5} | options
    alignment = _align(
        AlignmentOptions(**{k: v for k, v in told.items() if k != "rows"}), told.get("rows", 60), ("q", "k")
    )
    assert stored in {plans.stored for plans in alignment.plans.values()}
    _assert_formula(alignment, _sharp(SOURCE, 2), "k", "barycentric")


def test_pairs_that_are_not_kept_are_not_solved_or_not_stored(pair, tmp_path) -> None:
    everything = pair[0]
    few = _align(OPTIONS.model_copy(update={"layer_top_k": 2}))
    assert all(int(plans.converged.size) <= 12 and plans.solved.all() for plans in few.plans.values())
    assert (few.layer_plans["q"].weights > 0).sum(1).tolist() == [2, 2, 2]
    coarse = _align(OPTIONS.model_copy(update={"layer_pairs": "coarse", "layer_mass": 0.6, "coarse_units": 16}))
    for site, plans in coarse.plans.items():
        solved = np.asarray(plans.solved)
        assert 0 < solved.sum() < solved.size and np.isfinite(plans.layer_cost).all()
        np.testing.assert_allclose(plans.layer_cost[solved], everything.plans[site].layer_cost[solved], rtol=1e-5)
    facts = coarse.layer_facts()
    for role, plan in coarse.layer_plans.items():
        np.testing.assert_allclose(plan.weights.sum(1), 1, rtol=1e-6)
        # The reported share against what a full alignment says of the same pairs.
        full = everything.layer_plans[role].weights
        assert facts[role]["dropped_max"] == pytest.approx(1 - (full * (plan.weights > 0)).sum(1).min(), abs=0.05)
    store.save(few, tmp_path)
    again = store.load(tmp_path)
    np.testing.assert_array_equal(again.plans["q"].index, few.plans["q"].index)
    first = int(np.nonzero(few.layer_plans["q"].weights[1])[0][0])
    np.testing.assert_allclose(again.plans["q"].plan(1, first), everything.plans["q"].plan(1, first), rtol=1e-5)


def test_a_band_holds_the_nearest_layer_of_every_depth() -> None:
    assert band(3, 4, 0.0).tolist() == [[True] + [False] * 3, [False, True, True, False], [False] * 3 + [True]]
    assert band(3, 4, 1.0).all()
    weights = np.asarray([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert most_of_the_mass(weights, 0.75).tolist() == [[True, True, False], [False, False, True]]


def test_layer_weights_are_a_convex_combination(pair) -> None:
    for plan in pair[0].layer_plans.values():
        np.testing.assert_allclose(plan.weights.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(plan.effective, np.sqrt(plan.pre * plan.post))
        assert plan.effective.sum() < 1  # not a coupling


def test_gain_is_the_least_squares_factor() -> None:
    generator = np.random.default_rng(3)
    latent = generator.normal(size=(80, 4))
    x, y = (latent @ generator.normal(size=(1, 4, n)) + generator.normal(size=(1, 80, n)) for n in (7, 9))
    solver = make_solver("sinkhorn", epsilon=0.05, threshold=1e-6)
    plans = solve_site(x.astype("f"), y.astype("f"), solver, gain=True)
    plan, weight, _ = plans.pair(0, 0)
    z, w = ((v[0] - v[0].mean(0)) / v[0].std(0) for v in (x, y))
    predicted = w @ np.asarray(plan.matrix(), float).T
    truth = np.maximum((z * predicted).mean(0) / (predicted**2).mean(0), 0)
    np.testing.assert_allclose(weight, truth, rtol=1e-3, atol=1e-4)


def test_fusion_with_masks_and_biases(pair) -> None:
    alignment, target, source = pair
    options = TransportOptions(map="paper", mask_top_k=5, norm_match=False, roles=("q", "k", "v", "o"))
    moved = transport_model(alignment, TARGET_ROWS, target, SOURCE_ROWS, source, options)
    fused = fuse_params(TARGET_ROWS, target, moved, dict.fromkeys(options.roles, (0.2, -0.2)))
    rows = projections(TARGET_ROWS)
    for role in options.roles:
        old, new = target[rows[role].path], np.asarray(fused[rows[role].path])
        mean_abs = alignment.target[rows[role].input_site if role == "o" else rows[role].output_site].mean_abs
        for layer in range(TARGET.layers):
            chosen = np.argsort(-mean_abs[layer])[:5]
            blend = 0.8 * old[layer] + 0.2 * np.asarray(moved[role].weight[layer])
            expected = old[layer].copy()
            index = (slice(None), chosen) if role == "o" else chosen  # o: columns, on its input side
            expected[index] = blend[index]
            np.testing.assert_allclose(new[layer], expected, atol=1e-6)
    bias = biases(TARGET_ROWS)["q"].path
    changed = np.abs(np.asarray(fused[bias]) - target[bias]) > 0
    assert changed.sum(1).tolist() == [5, 5, 5]
    untouched = set(target) - {rows[r].path for r in options.roles} - {biases(TARGET_ROWS)[r].path for r in "qkv"}
    assert all(fused[path] is target[path] for path in untouched)


def test_norm_match_gives_the_targets_norm_and_keep_mean_keeps_the_mean_output(pair) -> None:
    alignment, target, source = pair
    options = TransportOptions(norm_match=True, bias="keep_mean")
    moved = transport_model(alignment, TARGET_ROWS, target, SOURCE_ROWS, source, options)
    rows = projections(TARGET_ROWS)
    for role in ALL_ROLES:
        norms = [np.linalg.norm(np.asarray(w), axis=(1, 2)) for w in (moved[role].weight, target[rows[role].path])]
        np.testing.assert_allclose(*norms, rtol=1e-5)
    fused = fuse_params(TARGET_ROWS, target, moved, dict.fromkeys(ALL_ROLES, (0.3, 0.1)), bias_rule="keep_mean")
    mean, weight, bias = alignment.target["attn_in"].mean, rows["q"].path, biases(TARGET_ROWS)["q"].path
    outputs = [np.einsum("loi,li->lo", p[weight], mean) + p[bias] for p in (target, fused)]
    np.testing.assert_allclose(*outputs, atol=1e-4 * np.abs(outputs[0]).max())


def test_control_without_source_only_scales_the_target(pair) -> None:
    alignment, target, source = pair
    rule = FuseProjections(TARGET, TARGET_ROWS, "transported", None)
    moved = transport_model(alignment, TARGET_ROWS, target, SOURCE_ROWS, source, TransportOptions())
    moved = rule.scaled(moved, 0.0)
    fused = fuse_params(TARGET_ROWS, target, moved, dict.fromkeys(ALL_ROLES, (0.5, -0.1)))
    for row in projections(TARGET_ROWS).values():
        np.testing.assert_allclose(fused[row.path], 0.9 * target[row.path], rtol=1e-5)


def test_permuted_plan_is_a_permuted_source(pair) -> None:
    """The control reads W_S with rows and columns permuted, per pair of layers."""
    alignment, _, source = pair
    row, w = projections(TARGET_ROWS)["up"], source["blocks.up.weight"]
    permutations = unit_permutations(alignment, 0)
    permuted = dataclasses.replace(alignment, source_order=permutations)
    assert all((np.sort(p, axis=2) == np.arange(p.shape[2])).all() for p in permutations.values())
    assert any((p[0, 0] != p[1, 0]).any() for p in permutations.values())
    ours, _ = transport_projection(permuted, row, w, None, kind="paper")
    weights = alignment.layer_plans["up"].effective
    for layer in range(TARGET.layers):
        truth = sum(
            weights[layer, m]
            * _q(alignment, "up", layer, m)
            @ w[m].astype(float)[permutations["mlp_hidden"][layer, m]][:, permutations["mlp_in"][layer, m]]
            @ _q(alignment, "mlp_in", layer, m).T
            for m in range(SOURCE.layers)
        )
        np.testing.assert_allclose(ours[layer], truth, atol=1e-5 * np.abs(truth).max())


def test_derangement_moves_every_row() -> None:
    for seed in range(5):
        order = derangement(50, seed)
        assert sorted(order) == list(range(50)) and (order != np.arange(50)).all()
    with pytest.raises(InputError, match="at least two rows"):
        derangement(1, 0)


def test_top_k_options() -> None:
    mask = top_neurons(np.asarray([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), 2)
    np.testing.assert_array_equal(mask, [[1, 0, 1], [0, 1, 1]])
    kept = combine(np.asarray([[0.4, 0.1]]), np.asarray([[0.4, 0.1]]), top_k=1)
    np.testing.assert_allclose(kept.weights, [[1.0, 0.0]])
    np.testing.assert_allclose(kept.dropped, [0.2])


@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("entries", [2**21, 40])
def test_sparse_plans_hold_the_largest_of_rows_and_columns(top_k: int, entries: int, monkeypatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ENTRIES", entries)
    generator = np.random.default_rng(0)
    cost = jnp.asarray(generator.uniform(0, 2, (13, 9)), jnp.float32)
    signed = ot.SignedPlan(*(jnp.asarray(generator.normal(size=size), jnp.float32) for size in (13, 9)), 0.5, cost)
    q, x = np.asarray(signed.matrix(), np.float64), jnp.asarray(generator.normal(size=(9, 2)), jnp.float32)
    mass = np.abs(q)
    rows = mass >= np.sort(mass, axis=1)[:, -min(top_k, 9)][:, None]
    columns = mass >= np.sort(mass, axis=0)[-min(top_k, 13)]
    sparse = ot.SparsePlan.of(signed, top_k)
    truth = np.where(rows | columns, q, 0)
    np.testing.assert_allclose(sparse.matrix(), truth, rtol=1e-6)
    np.testing.assert_allclose(sparse.apply(x), truth @ x, atol=1e-5)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(sparse)) == ot.SparsePlan.bytes(13, 9, top_k)


def test_update_table_and_refusal(pair) -> None:
    alignment, target, source = pair
    options = TransportOptions(roles=("q", "o"))
    moved = transport_model(alignment, TARGET_ROWS, target, SOURCE_ROWS, source, options)
    chosen = {"q": (0.25, 0.0), "o": (0.0, -0.1)}
    fused = fuse_params(TARGET_ROWS, target, moved, chosen)
    table = joined_table([projection_rows(TARGET, TARGET_ROWS, target, fused, moved, chosen)])
    assert set(table) == {n for r in "qo" for n in projections(TARGET_ROWS)[r].names(TARGET)}
    name = projections(TARGET_ROWS)["q"].names(TARGET)[1]
    old, hat = target["blocks.q.weight"][1].astype(float), np.asarray(moved["q"].weight[1], float)
    expected = {
        "transported_to_target_norm": np.linalg.norm(hat) / np.linalg.norm(old),
        "effective_update": 0.25 * np.linalg.norm(hat) / np.linalg.norm(old),
        "cosine": (old * hat).sum() / np.linalg.norm(hat) / np.linalg.norm(old),
        "source_part": 0.25 * np.linalg.norm(hat) / np.linalg.norm(old),
        "alpha": 0.25,
    }
    assert {key: table[name][key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert require_transfer(table, allow_negligible=False) is None
    nothing = {name: row | {"source_part": 9e-4} for name, row in table.items()}
    with pytest.raises(NoTransferError, match="nothing measurable came from the source"):
        require_transfer(nothing, allow_negligible=False)
    assert "nothing measurable" in require_transfer(nothing, allow_negligible=True)


def test_coordinate_search_finds_the_minimum_of_a_separable_loss() -> None:
    options = CoefficientOptions(alphas=(0.1, 0.2, 0.3), betas=(-0.1, 0.0), beta="fit", groups="kind")
    seen = []

    def loss(setting) -> float:
        seen.append(setting)
        return abs(setting["q"][0] - 0.2) + abs(setting["up"][0] - 0.3) + abs(setting["up"][1] + 0.1)

    found = fit(options, loss, lambda done, total: None)
    assert found.coefficients["q"] == (0.2, 0.0) and found.coefficients["up"] == (0.3, -0.1)
    assert found.loss == 0 and len(found.trials) == len(seen) == 2 * len(candidates(options)) == 12
    assert fixed(0.4, options).coefficients["q"] == (0.4, -0.4)


def test_a_screen_compares_candidates_and_the_best_of_a_group_is_held_to_the_loss() -> None:
    """The screen finds a pair for both groups; the loss, asked once for each, wants that of the MLP only."""
    options = CoefficientOptions(alphas=(0.1, 0.2, 0.3), betas=(-0.1, 0.0), beta="fit", groups="kind")
    screened, asked = [], []

    def screen(setting) -> float:
        screened.append(setting)
        return abs(setting["q"][0] - 0.2) + abs(setting["up"][0] - 0.3)

    def loss(setting) -> float:
        asked.append(setting)
        return setting["q"][0] - setting["up"][0]

    found = fit(options, loss, lambda done, total: None, screen=screen)
    assert len(screened) == len(found.trials) == 12 and len(asked) == 3
    assert found.coefficients["q"] == (0.1, 0.0) and found.coefficients["up"] == (0.3, 0.0)
    assert found.loss == pytest.approx(-0.2)


def test_alignment_store_round_trip(pair, tmp_path) -> None:
    alignment = pair[0]
    store.save(alignment, tmp_path)
    again = store.load(tmp_path)
    for group in ("plans", "target", "source", "layer_plans"):
        for name, value in getattr(alignment, group).items():
            held = getattr(again, group)[name]
            for field in dataclasses.fields(value):
                a, b = getattr(value, field.name), getattr(held, field.name)
                assert jax.tree.structure(a) == jax.tree.structure(b)
                jax.tree.map(np.testing.assert_array_equal, a, b)
    assert again.certificates() == alignment.certificates()


def test_a_role_that_a_model_lacks_is_named(pair) -> None:
    alignment, target, source = pair
    rows = tuple(row for row in SOURCE_ROWS if row.role != "gate")
    with pytest.raises(InputError, match="gate is not a projection of both"):
        transport_model(alignment, TARGET_ROWS, target, rows, source, TransportOptions(roles=("gate", "up")))
    # Unless it is asked for, what only one of them has stays as it is.
    moved = transport_model(alignment, TARGET_ROWS, target, rows, source, TransportOptions())
    assert set(moved) == set(ALL_ROLES) - {"gate"}


def test_random_source_has_the_table_of_its_architecture() -> None:

    params = init_params(SOURCE, jax.random.key(0))
    assert {path: value.shape for path, value in params.items()} == {
        row.path: row.stacked_shape(SOURCE) for row in SOURCE_ROWS if row.tied_to is None
    }
