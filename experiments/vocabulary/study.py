"""Another vocabulary for a model: what each initialisation of the new rows costs, before and after training.

    python experiments/vocabulary/study.py experiments/swahili/recipe.yaml --out runs/vocabulary

The target of a recipe receives the tokenizer of the recipe's source, or new tokens learnt from the calibration texts;
the rows of new tokens come from each initialiser in turn. Every model is scored on the test texts right away, and after
200 steps on the calibration texts (learning rates 1e-3 and 3e-3; validation texts choose). Finished arms are not made
again. The table is OUT/PAIR/table.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.errors import InputError
from tmjax.files.atomic import write_text
from tmjax.recipes.base import read_recipe
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.recipe import build_recipe
from tmjax.transplant.initialisers import INITIALISERS
from tools.script import script

HERE = Path(__file__).resolve().parent
KEPT = "unchanged"


def run(*arguments: str) -> None:
    """Runs a command of tmjax in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tmjax", *arguments], check=False, stdout=subprocess.DEVNULL)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise InputError(f"tmjax {' '.join(arguments[:2])} ended with status {done.returncode}, as said above")


def arms(added: int) -> dict[str, tuple[str, ...] | None]:
    """Options of `tmjax vocabulary` by the name of the arm; None: the target as it is."""
    result: dict[str, tuple[str, ...] | None] = {KEPT: None}
    for name in INITIALISERS:
        result[f"source's tokenizer, {name}"] = ("--tokenizer", "{source}", "--init", name)
    for name in INITIALISERS:
        result[f"{added} more tokens, {name}"] = ("--add", str(added), "--init", name)
    return result


def measure(recipe: str, out: Path, added: int) -> str:
    """Makes the arms of a pair that are missing; returns the table."""
    settings = build_recipe(read_recipe(Path(recipe)))
    size, texts = None, None
    lines = ["| vocabulary, initialisation | rows | tokens per byte | bits/byte at once | after 200 steps |"]
    lines += ["|---|---|---|---|---|"]
    for number, (name, options) in enumerate(arms(added).items()):
        model, trained = settings.target, out / f"{number}-adapted"
        if options is not None:
            model = str(out / f"{number}")
            if not Path(model).is_dir():
                given = [option.format(source=settings.source) for option in options]
                given += ["--source", settings.source, "--texts", settings.texts]
                run("vocabulary", settings.target, model, *given)
        pair = ["--source", settings.source, "--target", model, "--texts", settings.texts]
        pair += ["--valid", settings.valid, "--test", settings.test]
        run("adapt", str(HERE / "adapt.yaml"), *pair, "--out", str(trained))
        scores = json.loads((trained / "manifest.json").read_text(encoding="utf-8"))["evaluation"]
        texts = texts or read_texts(settings.test).texts
        size = size or sum(len(text.encode()) for text in texts)
        tokenizer = load_tokenizer(Path(model))
        length = sum(len(encoding.ids) for encoding in tokenizer.encode(texts)) / size
        lines.append(
            f"| {name} | {tokenizer.size} | {length:.4f} | {_bits(scores['target'])} | {_bits(scores['adapted'])} |"
        )
        write_text(out / "table.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def _bits(score: dict) -> str:
    low, high = score["ci95"]
    return f"{score['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}]"


def main() -> None:
    """Runs the study of one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe of a merge, for its pair and texts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--add", type=int, default=500, help="tokens that are learnt (default: 500)")
    given = parser.parse_args()
    print(measure(given.recipe, given.out / Path(given.recipe).parent.name, given.add))


if __name__ == "__main__":
    with script("vocabulary", resumes=True):
        main()
