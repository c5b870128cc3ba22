"""Falcon: a plain MLP, grouped q, k, v in one tensor; parallel or sequential branches, rotary or ALiBi."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, grouped, head, head_size, linear, norm, plain_mlp
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import Alibi, DecoderSpec, ParamSpec, Rotary


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "transformer.h.{layer}"
    two = spec.parallel and not spec.shared_norm
    first, second = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    return (
        ParamSpec("transformer.word_embeddings.weight", "embed.weight", ("vocab", "embed")),
        *norm(f"{layer}.{first}", "blocks.attn_norm", spec),
        *(() if spec.shared_norm else norm(f"{layer}.{second}", "blocks.mlp_norm", spec)),
        *grouped(f"{layer}.self_attention.query_key_value", spec, bias=spec.qkv_bias),
        *linear(f"{layer}.self_attention.dense", "o", bias=spec.o_bias),
        *plain_mlp(f"{layer}.mlp", spec, "dense_h_to_4h", "dense_4h_to_h"),
        *norm("transformer.ln_f", "norm", spec),
        head(spec),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    size, heads = head_size(values), values["heads"]
    new, shared = view.take("new_decoder_architecture", False, bool), view.take("multi_query", True, bool)
    parallel, norms = view.take("parallel_attn", True, bool), view.take("num_ln_in_parallel_attn", 2 if new else 1)
    kv_heads = view.take("num_kv_heads", heads)
    if (new and not parallel) or norms not in (1, 2) or (norms == 2 and parallel and not new):
        raise InputError("config.json: these parallel_attn and num_ln_in_parallel_attn are not supported for falcon")
    if not new and not shared and kv_heads != heads:
        raise InputError("config.json: num_kv_heads without new_decoder_architecture is not supported for falcon")
    # Its biases are added before the scores are scaled.
    alibi = Alibi(scale=size**-0.5, rounded=True) if view.take("alibi", False, bool) else None
    rotary = read_rotary(view, values["max_positions"])
    return {
        "head_dim": size,
        "kv_heads": 1 if shared and not new else kv_heads,
        "parallel": parallel,
        "shared_norm": parallel and norms == 1,
        "alibi": alibi,
        "rotary": rotary if alibi is None else Rotary(scaling="none"),
        "activation": read_activation(view, "activation", default="gelu"),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), view.take("bias", False, bool)),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    new = spec.parallel and (spec.kv_heads > 1 or not spec.shared_norm)
    settings = {"alibi": spec.alibi is not None, "bias": spec.mlp_bias, "parallel_attn": spec.parallel}
    settings |= {"new_decoder_architecture": new, "multi_query": spec.kv_heads == 1, "num_kv_heads": spec.kv_heads}
    if spec.parallel:
        settings["num_ln_in_parallel_attn"] = 1 if spec.shared_norm else 2
    return write_activation(spec, "activation") | settings | (write_rotary(spec) if spec.alibi is None else {})


MLP = Field("ffn_hidden_size", "mlp", lambda read: 4 * read["hidden"])
EPS = Field("layer_norm_epsilon", "norm_eps", 1e-5, float)
TIED = Field("tie_word_embeddings", "tied_embeddings", True, bool)
FIXED = {"norm": "layer", "norm_bias": True, "gated": False}
FIELDS = fields(MLP, EPS, TIED, without=("kv_heads", "head_dim"))
FAMILY = Family("falcon", "FalconForCausalLM", FIELDS, _params, FIXED, _read, _write)
