"""Source-informed read-out: the source's next-token distribution on the calibration texts is what the solve aims at.

Where a token of the target and one of the source begin at the same character, the source's distribution there is told
in the target's tokens: a source token whose text and the true target token's begin alike (one holds the other) counts
for the true token, any other for the first of the target's tokens that its text is read as. The target's weights are
solved for (`solve`) on true tokens and on these labels. Arms differ in whose labels they are:

- `merged`: the source's. `control:shrink`: nobody's; the true tokens alone.
- `control:random_source`: those of the source's architecture with random weights. `control:self_source`: the target's.
- `control:shuffled_rows`: the source's at other positions. `control:permuted_plan`: source tokens exchanged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from solve import ROUNDS, Document
from written import ARMS, compared

from tmjax.convert.model import Model
from tmjax.evaluate.controls import derangement
from tmjax.hub.tokenizer import Encoding, TextTokenizer
from tmjax.models.decoder import forward, init_params
from tmjax.pipeline.inputs import Inputs
from tmjax.recipe import Recipe
from tmjax.typing import Params

#: Largest entries of a distribution that are kept; they are scaled to sum 1.
KEPT = 32
BATCH = 32


class Translation:
    """Source tokens as tokens of the target."""

    def __init__(self, target: TextTokenizer, source: TextTokenizer, target_vocab: int, source_vocab: int) -> None:
        self.target_vocab = target_vocab
        self.pieces, self.others = _pieces(target), _pieces(source)
        self.first = np.full(source_vocab, target.suffix)
        plain = [number for number in sorted(self.others) if number < source_vocab]
        for number, encoding in zip(plain, target.encode([source.fast.decode([n]) for n in plain]), strict=True):
            if encoding.ids:
                self.first[number] = encoding.ids[0]
        self.first[source.suffix] = target.suffix
        self.end = source.suffix, target.suffix
        self._alike: dict[int, np.ndarray] = {}

    def alike(self, token: int) -> np.ndarray:
        """Ids of the source tokens that agree with a token of the target as far as both go."""
        if token not in self._alike:
            text = self.pieces.get(token)
            found = (
                [] if text is None else [n for n, x in self.others.items() if x.startswith(text) or text.startswith(x)]
            )
            self._alike[token] = np.asarray([self.end[0]] if token == self.end[1] else found, np.int64)
        return self._alike[token]

    def label(self, probability: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Target ids [K] and weights [K] of a source distribution where `token` follows in truth."""
        told = np.bincount(self.first, probability, self.target_vocab)
        alike = self.alike(token)
        moved = probability[alike]
        np.subtract.at(told, self.first[alike], moved)
        told[token] += moved.sum()
        largest = np.argpartition(-told, KEPT)[:KEPT]
        weight = np.maximum(told[largest], 0)
        return largest, weight / weight.sum()


def _pieces(tokenizer: TextTokenizer) -> dict[int, bytes]:
    """Bytes of every token that is text, by id."""
    return {
        n: x for x, n in tokenizer.strings().items() if isinstance(x, bytes) and x and n not in tokenizer.special_ids
    }


def distributions(model: Model, params: Params, documents: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Next-token probabilities [n, V] float32 of every document."""
    longest = max(map(len, documents))
    found = []
    for start in range(0, len(documents), BATCH):
        some = documents[start : start + BATCH]
        ids = np.zeros((BATCH, longest), np.int32)
        for slot, document in enumerate(some):
            ids[slot, : len(document)] = document
        held = np.asarray(jax.nn.softmax(forward(model.spec, params, ids), axis=-1))
        found += [held[slot, : len(document)] for slot, document in enumerate(some)]
    return found


def shared_starts(target: Encoding, source: Encoding) -> list[tuple[int, int]]:
    """Positions (target, source) whose tokens begin at the same character; the ends of both texts are the last."""
    begins: dict[int, int] = {}
    for number, (start, end) in enumerate(source.offsets):
        if end > start:
            begins.setdefault(start, number)
    pairs, seen = [], set()
    for number, (start, end) in enumerate(target.offsets):
        if end > start and start in begins and start not in seen:  # tokens that share a character: the first begins it
            seen.add(start)
            pairs.append((number, begins[start]))
    return [*pairs, (len(target.ids), len(source.ids))]


class Arms:
    """The labels of every arm."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.seed = inputs, inputs.recipe.seed

    def extra(self, arm: str) -> list[list[Document]]:
        """One set of documents; none for `control:shrink`."""
        if arm == "control:shrink":
            return []
        inputs = self.inputs
        own = arm == "control:self_source"
        model = inputs.target if own else inputs.source
        tokenizer = inputs.target_tokenizer if own else inputs.source_tokenizer
        random = arm == "control:random_source"
        params = init_params(model.spec, jax.random.key(self.seed)) if random else model.params
        read = inputs.target_tokenizer.encode(inputs.texts.texts), tokenizer.encode(inputs.texts.texts)
        most = min(inputs.target.spec.max_positions, model.spec.max_positions)
        told = distributions(model, params, [tokenizer.document(e.ids)[:most] for e in read[1]])
        if arm == "control:permuted_plan":
            order = derangement(model.spec.vocab, self.seed)
            told = [held[:, order] for held in told]
        spoken = Translation(inputs.target_tokenizer, tokenizer, inputs.target.spec.vocab, model.spec.vocab)
        found = [
            self._labelled(a, [(t, s) for t, s in shared_starts(a, b) if max(t, s) < most - 1], held, spoken)
            for a, b, held in zip(*read, told, strict=True)
        ]
        return [_shuffled(found, self.seed) if arm == "control:shuffled_rows" else found]

    def _labelled(
        self, encoding: Encoding, pairs: list[tuple[int, int]], held: np.ndarray, spoken: Translation
    ) -> Document:
        ids = np.asarray(self.inputs.target_tokenizer.document(encoding.ids), np.int32)
        ids = ids[: self.inputs.target.spec.max_positions]
        label, weight = np.zeros((len(ids) - 1, KEPT), np.int32), np.zeros((len(ids) - 1, KEPT), np.float32)
        for position, other in pairs:
            label[position], weight[position] = spoken.label(held[other], int(ids[position + 1]))
        return Document(ids, label, weight)


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    """Every position that has a label with the label of another."""
    where = [(n, t) for n, held in enumerate(documents) for t in np.nonzero(held.weight.any(axis=1))[0]]
    fresh = [Document(held.ids, held.label.copy(), held.weight.copy()) for held in documents]
    for (n, t), other in zip(where, derangement(len(where), seed), strict=True):
        m, s = where[other]
        fresh[n].label[t], fresh[n].weight[t] = documents[m].label[s], documents[m].weight[s]
    return fresh


def run(
    recipe: Recipe,
    progress: Callable[[str], None],
    *,
    reach: str = "readout",
    rounds: int = ROUNDS,
    arms: Sequence[str] = ARMS,
) -> dict[str, Any]:
    """The source's labels on a recipe's models and texts."""
    inputs = Inputs(recipe)
    told = Arms(inputs).extra
    return compared(recipe, inputs, told, arms, reach=reach, rounds=rounds, progress=progress, out=Path(recipe.out))
