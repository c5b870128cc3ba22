"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key-value head for all queries, weights stored [out, in]."""

from typing import Any

from tmjax.models.families import gpt2
from tmjax.models.families.base import Family
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import alternating, fused, gpt2_like, linear
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer, qkv = "transformer.h.{layer}", ("q", "k", "v")
    name = f"{layer}.attn.c_attn"
    # Without the shared head q, k and v alternate head by head.
    rows = fused(name, qkv, spec, bias=True) if spec.kv_heads == 1 else alternating(name, qkv, spec, bias=True)
    return gpt2_like(
        spec,
        attention=(*rows, *linear(f"{layer}.attn.c_proj", "o", bias=True)),
        mlp=(*linear(f"{layer}.mlp.c_fc", "up", bias=True), *linear(f"{layer}.mlp.c_proj", "down", bias=True)),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        view.take(key, True, bool)  # changes where rounding happens
    return gpt2.sizes(view, values) | {
        "kv_heads": 1 if view.take("multi_query", True, bool) else values["heads"],
        "activation": read_activation(view, "activation_function", default="gelu_pytorch_tanh"),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = {"scale_attn_weights": spec.attention_scale is None, "multi_query": spec.kv_heads == 1}
    return write_activation(spec, "activation_function") | settings


FAMILY = Family("gpt_bigcode", "GPTBigCodeForCausalLM", gpt2.FIELDS, _params, gpt2.FIXED, _read, _write)
