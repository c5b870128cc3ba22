"""`tmjax adapt` with several sources: arms, gains by source, texts split by weight, keys of one source, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tmjax import cli
from tmjax.commands.adapt.run import Adapt
from tmjax.commands.recipe_check import adapt_stages, check_recipe, merge_stages
from tmjax.errors import InputError
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.report.tables import source_sentences
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import read_manifest
from tmjax.teacher.probabilities import TeacherProbabilities
from tmjax.text.documents import read_texts
from tmjax.transfer.recipe import build_recipe

#: Rows of one length in every arm, few steps, texts of random models: what keeps these runs short.
SHORT = {
    "mesh": "data=1",
    "max_texts": 12,
    "max_tokens": 24,
    "training": {"steps": 3, "warmup": 1, "tokens_per_step": 192, "row_lengths": 1, "validate_every": 3, "lr": 1e-3},
    "evaluation": {"draws": 200},
    "generation": {"texts": 9, "tokens": 8, "foreign": None},
    "distillation": {"steps": 1, "candidates": 16, "keep": 8},
}
ARMS = {
    "adapted", "control:sft", "control:shuffled_rows", "control:random_source", "control:target_written",
    "control:without_source", "control:without_source-2", "source_written",
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory, small_flags, gpt_neox_dir) -> dict[str, str]:
    """A target and three sources, all random: two of the small models, and a GPT-NeoX with the Wolof tokenizer."""
    from tools.make_checkpoint import family_spec, make_checkpoint

    shape = {"vocab": 2048, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "hidden": 32, "mlp": 32}
    spec = family_spec("gpt_neox", **shape, max_positions=512, tied_embeddings=False)
    place = tmp_path_factory.mktemp("second") / "source"
    make_checkpoint(place, "gpt_neox", spec, tokenizer=gpt_neox_dir, scale=0.1, seed=5)
    return {"first": small_flags[1], "second": str(place), "target": small_flags[3]}


@pytest.fixture(scope="session")
def given(small_flags) -> list[str]:
    """Flags of the target and of the texts."""
    return small_flags[2:]


def adapted(folder: Path, given: list[str], values: dict, *words: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SHORT | values))
    assert cli.run(["adapt", str(folder / "recipe.yaml"), *given, "--out", str(folder / "run"), *words]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def both(tmp_path_factory, models, given) -> Path:
    """A run with two sources and its controls, of weights 2 and 1."""
    sources = [{"source": models["first"], "weight": 2}, models["second"]]
    return adapted(tmp_path_factory.mktemp("both"), given, {"sources": sources}, "--controls")


def test_every_source_has_an_arm_without_it(both, models) -> None:
    manifest = read_manifest(both)
    assert set(manifest["training"]) == ARMS
    assert set(manifest["evaluation"]) == ARMS | {"target", "source", "source-2"}
    assert {name: item["path"] for name, item in manifest["inputs"].items() if "source" in name} == {
        "source": models["first"],
        "source-2": models["second"],
    }
    assert manifest["source_gain"]["best_control"] not in ("control:without_source", "control:without_source-2")
    bits = {arm: item["bits_per_byte"] for arm, item in manifest["evaluation"].items()}
    for source, gain in manifest["gain_by_source"].items():
        assert gain["bits_per_byte"] == pytest.approx(bits[f"control:without_{source}"] - bits["adapted"])
        assert gain["ci95"][0] <= gain["bits_per_byte"] <= gain["ci95"][1]
    assert set(manifest["gain_by_source"]) == {"source", "source-2"}
    shares = {arm: facts.get("source_shares") for arm, facts in manifest["training"].items()}
    assert shares["control:sft"] is None and shares["control:without_source"] == {"source-2": 1.0}
    # The weights are 2 and 1 where both have a position, and the first source has more positions.
    assert 2 / 3 < shares["adapted"]["source"] < 0.9 and sum(shares["adapted"].values()) == pytest.approx(1)


def test_texts_are_split_by_weight_and_all_arms_have_as_many(both) -> None:
    manifest = read_manifest(both)
    asked = {name: item["asked"] for name, item in manifest["generated"].items()}
    assert asked == {
        "source": 6,
        "source-2": 3,
        "random_source": 6,
        "random_source-2": 3,
        "target": 9,
        "source-without-source-2": 9,
        "source-2-without-source": 9,
    }
    kept = {name: item["kept"] for name, item in manifest["generated"].items()}
    counts = {arm: facts["texts"] for arm, facts in manifest["training"].items()}
    assert counts["adapted"] == 12 + kept["source"] + kept["source-2"] and counts["control:sft"] == 12
    assert counts["control:without_source"] == 12 + kept["source-2-without-source"]
    first, second = (read_texts(str(both / f"generated/{name}.jsonl")).texts for name in ("source", "source-2"))
    assert [text.split()[0] for text in first[:3]] != [text.split()[0] for text in second[:3]]


def test_stages_are_those_that_a_check_says(both) -> None:
    recipe = build_adapt_recipe(read_recipe(both / "recipe.yaml"))
    assert set(adapt_stages(recipe)) == read_manifest(both)["stages"].keys()
    assert {"first", "source-2: first"} <= read_manifest(both)["edges"].keys()


def test_pages_show_every_source(both, models) -> None:
    page, card = (both / "report.html").read_text(), (both / "merged/README.md").read_text()
    for name in (models["first"], models["second"]):
        assert name in page and f"`{name}`" in card
    assert '<table id="sources">' in page and "## Sources" in card and "control:without_source-2" in card
    record = json.loads((both / "merged/tmjax.json").read_text())
    assert list(record["parents"]) == ["target", "source", "source-2"]


def test_a_second_start_reuses_everything(both, given, capsys) -> None:
    words = ["adapt", str(both.parent / "recipe.yaml"), *given, "--out", str(both), "--controls", "--json"]
    assert cli.run(words) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert all(stage["reused"] for stage in manifest["stages"].values())


@pytest.mark.slow
def test_mixing_by_prediction_leaves_a_source_of_noise_out(tmp_path, models, given, llama_dir, texts) -> None:
    """The trained source of the pair beside a random one: no text and next to no weight for the random one."""
    sources = ["--source", str(llama_dir), "--source", models["second"]]
    run = adapted(tmp_path, [*given, *sources], {"mixing": "prediction"}, "--controls")
    manifest = read_manifest(run)
    shares = manifest["training"]["adapted"]["source_shares"]
    assert shares["source-2"] < 0.02 and manifest["generated"]["source"]["asked"] == 9
    assert not {"source-2", "source-without-source-2"} & manifest["generated"].keys()
    assert abs(manifest["gain_by_source"]["source-2"]["bits_per_byte"]) < 0.002
    # Both arms have the same texts, whose probabilities are computed once.
    assert "teacher:source-on-sources" in manifest["stages"]
    assert "teacher:source-on-sources-without-source-2" not in manifest["stages"]
    assert set(manifest["stages"]) <= set(adapt_stages(build_adapt_recipe(read_recipe(run / "recipe.yaml"))))


def test_mixed_probabilities_are_those_of_the_stored_parts(both, monkeypatch) -> None:
    """The trainer's mixture against the two files of the run, position by position."""
    recipe = build_adapt_recipe(read_recipe(both / "recipe.yaml"))
    adapt = Adapt(recipe)
    try:
        monkeypatch.setattr(adapt.run, "stage", lambda name, key, output, work, **options: adapt.run.path / output)
        arm = adapt.arms["adapted"]
        data = adapt.trainer.data
        mixture = data.parts.probabilities(arm, data.texts(arm).texts.texts).probabilities
    finally:
        adapt.run.close()
    parts = [TeacherProbabilities.load(both / f"teacher/{n}-on-sources.npz") for n in ("source", "source-2")]
    at = [set(zip(part.document.tolist(), part.position.tolist(), strict=True)) for part in parts]
    assert set(zip(mixture.document.tolist(), mixture.position.tolist(), strict=True)) <= at[0] | at[1]
    assert mixture.ids.shape[1] == 8 and np.all(mixture.weight.sum(axis=1) < 1 + 1e-6)
    masses = [part.weight.sum(axis=1).max() for part in parts]
    assert mixture.weight.sum(axis=1).max() <= max(masses) + 1e-6


