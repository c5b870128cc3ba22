"""Tokenizers: always the fast kind, because character offsets align two tokenizers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.errors import InputError


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text and the character range [start, end) of each; no special tokens added."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class TextTokenizer:
    """A fast Hugging Face tokenizer with the three things we ask of it.

    `prefix` is the token put before every document: BOS, or EOS where a model has none. `suffix` is EOS.
    """

    fast: Any
    prefix: int
    suffix: int
    special_ids: frozenset[int]

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids and character offsets of each text, without special tokens, never truncated."""
        out = self.fast(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            Encoding(ids, [tuple(o) for o in offsets])
            for ids, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def strings(self) -> dict[bytes | str, int]:
        """Id of every token by the bytes it stands for; special tokens by their names: prefix, suffix, or the text."""
        pieces = self.fast.get_vocab()
        byte_level = "ByteLevel" in self.fast.backend_tokenizer.to_str().split('"model"')[0]
        found: dict[bytes | str, int] = {}
        for piece, number in sorted(pieces.items(), key=lambda item: item[1]):
            if number not in self.special_ids:
                found.setdefault(_bytes(piece, byte_level), number)
        found |= {piece: number for piece, number in pieces.items() if number in self.special_ids}
        return found | {"prefix": self.prefix, "suffix": self.suffix}

    def document(self, ids: Sequence[int]) -> list[int]:
        """`[BOS or EOS] + ids + [EOS]`: the sequence by which a document is scored."""
        return [self.prefix, *ids, self.suffix]


@functools.cache
def _byte_of() -> dict[str, int]:
    """Byte of every character of a byte-level vocabulary (Radford et al. 2019): printable ones are themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(piece: str, byte_level: bool) -> bytes:
    if byte_level and all(character in _byte_of() for character in piece):
        return bytes(_byte_of()[character] for character in piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def shared_tokens(target: TextTokenizer, source: TextTokenizer) -> tuple[list[int], list[int]]:
    """Ids (target, source) of the tokens that both vocabularies have, in the order of the target's."""
    theirs = source.strings()
    pairs = sorted({number: theirs[piece] for piece, number in target.strings().items() if piece in theirs}.items())
    return [own for own, _ in pairs], [other for _, other in pairs]


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Loads the tokenizer of a checkpoint directory; raises InputError if it has none, or none of the fast kind."""
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory} has no usable tokenizer: {reason}") from None
    except Exception as error:  # the Rust library raises bare Exception on a damaged tokenizer.json
        raise InputError(f"{directory} has a damaged tokenizer: {error}") from None
    if not fast.is_fast:
        raise InputError(f"{directory} has only a slow tokenizer; save a tokenizer.json (character offsets are needed)")
    if fast.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {directory} has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    prefix = fast.eos_token_id if fast.bos_token_id is None else fast.bos_token_id
    return TextTokenizer(fast, prefix, fast.eos_token_id, frozenset(fast.all_special_ids))
