"""Rotary settings of a config: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.config_values import ConfigView, Kind, check_kind
from tmjax.models.families.unread import known_rope_keys
from tmjax.models.spec import DecoderSpec, Rotary

#: Rotary scaling: type -> config key -> (attribute of `Rotary`, its type); keys in OPTIONAL may be missing.
_SCALING: dict[str, dict[str, tuple[str, Kind]]] = {
    "default": {},
    "linear": {"factor": ("factor", float)},
    "dynamic": {"factor": ("factor", float)},
    "llama3": {
        "factor": ("factor", float),
        "low_freq_factor": ("low_freq_factor", float),
        "high_freq_factor": ("high_freq_factor", float),
        "original_max_position_embeddings": ("original_positions", float),
    },
    "yarn": {
        "factor": ("factor", float),
        "original_max_position_embeddings": ("original_positions", int),
        "beta_fast": ("beta_fast", float),
        "beta_slow": ("beta_slow", float),
        "truncate": ("truncate", bool),
        "attention_factor": ("attention_factor", float),
    },
    "longrope": {
        "short_factor": ("short_factors", list),
        "long_factor": ("long_factors", list),
        "original_max_position_embeddings": ("original_positions", int),
        "factor": ("factor", float),
        "attention_factor": ("attention_factor", float),
    },
}
OPTIONAL = frozenset({"beta_fast", "beta_slow", "truncate", "attention_factor"})
#: Remark on the key `attn_factor`, by which some released models mean more than transformers computes.
REMARK = " (vLLM multiplies the attention factor by attn_factor, so its numbers differ from those of transformers)"
#: Keys that only say how `attention_factor` is found.
_MSCALE = ("mscale", "mscale_all_dim")


@dataclass(frozen=True)
class RotaryKeys:
    """Keys of the rotary settings in a family's configs, and the meaning of missing keys.

    Attributes:
        theta: Base of the frequencies.
        theta_key: Key of the base.
        fraction: Part of a head's dimensions that rotates.
        fraction_key: Key of that part; None: the family has none.
        original: Context length before scaling, which wins over one inside the scaling's settings; 0: none.
        interleaved: Whether neighbouring dimensions rotate together.
        scalings: Kinds of scaling that the family knows.
        aliases: Other names of these kinds.
    """

    theta: float = 10000.0
    theta_key: str = "rope_theta"
    fraction: float = 1.0
    fraction_key: str | None = None
    original: int = 0
    interleaved: bool = False
    scalings: tuple[str, ...] = tuple(_SCALING)
    aliases: Mapping[str, str] = field(default_factory=dict)


def read_rotary(view: ConfigView, max_positions: int, keys: RotaryKeys | None = None) -> Rotary:
    """Reads the rotary embedding of a config.

    Args:
        view: The config.
        max_positions: Context length of the model.
        keys: Spelling and defaults of the family; None: those of Llama.

    Raises:
        InputError: A setting is missing, unknown or out of range; names it.
    """
    keys = RotaryKeys() if keys is None else keys
    new, old = (view.take(key, {}, dict) for key in ("rope_parameters", "rope_scaling"))
    theta = view.take(keys.theta_key, keys.theta, float)
    settings = dict(old or new)  # the order in which transformers looks
    fraction = keys.fraction
    if keys.fraction_key is not None:
        fraction = settings.pop("partial_rotary_factor", view.take(keys.fraction_key, fraction, float))
        check_kind("partial_rotary_factor", fraction, float)
    original = view.take("original_max_position_embeddings", keys.original, zero=True)
    resolved = replace(keys, theta=theta, fraction=float(fraction), original=original)
    return rotary_of(view, settings, max_positions, resolved)


def rotary_of(view: ConfigView, settings: Mapping[str, Any], max_positions: int, keys: RotaryKeys) -> Rotary:
    """Reads the rotary embedding that one dictionary of settings describes.

    Args:
        view: The config, in which keys that no kind of scaling reads in transformers are noted.
        settings: The dictionary.
        max_positions: Context length of the model.
        keys: Values found outside of the dictionary, of which the original context length wins.

    Raises:
        InputError: A setting is missing, unknown or out of range; names it.
    """
    settings = dict(settings)
    kind = settings.pop("rope_type", None) or settings.get("type") or "default"
    kind = keys.aliases.get(kind, kind) if isinstance(kind, str) else kind
    settings.pop("type", None)
    theta = settings.pop("rope_theta", keys.theta)
    check_kind("rope_theta", theta, float)
    if not isinstance(kind, str) or kind not in keys.scalings:
        supported = ", ".join(keys.scalings)
        raise InputError(f"config.json: rope scaling {kind!r} is not supported; supported are {supported}")
    expected = _SCALING[kind]
    scales = [settings.pop(key, None) for key in _MSCALE] if kind == "yarn" else [None, None]
    if "original_max_position_embeddings" in expected:
        settings["original_max_position_embeddings"] = keys.original or settings.get(
            "original_max_position_embeddings", max_positions
        )
    settings = {key: value for key, value in settings.items() if value is not None}
    if kind in ("yarn", "longrope") and "factor" not in settings:
        settings["factor"] = max_positions / settings["original_max_position_embeddings"]
    idle = {key for key, value in settings.items() if key not in known_rope_keys() and not isinstance(value, dict)}
    _note_idle(view, kind, idle)
    settings = {key: value for key, value in settings.items() if key not in idle}
    unknown, missing = settings.keys() - expected.keys(), expected.keys() - settings.keys() - OPTIONAL
    if unknown or missing:
        named = [f"lacks {key}" for key in sorted(missing)] + [f"has unknown {key}" for key in sorted(unknown)]
        raise InputError(f"config.json: rope scaling {kind!r} {', '.join(named)}")
    values: dict[str, Any] = {}
    for key, value in settings.items():
        attribute, value_kind = expected[key]
        check_kind(key, value, value_kind)
        if value_kind is list:
            for number in value:
                check_kind(key, number, float)
        values[attribute] = tuple(float(x) for x in value) if value_kind is list else value
    if kind == "dynamic":
        values["original_positions"] = max_positions
    rotary = Rotary(float(theta), kind, fraction=keys.fraction, interleaved=keys.interleaved, **values)
    if "attention_factor" not in values:
        values["attention_factor"] = _attention_factor(rotary, *scales)
    rotary = Rotary(float(theta), kind, fraction=keys.fraction, interleaved=keys.interleaved, **values)
    if kind == "llama3" and rotary.high_freq_factor <= rotary.low_freq_factor:
        raise InputError("config.json: high_freq_factor must be larger than low_freq_factor")
    if kind == "yarn" and rotary.beta_fast < rotary.beta_slow:
        raise InputError("config.json: beta_fast must not be smaller than beta_slow")
    return rotary


def _note_idle(view: ConfigView, kind: str, idle: Collection[str]) -> None:
    """Notes the keys of rotary settings that no kind of scaling reads."""
    if idle:
        view.note(
            f"without effect, since transformers does not read it in a rope scaling {kind!r} either:"
            f" {', '.join(sorted(idle))}{REMARK if 'attn_factor' in idle else ''}"
        )


def _attention_factor(rotary: Rotary, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Default factor of cosines and sines for configs without one (YaRN section 3.4; LongRoPE)."""

    def scaled(by: float) -> float:
        return 1.0 if rotary.factor <= 1 else 0.1 * by * math.log(rotary.factor) + 1.0

    if rotary.scaling == "yarn":
        return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)
    if rotary.scaling == "longrope" and rotary.factor > 1:
        return math.sqrt(1 + math.log(rotary.factor) / math.log(rotary.original_positions))
    return 1.0


