"""Recipes of several files, and `tmjax recipe check`: includes, anchors, the stages of a run, one line per fault."""

import json
from pathlib import Path

import pytest
import yaml

from tmjax import cli
from tmjax.commands.recipe_check import adapt_stages, check_recipe, merge_stages
from tmjax.errors import InputError
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.runs.manifest import read_manifest
from tmjax.transfer.recipe import build_recipe

GIVEN = {"source": "-", "target": "-", "texts": "-", "out": "-"}


def write(folder: Path, **files: str) -> Path:
    """Writes recipes by the stems of their names, `a__b` into the folder a; returns the one called `recipe`."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "recipe.yaml"


def test_later_files_win_and_the_own_keys_over_all(tmp_path) -> None:
    file = write(
        tmp_path,
        recipe="include: [shared/first.yaml, second.yaml]\nseed: 3\ncoefficients: {alphas: [0.5]}\n",
        shared__first="include: deep.yaml\nseed: 1\ndtype: bfloat16\ncoefficients: {alphas: [0.1, 0.2], beta: tied}\n",
        shared__deep="mesh: data=1\ndtype: float32\ncoefficients: {groups: role}\n",
        second="seed: 2\ncoefficients: {beta: fit}\n",
    )
    assert read_recipe(file) == {
        "mesh": "data=1",
        "dtype": "bfloat16",
        "seed": 3,
        "coefficients": {"groups": "role", "alphas": [0.5], "beta": "fit"},
    }


def test_one_file_may_be_included_by_two(tmp_path) -> None:
    file = write(
        tmp_path,
        recipe="include: [a.yaml, b.yaml]\n",
        a="include: c.yaml\n",
        b="include: c.yaml\nseed: 4\n",
        c="seed: 1\n",
    )
    assert read_recipe(file) == {"seed": 4}


def test_anchors_have_a_place(tmp_path) -> None:
    text = "x-tried: &tried {alphas: [0.1], betas: [0.0]}\ncoefficients: {<<: *tried, betas: [0.2]}\n"
    file = write(tmp_path, recipe=f"include: more.yaml\n{text}", more="x-tried: 1\nseed: 2\n")
    assert read_recipe(file) == {"seed": 2, "coefficients": {"alphas": [0.1], "betas": [0.2]}}


def test_inputs_beside_an_included_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shared = "texts: t.txt\nvalid: here.txt\nother_texts: [t.txt]\noperators: ['noise.py:NOISE', transport]\n"
    file = write(tmp_path, recipe="include: shared/inputs.yaml\n", shared__inputs=shared)
    for name in ("shared/t.txt", "shared/here.txt", "here.txt", "shared/noise.py"):
        (tmp_path / name).write_text("x")
    values, folder = read_recipe(file), tmp_path / "shared"
    assert values["texts"] == str(folder / "t.txt") and values["other_texts"] == [str(folder / "t.txt")]
    assert values["valid"] == "here.txt"  # the working directory first, as for every recipe
    assert values["operators"] == [f"{folder}/noise.py:NOISE", "transport"]


FAULTS = {
    "cycle": (
        {"recipe": "include: a.yaml", "a": "include: b.yaml", "b": "include: a.yaml"},
        r"a\.yaml -> .*b\.yaml -> .*a\.yaml",
    ),
    "itself": ({"recipe": "include: recipe.yaml"}, r"include each other: .*recipe\.yaml -> .*recipe\.yaml"),
    "absent": ({"recipe": "include: gone.yaml"}, r"cannot read recipe .*gone\.yaml: No such file"),
    "number": ({"recipe": "include: 3"}, "include is a list of files"),
    "twice": (
        {"recipe": "include: a.yaml", "a": "seed: 1\nseed: 2"},
        r"a\.yaml has the key seed twice \(lines 1 and 2\)",
    ),
    "key": ({"recipe": "include: a.yaml", "a": "sed: 1"}, "sed: unknown key"),
    "value": ({"recipe": "alignment: {epsilon: -1}"}, r"alignment\.epsilon: Input should be greater than 0"),
    "operator": ({"recipe": "operators: [nothing]"}, "nothing"),
    "input": ({"recipe": "alpha: 0.1\ntest: gone.jsonl"}, r"test gone\.jsonl does not exist"),
    "valid": ({"recipe": "preset: barycentric"}, "give --valid FILE"),
    "mode": ({"recipe": "mode: guided"}, "takes a source"),
    "merge": (
        {"recipe": "mode: residual-frozen\nsource: a/b\ntarget: a/b\nmerge: {sed: 1}\ntraining: {steps: 30}"},
        "sed",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line(name, tmp_path, capsys) -> None:
    files, said = FAULTS[name]
    file = write(tmp_path, **files)
    assert cli.run(["recipe", "check", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(InputError, match=said):
        check_recipe(file)


def test_the_output_is_the_recipe_again(recipe_file, flags, tmp_path, capsys) -> None:
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(dict(zip(("source", "target"), flags[1:4:2], strict=True))))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"include: [{recipe_file}, models.yaml]\nvalid: {flags[7]}\nexport: {{lora: 4}}\n")
    assert cli.run(["recipe", "check", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "# still to be given: --texts, --out\n" in printed and ", fuse, lora, samples," in printed
    assert cli.run(["recipe", "check", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "merge" and result["missing"] == ["texts", "out"]
    assert yaml.safe_load(printed) == result["recipe"]
    assert result["recipe"]["coefficients"]["alphas"] == [0.03, 0.1] and result["recipe"]["source"] == flags[1]
    again = build_recipe(yaml.safe_load(printed) | {"texts": flags[5], "out": "-"})
    assert again == build_recipe(read_recipe(file) | {"texts": flags[5], "out": "-"})


def test_the_kind_is_that_of_the_keys(tmp_path, flags) -> None:
    given = dict(zip(("source", "target", "texts", "valid"), flags[1:8:2], strict=True))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(given))
    assert check_recipe(file)["kind"] == "merge" and check_recipe(file, "adapt")["recipe"]["mode"] == "combined"
    file.write_text(yaml.safe_dump(given | {"mode": "residual-frozen"}))
    assert check_recipe(file)["stages"][:4] == [
        *("merge/activations:target", "merge/activations:source", "merge/alignment", "merge/fuse")
    ]


def test_stages_are_those_of_the_run(plain) -> None:
    recipe = build_recipe(read_recipe(plain / "recipe.yaml"))
    assert merge_stages(recipe) == list(read_manifest(plain)["stages"])


def test_stages_of_controls_and_arms() -> None:
    stages = merge_stages(
        build_recipe(GIVEN | {"controls": True, "other_texts": ["x"], "activations": {"keep": False}})
    )
    assert stages[:5] == ["moments:source", "alignment", "edges", "generate:source", "teacher:source"]
    assert stages[5:10] == [
        "fuse",
        *(f"control:{n}" for n in ("shrink", "random_source", "permuted_plan", "shuffled_rows")),
    ]
    assert stages[10:] == ["sources/self_source", "forgetting", "samples", "card", "report", "provenance"]
    stages = adapt_stages(build_adapt_recipe(GIVEN | {"valid": "-", "controls": True, "tokens": 10**6}))
    assert stages[:3] == ["budget", "edges", "generate:source"] and "teacher:source-on-source" in stages
    assert "train:control:target_written" in stages and len(stages) == len(set(stages))
