"""Operators in files of their own, outside the package: found from a recipe alone, by every command."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml
from helpers import SPEC

from tmjax import cli
from tmjax.commands.merge.run import Merge, open_run
from tmjax.errors import InputError
from tmjax.transfer.controls import CONTROLS
from tmjax.transfer.operator import code_hashes, find_operator, read_chain
from tmjax.transfer.recipe import build_recipe
from tools.make_checkpoint import make_checkpoint

#: An operator that changes parameters by itself.
NOISE = '''
import numpy as np
from pydantic import Field
from typing import Annotated
from tmjax.recipes.base import PositiveFloat, Section
from tmjax.transfer.contribution import Applied

class NoiseOptions(Section):
    """Options of the operator `noise`."""
    size: Annotated[PositiveFloat, Field(description="Standard deviation of the noise.")] = 0.01

class Noise:
    """Noise on the output projections of the MLP."""
    name, options, needs, chooses = "noise", NoiseOptions, frozenset(), False

    def apply(self, params, source, options, context):
        path = context.target.projections["down"].path
        noise = np.random.default_rng(context.seed).normal(0, options.size, params[path].shape)
        changed = np.asarray(params[path], np.float32) + source.contribution * noise.astype(np.float32)
        return Applied({**params, path: changed}, {"size": options.size})

    def memory(self, target, source, options, batch_tokens):
        return 4 * target.spec.layers * target.spec.hidden * target.spec.mlp
'''
#: An operator whose result enters with coefficients: `down` with the rows of every layer reversed.
REVERSED = '''
from dataclasses import dataclass, replace
from typing import Any
import jax.numpy as jnp
from tmjax.recipes.base import Section
from tmjax.transfer.contribution import Contribution

class ReversedOptions(Section):
    """Options of the operator `reversed`: none."""

@dataclass(frozen=True)
class Add:
    """W + alpha R + beta W."""
    path: str
    names: tuple[str, ...]

    def __call__(self, params, items, coefficients):
        alpha, beta = coefficients["down"]
        old = jnp.asarray(params[self.path], jnp.float32)
        return {**params, self.path: old + alpha * items["down"] + beta * old}

    def scaled(self, items, factor):
        return {"down": items["down"] * factor}

    def rows(self, target, fused, items, coefficients):
        alpha, beta = coefficients["down"]
        part = jnp.linalg.norm(items["down"], axis=(1, 2)) / jnp.linalg.norm(target[self.path], axis=(1, 2))
        return {n: {"source_part": float(alpha * p), "reversed": float(p)} for n, p in zip(self.names, part)}

class Reversed:
    """Reversed output projections of the MLP, which are all that it contributes to."""
    name, options, needs, chooses = "reversed", ReversedOptions, frozenset(), False

    def roles(self, options):
        return ("down",)

    def contribute(self, params, source, options, context):
        row = context.target.projections["down"]
        items = {"down": jnp.asarray(params[row.path], jnp.float32)[:, ::-1]}
        rule = Add(row.path, tuple(row.names(context.target.spec)))
        return Contribution(items, rule, {"down": row})

    def memory(self, target, source, options, batch_tokens):
        return 4 * target.spec.layers * target.spec.hidden * target.spec.mlp

OPERATOR = Reversed()
'''
SHORT = {
    "preset": "barycentric",
    "coefficients": {"alphas": [0.03, 0.1], "betas": [-0.05, 0.0]},
    "mesh": "data=1",
    "evaluation": {"draws": 200},
    "self_source": False,
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A folder with both operators, and recipes that name them by their place beside the recipe."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "noise.py").write_text(NOISE)
    (folder / "backwards.py").write_text(REVERSED)
    lists = {
        "noise": [{"transport": {"roles": ["q"]}}, {"noise.py:Noise": {"size": 0.02}}],
        "reversed": ["backwards.py:OPERATOR"],
    }
    for name, operators in lists.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(SHORT | {"operators": operators}))
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def merged(recipes, name: str, small_flags, capsys) -> dict:
    out = recipes / f"{name}-run"
    code, printed, error = run(
        capsys, "merge", recipes / f"{name}.yaml", *small_flags, "--out", out, "--controls", "--json", "--overwrite"
    )
    assert code == 0, error
    assert (out / "report.html").is_file()
    return json.loads(printed)


def test_an_operator_of_a_file_is_everywhere(recipes, small_flags, capsys) -> None:
    code, printed, error = run(capsys, "doctor", recipes / "noise.yaml", *small_flags[:6], "--json")
    assert code == 0, error
    report = json.loads(printed)
    assert code == 0 and [entry["name"] for entry in report["operators"]] == ["transport", "noise"]
    assert report["memory"]["stages"]["operator noise"] > 0

    manifest = merged(recipes, "noise", small_flags, capsys)
    assert set(CONTROLS) <= set(manifest["evaluation"]) and set(CONTROLS) == set(manifest["controls"])
    assert manifest["operators"]["noise"] == {"size": 0.02}
    noise = {name: row["noise"] for name, row in manifest["update"].items()}
    assert {name for name, value in noise.items() if value > 0} == {n for n in noise if "down_proj" in n} != set()
    # Without the source's contribution there is none of it.
    empty = manifest["controls"]["control:shrink"]["update"]
    assert not any(row.get("noise", 0.0) for row in empty.values())
    assert "<th>noise</th>" in (recipes / "noise-run" / "report.html").read_text()
    assert "| noise |" in (recipes / "noise-run" / "merged" / "README.md").read_text()

    grid = ["--grid", "alpha=0.0,0.1", "--out", recipes / "sweep-noise"]
    code, _, error = run(capsys, "sweep", recipes / "noise.yaml", *small_flags, *grid)
    lines = [line for line in error.splitlines() if line.startswith("tmjax: error:")]
    assert code == 2 and len(lines) == 1 and "leave the operator noise out" in lines[0]


def test_an_operator_that_contributes_has_its_coefficients_chosen_and_swept(recipes, small_flags, capsys) -> None:
    code, printed, _ = run(capsys, "doctor", recipes / "reversed.yaml", *small_flags[:6], "--json")
    assert code == 0 and [entry["name"] for entry in json.loads(printed)["operators"]] == ["reversed"]

    manifest = merged(recipes, "reversed", small_flags, capsys)
    assert set(manifest["coefficients"]["by_role"]) == {"down"} and len(manifest["coefficients"]["trials"]) == 4
    assert set(CONTROLS) == set(manifest["controls"])
    assert all(row["reversed"] == pytest.approx(1) for row in manifest["update"].values())
    assert all(row["reversed"] == 0 for row in manifest["controls"]["control:shrink"]["update"].values())
    assert "<th>reversed</th>" in (recipes / "reversed-run" / "report.html").read_text()

    grid = ["--grid", "alpha=0.0,0.1", "--grid", "beta=0.0", "--out", recipes / "sweep-reversed"]
    code, printed, error = run(capsys, "sweep", recipes / "reversed.yaml", *small_flags, *grid, "--json")
    assert code == 0, error
    sweep = json.loads(printed)["sweep"]
    assert sweep["settings"] == 2 and set(sweep["best"]["coefficients"]) == {"down"}


def small_pair(llama_dir: Path, project: Path) -> Path:
    """A folder with `source`, `target`, `texts.txt` and an empty folder `recipes`."""
    vocab = json.loads((llama_dir / "config.json").read_text())["vocab_size"]
    spec = dataclasses.replace(SPEC, vocab=vocab, layers=1, tied_embeddings=True)
    for name, seed in (("source", 1), ("target", 2)):
        make_checkpoint(project / name, "llama", spec, tokenizer=llama_dir, seed=seed)
    (project / "texts.txt").write_text("\n".join(f"neno {number} maji ya mto" for number in range(6)))
    (project / "recipes").mkdir()
    return project


def test_a_run_finds_the_file_of_its_operator_from_another_directory(llama_dir, tmp_path, monkeypatch, capsys) -> None:
    project, elsewhere = small_pair(llama_dir, tmp_path / "project"), tmp_path / "elsewhere"
    (project / "recipes/noise.py").write_text(NOISE)
    recipe = {"source": "source", "target": "target", "texts": "texts.txt", "out": "run", "alpha": 0.1}
    recipe |= {"operators": ["noise.py:Noise"], "self_source": False, "allow_negligible": True}
    monkeypatch.chdir(project)
    merge = Merge(build_recipe(recipe, base=Path("recipes")))
    merge.fuse()
    merge.run.close()
    stored = yaml.safe_load((project / "run/recipe.yaml").read_text())
    assert [*stored["operators"][0]] == ["recipes/noise.py:Noise"]  # as given
    assert stored["places"]["recipes/noise.py"] == str(project / "recipes/noise.py")

    # A file of that name which lies there is another operator.
    (elsewhere / "recipes").mkdir(parents=True)
    (elsewhere / "recipes/noise.py").write_text(NOISE.replace("0.01", "0.5"))
    monkeypatch.chdir(elsewhere)
    again = Merge(open_run(project / "run", {}), amend=True)
    again.fuse()
    again.run.close()
    manifest = again.run.manifest.to_json()
    assert manifest["stages"]["fuse"]["reused"] and manifest["operators"]["noise"] == {"size": 0.01}
    # No alignment is needed for it, so the report goes without.
    (project / "run/samples.json").write_text('{"samples": []}')
    assert run(capsys, "report", project / "run")[0] == 0


SOLVER = """
from dataclasses import dataclass
from tmjax import ot
from tmjax.ot.result import certify

