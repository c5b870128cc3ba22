"""Controls: arms that a merge must beat before its gain may be credited to the source.

A control is a function from the view of the source to another view. It is applied once, before the operators, and all
that follows is run again with the same budget of trials.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.alignment import Alignment
from tmjax.errors import InputError
from tmjax.text.token_map import TokenMap
from tmjax.transfer.source_view import PairedActivations, PairedFeatures, SourceView, TeacherData


def derangement(size: int, seed: int) -> np.ndarray:
    """A uniformly random cyclic permutation (Sattolo's algorithm): no element stays."""
    if size < 2:
        raise InputError("the control shuffled_rows needs at least two rows; give more text")
    generator = np.random.default_rng(seed)
    order = np.arange(size)
    for last in range(size - 1, 0, -1):
        other = generator.integers(last)
        order[last], order[other] = order[other], order[last]
    return order


def unit_permutations(alignment: Alignment, seed: int) -> dict[str, np.ndarray]:
    """Draws an independent permutation of the source units for every plan site and pair of layers: [L, M, k] each.

    Permuting the source's columns before the solver permutes the plan's columns with them, so nothing is solved again:
    the operators read the unpermuted weights through the permuted plan.
    """
    generator = np.random.default_rng(seed)
    shapes = {
        site: (*plans.index.shape, alignment.source[site].mean.shape[1]) for site, plans in alignment.plans.items()
    }
    return {
        site: generator.permuted(np.broadcast_to(np.arange(shape[2]), shape), axis=2) for site, shape in shapes.items()
    }


def _permuted(activations: Activations, seed: int) -> Activations:
    """Draws an independent permutation of the units for every site and layer."""
    generator, layers = np.random.default_rng(seed), activations.layers
    return activations.permuted(
        {
            site: generator.permuted(np.broadcast_to(np.arange(units), (layers, units)), axis=1)
            for site, units in sorted(activations.sites.items())
        }
    )


def exchanged_tokens(vocab: int, known_v: np.ndarray | None, seed: int) -> np.ndarray:
    """Draws another token for every token of a vocabulary [vocab]; rows that are no tokens (not `known_v`) stay."""
    tokens = np.arange(vocab) if known_v is None else np.nonzero(known_v)[0]
    result = np.arange(vocab)
    result[tokens] = tokens[derangement(len(tokens), seed)]
    return result


def zero_source(view: SourceView, draw: "Draw") -> SourceView:
    """The source contributes nothing; scales and steps are still fitted."""

    def teacher() -> TeacherData:
        data = view.teacher()
        return TeacherData(data.documents[: data.given], data.given, None)

    return replace(view, contribution=0.0, teacher=teacher)


def random_source(view: SourceView, draw: "Draw") -> SourceView:
    """The source's architecture with fresh random weights, of which everything is measured anew."""
    return view.reinitialised(draw.seed, "random_source")


def permuted_plan(view: SourceView, draw: "Draw") -> SourceView:
    """The source's units are permuted per site and pair of layers, its tokens exchanged in maps and probabilities.

    The plan of an alignment carries the permutation to all that reads the source through it. Units of features, and of
    activations for operators without an alignment, are permuted per site and layer: such operators pair units alone.
    """

    def alignment() -> Alignment:
        whole = view.alignment()
        return replace(whole, source_order=unit_permutations(whole, draw.seed))

    def unaligned_activations() -> PairedActivations:
        pair = view.activations()
        return pair._replace(source=_permuted(pair.source, draw.seed))

    def features(sites: Sequence[str]) -> PairedFeatures:
        pair = view.features(sites)
        return pair._replace(source=_permuted(pair.source, draw.seed))

    def token_map() -> TokenMap:
        whole = view.token_map()
        return whole._replace(order=derangement(len(whole.ids), draw.seed))

    def teacher() -> TeacherData:
        data = view.teacher()
        if data.probabilities is None:
            return data
        other = exchanged_tokens(draw.vocab, draw.known_v, draw.seed)
        ids = other[data.probabilities.ids].astype(np.int32)
        return data._replace(probabilities=data.probabilities._replace(ids=ids))

    return replace(
        view,
        alignment=alignment,
        unaligned_activations=unaligned_activations,
        features=features,
        token_map=token_map,
        teacher=teacher,
    )


def shuffled_rows(view: SourceView, draw: "Draw") -> SourceView:
    """The source's rows, tokens and probabilities are paired with other pieces of text."""

    def token_map() -> TokenMap:
        whole = view.token_map()
        order = derangement(len(whole.ids), draw.seed)
        return whole._replace(pieces=tuple(whole.pieces[number] for number in order))

    def teacher() -> TeacherData:
        data = view.teacher()
        if data.probabilities is None:
            return data
        order = derangement(len(data.probabilities.document), draw.seed)
        ids, weight = data.probabilities.ids[order], data.probabilities.weight[order]
        return data._replace(probabilities=data.probabilities._replace(ids=ids, weight=weight))

    other = view.reordered(functools.partial(derangement, seed=draw.seed), "shuffled_rows")
    return replace(other, token_map=token_map, teacher=teacher)


@dataclass(frozen=True)
class Draw:
    """Seed of a control, and size of the target's vocabulary, of whose rows `known_v` are tokens (None: all)."""

    seed: int
    vocab: int
    known_v: np.ndarray | None = None


@dataclass(frozen=True)
class Control:
    """One control arm: its name, its description, and its function from view to view."""

    name: str
    description: str
    intervene: Callable[[SourceView, Draw], SourceView]


CONTROLS: Mapping[str, Control] = {
    control.name: control
    for control in (
        Control("control:shrink", "source contribution zero, scales still fitted", zero_source),
        Control("control:random_source", "the source's architecture with fresh random weights", random_source),
        Control("control:permuted_plan", "source units permuted, per site and pair of layers", permuted_plan),
        Control("control:shuffled_rows", "source rows paired with other pieces of text", shuffled_rows),
    )
}
