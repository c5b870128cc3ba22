"""Arcee's AFM: Llama's layout with a plain MLP of squared ReLUs."""

from typing import Any

from tmjax.models.families import llama
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation
from tmjax.models.families.layout import fields, llama_like, plain_mlp
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=plain_mlp("model.layers.{layer}.mlp", spec))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return llama.read(view, values) | {"activation": read_activation(view, default="relu2")}


FIELDS = fields(Field("max_position_embeddings", "max_positions", 4096), Field("rms_norm_eps", "norm_eps", 1e-5, float))
FAMILY = Family("arcee", "ArceeForCausalLM", FIELDS, _params, {"gated": False}, _read, llama.write)
