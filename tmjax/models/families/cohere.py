"""Cohere's Command R: one layer norm for both branches, which run in parallel; neighbouring dimensions rotate."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec

FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 8192),
    Field("layer_norm_eps", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FIXED = {"norm": "layer", "parallel": True, "shared_norm": True}


def common(view: ConfigView, values: dict[str, Any], *, theta: float) -> dict[str, Any]:
    """Reads the settings that both generations have."""
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], RotaryKeys(theta=theta, interleaved=True)),
        **attention_biases(view),
        "logit_scale": float(view.take("logit_scale", 0.0625, float)),
    }


def write_common(spec: DecoderSpec) -> dict[str, Any]:
    """The inverse of `common`."""
    settings = {"attention_bias": spec.qkv_bias, "logit_scale": spec.logit_scale}
    return write_activation(spec) | write_rotary(spec) | settings


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    normed = view.take("use_qk_norm", False, bool)
    return common(view, values, theta=500000.0) | {"qk_norm": "heads" if normed else "none"}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_common(spec) | {"use_qk_norm": spec.qk_norm == "heads"}


FAMILY = Family("cohere", "CohereForCausalLM", FIELDS, llama_like, FIXED, _read, _write)
