"""Transport, masks, fusion and diagnostics against float64 NumPy written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QWEN2, SPEC

from tmjax.align import store
from tmjax.align.alignment import Alignment, needed_sites, plan_site
from tmjax.align.layers import combine, layer_plan
from tmjax.align.plans import solve_site
from tmjax.align.statistics import statistics
from tmjax.errors import InputError, NoTransferError
from tmjax.evaluate.controls import derangement, plan_permutations
from tmjax.fuse.apply import fuse_params, transport_model, without_source
from tmjax.fuse.coefficients import candidates, fit, fixed
from tmjax.fuse.diagnostics import require_transfer, update_table
from tmjax.fuse.masks import top_neurons
from tmjax.fuse.transport import keep_top, transport_projection
from tmjax.models.decoder import init_params
from tmjax.models.families import FAMILIES
from tmjax.models.sites import SITES
from tmjax.models.spec import biases, projections
from tmjax.ot import make_solver
from tmjax.recipe import ALL_ROLES, AlignmentOptions, FusionOptions

TARGET = QWEN2  # 3 layers, with q, k, v biases
SOURCE = dataclasses.replace(SPEC, layers=4, hidden=32, heads=4, head_dim=8, mlp=56, qkv_bias=True, o_bias=True)
TARGET_ROWS, SOURCE_ROWS = FAMILIES["qwen2"].params(TARGET), FAMILIES["llama"].params(SOURCE)
OPTIONS = AlignmentOptions(epsilon=0.1, threshold=1e-5)


def _sharp(spec, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {row.path: row.stacked_shape(spec) for row in FAMILIES["llama"].params(spec) if row.tied_to is None}
    return {path: generator.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.fixture(scope="module")
def pair() -> tuple[Alignment, dict, dict]:
    """An alignment made from activations that share latent directions, with means and scales far from 0 and 1."""
    generator = np.random.default_rng(0)
    rows, latent = 60, generator.normal(size=(60, 6))
    plans, target, source = {}, {}, {}

    def activations(layers: int, units: int) -> np.ndarray:
        x = latent @ generator.normal(size=(layers, 6, units)) + generator.normal(size=(layers, rows, units))
        return (x * generator.uniform(0.5, 3, (layers, 1, units)) + generator.normal(size=(layers, 1, units))).astype(
            "f"
        )

    for site in needed_sites(projections(TARGET_ROWS).values()):
        x = activations(TARGET.layers, TARGET.axis_size(SITES[site]))
        y = activations(SOURCE.layers, SOURCE.axis_size(SITES[site]))
        target[site], source[site] = statistics(x), statistics(y)
        if plan_site(site) == site:
            plans[site] = solve_site(x, y, make_solver("sinkhorn", epsilon=0.1, threshold=1e-5))
    couplings = {site: np.asarray(layer_plan(held.layer_cost, OPTIONS).matrix()) for site, held in plans.items()}
    layer_plans = {
        role: combine(couplings[plan_site(row.input_site)], couplings[plan_site(row.output_site)])
        for role, row in projections(TARGET_ROWS).items()
    }
    return Alignment(True, rows, plans, target, source, layer_plans, {}), _sharp(TARGET, 1), _sharp(SOURCE, 2)


def _q(alignment: Alignment, site: str, layer: int, m: int) -> np.ndarray:
    return np.asarray(alignment.plans[plan_site(site)].plan(layer, m), np.float64)


def _reference(alignment, row, w, b, *, kind: str, gain: bool) -> tuple[np.ndarray, np.ndarray]:
    """METHOD section 1.5 and DESIGN section 4, one layer pair at a time."""
    plan, (site_in, site_out) = alignment.layer_plans[row.role], (row.input_site, row.output_site)
    t_in, t_out, s_in, s_out = (
        getattr(alignment, side)[site] for side in ("target", "source") for site in (site_in, site_out)
    )
    weights = np.asarray(plan.effective if kind == "paper" else plan.weights, np.float64)
    all_w, all_b = [], []
    for layer in range(weights.shape[0]):
        total_w, total_b = 0.0, 0.0
        for m in range(weights.shape[1]):
            q_in, q_out = _q(alignment, site_in, layer, m), _q(alignment, site_out, layer, m)
            if kind == "paper":
                w_hat, b_hat = q_out @ w[m] @ q_in.T, q_out @ b[m]
            else:
                m_out = np.diag(t_out.std[layer]) @ (q_out * q_out.shape[0]) @ np.diag(1 / s_out.std[m].astype(float))
                n_in = np.diag(s_in.std[m]) @ (q_in.T * q_in.shape[1]) @ np.diag(1 / t_in.std[layer].astype(float))
                if gain:
                    m_out = np.diag(alignment.plans[plan_site(site_out)].gain_target[layer, m]) @ m_out
                    n_in = np.diag(alignment.plans[plan_site(site_in)].gain_source[layer, m]) @ n_in
                w_hat = m_out @ w[m] @ n_in
                inner = b[m] - s_out.mean[m] + w[m] @ (s_in.mean[m] - n_in @ t_in.mean[layer])
                b_hat = t_out.mean[layer] + m_out @ inner
            total_w, total_b = total_w + weights[layer, m] * w_hat, total_b + weights[layer, m] * b_hat
        all_w.append(total_w)
        all_b.append(total_b)
    return np.stack(all_w), np.stack(all_b)


@pytest.mark.parametrize(("kind", "gain"), [("paper", False), ("barycentric", False), ("barycentric", True)])
@pytest.mark.parametrize("role", ["q", "o", "gate", "down"])
def test_transport_is_the_formula(pair, kind: str, gain: bool, role: str) -> None:
    alignment, _, source = pair
    row, rows = projections(TARGET_ROWS)[role], projections(SOURCE_ROWS)
    w = source[rows[role].path]
    b = source[biases(SOURCE_ROWS)[role].path] if role in biases(SOURCE_ROWS) else np.zeros(w.shape[:2], np.float32)
    weight, bias = transport_projection(alignment, row, w, b, kind=kind, gain=gain)
    truth_w, truth_b = _reference(alignment, row, w.astype(float), b.astype(float), kind=kind, gain=gain)
    np.testing.assert_allclose(weight, truth_w, atol=1e-5 * np.abs(truth_w).max())
    np.testing.assert_allclose(bias, truth_b, atol=1e-5 * np.abs(truth_b).max())


def test_layer_weights_are_a_convex_combination(pair) -> None:
    for plan in pair[0].layer_plans.values():
        np.testing.assert_allclose(plan.weights.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(plan.effective, np.sqrt(plan.pre * plan.post))
        assert plan.effective.sum() < 1  # not a coupling


def test_gain_is_the_least_squares_factor(pair) -> None:
    generator = np.random.default_rng(3)
    latent = generator.normal(size=(80, 4))
    x, y = (latent @ generator.normal(size=(1, 4, n)) + generator.normal(size=(1, 80, n)) for n in (7, 9))
    plans = solve_site(x.astype("f"), y.astype("f"), make_solver("sinkhorn", epsilon=0.05, threshold=1e-6))
    z, w = ((v[0] - v[0].mean(0)) / v[0].std(0) for v in (x, y))
    predicted = w @ np.asarray(plans.plan(0, 0), float).T * 7
    truth = np.maximum((z * predicted).mean(0) / (predicted**2).mean(0), 0)
    np.testing.assert_allclose(plans.gain_target[0, 0], truth, rtol=1e-3, atol=1e-4)


def test_fusion_with_masks_and_biases(pair) -> None:
    alignment, target, source = pair
    options = FusionOptions(map="paper", mask_top_k=5, norm_match=False, gain=False, roles=("q", "k", "v", "o"))
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
    options = FusionOptions(norm_match=True, bias="keep_mean")
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
    moved = without_source(transport_model(alignment, TARGET_ROWS, target, SOURCE_ROWS, source, FusionOptions()))
    fused = fuse_params(TARGET_ROWS, target, moved, dict.fromkeys(ALL_ROLES, (0.5, -0.1)))
    for row in projections(TARGET_ROWS).values():
        np.testing.assert_allclose(fused[row.path], 0.9 * target[row.path], rtol=1e-5)


def test_permuted_plan_is_a_permuted_source(pair) -> None:
    """The control reads W_S with rows and columns permuted, per pair of layers."""
    alignment, _, source = pair
    row, w = projections(TARGET_ROWS)["up"], source["blocks.up.weight"]
    permutations = plan_permutations(alignment, 0)
    assert all((np.sort(p, axis=2) == np.arange(p.shape[2])).all() for p in permutations.values())
    assert any((p[0, 0] != p[1, 0]).any() for p in permutations.values())
    ours, _ = transport_projection(alignment, row, w, None, kind="paper", permutations=permutations)
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
    q = jnp.asarray([[0.5, 0.1, 0.2], [0.3, 0.4, 0.05]])
    np.testing.assert_allclose(keep_top(q, 1), [[0.5, 0, 0.2], [0, 0.4, 0]])
    np.testing.assert_array_equal(keep_top(q, 3), q)
    np.testing.assert_allclose(keep_top(-q, 1), [[-0.5, 0, -0.2], [0, -0.4, 0]])  # signed plans
    kept = combine(np.asarray([[0.4, 0.1]]), np.asarray([[0.4, 0.1]]), top_k=1)
    np.testing.assert_allclose(kept.weights, [[1.0, 0.0]])


def test_update_table_and_refusal(pair) -> None:
    alignment, target, source = pair
    options = FusionOptions(roles=("q", "o"))
    moved = transport_model(alignment, TARGET_ROWS, target, SOURCE_ROWS, source, options)
    chosen = {"q": (0.25, 0.0), "o": (0.0, -0.1)}
    fused = fuse_params(TARGET_ROWS, target, moved, chosen)
    table = update_table(TARGET, TARGET_ROWS, target, fused, moved, chosen)
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
    options = FusionOptions(alphas=(0.1, 0.2, 0.3), betas=(-0.1, 0.0), beta="fit", groups="kind")
    seen = []

    def loss(setting) -> float:
        seen.append(setting)
        return abs(setting["q"][0] - 0.2) + abs(setting["up"][0] - 0.3) + abs(setting["up"][1] + 0.1)

    found = fit(options, loss, lambda done, total: None)
    assert found.coefficients["q"] == (0.2, 0.0) and found.coefficients["up"] == (0.3, -0.1)
    assert found.loss == 0 and len(found.trials) == len(seen) == 2 * len(candidates(options)) == 12
    assert fixed(0.4, options).coefficients["q"] == (0.4, -0.4)


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
        transport_model(alignment, TARGET_ROWS, target, rows, source, FusionOptions())


def test_random_source_has_the_table_of_its_architecture() -> None:

    params = init_params(SOURCE, jax.random.key(0))
    assert {path: value.shape for path, value in params.items()} == {
        row.path: row.stacked_shape(SOURCE) for row in SOURCE_ROWS if row.tied_to is None
    }
