"""OLMoE: Llama's layout with q and k normed over all heads together, and experts one by one in every layer."""

from typing import Any

from tmjax.models.experts.mixture import Experts
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import expert_rows, ignore_training
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    count, chosen = view.take("num_experts", 64), view.take("num_experts_per_tok", 8)
    normalised = view.take("norm_topk_prob", False, bool)
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "head_dim": values["hidden"] // values["heads"],
        "experts": Experts(count, chosen, values["mlp"], normalised=normalised),
        **attention_biases(view),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return (
        write_activation(spec)
        | write_rotary(spec)
        | {
            "attention_bias": spec.qkv_bias,
            "num_experts": spec.experts.count,
            "num_experts_per_tok": spec.experts.chosen,
            "norm_topk_prob": spec.experts.normalised,
        }
    )


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 4096),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
    without=("head_dim",),
)
FAMILY = Family("olmoe", "OlmoeForCausalLM", FIELDS, _params, {"qk_norm": "full"}, _read, _write)
