"""The one decoder against transformers' PyTorch models, with weights so sharp that every detail of the forward shows.

Every family has cases (`tools/family_cases.py`). Every setting that a case uses is also changed on our side alone
(`mutations`), and the comparison must then fail: a parity test that passes with a wrong forward would say nothing.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tmjax.checkpoints import hf
from tmjax.checkpoints.formats.safetensors import SINGLE_NAME
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.models.decoder import ForwardPlan, bind, forward, parameter_shapes
from tmjax.models.experts import expert_layer
from tmjax.models.experts.mixture import Experts
from tmjax.models.families import FAMILIES
from tmjax.models.rotary import inverse_frequencies
from tmjax.models.sites import SITES
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec, Rotary
from tmjax.typing import Params
from tools.family_cases import (
    CASES,
    KL_TOLERANCE,
    LLAMA3,
    TOKENS,
    TOLERANCE,
    YARN,
    deviation,
    make_reference,
    mean_kl,
    padded_batch,
    plainly,
    reference_logits,
)

transformers.utils.logging.disable_progress_bar()
#: Tokens of a mutated run: more than every window and every context length that a case rescales for.
SHORT = 200


@pytest.fixture(autouse=True)
def strict_dtypes() -> Iterator[None]:
    """No silent mixing of dtypes anywhere in the forward pass."""
    with jax.numpy_dtype_promotion("strict"):
        yield


class Pair(NamedTuple):
    """Our model and transformers', of the same weights."""

    directory: Path
    model: Model
    reference: torch.nn.Module


#: The first case of every family.
FIRST = {config["model_type"]: name for name, config in reversed(CASES.items())}.values()
#: Other cases that are quick enough: every rotary scaling, and layers of different kinds.
ALSO = (
    "llama-dynamic",
    "llama-llama3",
    "llama-yarn",
    "phi3-long",
    "qwen2-layer_types",
    "smollm3-full",
    "gpt_bigcode-heads",
)


#: Mixtures of experts that others stand for among the tests that are not slow.
LIKE_MIXTURES = (
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "granitemoe",
    "ernie4_5_moe",
    "minimax_m2",
    "deepseek_v2",
    "deepseek_v32",
    "glm_moe_dsa",
    "glm4_moe_lite",
)


#: Dense families, each of which another one stands for: codegen gptj, arcee nemotron, olmo2 olmo3, glm glm4, and so on.
LIKE_DENSE = {"arcee", "codegen", "ernie4_5", "gemma", "glm", "helium", "olmo2", "seed_oss"}


def slow_case(name: str, *quick: str):
    """A case, which is slow unless it is the first of its family or one of `quick`."""
    first = name in FIRST and not name.startswith(LIKE_MIXTURES) and name.rpartition("-")[0] not in LIKE_DENSE
    return pytest.param(name, marks=() if first or name in quick else pytest.mark.slow)


