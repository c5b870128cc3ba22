"""What the study found, as one picture: gains of all settings with intervals, and gains over calibration sizes."""

from typing import Any

from tmjax.report.plots import new_figure, png_bytes


def _gain(row: dict[str, Any]) -> tuple[float, float, float]:
    """Gain due to the source and how far its 95% interval reaches down and up, in bits per byte."""
    told = row["source_gain"]
    low, high = told["ci95"]
    return told["bits_per_byte"], told["bits_per_byte"] - low, high - told["bits_per_byte"]


def latest(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """For every setting and size the row of all seeds, or that of the only one."""
    return {(row["name"], row["texts"]): row for row in rows if "error" not in row}


def figure(rows: list[dict[str, Any]]) -> bytes:
    """PNG: left every setting at the size that most were run with, right what was run with several sizes, if any."""
    told = latest(rows)
    sizes = [size for _, size in told]
    common = max(dict.fromkeys(sizes), key=sizes.count) if sizes else 0
    at = {name: row for (name, size), row in told.items() if size == common}
    over = {name: sorted(size for other, size in told if other == name) for name in dict.fromkeys(n for n, _ in told)}
    several = sorted({size for held in over.values() if len(held) > 1 for size in held})
    picture, axes = new_figure(2 if several else 1, 1, 5.5, max(3.0, 0.24 * len(at) + 1.0))
    left = axes[0, 0]
    for place, row in enumerate(reversed(at.values())):
        gain, down, up = _gain(row)
        left.errorbar(gain, place, xerr=[[down], [up]], fmt="o", markersize=3, color="C0", capsize=2)
    left.set_yticks(range(len(at)), list(reversed(at)), fontsize="small")
    left.axvline(0.0, color="0.6", linewidth=0.8)
    left.set_xlabel(f"gain due to the source, bits per byte ({common} texts)")
    if not several:
        return png_bytes(picture)
    right = axes[0, 1]
    for number, (name, held) in enumerate(item for item in over.items() if len(item[1]) > 1):
        gains = [_gain(told[name, size]) for size in held]
        reach = [[down for _, down, _ in gains], [up for _, _, up in gains]]
        right.errorbar(held, [g for g, _, _ in gains], yerr=reach, fmt="o-", color=f"C{number}", capsize=2, label=name)
    right.axhline(0.0, color="0.6", linewidth=0.8)
    right.set_xscale("log")
    right.set_xticks(several, [str(size) for size in several])
    right.minorticks_off()
    right.set_xlabel("calibration texts")
    right.set_ylabel("gain, bits per byte")
    right.legend(fontsize="small")
    return png_bytes(picture)
