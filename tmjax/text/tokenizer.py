"""Tokenizers: always the fast kind, because character offsets align two tokenizers.

What `tokenizer.json` says is what is done: transformers would build another tokenizer out of its vocabulary where a
class is registered for the model's type. The other files name the special tokens and the chat template.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tmjax.errors import InputError
from tmjax.text.vocabulary import Vocabulary, read_vocabulary

FAST_NAME, CONFIG_NAME, ADDED_NAME = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
#: Files from which transformers builds a fast tokenizer of the model's type, without loss.
_PARTS = ("vocab.json", "merges.txt")
#: Files of tokenizers of other kinds.
_SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "vocab.txt")
#: Characters of a text that are shown to say which one is meant.
_SHOWN = 40


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text and the character range [start, end) of each; no special tokens added."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer with its vocabulary, encoding and decoding.

    `backend` is the tokenizer of `tokenizer.json`, `fast` a Hugging Face tokenizer around it for chat templates, names.
    `prefix` is the token put before every document: BOS, or EOS where a model has none. `suffix` is EOS. `rows` is the
    number of rows of the model's embedding, None where that does not matter; `name` is where the tokenizer lies.
    """

    fast: Any
    backend: Any
    prefix: int
    suffix: int
    name: str = ""
    rows: int | None = None

    @functools.cached_property
    def state(self) -> Mapping[str, Any]:
        """The parsed content of `tokenizer.json`."""
        return json.loads(self.backend.to_str())

    @functools.cached_property
    def spaces_dropped(self) -> bool:
        """Whether the pre-tokenizer leaves out the spaces between words."""
        before = self.backend.pre_tokenizer
        if before is None:
            return False
        written = "".join(piece for piece, _ in before.pre_tokenize_str("a b"))
        return written == "ab"

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes that tokens stand for."""
        named = frozenset({*self.fast.all_special_ids, self.prefix, self.suffix})
        pieces = self.backend.get_vocab(with_added_tokens=True)
        return read_vocabulary(self.state, pieces, named, spaces_dropped=self.spaces_dropped)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        return frozenset(self.vocabulary.special)

    @property
    def size(self) -> int:
        """One more than the largest id, which is more than the number of tokens where ids have holes."""
        return self.vocabulary.size

    def known(self, rows: int) -> np.ndarray | None:
        """Mask [rows] bool of the rows of an embedding that are tokens; None if all are."""
        is_token = self.vocabulary.known(rows)
        return None if is_token.all() else is_token

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids and character offsets of each text, without special tokens, never truncated.

        Raises InputError for a token beyond the model's embedding.
        """
        encodings = [Encoding(each.ids, each.offsets) for each in self.backend.encode_batch(list(texts), False, False)]
        for text, encoding in zip(texts, encodings, strict=True):
            largest = max(encoding.ids, default=0)
            if self.rows is not None and largest >= self.rows:
                shown = text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
                raise InputError(
                    f"the tokenizer of {self.name} gives id {largest} ({self.backend.id_to_token(largest)}) in the "
                    f"text {shown!r}, but the model's vocabulary has {self.rows} entries; leave that token out of the "
                    "texts"
                )
        return encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def document(self, ids: Sequence[int]) -> list[int]:
        """`[BOS or EOS] + ids + [EOS]`: the sequence by which a document is scored."""
        return [self.prefix, *ids, self.suffix]


def shared_tokens(target: TextTokenizer, source: TextTokenizer) -> tuple[list[int], list[int]]:
    """Ids (target, source) of the tokens that both vocabularies have, in the order of the target's.

    Tokens are paired by their bytes: the tokens that encode the bytes first, then the second choices of both, such as
    `<0x41>` where `A` is a token. Special tokens are paired by name, and those before and after a document by place.
    """
    own, other = target.vocabulary, source.vocabulary
    pairs = {
        number: partner
        for text, numbers in own.ids.items()
        for number, partner in zip(numbers, other.ids.get(text, ()), strict=False)
    }
    named = {name: number for number, name in other.special.items()}
    pairs |= {number: named[name] for number, name in own.special.items() if name in named}
    pairs |= {target.prefix: source.prefix, target.suffix: source.suffix}
    ordered = sorted(pairs.items())
    return [number for number, _ in ordered], [number for _, number in ordered]


