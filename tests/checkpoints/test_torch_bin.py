"""Checkpoints in PyTorch's format: the same tensors as from safetensors, and every way in which they can be damaged."""

import builtins
import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import QWEN2, SPEC, refused, stored
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

from tmjax import cli
from tmjax.checkpoints import hf
from tmjax.checkpoints.formats.safetensors import INDEX_NAME, TensorIndex
from tmjax.checkpoints.formats.torch_bin import BIN_INDEX_NAME, BIN_SINGLE_NAME, TorchIndex
from tmjax.checkpoints.formats.weights import open_weights
from tmjax.checkpoints.load import load_model
from tmjax.errors import CheckpointError, InputError
from tmjax.runs.hashes import sha256_checkpoint
from tools.make_checkpoint import make_checkpoint


def to_bin(directory: Path, *, sharded: bool = False, change=lambda tensors: tensors) -> Path:
    """Replaces the safetensors of a checkpoint by PyTorch files."""
    files = sorted(directory.glob("*.safetensors"))
    weight_map = {}
    for number, file in enumerate(files, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(files):05d}.bin" if sharded else BIN_SINGLE_NAME
        tensors = change(load_file(file))
        torch.save(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
        file.unlink()
    if sharded:
        (directory / INDEX_NAME).unlink()
        (directory / BIN_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.fixture
def llama(tmp_path) -> Path:
    return to_bin(make_checkpoint(tmp_path / "llama", "llama", SPEC))


@pytest.fixture
def shards(tmp_path) -> Path:
    directory = make_checkpoint(tmp_path / "sharded", "llama", SPEC, dtype="bfloat16", max_shard_size="8KB")
    return to_bin(directory, sharded=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["5GB", "8KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_same_tensors_as_from_safetensors(tmp_path, family, dtype, size):
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=16)
        model = GPT2LMHeadModel(config).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path / "x", max_shard_size=size)
        directory = tmp_path / "x"
    else:
        directory = make_checkpoint(tmp_path / "x", family, QWEN2, dtype=dtype, max_shard_size=size)
    before, params = stored(directory), load_model(directory).params
    assert len(list(directory.glob("*.safetensors"))) == 1 or size == "8KB"
    to_bin(directory, sharded=size == "8KB")
    model = load_model(directory)
    for path, value in params.items():
        assert np.asarray(value).tobytes() == np.asarray(model.params[path]).tobytes()
    assert stored(hf.export(model, tmp_path / "exported")) == before
    assert cli.run(["convert", str(directory), str(tmp_path / "streamed"), "--to", "hf"]) == 0
    assert stored(tmp_path / "streamed") == before


@pytest.mark.parametrize(
    "index", [(), (slice(2, 5),), (slice(None), slice(1, 3)), (slice(5, 2),), (slice(-2, None),), (slice(4, 99),)]
)
def test_slices_equal_numpy_slices(tmp_path, index):
    value = torch.randn(6, 4, 3).to(torch.bfloat16)
    torch.save(
        {"x": value, "turned": value.permute(2, 1, 0).contiguous().permute(2, 1, 0), "scalar": torch.tensor(2.5)},
        tmp_path / BIN_SINGLE_NAME,
    )
    read = TorchIndex(tmp_path)
    want = value.float().numpy()[index]
    for name in ("x", "turned"):
        np.testing.assert_array_equal(read.read(name, index).astype(np.float32), want)
    assert read.read("scalar") == np.float32(2.5)
    with pytest.raises(ValueError, match="step"):
        read.read("x", (slice(None, None, 2),))


def test_shared_storages(tmp_path):
    """A tied head is the same storage twice; slices of one storage are tensors of their own."""
    directory = make_checkpoint(tmp_path / "x", "qwen2", QWEN2)

    def tie(tensors: dict) -> dict:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    to_bin(directory, change=tie)
    assert "lm_head.weight" in stored(hf.export(load_model(directory), tmp_path / "again"))
    whole = torch.arange(12.0)
    torch.save({"a": whole[:6].view(2, 3), "b": whole[6:]}, tmp_path / BIN_SINGLE_NAME)
    np.testing.assert_array_equal(TorchIndex(tmp_path).read("b"), np.arange(6.0, 12))


def test_parameters_and_a_wrapping_state_dict(tmp_path):
    torch.save({"state_dict": {"x": torch.nn.Parameter(torch.ones(3))}}, tmp_path / BIN_SINGLE_NAME)
    np.testing.assert_array_equal(TorchIndex(tmp_path).read("x"), np.ones(3))


def test_safetensors_win_and_only_they_are_hashed(tmp_path):
    directory = make_checkpoint(tmp_path / "x", "llama", SPEC)
    before = sha256_checkpoint(directory)
    (directory / BIN_SINGLE_NAME).write_bytes(b"not read")
    assert isinstance(open_weights(directory), TensorIndex)
    assert sha256_checkpoint(directory) == before


def test_the_hash_covers_the_files_that_are_read(llama, shards):
    for directory, name in ((llama, BIN_SINGLE_NAME), (shards, sorted(shards.glob("*.bin"))[1].name)):
        before = sha256_checkpoint(directory)
        (directory / "optimizer.bin").write_bytes(b"no weights")
        assert sha256_checkpoint(directory) == before
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)
        assert sha256_checkpoint(directory) != before


def test_one_shard_at_a_time(shards):
    index = open_weights(shards)
    files = {info.file for info in index.values()}
    assert len(files) > 2
    for name in index:
        index.read(name)
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".bin" in line}
        assert mapped == {str(index[name].file)}


