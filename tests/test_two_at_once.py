"""Two commands on one output, and interrupted ones: real processes, started and stopped at random times."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import SPEC, stored, xla_flags

from tmjax import cli
from tmjax.runs.manifest import read_manifest
from tools.make_checkpoint import make_checkpoint

OFFSET_S = 2.5
#: The command as a terminal starts it: what runs these tests may ignore interrupts, which its children inherit.
STARTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "tmjax"
from tmjax.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def pair(llama_dir, tmp_path_factory) -> Path:
    """A folder with a random pair of models of the bundled vocabulary, texts, a recipe, and a merge made alone."""
    folder = tmp_path_factory.mktemp("pair")
    vocab = json.loads((llama_dir / "config.json").read_text())["vocab_size"]
    spec = dataclasses.replace(SPEC, vocab=vocab, layers=1, tied_embeddings=True)
    make_checkpoint(folder / "source", "llama", spec, tokenizer=llama_dir, seed=1)
    make_checkpoint(folder / "target", "llama", spec, tokenizer=llama_dir, seed=2)
    words = [f"neno la {number} na maji ya mto {number * 7}" for number in range(12)]
    (folder / "texts.txt").write_text("\n".join(words) + "\n")
    told = {"source": "source", "target": "target", "texts": "texts.txt", "preset": "barycentric", "alpha": 0.1}
    told |= {"mesh": "data=1", "operators": [{"transport": {"roles": ["o", "down"]}}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(told))
    return folder


def merge(pair: Path, out: Path) -> list[str]:
    return ["merge", str(pair / "recipe.yaml"), "--out", str(out)]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    return subprocess.Popen(
        [sys.executable, "-c", STARTED, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def alone(pair) -> dict:
    process = start(merge(pair, pair / "alone"))
    code, said = end(process)
    assert code == 0, said
    return stored(pair / "alone/merged")


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if "tmjax: error:" in line]


def one_is_refused_and_nothing_is_wrong(pair: Path, alone: dict, out: Path, offset: float) -> int:
    """Exit status of the second process."""
    first = start(merge(pair, out))
    time.sleep(offset)
    second = start(merge(pair, out))
    ended = [(process.pid, *end(process)) for process in (first, second)]
    codes = [code for _, code, _ in ended]
    assert 0 in codes and set(codes) <= {0, 2}, ended
    for number, (_, code, said) in enumerate(ended):
        assert "Traceback" not in said
        if code == 2:
            (line,) = errors(said)
            assert f"{out} is being written by `tmjax merge" in line and f"process {ended[1 - number][0]}," in line
            assert re.search(r"host \S+, .*since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line)
    assert stored(out / "merged") == alone
    assert cli.run(merge(pair, out)) == 0  # "done" is said of what is right
    assert stored(out / "merged") == alone and not list(out.parent.glob(".*")) and not list(out.rglob("*.partial"))
    return codes[1]


def test_two_merges_on_one_output(pair, alone, tmp_path) -> None:
    generator = random.Random(0)
    codes = [
        one_is_refused_and_nothing_is_wrong(pair, alone, tmp_path / f"{number}", generator.uniform(0, OFFSET_S))
        for number in range(2)
    ]
    assert 2 in codes  # or nothing was tried


@pytest.mark.slow
def test_two_merges_on_one_output_twenty_times(pair, alone, tmp_path) -> None:
    generator = random.Random(1)
    codes = [
        one_is_refused_and_nothing_is_wrong(pair, alone, tmp_path / f"{number}", generator.uniform(0, OFFSET_S))
        for number in range(20)
    ]
    assert codes.count(2) >= 10


def interrupted(pair: Path, alone: dict, out: Path, after: float) -> int:
    process = start(merge(pair, out))
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    if code == 0:
        assert stored(out / "merged") == alone
        return code
    assert code == 130, (after, said)
    assert said.strip().splitlines()[-1].startswith("tmjax: error: interrupted") and len(errors(said)) == 1, said
    assert "Traceback" not in said
    assert not list(out.rglob("*.partial")) and not list(out.parent.glob(".*"))
    return code


def test_an_interrupt_is_never_lost(pair, alone, tmp_path) -> None:
    generator = random.Random(0)
    for number in range(2):
        interrupted(pair, alone, tmp_path / f"{number}", generator.uniform(0.3, 6))
    assert cli.run(merge(pair, tmp_path / "1")) == 0
    assert stored(tmp_path / "1/merged") == alone


@pytest.mark.slow
def test_an_interrupt_is_never_lost_thirty_times(pair, alone, tmp_path) -> None:
    generator = random.Random(1)
    for number in range(30):
        interrupted(pair, alone, tmp_path / f"{number}", generator.uniform(0.2, 9))


def test_a_killed_holder_is_no_holder(pair, alone, tmp_path) -> None:
    out = tmp_path / "run"
    process = start(merge(pair, out))
    until = time.monotonic() + 120
    while read_manifest(out) is None:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    end(process)
    assert (tmp_path / ".run.tmjax-lock").exists()
    assert cli.run(merge(pair, out)) == 0
    assert stored(out / "merged") == alone and not list(tmp_path.glob(".*"))


SWALLOWED = """
import gc, os, signal, sys, time
from tmjax import interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)

def in_a_callback(phase, info):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

def in_a_library():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    except BaseException:
        pass

with interrupt.noticed():
    try:
        if sys.argv[1] == "callback":
            gc.callbacks.append(in_a_callback)
            gc.collect()
            time.sleep(20)  # no progress meanwhile
        else:
            in_a_library()
            interrupt.checked(lambda: time.sleep(20))()
    except KeyboardInterrupt:
        assert interrupt.noted()
        print("interrupted")
with interrupt.noticed():
    assert not interrupt.noted()
"""


@pytest.mark.parametrize("where", ["callback", "library"])
def test_a_swallowed_interrupt_is_raised_again(where: str) -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SWALLOWED, where], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n" and done.returncode == 0, done.stderr
    assert done.stderr == "" and time.monotonic() - started < 15
