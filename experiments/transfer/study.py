"""Which operator transfers anything: every setting with all controls, one table with paired intervals; resumable.

    python experiments/transfer/study.py experiments/swahili/recipe.yaml --out runs/transfer [--only "plain;lexical"]

A setting is a change of the recipe under the preset `barycentric`. Each is run with every number of calibration texts
(`--sizes`) and every seed, which also chooses the texts. OUT/table.md and OUT/gain.png tell of all that was ever run
there. Finished settings are not run again, one that failed is, an interrupted one goes on where it was. Of a finished
one its scores, manifest and report are kept, not the gigabyte of activations and models.
"""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import transplant
from figures import HEADER, figure, tables

from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.merge.run import Merge
from tmjax.errors import TmjaxError
from tmjax.evaluate.bits import Scores
from tmjax.evaluate.bootstrap import Draws, source_gain
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import write_bytes, write_json, write_text
from tmjax.recipes.base import read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.recipes.presets import PRESETS
from tmjax.transfer.recipe import build_recipe
from tools.script import script

#: What remains of a finished setting's run directory.
KEPT = ("scores.npz", "manifest.json", "report.html")
LEARNED = {"fit": "learned"}
FULL = {"structure": "full", "solver": "cover", "depth": "monotone"}
UNMOVED = {"alphas": [0.0], "betas": [0.0]}
#: Fewer texts that the source writes and fewer rounds.
QUICK = PRESETS["quick"]["fusion"]["solve"]
#: Changes of the recipe, by name; or an operator of its own.
SETTINGS: dict[str, dict[str, Any] | Callable[..., tuple[dict[str, Scores], dict[str, Any]]]] = {
    "plain": {},
    "plain, learned": {"fusion": LEARNED},
    "epsilon 0.005": {"alignment": {"epsilon": 0.005}},
    "epsilon 0.1": {"alignment": {"epsilon": 0.1}},
    "pooled over texts": {"activations": {"pooling": "sequence"}},
    "solver signed": {"alignment": {"solver": "signed"}},
    "solver lowrank": {"alignment": {"solver": "lowrank"}},
    "solver greedy": {"alignment": {"solver": "greedy"}},
    "solver ridge": {"alignment": {"solver": "ridge"}},
    "solver procrustes": {"alignment": {"solver": "procrustes"}},
    "monotone": {"alignment": {"depth": "monotone"}},
    "heads": {"alignment": {"structure": "heads"}},
    "heads, learned": {"alignment": {"structure": "heads"}, "fusion": LEARNED},
    "full, soft, learned": {"alignment": {"structure": "full"}, "fusion": LEARNED},
    "full, hard, monotone": {"alignment": FULL},
    "full, hard, monotone, learned": {"alignment": FULL, "fusion": LEARNED},
    "full, per head": {"alignment": FULL, "fusion": LEARNED | {"learning": {"granularity": "head"}}},
    "full, per unit": {"alignment": FULL, "fusion": LEARNED | {"learning": {"granularity": "unit"}}},
    "full, per layer stream": {"alignment": FULL | {"residual": "layer"}, "fusion": LEARNED},
    "full, embeddings": {"alignment": FULL, "fusion": LEARNED | {"embeddings": "shared"}},
    "attention only": {"alignment": FULL, "fusion": LEARNED | {"roles": ["q", "k", "v", "o"]}},
    "mlp only": {"alignment": FULL, "fusion": LEARNED | {"roles": ["gate", "up", "down"]}},
    "regression": {"fusion": {"transport": "regression", "norm_match": False, "beta": "tied"}},
    "regression, learned": {"fusion": LEARNED | {"transport": "regression", "norm_match": False}},
    "lexical": {"fusion": {"lexical": {}, **UNMOVED}},
    "unit transplant": transplant.run,
    "predictions": {"fusion": {"solve": QUICK}},
    "lexical, predictions": {"preset": "quick"},
    "predictions, readout": {"fusion": {"solve": QUICK | {"reach": "readout"}}},
    "predictions, calibration texts alone": {"fusion": {"solve": QUICK | {"written": 0}}},
    "predictions, nothing transported": {"fusion": {"solve": QUICK, **UNMOVED}},
    "lexical, predictions, longer": {"preset": "predictions"},
}


