"""Granite 3: Llama's layout with multipliers on embeddings, residual branches, scores and logits."""

from typing import Any

from tmjax.models.families import llama
from tmjax.models.families.base import Family
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.spec import DecoderSpec


def read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    """Llama's settings and the multipliers."""
    return llama.read(view, values) | {
        "embedding_scale": float(view.take("embedding_multiplier", 1.0, float)),
        "residual_scale": float(view.take("residual_multiplier", 1.0, float)),
        "attention_scale": float(view.take("attention_multiplier", 1.0, float)),
        "logit_scale": 1.0 / view.take("logits_scaling", 1.0, float),
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The inverse of `read`."""
    scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
    return llama.write(spec) | {
        "embedding_multiplier": spec.embedding_scale,
        "residual_multiplier": spec.residual_scale,
        "attention_multiplier": scale,
        "logits_scaling": 1.0 / spec.logit_scale,
    }


FAMILY = Family("granite", "GraniteForCausalLM", fields(), llama_like, {}, read, write)
