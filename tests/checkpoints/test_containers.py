"""What lies in a checkpoint directory, or on the hub: what is read, what is not, and one line for what cannot be."""

import fnmatch
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import edit_config, edit_tensors

from tmjax import cli
from tmjax.checkpoints.formats.safetensors import INDEX_NAME, SINGLE_NAME
from tmjax.checkpoints.formats.weights import weight_files
from tmjax.checkpoints.hub import CONFIG_NAME, resolve
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.runs.hashes import sha256_checkpoint


@pytest.fixture
def model(llama_dir, tmp_path) -> Path:
    """A checkpoint of one's own to change."""
    shutil.copytree(llama_dir, tmp_path / "model")
    return tmp_path / "model"


def sharded(directory: Path) -> list[str]:
    """Splits a single file into two shards with an index; returns their names."""
    held = safetensors.torch.load_file(directory / SINGLE_NAME)
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    parts = [dict(list(held.items())[::2]), dict(list(held.items())[1::2])]
    for name, part in zip(names, parts, strict=True):
        safetensors.torch.save_file(part, directory / name, {"format": "pt"})
    where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / SINGLE_NAME).unlink()
    return names


def every_refusal(directory: Path, other: Path, out: Path, capsys) -> list[str]:
    """What `convert`, `evaluate` and the doctor say of a directory, one line each."""
    said = []
    assert cli.run(["convert", str(directory), str(out), "--to", "hf"]) == 2
    said.append(capsys.readouterr().err)
    texts = out.parent / "texts.txt"
    texts.write_text("Habari ya asubuhi.\n")
    assert cli.run(["evaluate", str(directory), "--texts", str(texts)]) == 2
    said.append(capsys.readouterr().err)
    assert cli.run(["doctor", "--source", str(directory), "--target", str(other), "--json"]) == 2
    captured = capsys.readouterr()
    said.append(captured.err)
    about = [problem for problem in json.loads(captured.out)["problems"] if problem.startswith("source: ")]
    assert len(about) == 1
    assert all(line.count("\n") == 1 and "Traceback" not in line for line in said)
    assert not out.exists()
    return [*said, about[0]]


