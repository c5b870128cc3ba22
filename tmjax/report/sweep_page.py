"""Report of a sweep: the live table, curves and heat maps, one self-contained page."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from tmjax.files.atomic import write_text
from tmjax.report.html import image, page, table
from tmjax.report.plots import new_figure, png_bytes
from tmjax.report.tables import Row, evaluation_rows, rich_table, stage_rows

#: Rows of the table of the best settings.
BEST = 10
#: Columns of a result that are not swept keys.
_OWN = ("setting", "bits_per_byte", "seconds", "seed", "group", "status", "reason")

Result = Mapping[str, Any]


def _keys(rows: Sequence[Result]) -> list[str]:
    return [key for key in rows[0] if key not in _OWN]


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _finished(rows: Sequence[Result]) -> list[Result]:
    return [row for row in rows if row["bits_per_byte"] is not None]


def best_rows(rows: Sequence[Result], count: int = BEST) -> tuple[Row, list[Row]]:
    """Makes header and rows of the best settings: number, swept values, bits per byte, milliseconds."""
    keys = _keys(rows)
    ranked = sorted(_finished(rows), key=lambda row: (row["bits_per_byte"], row["setting"]))[:count]
    lines = [
        (
            str(row["setting"]),
            *(_shown(row[key]) for key in keys),
            f"{row['bits_per_byte']:.5f}",
            f"{1000 * row['seconds']:.0f}",
        )
        for row in ranked
    ]
    return ("setting", *keys, "bits/byte", "ms"), lines


def live_table(rows: Sequence[Result], total: int) -> Table:
    """Makes the live table: progress of a sweep, and the best settings so far."""
    done = _finished(rows)
    failed = len(rows) - len(done)
    pace = f", {1000 * float(np.median([row['seconds'] for row in done])):.0f} ms per setting" if done else ""
    title = f"{len(rows)} of {total} settings" + (f", {failed} failed" if failed else "") + pace
    return rich_table(title, *best_rows(rows, 5))


def sweep_summary(manifest: Mapping[str, Any], rows: Sequence[Result]) -> Group:
    """Makes the output of `tmjax sweep` at its end."""
    facts = manifest["sweep"]
    parts: list[object] = [rich_table("Best on the validation texts", *best_rows(rows))]
    if manifest["evaluation"]:
        parts.append(rich_table("Bits per byte on the test texts", *evaluation_rows(manifest)))
    parts += [_sentence(facts), best_sentence(facts)]
    return Group(*parts)


def _sentence(facts: Mapping[str, Any]) -> str:
    failed = f", {facts['failed']} failed" if facts["failed"] else ""
    pace = f"{1000 * facts['seconds_per_setting']:.0f} ms per setting"
    return (
        f"{facts['settings']} settings{failed}; groups that share transported weights: {facts['groups']}; compilations "
        f"of the forward: {facts['compilations']} ({facts['compile_seconds']:.1f} s); then {pace}."
    )


def best_sentence(facts: Mapping[str, Any]) -> str:
    """Writes the keys and values of the best setting."""
    best = facts["best"]
    values = ", ".join(f"{key}: {_shown(value)}" for key, value in best["values"].items())
    return f"Best: setting {best['setting']}, {values} ({best['valid_bits_per_byte']:.5f} bits/byte)."


def marginals(rows: Sequence[Result], key: str) -> list[tuple[Any, float, float]]:
    """Returns (value, fewest, mean) bits per byte of the finished rows for each value of `key`, in its order."""
    groups: dict[Any, list[float]] = {}
    for row in _finished(rows):
        groups.setdefault(row[key], []).append(row["bits_per_byte"])
    ordered = sorted(groups.items()) if _numeric(rows, key) else list(groups.items())
    return [(value, min(bits), sum(bits) / len(bits)) for value, bits in ordered]


def _numeric(rows: Sequence[Result], key: str) -> bool:
    return all(isinstance(row[key], int | float) for row in rows)


def plot_sweep(rows: Sequence[Result]) -> bytes:
    """Plots a curve for one key, a heat map for two on a grid, otherwise a panel per key, with the best setting."""
    keys = _keys(rows)
    done = _finished(rows)
    if len(keys) == 2:
        first, second = ([value for value, *_ in marginals(rows, key)] for key in keys)
        cells = {(row[keys[0]], row[keys[1]]): row["bits_per_byte"] for row in done}
        if len(first) > 1 and len(second) > 1 and 2 * len(cells) > len(first) * len(second):
            grid = np.asarray([[cells.get((a, b), np.nan) for a in first] for b in second])
            return _heat_map(keys, first, second, grid)
    columns = min(3, max(1, len(keys)))
    figure, axes = new_figure(columns, -(-max(1, len(keys)) // columns), 4.5, 3.4)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, keys, strict=False):
        best = marginals(rows, key)
        place = {value: value if _numeric(rows, key) else number for number, (value, *_) in enumerate(best)}
        if len(keys) > 1:
            axis.plot([place[row[key]] for row in done], [row["bits_per_byte"] for row in done], ".", color="#bbb")
        axis.plot([place[value] for value, *_ in best], [lowest for _, lowest, _ in best], "o-", markersize=4)
        if not _numeric(rows, key):
            axis.set_xticks(list(place.values()), [_shown(value) for value in place])
        axis.set_xlabel(key)
        axis.set_ylabel("bits/byte, validation" + (" (line: best)" if len(keys) > 1 else ""))
    return png_bytes(figure)


def _heat_map(keys: Sequence[str], first: list[Any], second: list[Any], grid: np.ndarray) -> bytes:
    figure, axes = new_figure(1, 1, max(4.5, 1.5 + 0.4 * len(first)), max(3.4, 1.2 + 0.3 * len(second)))
    axis = axes[0, 0]
    shown = axis.imshow(grid, cmap="viridis_r", aspect="auto", origin="lower")
    row, column = np.unravel_index(np.nanargmin(grid), grid.shape)
    axis.plot(column, row, "*", color="red", markersize=12)
    for ticks, values in ((axis.set_xticks, first), (axis.set_yticks, second)):
        some = range(0, len(values), -(-len(values) // 16))
        ticks(list(some), [_shown(values[number]) for number in some])
    axis.tick_params(axis="x", rotation=45)
    axis.set_xlabel(keys[0])
    axis.set_ylabel(keys[1])
    figure.colorbar(shown, label="bits/byte, validation")
    return png_bytes(figure)


def write_sweep_report(file: Path, run: Path, manifest: Mapping[str, Any], rows: Sequence[Result]) -> None:
    """Writes the page to `file` and `plots/sweep.png` into the run directory."""
    png = plot_sweep(rows)
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots/sweep.png").write_bytes(png)
    facts = manifest["sweep"]
    sections = [f'<p class="gain" id="best">{escape(best_sentence(facts))}</p>', f"<p>{escape(_sentence(facts))}</p>"]
    if manifest["evaluation"]:
        sections += ["<h2>Bits per byte on the test texts</h2>", table("evaluation", *evaluation_rows(manifest))]
    sections += [image("sweep_plot", png), "<h2>Best settings</h2>", table("settings", *best_rows(rows, 50))]
    for key in _keys(rows):
        lines = [(_shown(value), f"{lowest:.5f}", f"{mean:.5f}") for value, lowest, mean in marginals(rows, key)[:100]]
        sections += [f"<h2>{escape(key)}</h2>", table(f"by_{key}", (key, "best bits/byte", "mean"), lines)]
    reasons: dict[str, int] = {}
    for row in rows:
        if row["status"] == "failed":
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    if reasons:
        lines = [(reason, str(count)) for reason, count in reasons.items()]
        sections += ["<h2>Failed settings</h2>", table("failed", ("reason", "settings"), lines)]
    sections += ["<h2>Stages</h2>", table("stages", *stage_rows(manifest))]
    write_text(file, page("Sweep", sections))
