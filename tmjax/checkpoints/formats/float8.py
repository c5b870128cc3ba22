"""Weights in float8 with scales beside them, as numbers: each value is the float8 number times its scale.

Three layouts of `X.weight` are read: `X.weight_scale_inv` with a scale per block (transformers' `fp8`, as DeepSeek and
Qwen publish), and `X.weight_scale` with one scale, or one per row (compressed-tensors, modelopt). The scales of
activations are not used: a forward pass here does not quantise them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from tmjax.checkpoints.formats.safetensors import DTYPES, DTYPES_BY_NAME, FLOAT8, Weights
from tmjax.errors import CheckpointError, summarise

#: Endings of the names of scales, of a weight in the order in which they are looked for.
_SCALES = ("_scale_inv", "_scale")
_OTHER_SCALES = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".activation_scale")
_FLOAT8 = frozenset(FLOAT8.values())


@dataclass(frozen=True)
class Float8:
    """How float8 weights are read: as `dtype`, scales per `block` (rows, columns) where they are not fewer."""

    dtype: np.dtype
    block: tuple[int, int] | None = None
    name: ClassVar[str] = "float8"
    dtypes: ClassVar = DTYPES | FLOAT8

    @classmethod
    def of(cls, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Self:
        """Reads the settings of a quantisation; the dtype is the one that the config names, else bfloat16."""
        name = config.get("dtype", config.get("torch_dtype"))
        dtype = DTYPES_BY_NAME.get(name if isinstance(name, str) else "bfloat16", DTYPES_BY_NAME["bfloat16"])
        block = settings.get("weight_block_size")
        sizes = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        return cls(dtype, (block[0], block[1]) if sizes else None)

    @property
    def note(self) -> str:
        """Notes on such a checkpoint."""
        return f"weights in float8 are read as {self.dtype.name}; activations are not quantised"

    def opened(self, weights: Weights) -> Weights:
        """Returns the tensors with numbers in place of float8; raises CheckpointError."""
        return Dequantised(weights, self)


class Dequantised(Weights):
    """Tensors of a checkpoint whose float8 weights appear as numbers; scales are not seen.

    Raises CheckpointError if weights have no scale, or one of another shape.
    """

    def __init__(self, weights: Weights, how: Float8) -> None:
        self.directory = weights.directory
        self._weights, self._how = weights, how
        self._scale = {
            name: next((name + end for end in _SCALES if name + end in weights), "")
            for name, info in weights.items()
            if info.dtype in _FLOAT8
        }
        without = sorted(name for name, scale in self._scale.items() if not scale)
        if without:
            raise CheckpointError(f"{self.directory}: float8 tensors without a scale: {summarise(without)}")
        hidden = {*self._scale.values(), *(name for name in weights if name.endswith(_OTHER_SCALES))}
        self._tensors = {
            name: replace(info, dtype=how.dtype) if name in self._scale else info
            for name, info in weights.items()
            if name not in hidden
        }
        self._blocks = {name: self._block(name) for name in self._scale}

    def _block(self, name: str) -> tuple[int, ...]:
        """Entries of a weight along each axis that share a scale."""
        shape, scales = self._weights[name].shape, self._weights[self._scale[name]].shape
        if len(scales) < len(shape):
            scales = (*scales, *[1] * (len(shape) - len(scales)))
        block = self._how.block if len(shape) == 2 else None
        if block is not None and scales == tuple(-(-size // n) for size, n in zip(shape, block, strict=True)):
            return block
        if len(scales) != len(shape) or any(size % count for size, count in zip(shape, scales, strict=True)):
            raise CheckpointError(
                f"{self.directory}: tensor {name} of shape {list(shape)} has scales of shape "
                f"{list(self._weights[self._scale[name]].shape)}, which do not divide it"
            )
        return tuple(size // count for size, count in zip(shape, scales, strict=True))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own. Raises CheckpointError."""
        values = self._weights.read(name, index)
        if name not in self._scale:
            return values
        shape = self._weights[name].shape
        scale = (
            self._weights.read(self._scale[name])
            .astype(np.float32)
            .reshape([-(-size // block) for size, block in zip(shape, self._blocks[name], strict=True)])
        )
        for axis, (size, block) in enumerate(zip(shape, self._blocks[name], strict=True)):
            part = index[axis] if axis < len(index) else slice(None)
            scale = np.take(scale, np.arange(size)[part] // block, axis=axis)
        return (values.astype(np.float32) * scale).astype(self._how.dtype)
