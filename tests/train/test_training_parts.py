"""The parts of adaptation against independent truth: loss, accumulation, checkpoints, modes, guidance, texts."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import SPEC

from tmjax.activations.capture import CaptureOptions, capture
from tmjax.checkpoints import hf
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.arms import Arm
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.decoder import ForwardPlan, Readout, bind, init_params
from tmjax.models.families import FAMILIES
from tmjax.sharding.mesh import Layout
from tmjax.teacher.span_features import by_depth, last_tokens
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import pair_rows
from tmjax.text.tokenizer import load_tokenizer
from tmjax.train import loss
from tmjax.train.checkpoints import Checkpoints
from tmjax.train.data import Batch, Batches, Guide, make_batch, split
from tmjax.train.guidance import SourceFeatures, start_maps
from tmjax.train.loop import Trainer, train
from tmjax.train.modes import FrozenBase, Lora, Plain, Residual, shardings_of
from tmjax.train.optimizer import TrainConfig
from tmjax.train.peft import write_adapter
from tmjax.train.step import Objective, fold, guide_error, next_token_loss, start, train_step
from tmjax.train.texts import leaked, read_training_texts

#: One batch shape and one configuration for most tests here, so one compilation of a step.
CONFIG = TrainConfig(steps=8, lr=1e-2, warmup=2)


@functools.cache
def fresh(seed: int = 0) -> dict[str, jax.Array]:
    return init_params(SPEC, jax.random.key(seed))


def documents(count: int = 20, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, SPEC.vocab, size).tolist() for size in [longest, *rng.integers(2, longest, count - 1)]]


def data(**options) -> Batches:
    return Batches(documents(), **{"tokens": 192, "seed": 0, "lengths": 1} | options)


# Loss.


@pytest.mark.parametrize(("cap", "scale", "bias"), [(None, 1.0, False), (3.0, 0.5, True)])
def test_blockwise_loss_and_gradient_are_those_of_whole_logits(cap, scale, bias, monkeypatch) -> None:
    monkeypatch.setattr(loss, "LOGIT_ENTRIES", 1)
    monkeypatch.setattr(loss, "LEAST_TOKENS", 12)  # blocks of 4 of 3 x 10 tokens, the last one padded
    spec = dataclasses.replace(SPEC, logit_cap=cap, logit_scale=scale)
    rng = np.random.default_rng(0)
    table, hidden = (rng.normal(0, 1, s).astype(np.float32) for s in ((spec.vocab, 24), (3, 10, 24)))
    head = Readout(table, rng.normal(0, 1, spec.vocab).astype(np.float32) if bias else None)
    labels = rng.integers(0, spec.vocab, (3, 10))
    weight = (rng.random((3, 10)) < 0.7).astype(np.float32)

    def whole(head, hidden):
        logits = scale * (hidden.reshape(-1, 24) @ head.table_ve.T + (head.bias_v if bias else 0.0))
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return -jnp.sum(jax.nn.log_softmax(logits)[np.arange(30), labels.reshape(-1)] * weight.reshape(-1))

    def blocks(head, hidden):
        return 2 * loss.summed_nll(spec, head, hidden, labels, weight)

    value, slopes = jax.jit(jax.value_and_grad(blocks, argnums=(0, 1)))(head, hidden)
    truth, wanted = jax.value_and_grad(whole, argnums=(0, 1))(head, hidden)
    assert loss._pieces(3, 10, spec.vocab) == 3
    assert float(value) == pytest.approx(2 * float(truth), rel=1e-5)
    for slope, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(slope, 2 * want, atol=1e-5 * np.abs(want).max())


def test_prompts_are_read_and_not_learnt() -> None:
    pieces = split([[1, 2, 3, 4, 5, 6]], 10, [[False, False, False, True, True, False]])
    batch = make_batch(pieces, 8)
    assert batch.mask_bt[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    only = [
        float(next_token_loss(SPEC, fresh(), batch._replace(mask_bt=np.eye(8, dtype="f4")[None, i]))) for i in (2, 3)
    ]
    assert float(next_token_loss(SPEC, fresh(), batch)) == pytest.approx(np.mean(only), rel=1e-5)
    assert split([[1, 2, 3]], 10, [[True, False, False]]) == []


def test_accumulated_batches_are_one_batch() -> None:
    two = list(itertools.islice(data(tokens=96, seed=1), 2 * CONFIG.steps))
    pairs = [
        Batch(*(np.concatenate(part) for part in zip(a[:3], b[:3], strict=True)))
        for a, b in zip(two[::2], two[1::2], strict=True)
    ]
    whole = train(SPEC, fresh(), pairs, CONFIG)
    parts = train(SPEC, fresh(), two, dataclasses.replace(CONFIG, accumulate=2))
    np.testing.assert_allclose(whole.losses, parts.losses, atol=1e-5)


def test_remat_changes_nothing_and_bfloat16_little() -> None:
    plain = train(SPEC, fresh(), data(), CONFIG)
    remat = train(SPEC, fresh(), data(), dataclasses.replace(CONFIG, remat=True))
    np.testing.assert_allclose(plain.losses, remat.losses, atol=1e-5)
    half = train(SPEC, fresh(), data(), dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert half.params["blocks.q.weight"].dtype == jnp.float32
    assert 0 < np.abs(plain.losses - half.losses).max() < 0.03


def test_one_device_and_eight() -> None:
    one = train(SPEC, fresh(), data(multiple=8), CONFIG)
    layout = Layout("data=2,fsdp=4")
    places = shardings_of(layout, FAMILIES["llama"].params(SPEC), SPEC)
    placed = {path: jax.device_put(value, places[path]) for path, value in fresh().items()}
    objective = Objective(SPEC, CONFIG, Plain(), layout.mesh)
    before = train_step._cache_size()
    eight = Trainer(objective, layout).run(placed, {}, data(multiple=8))
    assert train_step._cache_size() == before + 1
    np.testing.assert_allclose(one.losses, eight.losses, atol=1e-4)
    assert len(eight.trained["blocks.q.weight"].sharding.device_set) == 8
    assert not eight.trained["blocks.q.weight"].sharding.is_fully_replicated


# The loop.


def test_the_best_on_validation_text_is_the_result_and_no_gain_ends_it() -> None:
    seen = []

    def validate(params) -> float:
        seen.append({path: np.array(value) for path, value in params.items()})
        return [3.0, 2.0, 1.0, 1.5, 1.2, 0.1][len(seen) - 1]

    result = train(SPEC, fresh(), data(), CONFIG, validate=validate, validate_every=1, patience=2)
    assert result.stopped_early and result.steps == 4 and result.selection.step == 2
    assert result.selection.history == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 1.5), (4, 1.2)]
    assert all(np.array_equal(result.params[path], seen[2][path]) for path in seen[2])


class Interrupted(Exception):
    """Stands for the moment at which training is stopped."""


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path) -> None:
    def validate(params) -> float:
        return float(jnp.sum(jnp.abs(params["blocks.q.weight"])))

    def stop(fact) -> None:
        if fact.step == 6:
            raise Interrupted

    config = dataclasses.replace(CONFIG, accumulate=2)
    options = {"validate": validate, "validate_every": 3, "keep_every": 2}
    whole = train(SPEC, fresh(), data(tokens=96), config, **options)
    keeper = Checkpoints(tmp_path / "kept", "key", keep=2)
    with pytest.raises(Interrupted):
        train(SPEC, fresh(), data(tokens=96), config, keeper=keeper, progress=stop, **options)
    keeper.close()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()) == ["2", "4"]
    again = Checkpoints(tmp_path / "kept", "key", keep=2)
    rest = train(SPEC, fresh(1), data(tokens=96), config, keeper=again, **options)
    again.close()
    np.testing.assert_array_equal(rest.losses, whole.losses[4:])
    assert rest.selection.history == whole.selection.history and rest.selection.step == whole.selection.step
    assert all(np.array_equal(rest.params[path], whole.params[path]) for path in whole.params)
    other = Checkpoints(tmp_path / "kept", "another key")
    assert other._manager.latest_step() is None
    other.close()


def test_a_loss_that_is_no_number_stops_and_the_last_good_state_is_kept(tmp_path) -> None:
    batches = list(itertools.islice(data(), CONFIG.steps))
    broken = [
        batch._replace(mask_bt=batch.mask_bt * np.float32("nan")) if i == 3 else batch
        for i, batch in enumerate(batches)
    ]
    keeper = Checkpoints(tmp_path / "kept", "key")
    with pytest.raises(NonFiniteError, match=r"^the loss became nan at step 4; the state after step 3 is kept; lower"):
        train(SPEC, fresh(), broken, CONFIG, keeper=keeper)
    step, state, _ = keeper.latest(start(Objective(SPEC, CONFIG), dict(fresh())))
    keeper.close()
    assert step == 3 and bool(state.healthy)
    whole = train(SPEC, fresh(), batches, CONFIG)
    resumed = Checkpoints(tmp_path / "kept", "key")
    rest = train(SPEC, fresh(), batches, CONFIG, keeper=resumed)  # with the batch as it should have been
    resumed.close()
    assert all(np.array_equal(whole.params[path], rest.params[path]) for path in whole.params)


# Modes.


def test_residual_is_frozen_and_only_the_base_is_trained() -> None:
    rng = np.random.default_rng(0)
    path = "blocks.q.weight"
    shape = fresh()[path].shape
    mask = (rng.random((shape[0], shape[1], 1)) < 0.5).astype(np.float32)
    residual = Residual(jnp.float32(0.3), jnp.asarray(mask), jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32))
    base = dict(fresh())
    result = train(SPEC, base, data(), CONFIG, mode=Plain(), frozen={path: residual})
    added = 0.3 * mask * np.asarray(residual.delta)
    np.testing.assert_allclose(result.params[path], np.asarray(result.trained[path]) + added, atol=1e-7)
    start = {**base, path: base[path] + added}
    assert result.losses[0] == pytest.approx(train(SPEC, start, data(), CONFIG).losses[0], abs=1e-5)
    frozen = base | {f"residual.{path}": residual._replace(delta=None)}
    other = train(SPEC, {path: residual.delta}, data(), CONFIG, mode=FrozenBase(), frozen=frozen)
    moved = np.abs(np.asarray(other.params[path]) - start[path])
    assert set(other.trained) == {path} and moved.max() > 1e-4 and (moved * (1 - mask)).max() == 0
    assert all(np.array_equal(other.params[name], base[name]) for name in base if name != path)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_adapter_holds_the_update_that_the_folded_checkpoint_has(family, tmp_path) -> None:
    """W_base + (alpha / rank) B A, by hand from the adapter's files, is the folded checkpoint's tensor."""
    own = dataclasses.replace(SPEC, kv_heads=6) if family == "gpt_neox" else SPEC
    if family == "gpt_neox":
        changes = {"norm": "layer", "norm_bias": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}
        own = dataclasses.replace(own, **changes, gated=False, parallel=True, hidden=48, activation="gelu")
    made = FAMILIES[family]
    rows = made.params(own)
    base = init_params(own, jax.random.key(0))
    paths = tuple(row.path for row in rows if row.role in ("q", "k", "v", "o", "up", "gate") and len(row.axes) == 2)
    lora = Lora(paths, rank=3, alpha=12.0)
    trained = lora.start(base, jax.random.key(1), {})
    assert all(np.array_equal(lora.params(trained, base)[p], base[p]) for p in base)  # B starts at zero
    trained = {path: jax.random.normal(jax.random.key(i), x.shape) for i, (path, x) in enumerate(trained.items())}
    write_adapter(lora, own, rows, trained, tmp_path, base="somewhere")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and config["r"] == 3
    before, after = (
        hf.tensors(Model(made, own, params, {}, tmp_path))[1] for params in (base, lora.params(trained, base))
    )
    names = {name for row in rows if row.path in paths for name in row.names(own)}
    assert {name.split(".lora_")[0] for name in tensors} == {
        f"base_model.model.{n.removesuffix('.weight')}" for n in names
    }
    for name in names:
        module = name.removesuffix(".weight")
        kind = next(end for end in config["target_modules"] if module.endswith(f".{end}"))
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert a.shape[0] == config["rank_pattern"].get(kind, config["r"]) == b.shape[1]
        scale = config["alpha_pattern"].get(kind, config["lora_alpha"]) / a.shape[0]
        np.testing.assert_allclose(before(name) + scale * b @ a, after(name), atol=1e-4)


# Guidance.


def test_layers_are_paired_by_depth() -> None:
    assert by_depth(4, 6) == [1, 2, 3, 5] and by_depth(2, 2) == [0, 1] and by_depth(4, 1) == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def read(repo, qwen2_dir, llama_dir):
    verses = read_texts(str(repo / "experiments/swahili/texts/swahili.valid.jsonl")).first(6)
    target, source = load_model(qwen2_dir), load_model(llama_dir)
    tokenizers = [load_tokenizer(directory) for directory in (qwen2_dir, llama_dir)]
    return target, source, tokenizers, verses, pair_rows(verses, tokenizers, pooling="span", max_tokens=512)


@pytest.fixture(scope="module")
def features(read, tmp_path_factory):
    target, source, _, _, (rows, spoken) = read
    held = []
    for model, texts in zip((target, source), spoken, strict=True):
        folder = tmp_path_factory.mktemp("features")
        held.append(capture(model.spec, model.params, rows, last_tokens(texts), folder, CaptureOptions(("resid",))))
    return held


def test_features_are_the_residual_stream_at_the_last_token_of_every_span(read, features) -> None:
    _, source, tokenizers, verses, (rows, _) = read
    number = 20
    text = verses.texts[rows.document[number]]
    upto = text[: rows.end[number]]
    ids = np.asarray([[tokenizers[1].prefix, *tokenizers[1].encode([upto])[0].ids]])
    model = bind(source.spec, source.params)
    found = model.run(ids, ForwardPlan(sites=("resid",))).captured
    np.testing.assert_allclose(features[1].site("resid")[:, number], found["resid"][:, 0, -1], rtol=2e-3, atol=2e-3)


def test_batches_bring_every_spans_standardised_features(read, features) -> None:
    _, _, tokenizers, verses, (rows, spoken) = read
    layers = by_depth(4, 6)
    source = SourceFeatures.of(features[1], spoken[0], layers)
    texts = [tokenizers[0].document(encoding.ids) for encoding in tokenizers[0].encode(verses.texts)]
    made = Batches(texts, tokens=64, seed=0, lengths=2, max_tokens=24, guidance=source)
    values = np.stack([np.asarray(features[1].site("resid")[layer], np.float64) for layer in layers])
    z = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    first = {document: int(np.nonzero(rows.document == document)[0][0]) for document in set(rows.document.tolist())}
    seen = np.zeros(len(rows), int)
    for piece in made.pieces:
        guide = source.guide([piece], 1, 30)
        count = int(guide.mask_br.sum())
        assert count == source.spans(piece)
        for slot in range(count):
            position = piece.start + int(guide.position_br[0, slot])
            ends = [
                first[piece.document] + i for i, row in enumerate(spoken[0][piece.document].rows) if row[-1] == position
            ]
            wanted = [row for row in ends if np.allclose(guide.source_lbrk[:, 0, slot], z[:, row], atol=1e-4)]
            assert wanted
            seen[wanted] += 1
    assert (seen >= 1).mean() > 0.9 and seen.max() <= 1  # a span whose last token is a piece's last is nobody's input
    batch = next(iter(made))
    assert batch.guide.source_lbrk.shape[:2] == (4, batch.ids_bt.shape[0])


def test_maps_begin_as_ridge_regressions(read, features) -> None:
    _, _, _, _, (_, spoken) = read
    source = SourceFeatures.of(features[1], spoken[0], by_depth(4, 6))
    trained, frozen, explained = start_maps(features[0], source, penalty=0.5)
    layer = 2
    x = np.asarray(features[0].site("resid")[layer], np.float64)
    x = (x - x.mean(0)) / x.std(0)
    y = source.rows(np.arange(len(x)))[layer]
    truth = np.linalg.solve(x.T @ x + 0.5 * len(x) * np.eye(x.shape[1]), x.T @ y).T
    np.testing.assert_allclose(trained["guide.weight"][layer], truth, atol=1e-4)
    error = np.mean((y - x @ truth.T) ** 2) / np.mean(y**2)
    assert explained[layer] == pytest.approx(1 - error, abs=1e-4)
    # The loss that training sees begins there.
    states = jnp.asarray(features[0].site("resid"))[:, None]
    guide = Guide(np.zeros((1, len(x)), int), np.ones((1, len(x))), source.rows(np.arange(len(x)))[:, None])
    found = guide_error(trained, frozen["guide.mean"], frozen["guide.scale"], states, guide) / len(x)
    assert float(found) == pytest.approx(1 - np.mean(explained), abs=1e-4)


def test_guidance_trains_target_and_maps_and_is_no_part_of_the_model() -> None:
    class Constant:
        def spans(self, piece) -> int:
            return 1

        def guide(self, pieces, rows, spans) -> Guide:
            return Guide(
                np.zeros((rows, spans), np.int32), np.ones((rows, spans), "f4"), np.ones((3, rows, spans, 5), "f4")
            )

    maps = {"guide.weight": jnp.full((3, 5, 24), 0.1), "guide.bias": jnp.zeros((3, 5))}
    frozen = {"guide.mean": jnp.zeros((3, 24)), "guide.scale": jnp.ones((3, 24))}
    config = dataclasses.replace(CONFIG, guide_weight=2.0)
    facts = []
    result = train(SPEC, fresh() | maps, data(guidance=Constant()), config, frozen=frozen, progress=facts.append)
    assert facts[-1].guide < 0.8 * facts[0].guide and facts[0].loss == pytest.approx(facts[0].text + 2 * facts[0].guide)
    assert set(result.params) == set(fresh()) and set(result.trained) == set(fresh()) | set(maps)
    assert not np.array_equal(result.trained["guide.weight"], maps["guide.weight"])
    alone = train(SPEC, fresh(), data(), CONFIG)
    assert np.abs(np.asarray(result.params["blocks.q.weight"]) - alone.params["blocks.q.weight"]).max() > 1e-4
    assert set(fold(Plain(), result.trained, frozen)) == set(fresh())


# Texts.


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_dialogues_learn_the_answers_alone(qwen2_dir, tmp_path) -> None:
    tokenizer = load_tokenizer(qwen2_dir)
    file = write(tmp_path / "a.jsonl", [{"prompt": "Jina lako nani?", "response": "Jina langu ni Petro."}])
    (ids,), (counts,) = read_training_texts(file).documents(tokenizer)
    assert ids[0] == tokenizer.prefix and ids[-1] == tokenizer.suffix and counts[-1] and not counts[0]
    learnt = tokenizer.fast.decode([token for token, told in zip(ids[:-1], counts, strict=False) if told])
    assert learnt.strip() == "Jina langu ni Petro."
    tokenizer.fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    messages = [
        {"role": r, "content": c}
        for r, c in (("user", "Moja"), ("assistant", "Mbili"), ("user", "Tatu"), ("assistant", "Nne"))
    ]
    file = write(tmp_path / "b.jsonl", [{"messages": messages}])
    (ids,), (counts,) = read_training_texts(file).documents(tokenizer)
    learnt = tokenizer.fast.decode([token for token, told in zip(ids[:-1], counts, strict=False) if told])
    assert learnt.split() == ["Mbili", "Nne"] or learnt.replace(" ", "") == "MbiliNne"
    assert "[user] Moja" in tokenizer.fast.decode(ids) and counts[-1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"body": "x"}], "line 1 has body; it needs text, or prompt and response, or messages"),
        ([{"prompt": "a", "response": "b"}, {"text": "x"}], "line 2 has no prompt and response"),
        ([{"prompt": "a", "response": 3}], "needs a role and a content"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "nothing that the assistant says"),
        ([], "holds no text"),
    ],
)
def test_wrong_training_texts_are_refused(lines, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        read_training_texts(write(tmp_path / "x.jsonl", lines))


def test_blank_lines_and_one_giant_line_and_other_encodings(tmp_path) -> None:
    giant = " ".join(f"neno{i}" for i in range(3000))
    file = tmp_path / "x.txt"
    file.write_text(f"\n\n{giant}\n\n", encoding="utf-8")
    assert read_training_texts(str(file)).texts.texts == (giant,)
    pieces = split([list(range(3000))], 512)
    assert len(pieces) == 6 and sum(int(piece.counts[1:].sum()) for piece in pieces) == 2999
    file.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_training_texts(str(file))


def test_leaks_are_found_whatever_case_and_punctuation() -> None:
    words = "Yesu alikuwa Bethania, nyumbani kwa Simoni, Mkoma. Alipokuwa mezani kula chakula mama mmoja alikuja"
    training = Texts("a", ("0", "1"), (f"Mwanzo. {words} Mwisho.", "Basi, twende."))
    heldout = Texts(
        "b",
        ("copy", "short copy", "short", "own"),
        (words.upper(), "basi twende", "mwanzo", words.replace("mezani", "shambani")),
    )
    assert leaked(training, heldout) == ["copy", "short copy"]


def test_an_arm_with_an_option_of_its_own_is_another_stage() -> None:
    plain = Arm("sft", "target", frozenset({"guidance", "distillation"}))
    told = [
        arm.description()
        for arm in (plain, dataclasses.replace(plain, metric="fisher"), dataclasses.replace(plain, anneal=0.0))
    ]
    assert len(set(told)) == 3
    # Runs that were made before arms had options go on where they were.
    assert "metric" not in told[0] and "anneal" not in told[0]
    assert told[0] == Arm("sft", "target", frozenset({"distillation", "guidance"})).description()
