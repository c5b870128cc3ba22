"""Mixtral: Mistral's attention, and in every layer experts one by one, whose scores sum to 1."""

from typing import Any

from tmjax.models.experts.mixture import Experts
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mistral import read_window
from tmjax.models.families.mixtures import Names, expert_rows, ignore_training
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec

NAMES = Names("block_sparse_moe.gate", experts="block_sparse_moe.experts.{expert}", projections=("w1", "w3", "w2"))


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec, NAMES))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    count, chosen = view.take("num_local_experts", 8), view.take("num_experts_per_tok", 2)
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], RotaryKeys(theta=1e6)),
        "windows": read_window(view, values["layers"], None),
        "experts": Experts(count, chosen, values["mlp"]),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    experts = {"num_local_experts": spec.experts.count, "num_experts_per_tok": spec.experts.chosen}
    window = {"sliding_window": max(spec.windows, default=None)}
    return write_activation(spec) | write_rotary(spec) | window | experts


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 131072),
    Field("num_key_value_heads", "kv_heads", 8),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
)
FAMILY = Family("mixtral", "MixtralForCausalLM", FIELDS, _params, {}, _read, _write)
