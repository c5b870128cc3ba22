"""Lexical transport: the map against least squares in NumPy, what controls get, a damaged vocabulary repaired."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import read_texts
from tmjax.text.token_map import TokenMap, read_token_map
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.controls import derangement
from tmjax.transfer.operators import embeddings
from tmjax.transfer.operators.embeddings import (
    EMBEDDINGS,
    EmbeddingOptions,
    blend,
    blended_rows,
    mapped_embeddings,
    ridge_map,
)
from tmjax.transfer.update_table import joined_table, require_transfer


@pytest.fixture(scope="module")
def pair(qwen2_dir, llama_dir):
    return load_model(qwen2_dir), load_model(llama_dir)


@pytest.fixture(scope="module")
def verses(repo) -> tuple[str, ...]:
    return read_texts(str(repo / "experiments/swahili/texts/swahili.calibration.jsonl")).first(100).texts


@pytest.fixture(scope="module")
def lexicon(pair, verses) -> TokenMap:
    tokenizers = [load_tokenizer(model.directory) for model in pair]
    return read_token_map(*tokenizers, verses, tuple(model.spec.vocab for model in pair))


def test_every_token_is_read_by_the_source_and_counted(pair, verses, lexicon) -> None:
    own, theirs = (load_tokenizer(model.directory) for model in pair)
    seen = [i for text in verses for i in own.fast(text, add_special_tokens=False)["input_ids"]]
    for number, token in enumerate(lexicon.ids[::97]):
        at = number * 97
        text = own.fast.decode([token])
        assert theirs.fast.decode(lexicon.pieces[at]).strip() == text.strip()
        assert lexicon.counts[at] == seen.count(token)
    assert not set(lexicon.ids) & own.special_ids
    # Bytes that are a part of a character are no text.
    assert 0.5 * len(own.fast) < len(lexicon.ids) < len(own.fast)
    table = np.asarray(pair[1].params[EMBEDDINGS], np.float32)
    mean = lexicon.mean_rows(table)
    for at in range(0, len(lexicon.ids), 101):
        np.testing.assert_allclose(mean[at], table[list(lexicon.pieces[at])].mean(axis=0), atol=1e-6)


def test_tokens_beyond_a_vocabulary_are_left_out(pair, verses) -> None:
    tokenizers = [load_tokenizer(model.directory) for model in pair]
    few = read_token_map(*tokenizers, verses, (700, 900))
    assert max(few.ids) < 700 and max(max(pieces) for pieces in few.pieces) < 900
    with pytest.raises(InputError, match="leave out the operator embeddings"):
        read_token_map(*tokenizers, verses, (700, 0))


def test_ridge_map_is_weighted_least_squares() -> None:
    """Against NumPy's lstsq on rows scaled by the roots of the weights, the penalty as more rows."""
    rng = np.random.default_rng(0)
    x, y, counts = rng.normal(size=(40, 6)) + 2, rng.normal(size=(40, 5)) - 1, rng.integers(1, 9, 40).astype(float)
    slope, shift = ridge_map(x, y, counts, 0.3)
    share = counts / counts.sum()
    penalty = 0.3 * (share @ (x - share @ x) ** 2).mean()
    left = np.block([[x, np.ones((40, 1))]]) * np.sqrt(share)[:, None]
    held = np.hstack([np.sqrt(penalty) * np.eye(6), np.zeros((6, 1))])
    truth = np.linalg.lstsq(np.vstack([left, held]), np.vstack([y * np.sqrt(share)[:, None], np.zeros((6, 5))]))[0]
    np.testing.assert_allclose(np.vstack([slope, shift]), truth, atol=1e-10)


