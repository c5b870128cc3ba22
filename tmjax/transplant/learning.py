"""New tokens learnt from texts: byte-pair encoding goes on from the pieces that a tokenizer writes the texts with.

Within words the most frequent pair of neighbouring pieces is joined, again and again (Sennrich et al. 2016), as the
tokenizer's own training would have gone on. In the new tokens of a BPE model a text is its text in old tokens with some
neighbours joined. Characters for which the tokenizer has no token, only bytes or an unknown one, come first.
"""

import heapq
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from tmjax.errors import InputError
from tmjax.text.tokenizer import TextTokenizer
from tmjax.text.vocabulary import Spelling, read_spelling
from tmjax.text.writing import prefixless
from tmjax.transplant.extension import Pieces, extended

#: Texts that are encoded at a time.
_TEXTS = 1000
#: Largest share of the new tokens that single characters may take.
_CHARACTER_SHARE = 0.5
_KINDS = ("BPE", "WordPiece", "Unigram")
_Pair = tuple[str, str]
#: A word as pieces; None is a token that nothing is joined with.
_Word = tuple[str | None, ...]


def learn_pieces(tokenizer: TextTokenizer, texts: Sequence[str], count: int, *, minimum: int = 2) -> Pieces:
    """Learns new tokens from texts.

    Args:
        tokenizer: The tokenizer that is to receive them.
        texts: Texts of the language or domain.
        count: Largest number of new tokens.
        minimum: Smallest number of times that a new token stands in the texts.

    Returns:
        The new pieces, fewer than `count` where no other stands `minimum` times.

    Raises:
        InputError: The tokenizer's model is none of BPE, WordPiece and Unigram, or no token can be learnt.
    """
    kind = tokenizer.state["model"]["type"]
    if kind not in _KINDS:
        raise InputError(f"the tokenizer of {tokenizer.name} is {kind}; tokens are learnt for {', '.join(_KINDS)}")
    spelling = read_spelling(tokenizer.state, spaces_dropped=tokenizer.spaces_dropped)
    scores = _characters(tokenizer, spelling, texts, int(count * _CHARACTER_SHARE), minimum)
    backend = (
        tokenizers.Tokenizer.from_str(json.dumps(extended(tokenizer, Pieces(scores))))
        if scores
        else (tokenizer.backend)
    )
    words = Counter(_words(backend, tokenizer, spelling, texts))
    total = max(1, sum(len(word) * times for word, times in words.items()))
    scores = {piece: math.log(times / total) for piece, times in scores.items()}
    known = dict(tokenizer.state["model"]["vocab"]) if kind == "Unigram" else None
    taken, merges = set(backend.get_vocab(with_added_tokens=True)), []
    strings = set(tokenizer.vocabulary.ids)
    table = _Pairs(words)
    while len(scores) < count:
        best = table.best()
        if best is None or best[1] < minimum:
            break
        pair, times = best
        joined, score = spelling.join(*pair), math.log(times / total)
        if known is not None and score <= sum(scores[piece] if piece in scores else known[piece] for piece in pair):
            table.drop(pair)  # the most probable text in pieces would not have it
        elif joined in taken or spelling.bytes_of(joined) in strings:
            table.drop(pair)
        else:
            table.join(pair, joined)
            scores[joined] = score
            merges.append(pair)
            taken.add(joined)
            strings.add(spelling.bytes_of(joined))
    if not scores:
        raise InputError(f"no new token for the tokenizer of {tokenizer.name} stands {minimum} times in the texts")
    return Pieces(scores, tuple(merges))


def _characters(
    tokenizer: TextTokenizer, spelling: Spelling, texts: Sequence[str], maximum: int, minimum: int
) -> dict[str, int]:
    """Pieces of single characters that have none, with their counts, the most frequent first."""
    if spelling.byte_level:
        return {}
    # The normaliser as it acts within a text.
    normalizer = tokenizers.Tokenizer.from_str(json.dumps(prefixless(tokenizer.state))).normalizer
    counts = Counter(itertools.chain.from_iterable(normalizer.normalize_str(t) if normalizer else t for t in texts))
    own = tokenizer.backend.get_vocab(with_added_tokens=True)
    result: dict[str, int] = {}
    for character, times in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        spelt = [character]
        spelt += [spelling.continuing + character] if spelling.continuing else []
        spelt += [character + spelling.ending] if spelling.ending else []
        new = [piece for piece in spelt if piece not in own]
        if times >= minimum and not character.isspace() and len(result) + len(new) <= maximum:
            result |= dict.fromkeys(new, times)
    return result


def _words(backend: Any, tokenizer: TextTokenizer, spelling: Spelling, texts: Sequence[str]) -> Iterator[_Word]:
    """Words of the texts as pieces."""
    fixed = {*tokenizer.vocabulary.special.values()}
    fixed |= {token["content"] for token in tokenizer.state.get("added_tokens") or []}
    for first in range(0, len(texts), _TEXTS):
        for encoding in backend.encode_batch(list(texts[first : first + _TEXTS]), False, False):
            word: list[str | None] = []
            place = None
            for piece, number in zip(encoding.tokens, encoding.word_ids, strict=True):
                if word and (number != place or spelling.begins_word(piece)):
                    yield tuple(word)
                    word = []
                place = number
                word.append(None if piece in fixed or spelling.is_fallback(piece) else piece)
            if word:
                yield tuple(word)


class _Pairs:
    """Pairs of neighbours in distinct words, by how often they stand in the texts."""

    def __init__(self, words: Counter[_Word]) -> None:
        self.words = list(words)
        self.times = list(words.values())
        self.counts: Counter[_Pair] = Counter()
        self.places: dict[_Pair, set[int]] = defaultdict(set)
        self.dropped: set[_Pair] = set()
        for number in range(len(self.words)):
            self._count(number, 1)
        self.heap = [(-times, pair) for pair, times in self.counts.items()]
        heapq.heapify(self.heap)

    def best(self) -> tuple[_Pair, int] | None:
        """The most frequent pair and its count; of several the first in the alphabet."""
        while self.heap:
            times, pair = self.heap[0]
            if pair not in self.dropped and self.counts.get(pair, 0) == -times:
                return pair, -times
            heapq.heappop(self.heap)  # its count has changed since
        return None

    def drop(self, pair: _Pair) -> None:
        """Leaves a pair as it is from now on."""
        self.dropped.add(pair)

    def join(self, pair: _Pair, joined: str) -> None:
        """Makes a pair one piece wherever it stands."""
        changed: set[_Pair] = set()
        for number in sorted(self.places.pop(pair, ())):
            old, new, position = self.words[number], [], 0
            if not any(both == pair for both in itertools.pairwise(old)):
                continue
            changed |= self._count(number, -1)
            while position < len(old):
                fits = old[position : position + 2] == pair
                new.append(joined if fits else old[position])
                position += 2 if fits else 1
            self.words[number] = tuple(new)
            changed |= self._count(number, 1)
        for each in changed - {pair}:
            heapq.heappush(self.heap, (-self.counts[each], each))
        self.counts.pop(pair, None)

    def _count(self, number: int, sign: int) -> set[_Pair]:
        """Adds the pairs of a word to the counts, or takes them out; returns them."""
        pairs = [(a, b) for a, b in itertools.pairwise(self.words[number]) if a is not None and b is not None]
        for pair in pairs:
            self.counts[pair] += sign * self.times[number]
            if sign > 0:
                self.places[pair].add(number)
        return set(pairs)
