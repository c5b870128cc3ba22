"""Bits per byte against PyTorch, windows, the bootstrap against a direct one, the gain's definition."""

import math

import numpy as np
import pytest
import torch
import transformers
from helpers import alone_nll

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer, Scores, token_nll
from tmjax.evaluate.bootstrap import percentile_interval, resample, source_gain
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import Texts, read_texts
from tmjax.text.tokenizer import load_tokenizer

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def verses(repo) -> Texts:
    return read_texts(str(repo / "experiments/swahili/texts/swahili.valid.jsonl")).first(30)


@pytest.mark.parametrize("which", ["llama_dir", "qwen2_dir"])
def test_bits_per_byte_equal_pytorch(which: str, verses, request) -> None:
    directory = request.getfixturevalue(which)
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    scores = Scorer(model.spec, tokenizer, verses, batch_tokens=512)(model.params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    fast = transformers.AutoTokenizer.from_pretrained(directory)
    total = 0.0
    for number, text in enumerate(verses.texts):
        ids = torch.tensor([[fast.bos_token_id, *fast(text, add_special_tokens=False)["input_ids"], fast.eos_token_id]])
        with torch.no_grad():
            log_p = reference(ids).logits[0, :-1].double().log_softmax(-1)
        nll = -float(log_p.gather(1, ids[0, 1:, None]).sum())
        assert scores.nll[number] == pytest.approx(nll, rel=1e-5)
        total += nll
    size = sum(len(text.encode()) for text in verses.texts)
    assert scores.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_batching_and_chunked_logits_do_not_matter(qwen2_dir, verses, monkeypatch) -> None:
    model, tokenizer = load_model(qwen2_dir), load_tokenizer(qwen2_dir)
    one = Scorer(model.spec, tokenizer, verses, batch_tokens=8192)(model.params)
    monkeypatch.setattr("tmjax.evaluate.bits.LOGIT_ENTRIES", 1)
    monkeypatch.setattr("tmjax.evaluate.bits.LEAST_ROWS", 7)
    token_nll.clear_cache()
    other = Scorer(model.spec, tokenizer, verses, batch_tokens=100, layout=Layout("data=3"))(model.params)
    np.testing.assert_allclose(one.nll, other.nll, rtol=1e-5)


def test_long_documents_are_scored_in_windows_that_score_every_token_once(qwen2_dir, verses) -> None:
    model, tokenizer = load_model(qwen2_dir), load_tokenizer(qwen2_dir)
    text = Texts("t", ("0",), (" ".join(verses.texts[:4]),))
    ids = tokenizer.document(tokenizer.encode(text.texts)[0].ids)
    scores = Scorer(model.spec, tokenizer, text, max_tokens=32)(model.params)
    expected = 0.0
    for start in range(0, len(ids) - 1, 31):
        expected += alone_nll(model.spec, model.params, ids[start : start + 32])
    assert scores.nll[0] == pytest.approx(expected, rel=1e-5)
    assert scores.tokens[0] == len(ids) - 1


def test_one_compilation_for_many_parameter_values(qwen2_dir, verses) -> None:
    model, tokenizer = load_model(qwen2_dir), load_tokenizer(qwen2_dir)
    scorer = Scorer(model.spec, tokenizer, verses)
    scorer(model.params)
    before = token_nll._cache_size()
    for scale in (0.9, 1.1):
        scorer({path: value * scale for path, value in model.params.items()})
    Scorer(model.spec, tokenizer, Texts("other", verses.ids, verses.texts[::-1]))(model.params)
    assert token_nll._cache_size() == before


def _scores(nll, size=None) -> Scores:
    nll = np.asarray(nll, float) * math.log(2)
    return Scores(nll, np.ones(len(nll)) if size is None else size, np.ones(len(nll)))


def test_bootstrap_is_the_percentile_interval_of_resampled_documents() -> None:
    generator = np.random.default_rng(0)
    size = generator.integers(20, 200, 150)
    nll = size * generator.normal(2.0, 0.3, 150)
    drawn = resample({"target": _scores(nll, size)}, draws=4000, seed=1)
    assert drawn.point["target"] == pytest.approx(nll.sum() / size.sum())
    direct = []
    for _ in range(4000):
        index = generator.integers(0, 150, 150)
        direct.append(nll[index].sum() / size[index].sum())
    np.testing.assert_allclose(drawn.interval("target"), percentile_interval(np.asarray(direct)), atol=4e-3)


def test_source_gain_is_the_minimum_over_controls_inside_every_draw() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(2.0, 0.2, 200)
    arms = {
        "target": _scores(base),
        "source": _scores(base - 0.5),
        "merged": _scores(base - 0.10 + generator.normal(0, 0.01, 200)),
        "control:shrink": _scores(base - 0.04 + generator.normal(0, 0.05, 200)),
        "control:shuffled_rows": _scores(base - 0.04 + generator.normal(0, 0.05, 200)),
    }
    controls = [arm for arm in arms if arm.startswith("control")]
    drawn = resample(arms, draws=2000, seed=0)
    gain = source_gain(drawn, controls)
    differences = np.stack([drawn.samples[c] - drawn.samples["merged"] for c in controls])
    assert gain["ci95"] == list(percentile_interval(differences.min(0)))
    best = min(controls, key=lambda c: drawn.point[c])
    assert gain["best_control"] == best
    assert gain["bits_per_byte"] == pytest.approx(drawn.point[best] - drawn.point["merged"])
    assert gain["fraction_of_gap"] == pytest.approx(gain["bits_per_byte"] / 0.5)
    assert gain["ci95"][0] > 0


def test_no_fraction_where_target_and_source_do_not_differ() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(2.0, 0.2, 100)
    arms = {
        name: _scores(base + generator.normal(0, 0.2, 100)) for name in ("target", "source", "merged", "control:shrink")
    }
    assert source_gain(resample(arms, draws=500, seed=0), ["control:shrink"])["fraction_of_gap"] is None


def test_vocabulary_and_window_are_checked(qwen2_dir, verses) -> None:
    model, tokenizer = load_model(qwen2_dir), load_tokenizer(qwen2_dir)
    import dataclasses

    with pytest.raises(InputError, match="vocabulary has 100 entries"):
        Scorer(dataclasses.replace(model.spec, vocab=100), tokenizer, verses)
    with pytest.raises(InputError, match="at least 2 tokens"):
        Scorer(model.spec, tokenizer, verses, max_tokens=1)