def test_what_controls_get(pair, lexicon) -> None:
    options = EmbeddingOptions()
    own, theirs = (np.asarray(model.params[EMBEDDINGS], np.float32) for model in pair)
    mapped = mapped_embeddings(lexicon, own, theirs, options)
    others = np.setdiff1d(np.arange(len(own)), lexicon.ids)
    np.testing.assert_array_equal(mapped[others], own[others])
    frequent = lexicon.counts >= options.frequent
    slope, shift = ridge_map(
        lexicon.mean_rows(theirs)[frequent], own[lexicon.ids[frequent]], lexicon.counts[frequent], options.ridge
    )
    np.testing.assert_allclose(mapped[lexicon.ids], lexicon.mean_rows(theirs) @ slope + shift, atol=1e-4)

    flat = mapped_embeddings(lexicon, own, 0 * theirs, options)[lexicon.ids]
    counts = lexicon.counts * frequent
    np.testing.assert_allclose(flat, np.broadcast_to(counts @ own[lexicon.ids] / counts.sum(), flat.shape), atol=1e-5)

    order = derangement(len(lexicon.ids), 0)
    after = mapped_embeddings(lexicon._replace(order=order), own, theirs, options)
    np.testing.assert_array_equal(after[lexicon.ids], mapped[lexicon.ids][order])
    shuffled = lexicon._replace(pieces=tuple(lexicon.pieces[number] for number in order))
    # The map is fitted to rows that are not its tokens', so it fits worse; the weights are the tokens' own.
    before = mapped_embeddings(shuffled, own, theirs, options)[lexicon.ids]
    rows = lexicon.mean_rows(theirs)[order]
    slope, shift = ridge_map(rows[frequent], own[lexicon.ids[frequent]], lexicon.counts[frequent], options.ridge)
    np.testing.assert_allclose(before, rows @ slope + shift, atol=1e-4)

    with pytest.raises(InputError, match="no two tokens occur 100000 times"):
        mapped_embeddings(lexicon, own, theirs, EmbeddingOptions(frequent=100_000))


@pytest.fixture(scope="module")
def damaged(gpt_neox_dir, repo):
    """A model whose embeddings of tokens that are rare in the calibration texts are noise; the whole one turned.

    The Wolof model, whose output rows are its own: a damaged embedding damages what is read alone.
    """
    model, tokenizer = load_model(gpt_neox_dir), load_tokenizer(gpt_neox_dir)
    folder = repo / "experiments/wolof/texts"
    given, valid = (read_texts(str(folder / f"wolof.{name}.jsonl")) for name in ("calibration", "valid"))
    held = read_token_map(tokenizer, tokenizer, given.first(300).texts, (model.spec.vocab, model.spec.vocab))
    rng = np.random.default_rng(0)
    table = np.asarray(model.params[EMBEDDINGS], np.float32)
    turn = np.linalg.qr(rng.normal(size=(table.shape[1], table.shape[1])))[0].astype(np.float32)
    broken = table.copy()
    rare = held.ids[held.counts < 2]
    broken[rare] = rng.normal(size=(len(rare), table.shape[1])) * table.std()
    scorer = Scorer(model.spec, tokenizer, valid.first(40))
    return model, held, {**model.params, EMBEDDINGS: broken}, {EMBEDDINGS: 3 * table @ turn}, scorer, rare


