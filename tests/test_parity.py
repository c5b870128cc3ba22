"""The one decoder against transformers' PyTorch models, with weights so sharp that every detail of the forward shows.

Every config feature of a case is also changed on our side alone (`mutations`), and the comparison must then fail:
a parity test that passes with a wrong forward would say nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tmjax.convert.model import Model, load_model
from tmjax.models.decoder import bind, forward
from tmjax.models.families import FAMILIES
from tmjax.models.layers import inverse_frequencies
from tmjax.models.sites import SITES
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec
from tmjax.typing import Params

TOKENS = 500
transformers.utils.logging.disable_progress_bar()
TOLERANCE = 1e-4  # of the logits' standard deviation, for the largest difference
KL_TOLERANCE = 1e-6

BASE = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-3,  # large enough to matter
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SHARED = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "ungrouped": {"num_key_value_heads": 6, "head_dim": None, "hidden_act": "gelu_pytorch_tanh"},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
}
CASES = {f"{kind}-{name}": {"model_type": kind} | case for kind in ("llama", "qwen2") for name, case in SHARED.items()}
CASES |= {
    "llama-attention_bias": {"model_type": "llama", "attention_bias": True},
    "llama-mlp_bias": {"model_type": "llama", "mlp_bias": True, "hidden_act": "relu"},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2},
    "qwen2-layer_types": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 37,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.fixture(autouse=True)
def strict_dtypes() -> Iterator[None]:
    """No silent mixing of dtypes anywhere in the forward pass."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> tuple[Model, torch.nn.Module, torch.Tensor]:
    """Our model and transformers', of the same sharp random weights, and token ids [1, TOKENS].

    The reference computes in float64 (but for norms, softmax and rotary angles, which PyTorch's modules keep in
    float32), so that nearly all the noise in a comparison is ours.
    """
    torch.manual_seed(1)
    settings = {key: value for key, value in (BASE | CASES[request.param]).items() if value is not None}
    config = transformers.AutoConfig.for_model(**settings)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / math.sqrt(parameter.shape[1]))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(directory)
    return load_model(directory), reference.double(), torch.randint(BASE["vocab_size"], (1, TOKENS))


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


def mean_kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL(theirs || ours) over tokens, in float64."""
    log_p, log_q = (torch.log_softmax(torch.from_numpy(np.array(x, np.float64)), -1).numpy() for x in (theirs, ours))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def interleaved(weight: jax.Array, spec: DecoderSpec, axis: int) -> jax.Array:
    """Query heads in the order that makes head h read key-value head h % kv_heads."""
    shape = weight.shape
    split = (*shape[:axis], spec.heads // spec.kv_heads, spec.kv_heads, spec.head_dim, *shape[axis + 1 :])
    return weight.reshape(split).swapaxes(axis, axis + 1).reshape(shape)


def mutations(spec: DecoderSpec, params: Params) -> Iterator[tuple[str, DecoderSpec, Params]]:
    """Small mistakes, one at a time, in every config feature that the spec uses."""

    def specs(**changes) -> DecoderSpec:
        return dataclasses.replace(spec, **changes)

    def rotary(**changes) -> DecoderSpec:
        return specs(rotary=dataclasses.replace(spec.rotary, **changes))

    yield "theta", rotary(theta=spec.rotary.theta * 1.01), params
    if spec.rotary.scaling != "default":
        yield "scaling off", rotary(scaling="default"), params
        yield "factor", rotary(factor=spec.rotary.factor * 1.01), params
    if spec.rotary.scaling == "llama3":
        yield "scaling linear", rotary(scaling="linear"), params
        yield "low_freq_factor", rotary(low_freq_factor=1.05), params
        yield "high_freq_factor", rotary(high_freq_factor=4.2), params
        yield "original_positions", rotary(original_positions=130), params
    yield "norm_eps", specs(norm_eps=spec.norm_eps * 1.1), params
    wrong = {"silu": "gelu_tanh", "gelu": "gelu_tanh", "gelu_tanh": "gelu", "relu": "silu"}[spec.activation]
    yield "activation", specs(activation=wrong), params
    yield "head_dim", specs(head_dim=spec.head_dim // 2, heads=spec.heads * 2, kv_heads=spec.kv_heads * 2), params
    if spec.kv_heads < spec.heads:
        changed = {"blocks.q.weight": (1,), "blocks.q.bias": (1,), "blocks.o.weight": (2,)}
        changed = {path: interleaved(params[path], spec, *axis) for path, axis in changed.items() if path in params}
        yield "grouping", spec, params | changed
    for path in params:
        if path.endswith(".bias"):
            yield path, spec, params | {path: jnp.zeros_like(params[path])}
        elif params[path].ndim == 1 or path.endswith("_norm.weight"):
            yield path, spec, params | {path: jnp.ones_like(params[path])}
    if spec.windows:
        yield "window off", specs(windows=()), params
        yield "windows rolled", specs(windows=spec.windows[1:] + spec.windows[:1]), params
        for step in (-1, 1):
            moved = tuple(w if w == FULL_ATTENTION else w + step for w in spec.windows)
            yield f"window {step}", specs(windows=moved), params
    if spec.tied_embeddings:
        yield "tied", specs(tied_embeddings=False), params | {"head.weight": params["embed.weight"][::-1]}
    else:
        yield "untied", specs(tied_embeddings=True), params
    blocks = {path: value[::-1] for path, value in params.items() if path.startswith("blocks.")}
    yield "layer order", spec, params | blocks


def test_logits_and_mutations(pair):
    model, reference, ids = pair
    with torch.no_grad():
        theirs = reference(ids).logits[0].numpy()
    params = dict(model.params)

    def logits(spec: DecoderSpec, params: Params) -> np.ndarray:
        return np.asarray(forward(spec, params, ids.numpy())[0])

    ours = logits(model.spec, params)
    assert deviation(ours, theirs) < TOLERANCE
    assert mean_kl(ours, theirs) < KL_TOLERANCE
    with jax.disable_jit():  # compiling for every wrong spec would take most of the time
        assert deviation(logits(model.spec, params), theirs) < TOLERANCE
        seen = {name: deviation(logits(*wrong), theirs) for name, *wrong in mutations(model.spec, params)}
    print({name: round(value, 4) for name, value in seen.items()})
    assert len(seen) >= 9
    blind = {name: value for name, value in seen.items() if value < 10 * TOLERANCE}
    assert not blind


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 512},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_frequencies_to_the_last_digit(rope):
    config = transformers.LlamaConfig(**(BASE | {"head_dim": 128, "rope_parameters": rope}))
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    spec = FAMILIES["llama"].spec(config.to_dict())
    ours = inverse_frequencies(spec.rotary, spec.head_dim)
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=2)
    assert (ours == theirs).mean() > 0.9


def hooked_sites(reference: torch.nn.Module, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Activations [layer, B, T, unit] of every site, and `final`, from PyTorch forward hooks."""
    outputs = {
        "attn_in": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "mlp_in": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "mlp_out": "mlp",
        "resid": "",
    }
    inputs = {"attn_mix": "self_attn.o_proj", "mlp_hidden": "mlp.down_proj"}
    seen: dict[str, list[np.ndarray]] = {site: [] for site in (*outputs, *inputs, "final")}
    handles = []

    def keep(site: str, module: torch.nn.Module, *, of_input: bool = False) -> None:
        def hook(_module, args, output) -> None:
            value = args[0] if of_input else output
            seen[site].append((value[0] if isinstance(value, tuple) else value).numpy())

        handles.append(module.register_forward_hook(hook))

    for layer in reference.model.layers:
        for site, name in outputs.items():
            keep(site, layer.get_submodule(name))
        for site, name in inputs.items():
            keep(site, layer.get_submodule(name), of_input=True)
    keep("final", reference.model.norm)
    with torch.no_grad():
        reference(ids)
    for handle in handles:
        handle.remove()
    return {site: np.stack(values) for site, values in seen.items()}


