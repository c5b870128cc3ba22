"""Qwen 1.5 and 2 mixtures of experts: Qwen 2's attention, experts one by one and a shared one with a gate."""

from dataclasses import replace
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
from tmjax.models.families.mixtures import Names, expert_rows, qwen_experts, write_qwen_experts
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec, Names(shared="mlp.shared_expert")))


def _windows(view: ConfigView, layers: int) -> tuple[int, ...]:
    """Windows of every second layer below `max_window_layers`, where they are used at all."""
    size, last = view.take("sliding_window", 4096, zero=True), view.take("max_window_layers", 28, zero=True)
    use = view.take("use_sliding_window", False, bool) and size > 0 and not view.null("sliding_window")
    kinds = ["sliding_attention" if use and i % 2 == 0 and i < last else "full_attention" for i in range(layers)]
    return read_windows(view, layers, size if use else None, kinds)[1]


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    experts = qwen_experts(view, values, count=60, chosen=4, width=1408)
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": _windows(view, values["layers"]),
        "qkv_bias": view.take("qkv_bias", True, bool),
        "experts": replace(experts, shared_width=view.take("shared_expert_intermediate_size", 5632), shared_gate=True),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = write_activation(spec) | write_rotary(spec) | write_windows(spec) | write_qwen_experts(spec)
    shared = {"shared_expert_intermediate_size": spec.experts.shared_width}
    return settings | shared | {"use_sliding_window": bool(spec.windows), "qkv_bias": spec.qkv_bias}


FIELDS = fields(Field("max_position_embeddings", "max_positions", 32768), Field("intermediate_size", "mlp", 5632))
FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", FIELDS, _params, {}, _read, _write)
