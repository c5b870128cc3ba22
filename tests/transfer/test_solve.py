"""Solving toward the source's predictions: sums against autodiff, solves against NumPy, arms, devices, what is kept."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

from tmjax import cli
from tmjax.activations import joined as joined_texts
from tmjax.activations.joined import join
from tmjax.checkpoints.load import load_model
from tmjax.commands.adapt.arms import Arm
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.start import Starts
from tmjax.commands.merge import teacher_data
from tmjax.commands.merge.run import Merge
from tmjax.commands.recipe_check import merge_stages
from tmjax.errors import NonFiniteError
from tmjax.models.decoder import bind
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.controls import CONTROLS
from tmjax.transfer.least_squares import prediction_sums
from tmjax.transfer.operators.predictions import prediction_targets
from tmjax.transfer.prediction_solver import FACTORS, WEIGHTS, PredictionOptions, PredictionTargets, Solver
from tmjax.transfer.recipe import build_recipe

TEXTS = ["Yesu akawaambia wanafunzi wake habari njema", "Basi, watu walimfuata mpaka bahari", "Amani iwe nanyi nyote"]
OPTIONS = PredictionOptions(rounds=2)


@pytest.fixture(scope="module")
def target(qwen2_dir):
    return load_model(qwen2_dir)


@pytest.fixture(scope="module")
def loose(target):
    """The target with a read-out of its own, so that autodiff tells it from the embeddings."""
    spec = replace(target.spec, tied_embeddings=False)
    return replace(
        target, spec=spec, params={**target.params, "head.weight": jnp.asarray(target.params["embed.weight"])}
    )


class Said(NamedTuple):
    """A text, whether its own tokens are wanted, and what is said at each of them but the last."""

    ids: list[int]
    own: bool
    token: np.ndarray
    weight: np.ndarray


@pytest.fixture(scope="module")
def said(target, qwen2_dir) -> list[Said]:
    """Three texts, of which the last is not wanted itself, and something said at most of their positions."""
    tokenizer = load_tokenizer(qwen2_dir)
    generator = np.random.default_rng(0)
    found = []
    for number, encoding in enumerate(tokenizer.encode(TEXTS)):
        ids = tokenizer.document(encoding.ids)
        places = range(len(ids) - 1)
        token = np.stack([generator.permutation(target.spec.vocab)[:3] for _ in places]).astype(np.int32)
        weight = generator.dirichlet(np.ones(4), len(places))[:, :3].astype(np.float32)
        weight[2] = 0
        found.append(Said(ids, number < 2, token, weight))
    return found


def joined(spec, said: list[Said]) -> PredictionTargets:
    """Texts of one kind as one batch."""
    (texts,) = join(spec, [text.ids for text in said], 4096, Layout())
    token, weight = (np.zeros((*texts.ids.shape, 3), kind) for kind in (np.int32, np.float32))
    for row, column in np.argwhere(texts.text >= 0):
        text, place = said[texts.text[row, column]], texts.place[row, column]
        token[row, column], weight[row, column] = text.token[place], text.weight[place]
    return PredictionTargets(texts, said[0].own, token, weight)


@pytest.fixture(scope="module")
def batches(target, said) -> list[PredictionTargets]:
    """The same, joined: two texts in one row, and the last in another batch."""
    return [joined(target.spec, said[:2]), joined(target.spec, said[2:])]


def losses(model, params, said: list[Said]) -> tuple[jax.Array, jax.Array]:
    """Mean loss of the true tokens and of what is said, a text at a time without padding."""
    totals, counts = [0.0, 0.0], [0.0, 0.0]
    for text in said:
        ids = jnp.asarray(text.ids)
        decoder = bind(model.spec, params)
        hidden = decoder.run(ids[None, :-1]).hidden
        logs = jax.nn.log_softmax(decoder.logits(hidden[0]))
        if text.own:
            totals[0] -= jnp.sum(jnp.take_along_axis(logs, ids[1:, None], axis=1))
            counts[0] += len(ids) - 1
        totals[1] -= jnp.sum(text.weight * jnp.take_along_axis(logs, text.token, axis=1))
        counts[1] += text.weight.sum()
    return totals[0] / counts[0], totals[1] / counts[1]


def solver(model, scope: str = "direct", **changes) -> Solver:
    options = OPTIONS.model_copy(update={"scope": scope, **changes})
    return Solver(model.spec, model.rows, model.params, options)


def mixed(model, said: list[Said], weight: float = 1.0):
    compiled = jax.jit(lambda params: (lambda a, b: a + weight * b)(*losses(model, params, said)))
    return lambda params: float(compiled(dict(params)))


def test_sums_are_slopes_of_the_loss(loose, said, batches) -> None:
    """Of the read-out and of what the last block writes, behind which only the norm and the read-out come."""
    rows = tuple(row for row in loose.rows if row.path != "head.weight")
    sums = Solver(loose.spec, rows, loose.params, OPTIONS).sums(loose.params, batches)
    paths = {"o": loose.projections["o"].path, "down": loose.projections["down"].path}
    for number in range(2):
        truth = jax.jit(jax.grad(lambda params, number=number: losses(loose, params, said)[number]))(dict(loose.params))
        close = {"rtol": 0, "atol": 3e-5 * float(jnp.abs(truth["head.weight"]).max())}
        np.testing.assert_allclose(sums.cross[number], -truth["head.weight"], **close)
        last = truth[paths["down"]][-1]
        np.testing.assert_allclose(sums.inner[paths["down"]][number, -1], -last, atol=1e-4 * float(jnp.abs(last).max()))
        first = truth[paths["down"]][0]
        assert not np.allclose(sums.inner[paths["down"]][number, 0], -first, atol=0.1 * float(jnp.abs(first).max()))
    tokens = [len(text.ids) - 1 for text in said]
    heard = sum(text.weight.sum() for text in said)
    np.testing.assert_allclose(sums.count, [sum(tokens[:2]), heard, sum(tokens)], rtol=1e-5)


def test_sums_do_not_depend_on_batches(target, said, batches, monkeypatch) -> None:
    """Nor on how many tokens' logits are made at a time."""
    whole = solver(target).sums(target.params, batches)
    monkeypatch.setattr(prediction_sums, "CPU_ENTRIES", 1)
    monkeypatch.setattr(prediction_sums, "LEAST_TOKENS", 7)
    split = solver(target).sums(target.params, [joined(target.spec, [text]) for text in said])
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(one).max()))


