"""Texts: `.jsonl` with a `text` field, `.txt` with one document per line, or `hf:NAME[:split[:field]]`.

A split is as in `datasets`: `train`, or a part of it, `train[:500]`.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmjax.errors import InputError

_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class Texts:
    """Documents in order, each with an id; `path` is how the user named them, `blank` counts documents left out."""

    path: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    blank: int = 0

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


def read_texts(path: str | Path) -> Texts:
    """Reads documents.

    Args:
        path: A `.jsonl` file with a `text` field per line (and optionally `id`), a `.txt` file with a document per
            line, or `hf:NAME[:split[:field]]`.

    Returns:
        The documents in order; blank ones are left out and counted.

    Raises:
        InputError: There is no such file, or a line is wrong; it names the line.
    """
    name = str(path)
    if name.startswith("hf:"):
        return _from_hub(name)
    if Path(name).suffix != ".jsonl":
        return _checked(name, [(str(number), line) for number, line in read_lines(name)])
    return _checked(name, [_json_line(name, number, line) for number, line in read_lines(name)])


def read_lines(name: str) -> list[tuple[int, str]]:
    """The lines of a .jsonl or .txt file that are not blank, with their numbers; raises InputError as `read_texts`.

    A byte order mark is no part of the text.
    """
    path = Path(name).expanduser()
    if path.suffix in _PACKED:
        raise InputError(f"{name} is compressed; unpack it first: texts are a .jsonl or .txt file")
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"{name}: texts are a .jsonl or .txt file, or hf:NAME[:split[:field]]")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read texts {name}: {error.strerror}") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name} is UTF-16 text; save it as UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name} line {line} is not UTF-8 text (byte 0x{raw[error.start]:02x})") from None
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise InputError(f"{name} line {number} holds a NUL character: it is not UTF-8 text")
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]


def parse_json(name: str, number: int, line: str) -> object:
    """The value of a line of a .jsonl file; raises InputError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} line {number} is not JSON: {error}") from None


def require_text(where: str, *strings: str) -> None:
    """Raises InputError for a string that is no text: half of a surrogate pair, which JSON can spell."""
    for string in strings:
        try:
            string.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} holds half of a surrogate pair, which is not valid text") from None


def _json_line(name: str, number: int, line: str) -> tuple[str, str]:
    entry = parse_json(name, number, line)
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        fault = "no text field" if text is None else f"a text field that is {_json_kind(text)}"
        raise InputError(f"{name} line {number} has {fault}")
    label = str(entry.get("id", number))
    require_text(f"{name} line {number}", text, label)
    return label, text


def _json_kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "no string")


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
    documents = []
    for number, text in enumerate(rows[field]):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{name} row {number}: column {field} holds {type(text).__name__}, not text")
        require_text(f"{name} row {number}", text or "")
        documents.append((str(number), text or ""))
    return _checked(name, documents)


def _checked(name: str, rows: Sequence[tuple[str, str]]) -> Texts:
    kept = [(label, text) for label, text in rows if text.strip()]
    blank = len(rows) - len(kept)
    if not kept:
        raise InputError(f"{name} holds no text" + (f": all {blank} documents are blank" if blank else ""))
    ids, texts = zip(*kept, strict=True)
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise InputError(f"{name}: document id {twice} occurs twice")
    return Texts(name, ids, texts, blank)
