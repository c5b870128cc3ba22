"""Quantised checkpoints, as their `config.json` says it: recognised and named, never read."""

from collections.abc import Mapping
from typing import Any

from tmjax.errors import InputError

ADVICE = "dequantise it first or give the checkpoint that it was made from"
_KEYS = ("quantization_config", "compression_config")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How a config says that the weights are packed, for people; None if it does not say so.

    A multimodal wrapper may say it in the config of its text model.
    """
    if _is_mlx(config):
        return f"an MLX checkpoint with {config['quantization']['bits']}-bit weights"
    for held in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if held.get(key) is not None:
                return _told(key, held[key])
    return None


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises InputError if a config says that the weights are packed."""
    held = quantisation(config)
    if held is None:
        return
    if _is_mlx(config):
        raise InputError(
            f"the checkpoint is quantised (quantization in config.json: {held}); write it unpacked with mlx_lm.convert"
            " --dequantize or give the Hugging Face checkpoint that it was made from"
        )
    raise InputError(f"the checkpoint is quantised ({held} in config.json); {ADVICE}")


def _is_mlx(config: Mapping[str, Any]) -> bool:
    held = config.get("quantization")
    return isinstance(held, dict) and {"group_size", "bits"} <= held.keys()


def _told(key: str, value: Any) -> str:
    """The key and what it says of the method and the number format."""
    names = ("quant_method", "quant_algo", "fmt")
    told = [value[name] for name in names if isinstance(value.get(name), str)] if isinstance(value, dict) else []
    return ", ".join((key, *dict.fromkeys(told)))
