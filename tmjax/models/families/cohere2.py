"""Cohere's Command R7B and A: Cohere with windows; layers without one have no rotary embedding."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import cohere
from tmjax.models.families.base import Family
from tmjax.models.families.config_values import ConfigView, read_windows, write_windows
from tmjax.models.families.layout import llama_like
from tmjax.models.spec import DecoderSpec, Rotary


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers, own = values["layers"], values["hidden"] // values["heads"]
    if values["head_dim"] != own:
        raise InputError(f"config.json: head_dim {values['head_dim']} is not hidden_size / num_attention_heads, {own}")
    pattern = view.take("sliding_window_pattern", 4)
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    size = None if view.null("sliding_window") else view.take("sliding_window", 4096)
    kinds, windows = read_windows(view, layers, size, kinds)
    # Without a window nothing rotates anywhere: the model asks for the window, not for the kind of layer.
    still = [kind == "full_attention" or size is None for kind in kinds]
    return cohere.common(view, values, theta=10000.0) | {
        "local_rotary": Rotary(scaling="none", interleaved=True),
        "layer_rotary": tuple(int(flag) for flag in still),
        "windows": windows,
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return cohere.write_common(spec) | write_windows(spec)


FAMILY = Family("cohere2", "Cohere2ForCausalLM", cohere.FIELDS, llama_like, cohere.FIXED, _read, _write)
