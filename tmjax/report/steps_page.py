"""Results of a run of several steps: a row per step, for the terminal, and one self-contained page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group

from tmjax.recipes.base import dump_values
from tmjax.report.html import page, table
from tmjax.report.tables import Row, rich_table, stage_rows

#: The row of the model that the first step begins with.
FIRST = "target"


def step_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: step, its result, and bits per byte, interval and change of its model."""
    evaluation = manifest["evaluation"]
    rows = []
    if FIRST in evaluation:
        rows.append((FIRST, "", *_score(evaluation[FIRST], None)))
    for name, facts in manifest["steps"].items():
        score = _score(evaluation[name], facts.get("change")) if name in evaluation else ()
        rows.append((name, measured_text(facts), *score))
    columns = ("bits/byte", "95% interval", "against target") if evaluation else ()
    return ("step", "result", *columns), rows


def _score(item: Mapping[str, Any], change: Mapping[str, Any] | None) -> Row:
    low, high = item["ci95"]
    shown = (f"{item['bits_per_byte']:.4f}", f"[{low:.4f}, {high:.4f}]")
    if change is None:
        return (*shown, "")
    low, high = change["ci95"]
    return (*shown, f"{change['bits_per_byte']:+z.4f} [{low:+z.4f}, {high:+z.4f}]")


def measured_text(facts: Mapping[str, Any]) -> str:
    """Returns the numbers of a step in a few words."""
    numbers, kind = facts["measured"], facts["kind"]
    if kind == "vocabulary":
        length = f", {numbers['tokens_per_byte']:.4f} per byte" if "tokens_per_byte" in numbers else ""
        return f"{numbers['new']} new tokens ({numbers['init']}){length}"
    gain = f", gain due to the source {numbers['source_gain']:+.4f}" if "source_gain" in numbers else ""
    if kind == "merge":
        return f"{Path(numbers['source']).name}, {numbers['preset']}{gain}"
    if kind == "adapt":
        return f"{numbers['mode']}, {numbers['steps']} steps, learning rate {numbers['lr']:g}{gain}"
    if kind == "convert" and numbers["to"] == "lora":
        return f"LoRA of rank {numbers['rank']}, relative error {numbers['mean_error']:.3f}"
    if kind == "convert":
        return " ".join(str(value) for value in (numbers["to"], numbers["dtype"]) if value)
    return ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())


def steps_summary(manifest: Mapping[str, Any]) -> Group:
    """Makes the output of `tmjax run` at its end."""
    title = "Steps, and bits per byte on the test texts" if manifest["evaluation"] else "Steps"
    return Group(rich_table(title, *step_rows(manifest)), rich_table("Stages", *stage_rows(manifest)))


def write_steps_report(file: Path, out: str, recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes the page.

    Args:
        file: The file of the page.
        out: The run directory.
        recipe: The resolved recipe; the author's directory is left out.
        manifest: The manifest of the run.
    """
    pages = {name: f"{name}/report.html" for name, facts in manifest["steps"].items() if facts["kind"] in _WITH_PAGES}
    links = "".join(f'<li><a href="{link}">{escape(name)}</a></li>' for name, link in pages.items())
    shown = {key: value for key, value in recipe.items() if key != "out"}
    sections = [
        "<h2>Steps, and bits per byte on the test texts</h2>" if manifest["evaluation"] else "<h2>Steps</h2>",
        table("steps", *step_rows(manifest)),
        *([f"<h2>Reports of the steps</h2><ul>{links}</ul>"] if links else []),
        "<h2>Stages</h2>",
        table("stages", *stage_rows(manifest)),
        f"<h2>Recipe</h2><pre>{escape(dump_values(shown))}</pre>",
    ]
    file.write_text(page(f"Steps of {Path(out).name}", sections), encoding="utf-8")


_WITH_PAGES = ("merge", "adapt")
