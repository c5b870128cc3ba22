"""MiniMax M2: partial rotary, q and k normed over all heads, a sigmoid router with a bias of the choice."""

from dataclasses import replace
from typing import Any

from tmjax.models.experts.mixture import Experts
from tmjax.models.families import mixtral
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import expert_rows, ignore_training
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec

NAMES = replace(mixtral.NAMES, bias="block_sparse_moe.e_score_correction_bias")


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec, NAMES))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    count, chosen = view.take("num_local_experts", 256), view.take("num_experts_per_tok", 8)
    fraction = view.take("rotary_dim", values["head_dim"]) / values["head_dim"]
    keys = RotaryKeys(theta=5e6, fraction=fraction, fraction_key="partial_rotary_factor")
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], keys),
        "experts": Experts(count, chosen, values["mlp"], router="sigmoid", choice_bias=True),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    experts = {"num_local_experts": spec.experts.count, "num_experts_per_tok": spec.experts.chosen}
    return write_activation(spec) | write_rotary(spec, fraction=True) | experts


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 196608),
    Field("head_dim", "head_dim", 128),
    Field("num_key_value_heads", "kv_heads", 8),
)
FAMILY = Family("minimax_m2", "MiniMaxM2ForCausalLM", FIELDS, _params, {"qk_norm": "full"}, _read, _write)
