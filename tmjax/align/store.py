"""An alignment on disk: potentials and statistics as safetensors, one file, with a JSON header beside it."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tmjax.align.alignment import Alignment
from tmjax.align.layers import LayerPlan
from tmjax.align.plans import SitePlans
from tmjax.align.statistics import Statistics
from tmjax.hub.atomic import write_json
from tmjax.hub.checkpoint import read_json

ARRAYS = "alignment.safetensors"
META = "alignment.json"
_GROUPS = {"target": Statistics, "source": Statistics, "layer_plans": LayerPlan}
_SIDES = ("target", "source")


def save(alignment: Alignment, directory: Path) -> None:
    """Writes an alignment into an existing directory."""
    arrays: dict[str, np.ndarray] = {}

    def put(prefix: str, value: object) -> None:
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            if isinstance(held, tuple):
                arrays.update({f"{prefix}/{field.name}.{side}": z for side, z in zip(_SIDES, held, strict=True)})
            elif held is not None:
                arrays[f"{prefix}/{field.name}"] = np.asarray(held, order="C")

    for group in ("plans", *_GROUPS):
        for name, value in getattr(alignment, group).items():
            put(f"{group}/{name}", value)
    save_file(arrays, directory / ARRAYS)
    meta = {
        "centred": alignment.centred,
        "rows": alignment.rows,
        "layer_certificates": alignment.layer_certificates,
        "certificates": alignment.certificates(),
    }
    write_json(directory / META, meta)


def load(directory: Path) -> Alignment:
    """Reads an alignment written by `save`."""
    meta, arrays = read_json(directory / META), load_file(directory / ARRAYS)
    grouped: dict[str, dict[str, dict[str, object]]] = {}
    for key, value in arrays.items():
        group, name, field = key.split("/")
        grouped.setdefault(group, {}).setdefault(name, {})[field] = value
    for held in grouped["plans"].values():
        if "costs" not in held:
            held["features"] = tuple(held.pop(f"features.{side}") for side in _SIDES)
    groups = {group: {name: cls(**f) for name, f in grouped[group].items()} for group, cls in _GROUPS.items()}
    plans = {name: SitePlans(**f) for name, f in grouped["plans"].items()}
    return Alignment(
        centred=meta["centred"],
        rows=meta["rows"],
        plans=plans,
        layer_certificates=meta["layer_certificates"],
        **groups,
    )