def slow(name: str):
    """A case that is slow."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[slow_case(name, *ALSO) for name in CASES])
def pair(request, tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp(request.param)
    reference = make_reference(request.param, directory)
    return Pair(directory, load_model(directory), reference)


def test_every_family_has_a_case():
    assert {config["model_type"] for config in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_sizes_differ_where_the_config_can_say_it(name):
    spec = FAMILIES[CASES[name]["model_type"]].spec(CASES[name])
    assert spec.layers >= 3
    free = {field.attribute for field in FAMILIES[CASES[name]["model_type"]].fields}
    sizes = [spec.vocab, spec.hidden, spec.mlp, spec.heads, spec.layers]
    if name != "llama-ungrouped" and "kv_heads" in free:
        sizes += [spec.kv_heads]
    whole = (
        "llama-ungrouped",
        "phi3-long",
        "phi3-short",
        "phi3-old-long",
        "phi3-su",
        "cohere2-layer_types",
        "cohere2-pattern",
    )
    divided = ("arcee", "olmo3", "exaone4", "helium")
    if name not in whole and name.split("-")[0] not in divided and "head_dim" in free:
        sizes += [spec.head_dim, spec.head_dim * spec.heads]
    assert len(set(sizes)) == len(sizes)


# What stands where in PyTorch's modules: the layers, the final norm, and in a layer every projection, with the part of
# its output that is meant where several are fused.
Part = Callable[[np.ndarray, DecoderSpec], np.ndarray]


def rows(index: int) -> Part:
    """Part of [q, k, v] or [gate, up] (index 3, 4), one below the other."""

    def part(output: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        heads, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        bounds = [(0, heads), (heads, heads + kv), (heads + kv, heads + 2 * kv), (0, spec.mlp), (spec.mlp, None)]
        return output[..., slice(*bounds[index])]

    return part


def alternating(index: int) -> Part:
    """q, k, v of a head, then those of the next."""

    def part(output: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        split = output.reshape(*output.shape[:-1], spec.heads, 3, spec.head_dim)
        return split[..., index, :].reshape(*output.shape[:-1], -1)

    return part


def in_four(index: int) -> Part:
    """One of three projections that alternate in four parts."""

    def part(output: np.ndarray, _: DecoderSpec) -> np.ndarray:
        return output.reshape(*output.shape[:-1], 4, 3, -1)[..., index, :].reshape(*output.shape[:-1], -1)

    return part


def grouped(index: int) -> Part:
    """q, k or v of key-value heads that have all three side by side."""

    def part(output: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        each = spec.heads // spec.kv_heads
        split = output.reshape(*output.shape[:-1], spec.kv_heads, each + 2, spec.head_dim)
        chosen = (slice(0, each), slice(each, each + 1), slice(each + 1, None))[index]
        return split[..., chosen, :].reshape(*output.shape[:-1], -1)

    return part


LLAMA = {
    "layers": "model.layers",
    "final": "model.norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MODULES = {
    "phi3": {role: ("self_attn.qkv_proj", rows(i)) for i, role in enumerate(("q", "k", "v"))}
    | {role: ("mlp.gate_up_proj", rows(i)) for i, role in enumerate(("gate", "up"), 3)},
    "gpt_neox": {role: ("attention.query_key_value", alternating(i)) for i, role in enumerate(("q", "k", "v"))}
    | {
        "layers": "gpt_neox.layers",
        "final": "gpt_neox.final_layer_norm",
        "o": "attention.dense",
        "gate": None,
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "gpt2": {role: ("attn.c_attn", rows(i)) for i, role in enumerate(("q", "k", "v"))}
    | {
        "layers": "transformer.h",
        "final": "transformer.ln_f",
        "o": "attn.c_proj",
        "gate": None,
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    "starcoder2": {"gate": None, "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "granitemoe": {"up": "block_sparse_moe", "down": "block_sparse_moe"},
    "arcee": {"gate": None},
    "nemotron": {"gate": None},
    "opt": {
        "layers": "model.decoder.layers",
        "final": "model.decoder.final_layer_norm",
        "o": "self_attn.out_proj",
        "gate": None,
        "up": "fc1",
        "down": "fc2",
    },
}
MODULES["xglm"] = MODULES["opt"] | {"layers": "model.layers", "final": "model.layer_norm"}
MODULES["glm"] = MODULES["glm4"] = {role: MODULES["phi3"][role] for role in ("gate", "up")}
MODULES["gpt_bigcode"] = MODULES["gpt2"]
MODULES["gpt_neo"] = MODULES["gpt2"] | {role: f"attn.attention.{role}_proj" for role in ("q", "k", "v")}
MODULES["gpt_neo"] |= {"o": "attn.attention.out_proj"}
MODULES["phi"] = {"final": "model.final_layernorm", "o": "self_attn.dense", "gate": None}
MODULES["phi"] |= {"up": "mlp.fc1", "down": "mlp.fc2"}
MODULES["gptj"] = MODULES["gpt2"] | {role: f"attn.{role}_proj" for role in ("q", "k", "v")}
MODULES["gptj"] |= {"o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"}
MODULES["codegen"] = MODULES["gptj"] | {role: ("attn.qkv_proj", in_four(i)) for i, role in enumerate("qvk")}
MODULES["falcon"] = MODULES["bloom"] = MODULES["gpt_neox"] | {
    role: ("self_attention.query_key_value", grouped(i)) for i, role in enumerate("qkv")
}
MODULES["falcon"] |= {"layers": "transformer.h", "final": "transformer.ln_f", "o": "self_attention.dense"}
MODULES["mpt"] = {role: ("attn.Wqkv", rows(i)) for i, role in enumerate("qkv")} | {
    "layers": "transformer.blocks",
    "final": "transformer.norm_f",
    "o": "attn.out_proj",
    "gate": None,
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
}
#: Families whose settings are nearly all those of others, and the ones that are not.
LIKE_OTHERS = {
    "deepseek_v3": ("latent.mscale",),
    "bloom": ("alibi", "embedding_norm"),
    "codegen": (),
    "falcon": (),
    "gpt_oss": ("sinks", "experts.limit", "experts.bias", "experts.logit_bias"),
    "gptj": (),
    "mpt": (),
    "phi": ("head_bias",),
}
#: Cases whose heads alternate although the first of the family are below each other.
ALTERNATING = ("gpt_bigcode",)
#: A mixture has sites before and behind its expert layer, none inside; so has a latent attention.
MIXTURE = {"up": "mlp", "down": "mlp"}
LATENT = {"q": "self_attn.kv_a_proj_with_mqa"}
OUTPUTS = {"q": "q", "k": "k", "v": "v", "attn_out": "o", "gate": "gate", "up": "up", "mlp_out": "down"}
INPUTS = {"attn_in": "q", "attn_mix": "o", "mlp_in": "up", "mlp_hidden": "down"}


def hooked_sites(
    pair: Pair, ids: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Logits, and activations [layer, B, T, unit] of every site and `final`, from PyTorch forward hooks."""
    spec = pair.model.spec
    names = LLAMA | (MIXTURE if spec.experts is not None else {}) | (LATENT if spec.latent is not None else {})
    names |= MODULES.get(pair.model.family.model_type, {})
    if pair.model.family.model_type in ALTERNATING and spec.kv_heads > 1:
        names |= {role: (names[role][0], alternating(i)) for i, role in enumerate(("q", "k", "v"))}
    seen: dict[str, list[np.ndarray]] = {}
    handles = []

    def keep(site: str, module: torch.nn.Module, part: Part | None = None, *, of_input: bool = False) -> None:
        def hook(_module, args, output) -> None:
            value = args[0] if of_input else output
            value = (value[0] if isinstance(value, tuple) else value).numpy().copy()  # Falcon adds to it in place
            value = value.reshape(*ids.shape, -1)  # OPT's MLP reads all tokens in one row
            seen.setdefault(site, []).append(value if part is None else part(value, pair.model.spec))

        handles.append(module.register_forward_hook(hook))

    for layer in pair.reference.get_submodule(names["layers"]):
        for sites, of_input in ((OUTPUTS, False), (INPUTS, True)):
            for site, role in sites.items():
                if site in spec.sites:
                    name, part = (names[role], None) if isinstance(names[role], str) else names[role]
                    keep(site, layer.get_submodule(name), None if of_input else part, of_input=of_input)
        keep("resid", layer)
    keep("final", pair.reference.get_submodule(names["final"]))
    logits = reference_logits(pair.reference, ids, real)
    for handle in handles:
        handle.remove()
    return logits, {site: np.stack(values) for site, values in seen.items()}