def test_runs_with_one_source_keep_their_keys(models, given, tmp_path) -> None:
    """Settings of several sources are no part of the key of a run with one, however it is given."""
    pairs = {name.removeprefix("--"): value for name, value in zip(given[::2], given[1::2], strict=True)}
    keys = []
    for source in ({"source": models["first"]}, {"sources": [models["first"]]}):
        recipe = build_adapt_recipe(SHORT | pairs | source | {"out": str(tmp_path / "run"), "mode": "distilled"})
        assert recipe.source == models["first"] and recipe.sources == ()
        adapt = Adapt.__new__(Adapt)
        adapt.recipe, adapt.inputs = recipe, Adapt(recipe).inputs
        keys.append(adapt._input_hashes())
    without = {"out", "mesh", "other_texts", "places", "source", "target", "texts", "valid", "test", "budget", "tokens"}
    values = recipe.model_dump(mode="json", exclude=dict.fromkeys(without | {"sources", "mixing"}, True))
    del values["export"]["lora"], values["training"]["average"]
    assert keys[0] == keys[1] and keys[0]["recipe"] == digest(values)
    assert set(keys[0]) == {"recipe", "source", "target", "texts", "valid", "test"}


GIVEN = {"target": "a/t", "texts": "-", "valid": "-", "out": "-"}
WRONG = {
    "both keys": ({"source": "a/b", "sources": ["a/c"]}, "source and sources are both given"),
    "twice": ({"sources": ["a/b", "a/b"]}, "sources has a/b twice"),
    "entry": ({"sources": [{"name": "a/b"}, "a/c"]}, "sources.0.source: Field required"),
    "weight": ({"sources": [{"source": "a/b", "weight": 0}, "a/c"]}, "sources.0.weight: Input should be greater"),
    "mixing": ({"sources": ["a/b", "a/c"], "mixing": "best"}, "mixing: Input should be 'weights' or 'prediction'"),
    "guided": ({"sources": ["a/b", "a/c"], "mode": "guided"}, "the features of one source: mode combined, or give one"),
    "combine": (
        {"sources": ["a/b", "a/c"], "combine": ["guidance", "generated"]},
        "set combine: [distillation, generated], or give one source",
    ),
    "merged": ({"sources": ["a/b", "a/c"], "init": "merged"}, "with init merged merges one source"),
    "residual": ({"sources": ["a/b", "a/c"], "mode": "residual-frozen"}, "merges one source: give one source"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, tmp_path) -> None:
    values, message = WRONG[case]
    file = tmp_path / "recipe.yaml"
    (tmp_path / "-").write_text("x")
    file.write_text(yaml.safe_dump(GIVEN | values))
    with pytest.raises(InputError) as raised:
        check_recipe(file, "adapt")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_plan_is_of_one_source(models, given, capsys) -> None:
    sources = ["--source", models["first"], "--source", models["second"]]
    assert cli.run(["plan", "--topology", "v5e-4", *sources, *given[:4]]) == 2
    error = capsys.readouterr().err
    assert "plan reads one source" in error and error.count("\n") == 1


def test_sources_of_the_command_line_take_the_place_of_those_of_the_recipe(tmp_path) -> None:
    from tmjax.cli.options import values_of

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"sources": ["a", "b"], "seed": 1}))
    assert values_of(file, {"source": None}, ("source",)) == {"sources": ["a", "b"], "seed": 1}
    assert values_of(file, {"source": ["c"]}, ("source",)) == {"source": "c", "seed": 1}
    file.write_text(yaml.safe_dump({"source": "a"}))
    assert values_of(file, {"source": ["c", "d"]}, ()) == {"sources": ["c", "d"]}


