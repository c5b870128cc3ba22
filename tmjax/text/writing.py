"""Tokens of byte strings within a text, for example of the tokens of another vocabulary."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from tmjax.text.tokenizer import TextTokenizer
from tmjax.text.vocabulary import components


def write_within(tokenizer: TextTokenizer, strings: Sequence[bytes]) -> list[tuple[int, ...] | None]:
    """Encodes each string as it would be encoded after other text; None for strings that are no text to the tokenizer.

    A string that is a token of its own becomes that token, so that a vocabulary maps to itself. A leading space begins
    a word, in the tokenizer's own convention.
    """
    vocabulary = tokenizer.vocabulary
    written: list[tuple[int, ...] | None] = [None] * len(strings)
    inner = tokenizers.Tokenizer.from_str(json.dumps(prefixless(tokenizer.state)))
    asked: dict[int, str] = {}
    for number, string in enumerate(strings):
        token = vocabulary.id_of(string)
        if token is not None:
            written[number] = (token,)
            continue
        text = string.decode("utf-8", errors="replace")
        if not string or text.encode() != string:
            continue
        begun = _word_end(tokenizer, text) if tokenizer.spaces_dropped else ""
        tokens = write_longest(tokenizer, begun.encode())
        if tokens is not None:
            written[number] = tokens
            asked[number] = _normal(tokenizer, text).removeprefix(begun) if begun else text
    for number, encoding in zip(asked, inner.encode_batch(list(asked.values()), False, False), strict=True):
        tokens = (*written[number], *encoding.ids)
        written[number] = None if not tokens or any(token in vocabulary.special for token in tokens) else tokens
    return written


def _normal(tokenizer: TextTokenizer, text: str) -> str:
    normalizer = tokenizer.backend.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def _word_end(tokenizer: TextTokenizer, text: str) -> str:
    """The normalised beginning of a text that ends a word, where letters come before it."""
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("a" + _normal(tokenizer, text))
    return pieces[0][0][1:] if pieces else ""


def write_longest(tokenizer: TextTokenizer, string: bytes) -> tuple[int, ...] | None:
    """Writes bytes with the longest tokens in turn, as WordPiece does, which reads no word from its middle.

    None where no token begins with the bytes that are left.
    """
    ids = tokenizer.vocabulary.ids
    tokens: list[int] = []
    while string:
        length = next((n for n in range(len(string), 0, -1) if string[:n] in ids), None)
        if length is None:
            return None
        tokens.append(ids[string[:length]][0])
        string = string[length:]
    return tuple(tokens)


def prefixless(state: Mapping[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` that reads a string as if text came before it: no space is put before it, none stripped."""
    return dict(state) | {
        "normalizer": _changed(state.get("normalizer"), _plain_normalizer),
        "pre_tokenizer": _changed(state.get("pre_tokenizer"), functools.partial(_plain_split, state)),
    }


def _changed(part: Any, change: Any) -> Any:
    kept = [item for item in (change(dict(item)) for item in components(part)) if item is not None]
    if len(kept) < 2:
        return kept[0] if kept else None
    key = next(name for name in ("normalizers", "pretokenizers") if name in part)
    return {"type": "Sequence", key: kept}


def _plain_normalizer(part: dict[str, Any]) -> dict[str, Any] | None:
    return None if part["type"] in ("Prepend", "Strip") else part


def _plain_split(state: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any] | None:
    marked = any(item["type"] == "Metaspace" for item in components(state.get("pre_tokenizer")))
    if part["type"] == "WhitespaceSplit" and marked:
        return None  # Metaspace splits at spaces too, and writes them
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in part else {})
    return part | {"add_prefix_space": False} if part["type"] == "ByteLevel" else part
