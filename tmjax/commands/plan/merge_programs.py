"""Programs of a merge, in the order in which they run."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tmjax.activations.capture import CaptureOptions
from tmjax.align.alignment import solver_of
from tmjax.align.features import FeatureSite
from tmjax.align.pairs import band
from tmjax.align.plans import chunk_of, solve_chunk
from tmjax.align.sizes import row_budget, sites_of
from tmjax.commands.doctor.side import Side
from tmjax.commands.plan.planned import Entry, Placement, Planned, Workload
from tmjax.commands.plan.source_programs import SourcePrograms, joined_of
from tmjax.ot import HostSolver
from tmjax.recipes.merge import Recipe
from tmjax.teacher.edges import EXAMPLES
from tmjax.teacher.generation import Generation
from tmjax.teacher.probabilities import Search
from tmjax.transfer.chain import aligns, chain_of, chain_projections, needs_of
from tmjax.transfer.least_squares.prediction_sums import added, batch_tokens
from tmjax.transfer.least_squares.ridge_systems import right_solve
from tmjax.transfer.prediction_solver import FACTORS, WEIGHTS, PredictionOptions, Solver

#: Assumed iterations of the solver of an alignment.
ITERATIONS = 300


def merge_entries(recipe: Recipe, sides: dict[str, Side], place: Placement, work: Workload) -> Iterator[Entry]:
    """Lists the programs of a merge.

    Args:
        recipe: The recipe.
        sides: `target` and `source`, as their files describe them.
        place: Devices.
        work: Amount of text.

    Yields:
        Stage, name and maker of every program.
    """
    target, source = sides["target"], sides["source"]
    # Both models are loaded before the first stage and stay.
    live = {name: place.params(side) for name, side in sides.items()}
    programs = SourcePrograms(place, jnp.dtype(recipe.dtype), live)
    chain = chain_of(recipe)
    tokens = min(work.tokens, recipe.activations.max_tokens)
    texts = min(work.texts, recipe.activations.max_texts or work.texts)
    if aligns(chain):
        yield from _alignment(recipe, sides, programs, (texts, tokens, work.words))
    if "teacher" in needs_of(chain):
        steps = [step for step in chain if "teacher" in step.operator.needs]
        options = next((s.options for s in steps if isinstance(s.options, PredictionOptions)), PredictionOptions())
        generated, length = 0, 0
        if options.generated_texts:
            examples = EXAMPLES if options.examples is None else options.examples
            generation = Generation(options.generated_texts, tokens=options.tokens, examples=examples)
            yield from programs.generation("source", source, generation, tokens)
            generated, length = generation.texts, min(generation.tokens, recipe.activations.max_tokens)
        yield from programs.probabilities("source", source, texts, tokens, Search())
        if any(isinstance(step.options, PredictionOptions) for step in chain):
            yield from _predictions(recipe, target, programs, options, ((texts, tokens), (generated, length)))
    evaluated = programs.live["target"]
    yield (
        "evaluation",
        "scoring",
        lambda: programs.scoring(
            evaluated, target, (work.valid, work.tokens), recipe.evaluation.batch_tokens, programs.others("target")
        ),
    )


def _alignment(
    recipe: Recipe, sides: dict[str, Side], programs: SourcePrograms, text: tuple[int, int, int]
) -> Iterator[Entry]:
    target, source = sides["target"], sides["source"]
    texts, tokens, words = text
    chosen = chain_projections(chain_of(recipe), target.rows, source.rows)
    sites = sites_of(target, source, chosen, recipe.alignment.structure)
    per_text = 1 if recipe.activations.pooling == "sequence" else min(words, tokens)
    limit = row_budget(sites, (target.spec.layers, source.spec.layers), recipe.activations)
    rows = min(texts * per_text, limit or texts * per_text)
    options = CaptureOptions(
        tuple(sites.units),
        recipe.activations.batch_tokens,
        recipe.activations.memory_mib,
        programs.dtype,
        programs.place.layout,
    )
    for name in ("target", "source"):
        yield (
            f"activations:{name}",
            "capture",
            lambda name=name: programs.capture(name, sides[name], texts, tokens, -(-rows // texts), options),
        )
    solver = solver_of(recipe.located_alignment())
    if isinstance(solver, HostSolver) or not recipe.activations.keep:
        return
    for site in sites.plans:
        yield "alignment", site, lambda site=site: _solve(recipe, sides, programs, sites.units[site], rows)


def _solve(
    recipe: Recipe, sides: dict[str, Side], programs: SourcePrograms, units: tuple[int, int], rows: int
) -> Planned:
    """Neuron plans of a site, for a chunk of pairs of layers."""
    options, place = recipe.located_alignment(), programs.place
    layers = sides["target"].spec.layers, sides["source"].spec.layers
    pairs = int(band(*layers, options.layer_band).sum()) if options.layer_pairs == "band" else math.prod(layers)
    mesh = place.layout.mesh

    def features(dtype: Any) -> FeatureSite:
        return FeatureSite(*(place.array((m, rows, n), dtype) for m, n in zip(layers, units, strict=True)))

    devices = 1 if mesh is None else mesh.size
    settings = options.memory_mib, options.plan_top_k, devices
    solver, form, size = chunk_of(features("float16"), solver_of(options), pairs, *settings)
    site = features(options.feature_dtype if form == "potentials" else "float32")
    arguments = site, place.array((size, 2), jnp.int32), solver, options.gain, form, options.plan_top_k, mesh
    calls = -(-pairs // size)
    limits = {"activations.max_rows": rows, "alignment.memory_mib": getattr(solver, "memory_mib", 0)}
    return Planned(solve_chunk, arguments, calls, programs.live, ITERATIONS, limits)


def _predictions(
    recipe: Recipe,
    target: Side,
    programs: SourcePrograms,
    options: PredictionOptions,
    texts: tuple[tuple[int, int], tuple[int, int]],
) -> Iterator[Entry]:
    """Sums, solves and trials of the operator `predictions`; as many rounds as there may be."""
    place, spec = programs.place, target.spec
    solver = Solver(spec, target.rows, {}, options, dtype=jnp.dtype(recipe.dtype), layout=place.layout)
    program, rounds = solver.program, options.rounds
    sums = jax.tree.map(place.placed, program.shapes_of_sums())
    wide = place.params(target, "float32")
    params = programs.live["target"] | {path: wide[path] for path in solver.paths}
    # The changes of the round before stay until they are replaced.
    changes = {path: (wide[path], wide[path]) for path in solver.paths}
    live = {"models": programs.live, "changes": changes}

    def batches(part: tuple[int, int]) -> tuple[Any, int]:
        limit = batch_tokens(spec.vocab, recipe.evaluation.batch_tokens, place.layout.devices)
        return joined_of(*part, target, limit, place)

    def sum_of(part: tuple[int, int], own: bool) -> Planned:
        batch, count = batches(part)
        token, weight = (place.batch((*batch.ids.shape, Search().keep), kind) for kind in (jnp.int32, jnp.float32))
        # The parameters that are solved stand beside those that were loaded.
        rest = live | {"models": {"source": programs.live["source"]}, "loaded": _only(programs, solver)}
        settings = {"evaluation.batch_tokens": batch.ids.size}
        return Planned(added, (program, sums, params, batch, token, weight, own), count * rounds, rest, 1, settings)

    def solve(path: str) -> Planned:
        site = dict(solver.writers).get(path)
        gram, values = (sums.gram, sums.cross) if site is None else (sums.grams[site], sums.inner[path])
        rest = [x for x in jax.tree.leaves(sums) if x is not gram and x is not values]
        before = {"models": programs.live, "solved": {p: wide[p] for p in solver.paths}, "sums": rest}
        done = solver.paths[: solver.paths.index(path)]
        before["changes"] = {p: changes[p] for p in done}
        return Planned(right_solve, (gram, values, options.ridge, place.layout.mesh, False), rounds, before, 2)

    for name, part, own in (("sums of given texts", texts[0], True), ("sums of generated texts", texts[1], False)):
        if part[0]:
            yield "predictions", name, lambda part=part, own=own: sum_of(part, own)
    for path in solver.paths:
        yield "predictions", f"solve {path}", lambda path=path: solve(path)

    def trial() -> Planned:
        rest = live | {"solved": {path: wide[path] for path in solver.paths}}
        rest["models"] = {"source": programs.live["source"]}
        rest["loaded"] = _only(programs, solver)
        planned = programs.scoring(params, target, texts[0], recipe.evaluation.batch_tokens, rest)
        trials = rounds * (len(WEIGHTS) + len(FACTORS)) + 1
        return Planned(planned.function, planned.arguments, planned.calls * trials, rest, settings=planned.settings)

    yield "predictions", "trials", trial


def _only(programs: SourcePrograms, solver: Solver) -> dict[str, Any]:
    """The loaded parameters that are solved for, which stay beside the solved ones."""
    return {path: programs.live["target"][path] for path in solver.paths}