@pytest.mark.slow
def test_sums_of_a_large_batch_are_those_of_its_parts(target, monkeypatch) -> None:
    """XLA's CPU backend (jaxlib 0.10.2) gives a vmapped pullback of a norm wrong values from 2^18 elements on."""
    generator = np.random.default_rng(1)
    said = []
    for _ in range(20):
        ids = generator.integers(3, target.spec.vocab, 127).tolist()
        token = generator.integers(0, target.spec.vocab, (126, 3)).astype(np.int32)
        said.append(Said(ids, True, token, np.full((126, 3), 0.3, np.float32)))
    monkeypatch.setattr(joined_texts, "CPU_TOKENS", 10**6)
    monkeypatch.setattr(prediction_sums, "LEAST_TOKENS", 10**6)
    batch = joined(target.spec, said)
    assert batch.texts.ids.size * target.spec.hidden > 2**18
    whole = solver(target).sums(target.params, [batch])
    parts = solver(target).sums(target.params, [joined(target.spec, [text]) for text in said])
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))


def test_the_solve_is_a_ridge_regression(target, said, batches) -> None:
    held = solver(target)
    sums = held.sums(target.params, batches)
    # The right-hand sides are donated.
    directions = held.directions(jax.tree.map(jnp.copy, sums))

    def ridged(gram) -> np.ndarray:
        gram = np.asarray(gram, np.float64)
        return np.linalg.inv(gram + OPTIONS.ridge * np.trace(gram) / len(gram) * np.eye(len(gram)))

    for path, site in held.writers:
        for number in range(2):
            truth = np.asarray(sums.inner[path][number, 1], np.float64) @ ridged(sums.grams[site][1])
            np.testing.assert_allclose(directions[path][number, 1], truth, atol=2e-3 * np.abs(truth).max())
    seen = np.asarray(sums.curvature, np.float64) + OPTIONS.prior_tokens / float(sums.count[2])
    truth = np.asarray(sums.cross[1], np.float64) @ ridged(sums.gram) / seen[:, None]
    np.testing.assert_allclose(directions[held.readout][1], truth, atol=2e-3 * np.abs(truth).max())


