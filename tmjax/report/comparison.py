"""Tables and the plot of `tmjax compare`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.report.plots import new_figure, png_bytes
from tmjax.report.tables import Row


def compare_rows(compared: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: measure, result, score, difference to the first result, intervals, verdict."""
    rows = []
    for measure, facts in compared.items():
        arrow = "↓" if facts["lower_is_better"] else "↑"
        for name, result in facts["results"].items():
            low, high = result["ci95"]
            cells = [f"{measure} {arrow}", name, f"{result['score']:.4f}", f"[{low:.4f}, {high:.4f}]", "", "", ""]
            if "difference" in result:
                low, high = result["difference"]["ci95"]
                cells[4:] = [f"{result['difference']['value']:+.4f}", f"[{low:+.4f}, {high:+.4f}]", result["verdict"]]
            rows.append(tuple(cells))
    header = ("measure", "result", "score", "95% interval", "against the first", "95% interval", "")
    return header, rows


def plot_compare(compared: Mapping[str, Any]) -> bytes:
    """Plots differences to the first result with their intervals, a panel per measure, as PNG."""
    columns = min(3, len(compared))
    rows = -(-len(compared) // columns)
    names = list(next(iter(compared.values()))["results"])[1:]
    labels = [Path(name).name for name in names]
    labels = [label if labels.count(label) == 1 else name for label, name in zip(labels, names, strict=True)]
    longest = min(max(map(len, labels)), 40)
    labels = [label if len(label) <= longest else "…" + label[1 - longest :] for label in labels]
    figure, axes = new_figure(columns, rows, 3.4 + 0.09 * longest, 1.4 + 0.35 * len(names))
    for axis in axes.flat[len(compared) :]:
        axis.set_visible(False)
    place = np.arange(len(names))
    for axis, (measure, facts) in zip(axes.flat, compared.items(), strict=False):
        differences = [facts["results"][name]["difference"] for name in names]
        value = np.asarray([item["value"] for item in differences])
        bounds = np.asarray([item["ci95"] for item in differences])
        # A percentile interval need not contain the point estimate.
        bars = np.maximum(np.abs(bounds - value[:, None]) * ((bounds - value[:, None]) * [-1, 1] > 0), 0)
        axis.errorbar(value, place, xerr=bars.T, fmt="o", capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(place, labels)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"{measure} ({'lower' if facts['lower_is_better'] else 'higher'} is better)", fontsize="medium")
        axis.set_xlabel(f"difference to {Path(facts['against']).name}", fontsize="small")
    return png_bytes(figure)