def nested(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a change, sections merged."""
    both = base | change
    return both | {
        key: nested(base[key], value) for key, value in change.items() if isinstance(value, dict) and key in base
    }


def fitting(recipe: Recipe) -> Recipe:
    """The recipe with those of its roles that both models have: an MLP may have no gate."""
    if recipe.fusion.roles is None:
        return recipe

    def with_roles(roles: tuple[str, ...] | None) -> Recipe:
        return recipe.model_copy(update={"fusion": recipe.fusion.model_copy(update={"roles": roles})})

    shared = Inputs(with_roles(None)).projections
    return with_roles(tuple(role for role in recipe.fusion.roles if role in shared))


def measure(name: str, recipe: Path, out: Path, seed: int, texts: int) -> dict[str, Any]:
    """Facts of one setting and seed: evaluation, gain due to the source, what was chosen; or why it failed."""
    setting = SETTINGS[name]
    change = nested({} if callable(setting) else setting, {"seed": seed, "controls": True, "allow_negligible": True})
    change["out"] = str(out)
    base = nested(read_recipe(recipe) | {"preset": "barycentric"}, {"activations": {"max_texts": texts}})
    told = fitting(build_recipe(nested(base, change), base=recipe.parent))
    done = out.parent / f"{out.name}.json"
    if done.exists():
        held = json.loads(done.read_text(encoding="utf-8"))
        if "error" not in held and held["recipe"] == told.model_dump(mode="json"):
            return held
    try:
        if callable(setting):
            scores, chosen = setting(told, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
            facts = evaluation_facts(scores, draws=told.evaluation.draws, seed=seed).to_json() | {"chosen": chosen}
            out.mkdir(exist_ok=True)
            each = {arm: held.nll for arm, held in scores.items()}
            np.savez(out / "scores.npz", bytes=scores["target"].bytes, **each)
        else:
            manifest = Merge(told).all()
            facts = {key: manifest[key] for key in ("evaluation", "source_gain") if key in manifest}
    except TmjaxError as error:
        facts = {"error": str(error)}
    size = told.activations.max_texts
    facts |= {"name": name, "texts": size, "seed": seed, "recipe": told.model_dump(mode="json")}
    write_json(done, facts)
    # Only of a run directory, which the merge has known for its own, and not of one that failed.
    if not callable(setting) and "error" not in facts:
        for part in out.iterdir():
            if part.is_dir():
                shutil.rmtree(part)
            elif part.name not in KEPT:
                part.unlink()
    return facts


def pooled(rows: list[dict[str, Any]], folders: list[Path], *, draws: int = 10000) -> dict[str, Any]:
    """Facts of a setting over its seeds: every draw resamples documents, the same for all arms and seeds, and seeds."""
    held = [np.load(folder / "scores.npz") for folder in folders]
    arms = [arm for arm in held[0].files if arm != "bytes"]
    size = held[0]["bytes"].astype(np.float64)
    generator = np.random.default_rng(0)
    documents = generator.multinomial(len(size), np.full(len(size), 1 / len(size)), size=draws)
    seeds = generator.multinomial(len(held), np.full(len(held), 1 / len(held)), size=draws)
    samples, point = {}, {}
    for arm in arms:
        bits = np.stack([item[arm] for item in held]) / np.log(2)
        samples[arm] = np.sum(documents @ bits.T * seeds, axis=1) / (documents @ size * len(held))
        point[arm] = float(bits.sum() / size.sum() / len(held))
    found = Draws(point, samples)
    evaluation = {arm: {"bits_per_byte": point[arm], "ci95": list(found.interval(arm))} for arm in arms}
    gain = source_gain(found, [arm for arm in arms if arm.startswith("control:")])
    common = {key: rows[0][key] for key in ("name", "texts")}
    return common | {"seed": f"all {len(held)}", "evaluation": evaluation, "source_gain": gain}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line per setting and seed."""
    lines = [
        HEADER,
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['name']} | {row['texts']} | {row['seed']} |"
        if "error" in row:
            lines.append(f"{head} | | | {row['error']} | |")
            continue
        bits = {arm: held["bits_per_byte"] for arm, held in row["evaluation"].items()}
        gain = row["source_gain"]
        low, high = gain["ci95"]
        share = "" if gain["fraction_of_gap"] is None else f"{100 * gain['fraction_of_gap']:.1f}%"
        control = gain["best_control"]
        lines.append(
            f"{head} {bits['target']:.4f} | {bits['merged']:.4f} | {bits[control]:.4f} "
            f"({control.removeprefix('control:')}) | {gain['bits_per_byte']:+.4f} [{low:+.4f}, {high:+.4f}] | {share} |"
        )
    return "\n".join(lines) + "\n"


def collected(out: Path) -> list[dict[str, Any]]:
    """What has been run in a folder, in the order of the settings; after the seeds of one, all of them together."""
    found: dict[tuple[int, int], list[tuple[dict[str, Any], Path]]] = {}
    names = list(SETTINGS)
    for file in sorted(out.glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["name"] in names:
            found.setdefault((names.index(facts["name"]), facts["texts"]), []).append((facts, file.with_suffix("")))
    rows = []
    for key in sorted(found):
        held = sorted(found[key], key=lambda item: item[0]["seed"])
        rows += [facts for facts, _ in held]
        scored = [(facts, folder) for facts, folder in held if "error" not in facts]
        if len(scored) > 1:
            rows.append(pooled([facts for facts, _ in scored], [folder for _, folder in scored]))
    return rows


def main() -> None:
    """Runs the settings and writes OUT/table.md and OUT/gain.png after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="settings, separated by semicolons")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sizes", help="numbers of calibration texts, such as 30,100,1000; the recipe's unless given")
    told = parser.parse_args()
    names = list(SETTINGS) if told.only is None else [name.strip() for name in told.only.split(";")]
    unknown = sorted(set(names) - set(SETTINGS))
    if unknown:
        parser.error(f"unknown settings {', '.join(unknown)}; there are {'; '.join(SETTINGS)}")
    told.out.mkdir(parents=True, exist_ok=True)
    usual = build_recipe(read_recipe(told.recipe)).activations.max_texts
    sizes = [usual] if told.sizes is None else [int(size) for size in told.sizes.split(",")]
    for name, size, seed in itertools.product(names, sizes, map(int, told.seeds.split(","))):
        print(f"{name}, {size} texts, seed {seed}", file=sys.stderr, flush=True)
        parts = [name.replace(", ", "-").replace(" ", "_"), *([] if size == usual else [f"{size}_texts"]), str(seed)]
        measure(name, told.recipe, told.out / "-".join(parts), seed, size)
        text = table(collected(told.out))
        write_text(told.out / "table.md", text)
        if tables(text)[0][1]:
            write_bytes(told.out / "gain.png", figure(text))
    print(text, end="")


if __name__ == "__main__":
    with script("study", resumes=True):
        main()
