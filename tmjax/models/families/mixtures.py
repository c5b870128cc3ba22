"""Tables and settings that families of mixtures of experts share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmjax.errors import InputError
from tmjax.models.experts.mixture import Experts
from tmjax.models.families.config_values import ConfigView
from tmjax.models.families.layout import gated_mlp
from tmjax.models.spec import DecoderSpec, ParamSpec, Part

#: Keys of training that change nothing at inference, where all experts that are chosen compute.
IDLE = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")


@dataclass(frozen=True)
class Names:
    """Names of an expert layer's tensors behind the layer's own.

    Attributes:
        router: Module of the router.
        bias: Tensor of the bias of the choice.
        experts: Module of one expert.
        projections: Names of gate, up and down in an expert.
        shared: Module of the shared expert.
        shared_gate: Module of its gate.
        bias_row: Whether the bias lies as the only row of a matrix.
    """

    router: str = "mlp.gate"
    bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts.{expert}"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    bias_row: bool = False


_INTO, _OUT = ("expert_mlp", "embed"), ("embed", "expert_mlp")


def expert_rows(
    spec: DecoderSpec, names: Names | None = None, layer: str = "model.layers.{layer}"
) -> tuple[ParamSpec, ...]:
    """Rows of expert layers whose experts lie one by one, and of the MLPs of dense layers."""
    assert spec.experts is not None
    names = Names() if names is None else names
    router = "moe_blocks.router"
    rows = [ParamSpec(f"{layer}.{names.router}.weight", f"{router}.weight", ("routes", "embed"), layers="sparse")]
    if spec.experts.choice_bias:
        part = Part(row=True) if names.bias_row else None
        rows.append(ParamSpec(f"{layer}.{names.bias}", f"{router}.bias", ("routes",), part=part, layers="sparse"))
    parts = tuple(zip(("gate", "up", "down"), names.projections, (_INTO, _INTO, _OUT), strict=True))
    for role, name, axes in parts:
        hf = f"{layer}.{names.experts}.{name}.weight"
        rows.append(ParamSpec(hf, f"moe_blocks.{role}.weight", ("experts", *axes), layers="sparse"))
    for role, name, axes in parts if spec.experts.shared_width else ():
        axes = tuple("shared_mlp" if axis == "expert_mlp" else axis for axis in axes)
        hf = f"{layer}.{names.shared}.{name}.weight"
        rows.append(ParamSpec(hf, f"moe_blocks.shared_{role}.weight", axes, layers="sparse"))
    if spec.experts.shared_gate:
        hf = f"{layer}.{names.shared_gate}.weight"
        rows.append(ParamSpec(hf, "moe_blocks.shared_scale.weight", ("single", "embed"), layers="sparse"))
    return (*rows, *(dense_rows(spec, layer) if spec.experts.dense else ()))


def dense_rows(spec: DecoderSpec, layer: str) -> tuple[ParamSpec, ...]:
    """Rows of the MLPs of dense layers; they have no role, since a mixture offers no sites inside an MLP."""
    return tuple(
        ParamSpec(row.hf, row.path.replace("blocks.", "dense_blocks."), row.axes, layers="dense")
        for row in gated_mlp(f"{layer}.mlp", spec)
    )


def ignore_training(view: ConfigView) -> None:
    """Takes the keys that matter in training alone."""
    view.take(IDLE[0], False, bool)
    for key in IDLE[1:]:
        view.take(key, 0.0, float, zero=True)


def qwen_experts(view: ConfigView, values: dict[str, Any], *, count: int, chosen: int, width: int) -> Experts:
    """Reads Qwen's settings of experts; `count`, `chosen` and `width` are the family's defaults."""
    ignore_training(view)
    layers = values["layers"]
    step = view.take("decoder_sparse_step", 1)
    plain = view.take("mlp_only_layers", [], list)
    if not all(type(layer) is int for layer in plain):
        raise InputError(f"config.json: mlp_only_layers {plain} is not a list of numbers")
    return Experts(
        count=view.take("num_experts", view.take("num_local_experts", count)),
        chosen=view.take("num_experts_per_tok", chosen),
        width=view.take("moe_intermediate_size", width),
        normalised=view.take("norm_topk_prob", False, bool),
        dense=tuple(layer for layer in range(layers) if layer in plain or (layer + 1) % step),
    )


def write_qwen_experts(spec: DecoderSpec) -> dict[str, Any]:
    """The inverse of `qwen_experts`."""
    assert spec.experts is not None
    return {
        "num_experts": spec.experts.count,
        "num_experts_per_tok": spec.experts.chosen,
        "moe_intermediate_size": spec.experts.width,
        "norm_topk_prob": spec.experts.normalised,
        "mlp_only_layers": list(spec.experts.dense),
    }


def read_experts(view: ConfigView, defaults: Mapping[str, Any], dense: tuple[int, ...]) -> Experts:
    """Reads the settings of experts as DeepSeek names them; `dense` are the layers without any."""
    ignore_training(view)
    width = view.take("moe_intermediate_size", defaults["moe_intermediate_size"])
    return Experts(
        count=view.take("n_routed_experts", view.take("num_local_experts", defaults["n_routed_experts"])),
        chosen=view.take("num_experts_per_tok", defaults["num_experts_per_tok"]),
        width=width,
        router="sigmoid",
        normalised=view.take("norm_topk_prob", True, bool),
        scale=float(view.take("routed_scaling_factor", defaults["routed_scaling_factor"], float)),
        choice_bias=True,
        groups=view.take("n_group", defaults["n_group"]),
        chosen_groups=view.take("topk_group", defaults["topk_group"]),
        shared_width=width * view.take("n_shared_experts", defaults["n_shared_experts"]),
        dense=dense,
    )


def write_experts(spec: DecoderSpec) -> dict[str, Any]:
    """Writes the settings that `read_experts` reads."""
    experts = spec.experts
    assert experts is not None
    return {
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalised,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.groups,
        "topk_group": experts.chosen_groups,
        "n_shared_experts": experts.shared_width // experts.width,
    }


def leading(view: ConfigView, layers: int, default: int) -> tuple[int, ...]:
    """Reads how many layers at the beginning have no experts; returns their numbers."""
    return tuple(range(min(layers, view.take("first_k_dense_replace", default, zero=True))))
