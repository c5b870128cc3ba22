"""GPT-2: layer norms, learned positions, weights stored [in, out], q, k, v in one tensor."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fused, gpt2_like, head_size, linear
from tmjax.models.spec import DecoderSpec, ParamSpec, Part, Rotary

FIELDS = (
    Field("vocab_size", "vocab"),
    Field("n_embd", "hidden"),
    Field("n_layer", "layers"),
    Field("n_head", "heads"),
    Field("n_inner", "mlp", lambda read: 4 * read["hidden"]),
    Field("n_positions", "max_positions", 1024),
    Field("layer_norm_epsilon", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FIXED = {
    "norm": "layer",
    "norm_bias": True,
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "learned_positions": True,
    "rotary": Rotary(scaling="none"),
}
_TURNED = Part(transposed=True)


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "transformer.h.{layer}"
    return gpt2_like(
        spec,
        attention=(
            *fused(f"{layer}.attn.c_attn", ("q", "k", "v"), spec, bias=True, transposed=True),
            *linear(f"{layer}.attn.c_proj", "o", bias=True, part=_TURNED),
        ),
        mlp=(
            *linear(f"{layer}.mlp.c_fc", "up", bias=True, part=_TURNED),
            *linear(f"{layer}.mlp.c_proj", "down", bias=True, part=_TURNED),
        ),
    )


def sizes(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    """Reads the size of a head and whether scores are scaled."""
    view.take("n_ctx", values["max_positions"])
    scaled = view.take("scale_attn_weights", True, bool)
    return {"head_dim": head_size(values), "attention_scale": None if scaled else 1.0}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return sizes(view, values) | {
        "kv_heads": values["heads"],
        "activation": read_activation(view, "activation_function", default="gelu_new"),
        "inverse_layer_scale": view.take("scale_attn_by_inverse_layer_idx", False, bool),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec, "activation_function") | {
        "scale_attn_weights": spec.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": spec.inverse_layer_scale,
    }


FAMILY = Family("gpt2", "GPT2LMHeadModel", FIELDS, _params, FIXED, _read, _write)
