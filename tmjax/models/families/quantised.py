"""Quantised checkpoints, recognised and named from their `config.json`: float8, MXFP4 and NVFP4 are read."""

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


def is_float8(settings: Any) -> bool:
    """Returns whether settings of a quantisation say float8 weights, with a scale per tensor, channel or block.

    Known are those of transformers (`fp8`), compressed-tensors and modelopt; the latter's also from the file
    `hf_quant_config.json`.
    """
    if not isinstance(settings, dict):
        return False
    method, algorithm = settings.get("quant_method"), settings.get("quant_algo")
    if method == "fp8":
        return algorithm in (None, "FP8") and str(settings.get("fmt", "e4m3")).endswith(("e4m3", "e4m3fn"))
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        eight = [
            isinstance(each, dict) and each.get("type") == "float" and each.get("num_bits") == 8 for each in weights
        ]
        return bool(eight) and all(eight) and settings.get("format") in (None, "float-quantized", "naive-quantized")
    return method in (None, "modelopt") and algorithm == "FP8"


def is_mxfp4(settings: Any) -> bool:
    """Returns whether settings of a quantisation say MXFP4, as that of transformers does."""
    return isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"


def is_nvfp4(settings: Any) -> bool:
    """Returns whether settings of a quantisation say NVFP4 weights, as those of modelopt do."""
    if not isinstance(settings, dict):
        return False
    return settings.get("quant_method") in (None, "modelopt") and settings.get("quant_algo") == "NVFP4"


def is_read(settings: Any) -> bool:
    """Returns whether weights of such a quantisation are read."""
    return is_float8(settings) or is_mxfp4(settings) or is_nvfp4(settings)


def packed_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the settings of a config's quantisation; None if it declares none, or one that is not read."""
    return next((config[key] for key in _KEYS if is_read(config.get(key))), None)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the dequantised model."""
    return {key: value for key, value in config.items() if key not in _KEYS}


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
