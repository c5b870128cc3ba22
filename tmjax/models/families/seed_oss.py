"""Seed-OSS: Llama's layout with biases that q, k, v and o have apart."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec

#: Key -> attribute of the spec, and its value where the key is missing.
_BIASES = {
    "attention_bias": ("qkv_bias", True),
    "attention_out_bias": ("o_bias", False),
    "mlp_bias": ("mlp_bias", False),
}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        **{attribute: view.take(key, default, bool) for key, (attribute, default) in _BIASES.items()},
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    biases = {key: getattr(spec, attribute) for key, (attribute, _) in _BIASES.items()}
    return write_activation(spec) | write_rotary(spec) | biases


FIELDS = fields(
    Field("num_key_value_heads", "kv_heads", 8),
    Field("head_dim", "head_dim", 128),
    Field("max_position_embeddings", "max_positions", 524288),
)
FAMILY = Family("seed_oss", "SeedOssForCausalLM", FIELDS, llama_like, {}, _read, _write)
