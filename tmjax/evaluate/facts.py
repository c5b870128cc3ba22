"""Manifest entries of an evaluation: bits per byte of every arm with intervals, and the gain due to the source."""

from collections.abc import Mapping
from typing import Any

from tmjax.evaluate.bits import Scores
from tmjax.evaluate.bootstrap import resample, source_gain


def evaluation_facts(scores: Mapping[str, Scores], *, draws: int, seed: int, merged: str = "merged") -> dict[str, Any]:
    """Manifest entries `evaluation` and `source_gain` of scored arms, `merged` being the one that controls are for."""
    sampled = resample(scores, draws=draws, seed=seed)
    evaluation = {
        arm: {
            "bits_per_byte": sampled.point[arm],
            "ci95": list(sampled.interval(arm)),
            "documents": len(value.nll),
            "bytes": int(value.bytes.sum()),
            "tokens": int(value.tokens.sum()),
        }
        | hidden_facts(value)
        for arm, value in scores.items()
    }
    controls = [arm for arm in scores if arm.startswith("control:")]
    gain = source_gain(sampled, controls, merged=merged) if controls else None
    return {"evaluation": evaluation, "source_gain": gain}


def hidden_facts(scores: Scores) -> dict[str, float]:
    """Manifest entries `unknown_share` and `changed_share`, where there is anything to tell."""
    shares = {"unknown_share": scores.unknown_share, "changed_share": scores.changed_share}
    return {name: share for name, share in shares.items() if share > 0}
