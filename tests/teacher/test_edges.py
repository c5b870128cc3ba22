"""First tokens and ends of texts: a source with another convention there is not asked, and cut texts teach no end."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.runs.run_facts import EdgeFacts
from tmjax.teacher.edges import MARGIN, Edges, edge_notes, measure_edges, needed_examples, save_edges
from tmjax.teacher.generation import Generation, TextFilter, filter_texts, generate_texts
from tmjax.teacher.probabilities import Search, TeacherProbabilities
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.documents import Texts
from tmjax.train.texts import TrainingTexts


@pytest.fixture(scope="module")
def verses(repo) -> list[str]:
    lines = (repo / "experiments/swahili/texts/swahili.calibration.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:12]]


@pytest.fixture(scope="module")
def source(llama_dir) -> Teacher:
    return Teacher.of(load_model(llama_dir))


@pytest.fixture(scope="module")
def target(qwen2_dir) -> Teacher:
    return Teacher.of(load_model(qwen2_dir))


def test_the_targets_side_is_what_transformers_says(source, target, verses, qwen2_dir) -> None:
    facts = measure_edges(source, target, verses, max_tokens=512, search=Search())
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen2_dir).eval()
    nll = []
    for encoding in target.tokenizer.encode(verses):
        ids = torch.tensor([target.tokenizer.document(encoding.ids)])
        with torch.no_grad():
            log = torch.log_softmax(model(ids).logits[0].double(), -1)
        nll.append([-float(log[place, ids[0, place + 1]]) for place in (0, -2)])
    np.testing.assert_allclose([facts["first"].target, facts["end"].target], np.mean(nll, axis=0), rtol=1e-4)
    assert set(facts) == {"first", "end"}


def test_a_source_that_ends_texts_otherwise_is_not_asked_there(source, target, verses) -> None:
    """Like a chat model: its end-of-sequence token is another one than it has learnt to put after such texts."""
    plain = measure_edges(source, target, verses, max_tokens=512, search=Search())
    never = next(n for n, piece in source.tokenizer.vocabulary.text.items() if piece and len(piece) > 6)
    other = dataclasses.replace(source, tokenizer=dataclasses.replace(source.tokenizer, suffix=never))
    facts = measure_edges(other, target, verses, max_tokens=512, search=Search())
    assert all(item.used for item in plain.values()) and facts["first"] == plain["first"]
    assert not facts["end"].used and facts["end"].source > plain["end"].source + MARGIN
    (line,) = edge_notes(facts)
    assert line.startswith("the source ends texts unlike the given ones") and edge_notes({}) == []


def test_edges_are_left_out_of_probabilities(tmp_path) -> None:
    documents = [[1, 5, 6, 7, 2], [1, 8, 9, 2], [1, 5, 6]]  # the last one was cut
    document, position = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 2, 3, 0, 2, 0, 2])
    ids = np.arange(14).reshape(7, 2)
    probabilities = TeacherProbabilities(document, position, ids, ids / 20)
    both = [(0, 0), (0, 2), (0, 3), (1, 0), (1, 2), (2, 0), (2, 2)]
    for edges, gone in (
        (Edges(), []),
        (Edges(first=False), [(0, 0), (1, 0), (2, 0)]),
        (Edges(end=False), [(0, 3), (1, 2)]),
    ):
        kept = edges.of(probabilities, documents)
        pairs = list(zip(kept.document.tolist(), kept.position.tolist(), strict=True))
        assert pairs == [pair for pair in both if pair not in gone]
        assert kept.ids.tolist() == [ids[both.index(pair)].tolist() for pair in pairs]
    with pytest.raises(InputError, match="no position"):
        Edges(first=False, end=False).of(TeacherProbabilities(document[:1], position[:1], ids[:1], ids[:1]), documents)
    save_edges(tmp_path / "edges.json", {}, 0, lines=False)
    assert Edges.load(tmp_path / "edges.json") == Edges()
    facts = {
        "first": EdgeFacts(source=9.0, target=1.0, used=False),
        "end": EdgeFacts(source=1.0, target=1.0, used=True),
    }
    save_edges(tmp_path / "edges.json", facts, 3, lines=True)
    assert Edges.load(tmp_path / "edges.json") == Edges(first=False, examples=3, lines=True)
    assert [needed_examples(facts, given) for given in (None, 0, 5)] == [3, 0, 5] and needed_examples({}, None) == 0


def test_a_text_that_was_cut_teaches_no_end(source, target, verses) -> None:
    texts, ended = generate_texts(source, verses, Generation(texts=8, tokens=40), seed=0)
    whole = generate_texts(source, verses, Generation(texts=8, tokens=200), seed=0)[0]
    assert ended == [text == longer for text, longer in zip(texts, whole, strict=True)] and 0 < sum(ended) < 8
    given = Texts("given", ("0",), (verses[0],))
    # Of two equal texts the first counts.
    kept, facts = filter_texts("source", [*texts, texts[0]], [*ended, not ended[0]], given, TextFilter())
    assert kept.texts.texts == tuple(texts) and list(kept.ended) == ended
    assert facts == {"asked": 9, "foreign": 0, "kept": 8, "cut": 8 - sum(ended)}
    documents, counts = TrainingTexts(kept.texts, ended=kept.ended).documents(target.tokenizer)
    assert counts is None
    for ids, text, has_ended in zip(documents, texts, ended, strict=True):
        expected = target.tokenizer.document(target.tokenizer.encode([text])[0].ids)
        assert ids == (expected if has_ended else expected[:-1])
