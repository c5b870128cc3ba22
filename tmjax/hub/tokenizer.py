"""Tokenizers: always the fast kind, because character offsets align two tokenizers."""

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

    def document(self, ids: Sequence[int]) -> list[int]:
        """`[BOS or EOS] + ids + [EOS]`: the sequence by which a document is scored."""
        return [self.prefix, *ids, self.suffix]


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
