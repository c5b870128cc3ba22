"""The source as an arm of a merge sees it: everything that an operator may know of the source, and nothing else."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.alignment import Alignment
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.teacher.probabilities import TeacherProbabilities
from tmjax.text.rows import TokenisedDocument
from tmjax.text.token_map import TokenMap

#: From a number of rows to the order in which they are taken.
RowOrder = Callable[[int], np.ndarray]


class PairedActivations(NamedTuple):
    """Activations of both models at the same rows."""

    target: Activations
    source: Activations


class PairedFeatures(NamedTuple):
    """Activations of both models at the last token of every row, and the texts in the target's tokens.

    `documents` give the rows of the target: where each ends, and the token after it.
    """

    target: Activations
    source: Activations
    documents: list[TokenisedDocument]


class TeacherData(NamedTuple):
    """Texts as the target reads them, and the source's probabilities of its tokens.

    `documents` are token ids; the first `given` of them are calibration texts, the others generated. `probabilities`
    is None where the source has no say.
    """

    documents: tuple[list[int], ...]
    given: int
    probabilities: TeacherProbabilities | None


def _missing(name: str) -> NoReturn:
    raise InputError(f"an operator of this merge needs the {name} of the source, which was not given")


def _no_alignment() -> Alignment:
    return _missing("alignment")


def _no_activations() -> PairedActivations:
    return _missing("activations")


def _no_features(sites: Sequence[str]) -> PairedFeatures:
    return _missing("features")


def _no_token_map() -> TokenMap:
    return _missing("token map")


def _no_teacher() -> TeacherData:
    return _missing("teacher data")


@dataclass(frozen=True)
class SourceView:
    """All that an arm of a merge may know of the source.

    Everything but the model is made when first asked for, so that an operator list which does not need it costs
    nothing. A control is a function from view to view (`transfer.controls`); operators do not see which arm they serve.

    Attributes:
        model: Architecture and parameters.
        alignment: Makes the alignment with the target.
        activations: Makes the activations of both models at paired rows.
        unaligned_activations: Makes them for operators that need no alignment and so pair units themselves; None: the
            same.
        features: Makes activations of some sites of both models at the last tokens of rows.
        token_map: Makes the map between the two vocabularies.
        teacher: Makes texts and the source's probabilities of the target's tokens.
        contribution: Factor on everything that operators compute from the source.
        reordered: Makes the view whose rows are taken in another order before they are aligned.
        reinitialised: Makes the view of the same architecture with fresh random weights, from a seed and a name for
            what is made from them.
    """

    model: Model
    alignment: Callable[[], Alignment] = _no_alignment
    activations: Callable[[], PairedActivations] = _no_activations
    unaligned_activations: Callable[[], PairedActivations] | None = None
    features: Callable[[Sequence[str]], PairedFeatures] = _no_features
    token_map: Callable[[], TokenMap] = _no_token_map
    teacher: Callable[[], TeacherData] = _no_teacher
    contribution: float = 1.0
    reordered: Callable[[RowOrder, str], "SourceView"] = lambda order, name: _missing("rows")
    reinitialised: Callable[[int, str], "SourceView"] = lambda seed, name: _missing("architecture")

    def for_needs(self, needs: Collection[str]) -> "SourceView":
        """Returns the view that an operator with these needs is given.

        Args:
            needs: What the operator asks of the source; see `operator.NEEDS`.

        Returns:
            This view; for an operator without need of an alignment, with the activations that are meant for it.
        """
        if "alignment" in needs or self.unaligned_activations is None:
            return self
        return replace(self, activations=self.unaligned_activations)
