"""A recipe's results in the paper's layout, beside the published numbers."""

from collections.abc import Mapping
from typing import Any

from schema import PaperRecipe, Task

from tmjax.report.tables import markdown_table


def value_of(result: Mapping[str, Any], task: Task) -> str:
    """An arm's score on a task with its standard error, on the paper's scale."""
    metrics = result["tasks"]["results"].get(task.task, {})
    name, comma, rest = task.metric.partition(",")
    value, error = metrics.get(task.metric), metrics.get(f"{name}_stderr{comma}{rest}")
    if value is None:
        return ""
    digits = 2 if task.scale == 100 else 3
    told = f"{value * task.scale:.{digits}f}"
    return told if error is None else f"{told} ± {error * task.scale:.{digits}f}"


def published_table(recipe: PaperRecipe, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row per arm, a column per task, bits per byte on held-out rows; the paper's rows first."""
    header = ("", *(task.label for task in recipe.tasks), "bits/byte")
    rows = [
        (f"paper: {name}", *("" if getattr(t, name) is None else f"{getattr(t, name):g}" for t in recipe.tasks), "")
        for name in ("target", "fused", "adapted")
        if any(getattr(task, name) is not None for task in recipe.tasks)
    ]
    for label, result in results.items():
        bits = f"{result['evaluation']['bits_per_byte']:.4f}"
        rows.append((label, *(value_of(result, task) for task in recipe.tasks), bits))
    text = f"# {recipe.name}\n\n{markdown_table(header, rows)}\n"
    if recipe.general:
        rows = [
            (label, *(_accuracy(result["tasks"]["results"].get(task, {})) for task in recipe.general))
            for label, result in results.items()
        ]
        text += f"\nGeneral ability (accuracy)\n\n{markdown_table(('', *recipe.general), rows)}\n"
    return text


def _accuracy(metrics: Mapping[str, Any]) -> str:
    value, error = metrics.get("acc"), metrics.get("acc_stderr")
    return "" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
