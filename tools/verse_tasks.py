"""Local tasks of lm-eval made from the bundled verses: what its tests, its bench and the bundled experiments ask.

python -m tools.verse_tasks runs/tasks        # verses_swahili, verses_wolof: four ends of a verse, one is right
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import yaml

from tmjax import cli

TEXTS = Path(__file__).resolve().parent.parent / "experiments"
LANGUAGES = ("swahili", "wolof")


def _verses(language: str = "swahili") -> list[str]:
    lines = (TEXTS / language / f"texts/{language}.test.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def _write(folder: Path, name: str, rows: list[dict], **keys) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data.name}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | keys, sort_keys=False))


def write_choice_task(
    folder: Path, questions: int = 200, *, language: str = "swahili", uneven: bool = False, seed: int = 0
) -> str:
    """How a verse goes on, against the ends of three others; with `uneven` some contexts hold many verses before it."""
    generator = np.random.default_rng(seed)
    verses = _verses(language)
    split = [text.split() for text in verses if len(text.split()) >= 12]
    heads, tails = [" ".join(words[:8]) for words in split], [" ".join(words[8:]) for words in split]
    rows = []
    for number in range(questions):
        others = generator.choice(np.delete(np.arange(len(split)), number), 3, replace=False)
        choices = [tails[number], *(tails[other] for other in others)]
        order = generator.permutation(4)
        before = verses[-4:] if uneven and number % 40 == 0 else []
        rows.append(
            {
                "query": " ".join([*before, heads[number]]),
                "choices": [choices[i] for i in order],
                "gold": int(np.nonzero(order == 0)[0][0]),
            }
        )
    name = f"verses_{language}" + ("_uneven" if uneven else "")
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    _write(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}",
        metric_list=metrics,
    )
    return name


def write_rolling_task(folder: Path, texts: int = 12) -> str:
    """Perplexity of verses, some of them together longer than the bundled models' contexts."""
    verses = _verses()
    rows = [{"text": " ".join(verses[i : i + (25 if i == 3 else 1)])} for i in range(texts)]
    metrics = [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    _write(
        folder,
        "verses_rolling",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics,
    )
    return "verses_rolling"


def write_generation_task(folder: Path, questions: int = 16) -> str:
    """The next words of a verse, greedily, up to a comma or full stop."""
    rows = [
        {"query": " ".join(text.split()[: 2 + i % 9]), "answer": " ".join(text.split()[2 + i % 9 :][:3])}
        for i, text in enumerate(_verses()[:questions])
    ]
    _write(
        folder,
        "verses_written",
        rows,
        output_type="generate_until",
        doc_to_text="{{query}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [",", "."], "max_gen_toks": 24, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return "verses_written"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(help="Where tasks and their data are written.")],
    questions: Annotated[int, typer.Option(min=1, max=400)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Writes a multiple-choice task for each bundled language."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        print(write_choice_task(folder, questions, language=language, seed=seed))


if __name__ == "__main__":
    sys.exit(cli.run(application=app, name="verse_tasks"))
