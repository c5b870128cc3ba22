"""Coarse estimates of the memory and time of a run, from sizes alone."""

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax

from tmjax.align.alignment import plan_site, solver_of
from tmjax.align.pairs import band
from tmjax.align.sizes import Sites, Tabled
from tmjax.models.spec import ParamSpec, projections
from tmjax.recipes.merge import Recipe
from tmjax.sharding.memory import solver_mib
from tmjax.transfer.chain import aligns, chain_of
from tmjax.transfer.contribution import Shape

#: Assumed iterations of the solver; easy sites take fewer, small epsilons more.
ITERATIONS = 300
#: Assumed speed of a device: float32 products per second, bytes moved per second. The first is measured on two
#: cores and taken to grow with them; the second is a round number for one data-centre accelerator at full float32.
RATES: Mapping[str, tuple[float, float]] = {"cpu core": (75e9, 6e9), "accelerator": (30e12, 1.5e12)}
#: The share of those products that a forward pass reaches; seconds to compile a model's forward pass, a site's solver.
FORWARD_SHARE = 1 / 3
COMPILE = (5.0, 1.0)
#: Memory of Python and its libraries before anything is loaded.
LIBRARIES = 2**29


class Sized(Tabled, Protocol):
    """A model with its size, which needs no weights."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token passes through."""

    @property
    def bytes(self) -> int:
        """Size of the weights."""


@dataclass(frozen=True)
class Reading:
    """Amount of text that the models read: rows, and tokens of each; `assumed` if no texts were given."""

    rows: int
    target_tokens: int
    source_tokens: int
    assumed: bool


def _pairs(target: Sized, source: Sized, recipe: Recipe) -> int:
    """Returns the largest number of pairs of layers that are solved at a site."""
    layers = target.spec.layers, source.spec.layers
    if recipe.alignment.layer_pairs == "band":
        return int(band(*layers, recipe.alignment.layer_band).sum())
    return math.prod(layers)


def _kept(target: Sized, source: Sized, recipe: Recipe) -> int:
    """Returns the largest number of pairs of layers whose plans are kept."""
    top = recipe.alignment.layer_top_k
    pairs = _pairs(target, source, recipe)
    return pairs if top is None else min(pairs, target.spec.layers * top)


def memory(
    target: Sized,
    source: Sized,
    sites: Sites,
    reading: Reading,
    recipe: Recipe,
    shards: int,
) -> dict[str, Any]:
    """Estimates bytes by stage and site, their peak, and the memory of this machine; host memory unless stated.

    `shards` is the number of devices that a parameter is split over; devices of the mesh's `data` axis hold copies.
    Per plan site: `features` and `potentials` against `dense`; the smaller of the two is stored. Without an operator
    that needs an alignment there are no sites, and nothing is recorded or solved.
    """
    if not aligns(chain_of(recipe)):
        sites = Sites({}, ())
    layers = target.spec.layers, source.spec.layers
    kept, options = _kept(target, source, recipe), recipe.located_alignment()
    width = 2 if options.feature_dtype == "float16" else 4
    potentials_possible = solver_of(options).properties.potentials and recipe.activations.keep
    by_site = {}
    for site in sites.plans:
        n, k = sites.units[site]
        entries = reading.rows * (layers[0] * n + layers[1] * k)
        features, potentials, dense = width * entries, 4 * kept * (n + k), 4 * kept * n * k
        rebuilt = (
            potentials_possible and 2 * entries + potentials < dense
        )  # as `plans` chooses, independently of the stored form
        by_site[site] = {
            "units": [n, k],
            "pairs": kept,
            "activations": 4 * entries,
            "moments": 8 * math.prod(layers) * n * k,
            "features": features,
            "potentials": potentials,
            "dense": dense,
            "kept_as": "potentials, features" if rebuilt else "dense",
            "kept": features + potentials if rebuilt else dense,
        }
    weights = target.bytes + source.bytes
    store = sum(4 * reading.rows * (layers[0] * units[0] + layers[1] * units[1]) for units in sites.units.values())
    solver = solver_mib(options.memory_mib) * 2**20 if by_site else 0
    stored = sum(item["kept"] for item in by_site.values())
    # Activations of a site are mapped from disk, standardised on the host, put on the device: a CPU holds all three.
    largest = max((3 * item["activations"] + item["kept"] for item in by_site.values()), default=0)
    if not recipe.activations.keep:
        store = sum(8 * math.prod(layers) * n * k for n, k in sites.units.values())
        largest = max((item["moments"] + item["kept"] for item in by_site.values()), default=0)
    shapes = Shape(target.spec, target.rows), Shape(source.spec, source.rows)
    tokens = recipe.evaluation.batch_tokens
    extra = [(step, step.operator.memory(*shapes, step.options, tokens)) for step in chain_of(recipe)]
    contributed = sum(size for step, size in extra if step.contributes)
    stages = {
        "libraries": LIBRARIES,
        "weights of both models": weights,
        "activations (on disk)" if recipe.activations.keep else "moments": store,
        "alignment: largest site, solver": LIBRARIES + weights + largest + solver + stored,
        "alignment (on disk)": stored,
        "fusion": LIBRARIES + weights + stored + contributed + 4 * target.parameters,
    }
    if not by_site:
        stages = {name: value for name, value in stages.items() if name in ("libraries", "weights of both models")}
    for step, size in extra:
        if not step.contributes:
            stages[f"operator {step.operator.name}"] = LIBRARIES + weights + 4 * target.parameters + size
    in_memory = [value for name, value in stages.items() if "on disk" not in name]
    return {
        "stages": stages,
        "sites": by_site,
        "solver": solver,
        "weights_per_device": math.ceil(weights / shards),
        "peak": max(in_memory),
        "available": available(),
    }