def test_logits_and_sites(pair):
    """Of the real tokens of a right-padded batch; two sequences, so that the batch axis must not mix."""
    spec = pair.model.spec
    ids, real = padded_batch()
    assert ids.shape == (2, TOKENS) and not real.all()
    theirs, their_sites = hooked_sites(pair, ids, real)

    ours = np.asarray(forward(spec, dict(pair.model.params), ids))
    assert ours.dtype == np.float32
    assert deviation(ours[real], theirs[real]) < TOLERANCE
    assert mean_kl(ours[real], theirs[real]) < KL_TOLERANCE

    @jax.jit
    def capture(params: Params) -> dict[str, jax.Array]:
        final, captured, _ = bind(spec, params).run(ids, ForwardPlan(sites=spec.sites))
        return captured | {"final": final[None]}

    our_sites = {site: np.asarray(value) for site, value in capture(dict(pair.model.params)).items()}
    missing = {"gate", "up", "mlp_hidden"} if spec.experts is not None else set() if spec.gated else {"gate"}
    missing |= {"q", "k", "v", "attn_mix"} if spec.latent is not None else set()
    assert {*our_sites} == {*their_sites} == {*SITES, "final"} - missing
    assert {*spec.sites} == {*our_sites} - {"final"}
    # Behind three sharp softmaxes the worst of 600,000 entries is float32's noise: PyTorch's own float32 is up to
    # 1.5e-4 from its float64. Where that is so, ours may be twice as far.
    try:
        _, narrow = hooked_sites(pair._replace(reference=pair.reference.float()), ids, real)
    finally:
        pair.reference.double()  # what the other tests of the case compare with; exact, the weights are float32
    far, typical = {}, {}
    for site, value in our_sites.items():
        axis, layers = (SITES[site], spec.layers) if site in SITES else ("embed", 1)
        assert value.shape == their_sites[site].shape == (layers, *ids.shape, spec.axis_size(axis))
        mine, other = value[:, real], their_sites[site][:, real]
        far[site] = deviation(mine, other) / max(TOLERANCE, 2 * deviation(narrow[site][:, real], other))
        typical[site] = float((mine - other).std() / other.std())
    assert max(typical.values()) < TOLERANCE / 10, typical
    assert max(far.values()) < 1, far


