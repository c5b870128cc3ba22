"""DeepSeek V2, V2 Lite and Coder V2: latent attention, a softmax router, the best expert of a group opens it."""

from dataclasses import replace
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import deepseek_v3, latent, mixtures
from tmjax.models.families.base import Family
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields
from tmjax.models.spec import DecoderSpec

DEFAULTS = deepseek_v3.DEFAULTS | {
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    method = view.take("topk_method", "greedy", str)
    if method not in ("greedy", "group_limited_greedy"):
        raise InputError(f"config.json: topk_method {method!r} is not supported for deepseek_v2")
    if view.take("mlp_bias", False, bool):
        raise InputError("config.json: mlp_bias true is not supported for deepseek_v2")
    view.take("num_experts_per_tok")
    view.take("head_dim", 0)  # transformers takes the rotary part's size in its place
    if view.take("norm_topk_prob", False, bool):
        view.note("norm_topk_prob true has no effect, since transformers' deepseek_v2 does not read it either")
    own = mixtures.read_experts(view, DEFAULTS, mixtures.leading(view, values["layers"], 0))
    own = replace(own, router="softmax", normalised=False, choice_bias=False, group_best=1)
    own = replace(own, groups=1, chosen_groups=1) if method == "greedy" else own
    return latent.read_attention(view, values, DEFAULTS) | {"experts": own}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    experts = mixtures.write_experts(spec)
    del experts["norm_topk_prob"]
    method = "group_limited_greedy" if spec.experts.groups > 1 else "greedy"
    own = {"topk_method": method, "first_k_dense_replace": len(spec.experts.dense)}
    return latent.write_attention(spec) | experts | own


FIELDS = fields(without=latent.OWN)
FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", FIELDS, latent.params, {}, _read, _write)
