"""Llama 2, 3, 3.1, 3.2 and everything laid out like them."""

from typing import Any

from tmjax.models.families.base import (
    ConfigView,
    Family,
    Field,
    projection,
    read_activation,
    read_rotary,
    write_activation,
    write_rotary,
)
from tmjax.models.spec import DecoderSpec, ParamSpec

FIELDS = (
    Field("vocab_size", "vocab"),
    Field("hidden_size", "hidden"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads", lambda read: read["heads"]),
    Field("head_dim", "head_dim", lambda read: read["hidden"] // read["heads"]),
    Field("intermediate_size", "mlp"),
    Field("max_position_embeddings", "max_positions", 2048),
    Field("rms_norm_eps", "norm_eps", 1e-6, float),
    Field("tie_word_embeddings", "tied_embeddings", False, bool),
)


def params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    """The tensor table; biases appear where the spec has them."""
    layer, block = "model.layers.{layer}", "blocks"
    head = ParamSpec(
        "lm_head.weight", "head.weight", ("vocab", "embed"), tied_to="embed.weight" if spec.tied_embeddings else None
    )
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return (
        ParamSpec("model.embed_tokens.weight", "embed.weight", ("vocab", "embed")),
        ParamSpec(f"{layer}.input_layernorm.weight", f"{block}.attn_norm.weight", ("embed",)),
        *projection(f"{attention}.q_proj", f"{block}.q", "heads", "embed", "attn_in", "q", bias=spec.qkv_bias),
        *projection(f"{attention}.k_proj", f"{block}.k", "kv_heads", "embed", "attn_in", "k", bias=spec.qkv_bias),
        *projection(f"{attention}.v_proj", f"{block}.v", "kv_heads", "embed", "attn_in", "v", bias=spec.qkv_bias),
        *projection(f"{attention}.o_proj", f"{block}.o", "embed", "heads", "attn_mix", "attn_out", bias=spec.o_bias),
        ParamSpec(f"{layer}.post_attention_layernorm.weight", f"{block}.mlp_norm.weight", ("embed",)),
        *projection(f"{mlp}.gate_proj", f"{block}.gate", "mlp", "embed", "mlp_in", "gate", bias=spec.mlp_bias),
        *projection(f"{mlp}.up_proj", f"{block}.up", "mlp", "embed", "mlp_in", "up", bias=spec.mlp_bias),
        *projection(f"{mlp}.down_proj", f"{block}.down", "embed", "mlp", "mlp_hidden", "mlp_out", bias=spec.mlp_bias),
        ParamSpec("model.norm.weight", "norm.weight", ("embed",)),
        head,
    )


def _read(view: ConfigView, _: dict[str, Any]) -> dict[str, Any]:
    bias = view.take("attention_bias", False, bool)
    return {
        "activation": read_activation(view),
        "rotary": read_rotary(view),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": view.take("mlp_bias", False, bool),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec) | write_rotary(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


FAMILY = Family("llama", "LlamaForCausalLM", FIELDS, params, {}, _read, _write)
