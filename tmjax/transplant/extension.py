"""More tokens in a tokenizer: its `tokenizer.json` with new pieces behind the old ones, whose ids stay."""

import copy
from dataclasses import dataclass
from typing import Any

from tmjax.errors import InputError
from tmjax.text.tokenizer import TextTokenizer

#: Log-probability of added tokens among the pieces of a Unigram model, which are matched before it is asked.
_NEVER = -100.0


@dataclass(frozen=True)
class Pieces:
    """New pieces of a tokenizer, in its own spelling and in the order of their ids.

    `scores` has every new piece with its log-probability, which only a Unigram model stores. `merges` are the pairs
    that a BPE model joins, in order, each of pieces that are old or come before.
    """

    scores: dict[str, float]
    merges: tuple[tuple[str, str], ...] = ()


def extended(tokenizer: TextTokenizer, pieces: Pieces) -> dict[str, Any]:
    """Adds pieces to a tokenizer.

    Args:
        tokenizer: A tokenizer whose model is BPE, WordPiece or Unigram.
        pieces: New pieces; they receive the ids from `tokenizer.size` on.

    Returns:
        The content of the new `tokenizer.json`.

    Raises:
        InputError: The ids of a Unigram tokenizer, which are places in a list, have holes.
    """
    state = copy.deepcopy(dict(tokenizer.state))
    model = state["model"]
    if model["type"] == "Unigram":
        _fill(state, tokenizer)
        model["vocab"] += [[piece, score] for piece, score in pieces.scores.items()]
        return state
    model["vocab"] |= {piece: tokenizer.size + number for number, piece in enumerate(pieces.scores)}
    if model["type"] == "BPE":
        listed = model["merges"]
        as_text = bool(listed) and isinstance(listed[0], str)
        listed += [" ".join(pair) if as_text else list(pair) for pair in pieces.merges]
    return state


def _fill(state: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Gives added tokens behind the pieces of a Unigram model their place among them."""
    listed = state["model"]["vocab"]
    added = {token["id"]: token["content"] for token in state.get("added_tokens") or []}
    for number in range(len(listed), tokenizer.size):
        if number not in added:
            raise InputError(
                f"the tokenizer of {tokenizer.name} has no token {number}; tokens cannot be added behind it"
            )
        listed.append([added[number], _NEVER])
