"""Progress on standard error: bars on a terminal, lines in a log, and nothing of it on standard output."""

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from tmjax.report.progress import Bars, Lines


def test_lines_tell_of_begin_end_and_every_while() -> None:
    stream = io.StringIO()
    with Lines(stream, every=0.1) as lines:
        lines.step("fuse", 0, 0)
        lines.step("fuse", 2, 8, "a note")
        lines.say("tmjax: warning: beware")
        time.sleep(0.25)
        lines.step("inner", 0, 0)
        time.sleep(0.15)
        lines.step("inner", 1, 0)
        lines.step("fuse", 1, 0)
    said = stream.getvalue().splitlines()
    assert said[:2] == ["tmjax: fuse ...", "tmjax: warning: beware"] and said[-1] == "tmjax: fuse: done in 0:00"
    assert re.fullmatch(r"tmjax: fuse: 2/8, 0:00 so far, about 0:0\d left, a note", said[2])
    assert said.index("tmjax: inner ...") < said.index("tmjax: inner, 0:00 so far") < len(said) - 2
    assert said[-2] == "tmjax: inner: done in 0:00"


def test_a_stage_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Lines(stream) as lines:
        lines.step("fuse", 3, 8)
        raise ValueError("broken")
    assert stream.getvalue() == "tmjax: fuse ...\n"


def test_bars_are_full_once_a_stage_has_ended() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Bars(console) as bars:
        bars.step("fuse", 0, 0)
        bars.step("fuse", 3, 8, "a note")
        assert [(task.completed, task.total, task.description) for task in bars.display.tasks] == [
            (3, 8, "fuse  a note")
        ]
        bars.step("fuse", 1, 0)
        bars.step("report", 0, 0)
        bars.step("report", 1, 0)
        assert [(task.completed, task.total) for task in bars.display.tasks] == [(8, 8), (1, 1)]


def test_a_run_without_a_terminal_writes_lines(small_flags, recipe_file, tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "tmjax.cli",
        "merge",
        recipe_file,
        *small_flags,
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"})
    manifest = json.loads(done.stdout)
    lines = done.stderr.splitlines()
    for stage in manifest["stages"]:
        ended = [line for line in lines if re.fullmatch(rf"tmjax: {stage}: done in \d+:\d\d", line)]
        assert lines.count(f"tmjax: {stage} ...") == len(ended) == 1
    assert all(line.startswith("tmjax: ") for line in lines) and "\x1b" not in done.stderr
