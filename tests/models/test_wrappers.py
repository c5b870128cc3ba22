"""Multimodal wrappers are read as their text models: logits of transformers' whole model on text, names, defaults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig

from tmjax import cli
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.hub import copy_companions
from tmjax.checkpoints.load import load_model
from tmjax.errors import CheckpointError
from tmjax.models.decoder import forward
from tmjax.models.families import ALIASES, FAMILIES
from tmjax.models.families.wrappers import TEXTS, TIED, wrapper_of

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN_VISION = {"depth": 1, "num_heads": 2, "intermediate_size": 16, "embed_dim": 16, "fullatt_block_indexes": [0]}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
VISION = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28, "patch_size": 14}


def tiny(kind: str) -> transformers.PretrainedConfig:
    """A small config of a wrapper: sharp enough a text model, the least of a tower."""
    whole = AutoConfig.for_model(kind)
    qwen = kind.startswith("qwen")
    vision = (QWEN_VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}) if qwen else VISION
    vision = vision | {"hidden_size": 32 if kind == "qwen2_vl" else 16}
    text = dict(TEXT)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    if kind == "kimi_k25":
        text |= LATENT
        del text["head_dim"]
        vision |= {"pos_emb_height": 4, "pos_emb_width": 4, "patch_size": 7}
    if kind == "qwen3_vl_moe":
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": False}
    if kind in ("qwen3_vl", "qwen3_vl_moe"):
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = type(whole.text_config)(**text)
    return type(whole)(text_config=text.to_dict(), vision_config=type(whole.vision_config)(**vision).to_dict())


def name_layers(directory: Path) -> None:
    """Names the text model's layers as they are published; transformers writes them as it does the tower's blocks."""
    file, begin = directory / "model.safetensors", "language_model.model."
    tensors = safetensors.torch.load_file(file)
    renamed = {
        name.replace(".blocks.", ".layers.") if name.startswith(begin) else name: tensors[name] for name in tensors
    }
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama_dir) -> dict[str, tuple[Path, torch.Tensor, np.ndarray]]:
    """By wrapper: its directory, token ids, and the logits of transformers on them."""
    result = {}
    for kind in TIED:
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(tiny(kind), experts_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
        directory = tmp_path_factory.mktemp(kind)
        model.save_pretrained(directory)
        if kind == "kimi_k25":
            name_layers(directory)
        copy_companions(llama_dir, directory)
        ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = model.double()(input_ids=ids).logits.numpy()
        result[kind] = directory, ids, logits
    return result


@pytest.mark.parametrize("kind", TIED)
def test_logits_on_text_are_those_of_the_whole_model(saved, kind) -> None:
    directory, ids, expected = saved[kind]
    model = load_model(directory)
    logits = np.asarray(forward(model.spec, model.params, ids.numpy()))
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()
    assert any(f"of the multimodal {kind} the text model is read" in note for note in model.notes)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_the_text_model_can_be_written_by_itself(saved, kind, tmp_path, qwen2_dir, texts, capsys) -> None:
    directory, ids, expected = saved[kind]
    out = tmp_path / "text"
    assert cli.run(["convert", str(directory), str(out), "--to", "hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval().double()
    assert type(model).__name__ == FAMILIES[model.config.model_type].architecture
    with torch.no_grad():
        logits = model(input_ids=ids).logits.numpy()
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()
    arguments = ["--source", str(qwen2_dir), "--target", str(directory), "--texts", texts["calibration"]]
    capsys.readouterr()
    assert cli.run(["merge", *arguments, "--alpha", "0.1", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is a multimodal {kind}, of which only the text model is read" in line


def test_names_of_both_conventions(saved, tmp_path) -> None:
    """Transformers has put the towers and the text model under `model.` in some versions and not in others."""
    for kind, old, new in (
        ("gemma3", "language_model.model.", "model.language_model."),
        ("qwen2_vl", "model.", "model.language_model."),
        ("qwen3_vl", "model.language_model.", "language_model.model."),
    ):
        directory, _, _ = saved[kind]
        other = tmp_path / kind
        other.mkdir()
        (other / "config.json").write_bytes((directory / "config.json").read_bytes())
        tensors = safetensors.torch.load_file(directory / "model.safetensors")
        renamed = {
            new + name.removeprefix(old)
            if name.startswith(old)
            else ("model." + name if name.startswith(("visual.", "vision_tower.")) else name): value
            for name, value in tensors.items()
        }
        safetensors.torch.save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
        one, two = load_model(directory), load_model(other)
        assert all(np.array_equal(one.params[path], two.params[path]) for path in one.params)


def test_fused_experts_of_both_layouts(saved, tmp_path) -> None:
    """As they are published, and as transformers has them in memory."""
    directory, _, _ = saved["qwen3_vl_moe"]
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    fused = [name for name in tensors if "experts." in name]
    turned = tensors | {name: tensors[name].transpose(1, 2).contiguous() for name in fused}
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    safetensors.torch.save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one, two = load_model(directory), load_model(tmp_path)
    assert len(fused) == 4 and all(np.array_equal(one.params[path], two.params[path]) for path in one.params)
    turned[fused[0]] = tensors[fused[0]]
    safetensors.torch.save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit each other"):
        load_model(tmp_path)


def test_left_out_keys_have_the_values_of_transformers() -> None:
    for kind, (_, defaults) in TEXTS.items():
        reference = AutoConfig.for_model(ALIASES.get(kind, kind))
        values = reference.to_dict() | {"rope_theta": (reference.rope_parameters or {}).get("rope_theta")}
        wrong = {key: (value, values.get(key)) for key, value in defaults.items() if values.get(key) != value}
        assert not wrong, (kind, wrong)
    for kind, tied in TIED.items():
        whole = AutoConfig.for_model(kind).to_dict()
        assert whole["tie_word_embeddings"] == tied, kind


def read(kind: str, **values: Any) -> dict[str, Any]:
    wrapper = wrapper_of({"model_type": kind, **values})
    assert wrapper is not None
    return dict(wrapper.config)


def test_configs_as_they_are_released(tmp_path) -> None:
    """Gemma 3 4B, LLaVA 1.5 and Qwen 2 VL leave out or flatten most of their text configs."""
    gemma = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    gemma |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    llava = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    flat = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    flat |= {
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": {"depth": 32},
    }
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6, "hidden_act": "silu"}
    flat |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "image_token_id": 151655, "video_token_id": 151656}
    for number, (kind, values, hidden, heads) in enumerate(
        (
            ("gemma3", {"text_config": gemma}, 2560, 8),
            ("llava", {"text_config": llava}, 4096, 32),
            ("qwen2_vl", flat, 1536, 12),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind, **values}))
        spec = describe(folder).spec
        assert (spec.hidden, spec.heads) == (hidden, heads)
    assert wrapper_of({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}) is None
    assert wrapper_of({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}) is None
    assert read("qwen2_vl", **flat)["tie_word_embeddings"] is True
