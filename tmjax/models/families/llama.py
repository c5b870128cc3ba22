"""Llama 2, 3, 3.1, 3.2 and everything laid out like them."""

from typing import Any

from tmjax.models.families.base import Family
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec


def read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    """Activation, rotary settings, biases."""
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        **attention_biases(view),
        "mlp_bias": view.take("mlp_bias", False, bool),
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The inverse of `read`."""
    return write_activation(spec) | write_rotary(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


FAMILY = Family("llama", "LlamaForCausalLM", fields(), llama_like, {}, read, write)