def test_sources_beside_a_recipe_and_an_included_file(tmp_path) -> None:
    (tmp_path / "shared").mkdir()
    for name in ("shared/one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "shared/models.yaml").write_text(yaml.safe_dump({"sources": [{"source": "one", "weight": 2}, "two"]}))
    (tmp_path / "recipe.yaml").write_text("include: shared/models.yaml\n")
    values = read_recipe(tmp_path / "recipe.yaml")
    recipe = build_adapt_recipe(values | {"target": "t", "texts": "x", "out": "o"}, base=tmp_path)
    assert [entry.source for entry in recipe.sources] == [str(tmp_path / "shared/one"), str(tmp_path / "two")]
    assert recipe.inputs() | {"source-2": str(tmp_path / "two")} == recipe.inputs()


@pytest.mark.parametrize("build", [build_recipe, build_adapt_recipe])
def test_weights_are_used_where_they_are_given(build) -> None:
    given = {"target": "t", "texts": "x", "out": "o"}
    assert build(given | {"sources": ["a", "b"]}).mixing == "prediction"
    assert build(given | {"sources": ["a", {"source": "b", "weight": 1}]}).mixing == "weights"
    weighed = build(given | {"sources": ["a", {"source": "b", "weight": 3}], "mixing": "prediction"})
    assert weighed.mixing == "prediction" and weighed.sources[1].weight == 3


def test_a_source_without_use_is_said() -> None:
    def gains(low: float, high: float) -> dict:
        gain = {"bits_per_byte": (low + high) / 2, "ci95": [low, high]}
        return {"gain_by_source": {"source-2": gain}, "inputs": {"source-2": {"path": "a/b"}}}

    assert source_sentences(gains(0.01, 0.02)) == [] == source_sentences({})
    (line,) = source_sentences(gains(-0.001, 0.002))
    assert line.startswith("source-2 (a/b) is of no use")
    (line,) = source_sentences(gains(-0.02, -0.01))
    assert line.startswith("source-2 (a/b) is harmful")


# A merge, whose operator `predictions` mixes.

MERGE = {
    "mesh": "data=1",
    "self_source": False,
    "mixing": "weights",
    "activations": {"max_texts": 12, "max_tokens": 24},
    "operators": [{"predictions": {"rounds": 1, "generated_texts": 6, "tokens": 8}}],
    "evaluation": {"draws": 200},
}


def merged(folder: Path, models: dict[str, str], given: list[str], values: dict, *words: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "merge.yaml").write_text(yaml.safe_dump(MERGE | values))
    sources = ["--source", models["first"], "--source", models["second"]]
    words = (*sources, *given, "--out", str(folder / "run"), *words)
    assert cli.run(["merge", str(folder / "merge.yaml"), *words]) == 0
    return folder / "run"


def test_a_merge_solves_for_mixed_predictions(models, given, tmp_path) -> None:
    run = merged(tmp_path, models, given, {"mixing": "prediction"})
    manifest, recipe = read_manifest(run), build_recipe(read_recipe(run / "recipe.yaml"))
    assert set(manifest["inputs"]) == {"source", "source-2", "target", "texts", "valid", "test"}
    assert set(manifest["evaluation"]) == {"target", "source", "source-2", "merged"}
    assert recipe.source == recipe.sources[0].source == models["first"]
    assert {"teacher:source", "teacher:source-2", "edges:source-2"} <= manifest["stages"].keys()
    assert set(manifest["stages"]) <= set(merge_stages(recipe))
    assert manifest["operators"]["predictions"]["positions"]["source"] > 0
    card = (run / "merged/README.md").read_text()
    assert "the sources' mixed probabilities" in card and models["second"] in card
    assert list(json.loads((run / "merged/tmjax.json").read_text())["parents"]) == ["target", "source", "source-2"]


@pytest.mark.slow
def test_a_merge_leaves_every_source_out(models, given, tmp_path) -> None:
    values = {"operators": [{"transport": {}}, *MERGE["operators"]], "coefficients": {"alphas": [0.1], "betas": [0.0]}}
    run = merged(tmp_path, models, given, values, "--controls")
    manifest = read_manifest(run)
    without = {"control:without_source", "control:without_source-2"}
    controls = {f"control:{name}" for name in ("shrink", "random_source", "permuted_plan", "shuffled_rows")}
    assert set(manifest["evaluation"]) == {"target", "source", "source-2", "merged"} | without | controls
    assert manifest["source_gain"]["best_control"] in controls
    assert set(manifest["gain_by_source"]) == {"source", "source-2"}
    # Texts of random models are foreign, so that the controls have none.
    assert {name: item["asked"] for name, item in manifest["generated"].items()} == {"source": 3, "source-2": 3}
    for name, other in (("without_source", models["second"]), ("without_source-2", models["first"])):
        nested = read_manifest(run / "sources" / name)
        assert nested["inputs"]["source"]["path"] == other and nested["generated"]["source"]["asked"] == 6
    assert "transport read the first source alone" in " ".join(manifest["notes"]["source-2"])
    assert '<table id="sources">' in (run / "report.html").read_text()


def test_a_merge_without_predictions_takes_one_source(models, given, tmp_path, capsys) -> None:
    sources = ["--source", models["first"], "--source", models["second"]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"preset": "barycentric"}))
    assert cli.run(["merge", str(tmp_path / "recipe.yaml"), *sources, *given, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "no operator of this recipe reads several sources" in error and not (tmp_path / "run").exists()
    assert cli.run(["doctor", str(tmp_path / "recipe.yaml"), *sources, *given[:4], "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert len(report["problems"]) == 1 and not report["mergeable"]


def test_the_doctor_reads_every_source(models, given, capsys) -> None:
    sources = ["--source", models["first"], "--source", models["second"]]
    assert cli.run(["doctor", *sources, *given[:4]]) == 0
    assert "source-2" in capsys.readouterr().out


def test_merges_with_one_source_keep_their_keys() -> None:
    values = {"target": "t", "texts": "x", "valid": "v", "out": "o"}
    one, listed_one = (build_recipe(values | given) for given in ({"source": "a"}, {"sources": ["a"]}))
    assert one == listed_one and not one.sources
    with pytest.raises(InputError, match="source and sources are both given"):
        build_recipe(values | {"source": "a", "sources": ["b", "c"]})
    with pytest.raises(InputError, match="sources has b twice"):
        build_recipe(values | {"sources": ["b", "b"]})
