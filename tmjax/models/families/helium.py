"""Helium: Llama's layout, neighbouring dimensions rotate, o has no bias."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    if values["heads"] * values["head_dim"] != values["hidden"]:
        raise InputError(
            f"config.json: {values['heads']} heads of {values['head_dim']} are not the hidden size {values['hidden']}"
        )
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], RotaryKeys(theta=100000.0, interleaved=True)),
        "qkv_bias": view.take("attention_bias", False, bool),
        "mlp_bias": view.take("mlp_bias", False, bool),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    biases = {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    return write_activation(spec) | write_rotary(spec) | biases


FIELDS = fields(
    Field("num_key_value_heads", "kv_heads", 20),
    Field("max_position_embeddings", "max_positions", 4096),
    Field("rms_norm_eps", "norm_eps", 1e-8, float),
)
FAMILY = Family("helium", "HeliumForCausalLM", FIELDS, llama_like, {}, _read, _write)
