"""A job of two real processes with devices of their own, over loopback."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest
from helpers import xla_flags


class Job:
    """The same command in two processes. Ended with the test, whatever happens."""

    def __init__(
        self, arguments: Sequence[object], *, own: Sequence[Sequence[object]] = ((), ()), devices: int = 4
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices), "PYTHONFAULTHANDLER": "1"}
        where = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
        # Files, not pipes: a pipe that nobody reads while the other process is waited for would stop its writer.
        self._streams = [tuple(tempfile.TemporaryFile("w+") for _ in range(2)) for _ in range(2)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tmjax.cli", *map(str, [*arguments, *own[process], *where, process])],
                env=environment,
                stdout=stdout,
                stderr=stderr,
            )
            for process, (stdout, stderr) in enumerate(self._streams)
        ]

    def end(self, timeout: float = 240) -> list[tuple[int, str, str]]:
        """Exit status, standard output and standard error of both; a job that hangs says where."""
        until = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(until - time.monotonic())
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job hangs: {self._stacks()}")
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        written = [tuple(map(_text, streams)) for streams in self._streams]
        for stream in itertools.chain(*self._streams):
            stream.close()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, written, strict=True)]

    def _stacks(self) -> str:
        """What both processes wrote, and the Python stacks of their threads."""
        for process in self.processes:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGABRT)  # faulthandler writes the stacks into the job's log
        time.sleep(5)
        written = [_text(stderr) for _, stderr in self._streams]
        logs = [Path(log).read_text() for text in written for log in re.findall(r"\(log: (\S+)\)", text)]
        return "\n".join([*written, *logs])

    def wait_for_stage(self, out: Path, stage: str, timeout: float = 600) -> None:
        """Waits until the manifest of a run has a stage."""
        manifest, until = out / "manifest.json", time.monotonic() + timeout
        while not (manifest.exists() and stage in json.loads(manifest.read_text())["stages"]):
            if time.monotonic() > until or any(process.poll() is not None for process in self.processes):
                pytest.fail(f"never saw {stage}: {self.end(timeout=1)}")
            time.sleep(0.02)


def _text(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "tmjax: error:" in line]
