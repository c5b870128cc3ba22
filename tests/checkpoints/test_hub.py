"""Checkpoints by hub id: the shared cache is honoured, offline works, and what is not there is said in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import edit_config, edit_tensors

from tmjax import cli
from tmjax.checkpoints.hub import resolve
from tmjax.errors import InputError
from tmjax.files.atomic import atomic_directory
from tmjax.runs.peak_memory import peak_rss_mib
from tmjax.text.documents import read_texts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_hub_id_in_the_cache_loads_offline(qwen2_dir, repo, tmp_path) -> None:
    """A process of its own, because huggingface_hub reads its cache folder once."""
    model = tmp_path / "hub/models--someone--small-qwen"
    shutil.copytree(qwen2_dir, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    test = tmp_path / "t.txt"
    test.write_text("Yesu alikuwa Bethania.\n")
    command = [sys.executable, "-m", "tmjax.cli", "evaluate", "someone/small-qwen", "--texts", str(test), "--json"]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"someone/small-qwen": {"bits_per_byte"' in done.stdout


def test_what_is_nowhere_is_said(tmp_path) -> None:
    with pytest.raises(InputError, match="no directory no-one/nothing, and the hub"):
        resolve("no-one/nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        resolve(str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"needs the datasets package|cannot load"):
        read_texts("hf:no-one/nothing:train")


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "model"])
def test_gguf_is_refused(tmp_path, tmp_path_factory, capsys, name) -> None:
    out = str(tmp_path_factory.mktemp("converted") / "out")
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    assert cli.run(["convert", str(tmp_path / name), out, "--to", "hf"]) == 2
    assert f"{name} is a GGUF file" in capsys.readouterr().err
    if name.endswith(".gguf"):
        assert cli.run(["convert", str(tmp_path), out, "--to", "hf"]) == 2
        assert f"{name} is a GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config, gptq"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"quantization_config": "yes"}, "quantization_config"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
    ],
)
def test_quantised_configs_are_refused(llama_dir, tmp_path, capsys, setting, named) -> None:
    shutil.copytree(llama_dir, tmp_path / "x")
    edit_config(tmp_path / "x", **setting)
    assert cli.run(["convert", str(tmp_path / "x"), str(tmp_path / "out"), "--to", "hf"]) == 2
    error = capsys.readouterr().err
    assert f"is quantised ({named} in config.json); dequantise it first" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_packed_tensors_without_a_word_in_the_config(llama_dir, tmp_path, capsys) -> None:
    shutil.copytree(llama_dir, tmp_path / "x")
    edit_tensors(tmp_path / "x", lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": np.ones((3, 4), np.int32)}))
    assert cli.run(["convert", str(tmp_path / "x"), str(tmp_path / "out"), "--to", "hf"]) == 2
    error = capsys.readouterr().err
    assert "up_proj.qweight has dtype I32, as quantised or packed weights have" in error
    assert "dequantise" in error


def test_pytorch_files_are_fetched_only_where_there_are_no_safetensors(tmp_path, monkeypatch) -> None:
    asked = []

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        asked.append(any("bin" in pattern for pattern in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    resolve("someone/model")
    assert asked == [False, True]
    (tmp_path / "model.safetensors").touch()
    resolve("someone/model")
    assert asked == [False, True, False]
    (tmp_path / "model.safetensors").unlink()
    resolve("someone/model", weights=False)
    assert asked == [False, True, False, False]


def test_atomic_directory_leaves_nothing_after_an_error(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), atomic_directory(out) as partial:
        (partial / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(out) as partial:
        (partial / "whole").write_text("x")
    with pytest.raises(InputError, match="exists; choose another output"), atomic_directory(out):
        pass
    with atomic_directory(out, overwrite=True) as partial:
        (partial / "other").write_text("x")
    assert sorted(path.name for path in out.iterdir()) == [".tmjax-files.json", "other"]


def test_peak_memory_is_this_process_s_own() -> None:
    ballast = np.ones(2**25)  # 256 MiB in the parent
    code = "from tmjax.runs.peak_memory import peak_rss_mib; print(peak_rss_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 250
    assert peak_rss_mib() > ballast.nbytes / 2**20


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_part_of_a_split_and_another_column(tmp_path) -> None:
    """A folder is a data set too, which needs no hub."""
    lines = [json.dumps({"body": f"text {number}", "text": "no"}) for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert read_texts(f"hf:{tmp_path}:train[1:3]:body").texts == ("text 1", "text 2")
    assert read_texts(f"hf:{tmp_path}:train[:2]").texts == ("no", "no")
    with pytest.raises(InputError, match=r"train\[:2\]:title has no column title; it has body, text"):
        read_texts(f"hf:{tmp_path}:train[:2]:title")
