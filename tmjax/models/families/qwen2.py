"""Qwen 2 and 2.5: Llama's layout with biases on q, k, v and optional sliding windows in the upper layers."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import (
    ConfigView,
    read_activation,
    read_windows,
    write_activation,
    write_windows,
)
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec

# Qwen2Config has no head_dim of its own, but the model honours one that is set.
FIELDS = fields(Field("max_position_embeddings", "max_positions", 32768))


def upper_windows(view: ConfigView, layers: int) -> tuple[int, ...]:
    """Windows from `max_window_layers` on, where they are used at all."""
    size = view.take("sliding_window", 4096)
    use = view.take("use_sliding_window", False, bool) and not view.null("sliding_window")
    first = view.take("max_window_layers", 28, zero=True)
    kinds = ["sliding_attention" if use and i >= first else "full_attention" for i in range(layers)]
    return read_windows(view, layers, size if use else None, kinds)[1]


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": upper_windows(view, values["layers"]),
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Activation, rotary settings, windows."""
    return (
        write_activation(spec) | write_rotary(spec) | write_windows(spec) | {"use_sliding_window": bool(spec.windows)}
    )


FURTHER = ("model.mtp_layers.",)  # of MiMo
FAMILY = Family("qwen2", "Qwen2ForCausalLM", FIELDS, llama_like, {"qkv_bias": True}, _read, write, FURTHER)
