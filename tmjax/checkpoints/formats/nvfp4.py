"""Weights in NVFP4, as modelopt writes them, as numbers in bfloat16.

`X.weight` [out, in / 2] holds two 4-bit numbers (E2M1) a byte, the lower half first, `X.weight_scale` [out, in / 16] a
float8 scale for every 16 numbers and `X.weight_scale_2` one scale for all. A number is its 4 bits times the product of
both scales, in float32. The scales of activations and caches are not used: a forward pass here does not quantise them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tmjax.checkpoints.formats.mxfp4 import E2M1
from tmjax.checkpoints.formats.safetensors import DTYPES, DTYPES_BY_NAME, FLOAT8, UINT8, Weights
from tmjax.errors import CheckpointError, summarise

_GROUP = 16
_SCALE, _SCALE_2 = "_scale", "_scale_2"
_OTHER_SCALES = (".input_scale", ".k_scale", ".v_scale")
_DTYPE = DTYPES_BY_NAME["bfloat16"]


@dataclass(frozen=True)
class Nvfp4:
    """How weights in NVFP4 are read."""

    name: ClassVar[str] = "NVFP4"
    dtypes: ClassVar = DTYPES | FLOAT8 | UINT8
    note: ClassVar[str] = "weights in NVFP4 are read as bfloat16; activations are not quantised"

    def opened(self, weights: Weights) -> Weights:
        """Returns the tensors with numbers in place of packed ones; raises CheckpointError."""
        return UnpackedWeights(weights)


class UnpackedWeights(Weights):
    """Tensors of a checkpoint whose packed weights appear as numbers; scales are not seen.

    Raises CheckpointError if packed weights have no scales, or ones of another shape.
    """

    def __init__(self, weights: Weights) -> None:
        self.directory = weights.directory
        self._weights = weights
        self._packed = {name for name, info in weights.items() if info.dtype == np.uint8}
        scales = {name + end for name in self._packed for end in (_SCALE, _SCALE_2)}
        faults = [name for name in sorted(self._packed) if not self._fits(name)]
        float8 = set(FLOAT8.values())
        faults += sorted(name for name, info in weights.items() if info.dtype in float8 and name not in scales)
        if faults:
            raise CheckpointError(f"{self.directory}: packed weights and scales do not fit: {summarise(faults)}")
        self._tensors = {
            name: replace(info, dtype=_DTYPE, shape=(info.shape[0], 2 * info.shape[1]))
            if name in self._packed
            else info
            for name, info in weights.items()
            if name not in scales and not name.endswith(_OTHER_SCALES)
        }

    def _fits(self, name: str) -> bool:
        if not {name + _SCALE, name + _SCALE_2} <= set(self._weights):
            return False
        shape, scale = self._weights[name].shape, self._weights[name + _SCALE].shape
        whole = self._weights[name + _SCALE_2].shape
        return len(shape) == 2 and scale == (shape[0], 2 * shape[1] // _GROUP) and whole in ((), (1,))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own; only the rows that are asked for."""
        if name not in self._packed:
            return self._weights.read(name, index)
        packed, scale = (self._weights.read(each, index[:1]) for each in (name, name + _SCALE))
        numbers = np.stack([E2M1[packed & 0x0F], E2M1[packed >> 4]], axis=-1).reshape(len(packed), -1, _GROUP)
        scale = scale.astype(np.float32) * self._weights.read(name + _SCALE_2).astype(np.float32).reshape(())
        whole = (numbers * scale[..., None]).reshape(len(packed), -1).astype(_DTYPE)
        return np.ascontiguousarray(whole[(slice(None), *index[1:])])
