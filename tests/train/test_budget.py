"""The plan of a budget: its parts add up, and the search keeps the better rates."""

import pytest

from tmjax.errors import InputError
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.train.budget import AVERAGE, RATES, Budget, seconds_of, tokens_of


@pytest.mark.parametrize("tokens", [12_000, 614_400, 1_228_800, 10**9])
def test_all_trainings_together_use_the_budget(tokens) -> None:
    plan = Budget.of(tokens)
    steps = sum(count * length for count, length in plan.rounds) + plan.steps
    assert tokens - plan.tokens_per_step < steps * plan.tokens_per_step <= tokens
    assert plan.steps > 0.7 * steps and plan == Budget.of(tokens)


def test_more_tokens_read_more_generated_texts() -> None:
    assert Budget.of(614_400).texts == 3072 and Budget.of(1_228_800).texts == 6144
    assert Budget.of(1_228_800).tokens_per_step == 2048


def test_the_search_ends_with_the_best_rate() -> None:
    """The first round would keep 6e-3 and 3e-3, the second prefers 3e-3."""
    plan, calls = Budget.of(1_228_800), []

    def train(steps: int, rate: float) -> float:
        calls.append((steps, rate))
        return abs(rate - (6e-3 if steps == plan.rounds[0][1] else 3e-3))

    plan.search(train)
    (_, first), (_, second) = plan.rounds
    assert calls == [*((first, rate) for rate in RATES), (second, 6e-3), (second, 3e-3), (plan.steps, 3e-3)]


def test_a_recipe_takes_the_plan() -> None:
    recipe = build_adapt_recipe({"target": "t", "texts": "f", "out": "o", "valid": "v", "tokens": 614_400})
    assert recipe.budgeted
    planned = Budget.of(614_400).applied(recipe)
    assert planned.generation.texts == 3072 and planned.training.average == AVERAGE
    assert planned.training.lr == RATES and recipe.training.average == 0


def test_times_and_faults() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    assert tokens_of(100, 1000) == 40_000
    with pytest.raises(InputError, match="too small; give at least 11264"):
        Budget.of(1000)
    values = {"target": "t", "texts": "f", "out": "o", "valid": "v"}
    with pytest.raises(InputError, match="budget"):
        build_adapt_recipe(values | {"budget": "soon"})
    with pytest.raises(InputError, match="give one of them"):
        build_adapt_recipe(values | {"budget": "5m", "tokens": 20_000})


@pytest.mark.parametrize(
    ("section", "settings", "named"),
    [
        ("training", {"lr": [1e-3]}, "training.lr"),
        ("training", {"accumulate": 2, "steps": 10}, "training.steps, training.accumulate"),
        ("generation", {"texts": 50}, "generation.texts"),
    ],
)
def test_settings_that_a_budget_decides_are_refused(section, settings, named) -> None:
    values = {"target": "t", "texts": "f", "out": "o", "valid": "v", section: settings}
    assert not build_adapt_recipe(values).budgeted
    with pytest.raises(InputError, match=f"a budget decides {named}: leave"):
        build_adapt_recipe(values | {"tokens": 20_000})
    # Others stay the user's, and a stored recipe has the defaults of all.
    kept = build_adapt_recipe(values | {"tokens": 20_000, section: {}, "max_texts": 7})
    again = build_adapt_recipe(kept.model_dump(mode="json"))
    assert again == kept and again.max_texts == 7
