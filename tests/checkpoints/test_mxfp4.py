"""Experts in MXFP4: read as transformers dequantises them, bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import SPEC, edit_config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tmjax.checkpoints.description import describe
from tmjax.checkpoints.headers import open_headers
from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model, require_plain
from tmjax.errors import CheckpointError, InputError, NonFiniteError
from tmjax.models.experts.mixture import Experts
from tmjax.models.spec import Rotary
from tools.make_checkpoint import make_checkpoint

YARN = Rotary(scaling="yarn", factor=4.0, original_positions=16, attention_factor=1.1, truncate=False)
GPT_OSS = dataclasses.replace(
    SPEC,
    hidden=64,
    mlp=32,
    qkv_bias=True,
    o_bias=True,
    sinks=True,
    rotary=YARN,
    windows=(8, 10**9, 8),
    experts=Experts(4, 2, 32, logit_bias=True, bias=True, limit=7.0, gain=1.702),
)
EXPERTS = "model.layers.{}.mlp.experts.{}"


@pytest.fixture
def packed(tmp_path):
    """A checkpoint with packed experts, and the numbers of these as transformers has them."""
    directory = make_checkpoint(tmp_path / "model", "gpt_oss", GPT_OSS)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    generator, meant = torch.Generator().manual_seed(0), {}
    for layer in range(GPT_OSS.layers):
        for projection in ("gate_up_proj", "down_proj"):
            name = EXPERTS.format(layer, projection)
            experts, n_in, n_out = tensors.pop(name).shape
            blocks = torch.randint(256, (experts, n_out, n_in // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(100, 140, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
            scales.view(-1)[:3] = torch.tensor([0, 1, 250], dtype=torch.uint8)  # next to the ends of bfloat16's range
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, quantization_config={"quant_method": "mxfp4"})
    return directory, tensors, meant


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint16)


def test_numbers_are_those_of_transformers(packed, tmp_path) -> None:
    directory, _, meant = packed
    opened = open_headers(describe(directory))
    for name, weight in meant.items():
        expected = weight.view(torch.uint16).numpy()
        assert opened.index[name].shape == tuple(weight.shape)
        np.testing.assert_array_equal(bits(opened.index.read(name)), expected)
        part = (slice(1, 3), slice(5, 40), slice(2, 9))
        np.testing.assert_array_equal(bits(opened.index.read(name, part)), expected[part])
        blocks = np.concatenate([block.copy() for block in opened.index.blocks(name)])
        np.testing.assert_array_equal(bits(blocks), expected.reshape(-1))
    assert "weights in MXFP4 are read as bfloat16" in opened.notes
    out = export(load_model(directory), tmp_path / "plain")
    written = safetensors.torch.load_file(out / "model.safetensors")
    assert all(torch.equal(written[name].view(torch.uint16), x.view(torch.uint16)) for name, x in meant.items())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    require_plain(out)
    with pytest.raises(InputError, match="has MXFP4 weights"):
        require_plain(directory)


def test_faults(packed) -> None:
    directory, tensors, _ = packed
    name = EXPERTS.format(1, "down_proj")
    scales = tensors[f"{name}_scales"]

    def written(**changes) -> None:
        changed = {key: value for key, value in (tensors | changes).items() if value is not None}
        safetensors.torch.save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})

    for wrong in (None, scales[:, 1:].clone()):
        written(**{f"{name}_scales": wrong})
        with pytest.raises(CheckpointError, match=f"do not fit each other: {name}"):
            load_model(directory)
    written(**{f"{name}_scales": torch.full_like(scales, 255)})
    with pytest.raises(NonFiniteError, match=name):
        load_model(directory)
