"""Experts of a layer that lie in one tensor, as tensors of single experts.

The fused tensors of gates and inputs, and of outputs, appear as those of every expert, [out, in]. On disk they are
[expert, in, out], gates before inputs, as Qwen 3 VL is published, or [expert, out, in], as transformers has them in
memory.
"""

from dataclasses import replace

import numpy as np

from tmjax.checkpoints.formats.safetensors import Weights
from tmjax.errors import CheckpointError
from tmjax.models.families.layout import FUSED_EXPERTS, SINGLE_EXPERT

_GATE_UP, _DOWN = FUSED_EXPERTS


class SingleExperts(Weights):
    """Tensors of a checkpoint whose fused experts appear one by one.

    Raises CheckpointError if the shapes of a layer's fused tensors do not fit each other.
    """

    def __init__(self, weights: Weights) -> None:
        self.directory = weights.directory
        self._weights = weights
        self._tensors = {name: info for name, info in weights.items() if not name.endswith((_GATE_UP, _DOWN))}
        #: Of every single tensor: the fused one, the expert, the rows there, whether it is transposed.
        self._places: dict[str, tuple[str, int, slice, bool]] = {}
        for name in weights:
            if name.endswith(_GATE_UP):
                self._add(name.removesuffix(_GATE_UP))

    def _add(self, layer: str) -> None:
        fused, down = layer + _GATE_UP, layer + _DOWN
        shapes = [self._weights[name].shape if name in self._weights else () for name in (fused, down)]
        transposed = shapes[0][1:] == (*shapes[1][2:], 2 * shapes[1][1]) if len(shapes[1]) == 3 else False
        plain = shapes[0][1:] == (2 * shapes[1][2], shapes[1][1]) if len(shapes[1]) == 3 else False
        if not (transposed or plain) or shapes[0][:1] != shapes[1][:1]:
            raise CheckpointError(
                f"{self.directory}: {fused} of shape {list(shapes[0])} and {down} of shape {list(shapes[1])} do not fit"
                " each other"
            )
        width, hidden = shapes[1][1:] if transposed else shapes[1][:0:-1]
        parts = ((fused, slice(0, width)), (fused, slice(width, None)), (down, slice(None)))
        for projection, (stored, rows) in zip(SINGLE_EXPERT, parts, strict=True):
            shape = (hidden, width) if stored == down else (width, hidden)
            for expert in range(shapes[0][0]):
                name = f"{layer}.experts.{expert}.{projection}.weight"
                self._tensors[name] = replace(self._weights[stored], name=name, shape=shape)
                self._places[name] = stored, expert, rows, transposed

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own; of fused ones the expert alone."""
        if name not in self._places:
            return self._weights.read(name, index)
        stored, expert, rows, transposed = self._places[name]
        whole = self._weights.read(stored, (slice(expert, expert + 1),))[0]
        return np.ascontiguousarray((whole.T if transposed else whole)[rows][index])
