"""Gemma 2: Gemma with norms before and after both branches, soft caps, and windows in every other layer."""

import functools
from typing import Any

from tmjax.models.families import gemma
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_windows, write_activation, write_windows
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec

FIELDS = fields(
    *(f for f in gemma.FIELDS if f.attribute in ("head_dim", "max_positions", "tied_embeddings")),
    Field("num_key_value_heads", "kv_heads", 4),
)
FIXED = gemma.FIXED | {"post_norm": True}
params = functools.partial(llama_like, mlp_norm="pre_feedforward_layernorm")


def caps(view: ConfigView, *, attention: float | None, logits: float | None) -> dict[str, Any]:
    """Soft caps, null for none, and the scale of the scores."""
    names = ("attn_logit_softcapping", attention), ("final_logit_softcapping", logits)
    limits = [None if view.null(key) else view.take(key, default, float) for key, default in names]
    scalar = view.take("query_pre_attn_scalar", 256, float)
    return {"attention_cap": limits[0], "logit_cap": limits[1], "attention_scale": scalar**-0.5}


def write_caps(spec: DecoderSpec) -> dict[str, Any]:
    """The inverse of `caps`."""
    scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
    return {
        "attn_logit_softcapping": spec.attention_cap,
        "final_logit_softcapping": spec.logit_cap,
        "query_pre_attn_scalar": round(scale**-2),
        "attention_bias": spec.qkv_bias,
    }


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["layers"]
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    size = None if view.null("sliding_window") else view.take("sliding_window", 4096)
    view.take("hidden_act", None, str)  # the first checkpoints repeat the activation under the older name
    return (
        gemma.common(view, values, "hidden_activation")
        | caps(view, attention=50.0, logits=30.0)
        | {
            "rotary": read_rotary(view, values["max_positions"]),
            "windows": read_windows(view, layers, size, kinds)[1],
        }
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec, "hidden_activation") | write_caps(spec) | write_rotary(spec) | write_windows(spec)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", FIELDS, params, FIXED, _read, _write)
