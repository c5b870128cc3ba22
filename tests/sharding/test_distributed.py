"""One job of two real processes with four devices each, over loopback: same results, one voice, clear ends, resume."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import Job, errors
from safetensors.numpy import load_file

from tmjax import cli
from tmjax.commands.sweep.results import read_csv

MESH = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def merged(small_flags, recipe_file, tmp_path_factory) -> dict[str, object]:
    """A merge by one job."""
    out = tmp_path_factory.mktemp("job") / "run"
    return {
        "out": out,
        "ended": Job(["merge", recipe_file, *small_flags, "--out", out, "--mesh", MESH, "--json"]).end(),
    }


def require_one_voice(ended: list[tuple[int, str, str]]) -> dict:
    """Fails unless both processes ended well and the first one alone wrote; returns the manifest that it wrote."""
    (code, printed, error), (other, nothing, silence) = ended
    assert code == other == 0, error + silence
    assert nothing == "" and silence == ""
    manifest = json.loads(printed)
    assert manifest["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert (manifest["devices"], manifest["processes"], manifest["platform"]) == (8, 2, "cpu")
    return manifest


def test_only_the_first_process_speaks(merged) -> None:
    require_one_voice(merged["ended"])


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_a_clear_line_and_the_rerun_resumes(
    small_flags, recipe_file, tmp_path
) -> None:
    """SIGKILL of the second process after the first stage, and the same command again."""
    out = tmp_path / "run"
    command = ["merge", recipe_file, *small_flags, "--out", out, "--mesh", MESH, "--json"]
    job = Job(command)
    job.wait_for_stage(out, "activations:target")
    job.processes[1].send_signal(signal.SIGKILL)
    (code, printed, error), (other, *_) = job.end(timeout=300)
    assert code == 1 and other == -signal.SIGKILL and printed == ""
    assert len(errors(error)) == 1 and "another process of this job" in error and "resumes" in error
    assert "Traceback" not in error and not (out / "merged").exists()
    stages = require_one_voice(Job(command).end())["stages"]
    assert stages["activations:target"]["reused"] and not stages["fuse"]["reused"]


def test_two_processes_merge_as_one_device_does(merged, small) -> None:
    found, expected = (load_file(path / "merged/model.safetensors") for path in (merged["out"], small))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name
    scores, one = (np.load(path / "scores.npz") for path in (merged["out"], small))
    for arm in one.files:
        np.testing.assert_allclose(scores[arm], one[arm], rtol=1e-5)
    names = {path.relative_to(small) for path in small.rglob("*")}
    assert {path.relative_to(merged["out"]) for path in merged["out"].rglob("*")} == names


@pytest.mark.slow
def test_a_sweep_over_two_processes(flags, recipe_file, tmp_path) -> None:
    """Settings over all eight devices; the table is that of one device."""
    command = ["sweep", recipe_file, *flags, "--grid", "alpha=0:0.15:0.01", "--write-best", "--out"]
    (code, printed, error), (other, nothing, _) = Job([*command, tmp_path / "job", "--mesh", "data=8", "--json"]).end()
    assert code == other == 0 and nothing == "", error
    assert json.loads(printed)["sweep"]["devices"] == 8
    assert cli.run([*map(str, command), str(tmp_path / "one")]) == 0
    found, expected = (read_csv(tmp_path / name / "results.csv") for name in ("job", "one"))
    assert len(found) == 16
    for row, one in zip(found, expected, strict=True):
        assert row["alpha"] == one["alpha"] and abs(row["bits_per_byte"] / one["bits_per_byte"] - 1) < 1e-5
    assert (tmp_path / "job/best/model.safetensors").is_file() and (tmp_path / "job/sweep.html").is_file()


@pytest.mark.slow
def test_processes_that_were_told_different_things(flags, recipe_file, texts, tmp_path) -> None:
    """Other texts, or an output that the other process does not see: one line each, nothing written."""
    command = ["merge", recipe_file, *flags]
    for own, said in (
        ([["--out", tmp_path / "a"], ["--out", tmp_path / "a", "--texts", texts["valid"]]], "has other inputs"),
        ([["--out", tmp_path / "b"], ["--out", tmp_path / "c"]], "must lie on a file system that all processes share"),
    ):
        ended = Job([*command, "--mesh", MESH], own=own).end(timeout=300)
        assert all(code != 0 and len(errors(error)) == 1 for code, _, error in ended)
        assert any(said in " ".join(error.split()) for *_, error in ended), ended
        assert not any((tmp_path / name / "activations").exists() for name in "abc")


@pytest.mark.slow
def test_two_processes_solve_for_predictions_as_one_does(flags, solving, tmp_path) -> None:
    command = ["merge", solving, *flags, "--out"]
    ended = Job([*command, tmp_path / "job", "--mesh", MESH]).end(timeout=1200)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert cli.run([*map(str, command), str(tmp_path / "one")]) == 0
    found, expected = (load_file(tmp_path / name / "merged/model.safetensors") for name in ("job", "one"))
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-4 * np.abs(value).max(), name
    told = [json.loads((tmp_path / name / "manifest.json").read_text())["solve"]["rounds"] for name in ("job", "one")]
    assert told[0] == told[1] and told[0]


@pytest.mark.slow
def test_evaluate_controls_and_moments_over_two_processes(flags, recipe_file, plain, tmp_path) -> None:
    """Controls, activations that are not kept, and `tmjax evaluate`, against one process."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(recipe_file).read_text() + "activations: {keep: false}\n")
    command = ["merge", recipe, *flags, "--controls", "--out"]
    ended = Job([*command, tmp_path / "job", "--mesh", MESH]).end(timeout=1200)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert cli.run([*map(str, command), str(tmp_path / "one")]) == 0
    arms = ["merged", *(f"controls/{path.name}" for path in (tmp_path / "one/controls").iterdir())]
    assert len(arms) == 5
    for arm in arms:
        found, expected = (load_file(tmp_path / name / arm / "model.safetensors") for name in ("job", "one"))
        bound = 1e-5 if arm == "merged" else 1e-4  # biases of a control are next to nothing
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() <= bound * np.abs(value).max(), (arm, name)
    test = flags[flags.index("--test") + 1]
    (code, printed, _), (other, nothing, _) = Job(["evaluate", plain / "merged", "--texts", test, "--json"]).end()
    assert code == other == 0 and nothing == ""
    bits = json.loads(printed)["evaluation"][str(plain / "merged")]["bits_per_byte"]
    assert bits == pytest.approx(
        json.loads((plain / "manifest.json").read_text())["evaluation"]["merged"]["bits_per_byte"]
    )


