"""Solving toward the source's predictions: sums against autodiff, solves against NumPy, arms, devices, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

from tmjax import cli
from tmjax.adapt.recipe import build_adapt_recipe
from tmjax.convert.model import load_model
from tmjax.errors import NonFiniteError
from tmjax.evaluate.controls import CONTROLS
from tmjax.fuse.solve import FACTORS, WEIGHTS, Solver, Wanted
from tmjax.hub.texts import read_texts
from tmjax.hub.tokenizer import load_tokenizer
from tmjax.models.decoder import bind
from tmjax.pipeline.adapt_inputs import AdaptInputs
from tmjax.pipeline.adapt_start import Starts
from tmjax.pipeline.merge import Merge
from tmjax.pipeline.predictions import Predictions
from tmjax.recipe import SolveOptions, build_recipe, read_recipe

TEXTS = ["Yesu akawaambia wanafunzi wake habari njema", "Basi, watu walimfuata mpaka bahari", "Amani iwe nanyi nyote"]
OPTIONS = SolveOptions(rounds=2)


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


@pytest.fixture(scope="module")
def batch(target, qwen2_dir) -> Wanted:
    """Three texts, of which the last is not wanted itself, and something said at most of their positions."""
    tokenizer = load_tokenizer(qwen2_dir)
    documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(TEXTS)]
    generator = np.random.default_rng(0)
    tokens = 1 + max(map(len, documents))
    ids, length = np.zeros((4, tokens), np.int32), np.zeros(4, np.int32)
    weight = np.zeros((4, tokens - 1, 3), np.float32)
    for row, document in enumerate(documents):
        ids[row, : len(document)], length[row] = document, len(document)
        weight[row, : len(document) - 1] = generator.dirichlet(np.ones(4), len(document) - 1)[:, :3]
    weight[:, 2] = 0
    token = np.stack([generator.permutation(target.spec.vocab)[:3] for _ in range(4 * (tokens - 1))])
    return Wanted(ids, length, np.float32([1, 1, 0, 0]), token.reshape(weight.shape).astype(np.int32), weight)


def losses(model, params, batch: Wanted) -> tuple[jax.Array, jax.Array]:
    """Mean loss of the true tokens and of what is said, a text at a time without padding."""
    totals, counts = [0.0, 0.0], [0.0, 0.0]
    for row in range(3):
        n = int(batch.length[row])
        decoder = bind(model.spec, params)
        hidden, _ = decoder.hidden(jnp.asarray(batch.ids[row : row + 1, : n - 1]), jnp.float32, (), lambda x: x)
        logs = jax.nn.log_softmax(decoder.logits(hidden[0]))
        if batch.true[row]:
            totals[0] -= jnp.sum(jnp.take_along_axis(logs, jnp.asarray(batch.ids[row, 1:n, None]), axis=1))
            counts[0] += n - 1
        weight = batch.weight[row, : n - 1]
        totals[1] -= jnp.sum(weight * jnp.take_along_axis(logs, jnp.asarray(batch.token[row, : n - 1]), axis=1))
        counts[1] += weight.sum()
    return totals[0] / counts[0], totals[1] / counts[1]


def solver(model, reach: str = "direct", **changes) -> Solver:
    return Solver(model.spec, model.rows, model.params, OPTIONS.model_copy(update={"reach": reach}), **changes)


def mixed(model, batch: Wanted, weight: float = 1.0):
    compiled = jax.jit(lambda params: (lambda a, b: a + weight * b)(*losses(model, params, batch)))
    return lambda params: float(compiled(dict(params)))


def test_sums_are_slopes_of_the_loss(loose, batch) -> None:
    """Of the read-out and of what the last block writes, behind which only the norm and the read-out come."""
    rows = tuple(row for row in loose.rows if row.path != "head.weight")
    sums = Solver(loose.spec, rows, loose.params, OPTIONS).sums(loose.params, [batch])
    paths = {"o": loose.projections["o"].path, "down": loose.projections["down"].path}
    for number in range(2):
        truth = jax.jit(jax.grad(lambda params, number=number: losses(loose, params, batch)[number]))(
            dict(loose.params)
        )
        close = {"rtol": 0, "atol": 3e-5 * float(jnp.abs(truth["head.weight"]).max())}
        np.testing.assert_allclose(sums.wanted[number], -truth["head.weight"], **close)
        last = truth[paths["down"]][-1]
        np.testing.assert_allclose(sums.inner[paths["down"]][number, -1], -last, atol=1e-4 * float(jnp.abs(last).max()))
        first = truth[paths["down"]][0]
        assert not np.allclose(sums.inner[paths["down"]][number, 0], -first, atol=0.1 * float(jnp.abs(first).max()))
    tokens = [int(batch.length[row]) - 1 for row in range(3)]
    np.testing.assert_allclose(sums.count, [sum(tokens[:2]), batch.weight.sum(), sum(tokens)], rtol=1e-5)


def test_sums_do_not_depend_on_batches(target, batch) -> None:
    apart = [Wanted(*(part[row : row + 1] for part in batch)) for row in range(4)]
    whole, split = (solver(target).sums(target.params, given) for given in ([batch], apart))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(one).max()))


def test_the_solve_is_a_ridge_regression(target, batch) -> None:
    held = solver(target)
    sums = held.sums(target.params, [batch])
    directions = held.directions(sums)

    def ridged(gram) -> np.ndarray:
        gram = np.asarray(gram, np.float64)
        return np.linalg.inv(gram + OPTIONS.ridge * np.trace(gram) / len(gram) * np.eye(len(gram)))

    for path, site in held.writers:
        for number in range(2):
            truth = np.asarray(sums.inner[path][number, 1], np.float64) @ ridged(sums.grams[site][1])
            np.testing.assert_allclose(directions[path][number, 1], truth, atol=2e-3 * np.abs(truth).max())
    seen = np.asarray(sums.curvature, np.float64) + OPTIONS.prior_tokens / float(sums.count[2])
    truth = np.asarray(sums.wanted[1], np.float64) @ ridged(sums.gram) / seen[:, None]
    np.testing.assert_allclose(directions[held.readout][1], truth, atol=2e-3 * np.abs(truth).max())


def test_a_step_is_in_units_of_the_norm_and_trust_caps_the_change(target, batch) -> None:
    held = solver(target)
    directions = held.directions(held.sums(target.params, [batch]))
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


@pytest.mark.parametrize("reach", ["readout", "direct"])
def test_rounds_lower_the_loss_they_are_chosen_by(target, batch, reach) -> None:
    held, loss = solver(target, reach), mixed(target, batch)
    found = held.solve(target.params, [batch], loss)
    assert found.losses[0] == pytest.approx(loss(target.params)) and found.losses[-1] < 0.98 * found.losses[0]
    assert loss(found.params) == pytest.approx(found.losses[-1], rel=1e-5)
    assert found.losses == sorted(found.losses, reverse=True) and found.from_source
    assert {p for p, value in found.params.items() if not np.array_equal(value, target.params[p])} == set(held.paths)
    alone = solver(target, reach, silent=True).solve(target.params, [batch], loss)
    assert alone.trials == found.trials == 2 * (len(WEIGHTS) + len(FACTORS)), "arms make as many trials"
    assert not alone.from_source


def test_nothing_is_taken_that_does_not_help(target, batch) -> None:
    found = solver(target).solve(target.params, [batch], lambda params: float(params is not target.params))
    assert found.chosen == [] and not found.from_source
    for path, value in target.params.items():
        assert np.array_equal(found.params[path], value)


def test_a_step_too_far_is_a_trial_like_any_other(target, batch) -> None:
    """A loss that is no number, returned or raised, is never taken; if all are, the solve says so."""
    own, calls = mixed(target, batch), []

    def loss(params) -> float:
        calls.append(params)
        if len(calls) % 3 == 2:
            return float("nan")
        if len(calls) > 1 and len(calls) % 3 == 0:
            raise NonFiniteError("too far")
        return own(params)

    found = solver(target).solve(target.params, [batch], loss)
    assert np.isfinite(found.losses).all() and found.losses[-1] < found.losses[0]
    assert own(found.params) == pytest.approx(found.losses[-1], rel=1e-5)
    with pytest.raises(NonFiniteError, match="not finite"):
        solver(target).solve(target.params, [batch], lambda params: float("nan"))


# The pipeline.


@pytest.fixture(scope="module")
def solved(solving, flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("solved") / "run"
    assert cli.run(["merge", solving, *flags, "--out", str(out), "--controls"]) == 0
    return out, json.loads((out / "manifest.json").read_text())


def test_every_arm_is_solved_for_and_says_so(solved, qwen2_dir) -> None:
    out, manifest = solved
    arms = {"merged": manifest} | manifest["controls"]
    assert set(arms) == {"merged", *CONTROLS}
    for arm, held in arms.items():
        solve = held["solve"]
        assert solve["trials"] == 2 * (len(WEIGHTS) + len(FACTORS)), arm
        assert (
            held["lexical"]["trials"] == 2
            and held["lexical"]["valid_bits_per_byte"][1] == solve["valid_bits_per_byte"][0]
        )
        assert (solve["positions"]["source"] > 0) == (arm != "control:shrink")
        assert all(item["weight"] == 0 for item in solve["rounds"]) or arm != "control:shrink"
    assert set(manifest["predictions"]) == set(manifest["written"]) == {"source", "random_source"}
    table = manifest["update"]
    readout = load_model(qwen2_dir).rows
    name = next(row.names(load_model(qwen2_dir).spec)[0] for row in readout if row.path == "embed.weight")
    old, new = (safetensors.numpy.load_file(path / "model.safetensors")[name] for path in (qwen2_dir, out / "merged"))
    size = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert table[name]["effective_update"] == pytest.approx(size, rel=1e-3) and table[name]["solved"] > 0
    assert "Read-out".lower() in (out / "merged/README.md").read_text()


def test_what_controls_hear(solved, solving, flags) -> None:
    out, _ = solved
    told = build_recipe(read_recipe(out / "recipe.yaml") | {"out": str(out)})
    said = Predictions(Merge(told, amend=True))
    plain = said.wanted(None)
    texts = {tuple(row[row > 0]) for batch in plain for row in batch.ids}
    for name, control in CONTROLS.items():
        batches = said.wanted(control)
        weight = np.concatenate([batch.weight.sum(axis=-1).ravel() for batch in batches])
        same = {tuple(row[row > 0]) for batch in batches for row in batch.ids} == texts
        if name == "control:shrink":
            assert weight.sum() == 0 and sum(batch.true.sum() for batch in batches) == sum(
                len(b.true[b.true > 0]) for b in plain
            )
            continue
        assert weight.max() <= 1 + 1e-5 and weight.sum() > 0
        assert same == (name != "control:random_source")
        if same:
            ids = [np.array_equal(a.token, b.token) for a, b in zip(plain, batches, strict=True)]
            assert not any(ids), name
        if name == "control:permuted_plan":
            assert all(np.array_equal(a.weight, b.weight) for a, b in zip(plain, batches, strict=True))


def test_a_second_start_makes_nothing_again(solved, solving, flags, capsys) -> None:
    out, first = solved
    capsys.readouterr()
    assert cli.run(["merge", solving, *flags, "--out", str(out), "--controls", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [name for name, stage in again["stages"].items() if not stage["reused"]] == []
    assert again["evaluation"] == first["evaluation"] and again["solve"] == first["solve"]


def test_eight_devices_solve_as_one_does(solved, solving, flags, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert cli.run(["merge", solving, *flags, "--out", str(out), "--mesh", "data=2,fsdp=2,tensor=2"]) == 0
    one, eight = (safetensors.numpy.load_file(run / "merged/model.safetensors") for run in (solved[0], out))
    for name, value in one.items():
        assert np.abs(value - eight[name]).max() <= 1e-4 * np.abs(value).max(), name
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["solve"]["rounds"] == solved[1]["solve"]["rounds"]


def test_a_source_that_writes_another_language_is_heard_on_the_given_texts(solving, flags, repo, tmp_path, capsys):
    """Of texts that are all foreign none is read: one warning, and the merge goes on, its controls too."""
    told = yaml.safe_load(Path(solving).read_text())
    told["fusion"]["solve"] |= {"written": 6, "tokens": 40}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    source = ["--source", str(repo / "experiments/wolof/target")]
    command = ["merge", str(tmp_path / "recipe.yaml"), *flags, *source, "--out", str(tmp_path / "run"), "--controls"]
    assert cli.run(command) == 0
    assert capsys.readouterr().err.count("solved for on the calibration texts alone") == 1
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["written"] == {"source": {"asked": 6, "foreign": 6, "kept": 0}}
    assert manifest["solve"]["positions"]["source"] > 0
    assert (tmp_path / "run/controls/control:random_source/model.safetensors").is_file()


def test_a_fixed_alpha_solves_nothing(solving, flags, tmp_path) -> None:
    out = tmp_path / "run"
    assert cli.run(["merge", solving, *flags, "--out", str(out), "--alpha", "0.1"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        "solve" not in manifest
        and "lexical" not in manifest
        and "written" not in manifest
        and "solved" not in next(iter(manifest["update"].values()))
    )


def test_adaptation_of_a_run_begins_at_its_merged_model(solved, texts, tmp_path) -> None:
    out, _ = solved
    told = {"target": str(out), "texts": texts["calibration"], "valid": texts["valid"], "out": str(tmp_path / "a")}
    inputs = AdaptInputs(build_adapt_recipe(told | {"mode": "sft", "init": "merged"}))
    start = Starts(inputs, lambda *told: None, lambda message: None).of("adapted", "sft", "merged")[1]
    for path, value in load_model(out / "merged").params.items():
        np.testing.assert_allclose(start[path], value, atol=1e-6)


def test_tokenizers_without_a_common_boundary_are_an_error(solving, flags, tmp_path, capsys, monkeypatch) -> None:
    """Neither does a tokenizer that changes its text: no position is shared, and the line says what to do."""
    monkeypatch.setattr(
        "tmjax.adapt.crossing.Crossing.shared_positions", lambda self, own, other: np.zeros((0, 2), np.int32)
    )
    assert cli.run(["merge", solving, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "no position of the texts" in error and "preset barycentric" in error


def test_a_seed_chooses_the_calibration_texts(texts) -> None:
    whole = read_texts(texts["calibration"])
    assert whole.part(5, 0) == whole.first(5) and whole.part(None, 3) is whole
    parts = [whole.part(5, seed) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2] and len({part.sha256 for part in parts}) == 2
    for part in parts:
        assert len(set(part.ids)) == 5 and [i for i in whole.ids if i in part.ids] == list(part.ids)