def test_a_step_is_in_units_of_the_norm_and_trust_caps_the_change(target, said, batches) -> None:
    held = solver(target)
    directions = held.directions(held.sums(target.params, batches))
    path = target.projections["down"].path
    old = np.asarray(target.params[path])
    moved = held.moved(target.params, directions, 0.5, (0.0, 0.3))
    change = np.asarray(moved[path]) - old
    both = np.asarray(directions[path][0] + 0.5 * directions[path][1])
    for layer in range(len(old)):
        size = np.linalg.norm(old[layer])
        assert np.linalg.norm(change[layer]) == pytest.approx(0.3 * size, rel=1e-3)
        np.testing.assert_allclose(change[layer], 0.3 * size * both[layer] / np.linalg.norm(both[layer]), atol=1e-5)
    assert np.array_equal(moved[held.readout], target.params[held.readout])
    capped = solver(target, trust=0.1).moved(target.params, directions, 0.5, (0.05, 0.3))
    for name in held.paths:
        far = np.linalg.norm(np.asarray(capped[name]) - np.asarray(target.params[name]), axis=(-2, -1))
        limit = 0.05 if name == held.readout else 0.1
        np.testing.assert_allclose(far / np.linalg.norm(target.params[name], axis=(-2, -1)), limit, rtol=1e-3)


@pytest.mark.parametrize("scope", ["readout", "direct"])
def test_rounds_lower_the_loss_they_are_chosen_by(target, said, batches, scope) -> None:
    held, loss = solver(target, scope), mixed(target, said)
    found = held.solve(target.params, batches, loss)
    assert found.losses[0] == pytest.approx(loss(target.params)) and found.losses[-1] < 0.98 * found.losses[0]
    assert loss(found.params) == pytest.approx(found.losses[-1], rel=1e-5)
    assert found.losses == sorted(found.losses, reverse=True) and found.from_source
    assert {p for p, value in found.params.items() if not np.array_equal(value, target.params[p])} == set(held.paths)
    unheard = [batch._replace(weight=0 * batch.weight) for batch in batches]
    alone = solver(target, scope).solve(target.params, unheard, loss)
    assert alone.trials == found.trials == 2 * (len(WEIGHTS) + len(FACTORS)), "arms make as many trials"
    assert not alone.from_source


def test_a_screen_compares_trials_and_the_best_is_held_to_the_loss(target, said, batches) -> None:
    """Steps that help the screen alone are not taken; the loss is asked once before and once a round."""
    whole, calls = mixed(target, said), []
    part = mixed(target, said[:1])

    def loss(params) -> float:
        calls.append(params)
        return whole(params)

    found = solver(target).solve(target.params, batches, loss, screen=part)
    assert len(calls) == 1 + 2 and found.trials == 2 * (len(WEIGHTS) + len(FACTORS))
    assert found.losses[-1] == pytest.approx(whole(found.params), rel=1e-5) and found.losses[-1] < found.losses[0]
    worse = itertools.count()
    misled = solver(target).solve(target.params, batches, lambda params: float(next(worse)), screen=part)
    assert misled.chosen == [] and misled.losses == [0.0]
    assert all(np.array_equal(misled.params[path], value) for path, value in target.params.items())


def test_nothing_is_taken_that_does_not_help(target, said, batches) -> None:
    found = solver(target).solve(target.params, batches, lambda params: float(params is not target.params))
    assert found.chosen == [] and not found.from_source
    for path, value in target.params.items():
        assert np.array_equal(found.params[path], value)


def test_a_step_too_far_is_a_trial_like_any_other(target, said, batches) -> None:
    """A loss that is no number, returned or raised, is never taken; if all are, the solve says so."""
    own, calls = mixed(target, said), []

    def loss(params) -> float:
        calls.append(params)
        if len(calls) % 3 == 2:
            return float("nan")
        if len(calls) > 1 and len(calls) % 3 == 0:
            raise NonFiniteError("too far")
        return own(params)

    found = solver(target).solve(target.params, batches, loss)
    assert np.isfinite(found.losses).all() and found.losses[-1] < found.losses[0]
    assert own(found.params) == pytest.approx(found.losses[-1], rel=1e-5)
    with pytest.raises(NonFiniteError, match="not finite"):
        solver(target).solve(target.params, batches, lambda params: float("nan"))