@pytest.mark.slow
def test_tasks_over_two_processes(qwen2_dir, tmp_path) -> None:
    """Log-likelihoods of choices and generated texts are those of one process."""
    from tools.verse_tasks import write_choice_task, write_generation_task

    folder = tmp_path / "tasks"
    folder.mkdir()
    write_choice_task(folder, 20)
    write_generation_task(folder, 12)
    command = ["evaluate", qwen2_dir, "--tasks", "verses_swahili,verses_written", "--tasks-dir", folder, "--limit", "6"]
    job = Job([*command, "--mesh", "data=2,fsdp=2", "--out", tmp_path / "job", "--json"], devices=2)
    (code, printed, error), (other, nothing, _) = job.end()
    assert code == other == 0 and nothing == "", error
    assert cli.run([*map(str, command), "--mesh", "data=1", "--out", str(tmp_path / "one")]) == 0
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("job", "one"))
    assert json.loads(printed)["tasks"] == {str(qwen2_dir): found["tasks"]} and found["tasks"] == expected["tasks"]
    for task in ("verses_swahili", "verses_written"):
        rows = [
            [json.loads(line)["filtered_resps"] for line in file.read_text().splitlines()]
            for file in (tmp_path / name / f"samples/{task}.jsonl" for name in ("job", "one"))
        ]
        assert len(rows[0]) == 6
        if task == "verses_written":
            assert rows[0] == rows[1]
        else:
            np.testing.assert_allclose(*(np.asarray(part, object)[..., 0].astype(float) for part in rows), rtol=1e-5)


@pytest.mark.slow
def test_the_first_process_killed(flags, recipe_file, tmp_path) -> None:
    """It is the coordinator: the other one ends at once, with one line."""
    job = Job(["merge", recipe_file, *flags, "--out", tmp_path / "run", "--mesh", MESH])
    job.wait_for_stage(tmp_path / "run", "activations:target")
    job.processes[0].send_signal(signal.SIGKILL)
    (code, *_), (other, printed, error) = job.end(timeout=300)
    assert code == -signal.SIGKILL and other == 1 and printed == ""
    assert len(errors(error)) == 1 and "resumes" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--coordinator", "127.0.0.1:9"], "go with --distributed"),
        (["--distributed", "--coordinator", "127.0.0.1:9"], "belong together"),
        (["--distributed", "--coordinator", "here", "--num-processes", "2", "--process-id", "0"], "write HOST:PORT"),
        (
            ["--distributed", "--coordinator", "a:9", "--num-processes", "2", "--process-id", "2"],
            "not one of 2 processes",
        ),
    ],
)
def test_what_is_wrong_with_a_job_is_said(flags, recipe_file, tmp_path, capfd, more: list[str], said: str) -> None:
    code = cli.run(["merge", recipe_file, *flags, "--out", str(tmp_path / "run"), *more])
    error = capfd.readouterr().err
    assert code == 2 and len(errors(error)) == 1 and said in error and not (tmp_path / "run").exists()


def test_no_job_around_it(flags, recipe_file, tmp_path) -> None:
    """In a process of its own: a job must be joined before any device is used."""
    command = [
        sys.executable,
        "-m",
        "tmjax.cli",
        "merge",
        recipe_file,
        *flags,
        "--out",
        tmp_path / "run",
        "--distributed",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(errors(done.stderr)) == 1 and done.stdout == ""
    assert "found no TPU pod, SLURM, Open MPI or Kubernetes job" in done.stderr and not (tmp_path / "run").exists()
