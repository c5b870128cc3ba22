"""Coefficients per tensor, head and unit, trust cap, task vectors, learning and regression, against float64 NumPy."""

import dataclasses
import functools
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import SPEC

from tmjax import cli
from tmjax.align.alignment import assemble, needed_sites
from tmjax.align.plans import solve_site
from tmjax.align.statistics import statistics
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.families import FAMILIES
from tmjax.models.sites import SITES
from tmjax.models.spec import biases, projections
from tmjax.ot import make_solver
from tmjax.recipes.merge import AlignmentOptions, LearningOptions
from tmjax.transfer.coefficients.learned import FuseLearned, coefficient_shape, expanded, learn, start
from tmjax.transfer.operators.regression import RegressionOptions, least_squares, regress_projection
from tmjax.transfer.projections import FuseProjections, Transported, fuse_params, transport_projections
from tmjax.transfer.source_view import PairedActivations

SPEC_T = dataclasses.replace(SPEC, qkv_bias=True, o_bias=True)  # 3 layers, 6 heads in 2 groups, 40 MLP units
ROWS = FAMILIES["llama"].params(SPEC_T)
WEIGHTS, BIASES = projections(ROWS), biases(ROWS)
GRANULARITIES = ("tensor", "head", "unit")


@functools.cache
def _model(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {row.path: row.stacked_shape(SPEC_T) for row in ROWS if row.tied_to is None}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


@functools.cache
def _transported() -> dict[str, Transported]:
    other, rng = _model(2), np.random.default_rng(3)
    return {
        role: Transported(
            jnp.asarray(other[row.path]),
            jnp.asarray(other[BIASES[role].path]) if role in BIASES else None,
            np.ones((3, 1, 1), np.float32),
            np.ones((3, 1), np.float32),
            jnp.ones(3),
            rng.normal(size=(3, row.shape(SPEC_T)[1])).astype(np.float32),
        )
        for role, row in WEIGHTS.items()
    }


def _random_coefficients(granularity: str) -> dict:
    rng = np.random.default_rng(5)
    begin = start(SPEC_T, WEIGHTS, WEIGHTS, granularity)
    return {role: tuple(jnp.asarray(rng.normal(size=x.shape) * 0.3) for x in pair) for role, pair in begin.items()}


def _wide(value, role: str, layer: int) -> np.ndarray:
    """A layer's coefficient of every entry of the weight, entry by entry."""
    held, (rows, columns) = np.asarray(value, np.float64)[layer], WEIGHTS[role].shape(SPEC_T)
    return np.array([[held[i * held.shape[0] // rows, j * held.shape[1] // columns] for j in range(columns)]
                     for i in range(rows)])  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("trust", [None, 0.1])
def test_fusion_by_tensor_head_and_unit_is_the_formula(granularity, trust):
    target, moved, learned = _model(1), _transported(), _random_coefficients(granularity)
    fused = fuse_params(ROWS, target, moved, expanded(SPEC_T, WEIGHTS, learned), trust=trust)
    for role, layer in itertools.product(("q", "k", "o", "up", "down"), (0, 2)):
        old, new = (np.asarray(x[WEIGHTS[role].path][layer], np.float64) for x in (target, fused))
        alpha, beta = (_wide(x, role, layer) for x in learned[role])
        change = alpha * np.asarray(moved[role].weight[layer], np.float64) + beta * old
        cap = 1.0 if trust is None else min(1.0, trust * np.linalg.norm(old) / np.linalg.norm(change))
        np.testing.assert_allclose(new, old + cap * change, atol=1e-5)
        if trust is not None:
            assert np.linalg.norm(new - old) <= trust * np.linalg.norm(old) * (1 + 1e-5)
        if role in BIASES:
            old, new = (np.asarray(x[BIASES[role].path][layer], np.float64) for x in (target, fused))
            alpha, beta = (x.mean(axis=1) for x in (alpha, beta))
            wanted = old + cap * (alpha * np.asarray(moved[role].bias[layer], np.float64) + beta * old)
            np.testing.assert_allclose(new, wanted, atol=1e-5)


def test_coefficients_lie_where_the_neurons_do():
    shape = functools.partial(coefficient_shape, SPEC_T)
    assert [shape(WEIGHTS["q"], g) for g in GRANULARITIES] == [(3, 1, 1), (3, 6, 1), (3, 48, 1)]
    assert [shape(WEIGHTS["k"], g) for g in GRANULARITIES] == [(3, 1, 1), (3, 2, 1), (3, 16, 1)]
    assert [shape(WEIGHTS["o"], g) for g in GRANULARITIES] == [(3, 1, 1), (3, 1, 6), (3, 1, 48)]
    assert [shape(WEIGHTS["down"], g) for g in GRANULARITIES] == [(3, 1, 1), (3, 1, 1), (3, 1, 40)]
    assert [shape(WEIGHTS["up"], g) for g in GRANULARITIES] == [(3, 1, 1), (3, 1, 1), (3, 40, 1)]


def _distance(wanted: dict, params: dict, _batch: object):
    return sum(jnp.mean(jnp.square(params[row.path] - wanted[row.path])) for row in WEIGHTS.values())


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_learning_finds_the_coefficients_that_made_the_model(granularity):
    held, truth = (_model(1), (_transported(),)), _random_coefficients(granularity)
    combine = FuseLearned(SPEC_T, ROWS, (FuseProjections(SPEC_T, ROWS, "none", None),))
    loss = functools.partial(_distance, combine(held, truth))
    begin = start(SPEC_T, WEIGHTS, WEIGHTS, granularity)
    options = LearningOptions(granularity=granularity, steps=400, lr=0.02, check_every=100)
    found = learn(combine, held, begin, itertools.repeat(0), loss, lambda x: float(loss(x, 0)), options)
    assert found.loss < 1e-4 < found.trials[0].loss and len(found.trials) == 5
    for role, pair in truth.items():
        for value, wanted in zip(found.coefficients[role], pair, strict=True):
            np.testing.assert_allclose(value, wanted, atol=0.02)


def test_learning_stops_early_and_is_never_worse_than_its_start():
    held = (_model(1), (_transported(),))
    combine = FuseLearned(SPEC_T, ROWS, (FuseProjections(SPEC_T, ROWS, "none", None),))
    begin = start(SPEC_T, WEIGHTS, WEIGHTS, "tensor")
    loss = functools.partial(_distance, _model(7))
    options = LearningOptions(steps=100, check_every=2, patience=3)
    scores = itertools.count(1.0)  # every score on the validation texts is worse than the one before
    found = learn(combine, held, begin, itertools.repeat(0), loss, lambda _: next(scores), options)
    assert len(found.trials) == 4 and found.loss == 1.0
    assert all(not np.any(x) for pair in found.coefficients.values() for x in pair)
    scores = iter([5.0, 4.0, 3.0, 9.0, 9.0, 9.0, 0.0])  # the best in between is what comes back
    found = learn(combine, held, begin, itertools.repeat(0), loss, lambda _: next(scores), options)
    assert found.loss == 3.0 and len(found.trials) == 6
    assert float(found.coefficients["q"][0].mean()) == pytest.approx(found.trials[2].coefficients["q"][0])
    with pytest.raises(InputError, match="ended after 3 of 100"):
        learn(combine, held, begin, [0] * 3, loss, lambda _: 1.0, options)
    with pytest.raises(NonFiniteError, match=r"lower learning\.lr"):
        learn(
            combine,
            held,
            begin,
            itertools.repeat(0),
            lambda p, _: p["embed.weight"][0, 0] / 0 * 0,
            lambda _: 1.0,
            options,
        )


def test_least_squares_is_the_stacked_problem():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(30, 8)), rng.normal(size=(30, 5)), rng.normal(size=(5, 8))
    root = np.sqrt(0.3 * np.trace(x.T @ x) / 8)
    stacked = np.concatenate([x, root * np.eye(8)]), np.concatenate([y, root * w.T])
    truth = np.linalg.lstsq(*stacked, rcond=None)[0].T
    found = least_squares(*(jnp.asarray(z, jnp.float32) for z in (x, y, w)), jnp.float32(0.3))
    np.testing.assert_allclose(found, truth, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class _Held:
    """Activations in memory, by site."""

    values: dict[str, np.ndarray]
    order: np.ndarray | None = None

    def site(self, name: str) -> np.ndarray:
        return self.values[name]

    def layers_of(self, name: str) -> np.ndarray:
        return self.values[name] if self.order is None else self.values[name][:, self.order]


def _aligned_pair():
    """Two models' activations of o's sites, and their alignment with the plans that `epsilon` makes."""
    rng, source = np.random.default_rng(4), dataclasses.replace(SPEC_T, layers=2, hidden=32)
    latent = rng.normal(size=(80, 6))

    def rows(layers: int, units: int) -> np.ndarray:
        x = latent @ rng.normal(size=(layers, 6, units)) + rng.normal(size=(layers, 80, units)) + 2
        return x.astype(np.float32)

    sites = needed_sites([WEIGHTS["o"]])
    held = tuple(
        _Held({site: rows(spec.layers, spec.axis_size(SITES[site])) for site in sites}) for spec in (SPEC_T, source)
    )
    options = AlignmentOptions(epsilon=0.1, feature_dtype="float32")
    alignment = assemble(
        {"o": WEIGHTS["o"]},
        options,
        80,
        measure=lambda site: tuple(statistics(x.site(site)) for x in held),
        guess=lambda site: None,
        solve=lambda site, wanted: solve_site(*(x.site(site) for x in held), make_solver("scaling", epsilon=0.1)),
    )
    return alignment, held


def test_regression_and_task_vectors_are_the_formulas():
    alignment, (target, source) = _aligned_pair()
    row, params, order = WEIGHTS["o"], _model(1), np.roll(np.arange(80), 1)
    pair = PairedActivations(target, dataclasses.replace(source, order=order))
    weight, bias = regress_projection(alignment, row, params[row.path], pair, ridge=0.2)
    shares = np.asarray(alignment.layer_plans["o"].weights, np.float64)
    for layer in range(3):
        x = target.site("attn_mix")[layer].astype(np.float64)
        wanted = 0.0
        for m in range(2):
            y = source.site("attn_out")[m].astype(np.float64)[order]
            q = np.asarray(alignment.plans["attn_out"].plan(layer, m), np.float64)
            s = target.site("attn_out")[layer].astype(np.float64).std(axis=0)
            wanted = wanted + shares[layer, m] * ((y - y.mean(0)) / y.std(0)) @ (q.T * len(q) * s)
        centred, old = x - x.mean(0), params[row.path][layer].astype(np.float64)
        gram = centred.T @ centred
        damped = gram + 0.2 * np.trace(gram) / len(gram) * np.eye(len(gram))
        truth = old + np.linalg.solve(damped, centred.T @ (wanted - centred @ old.T)).T
        np.testing.assert_allclose(weight[layer], truth, atol=1e-4 * np.abs(truth).max())
        mean_out = target.site("attn_out")[layer].astype(np.float64).mean(0)
        np.testing.assert_allclose(bias[layer], mean_out - truth @ x.mean(0), atol=1e-3)
    options = RegressionOptions(roles=("o",), norm_match=False)
    given = (alignment, ROWS, params, ROWS, options, lambda _: (weight, bias))
    moved, task = transport_projections(*given)["o"], transport_projections(*given, _model(6))["o"]
    np.testing.assert_allclose(task.weight, np.asarray(moved.weight) - _model(6)[row.path], atol=1e-6)
    np.testing.assert_allclose(task.bias, np.asarray(moved.bias) - _model(6)[BIASES["o"].path], atol=1e-6)


@pytest.mark.slow
def test_a_run_with_everything_on(tmp_path, flags, qwen2_dir, capsys):
    """Structure, embeddings, norms, learned coefficients, trust cap and a base, through the command line."""
    recipe = {
        "mesh": "data=1",
        "alignment": {"structure": "full", "solver": "cover", "depth": "monotone"},
        "operators": [{"transport": {"trust": 0.2, "base": str(qwen2_dir)}}, {"residual_stream": {}}],
        "coefficients": {
            "fit": "learned",
            "learning": {"steps": 4, "check_every": 2, "granularity": "head", "batch_tokens": 1024},
        },
        "evaluation": {"draws": 100},
        "allow_negligible": True,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert cli.run(["merge", str(file), *flags, "--out", str(tmp_path / "run"), "--json"]) == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    facts = manifest["coefficients"]
    assert set(facts["by_role"]) == {"q", "k", "v", "o", "gate", "up", "down", "embed", "norm"}
    assert len(facts["trials"]) == 3 and facts["valid_bits_per_byte"] == min(x["loss"] for x in facts["trials"])
    assert facts["valid_bits_per_byte"] < facts["trials"][0]["loss"]
    assert manifest["inputs"]["base"]["path"] == str(qwen2_dir)
    assert {"attn_in", "q", "resid"} <= set(manifest["alignment"])
    assert max(row["effective_update"] for row in manifest["update"].values()) <= 0.2 * (1 + 1e-4)
    assert (tmp_path / "run/report.html").exists()
