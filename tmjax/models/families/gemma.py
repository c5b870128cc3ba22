"""Gemma 1: Llama's layout, norm weights stored less 1, embeddings scaled by the root of their size."""

import math
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec

FIELDS = fields(
    Field("head_dim", "head_dim", 256),
    Field("max_position_embeddings", "max_positions", 8192),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FIXED = {"norm_offset": True}


def refuse_bidirectional(view: ConfigView) -> None:
    """Raises InputError if the model also attends to what comes after."""
    if view.take("use_bidirectional_attention", False, bool):
        raise InputError("config.json: use_bidirectional_attention is not supported: this is not a causal model")


def common(view: ConfigView, values: dict[str, Any], key: str) -> dict[str, Any]:
    """Reads the settings that all Gemmas have: activation, biases, embedding scale."""
    refuse_bidirectional(view)
    return {
        "activation": read_activation(view, key, default="gelu_pytorch_tanh"),
        **attention_biases(view),
        "embedding_scale": math.sqrt(values["hidden"]),
    }


def _activation(view: ConfigView, key: str, default: str) -> str:
    name = read_activation(view, key, default)
    return "gelu_tanh" if name == "gelu" else name  # the first releases meant the approximation


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    activation = _activation(view, "hidden_act", "gelu_pytorch_tanh")
    # Some checkpoints name the activation twice; transformers reads the older name only.
    if view.take("hidden_activation", None, str) and _activation(view, "hidden_activation", "") != activation:
        raise InputError("config.json: hidden_act and hidden_activation disagree; keep the one that was trained with")
    return common(view, values, "hidden_act") | {
        "activation": activation,
        "rotary": read_rotary(view, values["max_positions"]),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec) | write_rotary(spec) | {"attention_bias": spec.qkv_bias}


FAMILY = Family("gemma", "GemmaForCausalLM", FIELDS, llama_like, FIXED, _read, _write)
