"""GLM 4.5 and 4.6: partial rotary, leading dense layers, a sigmoid router with a bias of the choice, shared experts."""

from typing import Any

from tmjax.models.experts.mixture import Experts
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import expert_rows, ignore_training
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    width = view.take("moe_intermediate_size", 1408)
    experts = Experts(
        count=view.take("n_routed_experts", view.take("num_local_experts", 128)),
        chosen=view.take("num_experts_per_tok", 8),
        width=width,
        router="sigmoid",
        normalised=view.take("norm_topk_prob", True, bool),
        scale=float(view.take("routed_scaling_factor", 1.0, float)),
        choice_bias=True,
        groups=view.take("n_group", 1),
        chosen_groups=view.take("topk_group", 1),
        shared_width=width * view.take("n_shared_experts", 1),
        dense=tuple(range(view.take("first_k_dense_replace", 1, zero=True))),
    )
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        "qkv_bias": view.take("attention_bias", False, bool),
        "qk_norm": "head" if view.take("use_qk_norm", False, bool) else "none",
        "experts": experts,
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    experts = spec.experts
    return (
        write_activation(spec)
        | write_rotary(spec, fraction=True)
        | {
            "attention_bias": spec.qkv_bias,
            "use_qk_norm": spec.qk_norm == "head",
            "n_routed_experts": experts.count,
            "num_experts_per_tok": experts.chosen,
            "moe_intermediate_size": experts.width,
            "norm_topk_prob": experts.normalised,
            "routed_scaling_factor": experts.scale,
            "n_group": experts.groups,
            "topk_group": experts.chosen_groups,
            "n_shared_experts": experts.shared_width // experts.width,
            "first_k_dense_replace": len(experts.dense),
        }
    )


ROTARY = RotaryKeys(fraction=0.5, fraction_key="partial_rotary_factor")
FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 131072), Field("rms_norm_eps", "norm_eps", 1e-5, float)
)
FURTHER = ("model.layers.{layers}.",)
FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", FIELDS, _params, {}, _read, _write, FURTHER)
