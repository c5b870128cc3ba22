"""BLOOM: layer norms, scores biased by distance (ALiBi), normed embeddings, q, k, v of every head in one tensor."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import grouped, head, head_size, linear, norm, plain_mlp
from tmjax.models.spec import Alibi, DecoderSpec, ParamSpec, Rotary


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "transformer.h.{layer}"
    return (
        ParamSpec("transformer.word_embeddings.weight", "embed.weight", ("vocab", "embed")),
        *norm("transformer.word_embeddings_layernorm", "embed_norm", spec),
        *norm(f"{layer}.input_layernorm", "blocks.attn_norm", spec),
        *grouped(f"{layer}.self_attention.query_key_value", spec, bias=True),
        *linear(f"{layer}.self_attention.dense", "o", bias=True),
        *norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", spec),
        *plain_mlp(f"{layer}.mlp", spec, "dense_h_to_4h", "dense_4h_to_h"),
        *norm("transformer.ln_f", "norm", spec),
        head(spec),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    if view.take("apply_residual_connection_post_layernorm", False, bool):
        raise InputError("config.json: apply_residual_connection_post_layernorm true is not supported for bloom")
    view.take("slow_but_exact", False, bool)  # changes where rounding happens
    # The released checkpoints' other names for these.
    sizes = {"hidden": view.take("n_embed", values["hidden"]), "heads": values["heads"]}
    if view.lacks("n_head"):
        sizes["heads"] = view.take("num_attention_heads", values["heads"])
    return sizes | {"kv_heads": sizes["heads"], "head_dim": head_size(sizes), "mlp": 4 * sizes["hidden"]}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {}


FIELDS = (
    Field("vocab_size", "vocab", 250880),
    Field("hidden_size", "hidden", 64),
    Field("n_layer", "layers", 2),
    Field("n_head", "heads", 8),
    Field("seq_length", "max_positions", 2048),
    Field("layer_norm_epsilon", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FIXED = dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias", "embedding_norm"), True)
FIXED |= {"norm": "layer", "gated": False, "activation": "gelu_tanh"}
FIXED |= {"alibi": Alibi(), "rotary": Rotary(scaling="none")}
FAMILY = Family("bloom", "BloomForCausalLM", FIELDS, _params, FIXED, _read, _write)
