"""Phi 3 and 4-mini: Llama's layout with q, k, v in one tensor and gate, up in another; partial rotary, LongRoPE."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, fused, linear, llama_like
from tmjax.models.families.mistral import read_window
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "model.layers.{layer}"
    attention = (
        *fused(f"{layer}.self_attn.qkv_proj", ("q", "k", "v"), spec, bias=False),
        *linear(f"{layer}.self_attn.o_proj", "o", bias=False),
    )
    mlp = (
        *fused(f"{layer}.mlp.gate_up_proj", ("gate", "up"), spec, bias=False),
        *linear(f"{layer}.mlp.down_proj", "down", bias=False),
    )
    return llama_like(spec, attention_rows=attention, mlp_rows=mlp)


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        "windows": read_window(view, values["layers"], None),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    window = {"sliding_window": max(spec.windows, default=None)}
    positions = {"original_max_position_embeddings": spec.rotary.original_positions}
    scaled = positions if spec.rotary.scaling == "longrope" else {}
    return write_activation(spec) | write_rotary(spec, fraction=True) | window | scaled


ROTARY = RotaryKeys(
    fraction_key="partial_rotary_factor",
    original=4096,  # which wins over a length inside of the scaling
    scalings=("default", "longrope"),
    aliases={"su": "longrope", "yarn": "longrope"},  # names that the first releases had for it
)
FIELDS = fields(Field("max_position_embeddings", "max_positions", 4096), Field("rms_norm_eps", "norm_eps", 1e-5, float))
FAMILY = Family("phi3", "Phi3ForCausalLM", FIELDS, _params, {}, _read, _write)
