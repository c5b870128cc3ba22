"""Examples before prompts: a general model stays with the subject and the form of the given texts."""

import dataclasses
import json

import pytest
import tokenizer_kinds

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.teacher.generation import SHARE_LINES, Generation, contexts, generate_texts, openings
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.tokenizer import load_tokenizer

SETTINGS = Generation(texts=6, tokens=40, examples=2)


@pytest.fixture(scope="module")
def verses(repo) -> list[str]:
    lines = (repo / "experiments/swahili/texts/swahili.calibration.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:40]]


@pytest.fixture(scope="module")
def teacher(llama_dir) -> Teacher:
    return Teacher.of(load_model(llama_dir))


def test_contexts_are_different_given_texts_a_line_each(verses) -> None:
    many = dataclasses.replace(SETTINGS, texts=5 * SHARE_LINES)
    drawn = contexts(["two\n lines", *verses], many, 3)
    assert len(drawn) == 5 * SHARE_LINES and drawn == contexts(["two\n lines", *verses], many, 3)
    assert len(set(drawn)) == 5 and len(set(drawn[:SHARE_LINES])) == 1
    for context in drawn:
        first, second, rest = context.split("\n")
        assert first != second and {first, second} <= {"two lines", *verses} and not rest
    assert contexts(verses, dataclasses.replace(SETTINGS, examples=0), 3) == [""] * 6
    assert sorted(contexts(["a", "b"], dataclasses.replace(SETTINGS, examples=9), 0)[0].split()) == ["a", "b"]


def test_a_generated_text_is_the_line_after_the_examples(teacher, verses) -> None:
    texts, ended = generate_texts(teacher, verses, SETTINGS, seed=3)
    for text, opening in zip(texts, openings(verses, SETTINGS, 3), strict=True):
        assert "\n" not in text and text.startswith(opening.strip())
    again = generate_texts(teacher, verses, dataclasses.replace(SETTINGS, batch=2), seed=3)
    assert again == (texts, ended)


def test_a_line_break_ends_a_text(teacher, verses) -> None:
    """With a tokenizer for which many tokens begin a line, most texts end at once."""
    number = teacher.tokenizer.encode(verses[:1])[0].ids[2]
    pieces = dict(teacher.tokenizer.vocabulary.text)
    likely = [n for n, piece in pieces.items() if piece and piece.startswith(b" ")]
    tokenizer = dataclasses.replace(teacher.tokenizer)
    text = pieces | dict.fromkeys(likely, b"\n")
    tokenizer.__dict__["vocabulary"] = dataclasses.replace(teacher.tokenizer.vocabulary, text=text)
    texts, ended = generate_texts(dataclasses.replace(teacher, tokenizer=tokenizer), verses, SETTINGS, seed=3)
    assert number in pieces and all(ended)
    assert max(len(text.split()) for text in texts) <= 3


def test_a_tokenizer_without_line_breaks_is_refused(teacher, verses, tmp_path) -> None:
    tokenizer_kinds.write(tmp_path, tokenizer_kinds.KINDS["wordpiece"](verses, 300))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    other = dataclasses.replace(teacher, tokenizer=load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="drops line breaks"):
        generate_texts(other, verses, SETTINGS, seed=0)
