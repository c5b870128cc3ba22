"""Texts: `.jsonl` with a `text` field, `.txt` with one document per line, or `hf:NAME[:split[:field]]`.

A split is as in `datasets`: `train`, or a part of it, `train[:500]`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmjax.errors import InputError


@dataclass(frozen=True)
class Texts:
    """Documents in order, each with an id; `path` is how the user named them."""

    path: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Hash of ids and texts, in order."""
        digest = hashlib.sha256()
        for item in (*self.ids, *self.texts):
            digest.update(item.encode() + b"\0")
        return digest.hexdigest()

    def first(self, count: int | None) -> "Texts":
        """The first `count` documents (all for None)."""
        return self if count is None else Texts(self.path, self.ids[:count], self.texts[:count])

    def spread(self, count: int) -> "Texts":
        """At most `count` documents, evenly spaced from the first to the last."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return Texts(self.path, tuple(self.ids[i] for i in chosen), tuple(self.texts[i] for i in chosen))

    def part(self, count: int | None, seed: int) -> "Texts":
        """The first `count` documents for seed 0; for another seed as many at random, in their order."""
        if count is None or count >= len(self) or seed == 0:
            return self.first(count)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return Texts(self.path, tuple(self.ids[i] for i in chosen), tuple(self.texts[i] for i in chosen))


def read_texts(name: str) -> Texts:
    """Reads documents; blank lines are skipped. Raises InputError naming the file and line."""
    if name.startswith("hf:"):
        return _from_hub(name)
    parse = _json_line if Path(name).suffix == ".jsonl" else _plain_line
    return _checked(name, [parse(name, number, line) for number, line in read_lines(name)])


def read_lines(name: str) -> list[tuple[int, str]]:
    """The lines of a .jsonl or .txt file that are not blank, with their numbers; raises InputError as `read_texts`."""
    path = Path(name).expanduser()
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"{name}: texts are a .jsonl or .txt file, or hf:NAME[:split[:field]]")
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"cannot read texts {name}: {error.strerror}") from None
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]


def _plain_line(_name: str, number: int, line: str) -> tuple[str, str]:
    return str(number), line


def parse_json(name: str, number: int, line: str) -> object:
    """The value of a line of a .jsonl file; raises InputError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} line {number} is not JSON: {error}") from None


def _json_line(name: str, number: int, line: str) -> tuple[str, str]:
    entry = parse_json(name, number, line)
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{name} line {number} has no text field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} line {number} holds half of a surrogate pair, which is not valid text") from None
    return str(entry.get("id", number)), text


def _from_hub(name: str) -> Texts:
    # A split may be a part, train[:500], whose colon is not ours.
    dataset, *rest = re.split(r":(?![^\[\]]*\])", name.removeprefix("hf:"))
    split, field = (*rest, *("train", "text")[len(rest) :])[:2]
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name} needs the datasets package: pip install 'tmjax[eval]'") from None
    try:
        rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # the library raises many unrelated types for the same user mistakes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {name}: {reason}") from None
    if field not in rows.column_names:
        raise InputError(f"{name} has no column {field}; it has {', '.join(rows.column_names)}")
    return _checked(name, [(str(number), text) for number, text in enumerate(rows[field]) if text and text.strip()])


def _checked(name: str, rows: Sequence[tuple[str, str]]) -> Texts:
    if not rows:
        raise InputError(f"{name} holds no text")
    ids, texts = zip(*rows, strict=True)
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise InputError(f"{name}: document id {twice} occurs twice")
    return Texts(name, ids, texts)
