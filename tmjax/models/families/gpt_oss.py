"""gpt-oss: a window and a sink in attention, experts with biases whose gates and inputs lie alternating, cut units."""

import math
from dataclasses import replace
from typing import Any

from tmjax.models.experts.mixture import Experts
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, attention_biases, read_windows, write_windows
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import ignore_training
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec, Part, Rotary


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer, width = "model.layers.{layer}", 2 * spec.experts.width
    own, router, into = f"{layer}.mlp.experts", f"{layer}.mlp.router", ("experts", "expert_mlp", "embed")
    rows = [
        ParamSpec(f"{layer}.self_attn.sinks", "blocks.sinks", ("head_count",)),
        ParamSpec(f"{router}.weight", "moe_blocks.router.weight", ("routes", "embed")),
        ParamSpec(f"{router}.bias", "moe_blocks.router.logit_bias", ("routes",)),
    ]
    for start, path in enumerate(("moe_blocks.gate", "moe_blocks.up")):
        part = Part(start=start, total=width, axis=1, step=2)
        turned = replace(part, transposed=True)
        rows.append(ParamSpec(f"{own}.gate_up_proj", f"{path}.weight", into, part=turned))
        rows.append(ParamSpec(f"{own}.gate_up_proj_bias", f"{path}.bias", into[:2], part=part))
    part, out = Part(axis=1, transposed=True), ("experts", "embed", "expert_mlp")
    rows.append(ParamSpec(f"{own}.down_proj", "moe_blocks.down.weight", out, part=part))
    rows.append(ParamSpec(f"{own}.down_proj_bias", "moe_blocks.down.bias", out[:2]))
    return llama_like(spec, mlp_rows=tuple(rows))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    view.take("hidden_act", "silu", str)  # transformers has one activation, whatever this is
    scaled = view.take("rope_parameters", view.take("rope_scaling", {}, dict), dict)
    count, chosen = view.take("num_local_experts", view.take("num_experts", 128)), view.take("num_experts_per_tok", 4)
    limit, gain = view.take("swiglu_limit", 7.0, float), view.take("swiglu_alpha", 1.702, float)
    kinds = [("sliding_attention", "full_attention")[number % 2] for number in range(values["layers"])]
    size = None if view.null("sliding_window") else view.take("sliding_window", 128)
    given = read_rotary(view, values["max_positions"], KEYS)
    return attention_biases(view, default=True) | {
        "rotary": given if scaled else replace(ROTARY, theta=given.theta),
        "windows": read_windows(view, values["layers"], size, kinds)[1],
        "experts": Experts(count, chosen, values["mlp"], logit_bias=True, bias=True, limit=limit, gain=gain),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    own = spec.experts
    experts = {"num_local_experts": own.count, "num_experts_per_tok": own.chosen, "attention_bias": spec.qkv_bias}
    experts |= {"swiglu_limit": own.limit, "swiglu_alpha": own.gain}
    windows = write_windows(spec)
    windows["sliding_window"] = windows["sliding_window"] or 128  # transformers needs one
    return write_rotary(spec) | windows | experts


KEYS = RotaryKeys(theta=150000.0)
#: Without any settings.
ROTARY = Rotary(scaling="yarn", factor=32.0, original_positions=4096, truncate=False)
ROTARY = replace(ROTARY, attention_factor=0.1 * math.log(ROTARY.factor) + 1.0)
FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 131072),
    Field("head_dim", "head_dim", 64),
    Field("num_key_value_heads", "kv_heads", 8),
    Field("rms_norm_eps", "norm_eps", 1e-5, float),
)
FAMILY = Family("gpt_oss", "GptOssForCausalLM", FIELDS, _params, {"sinks": True}, _read, _write)
