"""The same merge on one device, on eight simulated devices and on two processes of four: are the weights the same?

    python experiments/bench/placements.py experiments/swahili/recipe.yaml -- --preset barycentric --no-controls

Each is a `tmjax merge` of its own on this machine's processor. Prints what each manifest says did the work, and for
every checkpoint (merged, controls) the largest difference from one device's, relative to each tensor's largest entry.
What a source writes is sampled, and rounding can turn a token of it: presets that hear such texts differ by more.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.numpy import load_file

MESH = "data=2,fsdp=2,tensor=2"
#: Name -> processes, devices of each, mesh.
PLACES = {
    "1 device": (1, 1, "data=1"),
    "8 devices": (1, 8, MESH),
    "2 processes x 4 devices": (2, 4, MESH),
}


def merge(recipe: Path, out: Path, processes: int, devices: int, mesh: str, more: list[str]) -> dict:
    """Runs `tmjax merge` in so many processes at once; returns the manifest that the first one prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [
        sys.executable,
        "-m",
        "tmjax",
        "merge",
        str(recipe),
        "--out",
        str(out),
        "--mesh",
        mesh,
        "--json",
        *more,
    ]
    started = []
    for process in range(processes):
        job = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
        own = command + ([*job, "--process-id", str(process)] if processes > 1 else [])
        started.append(
            subprocess.Popen(own, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate() for process in started]
    for process, (_, error) in zip(started, told, strict=True):
        if process.returncode:
            raise SystemExit(error)
    if any(output for output, _ in told[1:]):
        raise SystemExit("a process other than the first printed results")
    return json.loads(told[0][0])


def difference(one: Path, other: Path) -> float:
    """Largest |a - b| / max |a| over the tensors of two checkpoints."""
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    if first.keys() != second.keys():
        raise SystemExit(f"{other} has other tensors than {one}")
    return max(float(np.abs(first[name] - second[name]).max() / np.abs(first[name]).max()) for name in first)


def main(
    recipe: Annotated[Path, typer.Argument(help="Recipe.")],
    more: Annotated[list[str] | None, typer.Argument(help="More flags of `tmjax merge`, after --.")] = None,
) -> None:
    """Prints one line per place; exit code 1 where a tensor differs by more than 1e-5 of its largest entry."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, (processes, devices, mesh) in PLACES.items():
            started, out = time.perf_counter(), Path(folder) / name.replace(" ", "-")
            manifest = merge(recipe, out, processes, devices, mesh, more or [])
            seconds = time.perf_counter() - started
            found = {}
            for path in [out / "merged", *sorted((out / "controls").glob("*"))]:
                found[path.name] = difference(Path(folder) / "1-device" / path.relative_to(out), path)
            worst = max(worst, *found.values())
            sizes = ",".join(f"{axis}={size}" for axis, size in manifest["mesh"].items())
            bits = manifest["evaluation"].get("merged", {}).get("bits_per_byte")
            print(
                f"{name}: manifest mesh {sizes}, devices {manifest['devices']}, processes {manifest['processes']};"
                f" merged {bits} bits/byte; {seconds:.0f} s; "
                + ", ".join(f"{checkpoint} {value:.1e}" for checkpoint, value in found.items()),
                flush=True,
            )
    raise SystemExit(worst > 1e-5)


if __name__ == "__main__":
    typer.run(main)
