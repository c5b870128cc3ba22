"""Small merges and adaptations give the numbers that are stored, within 1e-6 of every tensor's largest entry.

`python -m tools.golden` records them. On a processor of another kind than the recording's the tolerance is larger.
"""

import os
import subprocess
import sys

import pytest

from tools.golden import CASES, differences, read

#: Cases that take seconds; the others are slow.
QUICK = ("one role", "sft")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def stored(repo) -> dict:
    return read(repo / "tests/data/golden.json.gz")


def test_every_case_is_stored(stored) -> None:
    assert set(stored) == set(CASES)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_case_gives_the_stored_numbers(name, repo) -> None:
    """In a process with as many devices as the recording had: with eight, threads share work otherwise."""
    command = [sys.executable, "-m", "tools.golden", "compare", "tests/data/golden.json.gz", "--only", name]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [*command, "--tolerance", str(TOLERANCE)],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_differences_are_seen(stored) -> None:
    case = stored["fixed alpha"]
    tensor, facts = next(iter(case["checkpoints"]["merged"].items()))
    moved = facts | {"sha256": "", "entries": [facts["entries"][0] + 1e-5 * facts["maximum"], *facts["entries"][1:]]}
    other = {**case, "checkpoints": {"merged": {**case["checkpoints"]["merged"], tensor: moved}}}
    for name, held in other["checkpoints"]["merged"].items():
        other["checkpoints"]["merged"][name] = {"sha256": "x", **held}
    assert len(differences(case, other, TOLERANCE)) == 1
    other["bits_per_byte"] = {**case["bits_per_byte"], "merged": case["bits_per_byte"]["merged"] * (1 + 1e-5)}
    assert len(differences(case, other, TOLERANCE)) == 2
