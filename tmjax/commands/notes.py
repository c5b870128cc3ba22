"""Warnings about texts and scores: blank documents, bytes that a tokenizer hides or changes."""

from collections.abc import Callable, Iterable, Mapping

from tmjax.evaluate.bits import Scores
from tmjax.text.documents import Texts
from tmjax.text.unknown import WORTH_SAYING


def note_blank(texts: Iterable[Texts | None], warn: Callable[[str], None]) -> None:
    """Warns of documents that were skipped, file by file."""
    blank = {item.path: item.blank for item in texts if item is not None and item.blank}
    for path, count in blank.items():
        warn(f"{path}: {count} blank document{'s' if count > 1 else ''} skipped")


def note_hidden(scores: Mapping[str, Scores], warn: Callable[[str], None]) -> None:
    """Warns of scores that the tokenizer affects strongly; arms with the same warning share a line."""
    arms_by_text: dict[str, list[str]] = {}
    for arm, item in scores.items():
        if item.unknown_share > WORTH_SAYING:
            text = f"hides {item.unknown_share:.1%} of the bytes of the texts (unknown or dropped), charged 8 bits each"
            arms_by_text.setdefault(text, []).append(arm)
        if item.changed_share > WORTH_SAYING:
            text = f"changes {item.changed_share:.1%} of the bytes of the texts before they are scored"
            arms_by_text.setdefault(text, []).append(arm)
    for text, arms in arms_by_text.items():
        warn(f"{', '.join(arms)}: the tokenizer {text}")
