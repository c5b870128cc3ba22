"""OLMo 3: OLMo 2 with windows in three of four layers, which have a rotary embedding of their own."""

from typing import Any

from tmjax.models.families import olmo2
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import (
    ConfigView,
    attention_biases,
    read_activation,
    read_windows,
    write_activation,
    write_windows,
)
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import RotaryKeys, read_rotaries_by_kind, write_rotaries_by_kind
from tmjax.models.spec import DecoderSpec


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["layers"]
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    size = None if view.null("sliding_window") else view.take("sliding_window", 4096)
    kinds, windows = read_windows(view, layers, size, kinds)
    # As transformers has it: an old `rope_theta` is that of layers without a window.
    full, own = (RotaryKeys(theta=theta) for theta in (view.take("rope_theta", THETA, float), THETA))
    rotary, local = read_rotaries_by_kind(view, values["max_positions"], full, own)
    return {
        "activation": read_activation(view, default="silu"),
        "rotary": rotary,
        "local_rotary": local,
        "layer_rotary": tuple(int(kind == "sliding_attention") for kind in kinds),
        "windows": windows,
        **attention_biases(view),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = {"attention_bias": spec.qkv_bias}
    return write_activation(spec) | write_rotaries_by_kind(spec) | write_windows(spec) | settings


THETA = 500000.0
FIELDS = fields(Field("rms_norm_eps", "norm_eps", 1e-5, float))
FAMILY = Family("olmo3", "Olmo3ForCausalLM", FIELDS, llama_like, olmo2.FIXED, _read, _write)
