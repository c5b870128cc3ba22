"""Vocabularies as bytes: the bytes that every token of a `tokenizer.json` stands for within a text.

The settings of the tokenizer decide how its pieces are read. Byte-level pieces name one byte by each character (Radford
et al. 2019). A mark, ▁ in SentencePiece, is a space. With byte fallback `<0xNN>` is a byte. Where the pre-tokenizer
drops spaces, as WordPiece's does, a piece that does not continue a word begins with one. Added tokens are literal text.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Names of the lists that sequences of normalisers, pre-tokenizers and decoders keep their parts in.
_PARTS = ("normalizers", "pretokenizers", "decoders", "processors")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a vocabulary.

    `text` maps ids of ordinary tokens to their bytes within a text (a word's leading space included), `special` maps
    the others to their names, among them `unknown`, which stands for text that cannot be written (None: no such token).
    `ids` lists the tokens of every byte string; the first is the one that the tokenizer writes it with. Ids may have
    holes.
    """

    text: Mapping[int, bytes]
    special: Mapping[int, str]
    ids: Mapping[bytes, tuple[int, ...]]
    unknown: int | None

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max((*self.text, *self.special), default=-1)

    def id_of(self, text: bytes) -> int | None:
        """The token that these bytes are written with, if a single one can be."""
        return self.ids[text][0] if text in self.ids else None

    def written(self) -> dict[bytes, int]:
        """Id of every byte string: of the token that it is written with."""
        return {text: ids[0] for text, ids in self.ids.items()}

    def known(self, rows: int) -> np.ndarray:
        """Mask [rows] bool of the rows of an embedding that are tokens; the others are padding or holes."""
        is_token = np.zeros(rows, bool)
        is_token[[number for number in (*self.text, *self.special) if number < rows]] = True
        return is_token


def components(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The parts of a normaliser, pre-tokenizer or decoder, in order, however they are nested."""
    if part is None:
        return
    nested = next((part[name] for name in _PARTS if name in part), None)
    if nested is None:
        yield part
    else:
        for item in nested:
            yield from components(item)


@dataclass(frozen=True)
class Spelling:
    """The spelling of pieces in a vocabulary.

    `marks` stand for a space; `continuing` begins a piece that continues a word, `ending` ends one that ends a word.
    """

    byte_level: bool
    marks: tuple[str, ...]
    fallback: bool
    continuing: str
    ending: str
    spaces_dropped: bool

    def is_fallback(self, piece: str) -> bool:
        """Whether a piece is the last resort for one byte, `<0xNN>`."""
        return self.fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

    def bytes_of(self, piece: str) -> bytes:
        """The bytes of a piece of the model's vocabulary."""
        if self.byte_level and all(character in _byte_of() for character in piece):
            return bytes(_byte_of()[character] for character in piece)
        if self.is_fallback(piece):
            return bytes([int(piece[3:5], 16)])
        inside = bool(self.continuing) and piece.startswith(self.continuing) and len(piece) > len(self.continuing)
        text = piece.removeprefix(self.continuing) if inside else piece
        text = text.removesuffix(self.ending) if self.ending else text
        for mark in self.marks:
            text = text.replace(mark, " ")
        return (" " + text if self.spaces_dropped and self.continuing and not inside else text).encode()

    def join(self, left: str, right: str) -> str:
        """Writes two neighbours within a word as one piece."""
        return left + (right.removeprefix(self.continuing) if self.continuing else right)

    def begins_word(self, piece: str) -> bool:
        """Whether a piece begins with a space."""
        return piece.startswith(("\u0120",) if self.byte_level else self.marks)


@functools.cache
def _byte_of() -> dict[str, int]:
    """Byte of every character of a byte-level vocabulary (Radford et al. 2019): printable ones are themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_spelling(state: Mapping[str, Any], *, spaces_dropped: bool) -> Spelling:
    """The spelling of a `tokenizer.json`; `spaces_dropped` as of `read_vocabulary`."""
    model = state["model"]
    before = [*components(state.get("normalizer")), *components(state.get("pre_tokenizer"))]
    marks = [part["replacement"] for part in before if part["type"] == "Metaspace"]
    marks += [
        part["content"]
        for part in before
        if part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"].strip()
    ]
    byte_level = any(part["type"] == "ByteLevel" for part in before)
    return Spelling(
        byte_level,
        tuple(dict.fromkeys(marks)),
        bool(model.get("byte_fallback")),
        model.get("continuing_subword_prefix") or "",
        model.get("end_of_word_suffix") or "",
        spaces_dropped and not marks and not byte_level,
    )


def _unknown(model: Mapping[str, Any]) -> str | None:
    """The piece that stands for text that the model cannot encode."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def read_vocabulary(
    state: Mapping[str, Any], pieces: Mapping[str, int], special_ids: frozenset[int], *, spaces_dropped: bool
) -> Vocabulary:
    """The vocabulary of a tokenizer.

    `state` is its `tokenizer.json`, `pieces` all its tokens with their ids, `special_ids` the special tokens that
    `state` does not mark; `spaces_dropped`: whether its pre-tokenizer leaves out the spaces between words.
    """
    spelling = read_spelling(state, spaces_dropped=spaces_dropped)
    added = {token["content"]: token for token in state.get("added_tokens") or []}
    unknown = _unknown(state["model"])
    text: dict[int, bytes] = {}
    special: dict[int, str] = {}
    ranks: dict[bytes, list[tuple[int, int]]] = {}
    for piece, number in pieces.items():
        token = added.get(piece)
        if number in special_ids or piece == unknown or (token is not None and token["special"]):
            special[number] = piece
            continue
        string = piece.encode() if token is not None else spelling.bytes_of(piece)
        text[number] = string
        # Added tokens are matched before all others; `<0xNN>` is the last resort.
        alone = token is not None and not token["single_word"]
        rank = 0 if alone else 2 if token is None and spelling.is_fallback(piece) else 1
        ranks.setdefault(string, []).append((rank, number))
    ids = {string: tuple(number for _, number in sorted(ranked)) for string, ranked in ranks.items() if string}
    return Vocabulary(dict(sorted(text.items())), special, ids, None if unknown is None else pieces.get(unknown))
