"""Granite 3 mixtures: Granite's multipliers; all experts of a layer in one tensor, gate and up below each other."""

from typing import Any

from tmjax.models.experts.mixture import Experts
from tmjax.models.families import granite
from tmjax.models.families.base import Family
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.mixtures import ignore_training
from tmjax.models.spec import DecoderSpec, ParamSpec, Part


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    own, width = "model.layers.{layer}.block_sparse_moe", spec.experts.width
    into = ("experts", "expert_mlp", "embed")
    gate, up = (Part(start=start, total=2 * width, axis=1) for start in (0, width))
    rows = (
        ParamSpec(f"{own}.router.layer.weight", "moe_blocks.router.weight", ("routes", "embed")),
        ParamSpec(f"{own}.input_linear.weight", "moe_blocks.gate.weight", into, part=gate),
        ParamSpec(f"{own}.input_linear.weight", "moe_blocks.up.weight", into, part=up),
        ParamSpec(f"{own}.output_linear.weight", "moe_blocks.down.weight", ("experts", "embed", "expert_mlp")),
    )
    return llama_like(spec, mlp_rows=rows)


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    ignore_training(view)
    count, chosen = view.take("num_local_experts", 8), view.take("num_experts_per_tok", 2)
    # Its softmax over the chosen logits gives the scores of a softmax over all, divided by their sum.
    return granite.read(view, values) | {"experts": Experts(count, chosen, values["mlp"])}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    experts = {"num_local_experts": spec.experts.count, "num_experts_per_tok": spec.experts.chosen}
    return granite.write(spec) | experts


FAMILY = Family("granitemoe", "GraniteMoeForCausalLM", fields(), _params, {}, _read, _write)
