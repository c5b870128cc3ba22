"""ERNIE 4.5 (dense): Llama's layout, neighbouring dimensions rotate, one key for all biases."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], RotaryKeys(theta=500000.0, interleaved=True)),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), view.take("use_bias", False, bool)),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec) | write_rotary(spec) | {"use_bias": spec.mlp_bias}


FIELDS = fields(
    Field("num_key_value_heads", "kv_heads", 2),
    Field("head_dim", "head_dim", 128),
    Field("max_position_embeddings", "max_positions", 131072),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FAMILY = Family("ernie4_5", "Ernie4_5ForCausalLM", FIELDS, llama_like, {}, _read, _write)
