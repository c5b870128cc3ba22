"""Function preservation: a disguised, widened or deepened copy of a checkpoint, aligned with it, gives it back.

The target's parameters are noise when the source is fused into them, so that nothing can come from anywhere else.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from reparametrise import deepened, disguised, params_of, scrambled, widened, with_spec

from tmjax.activations.capture import CaptureOptions
from tmjax.activations.extract import extract_activations
from tmjax.align import storage as store
from tmjax.align.alignment import Alignment, align, needed_sites
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.evaluate.bits import evaluate
from tmjax.models.decoder import forward
from tmjax.models.spec import Alibi, DecoderSpec, Rotary
from tmjax.recipes.merge import AlignmentOptions
from tmjax.text.documents import Texts, read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.train.optimizer import TrainConfig
from tmjax.transfer.fuse import fuse
from tools.train_pair import Plan, Side, make

HARD = AlignmentOptions(structure="full", solver="cover", depth="monotone", feature_dtype="float32")
PROJECTIONS = [{"transport": {"norm_match": False}}]
EVERYTHING = [*PROJECTIONS, {"residual_stream": {"norm_match": False}}]
TINY = {
    "qwen3": DecoderSpec(
        vocab=400, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=72, max_positions=512, qk_norm="head",
        tied_embeddings=True,
        norm_eps=1e-10,  # or scaling queries and keys would not quite be undone by their norms
    ),
    "gpt_neox": DecoderSpec(
        vocab=400, hidden=48, layers=3, heads=3, kv_heads=3, head_dim=16, mlp=72, max_positions=512, norm="layer",
        norm_bias=True, gated=False, mlp_bias=True, qkv_bias=True, o_bias=True, parallel=True, activation="gelu",
        rotary=Rotary(fraction=0.5),
    ),
    "mpt": DecoderSpec(
        vocab=400, hidden=48, layers=3, heads=4, kv_heads=4, head_dim=12, mlp=192, max_positions=512, norm="layer",
        gated=False, activation="gelu", rotary=Rotary(scaling="none"), alibi=Alibi(), tied_embeddings=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def verses(repo) -> tuple[Texts, Texts]:
    """Calibration and test texts, the first 32 characters of each: few lengths, so little to compile."""
    folder = repo / "experiments/swahili/texts"
    whole = [read_texts(str(folder / f"swahili.{name}.jsonl")).first(200) for name in ("calibration", "test")]
    return tuple(dataclasses.replace(x, texts=tuple(text[:32] for text in x.texts)) for x in whole)


@pytest.fixture(scope="module")
def tiny(verses, tmp_path_factory):
    """Small checkpoints by `tools/train_pair.py`, their one-dimensional parameters made uneven."""
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "model"
            config = TrainConfig(steps=20, tokens_per_step=256, warmup=3)
            make(Side.TARGET, Plan(name, TINY[name], "float32", config), verses[0].texts, out, seed=0, overwrite=False)
            model = load_model(out)
            rng, params = np.random.default_rng(1), params_of(model)
            for path, x in params.items():
                if x.ndim - path.startswith("blocks.") == 1:
                    params[path] = x + rng.normal(size=x.shape) * 0.3
            made[name] = with_spec(model, model.spec, params)
        return made[name]

    return get


def _float32(directory: Path) -> Model:
    model = load_model(directory)
    return with_spec(model, model.spec, params_of(model))


def _logits(model: Model, texts: Texts) -> np.ndarray:
    """Of one prompt of 300 tokens: short ones hide errors of positions."""
    tokenizer = load_tokenizer(model.directory)
    ids = [i for encoding in tokenizer.encode(texts.texts) for i in tokenizer.document(encoding.ids)][:300]
    return np.asarray(forward(model.spec, model.params, np.array([ids], np.int32)), np.float64)


def _aligned(target: Model, source: Model, texts: Texts, options: AlignmentOptions, path: Path) -> Alignment:
    sites = needed_sites(target.projections.values(), options.structure)
    held = extract_activations(target, source, texts, path, options=CaptureOptions(sites))
    models = tuple((model.spec, model.params) for model in (target, source))
    found = align(*held, target.projections, options, models=models)
    saved = path / "alignment"
    saved.mkdir()
    store.save(found, saved)
    return store.load(saved)


def _deviation(model: Model, merged: Model, texts: Texts) -> float:
    wanted = _logits(model, texts)
    return float(np.abs(_logits(merged, texts) - wanted).max() / wanted.std())


def _lost(model: Model, merged: Model, noise: Model, texts: Texts) -> tuple[float, float]:
    """Largest deviation of logits in their standard deviation, and of bits per byte; `pytest -s` shows them."""
    assert _deviation(model, noise, texts) > 1  # nothing of the model is left in what the source is fused into
    deviation = _deviation(model, merged, texts)
    bits, found = (evaluate(x, texts.first(20)).bits_per_byte for x in (model, merged))
    print(f"\nlogits differ by {deviation:.1e} of their standard deviation, bits per byte by {abs(found - bits):.1e}")
    return deviation, abs(found - bits)


def _assert_same(model: Model, merged: Model, noise: Model, texts: Texts) -> None:
    deviation, bits = _lost(model, merged, noise, texts)
    assert deviation < 1e-4 and bits < 1e-5


def _recovers(model: Model, kind: str, verses: tuple[Texts, Texts], path: Path) -> None:
    calibration, test = verses
    grown = model if kind == "disguised" else deepened(widened(model), [1, 2])
    gaps = [1, 3]
    target, source, kept = {
        "disguised": (model, disguised(model), []),
        "larger source": (model, disguised(grown), []),
        "larger target": (grown, disguised(model), gaps),
    }[kind]
    assert _deviation(model, source, test) < 1e-4 > _deviation(model, target, test)
    alignment = _aligned(target, source, calibration, HARD, path / "run")
    noise = scrambled(target, keep_layers=kept)
    merged = fuse(alignment, noise, source, operators=EVERYTHING, alpha=1.0).model
    _assert_same(model, merged, noise, test)
    weights = alignment.layer_plans["q"].weights
    assert np.nonzero(weights.sum(axis=1) == 0)[0].tolist() == kept
    assert np.count_nonzero(weights) == min(weights.shape)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("qwen3", "larger source", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "larger source", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "larger target", marks=pytest.mark.slow),
        pytest.param("qwen3", "larger target", marks=pytest.mark.slow),
        pytest.param("mpt", "disguised", marks=pytest.mark.slow),
    ],
)
def test_a_trained_model_is_recovered(tiny, verses, tmp_path, name, kind):
    _recovers(tiny(name), kind, verses, tmp_path)


@pytest.mark.slow
def test_the_bundled_target_is_recovered(qwen2_dir, verses, tmp_path):
    _recovers(_float32(qwen2_dir), "disguised", verses, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["disguised", "larger source", "larger target"])
@pytest.mark.parametrize("name", ["qwen2_dir", "llama_dir", "gpt_neox_dir"])
def test_bundled_models_are_recovered(request, verses, tmp_path, name, kind):
    _recovers(_float32(request.getfixturevalue(name)), kind, verses, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_dir", "llama_dir", "gpt_neox_dir"])
@pytest.mark.parametrize("options", [{"solver": "scaling", "epsilon": 0.02}, {"depth": "entropic"}], ids=str)
def test_soft_plans_lose_little(request, verses, tmp_path, name, options):
    model, (calibration, test) = _float32(request.getfixturevalue(name)), verses
    source, noise = disguised(model), scrambled(model)
    alignment = _aligned(model, source, calibration, HARD.model_copy(update=options), tmp_path / "run")
    merged = fuse(alignment, noise, source, operators=EVERYTHING, alpha=1.0).model
    deviation, bits = _lost(model, merged, noise, test)
    assert 1e-5 < deviation < 0.1 and bits < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"residual": "layer"}, marks=pytest.mark.slow),
        pytest.param({"structure": "heads"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_projections_alone_are_recovered_with_plans_per_layer(tiny, verses, tmp_path, options):
    model, (calibration, test) = tiny("gpt_neox"), verses
    source = disguised(model)
    alignment = _aligned(model, source, calibration, HARD.model_copy(update=options), tmp_path / "run")
    noise, held = scrambled(model), params_of(model)
    own = {path: x for path, x in held.items() if "norm" in path or not path.startswith("blocks.")}
    noise = with_spec(model, model.spec, {**params_of(noise), **own})
    merged = fuse(alignment, noise, source, operators=PROJECTIONS, alpha=1.0).model
    _assert_same(model, merged, noise, test)


@pytest.mark.parametrize(
    "options",
    [{"structure": "none"}, pytest.param({"solver": "scaling", "epsilon": 0.1}, marks=pytest.mark.slow)],
    ids=str,
)
def test_what_does_not_recover(tiny, verses, tmp_path, options):
    """The tests above can fail: without structure, or with soft plans, the function is lost."""
    model, (calibration, test) = tiny("gpt_neox"), verses
    source = disguised(model)
    alignment = _aligned(model, source, calibration, HARD.model_copy(update=options), tmp_path / "run")
    operators = EVERYTHING if "resid" in alignment.plans else PROJECTIONS
    merged = fuse(alignment, model, source, operators=operators, alpha=1.0).model
    assert _deviation(model, merged, test) > 1e-3


def test_what_a_structure_needs_is_said(tiny, verses, tmp_path):
    model = tiny("gpt_neox")
    sites = needed_sites(model.projections.values(), "full")
    held = extract_activations(model, model, verses[0].first(3), tmp_path / "run", options=CaptureOptions(sites))
    with pytest.raises(InputError, match="pass models"):
        align(*held, model.projections, HARD)
    for options, message in (({"solver": "ridge"}, "couplings"), ({"gain": True}, r"alignment\.gain")):
        with pytest.raises(InputError, match=message):
            align(*held, model.projections, HARD.model_copy(update=options))
    plain = align(*held, model.projections, AlignmentOptions(epsilon=0.5, layer_top_k=1))
    with pytest.raises(InputError, match="structure: full"):
        fuse(plain, model, model, operators=EVERYTHING, alpha=0.1)
    one = (model.spec, model.params)
    full = align(*held, model.projections, HARD, models=(one, one))
    with pytest.raises(InputError, match=r"transport\.map: paper"):
        fuse(full, model, model, operators=[{"transport": {"map": "paper"}}], alpha=0.1)
