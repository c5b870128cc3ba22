"""Plots of a run: layer plans and coefficients, as PNG bytes."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.recipes.base import ALL_ROLES

_SOFTWARE = "tmjax"


def new_figure(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """Makes a figure of `rows` by `columns` axes of a size in inches; returns it and the axes [row, column]."""
    # The object interface has no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def png_bytes(figure: Any) -> bytes:
    """Renders the figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": _SOFTWARE})
    return buffer.getvalue()


def is_plot(data: bytes) -> bool:
    """Whether PNG bytes were made by `png_bytes`."""
    return data.startswith(b"\x89PNG") and f"Software\0{_SOFTWARE}".encode() in data[:1024]


def plot_layer_plans(alignment: Alignment) -> bytes:
    """Plots heat maps [target layer, source layer] of the layer weights, one per projection."""
    plans = {role: alignment.layer_plans[role] for role in ALL_ROLES if role in alignment.layer_plans}
    columns = min(4, len(plans))
    rows = -(-len(plans) // columns)
    figure, axes = new_figure(columns, rows, 3.0, 2.6)
    top = max(plan.weights.max() for plan in plans.values())
    image = None
    for axis in axes.flat[len(plans) :]:
        axis.set_visible(False)
    for axis, (role, plan) in zip(axes.flat, plans.items(), strict=False):
        image = axis.imshow(plan.weights, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axis.set_title(role)
        axis.set_xlabel("source layer")
        axis.set_ylabel("target layer")
        axis.set_xticks(np.arange(plan.weights.shape[1]))
        axis.set_yticks(np.arange(plan.weights.shape[0]))
    figure.colorbar(image, ax=axes.ravel().tolist(), label="share of the source layer")
    figure.suptitle("Layer plan P, rows scaled to 1")
    return png_bytes(figure)


def plot_coefficients(manifest: Mapping[str, Any]) -> bytes:
    """Plots the chosen alpha and beta of every projection, and the validation loss of every trial."""
    facts = manifest["coefficients"]
    roles = list(facts["by_role"])
    figure, axes = new_figure(2, 1, 5.0, 3.4)
    position = np.arange(len(roles))
    for offset, key in ((-0.2, "alpha"), (0.2, "beta")):
        axes[0, 0].bar(position + offset, [facts["by_role"][role][key] for role in roles], 0.4, label=key)
    axes[0, 0].axhline(0, color="black", linewidth=0.8)
    axes[0, 0].set_xticks(position, roles)
    axes[0, 0].set_title("chosen coefficients")
    axes[0, 0].legend()
    arms = {"merged": facts} | manifest.get("controls", {})
    for arm, item in arms.items():
        losses = [trial["loss"] for trial in item["trials"]]
        axes[0, 1].plot(
            np.arange(1, len(losses) + 1), losses, marker="o", markersize=3, label=arm.removeprefix("control:")
        )
    axes[0, 1].set_title("validation bits/byte of each trial")
    axes[0, 1].set_xlabel("trial")
    if facts["trials"]:
        axes[0, 1].legend(fontsize="small")
    else:
        axes[0, 1].text(0.5, 0.5, "alpha was given, nothing was fitted", ha="center", transform=axes[0, 1].transAxes)
    return png_bytes(figure)


def plot_solvers(manifest: Mapping[str, Any]) -> bytes:
    """Plots time, explained variance of held-out rows and, where measured, bits per byte of every solver."""
    lines = manifest["solvers"]
    names = [line["solver"] for line in lines]
    figure, axes = new_figure(3, 1, 4.0, 1.2 + 0.35 * len(names))
    position = np.arange(len(names))
    axes[0, 0].barh(position, [line["seconds"] for line in lines])
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_title("seconds, all problems")
    for offset, key, label in (
        (-0.2, "explained_target_gain", "to target"),
        (0.2, "explained_source_gain", "to source"),
    ):
        axes[0, 1].barh(position + offset, [line[key] for line in lines], 0.4, label=label)
    axes[0, 1].set_title("held-out variance explained")
    axes[0, 1].legend(fontsize="small")
    merged = [(i, line["bits_per_byte"]) for i, line in enumerate(lines) if line["bits_per_byte"] is not None]
    axes[0, 2].plot([bits for _, bits in merged], [i for i, _ in merged], "o")
    axes[0, 2].set_title("bits/byte of the merge")
    for axis in axes[0]:
        axis.set_yticks(position, names)
        axis.set_ylim(len(names) - 0.5, -0.5)
    return png_bytes(figure)
