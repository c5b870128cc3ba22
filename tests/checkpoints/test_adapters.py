"""Adapter directories in the place of checkpoints: weights and logits are those of PEFT's merge_and_unload."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from tmjax import cli
from tmjax.checkpoints.hf import open_model
from tmjax.checkpoints.load import checkpoint_notes, load_model
from tmjax.errors import CheckpointError, InputError
from tmjax.models.decoder import forward
from tmjax.runs.hashes import sha256_checkpoint

#: PEFT asks transformers for a name that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
#: By name: options of the adapter, and whether it is one of GPT-2, whose weights lie transposed.
KINDS: dict[str, tuple[dict, str]] = {
    "lora": ({"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12}, "qwen2"),
    "rslora with patterns": (
        {
            "target_modules": ["k_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"layers.1.mlp.up_proj": 40},
        },
        "qwen2",
    ),
    "dora": ({"target_modules": ["v_proj", "gate_proj"], "use_dora": True}, "qwen2"),
    "biases": ({"target_modules": ["q_proj", "v_proj"], "bias": "all"}, "qwen2"),
    "embeddings": ({"target_modules": ["embed_tokens", "o_proj"]}, "qwen2"),
    "whole modules": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "qwen2"),
    "transposed": ({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "gpt2"),
    "transposed dora": ({"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}, "gpt2"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen2_dir) -> dict[str, Path]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=2048, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    gpt2 = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(gpt2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(qwen2_dir / name, gpt2 / name)
    return {"qwen2": qwen2_dir, "gpt2": gpt2}


def saved(base: Path, directory: Path, options: dict, seed: int = 0) -> torch.nn.Module:
    """Writes an adapter with random matrices; returns the model that PEFT folds it into."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options))
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter) * (10 if "magnitude" in name else 1))
    adapted.save_pretrained(directory)
    return adapted.merge_and_unload().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_its_folded_model(bases, tmp_path, kind) -> None:
    options, base = KINDS[kind]
    reference = saved(bases[base], tmp_path / "adapter", options)
    reference.save_pretrained(tmp_path / "folded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bases[base] / name, tmp_path / "folded" / name)
    model, folded, plain = (load_model(path) for path in (tmp_path / "adapter", tmp_path / "folded", bases[base]))
    changed = 0
    for path, value in folded.params.items():
        np.testing.assert_allclose(model.params[path], value, rtol=1e-5, atol=2e-6, err_msg=path)
        changed += not np.allclose(value, plain.params[path], atol=1e-4)
    assert changed >= 1
    ids = np.random.default_rng(0).integers(0, 2048, (2, 40))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    logits = np.asarray(forward(model.spec, model.params, ids))
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()
    (note,) = [note for note in checkpoint_notes(tmp_path / "adapter") if "folded" in note]
    assert ("DoRA" if options.get("use_dora") else "LoRA") in note


@pytest.mark.parametrize("kind", ["lora", "dora", "transposed dora", "embeddings"])
def test_slices_are_those_of_the_whole(bases, tmp_path, kind) -> None:
    options, base = KINDS[kind]
    saved(bases[base], tmp_path / "adapter", options)
    model = open_model(tmp_path / "adapter")
    for value in model.params.values():
        whole = value[()]
        part = tuple(slice(size // 3, size // 3 + 5) for size in value.shape)
        np.testing.assert_allclose(value.read(part), whole[part], rtol=1e-5, atol=1e-7)


def test_hash_base_and_commands(bases, tmp_path, texts, capsys) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["qwen2"], base)
    options = KINDS["lora"][0]
    saved(base, tmp_path / "adapter", options)
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "../base"}))
    before = sha256_checkpoint(tmp_path / "adapter")
    saved(base, tmp_path / "other", options, seed=1)
    assert len({before, sha256_checkpoint(tmp_path / "other"), sha256_checkpoint(base)}) == 3
    arguments = [
        "--source",
        str(bases["qwen2"]),
        "--target",
        str(tmp_path / "adapter"),
        "--texts",
        texts["calibration"],
    ]
    assert cli.run(["doctor", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mergeable"] and any("folded into its base model ../base" in note for note in report["notes"])
    assert cli.run(["evaluate", str(tmp_path / "adapter"), str(base), "--texts", texts["test"], "--json"]) == 0
    one, two = (item["bits_per_byte"] for item in json.loads(capsys.readouterr().out)["evaluation"].values())
    assert abs(one - two) > 1e-4
    assert cli.run(["convert", str(tmp_path / "adapter"), str(tmp_path / "folded"), "--to", "hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert model.num_parameters() > 1e6 and not (tmp_path / "folded/adapter_config.json").exists()


def test_faults_are_one_line(bases, tmp_path) -> None:
    directory = tmp_path / "adapter"
    saved(bases["qwen2"], directory, KINDS["lora"][0])
    file = directory / "adapter_config.json"
    settings = json.loads(file.read_text())

    def fault(error: type[Exception], match: str, **changes: object) -> None:
        file.write_text(json.dumps(settings | changes))
        with pytest.raises(error, match=match):
            load_model(directory)

    fault(InputError, "an adapter of the kind IA3", peft_type="IA3")
    fault(InputError, "lora_bias of adapter_config.json is not supported", lora_bias=True)
    fault(InputError, "names no base_model_name_or_path", base_model_name_or_path=None)
    fault(InputError, "is an adapter of ./nowhere: no checkpoint at ./nowhere", base_model_name_or_path="./nowhere")
    fault(CheckpointError, "lacks a part of its update", use_dora=True)
    fault(CheckpointError, "the base model has no", base_model_name_or_path=str(bases["gpt2"]))
    fault(InputError, "which is an adapter itself", base_model_name_or_path=str(directory))
    (directory / "adapter_model.safetensors").unlink()
    fault(InputError, "has no adapter_model.safetensors")
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors"):
        sha256_checkpoint(directory)
    file.write_text("[1]")
    with pytest.raises(InputError, match=r"adapter_config.json"):
        load_model(directory)
