"""`tmjax run`: steps share inputs and resume, a changed step is repeated with those after it, faults are one line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import stored

from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.commands.adapt.run import Adapt
from tmjax.commands.recipe_check import check_recipe
from tmjax.commands.steps import run as steps_run
from tmjax.runs.manifest import read_manifest


def inputs_of(flags: list[str]) -> dict[str, str]:
    return {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}


def write(folder: Path, values: dict[str, Any], name: str = "steps.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def recipe(small_flags, recipe_file) -> dict[str, Any]:
    """Four steps of the small models; the merge has a fixed alpha and few texts, the training two steps."""
    short = yaml.safe_load(Path(recipe_file).read_text())
    merge = {key: short[key] for key in ("preset", "evaluation", "alignment")}
    merge |= {"alpha": 0.05, "activations": {"max_texts": 6}}
    training = {"steps": 2, "lr": 1e-3, "validate_every": 2, "warmup": 0}
    adapt = {"mode": "sft", "max_texts": 6, "training": training, "evaluation": {"draws": 100}}
    steps = [{"merge": merge}, {"vocabulary": {"add": 20}}, {"adapt": adapt}, {"evaluate": {"draws": 100}}]
    return inputs_of(small_flags) | {"mesh": "data=1", "steps": steps}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A finished run of the steps."""
    folder = tmp_path_factory.mktemp("steps")
    assert cli.run(["run", str(write(folder, recipe)), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_every_step_has_a_row(whole) -> None:
    manifest = read_manifest(whole)
    names = ["1-merge", "2-vocabulary", "3-adapt", "4-evaluate"]
    assert list(manifest["steps"]) == names and list(manifest["evaluation"]) == ["target", *names]
    print(json.dumps(manifest["steps"], indent=1))
