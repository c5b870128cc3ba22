"""Local tasks made from the bundled verses: what the tests of lm-eval and its bench ask of models."""

import json
from pathlib import Path

import numpy as np
import yaml

TEXTS = Path(__file__).resolve().parent.parent / "experiments/swahili/texts"


def _verses(name: str = "test") -> list[str]:
    lines = (TEXTS / f"swahili.{name}.jsonl").read_text().splitlines()
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


def write_choice_task(folder: Path, questions: int = 200, *, uneven: bool = False, seed: int = 0) -> str:
    """How a verse goes on, against the ends of three others; with `uneven` some contexts hold many verses before it."""
    generator = np.random.default_rng(seed)
    verses = _verses()
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
    name = "verses_uneven" if uneven else "verses"
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
