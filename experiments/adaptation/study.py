"""Does source knowledge arrive by training? Every mode, every term alone and together, placebos: one table a pair.

    python experiments/adaptation/study.py experiments/swahili/recipe.yaml --out runs/adaptation [--seeds 0,1,2]

All arms of a seed share their texts, updates, grid of learning rates and steps, and selection on the validation texts.
A seed draws the calibration texts (300 of the recipe's file; the first ones for seed 0), what the models write, and the
order of training. The first seed tries the whole grid; the others use what it chose for each arm (`--whole-grid`: all
do); ablations of one option use what the arm they change has chosen. Finished arms are not trained again, so an
interrupted study goes on where it was.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.commands.adapt.arms import Arm
from tmjax.commands.adapt.run import Adapt
from tmjax.evaluate.bootstrap import percentile_interval
from tmjax.files.atomic import write_text
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.text.documents import read_texts
from tmjax.transfer.recipe import build_recipe
from tools.draws import draws
from tools.script import script

TEXTS = 300
FIRST = 400


def _terms(*names: str, texts_by: str | None = None, **options: Any) -> Arm:
    return Arm("sft", "target", frozenset(names) | ({"generated"} if texts_by else set()), texts_by, **options)


#: Every arm: what is trained, beside what each term adds and its placebos.
ARMS = {
    "control:sft": _terms(),
    "adapted": _terms("guidance", "distillation", texts_by="source"),
    "source_written": _terms(texts_by="source"),
    "written+distilled": _terms("distillation", texts_by="source"),
    "distilled": _terms("distillation"),
    "guided": _terms("guidance"),
    "written+guided": _terms("guidance", texts_by="source"),
    "residual_frozen": Arm("residual-frozen", "merged"),
    "control:target_written": _terms(texts_by="target"),
    "control:shuffled_rows": _terms("guidance", "distillation", texts_by="target", shuffled=True),
    "control:random_source": _terms("guidance", "distillation", texts_by="random_source", teacher="random_source"),
}
#: Arms with one option changed; trained with the schedule that the arm they change has chosen.
ABLATIONS = {
    "guided, fisher": "guided",
    "guided, annealed": "guided",
    "adapted, fisher": "adapted",
    "adapted, annealed": "adapted",
}
ARMS |= {
    name: replace(ARMS[whole], **({"metric": "fisher"} if name.endswith("fisher") else {"anneal": 0.0}))
    for name, whole in ABLATIONS.items()
}
WHAT = {
    "control:sft": "SFT on the texts (best of its own grid)",
    "residual_frozen": "residual-frozen, from the merge (paper)",
    "guided": "guided",
    "distilled": "distilled",
    "source_written": "SFT, + texts by the source",
    "written+guided": "guided, + texts by the source",
    "written+distilled": "distilled, + texts by the source",
    "adapted": "guided and distilled, + texts by the source",
    "guided, fisher": "guided, errors weighted by the read-out's Fisher information",
    "guided, annealed": "guided, weight falling to 0",
    "adapted, fisher": "all terms, features' errors weighted by the read-out's Fisher information",
    "adapted, annealed": "all terms, weights falling to 0",
    "control:target_written": "SFT, + texts by the target",
    "control:shuffled_rows": "guided and distilled by shuffled rows, + texts by the target",
    "control:random_source": "guided and distilled by a random source, + texts by it",
}


def subset(recipe: dict[str, Any], seed: int, folder: Path) -> Path:
    """The seed's calibration texts, as a file."""
    texts = read_texts(recipe["texts"])
    chosen = range(TEXTS) if seed == 0 else sorted(np.random.default_rng(seed).permutation(len(texts))[:TEXTS])
    lines = [json.dumps({"id": texts.ids[i], "text": texts.texts[i]}, ensure_ascii=False) for i in chosen]
    file = folder / f"calibration-{seed}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, "\n".join(lines) + "\n")
    return file


