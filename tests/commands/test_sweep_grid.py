"""What `--grid` and `--random` mean."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmjax.commands.sweep.grid import Range, coefficients_of, make_settings, parse_axes, parse_axis, recipe_of
from tmjax.commands.sweep.groups import make_groups
from tmjax.errors import InputError
from tmjax.recipes.base import ALL_ROLES
from tmjax.transfer.operator import read_chain
from tmjax.transfer.recipe import build_recipe

RECIPE = build_recipe({"source": "s", "target": "t", "texts": "x", "valid": "v", "out": "o", "alpha": 0.1})
NO_ALPHA = RECIPE.model_copy(update={"alpha": None})


@given(st.integers(-300, 300), st.integers(0, 60), st.integers(1, 40), st.integers(0, 3))
def test_steps_hold_both_ends_and_nothing_beyond(low: int, steps: int, step: int, digits: int) -> None:
    def written(units: int) -> str:
        sign, (whole, rest) = "-" if units < 0 else "", divmod(abs(units), 10**digits)
        return f"{sign}{whole}.{rest:0{digits}d}" if digits else str(units)

    high = low + steps * step
    values = parse_axis(f"k={written(low)}:{written(high)}:{written(step)}").values
    assert values == tuple((low + i * step) / 10**digits for i in range(steps + 1))
    assert all(isinstance(value, int) for value in values) == (digits == 0)
    # An end between two steps is not reached.
    between = parse_axis(f"k={written(low * 10)}:{written(high * 10 + step * 9)}:{written(step * 10)}").values
    assert len(between) == steps + 1


@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-(10**9), 10**9), min_size=1, max_size=8, unique_by=repr))
def test_lists_come_back(values: list[float]) -> None:
    assert parse_axis("k=" + ",".join(map(repr, values))).values == tuple(values)


def test_other_values() -> None:
    assert parse_axis("solver = scaling, log:domain").values == ("scaling", "log:domain")
    assert parse_axis("transport.mask_top_k=null,64").values == (None, 64)
    assert parse_axis("transport.norm_match=true,false").values == (True, False)
    assert parse_axis("alpha=0,0.1:0.3:0.1,1e-3").values == (0, 0.1, 0.2, 0.3, 0.001)
    assert parse_axis("epsilon=log:1e-3..0.1").range == Range(1e-3, 0.1, log=True)
    assert parse_axis("beta=-.5..0").range == Range(-0.5, 0.0)


@pytest.mark.parametrize(
    ("grid", "random", "message"),
    [
        (["alpha"], False, "write key=value"),
        (["=1"], False, "write key=value"),
        (["alpha="], False, "write key=value"),
        (["alpha=0.1,,0.2"], False, "'' is not a value"),
        (["alpha=0.3:0:0.1"], False, "holds no value"),
        (["alpha=0:0.3:0"], False, "holds no value"),
        (["alpha=0:0.3:-0.1"], False, "holds no value"),
        (["alpha=0:1:1e-9"], False, "at most 100000"),
        (["alpha=0.1,0.1"], False, "a value is given twice"),
        (["alpha=0.1", "alpha=0.2"], False, "alpha is given twice"),
        (["epsilon=0.1", "alignment.epsilon=0.2"], False, "alignment.epsilon is given twice"),
        (["alpha=0.1..0.2"], False, "give --random N"),
        (["alpha=0.2..0.1"], True, "the range is empty"),
        (["alpha=log:0..0.1"], True, "0 < low < high"),
        (["transport.mask_top_k=3.2..3.8"], True, "transport.mask_top_k"),
        (["alpha=0.1,1.5"], False, "alpha=1.5: recipe: alpha: Input should be less than or equal to 1"),
        (["alpha=0.5..1.5"], True, "less than or equal to 1"),
        (["alpha.mlp=2"], False, "alpha.mlp must be a number from 0 to 1"),
        (["beta.q=big"], False, "beta.q must be a number"),
        (["alpha.head=0.1"], False, "alpha.head is not a key of the recipe"),
        (["transport.alfa=0.1"], False, "transport.alfa is not a key of the recipe"),
        (["speed=9"], False, "speed is not a key of the recipe"),
        (["alignment=1"], False, "alignment"),
        (["epsilon=0"], False, "greater than 0"),
        (["target=a,b"], False, "cannot be swept"),
        (["evaluation.max_tokens=8,16"], False, "cannot be swept"),
        (["coefficients.alphas=1"], False, "cannot be swept"),
        (["predictions.rounds=2,4"], False, "cannot be swept"),
        ([], False, "nothing to sweep"),
    ],
)
def test_what_is_refused(grid: list[str], random: bool, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_axes(grid, RECIPE, random=random)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_alpha_must_come_from_somewhere() -> None:
    for grid in (["epsilon=0.1"], ["alpha.mlp=0.1"]):
        with pytest.raises(InputError, match="sweep it"):
            parse_axes(grid, NO_ALPHA, random=False)
    parse_axes(["alpha.mlp=0.1", "alpha.attention=0.2"], NO_ALPHA, random=False)


def test_alpha_has_to_be_swept_for_the_roles_that_operators_contribute_to() -> None:
    """Embeddings and norms have no alpha of their own; an operator that contributes to few roles needs no others."""
    parts = ["alpha.mlp=0.1", "alpha.attention=0.2"]
    stream = NO_ALPHA.model_copy(update={"operators": ({"transport": {}}, {"residual_stream": {}})})
    with pytest.raises(InputError, match="does not choose alpha by itself"):
        parse_axes(parts, stream, random=False)
    parse_axes(["alpha=0.1", *parts], stream, random=False)
    parse_axes(parts, RECIPE.model_copy(update={"operators": stream.operators}), random=False)
    kept = {"residual_stream": {"embeddings": "keep", "norms": "keep"}}
    parse_axes(parts, NO_ALPHA.model_copy(update={"operators": ({"transport": {}}, kept)}), random=False)
    parse_axes(
        ["alpha.q=0.1"], NO_ALPHA.model_copy(update={"operators": ({"transport": {"roles": ["q"]}},)}), random=False
    )


def test_a_grid_is_the_product_and_its_size_is_bounded() -> None:
    axes = parse_axes(["alpha=0:1:0.01", "beta=-5:5:0.01", "seed=0,1"], RECIPE, random=False)
    with pytest.raises(InputError, match="the sweep has 202202 settings; at most 100000"):
        make_settings(axes, RECIPE)
    axes = parse_axes(["alpha=0,0.1", "beta=-1,0,1"], RECIPE, random=False)
    settings = make_settings(axes, RECIPE)
    assert len(settings) == 6 and settings[1] == {"alpha": 0, "beta": 0}


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_draws_stay_in_their_range_and_repeat_with_the_seed(seed: int, count: int) -> None:
    recipe = RECIPE.model_copy(update={"seed": seed})
    grid = ["alpha=0..0.3", "epsilon=log:1e-3..0.1", "transport.mask_top_k=2..5", "solver=scaling,sinkhorn"]
    axes = parse_axes(grid, recipe, random=True)
    settings = make_settings(axes, recipe, random=count)
    assert settings == make_settings(axes, recipe, random=count) and len(settings) == count
    other = make_settings(axes, recipe.model_copy(update={"seed": seed + 1}), random=count)
    assert other != settings
    for setting in settings:
        assert 0 <= setting["alpha"] <= 0.3 and 1e-3 <= setting["epsilon"] <= 0.1
        assert setting["transport.mask_top_k"] in (2, 3, 4, 5) and setting["solver"] in ("scaling", "sinkhorn")
        recipe_of(recipe, setting)


def test_log_draws_are_uniform_in_the_logarithm() -> None:
    axes = parse_axes(["epsilon=log:1e-4..1"], RECIPE, random=True)
    drawn = [math.log10(setting["epsilon"]) for setting in make_settings(axes, RECIPE, random=4000)]
    for edge in (-3, -2, -1):
        assert sum(value < edge for value in drawn) / 4000 == pytest.approx((edge + 4) / 4, abs=0.03)


def test_coefficients_the_particular_wins() -> None:
    setting = {"alpha": 0.1, "alpha.attention": 0.2, "alpha.q": 0.3, "beta.mlp": -0.5, "beta.down": 0.0}
    pairs = coefficients_of(RECIPE, setting, ALL_ROLES)
    assert pairs["q"] == (0.3, -0.3) and pairs["o"] == (0.2, -0.2)  # the recipe's beta, to be fitted, counts as tied
    assert pairs["up"] == (0.1, -0.5) and pairs["down"] == (0.1, 0.0)
    assert coefficients_of(RECIPE, {"coefficients.beta": -0.2}, ["k"]) == {"k": (0.1, -0.2)}
    assert coefficients_of(RECIPE, {"coefficients.beta": -0.2, "beta.k": "tied"}, ["k"]) == {"k": (0.1, -0.1)}


def test_groups_share_what_they_can() -> None:
    grid = ["alpha=0,0.1", "transport.mask_top_k=null,8", "epsilon=0.1,0.2", "activations.max_texts=5,9", "seed=1,2"]
    settings = make_settings(parse_axes(grid, RECIPE, random=False), RECIPE)
    groups = make_groups(RECIPE, settings)
    assert len(groups) == 8 and sorted(n for group in groups for n in group.members) == list(range(32))
    for group in groups:
        shared = {
            (s["transport.mask_top_k"], s["epsilon"], s["activations.max_texts"])
            for s in map(settings.__getitem__, group.members)
        }
        options = read_chain(group.recipe.operators)[0].options
        told = (options.mask_top_k, group.recipe.alignment.epsilon, group.recipe.activations.max_texts)
        assert shared == {told}
    # What is dearest changes least often.
    texts = [group.recipe.activations.max_texts for group in groups]
    epsilons = [group.recipe.alignment.epsilon for group in groups]
    assert sum(a != b for a, b in itertools.pairwise(texts)) == 1
    assert sum(a != b for a, b in itertools.pairwise(epsilons)) == 3
