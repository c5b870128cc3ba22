"""Experts in MXFP4 (OCP Microscaling, as gpt-oss is published) as numbers in bfloat16.

`X_blocks` [expert, out, group, byte] holds two 4-bit numbers (E2M1) a byte, the lower half first, and `X_scales`
[expert, out, group] a power of two for each group. They appear as X [expert, in, out], as in transformers.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tmjax.checkpoints.formats.safetensors import DTYPES, DTYPES_BY_NAME, UINT8, Weights
from tmjax.errors import CheckpointError, summarise

_BLOCKS, _SCALES = "_blocks", "_scales"
#: The numbers that 4 bits stand for.
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
#: Minus the exponent that a scale of zero stands for.
_BIAS = 127
_DTYPE = DTYPES_BY_NAME["bfloat16"]


@dataclass(frozen=True)
class Mxfp4:
    """How weights in MXFP4 are read."""

    name: ClassVar[str] = "MXFP4"
    dtypes: ClassVar = DTYPES | UINT8
    note: ClassVar[str] = "weights in MXFP4 are read as bfloat16"

    def opened(self, weights: Weights) -> Weights:
        """Returns the tensors with numbers in place of packed ones; raises CheckpointError."""
        return Unpacked(weights)


class Unpacked(Weights):
    """Tensors of a checkpoint whose packed experts appear as numbers; blocks and scales are not seen.

    Raises CheckpointError if blocks have no scales, or ones of another shape.
    """

    def __init__(self, weights: Weights) -> None:
        self.directory = weights.directory
        self._weights = weights
        packed = {name for name, info in weights.items() if info.dtype == np.uint8}
        names = {name.removesuffix(end) for name in packed for end in (_BLOCKS, _SCALES) if name.endswith(end)}
        faults = [name for name in sorted(names) if not self._fits(name)]
        faults += sorted(packed - {name + end for name in names for end in (_BLOCKS, _SCALES)})
        if faults:
            raise CheckpointError(f"{self.directory}: blocks and scales do not fit each other: {summarise(faults)}")
        self._packed = frozenset(names)
        self._tensors = {name: info for name, info in weights.items() if name not in packed}
        for name in names:
            info = weights[name + _BLOCKS]
            experts, out, groups, size = info.shape
            shape = (experts, groups * size * 2, out)
            self._tensors[name] = replace(info, name=name, dtype=_DTYPE, shape=shape)

    def _fits(self, name: str) -> bool:
        if name in self._weights or not {name + _BLOCKS, name + _SCALES} <= set(self._weights):
            return False
        blocks, scales = self._weights[name + _BLOCKS].shape, self._weights[name + _SCALES].shape
        return len(blocks) == 4 and blocks[:-1] == scales

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own; of experts only those that are asked for."""
        if name not in self._packed:
            return self._weights.read(name, index)
        blocks, scales = (self._weights.read(name + end, index[:1]) for end in (_BLOCKS, _SCALES))
        numbers = np.stack([E2M1[blocks & 0x0F], E2M1[blocks >> 4]], axis=-1)
        with np.errstate(over="ignore", invalid="ignore"):  # a scale of 255 is no number, which whoever reads refuses
            powers = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS)
            numbers = numbers * powers[..., None, None]
        whole = numbers.reshape(*blocks.shape[:2], -1).swapaxes(1, 2).astype(_DTYPE)
        return np.ascontiguousarray(whole[(slice(None), *index[1:])])