def run_seed(
    recipe: dict[str, Any], seed: int, folder: Path, chosen: dict[str, list[tuple[int, float]]] | None
) -> dict[str, list[tuple[int, float]]]:
    """Trains and scores the arms of one seed with the schedules `chosen`, or all; returns the one that each took."""

    def show(stage: str, done: int, total: int, note: str) -> None:
        if done == total:
            print(f"  seed {seed}: {stage} {note}", file=sys.stderr, flush=True)

    told = {name: recipe[name] for name in ("source", "target", "valid", "test")}
    told |= {"texts": str(subset(recipe, seed, folder)), "out": str(folder / f"seed-{seed}"), "seed": seed}
    told |= {"mode": "combined"}
    adapt = Adapt(build_adapt_recipe(told), show=show, arms=ARMS, schedules=chosen)
    trained = {arm: adapt.train(arm) for arm in ARMS if arm not in ABLATIONS}
    took = {arm: [(f.planned_steps, f.lr)] for arm, f in adapt.run.manifest.training.items()}
    adapt.evaluate(trained | {arm: adapt.train(arm, took[whole]) for arm, whole in ABLATIONS.items()})
    return {arm: took[arm] for arm in trained}


def first_bytes(scores: list[Any], documents: int) -> dict[str, float]:
    """Bits per byte of every arm on the first test documents, averaged over seeds."""
    size = scores[0]["bytes"][:documents].sum()
    names = [name for name in scores[0].files if name != "bytes"]
    return {n: float(np.mean([held[n][:documents].sum() for held in scores]) / math.log(2) / size) for n in names}


def _rounded(digits: int, *values: float) -> list[float]:
    """Rounded, without negative zeros."""
    return [round(float(value), digits) + 0.0 for value in values]


def table(folder: Path, seeds: list[int]) -> str:
    """Markdown: every arm's bits per byte with its spread over seeds, and what it gains on SFT, with 95% intervals."""
    scores = [np.load(folder / f"seed-{seed}" / "scores.npz") for seed in seeds]
    names = ["target", "source", *WHAT]
    bits = np.stack([np.stack([held[name] for name in names], axis=1) for held in scores]) / math.log(2)
    size = scores[0]["bytes"].astype(np.float64)
    each = bits.sum(axis=1) / size.sum()
    drawn = draws(bits, size)
    point, sft = each.mean(axis=0), names.index("control:sft")
    gap = drawn[:, 0] - drawn[:, 1]
    first = first_bytes(scores, FIRST)
    lines = [
        f"| arm | bits/byte, {len(size)} documents | over seeds | first {FIRST} | gain on SFT [95%] | of the gap |",
        "|---|---|---|---|---|---|",
    ]
    for i, name in enumerate(names):
        gain = drawn[:, sft] - drawn[:, i]
        (low, high), (least, most) = percentile_interval(gain), percentile_interval(gain / gap)
        share = (point[sft] - point[i]) / (point[0] - point[1])
        told = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*_rounded(4, point[sft] - point[i], low, high))
        shares = "{:.1f}% [{:.1f}, {:.1f}]".format(*_rounded(1, 100 * share, 100 * least, 100 * most))
        spread = "" if i < 2 else f"{each[:, i].min():.4f} to {each[:, i].max():.4f}"
        lines.append(
            f"| {WHAT.get(name, name)} | {point[i]:.4f} | {spread} | {first[name]:.4f} | {'' if i == sft else told} | "
            f"{'' if i == sft else shares} |"
        )
    controls = [i for i, name in enumerate(names) if name.startswith("control:")]
    best = names.index("adapted")
    gain = np.min([drawn[:, i] - drawn[:, best] for i in controls], axis=0)
    low, high = percentile_interval(gain)
    least = min(controls, key=lambda i: point[i])
    lines += [
        "",
        f"Seeds {', '.join(map(str, seeds))}. Gain of all terms together over the best control ({WHAT[names[least]]}): "
        f"{point[least] - point[best]:+.4f} [{low:+.4f}, {high:+.4f}] bits/byte, "
        f"{100 * (point[least] - point[best]) / (point[0] - point[1]):.1f}% of the gap.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the seeds one after the other and writes OUT/NAME/table.md after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of a merge: its models, calibration, valid and test texts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--whole-grid", action="store_true", help="all seeds try every schedule")
    told = parser.parse_args()
    recipe = build_recipe(read_recipe(told.recipe), base=told.recipe.parent).model_dump(mode="json")
    folder = told.out / told.recipe.resolve().parent.name
    done, chosen = [], None
    for seed in map(int, told.seeds.split(",")):
        found = run_seed(recipe, seed, folder, chosen)
        chosen = None if told.whole_grid else chosen or found
        done.append(seed)
        write_text(folder / "table.md", table(folder, done))
    print((folder / "table.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    with script("study", resumes=True):
        main()
