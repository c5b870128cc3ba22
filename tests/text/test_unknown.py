"""Text that a tokenizer hides from its model: counted in bytes, charged in every score."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SPEC
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.commands.sweep.score import SettingsScorer
from tmjax.evaluate.bits import Scorer, windows
from tmjax.text.documents import Texts, read_texts
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.text.unknown import hidden_bytes
from tools.make_checkpoint import make_checkpoint

CORPUS = ["maji ya mto na bahari", "habari za asubuhi, rafiki.", "neno la kwanza; neno la pili"] * 20
SPECIAL = ["<unk>", "</s>"]


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return made


def metaspace(model: models.Model, trainer: trainers.Trainer, normalizer: normalizers.Normalizer | None) -> Tokenizer:
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(CORPUS, trainer)
    return made


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=SPECIAL)
    return metaspace(models.Unigram(), trainer, normalizers.NFKC())


def bpe(unk: str | None) -> Tokenizer:
    model = models.BPE(unk_token=unk, fuse_unk=True) if unk else models.BPE()
    return metaspace(model, trainers.BpeTrainer(vocab_size=100, special_tokens=SPECIAL), None)


def byte_fallback() -> Tokenizer:
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + every_byte)
    return metaspace(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True), trainer, None)


def byte_level(trimmed: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL[1:], initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    return made


KINDS = {
    "word level": word_level,
    "WordPiece, lower case": word_piece,
    "Unigram, NFKC": unigram,
    "BPE, unknown": lambda: bpe("<unk>"),
    "BPE that drops": lambda: bpe(None),
    "BPE, byte fallback": byte_fallback,
    "byte level": lambda: byte_level(False),
    "byte level, trimmed": lambda: byte_level(True),
}
#: Bytes that are unknown or dropped, and bytes that are changed, by hand.
HIDDEN = {
    "maji ya mto": {},
    "日本 maji": dict.fromkeys(list(KINDS)[:5], (6, 0)),
    "maji日ya": dict.fromkeys(list(KINDS)[1:5], (3, 0)) | {"word level": (9, 0)},
    "maji 🌍🌍 ya": dict.fromkeys(list(KINDS)[:5], (8, 0)),
    "maji  ya\n\nmto ": {"word level": (3, 0), "WordPiece, lower case": (3, 0)}
    | dict.fromkeys(list(KINDS)[2:5], (2, 0)),
    "Habari ZA": {"word level": (8, 0), "WordPiece, lower case": (0, 3)} | dict.fromkeys(list(KINDS)[2:5], (3, 0)),
    "baﬁ": {"word level": (5, 0), "WordPiece, lower case": (5, 0), "Unigram, NFKC": (0, 3)}
    | dict.fromkeys(list(KINDS)[3:5], (3, 0)),
}


def wrapped(made: Tokenizer) -> TextTokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    return TextTokenizer(fast, fast.backend_tokenizer, fast.eos_token_id, fast.eos_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_bytes_of_every_kind_of_tokenizer(kind: str) -> None:
    tokenizer = wrapped(KINDS[kind]())
    counted = hidden_bytes(tokenizer, list(HIDDEN), tokenizer.encode(list(HIDDEN)))
    found = dict(zip(HIDDEN, zip(counted.unknown.tolist(), counted.changed.tolist(), strict=True), strict=True))
    assert found == {text: by_kind.get(kind, (0, 0)) for text, by_kind in HIDDEN.items()}


def test_an_unknown_token_that_the_text_spells_out_hides_nothing() -> None:
    for kind in ("word level", "Unigram, NFKC", "BPE, unknown", "BPE, byte fallback"):
        tokenizer, text = wrapped(KINDS[kind]()), "maji <unk> ya"
        assert hidden_bytes(tokenizer, [text], tokenizer.encode([text])).unknown.tolist() == [0], kind


@pytest.mark.parametrize("which", ["llama_dir", "qwen2_dir", "gpt_neox_dir"])
def test_bundled_tokenizers_hide_nothing(which: str, request, repo) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(which))
    odd = [*HIDDEN, "\0 \ufffd\u200b é é", " \n\t x ", *read_texts(str(first_texts(repo))).texts[:50]]
    counted = hidden_bytes(tokenizer, odd, tokenizer.encode(odd))
    assert not counted.unknown.any() and not counted.changed.any()


def first_texts(repo: Path) -> Path:
    return repo / "experiments/swahili/texts/swahili.test.jsonl"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """Random weights under a tokenizer that knows nine words."""
    folder = tmp_path_factory.mktemp("unknown")
    made = PreTrainedTokenizerFast(tokenizer_object=word_level(), eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer/config.json").write_text("{}")
    spec = dataclasses.replace(SPEC, vocab=len(made), layers=1)
    return make_checkpoint(folder / "model", "llama", spec, scale=0.02, tokenizer=folder / "tokenizer")


TEXTS = Texts("-", ("0", "1", "2"), ("日本語の文章 という", "maji ya mto", "maji zzzz ya"))


def test_unknown_text_is_charged_in_every_way_of_scoring(model_dir) -> None:
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    scorer = Scorer(model.spec, tokenizer, TEXTS)
    scores = scorer(model.params)
    cut = windows(model.spec, tokenizer, TEXTS)
    assert cut.hidden.unknown.tolist() == [27, 0, 4]
    uncharged = scores.nll - np.asarray([27, 0, 4]) * 8 * math.log(2)
    assert uncharged == pytest.approx(scores.tokens * math.log(model.spec.vocab), rel=0.05)  # weights know nothing
    assert uncharged.sum() / math.log(2) / scores.bytes.sum() < 2  # what it used to be
    assert scores.nll[0] / math.log(2) / scores.bytes[0] > 7.5
    assert scores.unknown_share == pytest.approx(31 / scores.bytes.sum())
    other = SettingsScorer(model, tokenizer, TEXTS, max_settings=1)
    packed = other([], [{}])
    assert packed[0] == pytest.approx(scores.nll, rel=1e-5)
    assert other.scores(packed[0]).unknown_share == scores.unknown_share


def test_evaluate_says_what_is_unknown(model_dir, tmp_path, capsys) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS.texts))
    assert cli.run(["evaluate", str(model_dir), "--texts", str(texts), "--json"]) == 0
    printed, said = capsys.readouterr()
    item = json.loads(printed)["evaluation"][str(model_dir)]
    assert item["unknown_share"] == pytest.approx(31 / item["bytes"]) and item["bits_per_byte"] > 5
    assert f"{item['unknown_share']:.1%} of the bytes of the texts (unknown or dropped), charged 8 bits each" in said
    assert cli.run(["evaluate", str(model_dir), "--texts", str(texts)]) == 0
    assert "unknown bytes" in capsys.readouterr().out
    shutil.rmtree(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of the harness and its libraries
def test_tasks_charge_for_unknown_text_too(model_dir) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from tmjax.evaluate.lm_eval_model import TmjaxLM

    def asked(kind: str, *arguments: str) -> Instance:
        return Instance(kind, {}, arguments, 0)

    model = TmjaxLM(load_model(model_dir))
    whole = model.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in TEXTS.texts])
    cut, uniform = windows(model.model.spec, load_tokenizer(model_dir), TEXTS), math.log(model.model.spec.vocab)
    # The harness does not ask for the end of the text.
    expected = cut.hidden.unknown * 8 * math.log(2) + (cut.tokens - 1) * uniform
    assert -np.asarray(whole) == pytest.approx(expected, rel=0.02)
    (known, _), (hidden, _) = model.loglikelihood(
        [asked("loglikelihood", "maji", " ya"), asked("loglikelihood", "maji", " 日本")]
    )
    assert known - hidden == pytest.approx(6 * 8 * math.log(2), abs=0.5)