def float8(directory: Path, form: str) -> None:
    held = safetensors.torch.load_file(directory / SINGLE_NAME)
    name = "model.layers.1.mlp.up_proj.weight"
    held[name] = held[name].to(torch.float8_e4m3fn)
    (directory / SINGLE_NAME).unlink()
    if form == "bin":
        torch.save(held, directory / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(held, directory / SINGLE_NAME, {"format": "pt"})
        if form == "sharded":
            sharded(directory)


@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_float8_without_a_word_in_the_config(model, qwen2_dir, tmp_path, capsys, form):
    float8(model, form)
    dtype = "float8_e4m3fn" if form == "bin" else "F8_E4M3"
    for line in every_refusal(model, qwen2_dir, tmp_path / "out", capsys):
        assert f"tensor model.layers.1.mlp.up_proj.weight has dtype {dtype}, as quantised" in line
        assert "dequantise the checkpoint first or give the one it was made from" in line


def test_float8_of_a_family_that_is_not_supported(model, qwen2_dir, tmp_path, capsys):
    """Unpacking it would not help."""
    float8(model, "single")
    edit_config(model, model_type="deepseek_v4", num_experts=128, quantization_config={"quant_method": "fp8"})
    for line in every_refusal(model, qwen2_dir, tmp_path / "out", capsys):
        assert "model_type 'deepseek_v4' is not supported: it has" in line
        assert "a mixture of experts (num_experts 128)" in line
        assert "quantised" not in line and "dequantise" not in line


def files(*names: str):
    """Writes files that hold a few bytes, in place of weights and config."""

    def change(directory: Path) -> None:
        for name in (CONFIG_NAME, SINGLE_NAME):
            (directory / name).unlink()
        for name in names:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(b"GGUF\3\0\0\0")

    return change


def weights(*names: str):
    """The same, the config staying."""

    def change(directory: Path) -> None:
        config = (directory / CONFIG_NAME).read_text()
        files(*names)(directory)
        (directory / CONFIG_NAME).write_text(config)

    return change


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def adapter(directory: Path, *, config: bool = False) -> None:
    (weights if config else files)("adapter_model.safetensors")(directory)
    told = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (directory / "adapter_config.json").write_text(json.dumps(told))


def nested(directory: Path) -> None:
    (directory / "checkpoint-500").mkdir()
    (directory / CONFIG_NAME).rename(directory / "checkpoint-500" / CONFIG_NAME)
    (directory / SINGLE_NAME).unlink()


def mlx(directory: Path) -> None:
    edit_config(directory, quantization={"group_size": 64, "bits": 4})
    name = "model.layers.0.mlp.up_proj"
    packed = {f"{name}.scales": np.ones((4, 2), np.float16), f"{name}.biases": np.ones((4, 2), np.float16)}
    edit_tensors(directory, lambda held: held.update({f"{name}.weight": np.ones((4, 8), np.uint32)} | packed))


def pointer(directory: Path) -> None:
    told = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    (directory / SINGLE_NAME).write_text(told)


def pointer_to_bin(directory: Path) -> None:
    pointer(directory)
    (directory / SINGLE_NAME).rename(directory / "pytorch_model.bin")


def missing_shard(directory: Path) -> None:
    (directory / sharded(directory)[1]).unlink()


def truncated_shard(directory: Path) -> None:
    shard = directory / sharded(directory)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def lost_index(directory: Path) -> None:
    sharded(directory)
    (directory / INDEX_NAME).unlink()


def packed(key: str, value: object):
    return lambda directory: edit_config(directory, **{key: value})


def packed_beside(name: str, value: dict):
    return lambda directory: (directory / name).write_text(json.dumps(value))


#: What was done to a directory, and what is said of it.
CANNOT = {
    "gguf": (files("model-Q4_K_M.gguf"), "model-Q4_K_M.gguf is a GGUF file, whose weights are packed; give"),
    "gguf with a config": (weights("model.gguf"), "model.gguf is a GGUF file"),
    "lora": (adapter, "adapter_model.safetensors is truncated or not a safetensors file"),
    "lora with a config": (lambda d: adapter(d, config=True), "it holds an adapter (LoRA) of meta-llama/Llama-3.2-1B"),
    "mlx": (mlx, "an MLX checkpoint with 4-bit weights); write it unpacked with mlx_lm.convert --dequantize"),
    "mistral": (weights("consolidated.safetensors"), "consolidated.safetensors is Mistral's own format; give the"),
    "mistral without a config": (files("consolidated.safetensors", "params.json"), "is Mistral's own format"),
    "meta": (files("consolidated.00.pth", "params.json"), "consolidated.00.pth is Meta's own format"),
    "pth": (weights("weights.pth"), "weights.pth is a PyTorch file that is not in Hugging Face's format"),
    "onnx": (weights("onnx/model.onnx"), "onnx/model.onnx is an ONNX model"),
    "tensorflow": (weights("tf_model.h5"), "tf_model.h5 is TensorFlow's weights; save it with save_pretrained"),
    "flax": (weights("flax_model.msgpack"), "flax_model.msgpack is Flax weights; save it with save_pretrained"),
    "shards without an index": (lost_index, f"is a shard without {INDEX_NAME}; fetch the index"),
    "another name": (
        weights("weights.safetensors"),
        "weights.safetensors is a safetensors file that is not named model.s",
    ),
    "diffusion": (files("model_index.json"), "model_index.json is a diffusion pipeline"),
    "deepspeed": (weights("zero_to_fp32.py", "global_step9/x.pt"), "zero_to_fp32.py is a sign of a DeepSpeed checkp"),
    "fsdp": (weights("pytorch_model_fsdp_0/__0_0.distcp", "optimizer.pt"), "__0_0.distcp is a part of a sharded FSDP"),
    "empty": (empty, f"{CONFIG_NAME} does not exist: it is empty"),
    "nested": (nested, "checkpoint-500, give that directory"),
    "git-lfs": (pointer, "model.safetensors is a pointer of git-lfs, not the file itself; run git lfs pull"),
    "git-lfs of PyTorch": (pointer_to_bin, "pytorch_model.bin is a pointer of git-lfs"),
    "missing shard": (missing_shard, "shard model-00002-of-00002.safetensors is missing"),
    "truncated shard": (truncated_shard, "model-00002-of-00002.safetensors is truncated"),
    "gptq": (packed("quantization_config", {"quant_method": "gptq", "bits": 4}), "(quantization_config, gptq in"),
    "awq": (packed("quantization_config", {"quant_method": "awq", "w_bit": 4}), "(quantization_config, awq in"),
    "bitsandbytes": (
        packed("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "(quantization_config, bitsandbytes in config.json); dequantise it first",
    ),
    "modelopt beside": (
        packed_beside("hf_quant_config.json", {"quantization": {"quant_algo": "W4A16_AWQ"}}),
        "is quantised (hf_quant_config.json, W4A16_AWQ); dequantise it first",
    ),
    "autogptq beside": (packed_beside("quantize_config.json", {"bits": 4}), "(quantize_config.json, 4 bits); deq"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_read_is_said_in_one_line(case, model, qwen2_dir, tmp_path, capsys):
    change, message = CANNOT[case]
    change(model)
    for line in every_refusal(model, qwen2_dir, tmp_path / "out", capsys):
        assert message in line, line
        assert str(model) in line


def test_files_that_say_nothing_of_weights(model, qwen2_dir, llama_dir, capsys):
    """A cache that is packed while generating, and a trainer's leftovers beside a config alone."""
    algorithms = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": algorithms}))
    assert load_model(model).notes == ()
    for name in (SINGLE_NAME, "hf_quant_config.json"):
        (model / name).unlink()
    (model / "optimizer.pt").write_bytes(b"")
    assert cli.run(["doctor", "--source", str(model), "--target", str(qwen2_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["source"]["weights"] == "missing"


def second_index(directory: Path) -> None:
    raw = (directory / SINGLE_NAME).read_bytes()
    sharded(directory)
    (directory / SINGLE_NAME).write_bytes(raw)


def copied_to(name: str):
    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"another copy")

    return change


#: What lies beside a checkpoint and is not read, and the note on it.
BESIDE = {
    "index": (second_index, f"{SINGLE_NAME} is read, {INDEX_NAME} beside it and its shards are not"),
    "bin": (copied_to("pytorch_model.bin"), "the safetensors are read, pytorch_model.bin beside them is not"),
    "consolidated": (copied_to("consolidated.safetensors"), "consolidated.safetensors is another copy of the weights"),
    "original": (copied_to("original/model.safetensors"), "original/model.safetensors is another copy of the weights"),
    "gguf": (copied_to("model-q4.gguf"), "model-q4.gguf is another copy"),
    "adapter": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "adapter_config.json belongs to an adapter, which is not applied",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_is_noted_and_not_read(case, model, llama_dir, qwen2_dir, capsys):
    change, message = BESIDE[case]
    change(model)
    plain, ours = load_model(llama_dir), load_model(model)
    assert all(np.array_equal(plain.params[path], ours.params[path]) for path in plain.params)
    assert any(message in note for note in ours.notes) and len(ours.notes) == 1
    assert cli.run(["doctor", "--source", str(model), "--target", str(qwen2_dir), "--json"]) == 0
    assert any(message in note for note in json.loads(capsys.readouterr().out)["notes"])
    # A run is the same run whatever else lies there: hashing tens of gigabytes more would be in vain.
    assert weight_files(model) == [model / SINGLE_NAME]
    assert sha256_checkpoint(model) == sha256_checkpoint(llama_dir)


class Hub:
    """A repository on the hub, and what was fetched of it."""

    def __init__(self, cache: Path, *names: str, weight_map: dict[str, str] | None = None, index: str = "") -> None:
        self.cache, self.names = cache, {*names, CONFIG_NAME, "tokenizer.json", "README.md"}
        self.index, self.weight_map = index, weight_map
        self.names |= {index} if index else set()

    def snapshot(self, model: str, allow_patterns: list[str]) -> str:
        for name in self.names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(exist_ok=True)
                text = json.dumps({"weight_map": self.weight_map}) if name == self.index else ""
                (self.cache / name).write_text(text)
        return str(self.cache)

    @property
    def fetched(self) -> set[str]:
        found = {file.relative_to(self.cache).as_posix() for file in self.cache.rglob("*") if file.is_file()}
        return found - {CONFIG_NAME, "README.md", "tokenizer.json"}


COPIES = ("consolidated.safetensors", "original/model.safetensors", "original/consolidated.00.pth", "model.gguf")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
BIN_INDEX = "pytorch_model.bin.index.json"


@pytest.mark.parametrize(
    ("names", "index", "shards", "fetched"),
    [
        ((SINGLE_NAME, "pytorch_model.bin"), "", (), {SINGLE_NAME}),
        ((*SHARDS, *BIN_SHARDS), INDEX_NAME, SHARDS, {INDEX_NAME, *SHARDS}),
        (("a.safetensors", "b.safetensors", *SHARDS), INDEX_NAME, ("a.safetensors", "b.safetensors"), None),
        (("pytorch_model.bin", "training.bin"), "", (), {"pytorch_model.bin"}),
        ((*BIN_SHARDS, "optimizer.bin"), BIN_INDEX, BIN_SHARDS, {BIN_INDEX, *BIN_SHARDS}),
        ((), "", (), set()),
    ],
)
def test_only_what_is_read_is_fetched_of_the_hub(tmp_path, monkeypatch, names, index, shards, fetched):
    """Mistral, Llama and gpt-oss have a second copy of their weights there, which would double the download."""
    hub = Hub(tmp_path, *names, *COPIES, index=index, weight_map={shard: shard for shard in shards})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot)
    resolve("someone/model", weights=False)
    assert hub.fetched == set()
    assert resolve("someone/model") == tmp_path
    assert hub.fetched == ({index, *shards} if fetched is None else fetched)


def test_a_damaged_index_on_the_hub_is_said_when_it_is_read(tmp_path, monkeypatch, llama_dir):
    hub = Hub(tmp_path, *SHARDS, index=INDEX_NAME, weight_map=None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot)
    resolve("someone/model")
    shutil.copy(llama_dir / CONFIG_NAME, tmp_path)
    with pytest.raises(InputError, match="is damaged"):
        load_model(tmp_path)
