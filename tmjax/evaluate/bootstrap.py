"""Paired bootstrap over documents: intervals of bits per byte and of what the source gained over the controls."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tmjax.evaluate.bits import Scores

LEVEL = 0.95
_CHUNK = 500


@dataclass(frozen=True)
class Draws:
    """Bits per byte of every arm: point estimates, and the same resamples of the documents for all arms [draws]."""

    point: dict[str, float]
    samples: dict[str, np.ndarray]

    def interval(self, arm: str) -> tuple[float, float]:
        """95% percentile interval of an arm's bits per byte."""
        return percentile_interval(self.samples[arm])


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of resampled values."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled_ratios(numerator_da: np.ndarray, denominator_da: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Sum over sum [draws, A] of documents drawn with replacement, the same for all A columns."""
    documents = len(numerator_da)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, draws, _CHUNK):
        counts = generator.multinomial(documents, np.full(documents, 1 / documents), size=min(_CHUNK, draws - start))
        parts.append((counts @ numerator_da) / (counts @ denominator_da))
    return np.concatenate(parts)


def resample(arms: Mapping[str, Scores], *, draws: int, seed: int) -> Draws:
    """Draws documents with replacement, the same for all arms, and recomputes sum of bits over sum of bytes."""
    names = list(arms)
    nll = np.stack([arms[name].nll for name in names], axis=1) / math.log(2)
    size = np.stack([arms[name].bytes for name in names], axis=1).astype(np.float64)
    samples = resampled_ratios(nll, size, draws=draws, seed=seed)
    return Draws(
        {name: arms[name].bits_per_byte for name in names}, {name: samples[:, i] for i, name in enumerate(names)}
    )


def source_gain(draws: Draws, controls: list[str], *, merged: str = "merged") -> dict[str, object]:
    """min over controls of (bits/byte of the control - of the merge), the minimum taken inside every draw.

    `fraction_of_gap` divides by target - source in the same draw; null if that gap's interval touches 0, or there is no
    source among the arms.
    """
    gains = np.min([draws.samples[name] - draws.samples[merged] for name in controls], axis=0)
    best = min(controls, key=lambda name: draws.point[name])
    gain = draws.point[best] - draws.point[merged]
    gap = draws.samples["target"] - draws.samples.get("source", draws.samples["target"])
    low, high = percentile_interval(gap)
    known = low > 0 or high < 0
    return {
        "bits_per_byte": gain,
        "ci95": list(percentile_interval(gains)),
        "fraction_of_gap": gain / (draws.point["target"] - draws.point["source"]) if known else None,
        "fraction_ci95": list(percentile_interval(gains / gap)) if known else None,
        "best_control": best,
    }
