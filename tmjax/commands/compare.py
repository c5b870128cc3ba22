"""`tmjax compare`: per-document scores from run directories and from folders of `tmjax evaluate --out`."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.checkpoints.hub import read_json
from tmjax.commands.evaluate import RESULTS, SAMPLES, SCORES
from tmjax.errors import InputError
from tmjax.evaluate.paired import Series, compare_paired
from tmjax.files.atomic import write_bytes
from tmjax.files.lock import OutputLock
from tmjax.report.comparison import plot_compare
from tmjax.report.plots import is_plot
from tmjax.runs.manifest import read_manifest

#: The arm that a run directory stands for, unless `RUN:ARM` names one.
FINAL = ("adapted", "merged", "best")


def compare_results(names: Sequence[str], *, draws: int = 10000, seed: int = 0) -> dict[str, Any]:
    """Compares every result with the first, with paired intervals. `notes` list omitted measures and the reasons.

    A result is a folder of `tmjax evaluate --out`, a run directory (its final model) or `RUN:ARM`. Raises InputError
    for anything else, and for results of other documents.
    """
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is named twice")
    read = {name: _read(name) for name in names}
    notes: list[str] = []
    hashes = {tokens for _, tokens, _ in read.values()}
    measured = {name: dict(series) for name, (series, _, _) in read.items()}
    if len(hashes - {None}) > 1:
        notes.append("log-likelihoods of answers are left out: the models were asked other token ids")
        for series in measured.values():
            for measure in [m for m in series if m.endswith("/answer_log_likelihood")]:
                del series[measure]
    texts = {sha for _, _, sha in read.values()} - {None}
    if len(texts) > 1:
        raise InputError(f"{' and '.join(names)} were measured on other texts")
    return {"compare": compare_paired(measured, draws=draws, seed=seed), "notes": notes}


@contextlib.contextmanager
def write_plot(file: Path | None, *, overwrite: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that writes the plot of a comparison after a check of its path (nothing without a file).

    Raises InputError if there is a file, unless `overwrite` and tmjax wrote it.
    """
    if file is None:
        yield lambda compared: None
        return
    if file.is_dir() or not file.name:
        raise InputError(f"--plot {file} is a directory; name a file")
    with OutputLock(file, directory=False):
        if file.exists() and not overwrite:
            raise InputError(f"{file} exists; choose another file or pass --overwrite")
        if file.exists() and not is_plot(file.read_bytes()):
            raise InputError(f"{file} is no plot that tmjax wrote, so it is not replaced; choose another file")
        yield lambda compared: write_bytes(file, plot_compare(compared))


def _read(name: str) -> tuple[dict[str, Series], str | None, str | None]:
    """Reads a result: its measures, the hash of the token ids that its tasks scored, the hash of its texts."""
    path, arm = Path(name), None
    if not path.exists() and ":" in name:
        before, _, after = name.partition(":")
        path, arm = Path(before), after
    if not path.is_dir():
        raise InputError(
            f"{name} is no folder of results; give a run directory, RUN:ARM or what `evaluate --out` wrote"
        )
    manifest = read_manifest(path)
    if manifest is not None:
        return _of_run(path, arm, manifest)
    if not (path / RESULTS).is_file() or arm is not None:
        raise InputError(f"{name} holds neither a run of tmjax nor {RESULTS} of `tmjax evaluate --out`")
    results = read_json(path / RESULTS)
    measures: dict[str, Series] = {}
    if (path / SCORES).is_file():
        scores = np.load(path / SCORES)
        measures["bits_per_byte"] = _bits(scores["model"], scores["bytes"])
    for file in sorted((path / SAMPLES).glob("*.jsonl")):
        measures |= _of_task(file)
    return measures, results.get("tasks", {}).get("tokens_sha256"), results.get("texts", {}).get("sha256")


def _bits(nll: np.ndarray, size: np.ndarray) -> Series:
    numbers = tuple(map(str, range(len(nll))))
    return Series(numbers, nll / math.log(2), size.astype(np.float64), lower_is_better=True)


def _of_run(path: Path, arm: str | None, manifest: dict[str, Any]) -> tuple[dict[str, Series], None, str | None]:
    if not (path / SCORES).is_file():
        raise InputError(f"{path} has no {SCORES}: its run measured nothing (give --test)")
    scores = np.load(path / SCORES)
    arms = [name for name in scores.files if name != "bytes"]
    chosen = arm or next((name for name in FINAL if name in arms), None)
    if chosen not in arms:
        raise InputError(f"{path} has no arm {chosen}; it has {', '.join(arms)}")
    texts = manifest.get("inputs", {}).get("test", {}).get("sha256")
    return {"bits_per_byte": _bits(scores[chosen], scores["bytes"])}, None, texts


def _of_task(file: Path) -> dict[str, Series]:
    """Reads the measures of one task's samples; a filter other than `none` is part of the measure's name."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["doc_id"]):
        by_filter.setdefault(line.get("filter", "none"), []).append(line)
    measures: dict[str, Series] = {}
    for kind, samples in by_filter.items():
        documents = tuple(f"{sample['doc_id']}:{sample['doc_hash']}" for sample in samples)
        suffix = "" if kind == "none" else f",{kind}"
        for metric in samples[0].get("metrics", []):
            series = _series(documents, metric, [sample[metric] for sample in samples])
            if series is not None:
                measures[f"{file.stem}/{metric}{suffix}"] = series
        answers = [_answer(sample) for sample in samples]
        if all(answer is not None for answer in answers):
            ones = np.ones(len(answers))
            measures[f"{file.stem}/answer_log_likelihood"] = Series(documents, np.asarray(answers, float), ones)
    return measures


def _series(documents: tuple[str, ...], metric: str, values: list[Any]) -> Series | None:
    """Reads a metric per document: numbers, or bits per byte of (log-likelihood, bytes); None for other metrics."""
    if all(isinstance(value, int | float) for value in values):
        return Series(documents, np.asarray(values, float), np.ones(len(values)))
    if metric == "bits_per_byte" and all(isinstance(value, list) and len(value) == 2 for value in values):
        pairs = np.asarray(values, float)
        return Series(documents, -pairs[:, 0] / math.log(2), pairs[:, 1], lower_is_better=True)
    return None


def _answer(sample: dict[str, Any]) -> float | None:
    """Returns the log-likelihood of the right choice of a multiple-choice question."""
    target, choices = sample["target"], sample["filtered_resps"]
    target = int(target) if str(target).isdecimal() else None
    if target is None or len(choices) <= target or len(choices) < 2 or not isinstance(choices[target], list):
        return None
    return float(choices[target][0])
