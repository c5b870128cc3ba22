"""The report of `tmjax solvers`: a table, a plot, one self-contained page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.files.atomic import write_text
from tmjax.report.html import image, page, table
from tmjax.report.plots import plot_solvers
from tmjax.report.tables import Row

_COLUMNS = {
    "seconds": ("seconds", "{:.3f}"),
    "iterations_mean": ("iterations", "{:.0f}"),
    "iterations_max": ("most", "{}"),
    "converged": ("converged", "{}"),
    "marginal_error": ("marginal error", "{:.1e}"),
    "transport_cost": ("cost", "{:.4f}"),
    "distance_to_exact": ("to exact", "{:.3f}"),
    "explained_target_gain": ("explained →", "{:.3f}"),
    "explained_source_gain": ("explained ←", "{:.3f}"),
    "bits_per_byte": ("bits/byte of merge", "{:.4f}"),
}


def _cells(line: Mapping[str, Any], keys: list[str]) -> list[str]:
    return [_COLUMNS[key][1].format(line[key]) if line[key] is not None else "" for key in keys]


def solver_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows, one per solver over all sites; "explained" is held-out variance, with gains."""
    rows = []
    for line in manifest["solvers"]:
        rows.append((line["solver"], *_cells(line, list(_COLUMNS))))
    return ("solver", *(title for title, _ in _COLUMNS.values())), rows


def site_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows, one per solver and site."""
    keys = [key for key in _COLUMNS if key != "bits_per_byte"]
    rows = [(f"{line['solver']} {line['site']}", *_cells(line, keys)) for line in manifest["solver_sites"]]
    return ("solver, site", *(_COLUMNS[key][0] for key in keys)), rows


def write_solver_report(run: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `solvers.html` and `plots/solvers.png` into the run directory."""
    png = plot_solvers(manifest)
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots/solvers.png").write_bytes(png)
    sections = [
        "<p>All pairs of layers of every site. Seconds: compiled, median of three, costs included. Explained: share of "
        "the variance of held-out rows that the maps source → target and back predict, with per-unit gains. To exact: "
        "half the L1 distance to an optimal plan of the same cost (0 the same, 1 nothing in common), each target layer "
        "with the source layer at its depth, where the network simplex is feasible and installed.</p>",
        table("solvers", *solver_rows(manifest)),
        image("solvers_plot", png),
        "<h2>Per site</h2>",
        table("solver_sites", *site_rows(manifest)),
    ]
    write_text(run / "solvers.html", page("Solvers on the same problems", sections))
