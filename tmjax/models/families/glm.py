"""GLM 4 (9B): Llama's layout with gate and up in one tensor; half of every head rotates, neighbours together."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, fused, linear, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    """Returns the tensor table, which GLM-4-0414 shares."""
    mlp = "model.layers.{layer}.mlp"
    return llama_like(
        spec,
        attn_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
        mlp_rows=(
            *fused(f"{mlp}.gate_up_proj", ("gate", "up"), spec, bias=False),
            *linear(f"{mlp}.down_proj", "down", bias=False),
        ),
    )


def read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    """Reads the activation, rotary settings and biases."""
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        "qkv_bias": view.take("attention_bias", True, bool),
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Writes what `read` reads."""
    return write_activation(spec) | write_rotary(spec, fraction=True) | {"attention_bias": spec.qkv_bias}


ROTARY = RotaryKeys(fraction=0.5, fraction_key="partial_rotary_factor", interleaved=True)
FIELDS = fields(
    Field("num_key_value_heads", "kv_heads", 2),
    Field("head_dim", "head_dim", 128),
    Field("max_position_embeddings", "max_positions", 131072),
    Field("rms_norm_eps", "norm_eps", 1.5625e-07, float),
)
FAMILY = Family("glm", "GlmForCausalLM", FIELDS, params, {}, read, write)
