"""Texts joined in rows: every token once, few shapes, and each text scored as if it were alone."""

import jax
import numpy as np
import pytest
from helpers import FORWARDS, SPEC, alone_nll, forwards, texts_that_begin_alike
from hypothesis import given, settings
from hypothesis import strategies as st

from tmjax.activations import joined
from tmjax.activations.joined import batch_size, join, joins
from tmjax.evaluate.bits import token_nll
from tmjax.models.decoder import init_params
from tmjax.sharding.mesh import Layout


@pytest.mark.parametrize(
    ("name", "row_tokens"), [("llama", 128), *forwards(32, "llama", "two rotaries", "learned positions")]
)
def test_joined_texts_score_as_alone(name: str, row_tokens: int, monkeypatch) -> None:
    monkeypatch.setattr(joined, "ROW_TOKENS", row_tokens)
    spec, generator = FORWARDS[name], np.random.default_rng(0)
    params = {
        path: value + 0.3 * generator.normal(size=value.shape).astype(np.float32)
        for path, value in init_params(spec, jax.random.key(0)).items()
    }
    texts = texts_that_begin_alike(spec, generator, spec.max_positions)
    found = np.zeros(len(texts))
    batches = list(join(spec, texts, 256, Layout()))
    for batch in batches:
        values, real = np.asarray(token_nll(spec, params, batch, np.float32)), batch.text >= 0
        assert not values[~real].any(), "padding is not scored"
        np.add.at(found, batch.text[real], values[real].astype(np.float64))
    for text, value in zip(texts, found, strict=True):
        assert value == pytest.approx(alone_nll(spec, params, text), rel=2e-5)
    shared = max(len(np.unique(row[row >= 0])) for batch in batches for row in batch.text)
    assert (shared > 1) == joins(spec) == (name not in ("dynamic", "longrope"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 400), min_size=1, max_size=80),
    st.integers(1, 4096),
    st.sampled_from(["data=1", "data=2", "data=8"]),
)
def test_rows_hold_every_token_once_in_few_shapes(lengths: list[int], tokens: int, mesh: str) -> None:
    layout = Layout(mesh)
    texts = [[(7 * number + i) % 50 for i in range(length)] for number, length in enumerate(lengths)]
    batches = list(join(SPEC, texts, tokens, layout))
    seen: dict[int, list[tuple[int, int, int]]] = {}
    for batch in batches:
        assert batch.ids.shape[0] % layout.batch_multiple == 0
        columns = (batch.text, batch.place, batch.ids, batch.label)
        for text, place, token, label in zip(*(x.ravel() for x in columns), strict=True):
            if text < 0:
                assert label == -1
            else:
                seen.setdefault(int(text), []).append((int(place), int(token), int(label)))
    for number, ids in enumerate(texts):
        assert seen[number] == [(i, ids[i], ids[i + 1]) for i in range(len(ids) - 1)]
    lengths_of_rows = {batch.ids.shape[1] for batch in batches}
    assert len({batch.ids.shape for batch in batches}) == len(lengths_of_rows) <= 5


def test_rows_are_nearly_full_and_sets_of_texts_share_a_shape() -> None:
    generator = np.random.default_rng(0)
    shapes = set()
    for _ in range(5):
        texts = [[1] * int(n) for n in generator.integers(5, 90, int(generator.integers(400, 900)))]
        batches = list(join(SPEC, texts, 1024, Layout()))
        shapes |= {batch.ids.shape for batch in batches}
        real = sum((batch.text >= 0).sum() for batch in batches)
        assert real > 0.93 * sum(batch.text.size for batch in batches[:-1])
    assert shapes == {(8, 128)}


@pytest.mark.parametrize(("rows", "max_rows", "multiple"), [(1, 8, 1), (9, 8, 1), (33, 32, 1), (100, 32, 8), (5, 3, 4)])
def test_batches_are_evenly_filled(rows: int, max_rows: int, multiple: int) -> None:
    size = batch_size(rows, max_rows, multiple)
    assert size % multiple == 0 and -(-rows // size) <= -(-rows // max_rows)
    assert size <= -(-max_rows // multiple) * multiple
