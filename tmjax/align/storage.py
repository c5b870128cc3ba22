"""An alignment on disk: potentials and statistics as safetensors, one file, with a JSON header beside it."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tmjax.align.alignment import Alignment
from tmjax.align.layer_plan import LayerPlan
from tmjax.align.site_plans import FeaturePlan, SignedFeaturePlan, SitePlans
from tmjax.align.statistics import Statistics
from tmjax.checkpoints.hub import read_json
from tmjax.files.atomic import write_json
from tmjax.ot import DensePlan, EdgePlan, HeadMap, LinearMap, LowRankPlan, MatchPlan, SparsePlan

ARRAYS = "alignment.safetensors"
META = "alignment.json"
_GROUPS = {"target": Statistics, "source": Statistics, "layer_plans": LayerPlan}
_FORMS = (FeaturePlan, SignedFeaturePlan, DensePlan, SparsePlan, LowRankPlan, MatchPlan, EdgePlan, LinearMap, HeadMap)
_PLANS = {cls.__name__: cls for cls in _FORMS}


def _fields(value: object) -> dict[str, np.ndarray]:
    values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: np.asarray(x, order="C") for name, x in values.items() if x is not None}


def save(alignment: Alignment, directory: Path) -> None:
    """Writes an alignment into an existing directory."""
    values: dict[str, object] = {}
    for site, plans in alignment.plans.items():
        values[f"plans/{site}"] = dataclasses.replace(plans, solutions=None)
        values[f"{type(plans.solutions).__name__}/{site}"] = plans.solutions
    values |= {f"{group}/{name}": value for group in _GROUPS for name, value in getattr(alignment, group).items()}
    save_file(
        {f"{prefix}/{name}": x for prefix, value in values.items() for name, x in _fields(value).items()},
        directory / ARRAYS,
    )
    meta = {
        "centred": alignment.centred,
        "rows": alignment.rows,
        "layer_certificates": alignment.layer_certificates,
        "certificates": alignment.certificates(),
    }
    write_json(directory / META, meta)


def load(directory: Path) -> Alignment:
    """Reads an alignment written by `save`."""
    meta = read_json(directory / META)
    grouped: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for key, value in load_file(directory / ARRAYS).items():
        group, name, field = key.split("/")
        grouped.setdefault(group, {}).setdefault(name, {})[field] = value
    solutions = {site: cls(**f) for name, cls in _PLANS.items() for site, f in grouped.get(name, {}).items()}
    return Alignment(
        centred=meta["centred"],
        rows=meta["rows"],
        plans={site: SitePlans(solutions=solutions[site], **f) for site, f in grouped["plans"].items()},
        layer_certificates=meta["layer_certificates"],
        **{group: {name: cls(**f) for name, f in grouped.get(group, {}).items()} for group, cls in _GROUPS.items()},
    )
