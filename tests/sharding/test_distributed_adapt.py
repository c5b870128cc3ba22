"""`tmjax adapt` in two real processes: the numbers of one process, a clear end of a killed job, resuming."""

import csv
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from jobs import Job, errors

from tmjax import cli
from tmjax.runs.manifest import read_manifest

TRAINING = {"warmup": 1, "tokens_per_step": 256, "row_lengths": 1, "lr": 3e-4}
SHORT = {"max_texts": 8, "evaluation": {"draws": 100}, "generation": {"texts": 4, "tokens": 8}}


def command(tmp_path: Path, flags: list[str], mode: str, **training: int) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SHORT | {"mode": mode, "training": TRAINING | training}))
    return ["adapt", str(recipe), *flags]


def log_of(out: Path) -> list[dict[str, str]]:
    with next(out.glob("training/adapted/*/log.csv")).open(newline="") as stream:
        return list(csv.DictReader(stream))


def require_equal_logs(out: Path, one: Path, steps: int) -> None:
    found, expected = log_of(out), log_of(one)
    assert [int(row["step"]) for row in found] == list(range(1, steps + 1)) and len(expected) == steps
    for name in ("loss", "text", "guide", "teacher", "valid"):
        numbers = [[float(row[name] or 0) for row in rows] for rows in (found, expected)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one_does(flags, tmp_path) -> None:
    without_test = flags[: flags.index("--test")]
    arguments = command(tmp_path, without_test, "sft", steps=2, validate_every=2)
    out, one = tmp_path / "job", tmp_path / "one"
    (code, printed, error), (other, nothing, silence) = Job(
        [*arguments, "--out", out, "--mesh", "fsdp=2", "--json"], devices=1
    ).end()
    assert code == other == 0 and nothing == silence == "", error + silence
    manifest = json.loads(printed)
    assert (manifest["devices"], manifest["processes"]) == (2, 2)
    assert cli.run([*arguments, "--out", str(one), "--mesh", "data=1"]) == 0
    require_equal_logs(out, one, 2)
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(one) for path in one.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_job_resumes_and_gives_the_numbers_of_one_process(flags, tmp_path, killed) -> None:
    """All stages: generated texts, probabilities, features, training; SIGKILL after the second checkpoint."""
    arguments = command(tmp_path, flags, "combined", steps=30, validate_every=10, keep_every=5)
    out, one = tmp_path / "job", tmp_path / "one"
    here = [*arguments, "--out", out, "--mesh", "data=2,fsdp=2", "--json"]
    job, deadline = Job(here, devices=2), time.monotonic() + 1200
    while not list(out.glob("training/adapted/*/checkpoints/10")):
        assert time.monotonic() < deadline and all(each.poll() is None for each in job.processes), job.end(timeout=1)
        time.sleep(0.01)
    job.processes[killed].send_signal(signal.SIGKILL)
    ended = job.end(timeout=300)
    code, printed, error = ended[1 - killed]
    assert ended[killed][0] == -signal.SIGKILL and code == 1 and printed == ""
    assert len(errors(error)) == 1 and "resumes" in error and "Traceback" not in error
    assert not (out / "merged").exists()
    before = log_of(out)[:10]
    (code, printed, error), (other, nothing, silence) = Job(here, devices=2).end(timeout=1200)
    assert code == other == 0 and nothing == silence == "", error + silence
    stages = json.loads(printed)["stages"]
    assert all(stages[name]["reused"] for name in stages if name.startswith(("features", "generate", "teacher")))
    assert log_of(out)[:10] == before  # with their seconds: those steps were not made again
    assert cli.run([*map(str, arguments), "--out", str(one), "--mesh", "data=1"]) == 0
    require_equal_logs(out, one, 30)
    found, expected = read_manifest(out), read_manifest(one)
    for arm, facts in expected["evaluation"].items():
        assert found["evaluation"][arm]["bits_per_byte"] == pytest.approx(facts["bits_per_byte"], rel=1e-4)
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(one) for path in one.rglob("*")}
