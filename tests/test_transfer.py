"""The operators of experiments/transfer: their sums against autodiff, their solves against NumPy, their texts."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments/transfer"))

import labels
import written
from solve import REACHES, RIDGE, Document, Operator, _mixed, climb

from tmjax.convert.model import load_model
from tmjax.hub.texts import Texts, read_texts
from tmjax.hub.tokenizer import Encoding, load_tokenizer
from tmjax.models.decoder import bind

TEXTS = ["Yesu akawaambia wanafunzi wake habari njema", "Basi, watu walimfuata mpaka bahari", "Amani iwe nanyi nyote"]


@pytest.fixture(scope="module")
def target(qwen2_dir):
    return load_model(qwen2_dir)


@pytest.fixture(scope="module")
def tokenizer(qwen2_dir):
    return load_tokenizer(qwen2_dir)


@pytest.fixture(scope="module")
def documents(tokenizer) -> list[Document]:
    first, *rest = (tokenizer.document(encoding.ids) for encoding in tokenizer.encode(TEXTS))
    return [Document.of(first, 3), *map(Document.of, rest)]


def small(target, reach: str) -> Operator:
    """The operator with batches of the size of these documents."""
    return Operator(target, reach, batch_tokens=64)


def mean_loss(model, params, documents: list[Document]) -> jax.Array:
    """One document at a time, without padding."""
    total, count = 0.0, 0.0
    for document in documents:
        decoder = bind(model.spec, params)
        hidden, _ = decoder.hidden(jnp.asarray(document.ids[None, :-1]), jnp.float32, (), lambda x: x)
        logs = jax.nn.log_softmax(decoder.logits(hidden[0]))
        total -= jnp.sum(document.weight * jnp.take_along_axis(logs, jnp.asarray(document.label), axis=1))
        count += document.weight.sum()
    return total / count


def test_sums_are_the_gradients_of_the_loss(target, documents) -> None:
    operator = small(target, "blocks")
    sums = operator.sums(target.params, documents)
    truth = jax.jit(jax.grad(lambda params: mean_loss(target, params, documents)))(dict(target.params))
    for path in operator.projections:
        np.testing.assert_allclose(sums[f"G:{path}"], truth[path], atol=2e-5 * float(jnp.abs(truth[path]).max()) + 1e-7)
    # The read-out's part alone: the embeddings are tied, so the head is made a parameter of its own.
    loose = replace(target, spec=replace(target.spec, tied_embeddings=False))
    head = jnp.asarray(target.params["embed.weight"])
    apart = jax.jit(jax.grad(lambda w: mean_loss(loose, {**target.params, "head.weight": w}, documents)))(head)
    np.testing.assert_allclose(sums["G"], apart, atol=2e-5 * float(jnp.abs(apart).max()))
    assert sums["tokens"] == sum(document.weight.sum() for document in documents)


def test_direct_is_exact_for_the_last_block(target, documents) -> None:
    """What the last block writes into the stream, nothing but the norm and the read-out come after."""
    direct = small(target, "direct").sums(target.params, documents)
    through = small(target, "blocks").sums(target.params, documents)
    path = target.projections["down"].path
    scale = float(jnp.abs(through[f"G:{path}"][-1]).max())
    np.testing.assert_allclose(direct[f"G:{path}"][-1], through[f"G:{path}"][-1], atol=1e-4 * scale)
    assert not np.allclose(direct[f"G:{path}"][0], through[f"G:{path}"][0], atol=0.1 * scale)


def test_the_solve_is_a_ridge_regression(target, documents) -> None:
    operator = small(target, "direct")
    sums = operator.sums(target.params, documents)
    path = target.projections["down"].path
    gram, wanted = (np.asarray(sums[key][1], np.float64) for key in (f"A:{operator.projections[path]}", f"G:{path}"))
    solved = -wanted @ np.linalg.inv(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
    weight = np.asarray(target.params[path][1], np.float64)
    truth = solved * np.linalg.norm(weight) / np.linalg.norm(solved)
    change = operator.direction(target.params, sums)[1][path][1]
    np.testing.assert_allclose(change, truth, atol=2e-3 * np.abs(truth).max())
    moved = operator.moved(target.params, sums, (0.0, 0.5))
    np.testing.assert_allclose(moved[path][1] - target.params[path][1], 0.5 * change, atol=1e-5)
    assert (moved["embed.weight"] == target.params["embed.weight"]).all()


def test_two_labels_of_a_position_are_the_mixture_of_both(target, documents) -> None:
    document = documents[1]
    other = np.roll(document.label, 1, axis=0)
    both = Document(document.ids, np.concatenate([document.label, other], 1), np.tile(document.weight / 2, (1, 2)))
    operator = small(target, "readout")
    one, two, mixed = (
        operator.sums(target.params, [item])
        for item in (document, Document(document.ids, other, document.weight), both)
    )
    np.testing.assert_allclose(mixed["G"], (one["G"] + two["G"]) / 2, atol=1e-5)
    np.testing.assert_allclose(_mixed(one, two, 0.5)["G"], one["G"] + 0.5 * two["G"], atol=1e-6)


@pytest.mark.parametrize("reach", REACHES)
def test_rounds_lower_the_loss_they_are_chosen_by(target, documents, reach) -> None:
    compiled = jax.jit(lambda params: mean_loss(target, params, documents))

    def loss(params) -> float:
        return float(compiled(dict(params)))

    found = climb(small(target, reach), documents, [documents[:1], documents[1:]], loss, rounds=2)
    assert found.losses[0] == pytest.approx(loss(target.params)) and loss(found.params) == pytest.approx(
        found.losses[-1], rel=1e-5
    )
    assert found.losses == sorted(found.losses, reverse=True) and found.losses[-1] < 0.98 * found.losses[0]
    alone = climb(small(target, reach), documents, [], loss, rounds=2)
    assert alone.trials == found.trials, "arms without extra texts make as many trials"
    moved = {path for path, value in found.params.items() if not np.array_equal(value, target.params[path])}
    operator = small(target, reach)
    assert moved == {operator.readout, *operator.projections}


def test_written_texts_go_on_after_the_beginnings(target, tokenizer) -> None:
    told = written.write_texts(target, tokenizer, TEXTS, per_text=2, seed=0)
    assert len(told) == 6 and told == written.write_texts(target, tokenizer, TEXTS, per_text=2, seed=0)
    for item, text in zip(told, TEXTS * 2, strict=True):
        assert text.startswith(item.text[: item.given]) and 0 < item.given <= len(item.text)
    for item, document in zip(told, written.documents_of(target, tokenizer, told), strict=True):
        scored = document.weight[:, 0] > 0
        counted = document.label[scored, 0].tolist()
        ids = tokenizer.document(tokenizer.encode([item.text])[0].ids)
        kept = ids[1 : len(document.ids)]
        assert kept[-len(counted) :] == counted
        assert tokenizer.fast.decode(kept[: -len(counted)]).startswith(item.text[: item.given].rstrip())
    generator = np.random.default_rng(0)
    other = written.reordered(told[0], generator)
    assert sorted(other.text.split()) == sorted(told[0].text.split())
    assert other.text[: other.given] == told[0].text[: told[0].given]


def test_labels_keep_the_mass_and_agree_with_the_truth(tokenizer, llama_dir) -> None:
    source = load_tokenizer(llama_dir)
    spoken = labels.Translation(tokenizer, source, 2048, 4096)
    token = tokenizer.encode([" Yesu"])[0].ids[0]
    whole = tokenizer.fast.decode([token])
    # A source token that says less, one that says more, one that says something else, and the end of the text.
    names = [source.encode([text])[0].ids[0] for text in (whole[:2], " Yesu")] + [source.encode([" Mungu"])[0].ids[0]]
    probability = np.zeros(4096, np.float32)
    for number, share in zip([*names, source.suffix], (0.3, 0.3, 0.25, 0.15), strict=True):
        probability[number] += share
    ids, weight = spoken.label(probability, token)
    held = dict(zip(ids.tolist(), weight.tolist(), strict=True))
    assert sum(held.values()) == pytest.approx(1.0, abs=1e-6)
    assert held[token] == pytest.approx(0.6, abs=1e-6)
    assert held[tokenizer.encode([" Mungu"])[0].ids[0]] == pytest.approx(0.25, abs=1e-6)
    assert held[tokenizer.suffix] == pytest.approx(0.15, abs=1e-6)


def test_positions_are_paired_where_both_begin() -> None:
    one = Encoding([1, 2, 3], [(0, 2), (2, 5), (5, 9)])
    other = Encoding([1, 2, 3, 4], [(0, 2), (2, 3), (3, 5), (5, 9)])
    assert labels.shared_starts(one, other) == [(0, 0), (1, 1), (2, 3), (3, 4)]
    shifted = Encoding([1, 2], [(0, 3), (3, 9)])
    assert labels.shared_starts(one, shifted) == [(0, 0), (3, 2)]


def test_a_seed_chooses_the_calibration_texts(texts) -> None:
    whole: Texts = read_texts(texts["calibration"])
    assert whole.part(5, 0) == whole.first(5) and whole.part(None, 3) is whole
    parts = [whole.part(5, seed) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2] and len({part.sha256 for part in parts}) == 2
    for part in parts:
        assert len(set(part.ids)) == 5 and [i for i in whole.ids if i in part.ids] == list(part.ids)
