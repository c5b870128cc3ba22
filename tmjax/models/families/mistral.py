"""Mistral: Llama's layout, no biases, a sliding window in all layers or in none."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec


def read_window(view: ConfigView, layers: int, default: int | None) -> tuple[int, ...]:
    """The same window in all layers; null is none."""
    size = None if view.null("sliding_window") else view.take("sliding_window", default)
    return () if size is None else (size,) * layers


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": read_window(view, values["layers"], 4096),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec) | write_rotary(spec) | {"sliding_window": max(spec.windows, default=None)}


FIELDS = fields(Field("num_key_value_heads", "kv_heads", 8), Field("max_position_embeddings", "max_positions", 131072))
FAMILY = Family("mistral", "MistralForCausalLM", FIELDS, llama_like, {}, _read, _write)