def available() -> int | None:
    """Returns the memory of the first device, or of the machine if that is a CPU; None if it is unknown."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit")


def time(
    target: Sized,
    source: Sized,
    sites: Sites,
    chosen: Mapping[str, ParamSpec],
    reading: Reading,
    recipe: Recipe,
    devices: int,
    rebuilt: Collection[str],
) -> dict[str, Any]:
    """Estimates seconds by stage roughly, for this machine's CPU and for accelerators, with the assumptions.

    `rebuilt` are the sites whose plans are stored as potentials and rebuilt from activations at each use. Without an
    operator that needs an alignment there is only compilation; see the assumptions.
    """
    if not aligns(chain_of(recipe)):
        sites, chosen, reading = Sites({}, ()), {}, replace(reading, target_tokens=0, source_tokens=0)
    pairs, kept = _pairs(target, source, recipe), _kept(target, source, recipe)
    forward = 2 * (target.active_parameters * reading.target_tokens + source.active_parameters * reading.source_tokens)
    costs = sum(2 * pairs * reading.rows * n * k for n, k in (sites.units[site] for site in sites.plans))
    traffic = sum(4 * pairs * ITERATIONS * n * k for n, k in (sites.units[site] for site in sites.plans))
    theirs = projections(source.rows)
    fusion = 0
    for role, row in chosen.items():
        (out, into), (out_s, in_s) = row.shape(target.spec), theirs[role].shape(source.spec)
        fusion += 2 * kept * (out * out_s * in_s + out * in_s * into)
        for site, plan in ((row.output_site, out * out_s), (row.input_site, into * in_s)):
            fusion += 2 * kept * reading.rows * plan * (plan_site(site) in rebuilt)
    cores = os.cpu_count() or 1
    estimates = {}
    for name, (products, moved) in RATES.items():
        number = cores if name == "cpu core" else devices
        stages = {
            "compiling": 2 * COMPILE[0] + len(sites.plans) * COMPILE[1],
            "activations": forward / (products * number * FORWARD_SHARE),
            "alignment": costs / (products * number) + traffic / (moved * number),
            "fusion": fusion / (products * number),
        }
        label = f"CPU, {cores} cores" if name == "cpu core" else f"{devices} accelerator{'s' * (devices > 1)}"
        estimates[label] = {"stages": stages, "total": sum(stages.values())}
    origin = "assumed, as no texts were given" if reading.assumed else "as the texts give"
    return {
        "estimate": True,
        "devices": estimates,
        "assumption": (
            f"{reading.rows} rows ({origin}); {ITERATIONS} iterations of a solver bound by memory; a CPU core does"
            f" {RATES['cpu core'][0] / 1e9:g} GFLOP/s and moves {RATES['cpu core'][1] / 1e9:g} GB/s, an accelerator"
            f" {RATES['accelerator'][0] / 1e12:g} TFLOP/s in float32 and {RATES['accelerator'][1] / 1e12:g} TB/s;"
            f" a forward pass reaches {FORWARD_SHARE:.0%} of that; without reading files, fitting coefficients,"
            " solving for predictions, controls and evaluation, which can take longer"
        ),
    }
