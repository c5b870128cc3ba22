"""Rows of an embedding that are no tokens: no probability, no part in solving and training, left as they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SPEC

from tmjax.activations.joined import join
from tmjax.checkpoints.load import load_model
from tmjax.models.decoder import init_params
from tmjax.models.families import family_of
from tmjax.models.generate import DecodingOptions, generate
from tmjax.models.sample import Sampling
from tmjax.sharding.mesh import Layout
from tmjax.teacher.probabilities import Search, probabilities_at
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import Crossing
from tmjax.text.tokenizer import load_tokenizer
from tmjax.train.data import Batches
from tmjax.train.modes import Plain
from tmjax.train.optimizer import TrainConfig
from tmjax.train.step import VOCABULARY, Objective, padding_of, start, step
from tmjax.transfer.controls import derangement, exchanged_tokens
from tmjax.transfer.prediction_solver import PredictionOptions, PredictionTargets, Solver

EXTRA = 64
#: Tokens at both ends and in the middle, padding between.
KNOWN = np.isin(np.arange(SPEC.vocab), [*range(20), *range(23, 40), 45])


@pytest.fixture(scope="module")
def padded(llama_dir):
    """The bundled source, and the same with rows of padding that it finds likelier than any token."""
    model = load_model(llama_dir)
    table = np.asarray(model.params["embed.weight"], np.float32)
    rows = np.random.default_rng(0).normal(size=(EXTRA, table.shape[1])) * 3 * table.std()
    spec = dataclasses.replace(model.spec, vocab=model.spec.vocab + EXTRA)
    params = {**model.params, "embed.weight": jnp.asarray(np.concatenate([table, rows]), jnp.float32)}
    return model, spec, params


def test_a_source_gives_rows_of_padding_no_probability(padded, llama_dir, qwen2_dir, texts, repo) -> None:
    model, spec, params = padded
    target, plain = load_tokenizer(qwen2_dir), load_tokenizer(llama_dir)
    wide = load_tokenizer(llama_dir, spec.vocab)
    verses = ["Yesu alikuwa Bethania.", "Basi, Petro akamwambia"]
    search, found = Search(steps=2, keep=16), []
    for held, tokenizer, weights in ((model.spec, plain, model.params), (spec, wide, params)):
        crossing = Crossing(target, tokenizer)
        (_, encoded), readings = crossing.read(verses)
        documents = [[tokenizer.prefix, *each.ids] for each in encoded]
        pairs = [crossing.shared_positions(*both) for both in zip(*readings, strict=True)]
        teacher = Teacher(held, weights, tokenizer)
        found.append(probabilities_at(teacher, crossing, documents, pairs, search=search))
    readings = crossing.readings(b"")
    assert readings.token.shape == (spec.vocab,) and (readings.token[model.spec.vocab :] == -1).all()
    # The order of equally likely tokens is nobody's business.
    np.testing.assert_allclose(found[0].weight, found[1].weight, atol=1e-5)
    assert found[0].weight.sum(axis=1).mean() > 0.5


def test_no_row_of_padding_is_written(padded, llama_dir) -> None:
    _, spec, params = padded
    tokenizer = load_tokenizer(llama_dir, spec.vocab)
    known = tokenizer.known(spec.vocab)
    assert known.sum() == spec.vocab - EXTRA
    options = [DecodingOptions(16, sampling=Sampling(1.0), known=rows) for rows in (None, known)]
    free, restricted = (generate(spec, params, [[0, 5]] * 4, each) for each in options)
    assert max(map(max, free)) >= spec.vocab - EXTRA  # padding is likely indeed
    assert all(known[ids].all() for ids in restricted)


def test_a_permuted_plan_exchanges_tokens_alone() -> None:
    np.testing.assert_array_equal(exchanged_tokens(40, None, 3), derangement(40, 3))
    others = exchanged_tokens(SPEC.vocab, KNOWN, 3)
    assert sorted(others) == list(range(SPEC.vocab))
    assert (others[KNOWN] != np.nonzero(KNOWN)[0]).all() and KNOWN[others[KNOWN]].all()
    np.testing.assert_array_equal(others[~KNOWN], np.nonzero(~KNOWN)[0])


def test_a_solve_leaves_rows_of_padding_as_they_are() -> None:
    spec = dataclasses.replace(SPEC, tied_embeddings=True)
    rows = family_of({"model_type": "llama"}).params(spec)
    params = init_params(spec, jax.random.key(0))
    rng = np.random.default_rng(0)
    (texts,) = join(spec, rng.choice(np.nonzero(KNOWN)[0], (4, 12)).tolist(), 4096, Layout())
    token = rng.choice(np.nonzero(KNOWN)[0], (*texts.ids.shape, 2)).astype(np.int32)
    weight = np.where(texts.text[..., None] >= 0, 0.4, 0.0).repeat(2, axis=-1).astype(np.float32)
    batch = PredictionTargets(texts, True, token, weight)
    options = PredictionOptions(trust=0.1)
    moved = []
    for known in (None, KNOWN):
        solver = Solver(spec, rows, params, options, known=known)
        directions = solver.directions(solver.sums(params, [batch]))
        moved.append(np.asarray(solver.moved(params, directions, 1.0, (0.2, 0.1))["embed.weight"]))
    old = np.asarray(params["embed.weight"])
    assert (moved[0][~KNOWN] != old[~KNOWN]).any(axis=1).all()
    assert moved[1][~KNOWN].tobytes() == old[~KNOWN].tobytes()
    assert (moved[1][KNOWN] != old[KNOWN]).any(axis=1).all()


def test_training_leaves_rows_of_padding_as_they_are() -> None:
    padding = padding_of(KNOWN)
    assert padding == ((20, 23), (40, 45), (46, 50)) and padding_of(None) == ()
    spec = dataclasses.replace(SPEC, head_bias=True)
    rng = np.random.default_rng(0)
    documents = [rng.choice(np.nonzero(KNOWN)[0], 17).tolist() for _ in range(8)]
    data = iter(Batches(documents, tokens=64, seed=0, lengths=1))
    config = TrainConfig(steps=4, warmup=1, lr=1e-2)
    params = init_params(spec, jax.random.key(0))
    old = {path: np.array(params[path]) for path in VOCABULARY}
    objective = Objective(spec, config, Plain(), padding=padding)
    state = start(objective, dict(params))
    for _ in range(3):
        state, _ = step(objective, state, {}, [next(data)], 0.01)
    for path, before in old.items():
        after = np.asarray(state.trained[path])
        assert after[~KNOWN].tobytes() == before[~KNOWN].tobytes()
        assert (after[KNOWN] != before[KNOWN]).reshape(KNOWN.sum(), -1).any(axis=1).all()
