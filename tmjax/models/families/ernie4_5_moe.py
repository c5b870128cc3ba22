"""ERNIE 4.5 mixtures: interleaved rotary, dense layers among sparse ones, a bias of the choice, shared experts."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.experts.mixture import Experts, layers_of
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import Names, expert_rows, ignore_training
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec

NAMES = Names(bias="mlp.moe_statics.e_score_correction_bias", bias_row=True)


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return llama_like(spec, mlp_rows=expert_rows(spec, NAMES))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    if view.take("use_bias", False, bool):
        raise InputError("config.json: use_bias true gives the head a bias, which is not supported")
    if view.take("moe_norm_min", 1e-12, float) > 1e-6:
        raise InputError("config.json: moe_norm_min beyond 1e-6 is not supported")
    layers, width = values["layers"], view.take("moe_intermediate_size", 1536)
    start, step = view.take("moe_layer_start_index", 1, zero=True), view.take("moe_layer_interval", 1)
    last = view.last_layer("moe_layer_end_index", layers)
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], RotaryKeys(theta=5e5, interleaved=True)),
        "experts": Experts(
            view.take("moe_num_experts", 64),
            view.take("moe_k", 6),
            width,
            choice_bias=True,
            shared_width=width * view.take("moe_num_shared_experts", 2, zero=True),
            dense=tuple(n for n in range(layers) if not start <= n <= last or (n + 1) % step),
        ),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    experts, sparse = spec.experts, layers_of("sparse", spec.layers, spec.experts)
    return (
        write_activation(spec)
        | write_rotary(spec)
        | {
            "moe_num_experts": experts.count,
            "moe_k": experts.chosen,
            "moe_intermediate_size": experts.width,
            "moe_num_shared_experts": experts.shared_width // experts.width,
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        }
    )


FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 131072),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
    Field("num_key_value_heads", "kv_heads", 4),
)
FURTHER = ("model.mtp_",)
FAMILY = Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", FIELDS, _params, {}, _read, _write, FURTHER)
