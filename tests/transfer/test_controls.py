"""Controls as operators see them: each changes all that an operator may know of the source."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SPEC

from tmjax.activations import store
from tmjax.checkpoints.model import Model
from tmjax.models.families import family_of
from tmjax.recipes.base import Section
from tmjax.text.rows import Rows
from tmjax.transfer.chain import apply_chain
from tmjax.transfer.contribution import Applied, Context, Contribution
from tmjax.transfer.controls import CONTROLS, Draw, derangement
from tmjax.transfer.operator import Step
from tmjax.transfer.source_view import PairedActivations, SourceView

UNITS = {"q": 5, "up": 7}
LAYERS, ROWS = 3, 6


class Options(Section):
    """No options."""


@dataclass
class Reader:
    """An operator that notes the source's activations and changes nothing."""

    needs: frozenset[str]
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    name, options, chooses = "reader", Options, False

    def apply(self, params: Any, source: SourceView, options: Any, context: Context) -> Applied:
        activations = source.activations().source
        self.seen = {site: np.asarray(activations.site(site)) for site in UNITS}
        for site, values in self.seen.items():
            np.testing.assert_array_equal(values, np.stack(list(activations.layers_of(site))))
        return Applied(params)

    def memory(self, *_: Any) -> int:
        return 0


class Contributing(Reader):
    """The same as an operator that contributes: nothing."""

    apply = None

    def contribute(self, params: Any, source: SourceView, options: Any, context: Context) -> Contribution:
        Reader.apply(self, params, source, options, context)
        return Contribution({}, _Nothing())


class _Nothing:
    def __call__(self, params: Any, items: Any, coefficients: Any) -> Any:
        return params

    def scaled(self, items: Any, factor: float) -> Any:
        return items

    def rows(self, *_: Any) -> dict:
        return {}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> store.Activations:
    folder, numbers = tmp_path_factory.mktemp("activations"), np.arange(ROWS)
    store.create(folder, Rows("", "span", numbers, numbers, numbers + 1), LAYERS, UNITS)
    for site, units in UNITS.items():
        values = np.random.default_rng(units).normal(size=(LAYERS, ROWS, units)).astype(np.float32)
        store.write_rows(folder, site, {0: values})
    return store.read(folder)


def seen(stored: store.Activations, control: str | None, kind: type, needs: set[str]) -> dict[str, np.ndarray]:
    """Activations that an operator with these needs is given in an arm."""
    family = family_of({"model_type": "llama"})
    params = {row.path: np.zeros(row.stacked_shape(SPEC), np.float32) for row in family.params(SPEC)}
    model = Model(family, SPEC, params, {}, Path())

    def view(order: np.ndarray | None) -> SourceView:
        source = stored if order is None else stored.reordered(order)
        return SourceView(model, activations=lambda: PairedActivations(stored, source))

    arm = replace(view(None), reordered=lambda order, name: view(order(ROWS)))
    if control is not None:
        arm = CONTROLS[control].intervene(arm, Draw(seed=3, vocab=SPEC.vocab))
    operator = kind(frozenset(needs))
    apply_chain((Step(operator, Options()),), arm, Context(model, alpha=0.1))
    return operator.seen


@pytest.mark.parametrize("kind", [Reader, Contributing])
def test_a_permuted_plan_permutes_activations_that_are_read_without_a_plan(stored, kind) -> None:
    plain = seen(stored, None, kind, {"activations"})
    permuted = seen(stored, "control:permuted_plan", kind, {"activations"})
    for site, units in UNITS.items():
        np.testing.assert_array_equal(plain[site], stored.site(site))
        orders = []
        for before, after in zip(plain[site], permuted[site], strict=True):
            # Units are told apart by their values: each is one of the true ones, whole.
            order = [int(np.nonzero((before == column[:, None]).all(axis=0))[0][0]) for column in after.T]
            assert sorted(order) == list(range(units))
            orders.append(order)
        assert orders != [list(range(units))] * LAYERS and len(set(map(tuple, orders))) > 1


def test_a_permuted_plan_leaves_activations_that_are_read_through_the_plan(stored) -> None:
    """The plan is permuted already: a second permutation would be another control than that of the weights."""
    through = seen(stored, "control:permuted_plan", Reader, {"alignment", "activations"})
    for site in UNITS:
        np.testing.assert_array_equal(through[site], stored.site(site))


@pytest.mark.parametrize("needs", [{"activations"}, {"alignment", "activations"}])
def test_shuffled_rows_are_shuffled_with_and_without_a_plan(stored, needs) -> None:
    shuffled, order = seen(stored, "control:shuffled_rows", Reader, needs), derangement(ROWS, 3)
    for site in UNITS:
        np.testing.assert_array_equal(shuffled[site], np.asarray(stored.site(site))[:, order])
