"""GLM 5, 5.1 and 5.2: latent attention with an indexer, in all layers or in some whose choice the next ones share."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import deepseek_v3, indexers, latent
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields
from tmjax.models.spec import DecoderSpec

DEFAULTS = deepseek_v3.DEFAULTS | {
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 2048,
    "index_n_heads": 32,
    "index_head_dim": 128,
}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["layers"]
    every, first = view.take("index_topk_freq", 1), view.take("index_skip_topk_offset", 2, zero=True)
    if view.lacks("indexer_types") and not view.lacks("index_topk_pattern"):
        raise InputError("config.json: index_topk_pattern is not supported; name the layers in indexer_types")
    usual = ["shared" if max(n - first + 1, 0) % every else "full" for n in range(layers)]
    kinds = view.take("indexer_types", usual, list)
    view.take("index_topk_pattern", "", str)
    if len(kinds) != layers or kinds[0] != "full" or not all(kind in ("full", "shared") for kind in kinds):
        raise InputError(f"config.json: indexer_types {kinds} does not describe {layers} layers")
    return indexers.read(view, values, DEFAULTS, tuple(n for n, kind in enumerate(kinds) if kind == "full"))


def _write(spec: DecoderSpec) -> dict[str, Any]:
    own = spec.latent.indexer.layers
    return indexers.write(spec) | {"indexer_types": ["full" if n in own else "shared" for n in range(spec.layers)]}


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 202752),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
    without=latent.OWN,
)
FURTHER = deepseek_v3.FURTHER
FAMILY = Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", FIELDS, latent.params, {}, _read, _write, FURTHER)
