"""Converts a checkpoint larger than it may hold in memory: peak memory and speed, next to a plain copy of its files.

    python experiments/bench/convert.py [--gigabytes 4] [--shard 1GB] [--dtype NAME] [--torch] [--folder DIR] [--json]

Makes a random checkpoint in a temporary folder (three times its size is needed on the disk), converts and copies it
each in a process of its own, so that each has its own peak, flushes to the disk inside the timed part, removes it all.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tmjax.models.spec import DecoderSpec  # noqa: E402
from tools.make_checkpoint import make_checkpoint  # noqa: E402

SPEC = DecoderSpec(
    vocab=32000, hidden=2048, layers=1, heads=16, kv_heads=16, head_dim=128, mlp=5632, max_positions=2048
)
_PREAMBLE = """
import os, re, shutil, sys, time
from pathlib import Path
# Not ru_maxrss, which begins at what the parent process held.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
source, out, dtype, shard = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
"""
_CONVERT = """
from tmjax.convert.stream import parse_dtype, stream
base, start = peak(), time.perf_counter()
stream(source, out, dtype=parse_dtype(dtype or None), max_shard_size=shard)
"""
_COPY = """
base, start = peak(), time.perf_counter()
shutil.copytree(source, out)
"""
_REPORT = """
os.sync()
print(time.perf_counter() - start, base, peak())
"""


def measured(work: str, *arguments: str) -> dict[str, float]:
    """Seconds, memory before and peak memory (GB) of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + work + _REPORT, *arguments],
        capture_output=True, text=True, check=True, cwd=REPO,
    )  # fmt: skip
    return dict(zip(("seconds", "base_gb", "peak_gb"), map(float, done.stdout.split()), strict=True))


def to_torch(directory: Path) -> None:
    """Replaces the shards of a checkpoint by PyTorch's format."""
    import torch
    from safetensors.torch import load_file

    weight_map = {}
    for number, file in enumerate(sorted(directory.glob("*.safetensors")), start=1):
        name, tensors = f"pytorch_model-{number:05d}.bin", load_file(file)
        torch.save(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard", default="1GB")
    parser.add_argument("--dtype", default="", help="cast to it while converting")
    parser.add_argument("--torch", action="store_true", help="from pytorch_model-*.bin")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    block = SPEC.hidden * (4 * SPEC.hidden + 3 * SPEC.mlp) * 4
    layers = max(1, round((options.gigabytes * 1e9 - 2 * SPEC.vocab * SPEC.hidden * 4) / block))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        if shutil.disk_usage(folder).free < 3.5e9 * options.gigabytes:
            sys.exit(f"{folder} has not three times {options.gigabytes} GB free")
        make_checkpoint(source, "llama", replace(SPEC, layers=layers), scale=0.02, max_shard_size=options.shard)
        if options.torch:
            to_torch(source)
        size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        result = {"gigabytes": size, "shards": len(list(source.glob("*model-*")))}
        for name, work in (("convert", _CONVERT), ("copy", _COPY), ("convert again", _CONVERT), ("copy again", _COPY)):
            found = measured(work, str(source), str(out), options.dtype, options.shard)
            result[name] = found | {"gb_per_second": size / found["seconds"]}
            shutil.rmtree(out)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{size:.2f} GB of float32 in {result['shards']} shards{f', cast to {options.dtype}' * bool(options.dtype)}")
    for name, found in result.items():
        if isinstance(found, dict):
            print(
                f"{name:14} {found['seconds']:6.1f} s  {found['gb_per_second']:5.2f} GB/s  "
                f"peak {found['peak_gb']:.2f} GB ({found['base_gb']:.2f} GB before)"
            )


if __name__ == "__main__":
    main()
