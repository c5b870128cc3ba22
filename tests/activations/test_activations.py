"""Rows pair the same text, pooling is the mean over the right tokens, compilations are bounded."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmjax.activations import store
from tmjax.activations.capture import CaptureOptions, capture, pooled_forward
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError, RowMismatchError
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.sites import SITES
from tmjax.text.buckets import bucket_length, bucketed
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import Rows, pair_rows, sample_rows, spans
from tmjax.text.tokenizer import Encoding, load_tokenizer


class FixedTokenizer:
    """Cuts a text into pieces of a fixed number of characters; id 0 is special."""

    prefix, suffix, special_ids = 0, 1, frozenset({0, 1})

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, texts):
        return [
            Encoding(
                [2 + i % 50 for i, _ in enumerate(range(0, len(text), self.width))],
                [(s, min(s + self.width, len(text))) for s in range(0, len(text), self.width)],
            )
            for text in texts
        ]


def _texts(*texts: str) -> Texts:
    return Texts("t", tuple(map(str, range(len(texts)))), texts)


TEXT = st.text(alphabet="ab \n\té", max_size=40)


@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 7))
def test_rows_name_the_same_text_in_both_models(texts: list[str], width: int, other: int) -> None:
    pieces = [text[s:e] for text in texts for s, e in spans(text)]
    tokenizers = [FixedTokenizer(width), FixedTokenizer(other)]
    if not pieces:
        with pytest.raises(InputError, match="no piece of text"):
            pair_rows(_texts(*texts), tokenizers, pooling="span", max_tokens=512)
        return
    rows, documents = pair_rows(_texts(*texts), tokenizers, pooling="span", max_tokens=512)
    assert [texts[d][s:e] for d, s, e in zip(rows.document, rows.start, rows.end, strict=True)] == pieces
    for tokenizer, held in zip(tokenizers, documents, strict=True):
        number = 0
        for text, document in zip(texts, held, strict=True):
            encoding = tokenizer.encode([text])[0]
            for positions in document.rows:
                start, end = rows.start[number], rows.end[number]
                truth = [i + 1 for i, (s, e) in enumerate(encoding.offsets) if s < end and e > start]
                assert positions == truth and 0 not in positions
                number += 1


@pytest.mark.parametrize("pooling", ["span", "sequence"])
def test_truncation_cuts_both_models_at_the_same_character(pooling: str) -> None:
    text = "aaaa bbbb cccc dddd eeee"
    tokenizers = [FixedTokenizer(1), FixedTokenizer(3)]
    rows, (fine, coarse) = pair_rows(_texts(text), tokenizers, pooling=pooling, max_tokens=12)
    assert max(rows.end) <= 11 and len(fine[0].ids) == 12
    last = max(position for row in coarse[0].rows for position in row)
    assert (last - 1) * 3 < 11  # no token that starts after the cut
    assert len(rows) == (2 if pooling == "span" else 1)


def test_special_tokens_in_the_text_never_count(qwen2_dir) -> None:
    tokenizer = load_tokenizer(qwen2_dir)
    rows, (documents, _) = pair_rows(_texts("Yesu <pad> </s> alikuwa"), [tokenizer] * 2, pooling="span", max_tokens=64)
    assert len(rows) == 2
    ids = [documents[0].ids[p] for row in documents[0].rows for p in row]
    assert not tokenizer.special_ids & set(ids)
    with pytest.raises(InputError, match="no piece of text is read by both"):
        pair_rows(_texts("<pad>"), [tokenizer] * 2, pooling="span", max_tokens=64)


def test_multibyte_characters_and_real_tokenizers(qwen2_dir, llama_dir) -> None:
    text = "‘Yésu’ – 世界 👩‍👩‍👧 mwana\u00a0wa Mungu"
    rows, documents = pair_rows(
        _texts(text), [load_tokenizer(qwen2_dir), load_tokenizer(llama_dir)], pooling="span", max_tokens=512
    )
    assert [text[s:e] for s, e in zip(rows.start, rows.end, strict=True)] == text.split()
    assert all(len(document[0].rows) == len(rows) and all(document[0].rows) for document in documents)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 40), st.integers(0, 3))
def test_of_many_rows_every_text_keeps_its_share(words: list[int], limit: int, seed: int) -> None:
    """The same rows in both models, by the seed alone, in their order; all of them where there are few."""
    texts = _texts(*(" ".join("ab" for _ in range(count)) for count in words))
    if not sum(words):
        return
    rows, documents = pair_rows(texts, [FixedTokenizer(2), FixedTokenizer(3)], pooling="span", max_tokens=512)
    chosen, kept = sample_rows(rows, documents, limit, seed)
    assert len(chosen) == min(limit, len(rows))
    counts, shares = (np.bincount(each.document, minlength=len(words)) for each in (rows, chosen))
    assert np.all(np.abs(shares - counts * min(1, limit / len(rows))) <= 1)
    places = {place: number for number, place in enumerate(zip(rows.document, rows.start, strict=True))}
    index = [places[place] for place in zip(chosen.document, chosen.start, strict=True)]
    assert index == sorted(set(index)) and np.array_equal(rows.end[index], chosen.end)
    for model, part in zip(documents, kept, strict=True):
        every = [positions for document in model for positions in document.rows]
        assert [positions for document in part for positions in document.rows] == [every[i] for i in index]
        assert [document.ids for document in model] == [document.ids for document in part]
    again, _ = sample_rows(rows, documents, limit, seed)
    again.require_same(chosen)


def test_another_text_or_another_row_is_an_error() -> None:
    rows = Rows("x", "span", np.asarray([0, 0, 1]), np.asarray([0, 3, 0]), np.asarray([2, 5, 4]))
    rows.require_same(rows)
    moved = Rows("x", "span", rows.document, rows.start + np.asarray([0, 1, 0]), rows.end)
    with pytest.raises(RowMismatchError, match="row 1 is another piece"):
        rows.require_same(moved)
    with pytest.raises(RowMismatchError, match="different texts"):
        rows.require_same(Rows("y", "span", rows.document, rows.start, rows.end))
    with pytest.raises(RowMismatchError, match="3 span against 2"):
        rows.require_same(Rows("x", "span", rows.document[:2], rows.start[:2], rows.end[:2]))


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(1, 4000), st.sampled_from([1, 4]))
def test_batches_hold_every_document_once_in_few_shapes(lengths: list[int], tokens: int, multiple: int) -> None:
    batches = list(bucketed(lengths, batch_tokens=tokens, multiple=multiple))
    assert sorted(n for batch in batches for n in batch.documents) == list(range(len(lengths)))
    assert all(lengths[n] <= batch.tokens for batch in batches for n in batch.documents)
    assert all(len(batch.documents) <= batch.size and batch.size % multiple == 0 for batch in batches)
    assert len({(batch.size, batch.tokens) for batch in batches}) == len({bucket_length(n) for n in lengths})
    assert all(bucket_length(n) < 1.5 * n for n in lengths if n > 32)


@pytest.fixture(scope="module")
def captured(qwen2_dir, repo, tmp_path_factory):
    model = load_model(qwen2_dir)
    tokenizer = load_tokenizer(qwen2_dir)
    texts = read_texts(str(repo / "experiments/swahili/texts/swahili.valid.jsonl")).first(40)
    rows, (documents, _) = pair_rows(texts, [tokenizer] * 2, pooling="span", max_tokens=512)
    before = pooled_forward._cache_size()
    held = capture(
        model.spec, model.params, rows, documents, tmp_path_factory.mktemp("a"), CaptureOptions(batch_tokens=1024)
    )
    return model, rows, documents, held, pooled_forward._cache_size() - before


def test_capture_is_the_mean_over_the_tokens_of_each_piece(captured) -> None:
    model, rows, documents, held, _ = captured
    assert set(held.sites) == set(SITES) and held.layers == 4
    for number in (0, 7, 39):
        ids = jnp.asarray([documents[number].ids])
        plain = bind(model.spec, model.params).run(ids, ForwardPlan(sites=tuple(SITES))).captured
        first = int(np.searchsorted(rows.document, number))
        for site, values in plain.items():
            ours = held.site(site)[:, first : first + len(documents[number].rows)]
            truth = np.stack([np.asarray(values)[:, 0, p].mean(1) for p in documents[number].rows], axis=1)
            np.testing.assert_allclose(ours, truth, atol=2e-5 * max(1.0, np.abs(truth).max()))


def test_compilations_are_one_per_bucket(captured) -> None:
    _, _, documents, _, compiled = captured
    assert compiled == len({bucket_length(len(d.ids)) for d in documents}) and compiled > 1


def test_store_reads_back_and_names_missing_sites(captured) -> None:
    _, rows, _, held, _ = captured
    again = store.read(held.directory)
    again.rows.require_same(rows)
    np.testing.assert_array_equal(again.site("q"), held.site("q"))
    with pytest.raises(InputError, match="no activations of site nowhere"):
        again.site("nowhere")


def test_vocabulary_too_small_is_said(qwen2_dir, tmp_path) -> None:
    model = load_model(qwen2_dir)
    rows, (documents, _) = pair_rows(_texts("a b"), [FixedTokenizer(1)] * 2, pooling="span", max_tokens=9)
    documents[0].ids[1] = 5000
    with pytest.raises(InputError, match="gives id 5000"):
        capture(model.spec, model.params, rows, documents, tmp_path)
