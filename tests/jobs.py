"""A job of two real processes with devices of their own, over loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
        where = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tmjax.cli", *map(str, [*arguments, *own[process], *where, process])],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]

    def end(self, timeout: float = 600) -> list[tuple[int, str, str]]:
        """Exit status, standard output and standard error of both."""
        try:
            told = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, told, strict=True)]

    def wait_for_stage(self, out: Path, stage: str, timeout: float = 600) -> None:
        """Waits until the manifest of a run has a stage."""
        manifest, until = out / "manifest.json", time.monotonic() + timeout
        while not (manifest.exists() and stage in json.loads(manifest.read_text())["stages"]):
            if time.monotonic() > until or any(process.poll() is not None for process in self.processes):
                pytest.fail(f"never saw {stage}: {self.end(timeout=1)}")
            time.sleep(0.02)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "tmjax: error:" in line]
