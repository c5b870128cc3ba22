"""OLMo 2: norms after both branches and none before them, q and k normed over all heads together."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        **attention_biases(view),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec) | write_rotary(spec) | {"attention_bias": spec.qkv_bias}


FIXED = {"pre_norm": False, "post_norm": True, "qk_norm": "full"}
FIELDS = fields(Field("rms_norm_eps", "norm_eps", 1e-5, float))
FAMILY = Family("olmo2", "Olmo2ForCausalLM", FIELDS, llama_like, FIXED, _read, _write)
