"""XGLM: OPT's blocks with sinusoidal positions and scaled embeddings."""

import math
from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import attention, head, head_size, norm, plain_mlp
from tmjax.models.spec import DecoderSpec, ParamSpec, Rotary


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "model.layers.{layer}"
    return (
        ParamSpec("model.embed_tokens.weight", "embed.weight", ("vocab", "embed")),
        *norm(f"{layer}.self_attn_layer_norm", "blocks.attn_norm", spec),
        *attention(f"{layer}.self_attn", spec, o="out_proj"),
        *norm(f"{layer}.final_layer_norm", "blocks.mlp_norm", spec),
        *plain_mlp(layer, spec, "fc1", "fc2"),
        *norm("model.layer_norm", "norm", spec),
        head(spec),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_heads": values["heads"],
        "head_dim": head_size(values),
        "activation": read_activation(view, "activation_function", default="gelu"),
        "embedding_scale": math.sqrt(values["hidden"]) if view.take("scale_embedding", True, bool) else 1.0,
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec, "activation_function") | {"scale_embedding": spec.embedding_scale != 1}


FIXED = {
    "norm": "layer",
    "norm_bias": True,
    "norm_eps": 1e-5,
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "sinusoidal_positions": True,
    "position_offset": 2,
    "rotary": Rotary(scaling="none"),
}
FIELDS = (
    Field("vocab_size", "vocab"),
    Field("d_model", "hidden"),
    Field("num_layers", "layers"),
    Field("attention_heads", "heads"),
    Field("ffn_dim", "mlp"),
    Field("max_position_embeddings", "max_positions", 2048),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FAMILY = Family("xglm", "XGLMForCausalLM", FIELDS, _params, FIXED, _read, _write)
