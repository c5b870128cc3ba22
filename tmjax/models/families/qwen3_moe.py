"""Qwen 3 mixtures of experts: Qwen 3's attention, one window for all layers, experts one by one."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import expert_rows, qwen_experts, write_qwen_experts
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    use, size = view.take("use_sliding_window", False, bool), view.take("sliding_window", 4096)
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": (size,) * values["layers"] if use and not view.null("sliding_window") else (),
        "experts": qwen_experts(view, values, count=128, chosen=8, width=768),
        **attention_biases(view),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    windows = {"use_sliding_window": bool(spec.windows), "sliding_window": max(spec.windows, default=None)}
    settings = write_activation(spec) | write_rotary(spec) | write_qwen_experts(spec) | windows
    return settings | {"attention_bias": spec.qkv_bias}


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 32768),
    Field("intermediate_size", "mlp", 6144),
    Field("num_key_value_heads", "kv_heads", 4),
)
FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", FIELDS, _params, {"qk_norm": "head"}, _read, _write)
