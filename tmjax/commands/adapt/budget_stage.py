"""The plan of a budget as a stage of the run, so that a resumed run takes the same decisions."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tmjax.files.atomic import write_json
from tmjax.recipes.adapt import AdaptRecipe
from tmjax.runs.directory import RunDirectory
from tmjax.runs.manifest import Manifest, Record
from tmjax.runs.run_facts import BudgetFacts
from tmjax.sharding import hosts
from tmjax.train.budget import Budget, seconds_of, tokens_of

#: Output of the stage.
FILE = "budget.json"


def plan_budget(recipe: AdaptRecipe, run: RunDirectory, key: object, measure: Callable[[], float]) -> Budget:
    """Plans the training of every arm; a time is converted once, and the manifest records the throughput.

    Args:
        recipe: A recipe with a budget.
        run: The run directory.
        key: Input hash of the run.
        measure: Measures the tokens per second of a training.

    Returns:
        The plan.

    Raises:
        InputError: The budget is too small.
    """

    def work(partial: Path) -> Record:
        throughput = None if recipe.budget is None else hosts.agree(measure())
        tokens = recipe.tokens or tokens_of(seconds_of(recipe.budget or ""), throughput or 0.0)
        plan = Budget.of(tokens)
        if hosts.is_first():
            write_json(partial, {"tokens": tokens})

        def record(manifest: Manifest) -> None:
            values = asdict(plan) | {"rounds": [list(item) for item in plan.rounds]}
            manifest.budget = BudgetFacts(**values, tokens_per_second=throughput)

        return record

    path = run.stage("budget", key, FILE, work)
    return Budget.of(json.loads(path.read_text(encoding="utf-8"))["tokens"])