def test_a_damaged_vocabulary_is_repaired(damaged) -> None:
    """From a source that knows the words, and not from one whose words are exchanged."""
    model, held, broken, source, scorer, rare = damaged
    options = EmbeddingOptions(alphas=(0.3, 1.0), kappas=(3.0, 300.0), ridge=1e-3)

    def loss(params) -> float:
        return scorer(params).bits_per_byte

    whole, hurt = loss(model.params), loss(broken)
    found = blend(broken, source[EMBEDDINGS], held, options, loss)
    assert hurt > whole + 0.01 and found.losses == (pytest.approx(hurt), pytest.approx(loss(found.params)))
    assert found.losses[1] < hurt - 0.5 * (hurt - whole) and found.chosen is not None and found.trials == 4
    new, old = np.asarray(found.params[EMBEDDINGS])[rare], np.asarray(model.params[EMBEDDINGS])[rare]
    assert np.linalg.norm(new - old) < 0.5 * np.linalg.norm(broken[EMBEDDINGS][rare] - old)
    alpha, kappa = found.chosen["alpha"], found.chosen["kappa"]
    np.testing.assert_allclose(found.weight[held.ids], alpha * kappa / (kappa + held.counts), rtol=1e-6)
    order = derangement(len(held.ids), 1)
    shuffled = {"pieces": tuple(held.pieces[number] for number in order)}
    for control in (shuffled, {"order": order}):
        other = blend(broken, source[EMBEDDINGS], held._replace(**control), options, loss)
        assert other.losses[1] > found.losses[1] + 0.2 * (hurt - whole) and other.trials == 4, control

    table = joined_table([blended_rows(replace(model, params=broken), found)])
    (row,) = table.values()
    size = np.linalg.norm(broken[EMBEDDINGS])
    part = np.linalg.norm(found.weight[:, None] * found.mapped) / size
    change = np.linalg.norm(np.asarray(found.params[EMBEDDINGS]) - broken[EMBEDDINGS]) / size
    assert row["source_part"] == pytest.approx(part, rel=1e-4)
    assert row["effective_update"] == pytest.approx(change, rel=1e-4)
    assert require_transfer(table, allow_negligible=False) is None


def test_nothing_changes_where_no_trial_is_better(damaged) -> None:
    _, held, broken, source, _, _ = damaged
    found = blend(broken, source[EMBEDDINGS], held, EmbeddingOptions(), lambda params: float(params is not broken))
    assert found.params is broken and found.chosen is None and not found.weight.any() and found.trials == 16


def test_the_mapped_table_is_on_the_devices_once(damaged, monkeypatch) -> None:
    """Split as the target's table is, and the same array in every trial."""
    _, held, broken, source, _, _ = damaged
    layout = Layout("fsdp=4")
    sharding = layout.param_sharding(EMBEDDINGS, ("vocab", "embed"), broken[EMBEDDINGS].shape)
    placed = {EMBEDDINGS: jax.device_put(broken[EMBEDDINGS], sharding)}
    tables, blended = [], embeddings._blended

    def recorded(own, mapped, weight):
        tables.append(mapped)
        return blended(own, mapped, weight)

    monkeypatch.setattr(embeddings, "_blended", recorded)
    found = blend(placed, source[EMBEDDINGS], held, EmbeddingOptions(), lambda params: float(params is placed))
    assert len(tables) == found.trials + 1 and all(table is tables[0] for table in tables)
    assert tables[0].sharding == sharding == found.params[EMBEDDINGS].sharding
    np.testing.assert_array_equal(tables[0], found.mapped)


def test_a_screen_compares_blends_and_the_best_is_held_to_the_loss(damaged) -> None:
    _, held, broken, source, _, _ = damaged
    screened, asked = [], []

    def screen(params) -> float:
        screened.append(params)
        return float(abs(len(screened) - 5))  # the fifth is the best

    def loss(params) -> float:
        asked.append(params)
        return -float(len(asked))

    found = blend(broken, source[EMBEDDINGS], held, EmbeddingOptions(), loss, screen=screen)
    assert len(screened) == found.trials == 16 and len(asked) == 2 and found.losses == (-1.0, -2.0)
    assert found.chosen == {"alpha": 0.3, "kappa": 3.0}
    assert np.array_equal(found.params[EMBEDDINGS], screened[4][EMBEDDINGS])
    kept = blend(
        broken, source[EMBEDDINGS], held, EmbeddingOptions(), lambda params: float(params is not broken), screen=screen
    )
    assert kept.params is broken and kept.chosen is None


def test_too_little_text_is_told(solving, small_flags, tmp_path, capsys) -> None:
    told = yaml.safe_load(Path(solving).read_text())
    told["operators"][1]["embeddings"] = {"frequent": 100_000}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    assert cli.run(["merge", str(tmp_path / "recipe.yaml"), *small_flags, "--out", str(tmp_path / "run")]) == 2
    assert "no two tokens occur 100000 times" in capsys.readouterr().err
    assert not (tmp_path / "run/merged").exists()