def load_tokenizer(directory: Path, rows: int | None = None) -> TextTokenizer:
    """Loads the tokenizer of a checkpoint directory, whose model's embedding has `rows` rows.

    Raises InputError if there is none, none of the fast kind, or one without an end of sequence.
    """
    directory = Path(directory)
    fast, backend = _loaded(directory)
    prefix, suffix = (_special(directory, fast, backend, name) for name in ("bos", "eos"))
    if suffix is None:
        raise InputError(
            f"the tokenizer of {directory} has no end-of-sequence token; set eos_token in {CONFIG_NAME}"
            f"{_advised(directory, backend)}"
        )
    prefix = suffix if prefix is None else prefix
    for number in (prefix, suffix):
        if rows is not None and number >= rows:
            raise InputError(
                f"the tokenizer of {directory} begins or ends documents with id {number} "
                f"({backend.id_to_token(number)}), but the model's vocabulary has {rows} entries"
            )
    return TextTokenizer(fast, backend, prefix, suffix, str(directory), rows)


def _loaded(directory: Path) -> tuple[Any, Any]:
    """The Hugging Face tokenizer and the one of the `tokenizers` library, which truncates and pads nothing."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_fast = (directory / FAST_NAME).is_file()
    if not has_fast and not all((directory / name).is_file() for name in _PARTS):
        raise InputError(_lacking(directory))
    try:
        if has_fast:
            fast = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
            backend = tokenizers.Tokenizer.from_file(str(directory / FAST_NAME))
        else:
            fast = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
            backend = tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory} has no usable tokenizer: {reason}") from None
    except Exception as error:  # the Rust library raises bare Exception on a damaged tokenizer.json
        raise InputError(f"{directory} has a damaged tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # it would trim offsets; the special tokens that it adds are not asked for
    if not backend.get_vocab_size(with_added_tokens=False):
        raise InputError(f"{directory} has no usable tokenizer: its vocabulary is empty")
    _add(directory, backend)
    return fast, backend


def _lacking(directory: Path) -> str:
    """One line on a directory without a fast tokenizer's files."""
    slow = [name for name in _SLOW if (directory / name).is_file()]
    slow += [file.name for file in sorted(directory.glob("*.tiktoken"))]
    if slow:
        # AutoTokenizer would take the class of the model's type, whatever the file holds.
        kind = "PreTrainedTokenizerFast" if slow[0] == _SLOW[0] else "AutoTokenizer"
        return (
            f"{directory} has no usable tokenizer: {slow[0]} without {FAST_NAME}, which has to be made from it first: "
            f"pip install sentencepiece tiktoken, then in Python transformers.{kind}.from_pretrained(DIRECTORY)"
            ".save_pretrained(DIRECTORY)"
        )
    return (
        f"{directory} has no usable tokenizer: it lacks {FAST_NAME}; copy the tokenizer's files ({FAST_NAME}, "
        f"{CONFIG_NAME}) of the model that it was made from"
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is absent or damaged (transformers has then complained)."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _add(directory: Path, backend: Any) -> None:
    """Adds tokens that `tokenizer.json` lacks and the files beside it give an id; raises InputError for another id."""
    tokens: dict[int, dict[str, Any]] = {
        number: {"content": content, "special": False} for content, number in _read(directory / ADDED_NAME).items()
    }
    decoder = _read(directory / CONFIG_NAME).get("added_tokens_decoder") or {}
    tokens |= {int(number): token for number, token in decoder.items()}
    for number, token in sorted(tokens.items()):
        content = token["content"]
        if backend.token_to_id(content) is None:
            flags = {key: value for key, value in token.items() if key in ("lstrip", "rstrip", "single_word")}
            special = bool(token.get("special"))
            flags |= {"normalized": bool(token.get("normalized", not special)), "special": special}
            backend.add_tokens([tokenizers.AddedToken(content, **flags)])
        if backend.token_to_id(content) != number:
            raise InputError(
                f"the tokenizer of {directory} gives {content!r} the id {backend.token_to_id(content)}, "
                f"{CONFIG_NAME} or {ADDED_NAME} the id {number}; make the files agree"
            )


def _special(directory: Path, fast: Any, backend: Any, name: str) -> int | None:
    """The id of a special token, None if there is none."""
    content = getattr(fast, f"{name}_token")
    if content is None:
        return None
    number = backend.token_to_id(str(content))
    if number is None:
        raise InputError(
            f"the tokenizer of {directory} lacks the {name}_token {str(content)!r} that {CONFIG_NAME} names; add it to "
            f"{FAST_NAME}, or name another one"
        )
    return number


def _advised(directory: Path, backend: Any) -> str:
    """Advice with the end of sequence of the model's config."""
    for file in ("generation_config.json", "config.json"):
        number = _read(directory / file).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = backend.id_to_token(number) if isinstance(number, int) else None
        if token is not None:
            return f" ({file} says {number}, which is {token!r})"
    return ""
