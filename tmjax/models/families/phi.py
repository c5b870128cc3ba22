"""Phi 1, 1.5 and 2: parallel branches with one layer norm, partial rotary, an output head with a bias."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import attention, biased_head, fields, head_size, norm, plain_mlp
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "model.layers.{layer}"
    return (
        ParamSpec("model.embed_tokens.weight", "embed.weight", ("vocab", "embed")),
        *norm(f"{layer}.input_layernorm", "blocks.attn_norm", spec),
        *attention(f"{layer}.self_attn", spec, o="dense"),
        *plain_mlp(f"{layer}.mlp", spec, "fc1", "fc2"),
        *norm("model.final_layernorm", "norm", spec),
        *biased_head(spec),
    )


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    if view.take("qk_layernorm", False, bool):
        raise InputError("config.json: qk_layernorm true is not supported for phi")
    return {
        "head_dim": head_size(values),
        "activation": read_activation(view, default="gelu_new"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return write_activation(spec) | write_rotary(spec, fraction=True)


ROTARY = RotaryKeys(fraction=0.5, fraction_key="partial_rotary_factor")
FIXED = {
    "norm": "layer",
    "norm_bias": True,
    "parallel": True,
    "shared_norm": True,
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "head_bias": True,
}
FIELDS = fields(Field("layer_norm_eps", "norm_eps", 1e-5, float), without=("head_dim",))
FAMILY = Family("phi", "PhiForCausalLM", FIELDS, _params, FIXED, _read, _write)
