"""Writes PEFT adapters of the kind LoRA: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.checkpoints.formats.adapter import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS
from tmjax.checkpoints.formats.safetensors import SINGLE_NAME
from tmjax.checkpoints.formats.writer import TensorMeta, write_tensors
from tmjax.files.atomic import write_json

#: Of a module: its matrices A [r, in] and B [out, r].
Matrices = tuple[np.ndarray, np.ndarray]


def module_of(name: str) -> str:
    """Returns the part of a weight's name that the modules of all layers end in, from its name with `{layer}`."""
    return name.split("{layer}.")[1].removesuffix(".weight")


def write_lora(
    directory: Path,
    modules: Mapping[str, Matrices],
    targets: Iterable[str],
    *,
    base: str,
    rank: int,
    alpha: float,
    **settings: Any,
) -> None:
    """Writes the matrices of modules as a LoRA.

    Args:
        directory: An existing folder.
        modules: Matrices by the full name of the module.
        targets: Endings of the names of all modules.
        base: Name of the model that the adapter belongs to.
        rank: The rank r of a module.
        alpha: An update is alpha / r times B A.
        **settings: Further keys of the configuration.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
    }
    write_json(directory / ADAPTER_CONFIG, config | settings)
    tensors = {
        f"{ADAPTER_PREFIX}{name}.lora_{side}.weight": matrix
        for name, matrices in modules.items()
        for side, matrix in zip("AB", matrices, strict=True)
    }
    metas = [TensorMeta(name, np.dtype(np.float32), value.shape) for name, value in tensors.items()]
    write_tensors(directory, metas, lambda name: np.asarray(tensors[name], np.float32), max_shard_size="1000GB")
    (directory / SINGLE_NAME).rename(directory / ADAPTER_WEIGHTS)