# The pipeline.


@pytest.fixture(scope="module")
def solved(solving, small_flags, tmp_path_factory):
    """A run of the small models. Texts that random models generate are foreign to one another: all are kept."""
    out = tmp_path_factory.mktemp("solved") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_data, "FOREIGN", None)
        assert cli.run(["merge", solving, *small_flags, "--out", str(out)]) == 0
        yield out, json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def with_controls(solving, flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("controls") / "run"
    assert cli.run(["merge", solving, *flags, "--out", str(out), "--controls"]) == 0
    return out, json.loads((out / "manifest.json").read_text())


@pytest.mark.slow
def test_every_arm_is_solved_for_and_says_so(with_controls, qwen2_dir) -> None:
    out, manifest = with_controls
    arms = {"merged": manifest} | manifest["controls"]
    assert set(arms) == {"merged", *CONTROLS}
    for arm, held in arms.items():
        solve = held["operators"]["predictions"]
        assert solve["trials"] == 2 * (len(WEIGHTS) + len(FACTORS)), arm
        assert (
            held["operators"]["embeddings"]["trials"] == 2
            and held["operators"]["embeddings"]["valid_bits_per_byte"][1] == solve["valid_bits_per_byte"][0]
        )
        assert (solve["positions"]["source"] > 0) == (arm != "control:shrink")
        assert all(item["weight"] == 0 for item in solve["rounds"]) or arm != "control:shrink"
    assert set(manifest["teacher"]) == set(manifest["generated"]) == {"source", "random_source"}
    table = manifest["update"]
    readout = load_model(qwen2_dir).rows
    name = next(row.names(load_model(qwen2_dir).spec)[0] for row in readout if row.path == "embed.weight")
    old, new = (safetensors.numpy.load_file(path / "model.safetensors")[name] for path in (qwen2_dir, out / "merged"))
    size = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert table[name]["effective_update"] == pytest.approx(size, rel=1e-3) and table[name]["solved"] > 0
    assert "Read-out".lower() in (out / "merged/README.md").read_text()


def test_what_controls_hear(solved) -> None:
    out, _ = solved
    told = build_recipe(read_recipe(out / "recipe.yaml") | {"out": str(out)})
    merge = Merge(told, amend=True)

    def targets(control) -> list[PredictionTargets]:
        options = told.evaluation.batch_tokens
        return prediction_targets(merge.inputs.target.spec, merge.view(control).teacher(), options, merge.inputs.layout)

    plain = targets(None)
    texts = [batch.texts.ids.tolist() for batch in plain]
    for name, control in CONTROLS.items():
        batches = targets(control)
        weight = np.concatenate([batch.weight.sum(axis=-1).ravel() for batch in batches])
        same = [batch.texts.ids.tolist() for batch in batches] == texts
        if name == "control:shrink":
            assert weight.sum() == 0 and [batch.texts.ids.tolist() for batch in batches] == [
                batch.texts.ids.tolist() for batch in plain if batch.own
            ]
            continue
        assert weight.max() <= 1 + 1e-5 and weight.sum() > 0
        assert same == (name != "control:random_source")
        if same:
            ids = [np.array_equal(a.token, b.token) for a, b in zip(plain, batches, strict=True)]
            assert not any(ids), name
        if name == "control:permuted_plan":
            assert all(np.array_equal(a.weight, b.weight) for a, b in zip(plain, batches, strict=True))


def test_a_second_start_makes_nothing_again(solved, solving, small_flags, capsys) -> None:
    out, first = solved
    capsys.readouterr()
    assert cli.run(["merge", solving, *small_flags, "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [name for name, stage in again["stages"].items() if not stage["reused"]] == []
    assert again["evaluation"] == first["evaluation"] and again["operators"] == first["operators"]
    expected = merge_stages(build_recipe(read_recipe(out / "recipe.yaml")))
    assert {name for name in expected if not name.startswith("sources/")} <= again["stages"].keys()


@pytest.mark.slow
def test_eight_devices_solve_as_one_does(solved, solving, small_flags, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert cli.run(["merge", solving, *small_flags, "--out", str(out), "--mesh", "data=2,fsdp=2,tensor=2"]) == 0
    one, eight = (safetensors.numpy.load_file(run / "merged/model.safetensors") for run in (solved[0], out))
    for name, value in one.items():
        assert np.abs(value - eight[name]).max() <= 1e-4 * np.abs(value).max(), name
    manifest = json.loads((out / "manifest.json").read_text())
    rounds = [each["operators"]["predictions"]["rounds"] for each in (manifest, solved[1])]
    assert rounds[0] == rounds[1]


@pytest.mark.slow
def test_a_source_that_writes_another_language_is_heard_on_the_given_texts(solving, flags, repo, tmp_path, capsys):
    """Of texts that are all foreign none is read: one warning, and the merge goes on, its controls too."""
    told = yaml.safe_load(Path(solving).read_text())
    told["operators"][2]["predictions"] |= {"generated_texts": 6, "tokens": 40}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    source = ["--source", str(repo / "experiments/wolof/target")]
    command = ["merge", str(tmp_path / "recipe.yaml"), *flags, *source, "--out", str(tmp_path / "run"), "--controls"]
    assert cli.run(command) == 0
    assert capsys.readouterr().err.count("solved for on the calibration texts alone") == 1
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["generated"] == {"source": {"asked": 6, "foreign": 6, "kept": 0, "cut": 0}}
    assert manifest["operators"]["predictions"]["positions"]["source"] > 0
    assert (tmp_path / "run/controls/control:random_source/model.safetensors").is_file()


def test_a_fixed_alpha_solves_nothing(solving, small_flags, tmp_path) -> None:
    out = tmp_path / "run"
    assert cli.run(["merge", solving, *small_flags, "--out", str(out), "--alpha", "0.1"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        manifest["operators"] == {}
        and "generated" not in manifest
        and "solved" not in next(iter(manifest["update"].values()))
    )


def test_adaptation_of_a_run_begins_at_its_merged_model(solved, texts, tmp_path) -> None:
    out, _ = solved
    told = {"target": str(out), "texts": texts["calibration"], "valid": texts["valid"], "out": str(tmp_path / "a")}
    inputs = AdaptInputs(build_adapt_recipe(told | {"mode": "sft", "init": "merged"}))
    start = Starts(inputs, lambda *told: None, lambda message: None).of(Arm("sft", "merged"))[1]
    for path, value in load_model(out / "merged").params.items():
        np.testing.assert_allclose(start[path], value, atol=1e-6)


def test_tokenizers_without_a_common_boundary_are_an_error(solving, small_flags, tmp_path, capsys, monkeypatch) -> None:
    """Neither does a tokenizer that changes its text: no position is shared, and the line says what to do."""
    monkeypatch.setattr(
        "tmjax.teacher.vocabulary_map.Crossing.shared_positions", lambda self, own, other: np.zeros((0, 2), np.int32)
    )
    assert cli.run(["merge", solving, *small_flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "no position of the texts" in error and "preset barycentric" in error


def test_a_seed_chooses_the_calibration_texts(texts) -> None:
    whole = read_texts(texts["calibration"])
    assert whole.part(5, 0) == whole.first(5) and whole.part(None, 3) is whole
    parts = [whole.part(5, seed) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2] and len({part.sha256 for part in parts}) == 2
    for part in parts:
        assert len(set(part.ids)) == 5 and [i for i in whole.ids if i in part.ids] == list(part.ids)


def test_texts_are_spread_from_the_first_to_the_last(texts) -> None:
    whole = read_texts(texts["valid"])
    part = whole.spread(5)
    places = [whole.ids.index(name) for name in part.ids]
    assert len(part) == 5 and places[0] == 0 and places[-1] == len(whole) - 1
    assert max(np.diff(places)) - min(np.diff(places)) <= 1
    assert whole.spread(len(whole) + 3).ids == whole.ids and whole.spread(1).ids == whole.ids[:1]
