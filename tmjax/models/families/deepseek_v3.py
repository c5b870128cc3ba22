"""DeepSeek V3 and R1, Kimi K2: latent attention, leading dense layers, a sigmoid router with a bias of the choice."""

from typing import Any

from tmjax.models.families import latent, mixtures
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields
from tmjax.models.spec import DecoderSpec

DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        view.take(key, 1, zero=True)  # read by transformers' generation alone
    dense = mixtures.leading(view, values["layers"], 3)
    settings = latent.read_attention(view, values, DEFAULTS, interleaved=view.take("rope_interleave", True, bool))
    latent.require_head_dim(view, settings["latent"].rotary_dim)
    return settings | {"experts": mixtures.read_experts(view, DEFAULTS, dense)}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    own = {"rope_interleave": spec.rotary.interleaved, "first_k_dense_replace": len(spec.experts.dense)}
    return latent.write_attention(spec) | mixtures.write_experts(spec) | own


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 4096),
    without=latent.OWN,
)
FURTHER = ("model.layers.{layers}.",)
FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", FIELDS, latent.params, {}, _read, _write, FURTHER)
