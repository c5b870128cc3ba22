"""Gemma 3 (text): Gemma 2 with norms on q and k, and a rotary embedding of their own for layers with a window."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import gemma, gemma2
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_windows, write_activation, write_windows
from tmjax.models.families.layout import fields
from tmjax.models.families.rope import RotaryKeys, read_rotaries_by_kind, write_rotaries_by_kind
from tmjax.models.spec import DecoderSpec

FIELDS = fields(
    *(f for f in gemma2.FIELDS if f.attribute in ("head_dim", "kv_heads", "tied_embeddings")),
    Field("max_position_embeddings", "max_positions", 131072),
)


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["layers"]
    pattern = view.take("_sliding_window_pattern", view.take("sliding_window_pattern", 6))
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    size = None if view.null("sliding_window") else view.take("sliding_window", 4096)
    kinds, windows = read_windows(view, layers, size, kinds)
    thetas = view.take("rope_theta", 1e6, float), view.take("rope_local_base_freq", 1e4, float)
    rotary, local = read_rotaries_by_kind(view, values["max_positions"], *(RotaryKeys(theta=t) for t in thetas))
    caps = gemma2.caps(view, attention=None, logits=None)
    if caps["attention_cap"] is not None:  # transformers has the key here and applies nothing
        raise InputError("config.json: attn_logit_softcapping is not supported for gemma3_text")
    return (
        gemma.common(view, values, "hidden_activation")
        | caps
        | {
            "rotary": rotary,
            "local_rotary": local,
            "layer_rotary": tuple(int(kind == "sliding_attention") for kind in kinds),
            "windows": windows,
        }
    )


def _write(spec: DecoderSpec) -> dict[str, Any]:
    settings = write_rotaries_by_kind(spec)
    return write_activation(spec, "hidden_activation") | gemma2.write_caps(spec) | write_windows(spec) | settings


FIXED = gemma2.FIXED | {"qk_norm": "head"}
FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", FIELDS, gemma2.params, FIXED, _read, _write)
