"""OPT: layer norms before both branches, learned positions from the third row of their table on, a plain MLP."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import attention, fields, head, head_size, norm, plain_mlp
from tmjax.models.spec import DecoderSpec, ParamSpec, Rotary


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "model.decoder.layers.{layer}"
    return (
        ParamSpec("model.decoder.embed_tokens.weight", "embed.weight", ("vocab", "embed")),
        ParamSpec("model.decoder.embed_positions.weight", "positions.weight", ("positions", "embed")),
        *norm(f"{layer}.self_attn_layer_norm", "blocks.attn_norm", spec),
        *attention(f"{layer}.self_attn", spec, o="out_proj"),
        *norm(f"{layer}.final_layer_norm", "blocks.mlp_norm", spec),
        *plain_mlp(layer, spec, "fc1", "fc2"),
        *norm("model.decoder.final_layer_norm", "norm", spec),
        head(spec),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    if view.take("word_embed_proj_dim", values["hidden"]) != values["hidden"]:
        raise InputError("config.json: word_embed_proj_dim other than hidden_size (OPT-350m) is not supported")
    usual = {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}
    for key, value in usual.items():
        if view.take(key, value, bool) != value:
            raise InputError(f"config.json: {key} {not value} is not supported for opt")
    return {
        "kv_heads": values["heads"],
        "head_dim": head_size(values),
        "activation": read_activation(view, "activation_function", default="relu"),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), view.take("enable_bias", True, bool)),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = {"word_embed_proj_dim": spec.hidden, "do_layer_norm_before": True, "enable_bias": spec.mlp_bias}
    return write_activation(spec, "activation_function") | settings


FIXED = {
    "norm": "layer",
    "norm_bias": True,
    "norm_eps": 1e-5,
    "gated": False,
    "learned_positions": True,
    "position_offset": 2,
    "rotary": Rotary(scaling="none"),
}
FIELDS = fields(
    Field("ffn_dim", "mlp"),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
    without=("kv_heads", "head_dim", "norm_eps"),
)
FAMILY = Family("opt", "OPTForCausalLM", FIELDS, _params, FIXED, _read, _write)
