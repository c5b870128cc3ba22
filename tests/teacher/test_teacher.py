"""What a source holds for the target's next token: readings by brute force, branches by whole texts, the loss."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SPEC

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.models.decoder import Readout, forward, init_params
from tmjax.models.spec import Alibi
from tmjax.sharding.mesh import Layout
from tmjax.teacher import branches
from tmjax.teacher.branches import Branches, Reader
from tmjax.teacher.generation import Generation, chosen_texts, familiar, generate_texts, openings
from tmjax.teacher.probabilities import Search, TeacherProbabilities, probabilities_at
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import Crossing
from tmjax.text.tokenizer import load_tokenizer
from tmjax.train import loss
from tmjax.train.data import Batches
from tmjax.train.loss import TeacherTokens
from tmjax.train.modes import Plain
from tmjax.train.optimizer import TrainConfig, Weights
from tmjax.train.step import Objective, start, step


@pytest.fixture(scope="module")
def verses(repo) -> list[str]:
    lines = (repo / "experiments/swahili/texts/swahili.calibration.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:40]]


@pytest.fixture(scope="module")
def crossing(llama_dir, qwen2_dir) -> Crossing:
    return Crossing(load_tokenizer(qwen2_dir), load_tokenizer(llama_dir))


# Vocabularies.


@pytest.mark.parametrize("held", [b"", b" wa", b" ali", b"m"])
def test_readings_are_those_of_every_string_by_itself(crossing, held) -> None:
    own, other = (tokenizer.vocabulary.written() for tokenizer in (crossing.target, crossing.source))
    readings = crossing.readings(held)
    assert len(own) > 2000 and len(other) > 4000 and readings.token.shape == (4096,)
    for piece, number in other.items():
        whole = held + piece
        longest = max((token for token in own if whole.startswith(token)), key=len)
        assert readings.token[number] == own[longest]
        assert readings.is_open[number] == any(token.startswith(whole) and token != whole for token in own)
    suffix = readings.token[crossing.source.suffix]
    assert suffix == (crossing.token_of(held) if held else crossing.target.suffix)
    assert readings.token[crossing.source.prefix] == -1


def test_shared_positions_are_where_both_have_read_the_same_bytes(crossing, verses) -> None:
    both, readings = crossing.read(verses)
    pieces = [tokenizer.vocabulary.text for tokenizer in (crossing.target, crossing.source)]
    shares = []
    for text, own, other, *read in zip(verses, *both, *readings, strict=True):
        pairs = crossing.shared_positions(*read)
        for target, source in pairs:
            read = b"".join(pieces[0][i] for i in own.ids[:target])
            assert read == b"".join(pieces[1][i] for i in other.ids[:source]) and text.encode().startswith(read)
        assert pairs[0].tolist() == [0, 0] and pairs[-1].tolist() == [len(own.ids), len(other.ids)]
        shares.append(len(pairs) / (len(own.ids) + 1))
    assert 0.85 < np.mean(shares) < 1


def test_a_text_that_was_cut_shares_what_both_have_read(crossing, verses) -> None:
    ((encoded,), (source,)), ((own,), (other,)) = crossing.read(verses[:1])
    whole = crossing.shared_positions(own, other)
    for last in ((12, len(source.ids)), (len(encoded.ids), 12), (20, 10)):
        pairs = crossing.shared_positions(own.first(last[0]), other.first(last[1]))
        wanted = [pair for pair in whole.tolist() if pair[0] <= last[0] and pair[1] <= last[1]]
        assert pairs.tolist() == wanted and len(wanted) > 5


def test_nothing_shared_is_said(llama_dir, crossing) -> None:
    model = load_model(llama_dir)
    with pytest.raises(InputError, match="no position"):
        probabilities_at(Teacher.of(model), crossing, [[0, 5, 6]], [np.zeros((0, 2), np.int32)])


def test_the_longest_token_is_nearly_always_what_the_tokenizer_takes(crossing, verses) -> None:
    pieces = crossing.target.vocabulary.text
    same = []
    for encoding in crossing.target.encode(verses):
        spelt = [pieces[i] for i in encoding.ids]
        same += [crossing.token_of(b"".join(spelt[k:])) == token for k, token in enumerate(encoding.ids)]
    assert np.mean(same) > 0.95


@pytest.mark.parametrize("held", [b"", b" wa", b"m"])
def test_tokens_are_what_the_targets_tokenizer_makes_of_the_bytes_first(crossing, held) -> None:
    numbers = np.asarray(sorted(crossing.source.vocabulary.written().values()))
    found = crossing.tokens(held, numbers)
    pieces, asked = crossing.target.vocabulary.text, 0
    for number, token in zip(numbers.tolist(), found.tolist(), strict=True):
        whole = held + crossing.piece(number)
        assert whole.startswith(pieces[token])
        with contextlib.suppress(UnicodeDecodeError):
            first = crossing.target.encode([whole.decode()])[0].ids[0]
            # A token that is the whole is taken even where merges would not reach it: more text may follow.
            assert token in (first, crossing.token_of(whole)) and (pieces[token] == whole or token == first)
            asked += token != crossing.token_of(whole)
    assert asked > 10 and (crossing.tokens(held, numbers) == found).all()


def test_the_token_of_a_text_is_found_from_the_sources_next_ones(crossing, verses) -> None:
    """At shared positions, after as many source tokens as settle it; the longest token alone is wrong at 2%."""
    encodings, readings = crossing.read(verses)
    right, longest = [], []
    for own, other, *both in zip(*encodings, *readings, strict=True):
        for target, source in crossing.shared_positions(*both).tolist():
            held = b""
            for number in other.ids[source : source + 4]:
                if crossing.readings(held).is_open[number]:
                    held += crossing.piece(number)
                    continue
                right.append(crossing.tokens(held, np.asarray([number]))[0] == own.ids[target])
                longest.append(crossing.token_of(held + crossing.piece(number)) == own.ids[target])
                break
    assert len(right) > 500 and np.mean(longest) < 0.985 < 0.99 < np.mean(right)


# Branches.


BRANCHED = (
    {"windows": (3, 64, 4)},
    {"learned_positions": True},
    {"attention_cap": 5.0},
    {"alibi": Alibi(), "sinks": True},
)


@pytest.mark.parametrize(
    "changes", [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in BRANCHED[:-1]), BRANCHED[-1]]
)
def test_a_branch_says_what_the_text_with_it_says(changes, monkeypatch) -> None:
    """Texts of two lengths, branches of up to three nodes: states are those of whole texts, each read once."""
    monkeypatch.setattr(branches, "ROW_NODES", 2)
    monkeypatch.setattr(branches, "NODE_ROWS", (4, 1))
    spec = dataclasses.replace(SPEC, **changes)
    params = init_params(spec, jax.random.key(0))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, spec.vocab, length).tolist() for length in (9, 6)]
    read = []
    kept = branches.read_branches
    monkeypatch.setattr(branches, "read_branches", lambda *told: read.append(told[4].ids.shape) or kept(*told))
    source = Reader(spec, params, 7, jnp.float32, Layout())
    held = Branches(source, texts, (3, 12), 3)

    def other(row: int, place: int) -> int:
        """A token that the text does not go on with."""
        return (texts[row][place + 1] + 1) % spec.vocab if place + 1 < len(texts[row]) else 5

    def require(entries: np.ndarray, paths: list[list[int]]) -> None:
        ids, weight = held.likeliest(entries)
        for path, own, p in zip(paths, ids, weight, strict=True):
            whole = np.asarray(jax.nn.softmax(forward(spec, params, jnp.asarray(path)[None])[0, -1]))
            np.testing.assert_allclose(p, np.sort(whole)[::-1][:7], atol=1e-5)
            np.testing.assert_allclose(whole[own], p, atol=1e-5)

    places = [(0, 2), (0, 8), (0, 0), (0, 5), (0, 4), (1, 5), (1, 3)]
    entries = np.asarray([12 * row + place for row, place in places])
    paths = [texts[row][: place + 1] for row, place in places]
    require(entries, paths)
    tokens = np.asarray([other(row, place) for row, place in places])
    first = held.grow(entries, tokens)
    paths = [[*path, token] for path, token in zip(paths, tokens.tolist(), strict=True)]
    require(first, paths)
    # A branch in two, one of them again, and another of its own.
    chosen = [0, 0, 0, 5]
    second = held.grow(first[chosen], np.asarray([1, 2, 1, 3]))
    assert second[0] == second[2] and len(set(second.tolist())) == 3
    paths = [[*paths[number], token] for number, token in zip(chosen, (1, 2, 1, 3), strict=True)]
    require(second, paths)
    require(held.grow(second, np.asarray([4, 4, 4, 4])), [[*path, 4] for path in paths])
    before = list(read)
    assert held.grow(np.asarray([1, 12 + 2]), np.asarray([texts[0][2], texts[1][3]])).tolist() == [2, 15]
    assert held.grow(entries, tokens).tolist() == first.tolist()
    assert read == before, "what was read already is not read again"


@pytest.mark.parametrize("vocab", [60, 5000, 12345])
def test_the_likeliest_in_two_stages_are_those_of_a_whole_sort(vocab) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, vocab)).astype(np.float32)
    ids, weight = branches.likeliest(jnp.asarray(logits), 50)
    whole = np.asarray(jax.nn.softmax(logits))
    assert ids.tolist() == np.argsort(-logits, axis=1)[:, :50].tolist()
    np.testing.assert_allclose(weight, np.take_along_axis(whole, np.asarray(ids), axis=1), rtol=1e-5)


def test_one_step_in_the_same_vocabulary_is_the_sources_own_distribution(llama_dir, verses) -> None:
    model, tokenizer = load_model(llama_dir), load_tokenizer(llama_dir)
    same = Crossing(tokenizer, tokenizer)
    (encoded, _), (readings, _) = same.read(verses[:3])
    documents = [[tokenizer.prefix, *encoding.ids[:20]] for encoding in encoded]
    pairs = [same.shared_positions(reading.first(20), reading.first(20)) for reading in readings]
    search = Search(steps=1, keep=8)
    found = probabilities_at(Teacher.of(model), same, documents, pairs, search=search, batch_tokens=64)
    assert len(found.document) == sum(map(len, documents))
    for number, document in enumerate(documents):
        p = np.array(jax.nn.softmax(forward(model.spec, model.params, jnp.asarray(document)[None])[0], axis=-1))
        p[:, tokenizer.prefix] = 0  # nothing that could be the target's next token
        rows = found.document == number
        np.testing.assert_allclose(found.weight[rows], np.sort(p, axis=-1)[:, ::-1][:, :8], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(p, found.ids[rows], axis=1), found.weight[rows], atol=1e-5)


def test_chains_are_followed_as_by_hand(crossing, llama_dir, verses) -> None:
    """Two positions of one verse: all tokens of every distribution, open ones followed by texts of their own."""
    model = load_model(llama_dir)
    search = Search(steps=3, candidates=4096, min_probability=0.02, branches=100, keep=64)
    (_, (other,)), ((own,), (source,)) = crossing.read(verses[:1])
    pairs = crossing.shared_positions(own, source)[[2, 7]]
    document = [crossing.source.prefix, *other.ids]
    found = probabilities_at(Teacher.of(model), crossing, [document], [pairs], search=search)

    @functools.cache
    def after(text: tuple[int, ...]) -> np.ndarray:
        padded = jnp.asarray([[*text, *[0] * (48 - len(text))]])
        return np.asarray(jax.nn.softmax(forward(model.spec, model.params, padded)[0, len(text) - 1]), np.float64)

    followed = 0

    def read(text: tuple[int, ...], held: bytes, mass: float, left: int, into: dict[int, float]) -> None:
        nonlocal followed
        readings = crossing.readings(held)
        for token, p in enumerate(mass * after(text)):
            if readings.is_open[token] and p >= search.min_probability and left > 1:
                followed += 1
                read((*text, token), held + crossing.piece(token), p, left - 1, into)
            elif readings.token[token] >= 0:
                into[int(readings.token[token])] = into.get(int(readings.token[token]), 0.0) + p

    for row, (_, source) in enumerate(pairs):
        wanted: dict[int, float] = {}
        read(tuple(document[: source + 1]), b"", 1.0, search.steps, wanted)
        best = sorted(wanted.values(), reverse=True)[: search.keep]
        np.testing.assert_allclose(found.weight[row], best, atol=2e-5)
        np.testing.assert_allclose([wanted[int(i)] for i in found.ids[row]], found.weight[row], atol=2e-5)
    assert followed >= 3


# The loss.


@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (3.0, 0.5)])
def test_divergence_and_its_gradient_are_those_of_whole_logits(cap, scale, monkeypatch) -> None:
    monkeypatch.setattr(loss, "LOGIT_ENTRIES", 1)
    monkeypatch.setattr(loss, "LEAST_TOKENS", 12)
    spec = dataclasses.replace(SPEC, logit_cap=cap, logit_scale=scale)
    rng = np.random.default_rng(0)
    head, hidden = (rng.normal(0, 1, s).astype(np.float32) for s in ((spec.vocab, 24), (3, 10, 24)))
    labels, weight = rng.integers(0, spec.vocab, (3, 10)), rng.random((3, 10)).astype(np.float32)
    ids = np.stack([rng.permutation(spec.vocab)[:5] for _ in range(30)]).reshape(3, 10, 5).astype(np.int32)
    q_btk = rng.dirichlet(np.ones(6), (3, 10))[..., :5].astype(np.float32)
    q_btk[0, 0, 3:] = 0  # a list that is shorter
    mask = (rng.random((3, 10)) < 0.7).astype(np.float32)

    def whole(head, hidden):
        logits = scale * hidden.reshape(-1, 24) @ head.T
        log_p = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
        text = -jnp.sum(log_p[np.arange(30), labels.reshape(-1)] * weight.reshape(-1))
        total = 0.0
        for row, (i, q) in enumerate(zip(ids.reshape(30, 5), q_btk.reshape(30, 5), strict=True)):
            i, q = i[q > 0], q[q > 0]
            rest = 1 - q.sum()
            listed = jnp.sum(q * (np.log(q) - log_p[row, i]))
            others = rest * (np.log(rest) - jnp.log(1 - jnp.exp(log_p[row, i]).sum()))
            total += mask.reshape(-1)[row] * (listed + others)
        return text + total, (text, total)

    def blocks(head, hidden):
        total, *parts = loss.summed_losses(spec, Readout(head), hidden, labels, weight, TeacherTokens(ids, q_btk, mask))
        return total, parts

    (value, parts), slopes = jax.jit(jax.value_and_grad(blocks, argnums=(0, 1), has_aux=True))(head, hidden)
    (truth, true_parts), wanted = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(head, hidden)
    np.testing.assert_allclose([value, *parts], [truth, *true_parts], rtol=1e-5)
    for slope, want in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(slope, want, atol=2e-5 * np.abs(want).max())


def test_distributions_lie_at_their_pieces_positions_and_weights_fall() -> None:
    documents = [list(range(5, 15)), list(range(20, 24))]
    ids, weight = np.arange(12, dtype=np.int32).reshape(6, 2), np.full((6, 2), 0.25, np.float32)
    probabilities = TeacherProbabilities(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 4, 8, 0, 1, 2]), ids, weight)
    data = Batches(documents, tokens=64, seed=0, lengths=1, max_tokens=6, teacher=probabilities)
    batch = next(iter(data))
    for row, inputs in enumerate(batch.ids_bt):
        for column in np.nonzero(batch.teacher.mask_bt[row])[0]:
            document = 0 if inputs[column] < 20 else 1
            position = inputs[column] - (5 if document == 0 else 20)
            number = np.nonzero((probabilities.document == document) & (probabilities.position == position))[0][0]
            assert batch.teacher.ids_btk[row, column].tolist() == ids[number].tolist()
    assert batch.teacher.mask_bt.sum() > 0
    config = TrainConfig(steps=5, warmup=1, guide_weight=2.0, teacher_weight=4.0, anneal=0.25)
    weights = [Weights.at(config, count) for count in range(5)]
    assert [float(w.teacher) for w in (weights[0], weights[2], weights[4])] == [4.0, 2.5, 1.0]
    assert float(weights[4].guide) == 0.5


def test_accumulated_distributions_are_one_batchs() -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, SPEC.vocab, 17).tolist() for _ in range(8)]
    rows = np.repeat(np.arange(8), 16)
    ids = np.stack([rng.permutation(SPEC.vocab)[:4] for _ in rows]).astype(np.int32)
    probabilities = TeacherProbabilities(
        rows, np.tile(np.arange(16), 8), ids, rng.dirichlet(np.ones(5), len(rows))[:, :4].astype(np.float32)
    )
    keep = (rows % 3 > 0) | (probabilities.position < 5)
    probabilities = TeacherProbabilities(*(part[keep] for part in probabilities))
    config = TrainConfig(steps=4, warmup=1, lr=1e-2, teacher_weight=3.0)

    def first(tokens: int, count: int) -> tuple[np.ndarray, float]:
        data = iter(Batches(documents, tokens=tokens, seed=0, lengths=1, teacher=probabilities))
        batches = [next(data) for _ in range(count)]
        objective = Objective(SPEC, config, Plain())
        state, losses = step(objective, start(objective, dict(init_params(SPEC, jax.random.key(0)))), {}, batches, 0.01)
        return np.asarray(state.trained["norm.weight"]), float(losses.teacher)

    (one, divergence), (two, same) = first(128, 1), first(64, 2)
    assert divergence == pytest.approx(same, rel=1e-4) and divergence > 0.1
    np.testing.assert_allclose(one, two, atol=1e-5)


# Generated texts.


def test_generated_texts_do_not_depend_on_batches(llama_dir, verses) -> None:
    model, tokenizer = load_model(llama_dir), load_tokenizer(llama_dir)
    settings, teacher = Generation(texts=6, tokens=40), Teacher(model.spec, model.params, tokenizer)
    told = [generate_texts(teacher, verses, dataclasses.replace(settings, batch=batch), seed=3) for batch in (2, 6)]
    begun = openings(verses, settings, 3)
    assert told[0] == told[1] and len(set(told[0][0])) == 6
    for text, opening in zip(told[0][0], begun, strict=True):
        assert text.startswith(opening.strip()) and 1 <= len(opening.split()) <= 3
        assert any(verse.startswith(opening) for verse in verses)
    assert openings(verses, settings, 4) != begun


def test_foreign_empty_and_repeated_texts_are_left_out() -> None:
    kept = familiar(np.array([1.0, 5.0, 2.0, 3.0]), np.linspace(1, 2, 101), maximum=1.5)
    assert kept.tolist() == [True, False, True, False]
    texts = chosen_texts("x", ["a", "b", "", "a", "c"], np.array([True, False, True, True, True]))
    assert texts.texts == ("a", "c") and texts.ids == ("generated:0", "generated:4")
    with pytest.raises(InputError, match=r"none of the 2 texts .* raise generation.foreign"):
        chosen_texts("x", ["a", "b"], np.array([False, False]))
    assert len(chosen_texts("x", ["a", "b"], np.array([False, False]), required=False)) == 0