@pytest.mark.parametrize("pair", ["llama-attention_bias", "llama-mlp_bias", "qwen2-layer_types"], indirect=True)
def test_captured_sites(pair):
    model, reference, ids = pair
    ids = torch.stack([ids[0, :100], ids[0, 100:200]])  # two sequences: the batch axis must not mix
    theirs = hooked_sites(reference, ids)

    @jax.jit
    def capture(params: Params) -> dict[str, jax.Array]:
        final, captured = bind(model.spec, params).hidden(ids.numpy(), jnp.float32, tuple(SITES), lambda x: x)
        return captured | {"final": final[None]}

    ours = {site: np.asarray(value) for site, value in capture(dict(model.params)).items()}
    assert set(ours) == set(theirs) == {*SITES, "final"}
    for site, axis in SITES.items():
        assert ours[site].shape == (model.spec.layers, *ids.shape, model.spec.axis_size(axis))
    far = {site: deviation(ours[site], theirs[site]) for site in ours}
    assert max(far.values()) < TOLERANCE, far


def test_only_the_sites_asked_for_are_captured(llama_dir):
    model = load_model(llama_dir)
    ids = np.arange(10, dtype=np.int32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def capture(params: Params, sites: tuple[str, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return bind(model.spec, params).hidden(ids, jnp.float32, sites, lambda x: x.sum(axis=1))

    plain, nothing = capture(model.params, ())
    hidden, pooled = capture(model.params, ("k", "resid"))
    assert nothing == {}
    assert {site: value.shape for site, value in pooled.items()} == {"k": (6, 1, 96), "resid": (6, 1, 192)}
    np.testing.assert_allclose(plain, hidden, atol=1e-5)


def test_greedy_tokens_of_a_published_checkpoint(stories_dir):
    """The same 200 tokens as llama2.c, an independent implementation in C."""
    expected = [int(token) for token in (stories_dir / "EXPECTED_IDS.txt").read_text().split()]
    model = load_model(stories_dir)
    ids = np.zeros((1, len(expected) + 1), np.int32)
    ids[0, 0] = 1
    for position in range(len(expected)):
        ids[0, position + 1] = forward(model.spec, model.params, ids)[0, position].argmax()
    assert len(expected) == 200
    assert ids[0, 1:].tolist() == expected


@pytest.mark.parametrize("name", ["llama_dir", "qwen2_dir"])
def test_bundled_checkpoints(request, name):
    """The real weights, in float32 and, more loosely, in bfloat16."""
    directory = request.getfixturevalue(name)
    model = load_model(directory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(model.spec.vocab, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = reference(ids).logits.numpy()
    ours = np.asarray(forward(model.spec, model.params, ids.numpy()))
    assert deviation(ours, theirs) < TOLERANCE
    assert mean_kl(ours, theirs) < KL_TOLERANCE
    low = np.asarray(forward(model.spec, model.params, ids.numpy(), jnp.bfloat16))
    assert low.dtype == np.float32
    assert deviation(low, theirs) > TOLERANCE
    assert mean_kl(low, theirs) < 1e-3