@dataclass(frozen=True)
class Independent:
    name = "independent"
    properties = ot.ResultProperties()

    def solve_one(self, problem):
        return certify(problem, ot.DensePlan(problem.a[:, None] * problem.b), iterations=1, threshold=1e-6)
"""


def test_a_run_finds_the_file_of_its_solver_from_another_directory(llama_dir, tmp_path, monkeypatch) -> None:
    """And a changed file is another solver: the plans are made again."""
    project, elsewhere = small_pair(llama_dir, tmp_path / "project"), tmp_path / "elsewhere"
    (project / "recipes/plain.py").write_text(SOLVER)
    recipe = {"source": "source", "target": "target", "texts": "texts.txt", "out": "run", "alpha": 0.1}
    recipe |= {"operators": [{"transport": {"roles": ["down"]}}], "self_source": False}
    recipe |= {"alignment": {"solver": "plain.py:Independent"}}
    monkeypatch.chdir(project)

    def align(recipe) -> bool:
        merge = Merge(recipe, amend=(project / "run").exists())
        merge.align()
        merge.run.close()
        return merge.run.manifest.to_json()["stages"]["alignment"]["reused"]

    assert not align(build_recipe(recipe, base=Path("recipes")))
    stored = yaml.safe_load((project / "run/recipe.yaml").read_text())
    assert stored["alignment"]["solver"] == "recipes/plain.py:Independent"
    assert stored["places"]["recipes/plain.py"] == str(project / "recipes/plain.py")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert align(open_run(project / "run", {}))
    (project / "recipes/plain.py").write_text(SOLVER + "# changed\n")
    for name in [name for name in sys.modules if name.startswith("tmjax_plugin_plain")]:
        monkeypatch.delitem(sys.modules, name)
    assert not align(open_run(project / "run", {}))


def test_changed_code_of_an_operator_is_another_input(tmp_path) -> None:
    """Files of the same name in two folders are two operators, each with its own hash."""
    for folder, size in (("one", "0.01"), ("other", "0.05")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "noise.py").write_text(NOISE.replace("= 0.01", f"= {size}"))
    one, other = (read_chain([f"{tmp_path}/{folder}/noise.py:Noise"]) for folder in ("one", "other"))
    assert (one[0].options.size, other[0].options.size) == (0.01, 0.05)
    assert code_hashes(one)["noise"] != code_hashes(other)["noise"]
    assert code_hashes(read_chain(["transport", "embeddings"])) == {}


def test_what_is_no_operator_is_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "half.py").write_text("class Half:\n    name, needs, chooses = 'half', frozenset(), False\n")
    with pytest.raises(InputError, match="lacks options, memory, apply or contribute"):
        find_operator(f"{tmp_path}/half.py:Half")
    with pytest.raises(InputError, match="cannot be imported"):
        find_operator(f"{tmp_path}/half.py:Whole")
    with pytest.raises(InputError, match=r"none\.py does not exist"):
        read_chain([f"{tmp_path}/none.py:Half"])
    (tmp_path / "broken.py").write_text("class Broken(:\n")
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be imported: invalid syntax"):
            find_operator(f"{tmp_path}/broken.py:Broken")
    (tmp_path / "wishes.py").write_text(NOISE.replace("frozenset()", 'frozenset({"luck"})'))
    with pytest.raises(InputError, match="needs luck, which no source has"):
        find_operator(f"{tmp_path}/wishes.py:Noise")
