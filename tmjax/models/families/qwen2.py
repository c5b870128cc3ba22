"""Qwen 2 and 2.5: Llama's layout with biases on q, k, v and optional sliding windows in the upper layers."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import llama
from tmjax.models.families.base import (
    ConfigView,
    Family,
    Field,
    read_activation,
    read_rotary,
    write_activation,
    write_rotary,
)
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec

# Qwen2Config has no head_dim of its own, but the model honours one that is set.
FIELDS = (
    *(f for f in llama.FIELDS if f.key != "max_position_embeddings"),
    Field("max_position_embeddings", "max_positions", 32768),
)


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view),
        "rotary": read_rotary(view),
        "windows": _windows(view, values["layers"]),
    }


def _windows(view: ConfigView, layers: int) -> tuple[int, ...]:
    size = view.take("sliding_window", 4096)
    use = view.take("use_sliding_window", False, bool) and not view.null("sliding_window")
    first = view.take("max_window_layers", 28, zero=True)
    kinds = view.take(
        "layer_types", ["sliding_attention" if use and i >= first else "full_attention" for i in range(layers)], list
    )
    if len(kinds) != layers or not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
        raise InputError(f"config.json: layer_types {kinds} does not describe {layers} layers")
    if "sliding_attention" not in kinds or not use:
        return ()
    return tuple(size if kind == "sliding_attention" else FULL_ATTENTION for kind in kinds)


def _write(spec: DecoderSpec) -> dict[str, Any]:
    sizes = {window for window in spec.windows if window != FULL_ATTENTION}
    kinds = ["full_attention" if window == FULL_ATTENTION else "sliding_attention" for window in spec.layer_windows]
    held = {"use_sliding_window": bool(sizes), "sliding_window": max(sizes, default=None), "layer_types": kinds}
    return write_activation(spec) | write_rotary(spec) | held


FAMILY = Family("qwen2", "Qwen2ForCausalLM", FIELDS, llama.params, {"qkv_bias": True}, _read, _write)
