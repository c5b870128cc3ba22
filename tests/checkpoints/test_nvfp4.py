"""Checkpoints in NVFP4: a number is its four bits times both scales."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import edit_config

from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.nvfp4 import Nvfp4
from tmjax.checkpoints.headers import open_headers
from tmjax.checkpoints.hf import open_model
from tmjax.errors import CheckpointError

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


def number(bits: int) -> float:
    """Sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = bits >> 1 & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if bits & 8 else size


@pytest.fixture
def packed(llama_dir, tmp_path):
    """A checkpoint with packed projections, and their numbers in float32."""
    directory = tmp_path / "model"
    shutil.copytree(llama_dir, directory)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    generator, meant = torch.Generator().manual_seed(0), {}
    values = torch.tensor([number(bits) for bits in range(16)])
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, size = tensors[name].shape
        assert size % 16 == 0
        bits = torch.randint(16, (out, size), generator=generator)
        scale = (torch.rand(out, size // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
        second = torch.tensor(1e-4 * (1 + len(meant)))
        tensors[name] = (bits[:, ::2] + 16 * bits[:, 1::2]).to(torch.uint8)
        tensors |= {f"{name}_scale": scale, f"{name}_scale_2": second}
        tensors[name.replace("weight", "input_scale")] = torch.tensor(0.5)
        meant[name] = values[bits] * (scale.float() * second).repeat_interleave(16, 1)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, quantization_config=NVFP4)
    return directory, tensors, meant


def test_weights_are_the_numbers_times_both_scales(packed, llama_dir) -> None:
    directory, _, meant = packed
    opened = open_headers(describe(directory))
    assert set(opened.index) == set(open_headers(describe(llama_dir)).index)
    for name, weight in meant.items():
        values = opened.index.read(name)
        np.testing.assert_array_equal(values.astype(np.float32), weight.bfloat16().float().numpy())
        part = opened.index.read(name, (slice(70, 131), slice(3, 90)))
        np.testing.assert_array_equal(part, values[70:131, 3:90])
    assert any("weights in NVFP4 are read as bfloat16" in note for note in opened.notes)
    edit_config(directory, quantization_config=None)
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert describe(directory).packing == Nvfp4()
    assert open_model(directory).params.keys() == open_model(llama_dir).params.keys()


def test_faults(packed) -> None:
    directory, tensors, _ = packed
    name = "model.layers.0.mlp.up_proj.weight"
    for end, wrong in (("_scale", None), ("_scale", tensors[f"{name}_scale"][:, 1:].clone()), ("_scale_2", None)):
        changed = {key: value for key, value in (tensors | {name + end: wrong}).items() if value is not None}
        safetensors.torch.save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"do not fit: {name}"):
            open_model(directory)
