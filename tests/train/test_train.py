"""The trainer against plain PyTorch, its batches, its determinism, and `tools/train_pair.py`."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import SPEC, read_config

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.decoder import init_params
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.train.data import ROW_STEP, Batches, make_batch, row_lengths, split
from tmjax.train.loop import train
from tmjax.train.optimizer import TrainConfig, decayed
from tmjax.train.step import next_token_loss, train_step
from tools import train_pair as tool

transformers.utils.logging.disable_progress_bar()
CONFIG = TrainConfig(steps=20, lr=3e-3, warmup=3, weight_decay=1.0, clip=1.0)
#: Tests that train `SPEC` share this and one batch shape, and so one compilation.
SMALL = TrainConfig(steps=30, lr=1e-2, warmup=5)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """PyTorch's threads spin while they wait, at the cost of everything beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def verses(repo) -> tuple[str, ...]:
    return read_texts(str(repo / "experiments/swahili/texts/swahili.target-train.jsonl")).texts


@functools.cache
def fresh() -> dict[str, jax.Array]:
    return init_params(SPEC, jax.random.key(0))


def small_data(seed: int = 0) -> Batches:
    return Batches(random_documents(20), tokens=96, seed=seed, lengths=1)


def random_documents(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    sizes = [longest, *rng.integers(2, longest, count - 1)]
    return [rng.integers(0, SPEC.vocab, size).tolist() for size in sizes]


def torch_losses(directory, rows, config, *, decay_all=False, clip=None) -> list[float]:
    """What the trainer says it does, in PyTorch and transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    matrices = [p for p in model.parameters() if p.ndim > 1 or decay_all]
    others = [p for p in model.parameters() if p.ndim == 1 and not decay_all]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.b1, config.b2), eps=config.eps)
    losses = []
    for step, batch in enumerate(rows):
        rise = (step + 1) / (config.warmup + 1)
        done = max(0.0, (step - config.warmup) / (config.steps - config.warmup))
        fall = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(rise, fall)
        ids, targets, mask = (torch.from_numpy(np.array(part)) for part in batch[:3])
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[mask > 0], targets[mask > 0].long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip or config.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "qwen2"])
def test_losses_are_those_of_pytorch(name, request, verses):
    directory = request.getfixturevalue(f"{name}_dir")
    tokenizer, model = load_tokenizer(directory), load_model(directory)
    documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(verses[:40])]
    rows = list(itertools.islice(Batches(documents, tokens=160, seed=0, lengths=1), CONFIG.steps))
    ours = train(model.spec, model.params, rows, CONFIG).losses
    np.testing.assert_allclose(ours, torch_losses(directory, rows, CONFIG), atol=1e-4, rtol=0)
    for wrong in ({"decay_all": True}, {"clip": 1e9}):  # the comparison sees such details
        assert np.abs(ours - torch_losses(directory, rows, CONFIG, **wrong)).max() > 1e-3


def test_weight_decay_acts_on_matrices_alone():
    biased = {**fresh(), "blocks.q.bias": np.zeros((SPEC.layers, SPEC.heads * SPEC.head_dim))}
    chosen = decayed(biased)
    assert all(chosen[path] == (not path.endswith(("norm.weight", ".bias"))) for path in chosen)
    assert set(chosen.values()) == {True, False}


def test_loss_ignores_padding_and_neighbours():
    params = fresh()
    rows = split([[1, 2, 3], [4, 5, 6, 7, 8, 9]], 16)
    alone = [float(next_token_loss(SPEC, params, make_batch([row], len(row.ids) - 1))) for row in rows]
    weights = [len(row.ids) - 1 for row in rows]
    together = float(next_token_loss(SPEC, params, make_batch(rows, 16)))
    assert together == pytest.approx(np.average(alone, weights=weights), abs=1e-5)


def test_same_seed_same_bits():
    first, second, other = (train(SPEC, fresh(), small_data(seed), SMALL) for seed in (0, 0, 1))
    assert all(np.array_equal(first.params[path], second.params[path]) for path in first.params)
    assert np.array_equal(first.losses, second.losses)
    assert not any(np.array_equal(first.params[path], other.params[path]) for path in first.params)


def test_one_compilation_per_row_length():
    config = dataclasses.replace(SMALL, steps=8, warmup=1, weight_decay=0.2)  # no other test has this one
    before = train_step._cache_size()
    rows = list(itertools.islice(Batches(random_documents(40), tokens=64, seed=0, lengths=2), config.steps))
    train(SPEC, fresh(), rows, config)
    assert train_step._cache_size() - before == len({batch.ids_bt.shape for batch in rows}) == 2


def test_training_learns_and_leaves_its_input_alone():
    params = fresh()
    before = {path: np.array(value) for path, value in params.items()}
    seen = []
    repeated = itertools.repeat(next(iter(small_data())))
    result = train(SPEC, params, repeated, SMALL, progress=lambda fact: seen.append((fact.step, fact.loss)))
    assert result.losses[0] > 3.5 and result.losses[-1] < 1.0
    assert seen == list(enumerate(result.losses.tolist(), 1))
    assert all(np.array_equal(before[path], value) for path, value in params.items())
    assert all(value.dtype == np.float32 for value in result.params.values())


def test_training_refuses():
    params = fresh()
    for bad in ({"steps": 0}, {"steps": 5, "warmup": 5}, {"steps": 5, "warmup": 0, "lr": 0.0}):
        with pytest.raises(InputError):
            TrainConfig(**bad)
    with pytest.raises(InputError, match="ended after 2 of 30 steps"):
        train(SPEC, params, itertools.islice(small_data(), 2), SMALL)
    with pytest.raises(NonFiniteError, match="nan at step 1"):
        train(SPEC, {**params, "norm.weight": params["norm.weight"] * np.nan}, small_data(), SMALL)
    with pytest.raises(InputError, match="nothing to train on"):
        Batches([[1], []], tokens=64, seed=0)


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pieces_predict_every_token_once(limit):
    documents = random_documents(20)
    pieces = split(documents, limit)
    assert max(len(piece.ids) for piece in pieces) <= limit + 1
    assert [int(t) for piece in pieces for t in piece.ids[1:]] == [t for document in documents for t in document[1:]]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_row_lengths_waste_least(count):
    sizes = np.random.default_rng(count).integers(1, 60, 50)

    def padded(lengths):
        return np.asarray(lengths)[np.searchsorted(lengths, sizes)].sum()

    found = row_lengths(sizes, count)
    candidates = range(ROW_STEP, int(found[-1]), ROW_STEP)
    best = min(
        padded([*inner, found[-1]])
        for k in range(min(count, len(candidates) + 1))
        for inner in itertools.combinations(candidates, k)
    )
    assert len(found) <= count and found[-1] >= sizes.max() and padded(found) == best


def test_batches_visit_every_document_once_an_epoch():
    documents = [[i, *document] for i, document in enumerate(random_documents(200, longest=50))]
    sizes = [len(document) - 1 for document in documents]
    lengths = row_lengths(sizes, 4)
    capacity = sum(64 // length for length in lengths)
    seen = []
    for batch in Batches(documents, tokens=64, seed=3):
        rows, length = batch.ids_bt.shape
        assert rows * length <= 64 and length in lengths
        for ids, targets, mask in zip(*batch[:3], strict=True):
            count = int(mask.sum())
            assert mask[:count].all()
            assert [*ids[:count], targets[count - 1]] == documents[ids[0]]
            assert np.array_equal(ids[1:count], targets[: count - 1])
            seen.append(ids[0])
        if len(seen) >= 3 * len(documents):
            break
    visits = np.bincount(seen, minlength=len(documents))
    assert visits.max() <= 4 and visits.min() >= 2
    assert seen[: len(documents) - capacity] != sorted(seen[: len(documents) - capacity])
    assert len(set(seen[: len(documents) - capacity])) == len(documents) - capacity


@pytest.fixture(scope="module")
def small_texts(repo, tmp_path_factory):
    """The first verses of the bundled texts."""
    folder = tmp_path_factory.mktemp("texts")
    for kind in ("target-train", "calibration", "valid"):
        lines = (repo / f"experiments/swahili/texts/swahili.{kind}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"swahili.{kind}.jsonl").write_text("".join(lines[: 4 if kind == "valid" else 12]))
    return folder


@pytest.mark.parametrize("side", [pytest.param("source", marks=pytest.mark.slow), "target"])
def test_train_pair_writes_checkpoints(side, small_texts, tmp_path, capsys):
    plan, out = tool.PLANS[tool.Side(side)], tmp_path / side
    arguments = ["--texts", str(small_texts), "--out", str(tmp_path), "--only", side, "--heldout", "valid"]
    assert tool.main([*arguments, f"--steps-{side}", "1", f"--tokens-{side}", "128"]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert read_config(out)["vocab_size"] == len(tokenizer) <= plan.spec.vocab
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, plan.dtype) and model.config.model_type == plan.family
    texts, nats = read_texts(str(small_texts / "swahili.valid.jsonl")).texts, 0.0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False).input_ids, 1]])
        with torch.no_grad():
            nats += model.float()(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert line.startswith(f"| {side} | {plan.family} |")
    assert float(line.rsplit(" ", 2)[1]) == pytest.approx(bits, abs=6e-4)
    assert tool.main(arguments) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "Missing option"),
        (["--texts", "nowhere", "--out", "x"], "nowhere is not a folder"),
        (["--texts", "{texts}", "--out", "x", "--only", "both"], "both"),
        (["--texts", "{texts}", "--out", "x", "--source-languages", "zulu"], "no training text of zulu"),
        (["--texts", "{texts}", "--out", "x", "--steps-target", "0"], "positive steps"),
    ],
)
def test_train_pair_refuses(small_texts, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert tool.main([argument.format(texts=small_texts) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_pair: error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_an_average_of_weights_is_kept_where_it_is_better() -> None:
    """The moving average of every step's arrays is validated beside them, and the better is kept."""
    config = dataclasses.replace(SMALL, average=0.5)
    average = {path: np.asarray(value) for path, value in fresh().items()}
    seen: list[dict[str, np.ndarray]] = []

    def validate(params: dict[str, jax.Array]) -> float:
        seen.append({path: np.array(value) for path, value in params.items()})
        return -float(len(seen))  # whatever comes last is the best: the average

    result = train(SPEC, fresh(), small_data(), config, validate=validate, validate_every=1)
    assert len(seen) == 1 + 2 * config.steps
    for raw in seen[1::2]:
        average = {path: (old + raw[path]) / 2 for path, old in average.items()}
    for path, value in average.items():
        np.testing.assert_allclose(np.asarray(result.params[path]), value, atol=1e-5)