def test_export_is_the_same_file_and_transformers_reads_it(pair, tmp_path):
    out, plain = hf.export(pair.model, tmp_path / "again"), plainly(pair.model.family.model_type)
    assert (out / SINGLE_NAME).read_bytes() == (pair.directory / SINGLE_NAME).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(out, **plain).double().eval()
    ids = padded_batch()[0][:1, :50]
    real = np.ones_like(ids, bool)
    np.testing.assert_array_equal(reference_logits(again, ids, real), reference_logits(pair.reference, ids, real))
    # The config made from the spec alone, as a new model gets it, means the same to transformers.
    config = pair.model.family.config(pair.model.spec)
    assert pair.model.family.spec(config) == pair.model.spec
    padding = {"pad_token_id": None}  # several families have one beyond this small vocabulary if none is given
    (out / "config.json").write_text(json.dumps(config | padding))
    again = transformers.AutoModelForCausalLM.from_pretrained(out, **plain).double().eval()
    ids, real = padded_batch()
    ids, real = ids[:1, :SHORT], real[:1, :SHORT]
    theirs = reference_logits(pair.reference, ids, real)
    assert deviation(reference_logits(again, ids, real), theirs) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_the_handwritten_config_reads_as_the_one_transformers_writes(name):
    """Old spellings and defaults included."""
    family = FAMILIES[CASES[name]["model_type"]]
    written = transformers.AutoConfig.for_model(**copy.deepcopy(CASES[name])).to_dict()
    assert family.spec(CASES[name]) == family.spec(written)


