"""GLM 4.5 and 4.6: partial rotary, leading dense layers, a sigmoid router with a bias of the choice, shared experts."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import expert_rows, leading, read_experts, write_experts
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        "qkv_bias": view.take("attention_bias", False, bool),
        "qk_norm": "head" if view.take("use_qk_norm", False, bool) else "none",
        "experts": read_experts(view, DEFAULTS, leading(view, values["layers"], 1)),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    own = {"attention_bias": spec.qkv_bias, "use_qk_norm": spec.qk_norm == "head"}
    own |= {"first_k_dense_replace": len(spec.experts.dense)}
    return write_activation(spec) | write_rotary(spec, fraction=True) | write_experts(spec) | own


DEFAULTS = {
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
ROTARY = RotaryKeys(fraction=0.5, fraction_key="partial_rotary_factor")
FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 131072), Field("rms_norm_eps", "norm_eps", 1e-5, float)
)
FURTHER = ("model.layers.{layers}.",)
FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", FIELDS, _params, {}, _read, _write, FURTHER)
