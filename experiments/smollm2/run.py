"""A real public model as source, end to end: merge, adaptation, every control, three seeds; resumable.

    python -m tools.smollm2 runs/smollm2
    python experiments/smollm2/run.py runs/medical

Each part is a command of tmjax in a process of its own, so that its memory is its own too. What has been measured so
far is in OUT/table.md, after every part; the same command goes on where it was interrupted.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.errors import InputError
from tmjax.evaluate.bootstrap import percentile_interval
from tmjax.files.atomic import write_text
from tools.draws import draws
from tools.script import script

HERE = Path(__file__).resolve().parent
#: Parts by the folder that each has, and what tmjax is told: the first seed of an adaptation runs every control.
PARTS = {
    "merge": ("merge", "recipe.yaml"),
    "adapt": ("adapt", "adapt.yaml"),
    **{
        f"{mode}-{seed}": ("adapt", "adapt.yaml", "--mode", mode, "--seed", str(seed), "--no-controls")
        for seed in (1, 2)
        for mode in ("combined", "sft")
    },
}
#: Over seeds: the folder of each seed and the arm in it.
SEEDS = {
    "combined": [("adapt", "adapted"), ("combined-1", "adapted"), ("combined-2", "adapted")],
    "sft": [("adapt", "control:sft"), ("sft-1", "adapted"), ("sft-2", "adapted")],
}
#: Stages of a run without its controls.
WITHOUT_CONTROLS = {
    "merge": ("activations:target", "activations:source", "alignment", "fuse"),
    "adapt": ("train:adapted",),
}
_STAGES = (*WITHOUT_CONTROLS["merge"], "generate:source", "teacher:source")
_STAGES += ("features:source-on-source", "features:target-on-source", "teacher:source-on-source", "train:adapted")


def manifest(folder: Path) -> dict[str, Any] | None:
    """What a finished part knows of itself; None of one that is not finished."""
    file = folder / "manifest.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return held if "report" in held.get("stages", {}) else None


def arms_table(held: dict[str, Any]) -> list[str]:
    """Markdown: every arm's bits per byte and its 95% interval over documents."""
    target = held["evaluation"]["target"]["bits_per_byte"]
    lines = ["| arm | bits/byte | 95% | against the target |", "|---|---|---|---|"]
    for arm, item in held["evaluation"].items():
        low, high = item["ci95"]
        bits = item["bits_per_byte"]
        lines.append(f"| {arm} | {bits:.4f} | [{low:.4f}, {high:.4f}] | {bits - target:+.4f} |")
    gain = held["source_gain"]
    if gain:
        low, high = gain["ci95"]
        share = gain["fraction_of_gap"]
        told = "" if share is None else f", {100 * share:.1f}% of the gap"
        lines += [
            "",
            f"Gain due to the source over the best control ({gain['best_control']}): {gain['bits_per_byte']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] bits/byte{told}.",
        ]
    return lines


def stages_table(held: dict[str, Any], part: str) -> list[str]:
    """Markdown: seconds and peak memory of the stages that a run without controls has."""
    lines = ["| stage | seconds | peak memory so far, GiB |", "|---|---|---|"]
    stages = held["stages"]
    for name in (name for name in _STAGES if name in stages):
        lines.append(f"| {name} | {stages[name]['seconds']:.0f} | {stages[name]['peak_rss_mib'] / 1024:.2f} |")
    chosen = [stages[name] for name in WITHOUT_CONTROLS[part] if name in stages]
    seconds, peak = sum(item["seconds"] for item in chosen), max(item["peak_rss_mib"] for item in chosen)
    lines.append(f"| all, without controls and evaluation | {seconds:.0f} | {peak / 1024:.2f} |")
    return lines


def seeds_table(out: Path) -> list[str]:
    """Markdown: bits per byte of both modes for every seed, and the difference over seeds and documents."""
    folders = {folder for runs in SEEDS.values() for folder, _ in runs}
    if any(manifest(out / folder) is None for folder in folders):
        return []
    scores = {folder: np.load(out / folder / "scores.npz") for folder in folders}
    size = next(iter(scores.values()))["bytes"].astype(np.float64)
    # [seed, document, mode]
    bits = np.stack([np.stack([scores[f][arm] for f, arm in runs]) for runs in SEEDS.values()], axis=-1) / np.log(2)
    each = bits.sum(axis=1) / size.sum()
    lines = ["| mode | seed 0 | seed 1 | seed 2 | mean |", "|---|---|---|---|---|"]
    for number, mode in enumerate(SEEDS):
        values = " | ".join(f"{value:.4f}" for value in each[:, number])
        lines.append(f"| {mode} | {values} | {each[:, number].mean():.4f} |")
    drawn, point = draws(bits, size), each.mean(axis=0)
    low, high = percentile_interval(drawn[:, 1] - drawn[:, 0])
    told = f"combined gains {point[1] - point[0]:+.4f} [{low:+.4f}, {high:+.4f}] bits/byte on sft"
    return [*lines, "", f"Over seeds and documents, {told}."]


def tables(out: Path) -> str:
    """What has been measured so far, as Markdown."""
    lines: list[str] = []
    for part, title in (("merge", "Merge, preset `quick`"), ("adapt", "Adaptation, mode `combined`, seed 0")):
        held = manifest(out / part)
        if held is not None:
            lines += [f"### {title}", "", *arms_table(held), "", *stages_table(held, part), ""]
    over_seeds = seeds_table(out)
    if over_seeds:
        lines += ["### Three seeds", "", *over_seeds, ""]
    return "\n".join(lines)


def main() -> None:
    """Runs the parts that are missing, and writes OUT/table.md after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--source", type=Path, default=Path("runs/smollm2"), help="what tools.smollm2 made")
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    told = parser.parse_args()
    names = list(PARTS) if told.only is None else told.only.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not told.source.is_dir():
        raise InputError(f"no {told.source}; make it with python -m tools.smollm2 {told.source}")
    for name in names:
        print(f"{name}:", file=sys.stderr, flush=True)
        command, recipe, *options = PARTS[name]
        options += ["--source", str(told.source), "--out", str(told.out / name)]
        done = subprocess.run([sys.executable, "-m", "tmjax", command, str(HERE / recipe), *options], check=False)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise InputError(f"{name} ended with status {done.returncode}, as said above")
        write_text(told.out / "table.md", tables(told.out))
    print(tables(told.out), end="")


if __name__ == "__main__":
    with script("smollm2", resumes=True):
        main()
