"""GPT-Neo: GPT-2 with windows in every other layer and unscaled attention scores, weights stored [out, in]."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import gpt2
from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import attention, gpt2_like, head_size, linear
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec, ParamSpec

_KINDS = ("global", "local")


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    layer = "transformer.h.{layer}"
    return gpt2_like(
        spec,
        attention=attention(f"{layer}.attn.attention", spec, o="out_proj"),
        mlp=(*linear(f"{layer}.mlp.c_fc", "up", bias=True), *linear(f"{layer}.mlp.c_proj", "down", bias=True)),
    )


def _kinds(view: ConfigView, layers: int) -> list[str]:
    """The kind of attention of every layer; `attention_layers` only repeats what `attention_types` says."""
    types = view.take("attention_types", [[[_KINDS[number % 2] for number in range(layers)], 1]], list)
    view.take("attention_layers", [], list)
    try:
        kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise InputError(f"config.json: attention_types {types} does not describe {layers} layers")
    return kinds


def _read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    size, kinds = view.take("window_size", 256), _kinds(view, values["layers"])
    windows = tuple(size if kind == "local" else FULL_ATTENTION for kind in kinds)
    return {
        "kv_heads": values["heads"],
        "head_dim": head_size(values),
        "activation": read_activation(view, "activation_function", default="gelu_new"),
        "attention_scale": 1.0,
        "windows": windows if "local" in kinds else (),
    }


def _write(spec: DecoderSpec) -> dict[str, Any]:
    kinds = [_KINDS[window != FULL_ATTENTION] for window in spec.layer_windows]
    sizes = {window for window in spec.windows if window != FULL_ATTENTION}
    windows = {"attention_types": [[kinds, 1]], "window_size": max(sizes, default=256)}
    return write_activation(spec, "activation_function") | windows


FIELDS = (
    Field("vocab_size", "vocab"),
    Field("hidden_size", "hidden"),
    Field("num_layers", "layers"),
    Field("num_heads", "heads"),
    Field("intermediate_size", "mlp", lambda read: 4 * read["hidden"]),
    Field("max_position_embeddings", "max_positions", 2048),
    Field("layer_norm_epsilon", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", True, bool),
)
FAMILY = Family("gpt_neo", "GPTNeoForCausalLM", FIELDS, _params, gpt2.FIXED | {"qkv_bias": False}, _read, _write)
