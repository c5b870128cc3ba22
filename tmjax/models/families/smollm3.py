"""SmolLM 3: Llama's layout; some layers have no rotary embedding."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import llama
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import (
    ConfigView,
    attention_biases,
    read_activation,
    read_windows,
    write_windows,
)
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotary
from tmjax.models.spec import DecoderSpec, Rotary

NOWHERE = Rotary(scaling="none")


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["layers"]
    interval = view.take("no_rope_layer_interval", 4)
    turning = view.take("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)], list)
    if len(turning) != layers or not all(flag in (0, 1) for flag in turning):
        raise InputError(f"config.json: no_rope_layers {turning} does not describe {layers} layers")
    use = view.take("use_sliding_window", False, bool)
    size = view.take("sliding_window", None)
    kinds = ["full_attention" if flag or not use or size is None else "sliding_attention" for flag in turning]
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"], RotaryKeys(theta=2e6)),
        "local_rotary": NOWHERE,
        "layer_rotary": tuple(1 - flag for flag in turning),
        "windows": read_windows(view, layers, size if use else None, kinds)[1],
        **attention_biases(view),
        "mlp_bias": view.take("mlp_bias", False, bool),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    turning = [1 - kind for kind in spec.layer_rotaries]
    return (
        llama.write(spec) | write_windows(spec) | {"no_rope_layers": turning, "use_sliding_window": bool(spec.windows)}
    )


FIELDS = fields(
    Field("num_key_value_heads", "kv_heads", 4),
    Field("max_position_embeddings", "max_positions", 32768),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FAMILY = Family("smollm3", "SmolLM3ForCausalLM", FIELDS, llama_like, {}, _read, _write)
