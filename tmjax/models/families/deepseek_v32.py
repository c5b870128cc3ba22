"""DeepSeek V3.2: V3 with an indexer in every layer."""

from typing import Any

from tmjax.models.families import deepseek_v3, indexers, latent
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields
from tmjax.models.spec import DecoderSpec

DEFAULTS = deepseek_v3.DEFAULTS | {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    return indexers.read(view, values, DEFAULTS, tuple(range(values["layers"])))


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return indexers.write(spec)


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 163840),
    without=latent.OWN,
)
FURTHER = deepseek_v3.FURTHER
FAMILY = Family("deepseek_v32", "DeepseekV32ForCausalLM", FIELDS, latent.params, {}, _read, _write, FURTHER)
