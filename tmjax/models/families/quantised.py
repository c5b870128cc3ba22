"""Quantised checkpoints: recognised and named from their `config.json`, never read."""

from collections.abc import Mapping
from typing import Any

from tmjax.errors import InputError

ADVICE = "dequantise it first or give the checkpoint that it was made from"
_KEYS = ("quantization_config", "compression_config")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Describes the quantisation that a config declares; None without one.

    A multimodal wrapper may declare it in the config of its text model.
    """
    if _is_mlx(config):
        return f"an MLX checkpoint with {config['quantization']['bits']}-bit weights"
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if part.get(key) is not None:
                return _method_and_format(key, part[key])
    return None


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises InputError if a config declares quantised weights."""
    packing = quantisation(config)
    if packing is None:
        return
    if _is_mlx(config):
        raise InputError(
            f"the checkpoint is quantised (quantization in config.json: {packing}); write it unpacked with"
            " mlx_lm.convert --dequantize or give the Hugging Face checkpoint that it was made from"
        )
    raise InputError(f"the checkpoint is quantised ({packing} in config.json); {ADVICE}")


def _is_mlx(config: Mapping[str, Any]) -> bool:
    settings = config.get("quantization")
    return isinstance(settings, dict) and {"group_size", "bits"} <= settings.keys()


def _method_and_format(key: str, value: Any) -> str:
    """The key with the method and the number format that its value names."""
    names = ("quant_method", "quant_algo", "fmt")
    values = [value[name] for name in names if isinstance(value.get(name), str)] if isinstance(value, dict) else []
    return ", ".join((key, *dict.fromkeys(values)))
