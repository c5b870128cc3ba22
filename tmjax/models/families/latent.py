"""Tables and settings that families with multi-head latent attention share: DeepSeek's, with what others change."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tmjax.errors import InputError
from tmjax.models.blocks.low_rank import Latent
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import llama_like
from tmjax.models.families.mixtures import expert_rows
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec, Rotary

#: Fields of the spec that `read_attention` reads, and keys of the sizes of a head and of the rank of keys and values.
OWN = ("head_dim", "kv_heads")
_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    """Returns the tensor table of a mixture of experts with latent attention."""
    return llama_like(spec, attention_rows=attention(spec), mlp_rows=expert_rows(spec))


def attention(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    """Returns the rows of latent attention; none has a role, since it offers no sites of heads."""
    assert spec.latent is not None
    rows = []

    def add(hf: str, path: str, axes: tuple[str, ...], *, bias: bool = False, indexed: bool = False) -> None:
        stack, layers = ("index_blocks", "indexed") if indexed else ("blocks", "all")
        name = f"model.layers.{{layer}}.self_attn.{hf}"
        rows.append(ParamSpec(f"{name}.weight", f"{stack}.{path}.weight", axes, layers=layers))
        if bias:
            rows.append(ParamSpec(f"{name}.bias", f"{stack}.{path}.bias", axes[:1], layers=layers))

    if spec.latent.q_rank:
        add("q_a_proj", "latent.q_down", ("q_rank", "embed"), bias=spec.qkv_bias)
        add("q_a_layernorm", "latent.q_norm", ("q_rank",))
        add("q_b_proj", "latent.q_up", ("heads", "q_rank"))
    else:
        add("q_proj", "latent.q_up", ("heads", "embed"))
    add("kv_a_proj_with_mqa", "latent.kv_down", ("kv_down", "embed"), bias=spec.qkv_bias)
    add("kv_a_layernorm", "latent.kv_norm", ("kv_rank",))
    add("kv_b_proj", "latent.kv_up", ("kv_up", "kv_rank"))
    add("o_proj", "o", ("embed", "values"), bias=spec.o_bias)
    if spec.latent.indexer is not None:
        add("indexer.wq_b", "q_up", ("index_heads", "q_rank"), indexed=True)
        add("indexer.wk", "k", ("index_dim", "embed"), indexed=True)
        add("indexer.k_norm", "k_norm", ("index_dim",), bias=True, indexed=True)
        add("indexer.weights_proj", "scale", ("index_head_count", "embed"), indexed=True)
    return tuple(rows)


def turning(rotary: Rotary, head_dim: int, dims: int) -> Rotary:
    """Returns the rotary embedding that turns exactly `dims` units of a head."""
    fraction = dims / head_dim
    return replace(rotary, fraction=fraction if int(head_dim * fraction) == dims else math.nextafter(fraction, 2))


def read_attention(
    view: ConfigView, values: Mapping[str, Any], defaults: Mapping[str, Any], *, interleaved: bool = True
) -> dict[str, Any]:
    """Reads the settings of latent attention and of what families with it have in common.

    Args:
        view: The config.
        values: Fields of the spec that were read.
        defaults: Values of keys that are missing.
        interleaved: Whether neighbouring units of a head turn together.

    Returns:
        Fields of the spec.

    Raises:
        InputError: Keys have fewer heads than queries, or a setting is out of range.
    """
    kv_rank, still, rotary_dim, value_dim = (view.take(key, defaults[key]) for key in _SIZES)
    q_rank = 0 if view.null("q_lora_rank") else view.take("q_lora_rank", defaults["q_lora_rank"])
    head_dim = still + rotary_dim
    kv_heads = view.take("num_key_value_heads", values["heads"])
    if kv_heads != values["heads"]:
        raise InputError(f"config.json: {values['heads']} heads of latent attention cannot share {kv_heads} of keys")
    rotary = read_rotary(view, values["max_positions"], RotaryKeys(interleaved=interleaved))
    settings = view.take("rope_scaling", {}, dict) or view.take("rope_parameters", {}, dict)
    # Other kinds of scaling are refused with this key.
    mscale = settings.get("mscale_all_dim") if rotary.scaling == "yarn" else None
    bias = view.take("attention_bias", False, bool)
    return {
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "activation": read_activation(view, default="silu"),
        "rotary": turning(rotary, head_dim, rotary_dim),
        "latent": Latent(kv_rank, rotary_dim, value_dim, q_rank, float(mscale or 0)),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def require_head_dim(view: ConfigView, dims: int) -> None:
    """Raises InputError if a config's `head_dim`, which transformers takes for the rotary part's size, is another."""
    if view.take("head_dim", dims) != dims:
        raise InputError(f"config.json: head_dim is not qk_rope_head_dim {dims}")


def write_attention(spec: DecoderSpec) -> dict[str, Any]:
    """Writes the settings that `read_attention` reads."""
    latent, rotary = spec.latent, write_rotary(spec)
    assert latent is not None
    if latent.mscale:
        rotary["rope_parameters"]["mscale_all_dim"] = latent.mscale
    sizes = (latent.kv_rank, spec.head_dim - latent.rotary_dim, latent.rotary_dim, latent.value_dim)
    own = dict(zip(_SIZES, sizes, strict=True)) | {"q_lora_rank": latent.q_rank or None}
    own |= {"num_key_value_heads": spec.kv_heads}
    return write_activation(spec) | rotary | own | {"attention_bias": spec.qkv_bias}


def read_kinds(view: ConfigView, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Reads which layers have no experts from `mlp_layer_types`; returns their numbers.

    Raises:
        InputError: The list does not describe so many layers.
    """
    kinds = view.take("mlp_layer_types", ["dense" if n in default else "sparse" for n in range(layers)], list)
    if len(kinds) != layers or not all(kind in ("dense", "sparse") for kind in kinds):
        raise InputError(f"config.json: mlp_layer_types {kinds} does not describe {layers} layers")
    return tuple(number for number, kind in enumerate(kinds) if kind == "dense")


def write_kinds(spec: DecoderSpec) -> dict[str, Any]:
    """Writes the list that `read_kinds` reads."""
    assert spec.experts is not None
    return {"mlp_layer_types": ["dense" if n in spec.experts.dense else "sparse" for n in range(spec.layers)]}
