"""Qwen 3 (dense): Llama's layout with a norm on every head of q and k, and Qwen 2's windows."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.qwen2 import upper_windows
from tmjax.models.families.qwen2 import write as write_qwen2
from tmjax.models.families.rope import read_rotary
from tmjax.models.spec import DecoderSpec


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": upper_windows(view, values["layers"]),
        **attention_biases(view),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_qwen2(spec) | {"attention_bias": spec.qkv_bias}


FIELDS = fields(Field("max_position_embeddings", "max_positions", 32768), Field("head_dim", "head_dim", 128))
FAMILY = Family("qwen3", "Qwen3ForCausalLM", FIELDS, llama_like, {"qk_norm": "head"}, _read, _write)
