"""Checkpoints by hub id: the shared cache is honoured, offline works, and what is not there is said in one line."""

import shutil
import subprocess
import sys

import pytest

from tmjax.errors import InputError
from tmjax.hub.atomic import atomic_directory
from tmjax.hub.checkpoint import resolve
from tmjax.hub.texts import read_texts

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
    assert [path.name for path in out.iterdir()] == ["other"]
