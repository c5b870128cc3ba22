"""Another vocabulary for a model: what each initialisation of the new rows costs, before and after training.

    python experiments/vocabulary/study.py experiments/swahili/recipe.yaml --out runs/vocabulary

The target of a recipe receives the tokenizer of the recipe's source, or new tokens learnt from the calibration texts;
the rows of new tokens come from each initialiser in turn. Every model is scored on the test texts right away, and after
200 steps on the calibration texts (learning rates 1e-3 and 3e-3; validation texts choose). Finished arms are not made
again. `--at-once` trains nothing. The table is OUT/PAIR/table.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.errors import InputError
from tmjax.files.atomic import write_text
from tmjax.recipes.base import read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.recipe import build_recipe
from tmjax.transplant.initialisers import INITIALISERS
from tools.script import script

HERE = Path(__file__).resolve().parent
KEPT = "unchanged"


def run(*arguments: str) -> dict[str, Any]:
    """Runs a command of tmjax in a process of its own; returns the object that it prints."""
    command = [sys.executable, "-m", "tmjax", *arguments, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise InputError(f"tmjax {' '.join(arguments[:2])} ended with status {done.returncode}, as said above")
    return json.loads(done.stdout)


def arms(added: int) -> dict[str, tuple[str, ...] | None]:
    """Options of `tmjax vocabulary` by the name of the arm; None: the target as it is."""
    result: dict[str, tuple[str, ...] | None] = {KEPT: None}
    for name in INITIALISERS:
        result[f"source's tokenizer, {name}"] = ("--tokenizer", "{source}", "--init", name)
    for name in INITIALISERS:
        result[f"{added} more tokens, {name}"] = ("--add", str(added), "--init", name)
    return result


def measure(recipe: str, out: Path, added: int, *, trains: bool) -> str:
    """Makes the arms of a pair that are missing; returns the table."""
    settings = build_recipe(read_recipe(Path(recipe)))
    texts = read_texts(settings.test).texts
    out.mkdir(parents=True, exist_ok=True)
    size = sum(len(text.encode()) for text in texts)
    columns = ["vocabulary, initialisation", "rows", "tokens per byte", "bits/byte at once"]
    columns += ["after 200 steps"] if trains else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for number, (name, options) in enumerate(arms(added).items()):
        model = settings.target if options is None else str(out / f"{number}")
        if options is not None and not Path(model).is_dir():
            given = [option.format(source=settings.source) for option in options]
            run("vocabulary", settings.target, model, *given, "--source", settings.source, "--texts", settings.texts)
        tokenizer = load_tokenizer(Path(model))
        length = sum(len(encoding.ids) for encoding in tokenizer.encode(texts)) / size
        scores = _scores(settings, model, out / f"{number}-adapted", trains=trains)
        lines.append(f"| {name} | {tokenizer.size} | {length:.4f} | {' | '.join(map(_bits, scores))} |")
        write_text(out / "table.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def _scores(settings: Recipe, model: str, trained: Path, *, trains: bool) -> list[dict[str, Any]]:
    """Scores of a model on the test texts, at once and, if it is trained, afterwards."""
    if not trains:
        return list(run("evaluate", model, "--texts", settings.test)["evaluation"].values())
    pair = ["--source", settings.source, "--target", model, "--texts", settings.texts]
    pair += ["--valid", settings.valid, "--test", settings.test]
    scores = run("adapt", str(HERE / "adapt.yaml"), *pair, "--out", str(trained))["evaluation"]
    return [scores["target"], scores["adapted"]]


def _bits(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{score['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}]"


def main() -> None:
    """Runs the study of one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe of a merge, for its pair and texts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--add", type=int, default=500, help="tokens that are learnt (default: 500)")
    parser.add_argument("--at-once", action="store_true", help="score the models untrained alone")
    given = parser.parse_args()
    place = given.out / Path(given.recipe).parent.name
    print(measure(given.recipe, place, given.add, trains=not given.at_once))


if __name__ == "__main__":
    with script("vocabulary", resumes=True):
        main()
