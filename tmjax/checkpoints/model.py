"""A loaded model: parameters in memory, and what is needed to write them again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tmjax.models.families.base import Family
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.typing import Params

#: Chooses where a parameter lives: (row, stacked shape) -> sharding, or None for the default device.
Placement = Callable[[ParamSpec, tuple[int, ...]], jax.sharding.Sharding | None]


def default_placement(_row: ParamSpec, _shape: tuple[int, ...]) -> None:
    """Everything on the default device."""
    return None


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory: parameters by Flax path in their stored dtypes, and what is needed to write it again.

    `directory` holds the tokenizer and companion files. `written_ties` are names of tied copies that the checkpoint
    repeated on disk, written again on export. `notes` are what a user should know of the checkpoint:
    settings without effect, names that were read without a prefix.
    """

    family: Family
    spec: DecoderSpec
    params: Params
    config: Mapping[str, Any]
    directory: Path
    written_ties: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[ParamSpec, ...]:
        """The family's tensor table for this spec."""
        return self.family.params(self.spec)

    @property
    def projections(self) -> Mapping[str, ParamSpec]:
        """The weight rows of the projections that a merge can transport, by role."""
        return projections(self.rows)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(value.size for value in self.params.values())

    def with_params(self, params: Params) -> "Model":
        """The same model with other values: each new array is cast to the dtype that the old one is stored in."""
        cast = {path: jnp.asarray(params[path], old.dtype) for path, old in self.params.items()}
        return replace(self, params=cast)
