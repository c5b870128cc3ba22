"""Several sources of one target: the gain due to each of them, and the cost of one that knows nothing.

    python experiments/sources/study.py experiments/sources/recipe.yaml --out runs/sources [--seeds 0,1,2]

The sources are those of the recipe, and the first of them beside a model of random weights (the architecture and the
tokenizer of the second). Each pair is mixed by weights and by prediction. Arms of a seed: both sources, each alone
(the other is left out, at equal budget), and none (`control:sft`). Finished arms are not trained again. The table is
OUT/table.md.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.checkpoints.description import describe
from tmjax.commands.adapt.arms import ADAPTED, SFT, arms_of
from tmjax.commands.adapt.run import Adapt
from tmjax.errors import InputError
from tmjax.evaluate.bootstrap import percentile_interval
from tmjax.files.atomic import write_text
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.recipes.sources import WITHOUT, Mixing
from tools.draws import draws
from tools.make_checkpoint import make_checkpoint
from tools.script import script

#: Arms of a run with two sources, and their rows of the table.
ROWS = {
    ADAPTED: "both",
    f"{WITHOUT}source-2": "the first alone",
    f"{WITHOUT}source": "the second alone",
    SFT: "none (plain training)",
}


def random_model(like: str, place: Path) -> str:
    """Makes a checkpoint of random weights with the architecture and the tokenizer of another, unless it exists."""
    if not place.is_dir():
        description = describe(Path(like))
        family = description.config["model_type"]
        make_checkpoint(place, family, description.spec, tokenizer=Path(like), scale=0.02, seed=1)
    return str(place)


def run(values: dict[str, Any], folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Trains and scores the arms of one run; returns the scores of the documents and the manifest."""

    def show(stage: str, done: int, total: int, note: str) -> None:
        if done == total:
            print(f"  {folder.name}: {stage} {note}", file=sys.stderr, flush=True)

    recipe = build_adapt_recipe(values | {"out": str(folder)})
    every = arms_of(recipe)
    adapt = Adapt(recipe, show=show, arms={name: every[name] for name in ROWS})
    adapt.all()
    return dict(np.load(folder / "scores.npz")), adapt.run.manifest.to_json()


def rows_of(results: list[tuple[dict[str, np.ndarray], dict[str, Any]]]) -> list[str]:
    """Rows of one pair and mixing over its seeds: scores, gain on plain training, gains due to each source."""
    scores, manifests = zip(*results, strict=True)
    names = list(ROWS)
    bits = np.stack([np.stack([own[name] for name in names], axis=1) for own in scores]) / math.log(2)
    size = scores[0]["bytes"].astype(np.float64)
    point, drawn = (bits.sum(axis=1) / size.sum()).mean(axis=0), draws(bits, size)
    lines = []
    for number, name in enumerate(names):
        texts = np.mean([manifest["training"][name]["texts"] for manifest in manifests])
        shares = [manifest["training"][name].get("source_shares", {}) for manifest in manifests]
        weight = " / ".join(f"{np.mean([own.get(key, 0.0) for own in shares]):.3f}" for key in ("source", "source-2"))
        cells = [ROWS[name], weight if any(shares) else "", f"{texts:.0f}", f"{point[number]:.4f}"]
        change = "" if name == ADAPTED else _interval(point[number] - point[0], drawn[:, number] - drawn[:, 0])
        lines.append(" | ".join([*cells, change]))
    return lines


def _interval(value: float, drawn: np.ndarray) -> str:
    low, high = percentile_interval(drawn)
    return f"{value:+z.4f} [{low:+z.4f}, {high:+z.4f}]"


def main() -> None:
    """Runs all pairs and mixings, seed by seed, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of an adaptation with two sources")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", default="0", help="seeds by commas (default: 0)")
    given = parser.parse_args()
    values = read_recipe(given.recipe)
    recipe = build_adapt_recipe(values, base=given.recipe.parent)
    if len(recipe.sources) != 2:
        raise InputError(f"{given.recipe} names {len(recipe.named_sources)} sources; this study compares two")
    first, second = (entry.source for entry in recipe.sources)
    pairs = {"two": [first, second], "noise": [first, random_model(second, given.out / "random-model")]}
    columns = ["sources, mixing", "arm", "weights", "texts", "bits/byte", "gain of both on it [95%]"]
    results: dict[tuple[str, str], list[Any]] = {}
    for seed in map(int, given.seeds.split(",")):
        for pair, sources in pairs.items():
            for mixing in get_args(Mixing):
                settings = values | {"sources": sources, "mixing": mixing, "seed": seed, "controls": True}
                folder = given.out / f"{pair}-{mixing}-{seed}"
                results.setdefault((pair, mixing), []).append(run(settings, folder))
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for (pair, mixing), own in results.items():
            lines += [f"| {pair}, by {mixing} | {row} |" for row in rows_of(own)]
        write_text(given.out / "table.md", "\n".join(lines) + "\n")
    print((given.out / "table.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    with script("sources", resumes=True):
        main()
