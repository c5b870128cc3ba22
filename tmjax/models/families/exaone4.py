"""EXAONE 4: norms after both branches, queries and keys normed by head; only layers with a window turn them."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import (
    ConfigView,
    read_activation,
    read_windows,
    write_activation,
    write_windows,
)
from tmjax.models.families.layout import fields, llama_like
from tmjax.models.families.rope import read_rotary, write_rotary
from tmjax.models.families.smollm3 import NOWHERE
from tmjax.models.spec import DecoderSpec


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["layers"]
    size = None if view.null("sliding_window") else view.take("sliding_window", 4096)
    key, kinds = "sliding_window_pattern", None
    if view.is_text(key):  # a pattern in letters, as released, stands beside `layer_types`
        pattern = view.take(key, kind=str)
        if size is not None and not view.take("layer_types", [], list):
            raise InputError(f"config.json: {key} {pattern!r} needs layer_types beside it")
    else:
        pattern = view.take(key, 4, zero=size is None)
        if size is not None:
            kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    kinds, windows = read_windows(view, layers, size, kinds)
    result = {
        "activation": read_activation(view, default="silu"),
        "rotary": read_rotary(view, values["max_positions"]),
        "windows": windows,
    }
    if size is None:
        return result
    return result | {"local_rotary": NOWHERE, "layer_rotary": tuple(int(kind == "full_attention") for kind in kinds)}


def _write(spec: DecoderSpec) -> dict[str, Any]:
    windows = write_windows(spec)
    if spec.local_rotary is not None and windows["sliding_window"] is None:
        windows["sliding_window"] = 4096  # no layer has it, but with one none of them turns
    return write_activation(spec) | write_rotary(spec) | windows


FIXED = {"pre_norm": False, "post_norm": True, "qk_norm": "head"}
FIELDS = fields(Field("num_key_value_heads", "kv_heads", 32), Field("rms_norm_eps", "norm_eps", 1e-5, float))
FAMILY = Family("exaone4", "Exaone4ForCausalLM", FIELDS, llama_like, FIXED, _read, _write)
