"""Forgetting: scores on texts of other languages or domains before and after a run (`--other-texts`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.evaluate.bits import Scorer, Scores
from tmjax.evaluate.bootstrap import percentile_interval, resample
from tmjax.recipes.base import EvaluationOptions
from tmjax.runs.directory import RunDirectory
from tmjax.runs.manifest import Manifest, Record
from tmjax.runs.run_facts import ForgettingFacts
from tmjax.sharding import hosts
from tmjax.text.documents import Texts
from tmjax.typing import Params


def forgetting_facts(before: Scores, after: Scores, *, arm: str, draws: int, seed: int) -> dict[str, Any]:
    """Computes bits per byte of the target and of `arm` on texts, and the change with its paired 95% interval."""
    drawn = resample({"target": before, arm: after}, draws=draws, seed=seed)
    change = drawn.samples[arm] - drawn.samples["target"]
    return {
        "target": drawn.point["target"],
        arm: drawn.point[arm],
        "change": {
            "bits_per_byte": drawn.point[arm] - drawn.point["target"],
            "ci95": list(percentile_interval(change)),
        },
        "documents": len(before.nll),
    }


def measure_forgetting(
    run: RunDirectory,
    others: Mapping[str, Texts],
    scorer: Callable[[Texts], Scorer],
    models: Callable[[], tuple[Params, Params]],
    *,
    arm: str,
    key: object,
    options: EvaluationOptions,
    seed: int,
) -> None:
    """Runs the stage `forgetting`: a manifest entry per file of other texts, and per-document scores on disk.

    `models` loads the target's parameters and those of `arm`, a model of the same architecture; `scorer` scores both.
    `key` is the input hash of the stage that made `arm`. Does nothing without other texts.
    """
    if not others:
        return

    def work(partial: Path) -> Record:
        target, params = models()
        measured: dict[str, ForgettingFacts] = {}
        arrays: dict[str, np.ndarray] = {}
        for number, (name, texts) in enumerate(others.items()):
            score = scorer(texts)
            before, after = score(target), score(params)
            facts = forgetting_facts(before, after, arm=arm, draws=options.draws, seed=seed)
            measured[name] = ForgettingFacts(**facts, sha256=texts.sha256)
            arrays |= {f"bytes_{number}": before.bytes, f"target_{number}": before.nll, f"{arm}_{number}": after.nll}
        if hosts.is_first():
            with partial.open("wb") as stream:
                np.savez(stream, **arrays)

        def record(manifest: Manifest) -> None:
            manifest.forgetting = measured

        return record

    hashes = {name: texts.sha256 for name, texts in others.items()}
    run.stage("forgetting", [key, hashes, options.model_dump(), seed], "forgetting.npz", work)
