"""MPT: layer norms and projections without biases, scores biased by distance (ALiBi)."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, check_kind
from tmjax.models.families.layout import fused, head, head_size, linear, norm, plain_mlp
from tmjax.models.spec import Alibi, DecoderSpec, ParamSpec, Rotary

#: Settings of attention, of which other values are refused.
_FIXED = {"attn_type": "multihead_attention", "alibi": True, "prefix_lm": False, "qk_ln": False, "rope": False}
_FIXED |= {"alibi_bias_max": 8}  # transformers computes with 8 whatever it is


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "transformer.blocks.{layer}"
    return (
        ParamSpec("transformer.wte.weight", "embed.weight", ("vocab", "embed")),
        *norm(f"{layer}.norm_1", "blocks.attn_norm", spec),
        *fused(f"{layer}.attn.Wqkv", ("q", "k", "v"), spec, bias=False),
        *linear(f"{layer}.attn.out_proj", "o", bias=False),
        *norm(f"{layer}.norm_2", "blocks.mlp_norm", spec),
        *plain_mlp(f"{layer}.ffn", spec),
        *norm("transformer.norm_f", "norm", spec),
        head(spec),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    if view.take("expansion_ratio", 4) != 4 or not view.take("no_bias", True, bool):
        raise InputError("config.json: expansion_ratio other than 4 and no_bias false are not supported for mpt")
    settings = {key: value for key, value in view.take("attn_config", {}, dict).items() if value is not None}
    other = [key for key, value in _FIXED.items() if settings.get(key, value) != value]
    if other:
        raise InputError(f"config.json: attn_config: {', '.join(other)} other than usual is not supported for mpt")
    scale, clip = settings.get("softmax_scale"), settings.get("clip_qkv")
    for key, value in (("softmax_scale", scale), ("clip_qkv", clip)):
        check_kind(key, 1.0 if value is None else value, float)
    sizes = {"kv_heads": values["heads"], "head_dim": head_size(values), "mlp": 4 * values["hidden"]}
    return sizes | {"attention_scale": scale, "qkv_clip": clip}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"attn_config": {"softmax_scale": spec.attention_scale, "clip_qkv": spec.qkv_clip}}


FIELDS = (
    Field("vocab_size", "vocab", 50368),
    Field("d_model", "hidden", 2048),
    Field("n_layers", "layers", 24),
    Field("n_heads", "heads", 16),
    Field("max_seq_len", "max_positions", 2048),
    Field("layer_norm_epsilon", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FIXED = {"norm": "layer", "gated": False, "activation": "gelu", "alibi": Alibi(), "rotary": Rotary(scaling="none")}
FAMILY = Family("mpt", "MptForCausalLM", FIELDS, _params, FIXED, _read, _write)
