"""LoRA matrices as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`, names from the family tables.

Where several of our projections lie in one tensor on disk (fused q, k, v), the adapter of that module holds their A
matrices below each other and their B matrices side by side, each in the rows of its own part: the same product, of the
rank of all parts together.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tmjax.checkpoints.formats.adapter_writer import Matrices, module_of, write_lora
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.sharding.hosts import to_host
from tmjax.train.modes import Lora
from tmjax.typing import Params


def write_adapter(
    mode: Lora, spec: DecoderSpec, param_specs: tuple[ParamSpec, ...], trained: Params, directory: Path, *, base: str
) -> None:
    """Writes an adapter.

    Args:
        mode: Rank, scale and paths of the updates.
        spec: The architecture.
        param_specs: The rows of the family table.
        trained: The matrices A and B, by path.
        directory: An existing folder.
        base: Name of the model that the adapter belongs to.
    """
    modules: dict[str, list[ParamSpec]] = {}
    for row in param_specs:
        if row.path in mode.paths:
            modules.setdefault(row.hf, []).append(row)
    matrices_of: dict[str, Matrices] = {}
    pattern = {}
    for hf, parts in modules.items():
        matrices = [
            tuple(np.asarray(x) for x in to_host([trained[f"lora_{side}.{row.path}"] for side in "ab"]))
            for row in parts
        ]
        rank = mode.rank * len(parts)
        for layer in range(spec.layers):
            name = hf.format(layer=layer).removesuffix(".weight")
            below = np.concatenate([a[layer] for a, _ in matrices])
            matrices_of[name] = below, _placed(parts, spec, [b[layer] for _, b in matrices])
        if len(parts) > 1:
            pattern[module_of(hf)] = rank
    transposed = any(row.part is not None and row.part.transposed for part in modules.values() for row in part)
    write_lora(
        directory,
        matrices_of,
        map(module_of, modules),
        base=base,
        rank=mode.rank,
        alpha=mode.alpha,
        fan_in_fan_out=transposed,
        # The factor alpha / rank stays that of one part.
        rank_pattern=pattern,
        alpha_pattern={name: mode.alpha * rank / mode.rank for name, rank in pattern.items()},
    )


def _placed(parts: list[ParamSpec], spec: DecoderSpec, values: list[np.ndarray]) -> np.ndarray:
    """Returns B of a module [rows on disk, rank]: each part's [out, rank] in its own rows and its own columns."""
    ranks: Mapping[int, int] = {i: value.shape[1] for i, value in enumerate(values)}
    if parts[0].part is None:
        return values[0]
    total = replace(parts[0].part, transposed=False).disk_shape((parts[0].shape(spec)[0], sum(ranks.values())))
    result = np.zeros(total, np.float32)
    start = 0
    for row, value in zip(parts, values, strict=True):
        columns = result[:, start : start + value.shape[1]]
        view = replace(row.part, transposed=False).view(columns, value.shape)
        view[...] = value.reshape(view.shape)
        start += value.shape[1]
    return result