def test_without_torch(llama, monkeypatch):
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    refused(llama, "pip install 'tmjax[torch]'", "safetensors", kind=InputError)


class Evil:
    """Unpickled freely, it would make a directory."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_no_pickle_runs(llama, tmp_path):
    trace = tmp_path / "was here"
    torch.save({"x": Evil(str(trace))}, llama / BIN_SINGLE_NAME)
    refused(llama, "holds more than tensors")
    assert not trace.exists()
    torch.load(llama / BIN_SINGLE_NAME, weights_only=False)
    assert trace.exists()  # the file would have done it


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "mapping from names to tensors"),
        ({"x": 3}, "mapping from names to tensors"),
        ({3: torch.ones(2)}, "mapping from names to tensors"),
        ({"two\nlines": torch.ones(2)}, "mapping from names to tensors"),
        ({"x": torch.ones(2, dtype=torch.int8)}, "dtype int8, as quantised"),
        ({"x": torch.ones(2, dtype=torch.float64)}, "cast it to float32"),
        ({"x": torch.ones(2, 2).to_sparse()}, "sparse"),
    ],
)
def test_what_is_no_plain_state_dict(llama, value, message):
    torch.save(value, llama / BIN_SINGLE_NAME)
    refused(llama, message)


def test_old_format_and_compression(llama):
    file = llama / BIN_SINGLE_NAME
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    refused(llama, "before 1.6")
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(llama / "small", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in archive.namelist():
            small.writestr(entry, archive.read(entry))
    (llama / "small").replace(file)
    refused(llama, "compressed")


def test_buffers_of_any_dtype_are_left_out(llama, tmp_path):
    file = llama / BIN_SINGLE_NAME
    before = load_model(llama).params
    tensors = torch.load(file, weights_only=True)
    tensors |= {"model.layers.0.attention.bias": torch.ones(3, 3, dtype=torch.bool)}
    torch.save(tensors, file)
    assert load_model(llama).params.keys() == before.keys()


def test_missing_and_misplaced_shards(shards):
    index = json.loads((shards / BIN_INDEX_NAME).read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    kept = shutil.copy(shards / first, shards.parent / "kept")
    (shards / first).unlink()
    refused(shards, f"shard {first} is missing")
    shutil.copy(shards / second, shards / first)
    refused(shards, f"is not in {first}", "more")
    shutil.move(kept, shards / first)
    load_model(shards)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(llama, tmp_path, capsys, keep):
    content = (llama / BIN_SINGLE_NAME).read_bytes()
    (llama / BIN_SINGLE_NAME).write_bytes(content[: int(len(content) * keep)])
    assert cli.run(["convert", str(llama), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert "truncated" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_changes_while_it_is_read(llama):
    index = open_weights(llama)
    torch.save({"other": torch.ones(2)}, llama / BIN_SINGLE_NAME)
    with pytest.raises(CheckpointError, match="changed"):
        index.read(next(iter(index)))


def test_directory_without_any(tmp_path):
    with pytest.raises(InputError, match="has neither"):
        TorchIndex(tmp_path)


@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_bits_flipped_anywhere(tmp_path_factory, capsys, flips):
    """One line and exit code 2, or a whole checkpoint: a flipped bit of a weight is a weight."""
    folder = tmp_path_factory.mktemp("flipped")
    spec = dataclasses.replace(SPEC, layers=1, vocab=6, hidden=8, heads=2, kv_heads=1, head_dim=4, mlp=8)
    directory = to_bin(make_checkpoint(folder / "x", "llama", spec))
    content = bytearray((directory / BIN_SINGLE_NAME).read_bytes())
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    (directory / BIN_SINGLE_NAME).write_bytes(content)
    code = cli.run(["convert", str(directory), str(folder / "out"), "--to", "hf"])
    error = capsys.readouterr().err
    assert code in (0, 2)
    if code == 2:
        assert error.startswith("tmjax: error: ")
        assert error.count("\n") == 1
        assert not list(folder.glob("out*"))
    else:
        load_model(folder / "out")
    shutil.rmtree(folder)
