"""One model of a pair as its files describe it, without weights."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.container import any_weights, no_weights
from tmjax.checkpoints.formats.weights import has_safetensors, weight_files
from tmjax.checkpoints.headers import open_headers
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.orbax import is_orbax
from tmjax.errors import InputError
from tmjax.models.families import family_of
from tmjax.models.spec import DecoderSpec, ParamSpec


@dataclasses.dataclass(frozen=True)
class Side:
    """One model as its config describes it, without weights."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    spec: DecoderSpec
    rows: tuple[ParamSpec, ...]
    weights: str
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters, tied copies counted once."""
        return sum(math.prod(row.stacked_shape(self.spec)) for row in self.rows if row.tied_to is None)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token passes through: of experts those of the chosen ones."""
        experts = self.spec.experts
        if experts is None:
            return self.parameters
        sizes = ((row, math.prod(row.stacked_shape(self.spec))) for row in self.rows if row.tied_to is None)
        return sum(size * experts.chosen // experts.count if row.axes[0] == "experts" else size for row, size in sizes)

    @property
    def dtype(self) -> str | None:
        """Name of the stored dtype of the weights according to config.json."""
        stored = self.config.get("dtype") or self.config.get("torch_dtype")
        return stored if isinstance(stored, str) else None

    @property
    def bytes(self) -> int:
        """Size of the weights in their stored dtype (float32 if the config names none)."""
        return self.parameters * (2 if self.dtype in ("bfloat16", "float16") else 4)


def describe_side(name: str, model: str, problems: list[str]) -> Side:
    """Describes one model by its config; adds faults of its weights' headers to the problems."""
    directory = resolve(model, weights=False)
    orbax = is_orbax(directory)
    try:
        described = describe(directory / "hf" if orbax else directory)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    weights, notes = "orbax" if orbax else "missing", described.notes
    if not orbax and weight_files(described.directory):
        weights = "safetensors" if has_safetensors(described.directory) else "PyTorch"
        try:
            notes = open_headers(described).notes
        except InputError as error:
            problems.append(f"{name}: {error}")
    elif not orbax and any_weights(directory):
        problems.append(f"{name}: {no_weights(directory)}")
    return Side(name, described.directory, described.config, described.spec, described.rows, weights, notes)


def side_facts(side: Side) -> dict[str, Any]:
    """Returns the entry of a model in the report."""
    spec = side.spec
    return {
        "path": str(side.directory),
        "family": family_of(side.config).model_type,
        "parameters": side.parameters,
        "layers": spec.layers,
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "mlp": spec.mlp,
        "vocab": spec.vocab,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": side.dtype,
        "bytes": side.bytes,
        "weights": side.weights,
    }
