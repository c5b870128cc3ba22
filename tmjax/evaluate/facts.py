"""Manifest entries of an evaluation: bits per byte of every arm with intervals, and the gain due to the source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmjax.evaluate.bits import Scores
from tmjax.evaluate.bootstrap import percentile_interval, resample, source_gain
from tmjax.runs.manifest import Manifest
from tmjax.runs.run_facts import Change, EvaluationFacts, SourceGain


@dataclass(frozen=True)
class Evaluated:
    """Facts of every scored arm, and the gain due to the source where there are controls."""

    evaluation: dict[str, EvaluationFacts]
    source_gain: SourceGain | None
    gain_by_source: dict[str, Change] | None = None

    def record(self, manifest: Manifest) -> None:
        """Sets `evaluation`, `source_gain` and `gain_by_source` of a manifest."""
        manifest.evaluation, manifest.source_gain = self.evaluation, self.source_gain
        manifest.gain_by_source = self.gain_by_source

    def to_json(self) -> dict[str, Any]:
        """Returns scores and gain as they stand in a manifest."""
        gain = self.source_gain
        return {
            "evaluation": {arm: facts.model_dump() for arm, facts in self.evaluation.items()},
            "source_gain": None if gain is None else gain.model_dump(),
        }


def evaluation_facts(
    scores: Mapping[str, Scores],
    *,
    draws: int,
    seed: int,
    merged: str = "merged",
    left_out: Mapping[str, str] | None = None,
) -> Evaluated:
    """Computes bits per byte of scored arms with intervals, and the gain due to the source.

    Args:
        scores: Scores of every arm on the same documents.
        draws: Bootstrap draws.
        seed: Seed of the draws.
        merged: The arm that the controls are for.
        left_out: The arms without one of several sources, by the source. They have something of the others and are no
            controls of the gain due to all.

    Returns:
        The facts for a manifest.
    """
    left_out = left_out or {}
    sampled = resample(scores, draws=draws, seed=seed)
    evaluation = {
        arm: EvaluationFacts(
            bits_per_byte=sampled.point[arm],
            ci95=list(sampled.interval(arm)),
            documents=len(value.nll),
            bytes=int(value.bytes.sum()),
            tokens=int(value.tokens.sum()),
            **hidden_facts(value),
        )
        for arm, value in scores.items()
    }
    controls = [arm for arm in scores if arm.startswith("control:") and arm not in left_out.values()]
    gain = SourceGain(**source_gain(sampled, controls, merged=merged)) if controls else None
    by_source = {
        source: Change(
            bits_per_byte=sampled.point[arm] - sampled.point[merged],
            ci95=list(percentile_interval(sampled.samples[arm] - sampled.samples[merged])),
        )
        for source, arm in left_out.items()
    }
    return Evaluated(evaluation, gain, by_source or None)


def hidden_facts(scores: Scores) -> dict[str, float]:
    """Manifest entries `unknown_share` and `changed_share`, where there is anything to tell."""
    shares = {"unknown_share": scores.unknown_share, "changed_share": scores.changed_share}
    return {name: share for name, share in shares.items() if share > 0}
