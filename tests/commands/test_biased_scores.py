"""Targets and sources with ALiBi, attention sinks and a bias of the output head: merges and trainings, all slow."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import short_recipes

from tests.commands.test_mixtures import SHAPE, arguments, texts  # noqa: F401
from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.models.experts.mixture import Experts
from tmjax.models.spec import Alibi, DecoderSpec, Rotary
from tmjax.runs.manifest import read_manifest
from tools.make_checkpoint import family_spec, make_checkpoint

pytestmark = pytest.mark.slow
WHOLE = SHAPE | {"hidden": 32, "kv_heads": 4, "mlp": 128}
NO_ROTARY = Rotary(scaling="none")


def spec_of(family: str) -> DecoderSpec:
    if family == "gpt_oss":
        experts = Experts(8, 2, 56, logit_bias=True, bias=True, limit=7.0, gain=1.702)
        return dataclasses.replace(family_spec(family, **SHAPE), experts=experts, qkv_bias=True, o_bias=True)
    spec = family_spec(family, **WHOLE)
    if family == "bloom":
        return dataclasses.replace(spec, alibi=Alibi(), rotary=NO_ROTARY, activation="gelu_tanh")
    return dataclasses.replace(spec, rotary=dataclasses.replace(spec.rotary, fraction=0.5))


@pytest.fixture(scope="module")
def made(tmp_path_factory, qwen2_dir):
    """Random checkpoints with the tokenizer of the bundled target."""
    folder = tmp_path_factory.mktemp("models")
    vocab = {"vocab": load_model(qwen2_dir).spec.vocab}

    def make(family: str) -> Path:
        spec = dataclasses.replace(spec_of(family), **vocab)
        place = folder / family
        return place if place.exists() else make_checkpoint(place, family, spec, tokenizer=qwen2_dir, scale=0.1)

    return make


def finite(out: Path) -> dict:
    manifest = read_manifest(out)
    assert all(math.isfinite(arm["bits_per_byte"]) for arm in manifest["evaluation"].values())
    return manifest


@pytest.mark.parametrize(("source", "target"), [("gpt_oss", "bloom"), ("bloom", "bloom"), ("phi", "phi")])
def test_structured_merges(made, texts, tmp_path, capsys, source, target) -> None:  # noqa: F811
    """The residual stream included; a model is its own source in two of three."""
    recipe = yaml.safe_load(Path(short_recipes(tmp_path)["merge"]).read_text())
    recipe["alignment"] = {"structure": "full"}
    last = [] if target == "bloom" else recipe["operators"][-1:]  # it changes BLOOM's embeddings, which are tied
    recipe["operators"] = [{"transport": {}}, {"residual_stream": {}}, *last]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    code = cli.run(["merge", str(tmp_path / "recipe.yaml"), *arguments(made(source), made(target), texts, out)])
    assert code == 0, capsys.readouterr().err
    changed = finite(out)["update"]
    assert "transformer.word_embeddings.weight" not in changed
    assert ("lm_head.bias" in changed) == (target == "phi")
    assert not any("sinks" in name or "word_embeddings_layernorm" in name for name in changed)


@pytest.mark.parametrize("target", ["bloom", "phi", "gpt_oss"])
def test_training(made, qwen2_dir, texts, tmp_path, capsys, target) -> None:  # noqa: F811
    out, recipe = tmp_path / "run", short_recipes(tmp_path)["adapt"]
    command = ["adapt", recipe, *arguments(qwen2_dir, made(target), texts, out), "--mode", "sft"]
    code = cli.run(command)
    assert code == 0, capsys.readouterr().err
    finite(out)
    before, after = load_model(made(target)), load_model(out / "merged")
    new = {"phi": "head.bias", "bloom": "embed_norm.weight", "gpt_oss": "blocks.sinks"}[target]
    assert not np.array_equal(before.params[new], after.params[new])
