"""Tokens learnt from texts: as the tokenizers library would go on, and added without moving what was there."""

import json

import numpy as np
import pytest
from tokenizer_kinds import KINDS, write
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tmjax.errors import InputError
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.transplant.extension import extended
from tmjax.transplant.learning import learn_pieces

SIZE = 500


@pytest.fixture(scope="module")
def verses(repo) -> list[str]:
    return list(read_texts(str(repo / "experiments/swahili/texts/swahili.calibration.jsonl")).first(200).texts)


def tokenizer_of(folder, state) -> TextTokenizer:
    folder.mkdir(exist_ok=True)
    return load_tokenizer(write(folder, state))


def more(tokenizer: TextTokenizer, folder, texts, count: int, **options) -> TextTokenizer:
    return tokenizer_of(folder, extended(tokenizer, learn_pieces(tokenizer, texts, count, **options)))


def test_training_goes_on_as_the_library_would_have(verses, tmp_path) -> None:
    """From the bytes alone: the merges of a byte-level BPE trained from scratch, up to the order of equal counts."""
    own = tokenizer_of(tmp_path / "own", KINDS["gpt2"](verses, 259))
    count = 300
    learnt = learn_pieces(own, verses, count)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        verses,
        trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=alphabet, min_frequency=2, show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    assert len(learnt.merges) == len(merges) == count
    assert learnt.merges[:20] == tuple(merges[:20])
    assert len(set(learnt.merges) & set(merges)) > 0.95 * count
    after = tokenizer_of(tmp_path / "after", extended(own, learnt))
    lengths = [sum(len(e.ids) for e in each.encode_batch(verses)) for each in (after.backend, theirs)]
    assert lengths[0] == pytest.approx(lengths[1], rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_old_tokens_stay_and_texts_come_back(kind, verses, tmp_path) -> None:
    """Trained on verses without some letters; the new tokens have those, and make the texts shorter."""
    few = [verse.translate(str.maketrans("zZkKé", "sSgGe")) for verse in verses[:60]]
    old = tokenizer_of(tmp_path / "old", KINDS[kind](few, SIZE))
    new = more(old, tmp_path / "new", verses, 150)
    assert new.size == old.size + 150
    before, after = (each.backend.get_vocab(with_added_tokens=True) for each in (old, new))
    assert {piece: after[piece] for piece in before} == before
    # A new letter may have been a byte before.
    assert len(new.vocabulary.ids) >= len(old.vocabulary.ids) + (100 if kind == "wordpiece" else 140)
    texts = verses[100:]
    was, now = ([encoding.ids for encoding in each.encode(texts)] for each in (old, new))
    unknown = [sum(ids.count(old.vocabulary.unknown) for ids in each) for each in (was, now)]
    assert unknown[1] < max(1, unknown[0] / 10)
    if kind != "wordpiece":  # which writes a whole word as one unknown token
        assert sum(map(len, now)) < (0.95 if kind == "unigram" else 0.9) * sum(map(len, was))
        texts_back = [new.decode(ids).strip() for ids in now if new.vocabulary.unknown not in ids]
        assert texts_back == [
            text.strip() for text, ids in zip(texts, now, strict=True) if new.vocabulary.unknown not in ids
        ]
    if old.state["model"]["type"] == "BPE":  # a text in new tokens is its text in old ones, some joined
        strings = new.vocabulary.text
        for pair in zip(was, now, strict=True):
            ends = [set(np.cumsum([len(strings[number]) for number in ids]).tolist()) for ids in pair]
            assert ends[1] <= ends[0]


def test_new_letters_come_first(verses, tmp_path) -> None:
    """Of a script that a SentencePiece tokenizer writes as bytes its characters are learnt, and then words."""
    old = tokenizer_of(tmp_path / "old", KINDS["llama2"](verses, SIZE))
    texts = ["შინდისი ქართული სოფელია", "ქართული ენა და სოფელი"] * 5
    new = more(old, tmp_path / "new", texts, 60)
    learnt = [new.vocabulary.text[number].decode() for number in range(old.size, new.size)]
    letters = [piece for piece in learnt if len(piece) == 1]
    assert set("შინდსქართულოფეა") <= set(letters) and len(letters) <= 30
    assert learnt[: len(letters)] == letters and " ქართული" in learnt
    assert len(new.encode(texts)[0].ids) < len(old.encode(texts)[0].ids) / 5


def test_errors_are_one_line(verses, tmp_path) -> None:
    old = tokenizer_of(tmp_path / "old", KINDS["gpt2"](verses, SIZE))
    with pytest.raises(InputError, match=r"no new token .* stands 2 times"):
        learn_pieces(old, ["x"], 10)
    state = KINDS["wordpiece"](verses, SIZE)
    state["model"] = {"type": "WordLevel", "vocab": state["model"]["vocab"], "unk_token": "<unk>"}
    with pytest.raises(InputError, match="is WordLevel; tokens are learnt for BPE, WordPiece, Unigram"):
        learn_pieces(tokenizer_of(tmp_path / "words", state), verses, 10)
    state = KINDS["unigram"](verses, SIZE)
    state["added_tokens"].append(state["added_tokens"][-1] | {"id": len(state["model"]["vocab"]) + 5, "content": "<x>"})
    holes = tokenizer_of(tmp_path / "holes", state)
    if holes.size > len(state["model"]["vocab"]) + 1:
        with pytest.raises(InputError, match="has no token"):
            more(holes, tmp_path / "never", verses, 10)
