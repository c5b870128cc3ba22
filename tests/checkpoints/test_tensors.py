"""Our safetensors reader and writer against the safetensors library, and on damaged files."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import SPEC
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import array_shapes

from tmjax import cli
from tmjax.checkpoints.formats.safetensors import BLOCK_BYTES, INDEX_NAME, SINGLE_NAME, TensorIndex, Weights, all_finite
from tmjax.checkpoints.formats.writer import TensorMeta, parse_size, plan_shards, write_tensors
from tmjax.errors import CheckpointError, InputError
from tools.make_checkpoint import make_checkpoint

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: np.dtype, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save(directory: Path, tensors: dict[str, np.ndarray], **options) -> None:
    metas = [TensorMeta(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_tensors(directory, metas, tensors.__getitem__, **options)


def library_read(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of every file as the safetensors library parses it."""
    return {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for file in sorted(directory.glob("*.safetensors"))
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def same(index: TensorIndex, tensors: dict[str, np.ndarray]) -> bool:
    return set(index) == set(tensors) and all(
        index[name].dtype == value.dtype
        and index.read(name).shape == value.shape
        and index.read(name).tobytes() == value.tobytes()
        for name, value in tensors.items()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reader_agrees_with_the_library(tmp_path, dtype):
    tensors = random_tensors({"b.weight": (7, 3), "a": (5,), "deep": (2, 3, 4), "scalar": (), "none": (0, 4)}, dtype)
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE_NAME)
    assert same(TensorIndex(tmp_path), tensors)


def test_reader_of_shards_written_by_transformers(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
        )
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = {name: value.view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}
    index = TensorIndex(tmp_path)
    assert {name: index.read(name).tobytes() for name in index} == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "index",
    [
        (),
        (slice(2, 5),),
        (slice(None), slice(1, 3)),
        (slice(3, 4), slice(0, 2), slice(1, None)),
        (slice(0, 0),),
        (slice(5, 2),),
        (slice(-2, None),),
        (slice(4, 99),),
    ],
    ids=str,
)
def test_slices_equal_numpy_slices(tmp_path, dtype, index):
    tensors = random_tensors({"pad": (3,), "x": (6, 4, 3)}, dtype)
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE_NAME)
    got, want = TensorIndex(tmp_path).read("x", index), tensors["x"][index]
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("size", ["5GB", "200"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_library_reads_what_we_write(tmp_path, dtype, size):
    tensors = random_tensors({"b": (7, 3), "a": (5,), "deep": (2, 3, 4), "scalar": (), "wide": (9, 40)}, dtype)
    save(tmp_path, tensors, max_shard_size=size)
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
    assert library_read(tmp_path) == {
        name: (names[dtype], list(value.shape), value.tobytes()) for name, value in tensors.items()
    }
    assert same(TensorIndex(tmp_path), tensors)
    with safetensors.safe_open(next(tmp_path.glob("*.safetensors")), "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(str.isprintable), array_shapes(min_dims=0, min_side=0), max_size=6
    ),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    shard=st.integers(1, 300),
)
def test_round_trip(tmp_path_factory, shapes, dtypes, shard):
    shapes.pop("__metadata__", None)
    tensors = {
        name: random_tensors({name: shape}, dtype)[name]
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False)
    }
    directory = tmp_path_factory.mktemp("round")
    save(directory, tensors, max_shard_size=str(shard))
    assert same(TensorIndex(directory), tensors)
    held = library_read(directory)
    assert {name: data for name, (_, _, data) in held.items()} == {n: value.tobytes() for n, value in tensors.items()}


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_shards_keep_order_and_size(sizes, limit):
    metas = [TensorMeta(str(i), np.dtype(np.float16), (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(metas, limit)
    assert [meta for shard in shards for meta in shard] == metas
    assert all(len(shard) == 1 or sum(meta.nbytes for meta in shard) <= limit for shard in shards if shard)


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "200MiB", "10", "1.5kb")] == [5 * 10**9, 200 * 2**20, 10, 1500]
    for text in ("", "GB", "-3GB", "3XB", "0", "0.1"):
        with pytest.raises(InputError, match="is not a size"):
            parse_size(text)


def test_writer_refuses_a_tensor_that_is_not_as_announced(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path, [TensorMeta("x", np.dtype(np.float32), (2,))], lambda _: np.zeros(2, np.float16))


def test_tensors_are_asked_for_in_the_order_given(tmp_path):
    tensors = random_tensors({"b": (7, 3), "z": (5,), "a": (2, 3, 4)}, DTYPES[0])
    asked = []
    metas = [TensorMeta(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_tensors(tmp_path, metas, lambda name: asked.append(name) or tensors[name])
    assert asked == list(tensors)
    assert same(TensorIndex(tmp_path), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_the_tensor(tmp_path, monkeypatch, dtype):
    """Read in blocks and written from blocks, each of them intact while the next is made."""
    monkeypatch.setattr("tmjax.checkpoints.formats.safetensors.BLOCK_BYTES", 100)
    tensors = random_tensors({"b": (70, 3), "a": (5,), "scalar": (), "none": (0, 4), "wide": (2, 333)}, dtype)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save(tmp_path / "a", tensors)
    index = TensorIndex(tmp_path / "a")
    for name, value in tensors.items():
        for blocks in (index.blocks(name), Weights.blocks(index, name)):
            found = [block.copy() for block in blocks]
            assert b"".join(block.tobytes() for block in found) == value.tobytes()
            assert all(block.ndim == 1 for block in found)
        pairs = [one.copy() for one, _ in zip(*[index.blocks(name)] * 2, strict=False)]
        assert all(one.tobytes() == value.tobytes()[200 * n : 200 * n + 100] for n, one in enumerate(pairs))
    write_tensors(tmp_path / "b", list(map(index.__getitem__, index)), index.blocks)
    assert (tmp_path / "a" / SINGLE_NAME).read_bytes() == (tmp_path / "b" / SINGLE_NAME).read_bytes()


def test_writer_refuses_blocks_that_are_not_as_announced(tmp_path):
    meta = TensorMeta("x", np.dtype(np.float32), (4,))
    for blocks in ([np.zeros(3, np.float32)], [np.zeros(4, np.float32), np.zeros(1, np.float32)], [np.zeros(8, "f2")]):
        with pytest.raises(ValueError, match="announced"):
            write_tensors(tmp_path, [meta], lambda _, blocks=blocks: blocks)

    def failing() -> Iterator[np.ndarray]:
        yield np.zeros(2, np.float32)
        raise CheckpointError("gone")

    with pytest.raises(CheckpointError, match="gone"):
        write_tensors(tmp_path, [meta], lambda _: failing())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite(dtype):
    """Of 16 bits every number there is; of 32 all exponents with the mantissas where mistakes would show."""
    if dtype.itemsize == 2:
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
    else:
        top = np.arange(2**9, dtype=np.uint32)[:, None] << 23
        every = (top | np.array([0, 1, 2**22, 2**23 - 1], np.uint32)).reshape(-1).view(dtype)
    with np.errstate(invalid="ignore"):  # NaN of the signalling kind
        ordinary = np.isfinite(every)
    assert [all_finite(number) for number in every.reshape(-1, 1)] == ordinary.tolist()
    assert all_finite(every[ordinary])
    size = 3 * BLOCK_BYTES // dtype.itemsize
    for place in (0, size // 3, size - 1):
        array = np.zeros(size, dtype)
        array[place] = np.nan
        for view in (array, array.reshape(-1, 4).T, array.reshape(2, -1)[:, ::-1]):
            assert not all_finite(view)
    array = np.full((4, 6), np.inf, dtype)
    array[1:3, 2:5] = 1
    assert all_finite(array[1:3, 2:5])
    assert all_finite(np.zeros((0, 3), dtype))
    assert all_finite(np.zeros((), dtype))
    assert not all_finite(np.full((), -np.inf, dtype))


# Damaged files. `GOOD` is a header of two float32 tensors over 24 bytes of data.
GOOD = {
    "x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "y": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
}


def file_bytes(header: object = GOOD, data: int = 24, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data)


def edited(**changes: object) -> bytes:
    return file_bytes(GOOD | {"y": GOOD["y"] | changes})


DAMAGED = {
    "empty": (b"", "truncated"),
    "shorter than its length": (b"\1\2", "truncated"),
    "header cut": (file_bytes()[:60], "truncated"),
    "huge header length": (file_bytes(length=2**60), "truncated"),
    "data cut": (file_bytes(data=23), "truncated"),
    "bytes left over": (file_bytes(data=25), "trailing"),
    "not JSON": (file_bytes(b"{]"), "damaged"),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "damaged"),
    "nested without end": (file_bytes(b"[" * 200_000), "damaged"),
    "not an object": (file_bytes([1]), "not a JSON object"),
    "duplicate tensor": (file_bytes(b'{"x": 1, "x": 2}'), "duplicate"),
    "entry not an object": (file_bytes({"x": 3}), "entry of 'x'"),
    "shape missing": (file_bytes({"x": {"dtype": "F32", "data_offsets": [0, 24]}}), "entry of 'x'"),
    "shape of strings": (edited(shape=["2"]), "entry of 'y'"),
    "negative shape": (edited(shape=[-2]), "entry of 'y'"),
    "fractional offsets": (edited(data_offsets=[16.0, 24.0]), "entry of 'y'"),
    "three offsets": (edited(data_offsets=[16, 24, 32]), "entry of 'y'"),
    "offsets that do not fit the shape": (edited(data_offsets=[16, 20]), "has 4 bytes"),
    "offsets the wrong way round": (edited(data_offsets=[24, 16]), "has -8 bytes"),
    "overlap": (edited(data_offsets=[8, 16]), "starts at byte"),
    "hole": (file_bytes(GOOD | {"y": GOOD["y"] | {"data_offsets": [20, 28]}}, data=28), "starts at byte"),
    "quantised dtype": (edited(dtype="F8_E4M3", data_offsets=[16, 18]), "dtype F8_E4M3"),
    "integer dtype": (edited(dtype="I32"), "dtype I32, as quantised or packed"),
    "double precision": (edited(dtype="F64", shape=[1]), "cast it to float32"),
    "dtype not a string": (edited(dtype=["F32"]), "entry of 'y'"),
    "name of two lines": (file_bytes({"a\nb": 3}), "entry of"),
}


def refused(directory: Path, pattern: str, kind: type[InputError] = CheckpointError) -> None:
    with pytest.raises(kind, match=pattern) as caught:
        TensorIndex(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path, name):
    content, pattern = DAMAGED[name]
    (tmp_path / SINGLE_NAME).write_bytes(content)
    refused(tmp_path, pattern)


def test_file_cut_after_it_was_indexed(tmp_path):
    (tmp_path / SINGLE_NAME).write_bytes(file_bytes())
    index = TensorIndex(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes(file_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ended while reading y"):
        index.read("y")


def test_ignored_tensors_may_have_any_dtype(tmp_path):
    mask = {"layer.mask": {"dtype": "BOOL", "shape": [3, 8], "data_offsets": [24, 48]}}
    (tmp_path / SINGLE_NAME).write_bytes(file_bytes(GOOD | mask, data=48))
    refused(tmp_path, "dtype BOOL")
    assert set(TensorIndex(tmp_path, (".mask",))) == {"x", "y"}
    mask["layer.mask"]["data_offsets"] = [48, 24]
    (tmp_path / SINGLE_NAME).write_bytes(file_bytes(GOOD | mask, data=48))
    with pytest.raises(CheckpointError):
        TensorIndex(tmp_path, (".mask",))


def test_no_weights(tmp_path):
    refused(tmp_path, "has neither", InputError)


def sharded(tmp_path: Path) -> dict:
    """A checkpoint of three shards, one tensor each; returns its index."""
    save(tmp_path, random_tensors({"a": (8,), "b": (8,), "c": (8,)}, DTYPES[0]), max_shard_size="32")
    return json.loads((tmp_path / INDEX_NAME).read_text())


def test_missing_shard(tmp_path):
    shard = sharded(tmp_path)["weight_map"]["b"]
    (tmp_path / shard).unlink()
    refused(tmp_path, f"shard {shard} is missing")


def change_index(tmp_path: Path, change: dict, drop: str = "") -> None:
    index = sharded(tmp_path)
    index["weight_map"] |= change
    index["weight_map"].pop(drop, None)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))


def test_tensor_missing_from_its_shard(tmp_path):
    change_index(tmp_path, {"d": "model-00001-of-00003.safetensors"})
    refused(tmp_path, "d is not in model-00001")


def test_tensor_in_another_shard(tmp_path):
    change_index(tmp_path, {"a": "model-00003-of-00003.safetensors"}, drop="b")
    refused(tmp_path, "a is not in model-00003-of-00003.safetensors")


def test_tensor_that_only_its_shard_knows(tmp_path):
    save(tmp_path, random_tensors({"a": (8,), "b": (8,), "c": (8,)}, DTYPES[0]), max_shard_size="64")
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    del index["weight_map"]["b"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    refused(tmp_path, "b is in model-00001-of-00002.safetensors but not in the index")


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    one, two = (tmp_path / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    two.write_bytes(one.read_bytes())
    refused(tmp_path, "a is in model-00002-of-00003.safetensors but not in the index")


@pytest.mark.parametrize("where", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_index_naming_a_path_outside(tmp_path, where):
    (tmp_path.parent / "x.safetensors").write_bytes(file_bytes())
    change_index(tmp_path, {"a": where})
    refused(tmp_path, "outside its folder")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 200_000,
    ],
    ids=range(8),
)
def test_damaged_index(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    refused(tmp_path, "damaged")


def test_single_file_goes_before_an_index(tmp_path):
    """As in transformers, so that both read the same weights from a directory that holds both."""
    sharded(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes(file_bytes())
    assert set(TensorIndex(tmp_path)) == {"x", "y"}


def test_rows_are_read_alone(tmp_path):
    """Reading rows touches only their bytes: a sparse file of 64 GiB is read in no time."""
    rows = 2**24
    header = json.dumps({"x": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    with (tmp_path / SINGLE_NAME).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + rows * 4096)
    part = TensorIndex(tmp_path).read("x", (slice(rows - 2, rows), slice(0, 3)))
    assert part.shape == (2, 3)
    assert not part.any()


# The whole way: any damage ends in one line and exit code 2, or in the very tensors that were there; never in between.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint of two shards, small enough to be damaged hundreds of times."""
    spec = dataclasses.replace(SPEC, layers=1, vocab=6, hidden=8, heads=2, kv_heads=1, head_dim=4, mlp=8)
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", "llama", spec, max_shard_size="1500")


def converted(directory: Path, capsys) -> bool:
    """Converts by the command line; True if that worked. Otherwise nothing may be left and one line was said."""
    out = directory.parent / "out"
    code = cli.run(["convert", str(directory), str(out), "--to", "hf"])
    captured = capsys.readouterr()
    if code == 0:
        return True
    assert code == 2
    assert captured.err.startswith("tmjax: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(file.name for file in directory.parent.iterdir()) == [directory.name]
    return False


def damaged(tiny: Path, tmp_path_factory) -> tuple[Path, list[Path]]:
    copy = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("damaged") / "checkpoint"))
    return copy, sorted(copy.glob("*.safetensors"))


HEADER_BYTES = st.tuples(st.integers(0, 1), st.floats(0, 1, exclude_max=True), st.integers(0, 7))


@given(flips=st.lists(HEADER_BYTES, min_size=1, max_size=3))
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_bits_flipped_in_headers(tiny, tmp_path_factory, capsys, flips):
    directory, shards = damaged(tiny, tmp_path_factory)
    before = library_read(tiny)
    for shard, place, bit in flips:
        content = bytearray(shards[shard].read_bytes())
        end = 8 + int.from_bytes(tiny.joinpath(shards[shard].name).read_bytes()[:8], "little")
        content[int(place * end)] ^= 1 << bit
        shards[shard].write_bytes(content)
    if converted(directory, capsys):  # the flips undid each other, or hit a blank or the metadata
        assert library_read(directory.parent / "out") == before
    shutil.rmtree(directory.parent)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_entries_changed_in_headers(tiny, tmp_path_factory, capsys, data):
    directory, shards = damaged(tiny, tmp_path_factory)
    shard = data.draw(st.sampled_from(shards))
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "", "name"]))
    junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4), st.lists)
    numbers = st.lists(st.integers(-2, 2**40), max_size=3)
    value = data.draw(numbers | junk | st.sampled_from(["F16", "BF16", "F32", "I8", "F64", "F8_E5M2"]))
    original = json.dumps(header)
    if field == "name":
        header[str(value)] = header.pop(name)
    elif field:
        header[name][field] = value
    else:
        header[name] = value
    raw = json.dumps(header).encode()
    shard.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    if converted(directory, capsys):
        assert json.dumps(header) == original
    shutil.rmtree(directory.parent)


@given(keep=st.floats(0, 1, exclude_max=True), shard=st.integers(0, 1))
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_shards_cut_short(tiny, tmp_path_factory, capsys, keep, shard):
    directory, shards = damaged(tiny, tmp_path_factory)
    content = shards[shard].read_bytes()
    shards[shard].write_bytes(content[: int(keep * len(content))])
    assert not converted(directory, capsys)
    shutil.rmtree(directory.parent)


def index_without_a_shard(index: dict) -> str:
    gone = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    return json.dumps(index)


@pytest.mark.parametrize(
    "change",
    [
        index_without_a_shard,
        lambda index: json.dumps(index)[:-5],
        lambda index: json.dumps(index).replace('"weight_map": {', '"weight_map": {"a": "b", "a": "b", '),
        lambda index: json.dumps(index).replace("00001-of", "00003-of"),
        lambda index: json.dumps(index).replace("00001-of", "00002-of"),
        lambda index: json.dumps(index).replace("model-00001", "a\\nb\\u0000"),
        lambda index: json.dumps(index | {"weight_map": []}),
        lambda index: "\x00",
    ],
)
def test_damaged_indices(tiny, tmp_path_factory, capsys, change):
    directory, _ = damaged(tiny, tmp_path_factory)
    index = json.loads((directory / INDEX_NAME).read_text())
    (directory / INDEX_NAME).write_text(change(index))
    assert not converted(directory, capsys)


def test_duplicate_tensors_in_a_header(tiny, tmp_path_factory, capsys):
    directory, shards = damaged(tiny, tmp_path_factory)
    content = shards[0].read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].strip()
    first = next(key for key in json.loads(header) if key != "__metadata__")
    raw = header[:-1] + b', "' + first.encode() + b'": {}}'
    shards[0].write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    assert not converted(directory, capsys)