def write_settings(rotary: Rotary, *, fraction: bool = False) -> dict[str, Any]:
    """One rotary embedding as transformers 5 spells it."""
    settings: dict[str, Any] = {"rope_type": rotary.scaling, "rope_theta": rotary.theta}
    for key, (attribute, _) in _SCALING[rotary.scaling].items():
        value = getattr(rotary, attribute)
        settings[key] = list(value) if isinstance(value, tuple) else value
    return settings | ({"partial_rotary_factor": rotary.fraction} if fraction else {})


def write_rotary(spec: DecoderSpec, *, fraction: bool = False) -> dict[str, Any]:
    """The rotary settings of a spec as transformers 5 spells them."""
    return {"rope_parameters": write_settings(spec.rotary, fraction=fraction)}


#: Kinds of layers in the order of their rotary embeddings.
_LAYER_KINDS = ("full_attention", "sliding_attention")


def read_rotaries_by_kind(
    view: ConfigView, max_positions: int, full: RotaryKeys, local: RotaryKeys
) -> tuple[Rotary, Rotary]:
    """Reads the rotary embeddings of layers without and with a window: nested settings, or older keys for the former.

    Args:
        view: The config.
        max_positions: Context length of the model.
        full: Defaults of layers without a window.
        local: Defaults of layers with one.

    Raises:
        InputError: A setting is missing, unknown or out of range; names it.
    """
    new, old = (view.take(key, {}, dict) for key in ("rope_parameters", "rope_scaling"))
    unknown = new.keys() - set(_LAYER_KINDS)
    if unknown:
        raise InputError(f"config.json: rope_parameters has unknown {', '.join(sorted(unknown))}")
    settings = [dict(new.get(kind) or {}) for kind in _LAYER_KINDS]
    settings[0] |= old
    first, second = (
        rotary_of(view, each, max_positions, keys) for each, keys in zip(settings, (full, local), strict=True)
    )
    return first, second


def write_rotaries_by_kind(spec: DecoderSpec) -> dict[str, Any]:
    """The settings that `read_rotaries_by_kind` reads."""
    pairs = zip(_LAYER_KINDS, spec.rotaries, strict=True)
    return {"rope_parameters": {kind: write_settings(rotary) for kind, rotary in pairs}}
