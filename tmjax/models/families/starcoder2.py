"""StarCoder 2: Llama's attention with layer norms, biases and a plain MLP."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, linear, llama_like
from tmjax.models.families.mistral import read_window
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    mlp = "model.layers.{layer}.mlp"
    rows = (
        *linear(f"{mlp}.c_fc", "up", bias=spec.mlp_bias),
        *linear(f"{mlp}.c_proj", "down", bias=spec.mlp_bias),
    )
    return llama_like(spec, mlp_rows=rows)


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    bias = view.take("use_bias", True, bool)
    return {
        "activation": read_activation(view, default="gelu_pytorch_tanh"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": read_window(view, values["layers"], None),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = {"use_bias": spec.mlp_bias, "sliding_window": max(spec.windows, default=None)}
    return write_activation(spec) | write_rotary(spec) | settings


FIXED = {"norm": "layer", "norm_bias": True, "gated": False}
FIELDS = fields(
    Field("num_key_value_heads", "kv_heads", 2),
    Field("max_position_embeddings", "max_positions", 4096),
    Field("norm_epsilon", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FAMILY = Family("starcoder2", "Starcoder2ForCausalLM", FIELDS, _params, FIXED, _read, _write)
