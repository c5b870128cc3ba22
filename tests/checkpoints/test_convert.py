"""Checkpoint -> Flax -> checkpoint, bit for bit, and every way in which a checkpoint can be damaged."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore as ts
from helpers import QWEN2, SPEC, edit_config, edit_tensors, read_config, refused, stored
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tmjax import cli
from tmjax.checkpoints import hf, orbax
from tmjax.checkpoints.copying import copy_out_of_core
from tmjax.checkpoints.formats.safetensors import DTYPES_BY_NAME as DTYPES
from tmjax.checkpoints.formats.safetensors import INDEX_NAME, SINGLE_NAME
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.commands.convert import convert
from tmjax.errors import InputError, NonFiniteError
from tmjax.files.owned import RECORD
from tmjax.models.decoder import init_params, parameter_shapes
from tmjax.models.families import FAMILIES
from tmjax.models.spec import DecoderSpec
from tools.make_checkpoint import make_checkpoint


@pytest.fixture
def llama(tmp_path) -> Path:
    """A small untied float32 Llama checkpoint, to be damaged."""
    return make_checkpoint(tmp_path / "llama", "llama", SPEC)


@pytest.fixture(scope="module", params=["source", "target", "bf16-sharded", "f16-sharded-tied", "biases"])
def checkpoint(request, tmp_path_factory, llama_dir, qwen2_dir) -> Path:
    path = tmp_path_factory.mktemp("made") / "checkpoint"
    biased = dataclasses.replace(SPEC, qkv_bias=True, o_bias=True, mlp_bias=True)
    return {
        "source": lambda: llama_dir,
        "target": lambda: qwen2_dir,
        "bf16-sharded": lambda: make_checkpoint(path, "llama", SPEC, dtype="bfloat16", max_shard_size="3KB"),
        "f16-sharded-tied": lambda: make_checkpoint(path, "qwen2", QWEN2, dtype="float16", max_shard_size="3KB"),
        "biases": lambda: make_checkpoint(path, "llama", biased),
    }[request.param]()


def test_hf_to_flax_to_hf_is_bit_exact(checkpoint, tmp_path):
    model = load_model(checkpoint)
    again = hf.export(model, tmp_path / "again", max_shard_size="100KB")
    assert stored(again) == stored(checkpoint)
    assert read_config(again) == read_config(checkpoint)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", INDEX_NAME, RECORD):
            assert (again / file.name).read_bytes() == file.read_bytes()
    assert {path: value.shape for path, value in model.params.items()} == parameter_shapes(model.spec)


def test_hf_to_orbax_to_hf_is_bit_exact(checkpoint, tmp_path):
    model = load_model(checkpoint)
    saved = orbax.save(model, tmp_path / "orbax")
    loaded = load_model(saved)
    again = hf.export(loaded, tmp_path / "again")
    assert loaded.spec == model.spec
    assert stored(again) == stored(checkpoint)
    assert read_config(again) == read_config(checkpoint)


def test_mixed_dtypes_and_large_values_survive(llama, tmp_path):
    def change(tensors: dict) -> None:
        for name, value in tensors.items():
            if value.ndim > 1:
                tensors[name] = value.astype(ml_dtypes.bfloat16)
        tensors["model.embed_tokens.weight"][:] = 3e38  # the sum overflows, no entry does

    edit_tensors(llama, change)
    assert stored(hf.export(load_model(llama), tmp_path / "again")) == stored(llama)


def test_with_params_keeps_dtypes(qwen2_dir, llama_dir):
    model = load_model(llama_dir)
    doubled = model.with_params({path: value.astype(jnp.float32) * 2 for path, value in model.params.items()})
    assert {value.dtype for value in doubled.params.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(doubled.params["embed.weight"], model.params["embed.weight"] * 2)
    assert model.size == sum(np.prod(shape) for _, shape, _ in stored(llama_dir).values())


@pytest.mark.skipif("jax.device_count() < 4", reason="needs four devices (fake ones on a CPU)")
def test_placement_on_a_mesh(llama_dir):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def placement(row, shape):
        axis = "model" if shape[-1] % 4 == 0 else None
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), axis))

    plain, sharded = load_model(llama_dir), load_model(llama_dir, placement=placement)
    assert len(sharded.params["blocks.q.weight"].addressable_shards) == 4
    assert sharded.params["blocks.q.weight"].addressable_shards[0].data.shape == (6, 192, 48)
    for path, value in plain.params.items():
        np.testing.assert_array_equal(value, sharded.params[path])


def test_export_never_leaves_half_a_checkpoint(llama, tmp_path):
    model = load_model(llama)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        hf.export(model, out)
    with pytest.raises(InputError, match=r"did not write or what was changed since \(precious\)"):
        hf.export(model, out, overwrite=True)
    assert [file.name for file in out.iterdir()] == ["precious"]
    hf.export(model, tmp_path / "other")
    broken = dataclasses.replace(model, params={k: v for k, v in model.params.items() if k != "norm.weight"})
    with pytest.raises(KeyError):
        hf.export(broken, tmp_path / "other", overwrite=True)
    assert stored(tmp_path / "other") == stored(llama)
    hf.export(model, tmp_path / "other", overwrite=True, max_shard_size="3KB")
    assert stored(tmp_path / "other") == stored(llama)
    assert not (tmp_path / "other" / SINGLE_NAME).exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama", "other", "out"]


def test_all_differences_in_one_error(llama):
    def change(tensors: dict) -> None:
        for layer in range(3):
            for name in ("q", "k", "v"):
                del tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
        tensors["stray.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(25, np.float32)
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.float16)

    edit_tensors(llama, change)
    refused(
        llama,
        "missing tensor model.layers.0.self_attn.q_proj.weight",
        "and 3 more",
        "unexpected tensor stray.weight",
        "model.norm.weight has shape [25], expected [24]",
        "model.layers.1.mlp.up_proj.weight is float16, other layers are float32",
    )


def test_a_config_of_another_size_is_refused(llama):
    edit_config(llama, num_key_value_heads=3, num_hidden_layers=4)
    refused(llama, "missing tensor model.layers.3.", "k_proj.weight has shape [16, 24], expected [24, 24]")


def test_transposed_and_flattened_tensors_are_refused(llama):
    edit_tensors(llama, lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)}))
    refused(llama, "lm_head.weight has shape [24, 50], expected [50, 24]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_non_finite_weights(tmp_path, value, dtype):
    directory = make_checkpoint(tmp_path / "x", "llama", SPEC, dtype=dtype)
    name = "model.layers.2.mlp.down_proj.weight"
    edit_tensors(directory, lambda tensors: tensors[name].__setitem__((3, 5), value))
    refused(directory, name, "NaN or infinity", kind=NonFiniteError)


def test_float64_is_refused_rather_than_rounded(llama):
    edit_tensors(llama, lambda t: t.update({name: value.astype(np.float64) for name, value in t.items()}))
    refused(llama, "dtype F64")


def test_rotary_buffers_of_old_checkpoints_are_ignored(llama, tmp_path):
    expected = stored(llama)
    edit_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert stored(hf.export(load_model(llama), tmp_path / "again")) == expected


def test_tied_head_on_disk(tmp_path):
    directory = make_checkpoint(tmp_path / "x", "qwen2", QWEN2, dtype="bfloat16")
    assert "lm_head.weight" not in stored(directory)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    model = load_model(directory)
    assert stored(hf.export(model, tmp_path / "again")) == stored(directory)
    orbax.save(model, tmp_path / "orbax")
    assert stored(hf.export(load_model(tmp_path / "orbax"), tmp_path / "and again")) == stored(directory)
    edit_tensors(directory, lambda t: t["lm_head.weight"].__setitem__((0, 0), 9))
    refused(directory, "lm_head.weight is tied, but it differs")


def test_damaged_orbax_directories(llama, tmp_path):
    model = load_model(llama)
    good = orbax.save(model, tmp_path / "good")
    marker = json.loads((good / "tmjax.json").read_text())

    def damaged(name: str, change: dict | None = None) -> Path:
        copy = Path(shutil.copytree(good, tmp_path / name))
        if change is not None:
            (copy / "tmjax.json").write_text(json.dumps(marker | change))
        return copy

    refused(damaged("format", {"format": 99}), "format 99", kind=InputError)
    refused(damaged("shapes", {"params": {}}), "embed.weight")
    shutil.rmtree(damaged("gone") / "params")
    refused(tmp_path / "gone", "damaged")
    (damaged("json") / "tmjax.json").write_text("{")
    refused(tmp_path / "json", "not readable JSON", kind=InputError)
    bad = model.with_params(dict(model.params) | {"norm.weight": model.params["norm.weight"].at[0].set(jnp.nan)})
    refused(orbax.save(bad, tmp_path / "nan"), "norm.weight holds NaN", kind=NonFiniteError)


def test_paths_that_are_no_checkpoint(llama, tmp_path):
    refused(tmp_path / "absent", "does not exist", kind=InputError)
    refused(llama / "config.json", "is a file", kind=InputError)
    refused(tmp_path, "config.json does not exist", kind=InputError)
    (llama / SINGLE_NAME).unlink()
    refused(llama, "has neither", kind=InputError)


@pytest.mark.parametrize(("family", "spec"), [("llama", SPEC), ("qwen2", QWEN2)])
def test_table_and_decoder_hold_the_same_parameters(family, spec):
    rows = FAMILIES[family].params(spec)
    table = {row.path: row.stacked_shape(spec) for row in rows if row.tied_to is None}
    fresh = jax.eval_shape(lambda key: init_params(spec, key), jax.random.key(0))
    assert table == parameter_shapes(spec) == {path: value.shape for path, value in fresh.items()}
    names = [name for row in rows for name in row.names(spec)]
    assert len(set(names)) == len(names)


def test_fresh_parameters():
    for path, value in init_params(QWEN2, jax.random.key(0)).items():
        if path.endswith("norm.weight"):
            assert (value == 1).all()
        elif path.endswith(".bias"):
            assert (value == 0).all()
        else:
            assert value.std() == pytest.approx(0.02, rel=0.1)
            assert value.ndim == 2 or not np.array_equal(value[0], value[1])


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_streaming_writes_the_files_that_export_writes(checkpoint, tmp_path, size):
    hf.export(load_model(checkpoint), tmp_path / "exported", max_shard_size=size)
    done = copy_out_of_core(checkpoint, tmp_path / "streamed", max_shard_size=size)
    assert files(tmp_path / "streamed") == files(tmp_path / "exported")
    assert done.parameters == load_model(checkpoint).size


def cast(tensors: dict, dtype: np.dtype) -> dict[str, bytes]:
    return {name: value.astype(dtype).tobytes() for name, value in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16"])
def test_casting(tmp_path, capsys, monkeypatch, dtype, stored_as):
    monkeypatch.setattr("tmjax.checkpoints.formats.safetensors.BLOCK_BYTES", 1000)  # several blocks per tensor
    directory = make_checkpoint(tmp_path / "x", "qwen2", QWEN2, dtype=stored_as)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    want = cast(safetensors.numpy.load_file(directory / SINGLE_NAME), DTYPES[dtype])

    def run(source: Path, name: str, to: str) -> Path:
        arguments = ["convert", str(source), str(tmp_path / name), "--to", to, "--dtype", dtype, "--json"]
        assert cli.run(arguments) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["dtype"] == dtype
        return tmp_path / name

    streamed = run(directory, "streamed", "hf")
    through_orbax = run(run(directory, "orbax", "orbax"), "again", "hf")
    plain_orbax = orbax.save(load_model(directory), tmp_path / "plain orbax")
    for out in (streamed, through_orbax, run(plain_orbax, "cast later", "hf")):
        assert {name: data for name, (_, _, data) in stored(out).items()} == want
        assert read_config(out) == read_config(directory) | {"dtype": dtype}


def test_the_config_says_what_was_cast(llama, tmp_path):
    edit_config(llama, torch_dtype="float32", dtype=...)
    copy_out_of_core(llama, tmp_path / "old", dtype=DTYPES["bfloat16"])
    assert read_config(tmp_path / "old") == read_config(llama) | {"torch_dtype": "bfloat16"}
    edit_config(llama, torch_dtype=...)
    copy_out_of_core(llama, tmp_path / "none", dtype=DTYPES["bfloat16"])
    assert read_config(tmp_path / "none")["torch_dtype"] == "bfloat16"
    copy_out_of_core(llama, tmp_path / "kept")
    assert read_config(tmp_path / "kept") == read_config(llama)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_values_that_the_dtype_cannot_hold(llama, tmp_path, capsys, to):
    edit_tensors(llama, lambda t: t["model.norm.weight"].__setitem__(3, 1e5))
    assert cli.run(["convert", str(llama), str(tmp_path / "out"), "--to", to, "--dtype", "float16"]) == 2
    assert "norm.weight does not fit float16" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hf", "--dtype", "int8"], "--dtype 'int8' is not known"),
        (["--to", "gguf"], "--to 'gguf' is not known"),
        (["--to", "hf", "--max-shard-size", "many"], "is not a size"),
        (["--to", "orbax", "--max-shard-size", "many"], "is not a size"),
    ],
)
def test_options_of_convert(llama, tmp_path, capsys, options, message):
    assert cli.run(["convert", str(llama), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_streaming_refuses_what_loading_refuses(llama, tmp_path):
    def same_error() -> None:
        messages = []
        for work in (lambda: load_model(llama), lambda: copy_out_of_core(llama, tmp_path / "out")):
            with pytest.raises(InputError) as caught:
                work()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert not list(tmp_path.glob("out*"))

    good = (llama / SINGLE_NAME).read_bytes()
    for change in (
        lambda t: t.pop("model.norm.weight"),
        lambda t: t.update({"stray": np.zeros(3, np.float32)}),
        lambda t: t.update({"model.norm.weight": np.zeros(25, np.float32)}),
        lambda t: t["model.layers.2.mlp.down_proj.weight"].__setitem__((3, 5), np.nan),
    ):
        edit_tensors(llama, change)
        same_error()
        (llama / SINGLE_NAME).write_bytes(good)
    edit_config(llama, tie_word_embeddings=True)
    same_error()


def test_a_checkpoint_is_never_replaced_by_its_own_conversion(llama, tmp_path, capsys):
    before = stored(llama)
    assert cli.run(["convert", str(llama), str(llama), "--to", "hf", "--dtype", "bfloat16", "--overwrite"]) == 2
    assert "is the output" in capsys.readouterr().err
    assert stored(llama) == before


MEASURE = """
import re, sys
from pathlib import Path
from tmjax.commands.convert import convert, parse_dtype
import jax.numpy as jnp
if sys.argv[4] == "bin":
    import torch
