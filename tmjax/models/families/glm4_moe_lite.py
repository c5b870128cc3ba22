"""GLM 4.7 Flash: DeepSeek V3's attention and experts, whose dense layers are listed."""

from typing import Any

from tmjax.models.families import deepseek_v3, latent, mixtures
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields
from tmjax.models.spec import DecoderSpec

DEFAULTS = deepseek_v3.DEFAULTS | {
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "n_group": 1,
    "topk_group": 1,
}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    settings = latent.read_attention(view, values, DEFAULTS, interleaved=view.take("rope_interleave", True, bool))
    latent.require_head_dim(view, settings["latent"].rotary_dim)
    return settings | {
        "experts": mixtures.read_experts(view, DEFAULTS, latent.read_kinds(view, values["layers"], (0,)))
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    own = {"rope_interleave": spec.rotary.interleaved}
    return latent.write_attention(spec) | mixtures.write_experts(spec) | latent.write_kinds(spec) | own


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 202752),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
    without=latent.OWN,
)
FURTHER = deepseek_v3.FURTHER
FAMILY = Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", FIELDS, latent.params, {}, _read, _write, FURTHER)
