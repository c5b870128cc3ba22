"""The token map of two tokenizers: every token of the target as the source's tokenizer writes it within a text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tmjax.errors import InputError
from tmjax.text.tokenizer import TextTokenizer
from tmjax.text.writing import write_within

#: Tokens whose pieces are gathered at a time.
_TOKENS = 4096


class TokenMap(NamedTuple):
    """The target's tokens in the source's vocabulary.

    `ids` [n] are the tokens that are text to both, `pieces` the source's tokens of each, `counts` [n] how often each
    occurs in the calibration texts. `order` [n] says whose mapped embedding each of the n tokens receives; its own
    where None.
    """

    ids: np.ndarray
    pieces: tuple[tuple[int, ...], ...]
    counts: np.ndarray
    order: np.ndarray | None = None

    def mean_rows(self, table_vk: np.ndarray) -> np.ndarray:
        """Computes the mean [n, k] float32 of the rows of the source's table over every token's pieces."""
        means = np.empty((len(self.ids), table_vk.shape[1]), np.float32)
        for first in range(0, len(means), _TOKENS):
            part = self.pieces[first : first + _TOKENS]
            lengths = np.array([len(pieces) for pieces in part])
            rows = np.asarray(table_vk[np.concatenate(part)], np.float32)
            sums = np.add.reduceat(rows, np.cumsum(lengths) - lengths, axis=0)
            means[first : first + _TOKENS] = sums / lengths[:, None]
        return means


def read_token_map(
    target: TextTokenizer, source: TextTokenizer, texts: Sequence[str], vocabularies: tuple[int, int]
) -> TokenMap:
    """Reads the token map of two tokenizers.

    Args:
        target: Tokenizer of the target.
        source: Tokenizer of the source.
        texts: Calibration texts, in which the target's tokens are counted.
        vocabularies: Rows of the embeddings of target and source.

    Returns:
        The map, tokens in the order of their ids.

    Raises:
        InputError: No token of the target is text that the source reads.
    """
    target_size, source_size = vocabularies
    counts = np.zeros(target_size, np.int64)
    for encoding in target.encode(texts):
        np.add.at(counts, [i for i in encoding.ids if i < target_size], 1)
    # Tokens that are a part of a character are no text; second choices, as <0x41> is where A is a token, stand in none.
    plain = sorted((number, text) for text, number in target.vocabulary.written().items() if number < target_size)
    plain = [(number, text) for number, text in plain if _is_text(text)]
    pieces = write_within(source, [text for _, text in plain])
    kept = [(number, ids) for (number, _), ids in zip(plain, pieces, strict=True) if ids and max(ids) < source_size]
    if not kept:
        raise InputError(
            "no token of the target is text that the source's tokenizer reads; leave out the operator embeddings"
        )
    ids = np.array([number for number, _ in kept])
    return TokenMap(ids, tuple(tokens for _, tokens in kept), counts[ids].astype(np.float64))


def _is_text(text: bytes) -> bool:
    try:
        return "\N{REPLACEMENT CHARACTER}" not in text.decode()
    except UnicodeDecodeError:
        return False
