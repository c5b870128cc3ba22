"""Edges of texts: the first token and the end, where a source may follow another convention than the target's texts.

A chat model begins every text with a role and goes on after the sentence with which a document of the target ends. Its
probabilities there are far from the target's texts, however well it knows their language. The given texts show that:
the source's probabilities of their first tokens, and of their ends, are used unless they are clearly worse than those
of the target itself. A source with another convention reads given texts first (see `lines`), and is compared again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from tmjax.activations.joined import Joined, join
from tmjax.errors import InputError
from tmjax.evaluate.bits import token_nll
from tmjax.runs.run_facts import EdgeFacts
from tmjax.sharding.hosts import to_host
from tmjax.teacher.lines import Examples
from tmjax.teacher.probabilities import Search, TeacherProbabilities, next_tokens
from tmjax.teacher.shared import read_shared
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import NONE_SHARED

#: Given texts that are compared.
TEXTS = 64
#: Examples before the prompts of a source that follows another convention.
EXAMPLES = 3
#: Nats per text by which the source may be worse than the target: beyond a factor of 55 in probability it follows
#: another convention. A multilingual source, which cannot know the language of a first token, stays below.
MARGIN = 4.0
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Edges:
    """Whether a source's probabilities are used at the first token and at the end of texts.

    `examples` given texts stand before every prompt, and if `lines`, before the texts that the source reads too.
    """

    first: bool = True
    end: bool = True
    examples: int = 0
    lines: bool = False

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file that `save_edges` has written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        edges = {name: EdgeFacts(**facts).used for name, facts in values["edges"].items()}
        return cls(**edges, examples=values["examples"], lines=values["lines"])

    def of(self, probabilities: TeacherProbabilities, documents: Sequence[Sequence[int]]) -> TeacherProbabilities:
        """Returns the probabilities without the edges that are not used.

        Args:
            probabilities: Those of the documents, at all shared positions.
            documents: Token ids of every document as it is scored, prefix and suffix included.

        Raises:
            InputError: No position is left.
        """
        if self.first and self.end:
            return probabilities
        is_first, is_end = _edges(probabilities.document, probabilities.position, documents)
        kept = ~((is_first & (not self.first)) | (is_end & (not self.end)))
        if not kept.any():
            raise InputError(NONE_SHARED)
        return TeacherProbabilities(*(values[kept] for values in probabilities))


def _edges(
    document: np.ndarray, position: np.ndarray, documents: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether positions are before the first token, and whether before the end, bool [N] each."""
    last = np.asarray([len(ids) - 2 for ids in documents])
    is_end = position == last[document]
    return (position == 0) & ~is_end, is_end


def measure_edges(
    source: Teacher,
    target: Teacher,
    texts: Sequence[str],
    *,
    max_tokens: int,
    search: Search,
    examples: Examples | None = None,
) -> dict[str, EdgeFacts]:
    """Compares source and target at the edges of texts.

    The source's probability of a token that is not among the kept ones is an even share of the remainder.

    Args:
        source: The source.
        target: The target.
        texts: Given texts; the first `TEXTS` are read.
        max_tokens: Most tokens of a text, in both vocabularies, prefix included.
        search: How far the source's continuations are followed.
        examples: Given texts that the source reads before others.

    Returns:
        Mean negative log-likelihoods (nats) of both models at `first` and `end`, and whether the source's
        probabilities are used there. An edge at which the two share no position has no entry.
    """
    shared = read_shared(
        source, target.tokenizer, texts[:TEXTS], max_tokens=max_tokens, search=search, examples=examples
    )
    documents = [target.tokenizer.document(ids) for ids in shared.target]
    at_edge = np.any(_edges(*shared.places.T, documents), axis=0)
    if not at_edge.any():
        return {}
    chosen = [each[at_edge[each[:, 0]]] for each in shared.pairs]
    asked = shared._replace(pairs=chosen).asked(source, search)
    label = next_tokens(asked, documents)
    by_source = -asked.log_probability(label, target.spec.vocab)
    by_target = _target_nll(target, documents, asked)
    result = {}
    for name, at_edge in zip(("first", "end"), _edges(asked.document, asked.position, documents), strict=True):
        if at_edge.any():
            nll = float(by_source[at_edge].mean()), float(by_target[at_edge].mean())
            result[name] = EdgeFacts(source=nll[0], target=nll[1], used=nll[0] <= nll[1] + MARGIN)
    return result


def _target_nll(target: Teacher, documents: Sequence[Sequence[int]], at: TeacherProbabilities) -> np.ndarray:
    """Returns the target's negative log-likelihood of the tokens after positions [N]."""
    whole = [np.zeros(len(ids)) for ids in documents]
    for batch in join(target.spec, documents, BATCH_TOKENS, target.layout):
        placed = Joined(*map(target.layout.place_batch, batch))
        nll = to_host(token_nll(target.spec, target.params, placed, target.dtype, target.layout.mesh))
        for slot, column in np.argwhere(batch.text >= 0):
            whole[batch.text[slot, column]][batch.place[slot, column]] = nll[slot, column]
    return np.asarray([whole[d][p] for d, p in zip(at.document, at.position, strict=True)])


def save_edges(path: Path, facts: Mapping[str, EdgeFacts], examples: int, *, lines: bool) -> None:
    """Writes the facts of edges, and how many examples there are and where, as JSON."""
    edges = {name: item.model_dump() for name, item in facts.items()}
    path.write_text(json.dumps({"edges": edges, "examples": examples, "lines": lines}), encoding="utf-8")


def needed_examples(facts: Mapping[str, EdgeFacts], given: int | None) -> int:
    """Returns the number of examples: the given one, or as a source with these edges needs them."""
    if given is not None:
        return given
    return 0 if all(item.used for item in facts.values()) else EXAMPLES


def edge_notes(facts: Mapping[str, EdgeFacts], after: str = "") -> list[str]:
    """Returns a line for each edge that is not used; `after` says what the source has read before."""
    names = {"first": "begins texts", "end": "ends texts"}
    return [
        f"{after}the source {names[edge]} unlike the given ones ({item.source:.1f} nats a text against "
        f"{item.target:.1f} of the target): its probabilities there are not used"
        for edge, item in facts.items()
        if not item.used
    ]
