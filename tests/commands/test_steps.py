"""`tmjax run`: steps share inputs and resume, a changed step is repeated with those after it, faults are one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import stored
from hub_stub import TOKEN, serve
from jobs import Job

import tmjax
from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.commands.adapt.run import Adapt
from tmjax.commands.recipe_check import check_recipe
from tmjax.commands.steps.resolve import located, resolve_steps
from tmjax.commands.steps.step_keys import step_keys
from tmjax.errors import InputError
from tmjax.recipes.base import read_recipe
from tmjax.recipes.steps_recipe import build_steps_recipe
from tmjax.runs.manifest import read_manifest

NAMES = ["1-merge", "2-convert", "3-vocabulary", "4-adapt", "5-evaluate"]
GIVEN = {"source": "a/source", "target": "a/target", "texts": "t.txt", "valid": "v.txt", "test": "e.txt", "out": "run"}


def inputs_of(flags: list[str]) -> dict[str, str]:
    return {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}


def write(folder: Path, values: dict[str, Any], name: str = "steps.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(values))
    return file


def changed(recipe: dict[str, Any], number: int, **settings: Any) -> dict[str, Any]:
    """The recipe with other settings of one step."""
    steps = list(recipe["steps"])
    ((kind, own),) = steps[number - 1].items()
    steps[number - 1] = {kind: own | settings}
    return recipe | {"steps": steps}


@pytest.fixture(scope="module")
def recipe(small_flags, recipe_file) -> dict[str, Any]:
    """A step of every kind on the small models; the training is of two steps."""
    inputs = inputs_of(small_flags)
    merge = yaml.safe_load(Path(recipe_file).read_text()) | {"alpha": 0.05, "activations": {"max_texts": 6}}
    del merge["mesh"]
    training = {"steps": 2, "lr": 1e-3, "validate_every": 2, "warmup": 0}
    adapt = {"mode": "sft", "max_texts": 6, "training": training, "evaluation": {"draws": 100}}
    lora = {"to": "lora", "base": inputs["target"], "rank": 2}
    steps = [{"merge": merge}, {"convert": lora}, {"vocabulary": {"add": 20}}, {"adapt": adapt}, "evaluate"]
    return inputs | {"mesh": "data=1", "steps": steps}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A finished run of the steps."""
    folder = tmp_path_factory.mktemp("steps")
    assert cli.run(["run", str(write(folder, recipe)), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def again(whole, tmp_path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def reused(run: Path) -> list[str]:
    stages = read_manifest(run)["stages"]
    return [name for name in NAMES if stages[name]["reused"]]


def test_every_step_has_a_row(whole, recipe) -> None:
    manifest = read_manifest(whole)
    steps, evaluation = manifest["steps"], manifest["evaluation"]
    assert list(steps) == NAMES and list(evaluation) == ["target", *NAMES]
    models = ["1-merge/merged", "1-merge/merged", "3-vocabulary", "4-adapt/merged", "4-adapt/merged"]
    assert [facts["model"] for facts in steps.values()] == models
    # The numbers are those of the commands, and change from step to step.
    for name, arm in (("1-merge", "merged"), ("4-adapt", "adapted")):
        own = read_manifest(whole / name)["evaluation"]
        assert evaluation[name] == own[arm]
    assert evaluation["5-evaluate"]["bits_per_byte"] == pytest.approx(evaluation["4-adapt"]["bits_per_byte"], abs=1e-6)
    assert read_manifest(whole / "1-merge")["evaluation"]["target"]["bits_per_byte"] == pytest.approx(
        evaluation["target"]["bits_per_byte"], abs=1e-6
    )
    assert len({item["bits_per_byte"] for item in evaluation.values()}) >= 5
    change = steps["4-adapt"]["change"]
    difference = evaluation["4-adapt"]["bits_per_byte"] - evaluation["target"]["bits_per_byte"]
    assert change["bits_per_byte"] == pytest.approx(difference) and change["ci95"][0] < difference < change["ci95"][1]
    assert load_model(whole / "4-adapt/merged").spec.vocab == steps["3-vocabulary"]["measured"]["rows"]
    assert (whole / "2-convert/adapter_model.safetensors").is_file()
    page = (whole / "report.html").read_text()
    assert all(name in page for name in NAMES) and 'href="4-adapt/report.html"' in page
    stored_recipe = read_recipe(whole / "recipe.yaml")
    assert stored_recipe["steps"][2]["vocabulary"]["target"] == "step:2" and stored_recipe["seed"] == 0


def test_the_same_command_repeats_nothing_and_publishes(again, recipe, tmp_path, capsys, monkeypatch) -> None:
    words = ["run", str(write(tmp_path, recipe)), "--out", str(again), "--json", "--push-to-hub", "me/steps"]
    before = {file: file.stat().st_mtime_ns for file in again.rglob("*.safetensors")}
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert cli.run(words) == 0
        result = json.loads(capsys.readouterr().out)
        own = {file.name: file.read_bytes() for file in (again / "4-adapt/merged").iterdir()}
        assert {name: hub.repos["me/steps"].files.get(name) for name in own} == own
        assert cli.run(["publish", str(again), "me/other"]) == 0  # of its last result
        assert own.keys() <= hub.repos["me/other"].files.keys()
    assert all(stage["reused"] for stage in result["stages"].values()) and reused(again) == NAMES
    assert before == {file: file.stat().st_mtime_ns for file in again.rglob("*.safetensors")}
    card = (again / "4-adapt/merged/README.md").read_text()
    assert "tmjax run" in card and "--out run" in card and str(again.parent) not in card.split("## Command")[1]


def test_a_changed_step_is_repeated_with_those_after_it(again, whole, recipe, tmp_path, capsys, monkeypatch) -> None:
    training = recipe["steps"][3]["adapt"]["training"]
    file = write(tmp_path, changed(recipe, 4, training=training | {"lr": 2e-3}))
    words = ["run", str(file), "--out", str(again)]
    assert cli.run(words) == 2
    error = capsys.readouterr().err
    assert "step 4-adapt of" in error and "--overwrite" in error and error.count("\n") == 1
    assert stored(again / "4-adapt/merged") == stored(whole / "4-adapt/merged")

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # in the middle of the step, after its training
        patch.setattr(Adapt, "evaluate", stop)
        assert cli.run([*words, "--overwrite"]) == 130
    assert "4-adapt" not in read_manifest(again)["outputs"] and read_manifest(again / "4-adapt")["outputs"]
    assert cli.run([*words, "--overwrite"]) == 0
    assert reused(again) == NAMES[:3] and read_manifest(again / "4-adapt")["stages"]["train:adapted"]["reused"]
    old, new = (read_manifest(run)["evaluation"] for run in (whole, again))
    same = ["target", *NAMES[:3]]
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert all(new[name]["bits_per_byte"] != old[name]["bits_per_byte"] for name in NAMES[3:])


def test_lost_files_and_later_steps(again, recipe, tmp_path, capsys) -> None:
    """A step that has lost a file is repeated to the same bits; a new last step needs no --overwrite."""
    weights = again / "3-vocabulary/model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    (again / "notes.txt").write_text("mine")
    more = recipe | {"steps": [*recipe["steps"], {"convert": {"to": "hf", "dtype": "bfloat16"}}]}
    assert cli.run(["run", str(write(tmp_path, more)), "--out", str(again)]) == 0
    assert reused(again) == [name for name in NAMES if name != "3-vocabulary"] and weights.read_bytes() == data
    assert read_manifest(again)["steps"]["6-convert"]["measured"]["dtype"] == "bfloat16"
    fewer = recipe | {"steps": recipe["steps"][:3]}
    capsys.readouterr()
    assert cli.run(["run", str(write(tmp_path, fewer)), "--out", str(again)]) == 0
    assert "4-adapt is of a step that the recipe does not have any more" in capsys.readouterr().err
    assert list(read_manifest(again)["steps"]) == NAMES[:3] and (again / "4-adapt/merged").is_dir()
    # Another command takes the directory with --overwrite, and never what it did not write.
    words = ["align", *(f"--{key}={recipe[key]}" for key in ("source", "target", "texts")), "--alpha", "0.1"]
    assert cli.run([*words, "--out", str(again), "--overwrite"]) == 2
    assert "notes.txt" in capsys.readouterr().err and (again / "1-merge/merged").is_dir()


def test_from_python(again, recipe, tmp_path) -> None:
    manifest = tmjax.run(**recipe | {"out": again, "test": Path(recipe["test"])})
    assert all(stage["reused"] for stage in manifest["stages"].values())
    facts = tmjax.vocabulary(recipe["target"], tmp_path / "more", add=20, texts=Path(recipe["texts"]))
    measured = manifest["steps"]["3-vocabulary"]["measured"]
    assert {name: facts[name] for name in ("rows", "kept", "new", "tokens_per_byte")} == {
        name: measured[name] for name in ("rows", "kept", "new", "tokens_per_byte")
    }
    with pytest.raises(InputError, match=r"step 3-vocabulary of .* has finished with other settings"):
        tmjax.run(**changed(recipe, 3, add=19), out=again)


@pytest.mark.slow
def test_killed_without_warning_and_started_again(whole, recipe, tmp_path) -> None:
    """SIGKILL in two steps; the third start finishes with the same tensors."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tmjax.cli", "run", str(write(tmp_path, recipe)), "--out", str(out)]
    for waited_for in ("1-merge/merged.partial", "4-adapt/training/adapted"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (out / waited_for).exists():
            assert process.poll() is None and time.monotonic() < deadline, f"never saw {waited_for}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert list(read_manifest(out)["outputs"]) == NAMES[:3]
    assert cli.run(command[3:]) == 0
    assert reused(out) == NAMES[:3]
    for name in ("1-merge/merged", "3-vocabulary", "4-adapt/merged"):
        assert stored(out / name) == stored(whole / name)


@pytest.mark.slow
def test_two_processes_run_steps_as_one_does(whole, recipe, tmp_path) -> None:
    """Vocabulary and conversion are the first process's alone; both follow the same steps."""
    words = ["run", write(tmp_path, recipe), "--out", tmp_path / "job", "--mesh", "fsdp=2", "--json"]
    (code, printed, error), (other, nothing, silence) = Job(words, devices=1).end(timeout=600)
    assert code == other == 0 and nothing == silence == "", error + silence
    manifest, one = json.loads(printed), read_manifest(whole)
    assert (manifest["devices"], manifest["processes"]) == (2, 2) and list(manifest["steps"]) == NAMES
    for name, item in one["evaluation"].items():
        assert manifest["evaluation"][name]["bits_per_byte"] == pytest.approx(item["bits_per_byte"], abs=1e-3)
    assert stored(tmp_path / "job/1-merge/merged").keys() == stored(whole / "1-merge/merged").keys()
    bad = ["run", write(tmp_path, changed(recipe, 3, source="gone"), "bad.yaml"), "--out", tmp_path / "bad"]
    for status, _, said in Job(bad, devices=1).end(timeout=200):
        assert status == 2 and (not said or "gone" in said)


def steps_of(**values: Any) -> tuple[Any, list[str]]:
    return resolve_steps(build_steps_recipe(GIVEN | values))


def test_models_go_from_step_to_step() -> None:
    entries = ["merge", {"convert": {"to": "lora", "base": "step:1"}}, "evaluate"]
    entries += [{"vocabulary": {"tokenizer": "a/source", "init": "source"}}, {"merge": {"target": "b/other"}}]
    entries += [{"adapt": {"mode": "residual-frozen", "source": "step:4", "texts": "own.txt"}}, "adapt"]
    steps, missing = steps_of(steps=entries, seed=7)
    assert missing == [] and [step.settings.target for step in steps] == [
        *("a/target", "step:1", "step:2", "step:3", "b/other", "step:5", "step:6")
    ]
    assert {step.settings.seed for step in steps if hasattr(step.settings, "seed")} == {7}
    places = located(steps, Path("run"))
    first = "run/1-merge/merged"
    assert [step.settings.target for step in places][1:4] == [first] * 3 and places[1].settings.base == first
    assert places[3].settings.source == "a/source" and places[5].settings.source == "run/4-vocabulary"
    # The residual of a merge needs the merge itself.
    assert places[5].settings.target == "run/5-merge" and places[6].settings.target == "run/6-adapt/merged"
    assert (places[5].settings.texts, places[6].settings.texts) == ("own.txt", "t.txt")


def test_keys_change_from_the_changed_step_on(recipe) -> None:
    def keys(values: dict[str, Any]) -> list[tuple[str, str]]:
        steps, _ = resolve_steps(build_steps_recipe(values | {"out": "run"}))
        return [(key.model, key.whole) for key in step_keys(steps)[0]]

    def differ(values: dict[str, Any], which: int) -> list[int]:
        pairs = zip(keys(recipe), keys(values), strict=True)
        return [number for number, (old, new) in enumerate(pairs, 1) if old[which] != new[which]]

    assert differ(recipe | {"mesh": None}, 1) == []
    assert differ(changed(recipe, 3, add=19), 0) == differ(changed(recipe, 3, add=19), 1) == [3, 4, 5]
    assert differ(changed(recipe, 2, rank=3), 0) == [] and differ(changed(recipe, 2, rank=3), 1) == [2]
    # A LoRA beside the result changes no model.
    assert differ(changed(recipe, 1, export={"lora": 2}), 0) == []
    assert differ(changed(recipe, 1, export={"lora": 2}), 1) == [1]
    assert differ(recipe | {"texts": recipe["valid"]}, 0) == [1, 2, 3, 4, 5]
    assert differ(changed(recipe, 4, valid=recipe["texts"]), 0) == [4, 5]


FAULTS = {
    "unknown": (
        [{"mrege": {}}],
        r"steps\.1: 'mrege' is no step; steps are vocabulary, merge, adapt, convert, eva",
    ),
    "text": ("merge", "steps is a list"),
    "none": ([], "steps: Tuple should have at least 1 item"),
    "two": ([{"merge": {}, "adapt": {}}], r"steps\.1 has to be one step with its settings, not adapt, merge"),
    "out": ([{"merge": {"out": "x"}}], r"steps\.1\.merge\.out: a step has its place in the run directory"),
    "settings": ([{"merge": 3}], r"steps\.1\.merge has to be a mapping of settings, not 3"),
    "key": (["merge", {"adapt": {"sed": 1}}], r"steps\.2\.adapt: sed: unknown key"),
    "renamed": ([{"evaluate": {"texts": "x"}}], r"steps\.1\.evaluate: texts: this key is called test now"),
    "value": ([{"merge": {"alpha": 2}}], r"steps\.1\.merge: alpha: Input should be less than or equal to 1"),
    "later": (
        [{"merge": {"source": "step:1"}}],
        r"steps\.1\.merge\.source: step:1 is not the model of an earlier",
    ),
    "texts": (["merge", {"adapt": {"texts": "step:1"}}], "step:1 is not the model of an earlier step"),
    "base": ([{"convert": {"to": "lora"}}], r"steps\.1\.convert: `to: lora` needs `base`"),
    "init": ([{"vocabulary": {"add": 3, "init": "x"}}], r"steps\.1\.vocabulary: --init 'x' is not known"),
    "both": ([{"vocabulary": {}}], r"steps\.1\.vocabulary: give either --tokenizer"),
    "input": ([{"evaluate": {"test": "gone.txt"}}], r"steps\.1\.evaluate: test gone\.txt does not exist"),
    "mode": ([{"adapt": {"mode": "guided", "source": None}}], r"steps\.1\.adapt: mode guided takes a source"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line(name, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("t.txt", "v.txt", "e.txt"):
        Path(file).write_text("x\n")
    steps, said = FAULTS[name]
    file = write(tmp_path, GIVEN | {"steps": steps})
    assert cli.run(["recipe", "check", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("tmjax: error: recipe: steps")
    with pytest.raises(InputError, match=said):
        check_recipe(file)
    if name not in ("input",):  # a run looks for the inputs of all steps in the order of steps
        assert cli.run(["run", str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("run").exists()


def test_other_commands_refuse_steps(tmp_path, capsys) -> None:
    file = str(write(tmp_path, GIVEN | {"steps": ["merge"]}))
    for command in ("merge", "adapt"):
        assert cli.run([command, file]) == 2
        assert "steps are run by `tmjax run`" in capsys.readouterr().err
    assert cli.run(["run", str(write(tmp_path, GIVEN, "plain.yaml"))]) == 2
    assert "has no steps" in capsys.readouterr().err
    words = ["run", str(write(tmp_path, GIVEN | {"steps": ["evaluate"]})), "--push-to-hub", "me/x"]
    assert cli.run(words) == 2 and "no step is one" in capsys.readouterr().err
    no_source = {key: value for key, value in GIVEN.items() if key not in ("source", "target")}
    assert cli.run(["run", str(write(tmp_path, no_source | {"steps": ["merge"]}))]) == 2
    assert "give --target and --source or name them" in capsys.readouterr().err


def test_check_prints_a_recipe_again(recipe, tmp_path, capsys) -> None:
    """Of a recipe that includes its steps and their inputs from another folder."""
    (tmp_path / "shared").mkdir()
    shared = {"steps": [{"evaluate": {"test": "own.txt"}}, *recipe["steps"]], "texts": "texts.txt"}
    write(tmp_path, shared, "shared/steps.yaml")
    for name in ("own.txt", "texts.txt"):
        (tmp_path / "shared" / name).write_text("a b c\n")
    own = {key: recipe[key] for key in ("source", "valid", "test")}
    file = write(tmp_path, own | {"include": "shared/steps.yaml"})
    assert cli.run(["recipe", "check", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "# still to be given: --target, --out\n" in printed and "2-merge/fuse, " in printed
    result = check_recipe(file)
    assert yaml.safe_load(printed) == result["recipe"] and result["kind"] == "run"
    assert result["recipe"]["texts"] == str(tmp_path / "shared/texts.txt")
    assert result["recipe"]["steps"][0]["evaluate"]["test"] == str(tmp_path / "shared/own.txt")
    assert result["stages"][0] == "1-evaluate" and result["stages"][-1] == "6-evaluate"
    given = {"target": recipe["target"], "out": "run"}
    first, second = (
        resolve_steps(build_steps_recipe(values | given))[0] for values in (yaml.safe_load(printed), read_recipe(file))
    )
    assert first == second


def test_a_step_with_several_sources_has_those_alone(tmp_path) -> None:
    """They replace the shared source; none of them can be the model of a step."""
    several = {"sources": ["one", {"source": "two", "weight": 2}], "mode": "distilled"}
    given = {"source": "-", "target": "-", "texts": "-", "valid": "-", "out": str(tmp_path / "run")}
    (step,), _ = resolve_steps(build_steps_recipe(given | {"steps": [{"adapt": several}]}))
    assert [entry.source for entry in step.settings.sources] == ["one", "two"] and step.settings.source is None
    assert {"source": "one", "source-2": "two"}.items() <= step.inputs().items()
    named = {"steps": [{"adapt": {"mode": "sft"}}, {"adapt": several | {"sources": ["one", "step:1"]}}]}
    with pytest.raises(InputError, match="sources: step:1 is no checkpoint"):
        resolve_steps(build_steps_recipe(given | named))
