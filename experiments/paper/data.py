"""Texts of a recipe: rows of a data set in the target's chat format, written as the files that tmjax reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schema import Data, PaperRecipe

from tmjax.checkpoints.load import config_directory
from tmjax.errors import InputError
from tmjax.files.atomic import write_text
from tmjax.text.tokenizer import load_tokenizer

PARTS = ("calibration", "valid", "test")


def conversation(data: Data, row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row as messages; empty where the row has no answer."""
    if data.messages is not None:
        return [{"role": turn["role"], "content": turn["content"]} for turn in row[data.messages] or []]

    def told(column: str | None) -> str:
        return str(row[column] or "").strip() if column else ""

    system = told(data.system) or data.instructions
    question = "\n\n".join(part for part in (told(data.user), told(data.context)) if part)
    if not question or not told(data.assistant):
        return []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": told(data.assistant)}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def text_of(data: Data, row: Mapping[str, Any], tokenizer: Any) -> str:
    """A row as text: plain, or a conversation in the tokenizer's chat format without its BOS, which tmjax adds."""
    if data.text is not None:
        return str(row[data.text] or "").strip()
    turns = conversation(data, row)
    if not turns:
        return ""
    if not tokenizer.chat_template:
        return "\n".join(turn["content"] for turn in turns)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return text.removeprefix(tokenizer.bos_token or "")


def prepare(recipe: PaperRecipe, folder: Path) -> dict[str, str]:
    """The files of calibration, valid and test texts; written into `folder` if they come from a data set."""
    data = recipe.data
    if data.dataset is None:
        return {part: str(getattr(data, part)) for part in PARTS}
    files = {part: folder / f"{part}.jsonl" for part in PARTS}
    if all(file.is_file() for file in files.values()):
        return {part: str(file) for part, file in files.items()}
    import datasets

    tokenizer = load_tokenizer(config_directory(recipe.target)).fast
    try:
        rows = iter(datasets.load_dataset(data.dataset, split=data.split, streaming=True))
    except Exception as error:  # the library raises many unrelated types for the same user mistakes
        raise InputError(f"cannot load {data.dataset}: {str(error).strip().splitlines()[0]}") from None
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for part, file in files.items():
        lines: list[str] = []
        wanted = getattr(data, part)
        while len(lines) < wanted and (row := next(rows, None)) is not None:
            if text := text_of(data, row, tokenizer):
                lines.append(json.dumps({"id": str(number), "text": text}, ensure_ascii=False))
            number += 1
        if not lines:
            raise InputError(f"{data.dataset} split {data.split} has no rows left for {part}")
        write_text(file, "\n".join(lines) + "\n")
    return {part: str(file) for part, file in files.items()}
