"""Results of several models on the same documents, compared pair by pair: the same draws of documents for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmjax.errors import InputError
from tmjax.evaluate.bootstrap import percentile_interval, resampled_ratios


@dataclass(frozen=True)
class Series:
    """Score of one model: sum of `numerator` over sum of `denominator`, [D] each, of the `documents` [D]."""

    documents: tuple[str, ...]
    numerator: np.ndarray
    denominator: np.ndarray
    lower_is_better: bool = False

    @property
    def score(self) -> float:
        """The ratio over all documents."""
        return float(self.numerator.sum() / self.denominator.sum())


def compare_paired(
    results: Mapping[str, Mapping[str, Series]], *, draws: int = 10000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Compares results per common measure: each score and its difference to the first result, with 95% intervals.

    `results` are the measures of each model, by name. The mean of a metric over all tasks (`TASK/METRIC`) is a measure
    too, if there are several: documents are drawn within each task. Raises InputError if models were measured on
    different documents, or share no measure.
    """
    names = list(results)
    if len(names) < 2:
        raise InputError("a comparison needs at least two results")
    measures = [m for m in results[names[0]] if all(m in results[name] for name in names)]
    if not measures:
        raise InputError(f"{' and '.join(names)} have no measure in common")
    compared, samples = {}, {}
    for number, measure in enumerate(measures):
        columns = [results[name][measure] for name in names]
        for name, series in zip(names, columns, strict=True):
            if series.documents != columns[0].documents:
                raise InputError(f"{measure}: {name} and {names[0]} were measured on other documents")
        samples[measure] = resampled_ratios(
            np.stack([series.numerator for series in columns], axis=1).astype(np.float64),
            np.stack([series.denominator for series in columns], axis=1).astype(np.float64),
            draws=draws,
            seed=seed + number,
        )
        first = columns[0]
        point = np.asarray([series.score for series in columns])
        compared[measure] = _facts(names, point, samples[measure], len(first.documents), first.lower_is_better)
    for metric, tasks in _shared_metrics(measures).items():
        point = np.mean([[results[name][task].score for name in names] for task in tasks], axis=0)
        drawn = np.mean([samples[task] for task in tasks], axis=0)
        documents = sum(compared[task]["documents"] for task in tasks)
        compared[f"mean/{metric}"] = _facts(names, point, drawn, documents, compared[tasks[0]]["lower_is_better"])
    return compared


def _shared_metrics(measures: Sequence[str]) -> dict[str, list[str]]:
    """Measures of tasks by metric, of the metrics that several tasks have."""
    groups: dict[str, list[str]] = {}
    for measure in measures:
        task, _, metric = measure.rpartition("/")
        if task:
            groups.setdefault(metric, []).append(measure)
    return {metric: tasks for metric, tasks in groups.items() if len(tasks) > 1}


def _facts(
    names: Sequence[str], point: np.ndarray, samples: np.ndarray, documents: int, lower_is_better: bool
) -> dict[str, Any]:
    def verdict(low: float, high: float) -> str:
        if low <= 0 <= high:
            return "not distinguishable"
        return "better" if (high < 0) == lower_is_better else "worse"

    results: dict[str, Any] = {}
    for number, name in enumerate(names):
        results[name] = {"score": float(point[number]), "ci95": list(percentile_interval(samples[:, number]))}
        if number:
            interval = percentile_interval(samples[:, number] - samples[:, 0])
            results[name]["difference"] = {"value": float(point[number] - point[0]), "ci95": list(interval)}
            results[name]["verdict"] = verdict(*interval)
    return {"documents": documents, "lower_is_better": lower_is_better, "against": names[0], "results": results}
