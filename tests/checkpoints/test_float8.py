"""Checkpoints in float8: dequantised as they are read, as transformers and compressed-tensors define it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import edit_config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tmjax import cli
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.float8 import Float8
from tmjax.checkpoints.headers import open_headers
from tmjax.checkpoints.hf import open_model
from tmjax.checkpoints.load import load_model
from tmjax.errors import CheckpointError, InputError

BLOCK = 64
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
GROUP = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP}}
MODELOPT = {"quant_algo": "FP8", "producer": {"name": "modelopt"}}
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def blocks(weight: torch.Tensor) -> torch.Tensor:
    """A scale per block; the last blocks may be smaller."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    return torch.stack(
        [
            torch.stack(
                [weight[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK].abs().max() for c in range(columns)]
            )
            for r in range(rows)
        ]
    )


#: By layout: its settings, the ending of the scales' names, and the largest magnitudes that a scale is for.
LAYOUTS = {
    "block": (FP8, "_scale_inv", blocks),
    "channel": (COMPRESSED, "_scale", lambda weight: weight.abs().amax(dim=1, keepdim=True)),
    "tensor": (MODELOPT, "_scale", lambda weight: weight.abs().max()),
}


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales, each for as many entries as it is meant for."""
    if scale.ndim < 2:
        return scale.expand(shape)
    if scale.shape[1] == 1:
        return scale.expand(shape)
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def quantised(source: Path, directory: Path, layout: str) -> dict[str, torch.Tensor]:
    """Writes a checkpoint in float8; returns the numbers that its projections stand for, in float32."""
    settings, ending, largest = LAYOUTS[layout]
    shutil.copytree(source, directory)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    meant = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = (largest(weight) / LARGEST).float()
        tensors[name] = (weight / spread(scale, weight.shape)).to(torch.float8_e4m3fn)
        tensors[name + ending] = scale
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
        meant[name] = tensors[name].float() * spread(scale, weight.shape)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, quantization_config=settings)
    return meant


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_the_numbers_times_their_scales(llama_dir, tmp_path, layout) -> None:
    meant = quantised(llama_dir, tmp_path / "model", layout)
    opened = open_headers(describe(tmp_path / "model"))
    assert len(meant) == 7 * opened.spec.layers and set(opened.index) == set(open_headers(describe(llama_dir)).index)
    for name, weight in meant.items():
        values = opened.index.read(name)
        assert values.dtype.name == "bfloat16"
        np.testing.assert_array_equal(values.astype(np.float32), weight.bfloat16().float().numpy())
        part = opened.index.read(name, (slice(70, 131), slice(3, 90)))
        np.testing.assert_array_equal(part, values[70:131, 3:90])
        np.testing.assert_array_equal(np.concatenate(list(opened.index.blocks(name))), values.reshape(-1))
    # bfloat16 has a 3 bits finer mantissa than float8, but scales have more: within a bfloat16 step of transformers.
    assert any("weights in float8 are read as bfloat16" in note for note in opened.notes)


def test_blocks_are_those_of_transformers(llama_dir, tmp_path) -> None:
    quantised(llama_dir, tmp_path / "model", "block")
    tensors = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    index = open_headers(describe(tmp_path / "model")).index
    reference = Fp8Dequantize(None)
    compared = 0
    for name, weight in tensors.items():
        if weight.dtype != torch.float8_e4m3fn or any(size % BLOCK for size in weight.shape):
            continue
        expected = reference._dequantize_one(weight, tensors[name + "_scale_inv"]).to(torch.bfloat16)
        np.testing.assert_array_equal(index.read(name).astype(np.float32), expected.float().numpy())
        compared += 1
    assert compared > 20


def test_as_a_source_and_converted_but_not_as_a_target(llama_dir, qwen2_dir, tmp_path, texts, capsys) -> None:
    meant = quantised(llama_dir, tmp_path / "model", "block")
    model = str(tmp_path / "model")
    arguments = ["--texts", texts["calibration"], "--alpha", "0.1", "--out", str(tmp_path / "run"), "--json"]
    assert cli.run(["doctor", "--source", model, "--target", str(qwen2_dir), *arguments[:2], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mergeable"] and any("float8" in note for note in report["notes"])
    assert cli.run(["merge", "--source", str(qwen2_dir), "--target", model, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the target {model} has float8 weights" in line and not (tmp_path / "run").exists()
    assert cli.run(["convert", model, str(tmp_path / "plain"), "--to", "hf"]) == 0
    written = safetensors.torch.load_file(tmp_path / "plain/model.safetensors")
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    plain, packed = load_model(tmp_path / "plain"), open_model(tmp_path / "model")
    assert all(np.array_equal(np.asarray(plain.params[path]), value[()]) for path, value in packed.params.items())


def test_settings_beside_the_config(llama_dir, tmp_path) -> None:
    quantised(llama_dir, tmp_path / "model", "tensor")
    edit_config(tmp_path / "model", quantization_config=None)
    (tmp_path / "model/hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert describe(tmp_path / "model").packing == Float8(np.dtype("bfloat16"), None)
    edit_config(tmp_path / "model", quantization_config={"quant_method": "fp8", "quant_algo": "MIXED_PRECISION"})
    with pytest.raises(InputError, match="quantised"):
        describe(tmp_path / "model")


def test_faults(llama_dir, tmp_path) -> None:
    quantised(llama_dir, tmp_path / "model", "block")
    file = tmp_path / "model/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    scale = tensors.pop(name + "_scale_inv")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"without a scale: {name}"):
        open_model(tmp_path / "model")
    tensors[name + "_scale_inv"] = scale[:, :-1].repeat(3, 1)[:5].contiguous()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="which do not divide it"):
        open_model(tmp_path / "model")
