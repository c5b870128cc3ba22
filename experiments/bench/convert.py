"""Converts a checkpoint larger than it may hold in memory: peak memory and speed, next to a plain copy of its files.

    python experiments/bench/convert.py [--gigabytes 4] [--shard 1GB] [--stored float32] [--dtype NAME] [--torch]
        [--rounds 3] [--folder DIR] [--json]

Makes a random checkpoint in a temporary folder (four times its size is needed on the disk). Hugging Face to Hugging
Face, to orbax, back from that, and the copy take turns, each in a process of its own, so that each has its own peak;
flushes to the disk inside the timed part; removes it all. Prints medians of the times, and the largest peak.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tmjax.checkpoints.formats.safetensors import DTYPES_BY_NAME  # noqa: E402
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
from tmjax.commands.convert import convert, parse_dtype
base, start = peak(), time.perf_counter()
convert(str(source), out, to="{to}", dtype=parse_dtype(dtype or None), max_shard_size=shard)
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
    parser.add_argument("--stored", default="float32", help="dtype of the checkpoint")
    parser.add_argument("--dtype", default="", help="cast to it while converting")
    parser.add_argument("--torch", action="store_true", help="from pytorch_model-*.bin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    width = DTYPES_BY_NAME[options.stored].itemsize
    block = SPEC.hidden * (4 * SPEC.hidden + 3 * SPEC.mlp) * width
    layers = max(1, round((options.gigabytes * 1e9 - 2 * SPEC.vocab * SPEC.hidden * width) / block))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, orbax, out = (Path(folder) / name for name in ("source", "orbax", "out"))
        if shutil.disk_usage(folder).free < 4.5e9 * options.gigabytes:
            sys.exit(f"{folder} has not four times {options.gigabytes} GB free")
        make_checkpoint(
            source,
            "llama",
            replace(SPEC, layers=layers),
            dtype=options.stored,
            scale=0.02,
            max_shard_size=options.shard,
        )
        if options.torch:
            to_torch(source)
        size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        result = {"gigabytes": size, "shards": len(list(source.glob("*model-*"))), "rounds": options.rounds}
        works = {
            "hf -> hf": (_CONVERT.format(to="hf"), source, out),
            "hf -> orbax": (_CONVERT.format(to="orbax"), source, orbax),
            "orbax -> hf": (_CONVERT.format(to="hf"), orbax, out),
            "copy": (_COPY, source, out),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
        for _ in range(options.rounds):
            shutil.rmtree(orbax, ignore_errors=True)
            for name, (work, here, there) in works.items():
                found[name].append(measured(work, str(here), str(there), options.dtype, options.shard))
                shutil.rmtree(out, ignore_errors=True)
        for name, each in found.items():
            seconds = statistics.median(one["seconds"] for one in each)
            result[name] = {
                "seconds": seconds,
                "gb_per_second": size / seconds,
                "base_gb": max(one["base_gb"] for one in each),
                "peak_gb": max(one["peak_gb"] for one in each),
            }
    if options.json:
        print(json.dumps(result))
        return
    cast = f", cast to {options.dtype}" * bool(options.dtype)
    print(f"{size:.2f} GB of {options.stored} in {result['shards']} shards{cast}; medians of {options.rounds}")
    for name in works:
        one = result[name]
        print(
            f"{name:12} {one['seconds']:6.1f} s  {one['gb_per_second']:5.2f} GB/s  "
            f"peak {one['peak_gb']:.2f} GB ({one['base_gb']:.2f} GB before)"
        )


if __name__ == "__main__":
    main()
