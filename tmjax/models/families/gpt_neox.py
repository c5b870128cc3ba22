"""GPT-NeoX and Pythia: layer norms, parallel branches, q, k, v of every head together in one tensor."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import alternating, fields, head, linear, norm
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "gpt_neox.layers.{layer}"
    return (
        ParamSpec("gpt_neox.embed_in.weight", "embed.weight", ("vocab", "embed")),
        *norm(f"{layer}.input_layernorm", "blocks.attn_norm", spec),
        *norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", spec),
        *alternating(f"{layer}.attention.query_key_value", ("q", "k", "v"), spec, bias=spec.qkv_bias),
        *linear(f"{layer}.attention.dense", "o", bias=spec.o_bias),
        *linear(f"{layer}.mlp.dense_h_to_4h", "up", bias=True),
        *linear(f"{layer}.mlp.dense_4h_to_h", "down", bias=True),
        *norm("gpt_neox.final_layer_norm", "norm", spec),
        head(spec, "embed_out.weight"),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_heads": values["heads"],
        "head_dim": values["hidden"] // values["heads"],
        "activation": read_activation(view, default="gelu"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        **attention_biases(view, default=True),
        "parallel": view.take("use_parallel_residual", True, bool),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = {"attention_bias": spec.qkv_bias, "use_parallel_residual": spec.parallel}
    return write_activation(spec) | write_rotary(spec, fraction=True) | settings


ROTARY = RotaryKeys(theta_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct")
FIXED = {"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True}
FIELDS = fields(Field("layer_norm_eps", "norm_eps", 1e-5, float), without=("kv_heads", "head_dim"))
FAMILY = Family("gpt_neox", "GPTNeoXForCausalLM", FIELDS, _params, FIXED, _read, _write)
