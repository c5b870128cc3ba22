"""A recipe's results in the paper's layout, beside the published numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from check import model_side
from experiment import Arm, manifest_of
from schema import PaperRecipe, Task

from tmjax.report.plots import new_figure, png_bytes
from tmjax.report.tables import forgetting_rows, gain_sentence, markdown_table

#: What was measured of an arm, as `Experiment.ask` returns it.
Result = Mapping[str, Any]
Measured = Sequence[tuple[Arm, Result]]


def value_of(result: Result, task: Task) -> str:
    """An arm's score on a task with its standard error, on the paper's scale."""
    metrics = result["tasks"]["results"].get(task.task, {})
    name, comma, rest = task.metric.partition(",")
    value, error = metrics.get(task.metric), metrics.get(f"{name}_stderr{comma}{rest}")
    if value is None:
        return ""
    digits = 2 if task.scale == 100 else 3
    told = f"{value * task.scale:.{digits}f}"
    return told if error is None else f"{told} ± {error * task.scale:.{digits}f}"


def paper_tables(recipe: PaperRecipe, measured: Measured) -> str:
    """Markdown: results, controls, alpha curve (Fig. 5), sizes of the source (Table 7), general ability (Fig. 6)."""
    sections = [
        f"# {recipe.name}\n",
        _results(recipe, measured),
        "## Controls\n",
        _controls(recipe, measured),
    ]
    if any(arm.kind == "curve" for arm, _ in measured):
        sections += ["## Alpha, weights alone (the paper's Fig. 5)\n", _curve(recipe, measured)]
    if recipe.sources:
        sections += ["## Size of the source (the paper's Table 7)\n", _sizes(recipe, measured)]
    if recipe.general or recipe.other_texts:
        sections += ["## General ability (the paper's Fig. 6)\n", _general(recipe, measured)]
    return "\n".join(sections)


def _table(recipe: PaperRecipe, first: Sequence[str], rows: Iterable[tuple[Sequence[str], Result]]) -> str:
    """Rows of leading cells and a result: those, a column per task, bits per byte."""
    header = (*first, *(task.label for task in recipe.tasks), "bits/byte")
    cells = [
        (*lead, *(value_of(result, task) for task in recipe.tasks), _bits(result["evaluation"]))
        for lead, result in rows
    ]
    return markdown_table(header, cells) + "\n"


def _published(recipe: PaperRecipe, name: str, *lead: str) -> list[tuple[str, ...]]:
    """The paper's row of this name, if the recipe has it."""
    values = [getattr(task, name) for task in recipe.tasks]
    if all(value is None for value in values):
        return []
    return [(*lead, *("" if value is None else f"{value:g}" for value in values), "")]


def _bits(facts: Mapping[str, Any]) -> str:
    return f"{facts['bits_per_byte']:.4f}"


def _main(recipe: PaperRecipe, measured: Measured, *kinds: str) -> list[tuple[Arm, Result]]:
    """Arms of these kinds that have the recipe's first source, or none."""
    return [pair for pair in measured if pair[0].kind in kinds and pair[0].source in ("", recipe.source)]


def _results(recipe: PaperRecipe, measured: Measured) -> str:
    header = ("", *(task.label for task in recipe.tasks), "bits/byte")
    told = [row for name in ("target", "fused", "adapted") for row in _published(recipe, name, f"paper: {name}")]
    rows = [
        ((f"{arm.preset}, {arm.kind}" if arm.preset else arm.kind,), result)
        for arm, result in _main(recipe, measured, "target", "source", "fused", "adapted")
    ]
    # Plain training of the target is the control that needs no source: the same for every preset.
    plain = [result for arm, result in _main(recipe, measured, "control") if arm.name.endswith("-adapted-sft")]
    rows += [(("target, trained (no source)",), result) for result in plain[:1]]
    whole = _table(recipe, ("",), rows)
    if not told:
        return whole
    top, line, *rest = whole.splitlines()
    return "\n".join([top, line, *markdown_table(header, told).splitlines()[2:], *rest]) + "\n"


