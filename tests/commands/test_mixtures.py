"""A mixture of experts as the source of the bundled target: merge, adapt, evaluate, doctor; and as a target."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers import short_recipes

from tmjax import cli
from tmjax.models.blocks.low_rank import Latent
from tmjax.models.experts.mixture import Experts
from tmjax.models.spec import Rotary
from tmjax.runs.manifest import read_manifest
from tmjax.text.documents import read_texts
from tools.make_checkpoint import family_spec, make_checkpoint

WORDS = 6
SHAPE = {"vocab": 4096, "hidden": 40, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 56}


@pytest.fixture(scope="module")
def texts(repo, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    verses = read_texts(str(repo / "experiments/swahili/texts/swahili.calibration.jsonl")).texts
    begun = [" ".join(verse.split()[:WORDS]) for verse in verses if len(verse.split()) >= WORDS]
    for name, part in (("texts", begun[:8]), ("valid", begun[100:104]), ("test", begun[200:204])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n")
    return {name: str(folder / f"{name}.txt") for name in ("texts", "valid", "test")}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, llama_dir) -> Path:
    """A random qwen3_moe with the tokenizer of the bundled source; its first layer is dense."""
    experts = Experts(8, 2, 24, dense=(0,))
    spec = dataclasses.replace(family_spec("qwen3_moe", **SHAPE), experts=experts)
    place = tmp_path_factory.mktemp("models") / "mixture"
    return make_checkpoint(place, "qwen3_moe", spec, tokenizer=llama_dir, scale=0.1)


@pytest.fixture(scope="module")
def latent(tmp_path_factory, llama_dir) -> Path:
    """A random deepseek_v3 with the tokenizer of the bundled source."""
    experts = Experts(8, 2, 24, "sigmoid", choice_bias=True, shared_width=24, dense=(0,))
    attention = {"latent": Latent(12, 8, 14, 10), "kv_heads": 4, "head_dim": 16}
    attention |= {"rotary": Rotary(fraction=0.5, interleaved=True)}
    spec = dataclasses.replace(family_spec("deepseek_v3", **SHAPE | {"layers": 4}), experts=experts, **attention)
    place = tmp_path_factory.mktemp("models") / "latent"
    return make_checkpoint(place, "deepseek_v3", spec, tokenizer=llama_dir, scale=0.1)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, str]:
    return short_recipes(tmp_path_factory.mktemp("recipes"))


def arguments(source: Path, target: Path, texts: dict[str, str], out: Path) -> list[str]:
    named = {"source": source, "target": target, **texts, "out": out}
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def test_doctor_leaves_out_the_projections_that_a_mixture_lacks(mixture, qwen2_dir, capsys) -> None:
    assert cli.run(["doctor", "--source", str(mixture), "--target", str(qwen2_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"] and report["models"]["source"]["family"] == "qwen3_moe"
    assert [row["role"] for row in report["projections"]["mapped"]] == ["q", "k", "v", "o"]
    left = {row["role"]: row["reason"] for row in report["projections"]["left_out"]}
    assert left == dict.fromkeys(("gate", "up", "down"), "the source has none")
    (row,) = (row for row in report["differences"] if row["what"] == "MLP")
    assert "2 of 8 experts of 24 units" in row["source"] and "experts" not in row["target"]


def test_nothing_is_transported_from_latent_attention_and_experts(latent, qwen2_dir, texts, tmp_path, capsys) -> None:
    """Its predictions can be used, once the operators leave transport out."""
    line = "the two models share no projection that could be transported; leave transport out"
    assert cli.run(["merge", *arguments(latent, qwen2_dir, texts, tmp_path / "run")]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    recipe = tmp_path / "recipe.yaml"
    for chain, problems in (("[{transport: {}}]", [line]), ("[{embeddings: {}}, {predictions: {}}]", [])):
        recipe.write_text(f"source: {latent}\ntarget: {qwen2_dir}\noperators: {chain}\n")
        cli.run(["doctor", str(recipe), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert len(report["problems"]) == len(problems)
        assert all(begin in problem for begin, problem in zip(problems, report["problems"], strict=True))
        assert not report["projections"]["mapped"] and len(report["projections"]["left_out"]) == 7


@pytest.mark.slow
def test_training_of_latent_attention_on_a_mesh(latent, llama_dir, texts, recipes, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["adapt", recipes["adapt"], *arguments(llama_dir, latent, texts, out), "--mode", "sft"]
    code, error = cli.run([*command, "--mesh", "data=2,fsdp=2,tensor=2"]), capsys.readouterr().err
    assert code == 0, error
    before, after = (safetensors.numpy.load_file(d / "model.safetensors") for d in (latent, out / "merged"))
    assert before.keys() == after.keys()
    names = [name for name in before if ".self_attn." in name]
    assert len(names) == 4 * 7 and not any(np.array_equal(before[name], after[name]) for name in names)


@pytest.mark.slow
def test_merge_from_a_mixture(mixture, qwen2_dir, texts, recipes, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    code = cli.run(["merge", recipes["merge"], *arguments(mixture, qwen2_dir, texts, out)])
    error = capsys.readouterr().err
    assert code == 0, error
    manifest = read_manifest(out)
    assert all(math.isfinite(arm["bits_per_byte"]) for arm in manifest["evaluation"].values())
    changed = {name.split(".")[-2] for name in manifest["update"] if ".layers." in name}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= changed
    assert cli.run(["evaluate", str(mixture), str(out / "merged"), "--texts", texts["test"], "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["evaluation"]
    assert len(scores) == 2 and all(math.isfinite(each["bits_per_byte"]) for each in scores.values())


@pytest.mark.slow
def test_adapt_from_a_mixture_with_controls(mixture, qwen2_dir, texts, recipes, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    command = ["adapt", recipes["adapt"], *arguments(mixture, qwen2_dir, texts, out), "--mode", "combined"]
    code, error = cli.run([*command, "--controls"]), capsys.readouterr().err
    assert code == 0, error
    manifest = read_manifest(out)
    assert "control:random_source" in manifest["evaluation"]
    assert all(math.isfinite(arm["bits_per_byte"]) for arm in manifest["evaluation"].values())


@pytest.mark.slow
def test_training_moves_experts_and_leaves_the_bias_of_the_choice(mixture, llama_dir, texts, recipes, tmp_path, capsys):
    """A mixture as the target of training on a mesh, which is written back under its own names."""
    out = tmp_path / "run"
    command = ["adapt", recipes["adapt"], *arguments(llama_dir, mixture, texts, out), "--mode", "sft"]
    code, error = cli.run([*command, "--mesh", "data=2,fsdp=2,tensor=2"]), capsys.readouterr().err
    assert code == 0, error
    before, after = (safetensors.numpy.load_file(d / "model.safetensors") for d in (mixture, out / "merged"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)} <= moved
    assert {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")} <= moved
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 8 * 3 and sum(name in moved for name in experts) > len(experts) / 2
