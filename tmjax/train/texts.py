"""Training texts: plain documents, or dialogues of which only the answers are learnt; and whether test text leaked in.

A `.jsonl` line may hold, in place of `text`, a `prompt` and a `response`, or `messages` (each with `role` and
`content`). Dialogues are written with the tokenizer's chat template if it has one; loss is on the assistant's answers
and on the end-of-sequence token after it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.errors import InputError
from tmjax.text.documents import Texts, parse_json, read_lines, read_texts, require_text
from tmjax.text.tokenizer import TextTokenizer

Message = dict[str, str]
#: Words of a run that counts as copied.
RUN_WORDS = 8
_ANSWER = "assistant"


@dataclass(frozen=True)
class TrainingTexts:
    """Documents in order; `dialogues` holds the messages of each, or is None for plain text.

    `ended`: whether each document ends with its last token, and did not merely stop there; None: all do.
    """

    texts: Texts
    dialogues: tuple[tuple[Message, ...], ...] | None = None
    ended: tuple[bool, ...] | None = None

    def first(self, count: int | None) -> "TrainingTexts":
        """Returns the first `count` documents (all for None)."""
        dialogues, ended = (None if each is None else each[:count] for each in (self.dialogues, self.ended))
        return TrainingTexts(self.texts.first(count), dialogues, ended)

    def documents(self, tokenizer: TextTokenizer) -> tuple[list[list[int]], list[list[bool]] | None]:
        """Returns token ids of every document, as it is scored, and which tokens are to be predicted (None: all)."""
        if self.dialogues is None:
            documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(self.texts.texts)]
            # Without a suffix nobody learns that a text which was cut ends there.
            ended = self.ended or [True] * len(documents)
            return [ids if whole else ids[:-1] for ids, whole in zip(documents, ended, strict=True)], None
        rendered = [
            _rendered(tokenizer, f"{self.texts.path}: dialogue {i}", d) for i, d in enumerate(self.dialogues, 1)
        ]
        ids, counts = [], []
        for (text, answers), encoding in zip(rendered, tokenizer.encode([t for t, _ in rendered]), strict=True):
            learnt = [any(s < end and e > start for start, end in answers) for s, e in encoding.offsets]
            before = [] if encoding.ids[:1] == [tokenizer.prefix] else [tokenizer.prefix]
            # A template may have written the end already, perhaps with white space after it.
            after = [] if tokenizer.suffix in encoding.ids[-2:] else [tokenizer.suffix]
            ids.append([*before, *encoding.ids, *after])
            ends = answers[-1][1] >= len(text.rstrip())  # the assistant has the last word
            counts.append([*(False for _ in before), *learnt, *(ends for _ in after)])
        return ids, counts


def read_training_texts(name: str) -> TrainingTexts:
    """Reads plain documents or dialogues, whichever the first line holds; raises InputError naming file and line."""
    if name.startswith("hf:") or Path(name).suffix != ".jsonl":
        return TrainingTexts(read_texts(name))
    lines = read_lines(name)
    first = parse_json(name, *lines[0]) if lines else None
    if not isinstance(first, dict) or isinstance(first.get("text"), str):
        return TrainingTexts(read_texts(name))
    if not ({"prompt", "response"} <= first.keys() or "messages" in first):
        keys = ", ".join(first) or "nothing"
        raise InputError(f"{name} line {lines[0][0]} has {keys}; it needs text, or prompt and response, or messages")
    entries = [(number, parse_json(name, number, line)) for number, line in lines]
    dialogues = tuple(_messages(f"{name} line {number}", entry) for number, entry in entries)
    ids = tuple(str(entry.get("id", number)) for number, entry in entries)
    for (number, _), name_of, dialogue in zip(entries, ids, dialogues, strict=True):
        require_text(f"{name} line {number}", name_of, *(message["content"] for message in dialogue))
    texts = tuple("\n".join(message["content"] for message in dialogue) for dialogue in dialogues)
    return TrainingTexts(Texts(name, ids, texts), dialogues)


def _messages(where: str, entry: Any) -> tuple[Message, ...]:
    if isinstance(entry, dict) and "messages" in entry:
        messages = entry["messages"]
    elif isinstance(entry, dict) and {"prompt", "response"} <= entry.keys():
        messages = [{"role": "user", "content": entry["prompt"]}, {"role": _ANSWER, "content": entry["response"]}]
    else:
        raise InputError(f"{where} has no prompt and response, and no messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise InputError(f"{where}: every message needs a role and a content of text")
    if not any(message["role"] == _ANSWER and message["content"] for message in messages):
        raise InputError(f"{where} has nothing that the assistant says, so nothing to learn")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _rendered(tokenizer: TextTokenizer, where: str, dialogue: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Returns a dialogue as one text, and the character ranges of the assistant's answers in it."""
    if not getattr(tokenizer.fast, "chat_template", None):
        if len(dialogue) > 2:
            raise InputError(f"{where} has {len(dialogue)} messages; the target's tokenizer has no chat template")
        prompt = "".join(f"{message['content']}\n" for message in dialogue[:-1])
        return prompt + dialogue[-1]["content"], [(len(prompt), len(prompt) + len(dialogue[-1]["content"]))]

    def render(count: int, prompted: bool) -> str:
        try:
            return tokenizer.fast.apply_chat_template(
                list(dialogue[:count]), tokenize=False, add_generation_prompt=prompted
            )
        except Exception as error:  # whatever a template raises
            raise InputError(f"{where} does not suit the chat template: {' '.join(str(error).split())}") from None

    whole, answers = render(len(dialogue), False), []
    for number, message in enumerate(dialogue):
        if message["role"] != _ANSWER:
            continue
        before, upto = render(number, True), render(number + 1, False)
        if not (upto.startswith(before) and whole.startswith(upto.rstrip())):
            raise InputError(f"{where}: the chat template writes a dialogue's beginning otherwise than the whole of it")
        answers.append((len(before), len(upto.rstrip())))
    return whole, answers


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: Sequence[str]) -> set[int]:
    """Hashes of all runs of RUN_WORDS words; of a shorter text, of the whole of it."""
    return (
        {hash(tuple(words[i : i + RUN_WORDS])) for i in range(max(1, len(words) - RUN_WORDS + 1))} if words else set()
    )


def leaked(training: Texts, heldout: Texts) -> list[str]:
    """Returns ids of held-out documents that are inside the training texts, case and punctuation aside.

    Every run of eight words of such a document is in them; a shorter document is a training document itself.
    """
    words = [_words(text) for text in training.texts]
    seen = set().union(*(_runs(item) for item in words))
    whole = {hash(tuple(item)) for item in words}
    leaks = []
    for name, text in zip(heldout.ids, heldout.texts, strict=True):
        own = _words(text)
        if own and (_runs(own) <= seen if len(own) >= RUN_WORDS else hash(tuple(own)) in whole):
            leaks.append(name)
    return leaks