def _controls(recipe: PaperRecipe, measured: Measured) -> str:
    """Every control beside what it is the control of, and the gain due to the source in a sentence."""
    parts = []
    for arm, result in _main(recipe, measured, "fused", "adapted"):
        own = [(item, held) for item, held in measured if item.kind == "control" and item.run == arm.run]
        rows = [((arm.name,), result), *(((item.name,), held) for item, held in own)]
        parts += [_table(recipe, ("",), rows), gain_sentence(manifest_of(arm.run)) + "\n"]
    return "\n".join(parts)


def _curve(recipe: PaperRecipe, measured: Measured) -> str:
    target = next(result for arm, result in measured if arm.kind == "target")
    points = {(arm.preset, arm.alpha, arm.empty): result for arm, result in measured if arm.kind == "curve"}
    rows = []
    for preset in recipe.presets:
        rows.append(((preset, "0", _bits(target["evaluation"])), target))
        for alpha in recipe.alphas:
            whole, shrunk = (points.get((preset, alpha, empty)) for empty in (False, True))
            if whole and shrunk:
                rows.append(((preset, f"{alpha:g}", _bits(shrunk["evaluation"])), whole))
    return _table(recipe, ("preset", "alpha", "bits/byte without the source"), rows)


def plot_curve(recipe: PaperRecipe, measured: Measured) -> bytes:
    """Fig. 5 as PNG: the first task's score and bits per byte against alpha, dashed without the source."""
    task = recipe.tasks[0]
    target = next(result for arm, result in measured if arm.kind == "target")
    figure, axes = new_figure(2, 1, 4.2, 3.2)
    for preset in recipe.presets:
        for empty, style in ((False, "-"), (True, "--")):
            points = [(0.0, target)] + [
                (arm.alpha, result)
                for arm, result in measured
                if (arm.kind, arm.preset, arm.empty) == ("curve", preset, empty)
            ]
            alphas, results = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            label = preset + (", nothing of the source" if empty else "")
            scores = [held["tasks"]["results"][task.task][task.metric] * task.scale for held in results]
            bits = [held["evaluation"]["bits_per_byte"] for held in results]
            color = f"C{recipe.presets.index(preset)}"
            for axis, values in zip(axes.flat, (scores, bits), strict=True):
                axis.plot(alphas, values, style, color=color, marker="o", markersize=3, linewidth=1, label=label)
    for axis, title in zip(axes.flat, (task.label, "bits per byte"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("alpha")
    # Below both: lines may run anywhere in them.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return png_bytes(figure)


def _sizes(recipe: PaperRecipe, measured: Measured) -> str:
    header = ("source", "parameters", "model", *(task.label for task in recipe.tasks), "bits/byte")
    told = [
        *_published(recipe, "small_adapted", "paper: same size", "", "adapted"),
        *_published(recipe, "adapted", "paper", "", "adapted"),
    ]
    rows = [
        ((arm.source, f"{model_side(arm.source).parameters:,}", f"{arm.preset}, {arm.kind}"), result)
        for arm, result in measured
        if arm.kind in ("fused", "adapted")
    ]
    whole = _table(recipe, header[:3], rows).splitlines()
    return "\n".join([*whole[:2], *markdown_table(header, told).splitlines()[2:], *whole[2:]]) + "\n"


def _general(recipe: PaperRecipe, measured: Measured) -> str:
    parts = []
    arms = _main(recipe, measured, "target", "source", "fused", "adapted")
    if recipe.general:
        rows = [
            (
                f"{arm.preset}, {arm.kind}" if arm.preset else arm.kind,
                *(_accuracy(result["tasks"]["results"].get(task, {})) for task in recipe.general),
            )
            for arm, result in arms
        ]
        parts.append(markdown_table(("accuracy", *recipe.general), rows) + "\n")
    if recipe.other_texts:
        told = [(arm, forgetting_rows(manifest_of(arm.run))) for arm, _ in arms if arm.run is not None]
        rows = [(f"{arm.preset}, {arm.kind}", *row) for arm, (_, held) in told for row in held]
        if told:
            parts.append(markdown_table(("bits/byte", *told[0][1][0]), rows) + "\n")
    return "\n".join(parts)


def _accuracy(metrics: Mapping[str, Any]) -> str:
    value, error = metrics.get("acc"), metrics.get("acc_stderr")
    return "" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
