"""StableLM 2: Llama's layout with layer norms, partial rotary, optionally parallel branches and a norm per head."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import attention, fields, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotary, write_rotary
from tmjax.models.spec import DecoderSpec, ParamSpec


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    own = "model.layers.{layer}.self_attn"
    # Every head's norm is a tensor of its own.
    norms = (
        ()
        if spec.qk_norm == "none"
        else tuple(
            ParamSpec(
                f"{own}.{side}_layernorm.norms.{{head}}.weight", f"blocks.{side}_norm.weight", (count, "head_dim")
            )
            for side, count in (("q", "head_count"), ("k", "kv_head_count"))
        )
    )
    rows = llama_like(spec, attention_rows=(*attention(own, spec), *norms))
    return tuple(row for row in rows if not row.hf.endswith((".q_norm.weight", ".k_norm.weight")))


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    parallel = view.take("use_parallel_residual", False, bool)
    return {
        "head_dim": values["hidden"] // values["heads"],
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], ROTARY),
        "qkv_bias": view.take("use_qkv_bias", False, bool),
        "qk_norm": "heads" if view.take("qk_layernorm", False, bool) else "none",
        "parallel": parallel,
        "shared_norm": parallel,
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = {
        "use_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm == "heads",
        "use_parallel_residual": spec.parallel,
    }
    return write_activation(spec) | write_rotary(spec, fraction=True) | settings


ROTARY = RotaryKeys(fraction=0.25, fraction_key="partial_rotary_factor")
FIXED = {"norm": "layer", "norm_bias": True}
FIELDS = fields(
    Field("max_position_embeddings", "max_positions", 4096),
    Field("layer_norm_eps", "norm_eps", 1e-5, float),
    without=("head_dim",),
)
FAMILY = Family("stablelm", "StableLmForCausalLM", FIELDS, _params, FIXED, _read, _write)