def regrouped(weight: jax.Array, spec: DecoderSpec, axis: int) -> jax.Array:
    """Query heads in the order that makes head h read key-value head h % kv_heads."""
    shape = weight.shape
    split = (*shape[:axis], spec.heads // spec.kv_heads, spec.kv_heads, spec.head_dim, *shape[axis + 1 :])
    return weight.reshape(split).swapaxes(axis, axis + 1).reshape(shape)


#: Fields of the rotary embedding that each scaling reads, theta, fraction and plane order aside.
ROTARY_FIELDS = {
    "default": (),
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_positions"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_positions"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("original_positions", "short_factors", "long_factors", "attention_factor"),
}


def rotary_mutations(rotary: Rotary) -> Iterator[tuple[str, Rotary]]:
    def changed(name: str, value) -> tuple[str, Rotary]:
        return name, dataclasses.replace(rotary, **{name: value})

    yield changed("scaling", "none" if rotary.scaling == "default" else "default")
    if rotary.scaling == "none":
        return
    yield changed("theta", rotary.theta * 1.01)
    past = rotary.original_positions < SHORT
    for name in ROTARY_FIELDS[rotary.scaling]:
        value = getattr(rotary, name)
        if name == "truncate":
            yield changed(name, not value)
        elif name == "attention_factor":
            yield changed(name, value * 1.01)
            if value != 1:
                yield changed(name, 1.0)
        elif name in ("beta_fast", "beta_slow"):
            yield changed(name, value * (4 if name == "beta_slow" else 0.25) if rotary.truncate else value * 1.1)
        elif name in ("short_factors", "long_factors"):
            if past == (name == "long_factors"):
                yield changed(name, value[::-1])
                yield changed(name, (*value[:1], value[1] * 1.01, *value[2:]))
        elif name == "original_positions" and rotary.scaling == "longrope":
            yield changed(name, SHORT if past else SHORT - 1)
        elif name == "original_positions":
            yield changed(name, value * 2 if rotary.scaling == "yarn" else value + 2)
        else:
            yield changed(name, value * (1.01 if name == "factor" else 1.05))
    if rotary.scaling == "llama3":
        yield "scaling linear", dataclasses.replace(rotary, scaling="linear")


def expert_mutations(spec: DecoderSpec) -> Iterator[tuple[str, str, Experts]]:
    own = spec.experts
    if own is None:
        return

    def changed(how: str, **changes) -> tuple[str, str, Experts]:
        return next(iter(changes)), how, dataclasses.replace(own, **changes)

    yield changed("fewer", chosen=own.chosen - 1)
    yield changed("more", chosen=own.chosen + 1)
    yield changed("other", router="sigmoid" if own.router == "softmax" else "softmax")
    yield changed("flipped", normalised=not own.normalised)
    yield changed("larger", scale=own.scale * 1.02)
    if own.scale != 1:
        yield changed("off", scale=1.0)
    if own.choice_bias:
        yield changed("off", choice_bias=False)
    if own.groups > 1:
        yield changed("off", groups=1)
        yield changed("other", groups=own.groups // 2)
        yield changed("more", chosen_groups=own.chosen_groups + 1)
        yield changed("other", group_best=3 - own.group_best)
    if own.shared_width:
        yield changed("off", shared_width=0, shared_gate=False)
    if own.shared_gate:
        yield changed("off", shared_gate=False)
    for name in ("logit_bias", "bias"):
        if getattr(own, name):
            yield changed("off", **{name: False})
    if own.limit is not None:
        yield changed("off", limit=None)
        yield changed("larger", limit=own.limit * 1.1)
        yield changed("larger", gain=own.gain * 1.02)
    if own.dense:
        yield changed("others", dense=tuple((layer + 1) % spec.layers for layer in own.dense))


def field_mutations(spec: DecoderSpec) -> Iterator[tuple[str, str, dict]]:
    """Fields of the spec, what was done to them, and the change: off, and for numbers also a little off.

    Every field that a case does not leave at its neutral value is switched off, and some are switched on.
    """
    for name in (
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "norm_bias",
        "post_norm",
        "shared_norm",
        "learned_positions",
        "sinusoidal_positions",
        "embedding_norm",
        "head_bias",
        "sinks",
    ):
        if getattr(spec, name):
            yield name, "off", {name: False}
    for name in ("pre_norm", "norm_offset", "gated", "tied_embeddings", "inverse_layer_scale"):
        if name != "gated" or (spec.gated and spec.experts is None):
            yield name, "flipped", {name: not getattr(spec, name)}
    if spec.position_offset:
        yield "position_offset", "off", {"position_offset": 0}
    yield "parallel", "flipped", {"parallel": not spec.parallel, "shared_norm": False}
    yield "norm", "other", {"norm": "layer" if spec.norm == "rms" else "rms"}
    # A family that fixes it has a small one.
    yield "norm_eps", "larger", {"norm_eps": spec.norm_eps * (3 if spec.norm_eps > 1e-4 else 3000)}
    if spec.norm == "rms" and spec.pre_norm and spec.embedding_scale == spec.residual_scale == 1:
        yield "norm_eps", "a little larger", {"norm_eps": spec.norm_eps * 1.1}  # elsewhere what is normed is larger
    wrong = {"silu": "gelu_tanh", "gelu": "gelu_tanh", "gelu_tanh": "gelu", "relu": "silu", "relu2": "silu"}[
        spec.activation
    ]
    if spec.experts is None or spec.experts.limit is None:
        yield "activation", "other", {"activation": wrong}
        yield "activation", "far", {"activation": "relu" if spec.activation != "relu" else "gelu"}
    if spec.qk_norm != "none":
        yield "qk_norm", "off", {"qk_norm": "none"}
    neutral = {
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
        "attention_scale": None,
        "attention_cap": None,
        "logit_cap": None,
        "qkv_clip": None,
    }
    for name, value in neutral.items():
        if getattr(spec, name) != value:
            yield name, "off", {name: value}
            yield name, "larger", {name: getattr(spec, name) * 1.02}
    for name, how, wrong in expert_mutations(spec):
        yield f"experts.{name}", how, {"experts": wrong}
    if spec.latent is not None and spec.latent.mscale:
        yield "latent.mscale", "off", {"latent": dataclasses.replace(spec.latent, mscale=0.0)}
        yield "latent.mscale", "larger", {"latent": dataclasses.replace(spec.latent, mscale=spec.latent.mscale * 1.1)}
    for name, rotary in rotary_mutations(spec.rotary):
        yield f"rotary.{name}", str(getattr(rotary, name.split()[0]))[:12], {"rotary": rotary}
    if spec.rotary.scaling != "none":
        turned = dataclasses.replace(spec.rotary, interleaved=not spec.rotary.interleaved)
        yield "rotary.interleaved", "flipped", {"rotary": turned}
        fraction = {"fraction": 0.5 if spec.rotary.fraction == 1 else 1.0}
        planes = int(spec.head_dim * fraction["fraction"]) // 2
        fraction |= {key: (1.0,) * planes for key in ("short_factors", "long_factors") if spec.rotary.short_factors}
        local = spec.local_rotary and dataclasses.replace(spec.local_rotary, **fraction)
        yield (
            "rotary.fraction",
            "other",
            {"rotary": dataclasses.replace(spec.rotary, **fraction), "local_rotary": local},
        )
    if spec.local_rotary is not None:
        yield "local_rotary", "off", {"local_rotary": None, "layer_rotary": ()}
        for name, rotary in rotary_mutations(spec.local_rotary):
            yield f"local_rotary.{name}", "", {"local_rotary": rotary}
        for number in (0, 1):
            moved = (1 - spec.layer_rotary[0], *spec.layer_rotary[1:])
            moved = moved if number == 0 else (*spec.layer_rotary[:-1], 1 - spec.layer_rotary[-1])
            yield "layer_rotary", f"of a layer {number}", {"layer_rotary": moved}
    if spec.alibi is not None:
        yield "alibi", "off", {"alibi": None}
        yield "alibi.scale", "larger", {"alibi": dataclasses.replace(spec.alibi, scale=spec.alibi.scale * 1.02)}
        if spec.alibi.rounded:
            yield "alibi.rounded", "off", {"alibi": dataclasses.replace(spec.alibi, rounded=False)}
    if spec.windows:
        yield "windows", "off", {"windows": ()}
        if len(set(spec.windows)) > 1:
            yield "windows", "rolled", {"windows": spec.windows[1:] + spec.windows[:1]}
        for step in (-1, 1):
            moved = tuple(w if w == FULL_ATTENTION else w + step for w in spec.windows)
            yield "windows", str(step), {"windows": moved}


def filled(spec: DecoderSpec, params: Params) -> Params:
    """The parameters, and for those that a wrong spec adds what a careless forward would do without them."""
    return params | {
        path: jnp.full(shape, 0.0 if path.endswith(".bias") else 1.0)
        for path, shape in parameter_shapes(spec).items()
        if path not in params
    }


def mutations(spec: DecoderSpec, params: Params) -> Iterator[tuple[str, str, DecoderSpec, Params]]:
    """Small mistakes, one at a time, in every setting that the spec uses and in every parameter that is not a matrix.

    Gives what is wrong (a field or a parameter), how, and the spec and parameters that are.
    """
    for field, what, changes in field_mutations(spec):
        wrong = dataclasses.replace(spec, **changes)
        given = params
        if field == "tied_embeddings" and spec.tied_embeddings:
            given = params | {"head.weight": params["embed.weight"][::-1]}
        yield field, what, wrong, filled(wrong, given)
    if spec.qk_norm == "none" and not spec.sinks and spec.latent is None:
        halves = {"head_dim": spec.head_dim // 2, "heads": spec.heads * 2, "kv_heads": spec.kv_heads * 2}
        if not spec.rotary.short_factors and spec.rotary.dims(halves["head_dim"]) % 2 == 0:
            yield "head_dim", "half", dataclasses.replace(spec, **halves), params
    if 1 < spec.kv_heads < spec.heads:
        changed = {"blocks.q.weight": (1,), "blocks.q.bias": (1,), "blocks.o.weight": (2,)}
        changed = {path: regrouped(params[path], spec, *axis) for path, axis in changed.items() if path in params}
        yield "kv_heads", "alternating", spec, params | changed
    for path in params:
        if path.startswith("index_blocks."):
            continue  # an indexer picks all tokens here
        if path == "blocks.k.bias" and spec.rotary.scaling == "none" and spec.qk_norm == "none":
            continue  # moves all scores of a query alike
        if path.endswith(".bias"):
            yield path, "zero", spec, params | {path: jnp.zeros_like(params[path])}
        elif params[path].ndim == 1 or path.endswith("_norm.weight"):
            yield path, "one", spec, params | {path: jnp.full_like(params[path], 0.0 if spec.norm_offset else 1.0)}
    if spec.learned_positions:
        moved = jnp.roll(params["positions.weight"], 1, axis=0)
        yield "positions.weight", "moved", spec, params | {"positions.weight": moved}
    blocks = {path: value[::-1] for path, value in params.items() if path.startswith("blocks.")}
    yield "layers", "reversed", spec, params | blocks


def differs(what: str, spec: DecoderSpec, first: DecoderSpec) -> bool:
    """Whether a field, or whether there is a parameter, is other than in the first case of the family."""
    field = what.split(".")[0]
    if hasattr(spec, field):
        return getattr(spec, field) != getattr(first, field)
    return what not in parameter_shapes(first)


def gathered_product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_product` without its loop, which takes long where nothing is compiled."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return jnp.einsum("ri,roi->ro", x, w[group], precision="highest")


#: Families that have most settings of the decoder between them; the wrong settings of others are slow tests.
DIFFERENT = ("llama", "stablelm")


@pytest.mark.parametrize(
    "pair",
    [slow_case(name) if CASES[name]["model_type"] in DIFFERENT else slow(name) for name in CASES],
    indirect=True,
)
def test_every_wrong_setting_shows(pair, monkeypatch):
    """All of them in the first case of a family; in the others, those in what differs from it."""
    spec, family = pair.model.spec, pair.model.family
    first = next(family.spec(config) for config in CASES.values() if config["model_type"] == family.model_type)
    count = require_shown(pair, monkeypatch, lambda what: spec == first or differs(what, spec, first))
    assert count >= 15 or spec != first


@pytest.mark.slow
@pytest.mark.parametrize("pair", [name for name in FIRST if LIKE_OTHERS.get(CASES[name]["model_type"])], indirect=True)
def test_wrong_settings_of_its_own_show(pair, monkeypatch):
    """Of families that have most settings in common with others."""
    own = LIKE_OTHERS[pair.model.family.model_type]
    assert require_shown(pair, monkeypatch, lambda what: what in own) >= len(own)


def require_shown(pair: Pair, monkeypatch: pytest.MonkeyPatch, chosen: Callable[[str], bool]) -> int:
    """Fails for wrong settings, of those chosen, that do not show in the logits; returns their number."""
    monkeypatch.setattr(expert_layer, "grouped_product", gathered_product)
    spec = pair.model.spec
    ids, real = padded_batch()
    ids, real = ids[:1, :SHORT], real[:1, :SHORT]
    theirs = reference_logits(pair.reference, ids, real)[0]
    params = dict(pair.model.params)

    def far(spec: DecoderSpec, params: Params) -> float:
        return deviation(np.asarray(forward(spec, params, ids)[0]), theirs)

    with jax.disable_jit():  # compiling for every wrong spec would take most of the time
        assert far(spec, params) < TOLERANCE
        seen = {(what, how): far(*wrong) for what, how, *wrong in mutations(spec, params) if chosen(what)}
    print({" ".join(key): round(value, 4) for key, value in seen.items()})
    # The two forms of gelu differ by 1e-3 at most, which here is some 6 tolerances; everything else shows by more.
    close = spec.activation in ("gelu", "gelu_tanh")
    needed = {key: 5 if close and key == ("activation", "other") else 10 for key in seen}
    # Without its norms, and only so, a mixture may overflow; that shows, since the right logits are finite.
    overflowing = {("pre_norm", "flipped")} if spec.experts is not None else set()
    blind = {
        key: value
        for key, value in seen.items()
        if not value >= needed[key] * TOLERANCE and not (key in overflowing and np.isnan(value))
    }
    assert not blind
    return len(seen)


#: Sizes, whose mistakes are shape errors, or that the forward does not read.
SIZES = {"vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions"}


def test_every_setting_is_switched_off_in_some_case():
    """No field of the spec without a case that uses it and a mistake that shows it."""
    seen = set()
    for name, config in CASES.items():
        spec = FAMILIES[config["model_type"]].spec(config)
        done = {field for field, *_ in field_mutations(spec)}
        used = {f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != f.default} - SIZES - {"rotary"}
        used -= {"rotary", "gated", "experts", "latent"} | ({"norm_eps"} if spec.norm_eps == 1e-6 else set())
        if spec.local_rotary is None:
            used -= {"local_rotary"}
        assert used <= done, name
        seen |= done
    held = {f.name for f in dataclasses.fields(DecoderSpec)} - SIZES - {"rotary"}
    held |= {f"rotary.{f.name}" for f in dataclasses.fields(Rotary)}
    held |= {"latent.mscale"}  # all else of it is sizes
    held |= {f"experts.{f.name}" for f in dataclasses.fields(Experts)} - {"experts.count", "experts.width"}
    held -= {"experts", "latent"}
    assert held <= seen


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
    "llama3": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 512},
    "yarn": YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 512},
    "yarn-exact": YARN | {"rope_theta": 1e4, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.5},
    "yarn-mscale": YARN | {"rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn-attention": YARN | {"rope_theta": 1e4, "attention_factor": 0.9},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + i / 64 for i in range(64)],
        "long_factor": [1.5 + i**1.3 / 7 for i in range(64)],
        "original_max_position_embeddings": 256,
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + i / 64 for i in range(64)],
        "long_factor": [1.5 + i**1.3 / 7 for i in range(64)],
        "original_max_position_embeddings": 256,
        "factor": 12.0,
    },
}
HEADS = {
    "vocab_size": 67,
    "hidden_size": 768,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "max_position_embeddings": 1024,
    "head_dim": 128,
}


@pytest.mark.parametrize("tokens", [100, 1023, 1025, 5000])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_to_the_last_digit(name, tokens):
    settings = HEADS | {"num_hidden_layers": 3, "rope_parameters": ROPES[name], "hidden_act": "silu"}
    config = transformers.LlamaConfig(**copy.deepcopy(settings))
    kind = ROPES[name]["rope_type"]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    # A tensor, as the module gives it: the arithmetic is then float32.
    length = {} if kind == "default" else {"seq_len": torch.tensor(tokens) if kind == "dynamic" else tokens}
    theirs, factor = compute(config, **length) if kind == "default" else compute(config, "cpu", **length)
    spec = FAMILIES["llama"].spec(config.to_dict())
    ours = inverse_frequencies(spec.rotary, spec.head_dim, tokens)
    np.testing.assert_array_max_ulp(ours, theirs.numpy(), maxulp=2)
    assert (ours == theirs.numpy()).mean() > 0.9
    assert spec.rotary.attention_factor == pytest.approx(factor, rel=1e-12)


def test_only_the_sites_asked_for_are_captured(llama_dir):
    model = load_model(llama_dir)
    ids = np.arange(10, dtype=np.int32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def capture(params: Params, sites: tuple[str, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return bind(model.spec, params).run(ids, ForwardPlan(sites=sites, collect=lambda x: x.sum(axis=1)))[:2]

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


@pytest.mark.parametrize("name", ["llama_dir", "qwen2_dir", "stories_dir"])
def test_bundled_checkpoints(request, name):
    """The real weights, in float32 and, as well as PyTorch does it, in bfloat16.

    Of the two of the merge the KL is below 1e-3; rounding the weights of stories260k alone takes 5e-3, in PyTorch too.
    """
    directory = request.getfixturevalue(name)
    model = load_model(directory)
    reference, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    ids = torch.randint(model.spec.vocab, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, theirs_low = reference(ids).logits.numpy(), rounded(ids).logits.float().numpy()
    ours = np.asarray(forward(model.spec, model.params, ids.numpy()))
    assert deviation(ours, theirs) < TOLERANCE
    assert mean_kl(ours, theirs) < KL_TOLERANCE
    low = np.asarray(forward(model.spec, model.params, ids.numpy(), jnp.bfloat16))
    assert low.dtype == np.float32
    assert deviation(low, theirs) > TOLERANCE
    assert mean_kl(low, theirs) < 1.2 * mean_kl(theirs_low, theirs)
    assert mean_kl(low, theirs) < (1e-3 if name != "stories_dir" else 2e-2)