# Not ru_maxrss, which begins at what the parent process held.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
jnp.zeros(3).block_until_ready()
base = peak()
convert(sys.argv[1], Path(sys.argv[2]), to=sys.argv[3], dtype=parse_dtype(sys.argv[5] or None), max_shard_size="64MB")
print(peak() - base)
"""


def growth(repo: Path, source: Path, out: Path, to: str, kind: str = "safetensors", dtype: str = "") -> float:
    """MiB by which the peak memory of a process grows while it converts."""
    arguments = [str(source), str(out), to, kind, dtype]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory"
)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """About 300 MB in shards of 64 MB, its largest tensor 33 MB."""
    spec = DecoderSpec(
        vocab=8192, hidden=1024, layers=5, heads=8, kv_heads=8, head_dim=128, mlp=2560, max_positions=64,
        tied_embeddings=True,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("large") / "checkpoint"
    make_checkpoint(directory, "llama", spec, scale=0.02, max_shard_size="64MB")
    assert sum(file.stat().st_size for file in directory.glob("*.safetensors")) > 250e6
    return directory


@needs_linux
@pytest.mark.parametrize(
    ("kind", "dtype", "limit"),
    [
        ("safetensors", "", 32),
        pytest.param("safetensors", "bfloat16", 64, marks=pytest.mark.slow),
        ("bin", "", 64 + 34 + 100),
    ],
)
def test_streaming_holds_a_shard_at_most(large, tmp_path, repo, kind, dtype, limit):
    """Blocks only, less than the largest tensor, less than a shard where they are cast, which the allocator keeps in
    pieces; of PyTorch's format, which is mapped into memory, a shard.
    """
    if kind == "bin":
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        index, bins = json.loads((large / INDEX_NAME).read_text())["weight_map"], tmp_path / "bin"
        bins.mkdir()
        for name in set(index.values()):
            torch.save(load_file(large / name), bins / name.replace("safetensors", "bin"))
        weight_map = {name: file.replace("safetensors", "bin") for name, file in index.items()}
        (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        shutil.copy(large / "config.json", bins)
    grown = growth(repo, bins if kind == "bin" else large, tmp_path / "out", "hf", kind, dtype)
    assert grown < limit, f"peak memory grew by {grown:.0f} MiB"
    shutil.rmtree(tmp_path)  # pytest keeps the folders of the last runs


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """415 MB, nearly all in three stacked parameters of 134 MB each, whose layers are 4 MB."""
    spec = DecoderSpec(
        vocab=64, hidden=256, layers=32, heads=2, kv_heads=2, head_dim=32, mlp=4096, max_positions=64,
        tied_embeddings=True,
    )  # fmt: skip
    directory = make_checkpoint(tmp_path_factory.mktemp("deep") / "checkpoint", "llama", spec, scale=0.02)
    assert 410e6 < (directory / SINGLE_NAME).stat().st_size < 420e6
    return directory


@needs_linux
def test_orbax_is_converted_layer_by_layer(deep, tmp_path, repo):
    """Both ways with less memory than one of the stacked parameters takes, a third of the checkpoint."""
    there = growth(repo, deep, tmp_path / "orbax", "orbax")
    back = growth(repo, tmp_path / "orbax", tmp_path / "back", "hf")
    assert stored(tmp_path / "back") == stored(deep)
    assert there < 128, f"peak memory grew by {there:.0f} MiB"
    assert back < 64, f"peak memory grew by {back:.0f} MiB"
    shutil.rmtree(tmp_path)  # pytest keeps the folders of the last runs


def write_as_before(model: Model, path: Path) -> Path:
    """An orbax directory as the first versions wrote it: JAX arrays by orbax itself, every parameter one chunk."""
    small = dataclasses.replace(model, params={name: value[..., :1] for name, value in model.params.items()})
    orbax.save(small, path)
    marker = json.loads((path / "tmjax.json").read_text())
    for name, value in model.params.items():
        marker["params"][name]["shape"] = list(value.shape)
    (path / "tmjax.json").write_text(json.dumps(marker))
    shutil.rmtree(path / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((path / "params").absolute(), dict(model.params))
    return path


def chunks(directory: Path) -> dict[str, tuple[int, ...]]:
    with ocp.StandardCheckpointer() as checkpointer:
        held = checkpointer.metadata((directory / "params").absolute()).item_metadata.tree
    return {name: tuple(value.storage.chunk_shape) for name, value in held.items()}


def test_chunks_of_earlier_versions_are_decoded_once(llama_dir, tmp_path):
    """All layers of such a chunk come from one reading of it, not one each."""
    before = write_as_before(load_model(llama_dir), tmp_path / "before")

    def bytes_read() -> int:
        name = "/tensorstore/kvstore/file/bytes_read"
        return sum(each["value"] for m in ts.experimental_collect_matching_metrics(name) for each in m["values"])

    start = bytes_read()
    convert(str(before), tmp_path / "hf", to="hf")
    size = sum(file.stat().st_size for file in (before / "params").rglob("d/*"))
    assert size / 2 < bytes_read() - start < 1.5 * size
    assert stored(tmp_path / "hf") == stored(llama_dir)


def test_what_earlier_versions_wrote_is_read(checkpoint, tmp_path):
    model = load_model(checkpoint)
    before = write_as_before(model, tmp_path / "before")
    assert chunks(before) == {name: value.shape for name, value in model.params.items()}
    for to, out in (("hf", tmp_path / "hf"), ("orbax", tmp_path / "orbax")):
        convert(str(before), out, to=to)
    assert stored(tmp_path / "hf") == stored(checkpoint)
    assert stored(hf.export(load_model(before), tmp_path / "again")) == stored(checkpoint)
    assert all(chunk[0] == 1 for name, chunk in chunks(tmp_path / "orbax").items() if name.startswith("blocks."))
    assert stored(hf.export(load_model(tmp_path / "orbax"), tmp_path / "last")) == stored(checkpoint)


@pytest.mark.parametrize("parts", [1, 37])
def test_orbax_reads_what_we_write(checkpoint, tmp_path, monkeypatch, parts):
    """As NumPy arrays and on to devices, whatever the chunks; they are of whole rows of one layer, the last smaller."""
    model = load_model(checkpoint)
    size = max(value.nbytes for value in model.params.values()) // parts
    monkeypatch.setattr("tmjax.checkpoints.formats.orbax_arrays.CHUNK_BYTES", size)
    convert(str(checkpoint), tmp_path / "orbax", to="orbax")
    for name, shape in chunks(tmp_path / "orbax").items():
        whole = model.params[name].shape
        axis = 1 if name.startswith("blocks.") else 0
        assert shape[:axis] == (1,) * axis
        assert shape[axis + 1 :] == whole[axis + 1 :]
        row = math.prod(whole[axis + 1 :]) * model.params[name].dtype.itemsize
        assert shape[axis] * row <= max(size, row)
        assert shape[axis] == whole[axis] or (shape[axis] + 1) * row > size / 2
    path = (tmp_path / "orbax/params").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(path)
        mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
        spread = {
            name: NamedSharding(mesh, PartitionSpec("x" if value.shape[0] % jax.device_count() == 0 else None))
            for name, value in model.params.items()
        }
        wanted = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=spread[name])
            for name, value in model.params.items()
        }
        sharded = checkpointer.restore(path, wanted)
    for name, value in model.params.items():
        assert isinstance(plain[name], np.ndarray)
        assert plain[name].tobytes() == np.asarray(sharded[name]).tobytes() == np.asarray(value).tobytes()
        assert sharded[name].sharding == spread[name]
    convert(str(tmp_path / "orbax"), tmp_path / "hf", to="hf")
    assert stored(tmp_path / "hf") == stored(checkpoint)


def test_damaged_orbax_chunks(llama, tmp_path, capsys):
    convert(str(llama), tmp_path / "good", to="orbax")
    data = max((tmp_path / "good").rglob("d/*"), key=lambda file: file.stat().st_size)

    def refuses(name: str) -> str:
        for arguments in (["--to", "hf"], ["--to", "orbax"]):
            assert cli.run(["convert", str(tmp_path / name), str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 2
        assert not list(tmp_path.glob("out*"))
        return error

    for name, length in (("cut", data.stat().st_size // 2), ("empty", 0)):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        with (tmp_path / name / data.relative_to(tmp_path / "good")).open("r+b") as stream:
            stream.truncate(length)
        assert "is damaged" in refuses(name)
    shutil.copytree(tmp_path / "good", tmp_path / "other")
    marker = json.loads((tmp_path / "other/tmjax.json").read_text())
    marker["params"]["norm.weight"]["dtype"] = "bfloat16"
    (tmp_path / "other/tmjax.json").write_text(json.dumps(marker))
    assert "norm.weight is float32 [24], expected bfloat16 [24]" in refuses("other")


def test_nothing_is_left_of_what_was_interrupted(llama, tmp_path):
    opened = hf.open_model(llama)

    def interrupted(slices: tuple[slice, ...]) -> np.ndarray:
        raise KeyboardInterrupt

    last = dataclasses.replace(opened.params["norm.weight"], read=interrupted)
    broken = dataclasses.replace(opened, params=dict(opened.params) | {"norm.weight": last})
    for write in (orbax.save, hf.export):
        with pytest.raises(KeyboardInterrupt):
            write(broken, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_slices_of_parameters_on_disk(checkpoint, tmp_path):
    """Whatever is asked for of a parameter is what the array in memory has there, for both kinds of directory."""
    model = load_model(checkpoint)
    orbax.save(model, tmp_path / "orbax")
    for opened in (hf.open_model(checkpoint), orbax.open_model(tmp_path / "orbax")):
        for name, value in model.params.items():
            held = np.asarray(value)
            for at in ((), (1,), (slice(1, 3),), (slice(0, 2), slice(3, 99)), (2, slice(None, 5)), (0, 1)):
                if len(at) <= held.ndim:
                    np.testing.assert_array_equal(opened.params[name][at], held[at])
