"""Heat maps of a run, as PNG bytes: matched heads, coefficients of every tensor; and the arms with their intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tmjax.report.plots import new_figure, png_bytes
from tmjax.report.tables import kind_of

#: Largest number of layers shown per site, evenly spread over the depth.
SHOWN = 8


def plot_arms(manifest: Mapping[str, Any]) -> bytes:
    """Plots bits per byte of every arm with its 95% interval, as PNG."""
    evaluation = manifest["evaluation"]
    names = list(evaluation)
    value = np.asarray([evaluation[name]["bits_per_byte"] for name in names])
    bounds = np.asarray([evaluation[name]["ci95"] for name in names])
    figure, axes = new_figure(1, 1, 7.0, 1.0 + 0.32 * len(names))
    axis = axes[0, 0]
    place = np.arange(len(names))
    # A percentile interval need not contain the point estimate.
    bars = np.maximum(np.stack([value - bounds[:, 0], bounds[:, 1] - value]), 0)
    axis.errorbar(value, place, xerr=bars, fmt="o", capsize=3)
    if "target" in evaluation:
        axis.axvline(evaluation["target"]["bits_per_byte"], color="black", linewidth=0.8)
    axis.set_yticks(place, names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("bits per byte, 95% interval over documents (of each arm by itself: differences are narrower)")
    return png_bytes(figure)


def plot_heads(shares: Mapping[str, list[tuple[int, int, np.ndarray]]]) -> bytes:
    """Plots the share of each target head's mass on source heads: a row per site, a panel per target layer."""
    picked = {site: _spread(blocks) for site, blocks in shares.items() if blocks}
    columns = max(map(len, picked.values()))
    figure, axes = new_figure(columns, len(picked), 2.1, 2.1)
    image = None
    for row, (site, blocks) in zip(axes, picked.items(), strict=True):
        for axis in row[len(blocks) :]:
            axis.set_visible(False)
        for axis, (layer, other, block) in zip(row, blocks, strict=False):
            image = axis.imshow(block, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_title(f"{site}: layer {layer} from {other}", fontsize="small")
            for ticks, size in ((axis.set_yticks, block.shape[0]), (axis.set_xticks, block.shape[1])):
                ticks(np.arange(0, size, -(-size // 8)))
            axis.tick_params(labelsize="x-small")
        row[0].set_ylabel("target head", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("source head", fontsize="small")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="share of mass")
    return png_bytes(figure)


def _spread(blocks: list[Any]) -> list[Any]:
    """Returns at most `SHOWN` entries, the first and the last included."""
    chosen = np.unique(np.linspace(0, len(blocks) - 1, min(SHOWN, len(blocks))).round().astype(int))
    return [blocks[i] for i in chosen]


def by_layer(manifest: Mapping[str, Any], key: str) -> tuple[list[str], np.ndarray]:
    """Returns kinds of tensors and a column of the update table [kind, layer]; NaN without a tensor in a layer."""
    cells: dict[tuple[str, int], float] = {}
    for name, item in manifest["update"].items():
        number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if number is not None:
            cells[kind_of(name), number] = item[key]
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = max((number for _, number in cells), default=-1) + 1
    values = np.full((len(kinds), layers), np.nan)
    for (kind, number), value in cells.items():
        values[kinds.index(kind), number] = value
    return kinds, values


def plot_coefficient_maps(manifest: Mapping[str, Any]) -> bytes:
    """Plots alpha, beta and the effective update of every tensor, [kind, layer], as PNG."""
    keys = {
        "alpha": "alpha (of the source)",
        "beta": "beta (of the target)",
        "effective_update": "change of the tensor",
    }
    maps = {key: by_layer(manifest, key) for key in keys}
    kinds, values = maps["alpha"]
    figure, axes = new_figure(len(keys), 1, 2.6 + 0.16 * values.shape[1], 1.4 + 0.3 * len(kinds))
    for axis, (key, (_, values)) in zip(axes[0], maps.items(), strict=True):
        limit = float(np.nanmax(np.abs(values), initial=1e-9))
        shown = axis.imshow(values, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
        axis.set_title(keys[key], fontsize="medium")
        axis.set_xlabel("layer")
        axis.set_yticks(np.arange(len(kinds)), kinds if axis is axes[0, 0] else [""] * len(kinds))
        figure.colorbar(shown, ax=axis)
    return png_bytes(figure)
