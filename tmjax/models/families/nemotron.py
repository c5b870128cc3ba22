"""Nemotron 3 and 4: layer norms whose weights are stored less 1, a plain MLP of squared ReLUs, partial rotary."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like, plain_mlp
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=plain_mlp("model.layers.{layer}.mlp", spec))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="relu2"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        **attention_biases(view),
        "mlp_bias": view.take("mlp_bias", False, bool),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    biases = {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    return write_activation(spec) | write_rotary(spec, fraction=True) | biases


ROTARY = RotaryKeys(fraction=0.5, fraction_key="partial_rotary_factor")
FIXED = {"norm": "layer", "norm_bias": True, "norm_offset": True, "gated": False}
FIELDS = fields(Field("max_position_embeddings", "max_positions", 4096), Field("norm_eps", "norm_eps", 1e-5, float))
FAMILY = Family("nemotron", "NemotronForCausalLM", FIELDS, _params, FIXED, _read, _write)
