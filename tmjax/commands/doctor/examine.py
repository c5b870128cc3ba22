"""Report on a pair of models before any weight is read: compatibility, mapped projections, memory and time.

Only config.json, the tokenizers' files and the headers of the weights are read, and the texts if they are given.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tmjax.align.alignment import solver_of
from tmjax.align.sizes import require_room, row_budget, sites_of
from tmjax.align.streaming import require_streamable
from tmjax.checkpoints.load import require_plain
from tmjax.commands.doctor.compatibility import attention_notes, differences, mapped, overlap, tokenizer_faults
from tmjax.commands.doctor.estimate import Reading, memory, time
from tmjax.commands.doctor.side import Side, describe_side, side_facts
from tmjax.commands.merge.inputs import ONE_SOURCE, WITHOUT
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec
from tmjax.ot import ShapeCheckingSolver
from tmjax.recipes.merge import Recipe
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.teacher.vocabulary_map import few_shared, require_shared
from tmjax.text.documents import read_texts
from tmjax.text.rows import pair_rows
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.transfer.chain import aligns, chain_of, chain_projections, needs_of
from tmjax.transfer.operator import Chain, operators_of

#: Rows and tokens that are assumed where no texts are given.
ASSUMED = Reading(rows=10_000, target_tokens=15_000, source_tokens=15_000, assumed=True)


def examine(recipe: Recipe, *, texts: bool = True) -> dict[str, Any]:
    """Reports on a recipe's source and target in plain values; with `texts`, its texts are read.

    Obstacles to a merge are listed in `problems`, not raised; `mergeable` is false then. Parts of the report that
    depend on a failed part are None. Of several sources the report is on the first, and the problems are those of all.
    """
    alone = recipe.model_copy(update={"sources": ()})
    report = _examined(alone, texts=texts)
    if not recipe.sources:
        return report
    # Further sources are asked for their predictions alone.
    asked = _tried(report["problems"], lambda: _asking(recipe))
    for name, entry in recipe.further_sources.items() if asked else ():
        other = _examined(alone.model_copy(update={"source": entry.source, "operators": asked}), texts=texts)
        report["models"][name] = other["models"]["source"]
        for part in ("problems", "notes"):
            own = [line.replace("source", name, 1) if line.startswith("source") else line for line in other[part]]
            report[part] += [line for line in own if line not in report[part]]
    report["mergeable"] = not report["problems"]
    return report


def _asking(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], ...]:
    """Returns the entries of operators that ask sources for predictions; raises InputError if there are none."""
    steps = operators_of(recipe)
    asked = tuple(e for e, step in zip(recipe.operators, steps, strict=True) if "teacher" in step.operator.needs)
    if not asked:
        raise InputError(ONE_SOURCE)
    return asked


def _examined(recipe: Recipe, *, texts: bool) -> dict[str, Any]:
    """Reports on one source and the target."""
    problems: list[str] = []
    notes: list[str] = []
    sides = {
        name: _tried(problems, lambda n=name: describe_side(n, recipe.place(getattr(recipe, n)), problems))
        for name in ("target", "source")
    }
    if sides["target"]:
        _tried(problems, lambda: require_plain(recipe.place(recipe.target)))
    tokenizers = {
        name: _tried(problems, lambda s=side: load_tokenizer(s.directory, s.spec.vocab)) if side else None
        for name, side in sides.items()
    }
    chain = _tried(problems, lambda: chain_of(recipe))
    widths = [side.spec.hidden for side in sides.values() if side]
    layout = _tried(problems, lambda: Layout(recipe.mesh or AUTO, widths))
    report: dict[str, Any] = {
        "mergeable": False,
        "problems": problems,
        "notes": notes,
        "models": {name: side_facts(side) if side else None for name, side in sides.items()},
        "operators": operators(chain) if chain else None,
        "projections": None,
        "differences": None,
        "tokenizers": None,
        "rows": None,
        "memory": None,
        "time": None,
    }
    for name, side in sides.items():
        notes += [f"{name}: {note}" for note in side.notes] if side else []
        if side and side.weights == "missing":
            notes.append(f"{name} {side.directory} holds no weights; they were not needed here")
        if side and tokenizers[name]:
            faults, remarks = tokenizer_faults(name, tokenizers[name], side.spec.vocab)
            problems += faults
            notes += remarks
        if side and layout:
            _tried(problems, lambda s=side: [layout.param_sharding(r.path, r.axes, r.shape(s.spec)) for r in s.rows])
    if all(tokenizers.values()):
        report["tokenizers"] = overlap(tokenizers["target"], tokenizers["source"])
        if report["tokenizers"]["share_of_target"] < 0.05:
            notes.append("the tokenizers share next to no token: rows pair whole words, as they do in any case")
        if texts and chain and "teacher" in needs_of(chain):
            shared = _tried(problems, lambda: _shared_positions(recipe, tokenizers))
            few = shared and few_shared(*shared)
            notes += [few] if few else []
    reading = _tried(problems, lambda: _reading(recipe, tokenizers)) if texts and all(tokenizers.values()) else ASSUMED
    if all(sides.values()):
        target, source = sides["target"], sides["source"]
        report["differences"] = differences(target.spec, source.spec)
        report["projections"] = mapped(target, source, chain or ())
        chosen = _tried(problems, lambda: chain_projections(chain or (), target.rows, source.rows))
        aligned = chain is None or aligns(chain)
        notes += attention_notes(target.spec, source.spec, recipe.alignment.structure) if aligned else []
        solvable = _tried(problems, lambda: _require_solver(recipe, target, source, chosen or {}))
        if chosen and reading and layout and solvable:
            sites = sites_of(target, source, chosen, recipe.alignment.structure)
            limit = row_budget(sites, (target.spec.layers, source.spec.layers), recipe.activations)
            reading = dataclasses.replace(reading, rows=min(reading.rows, limit or reading.rows))
            report["rows"] = dataclasses.asdict(reading)
            rows = reading.rows if recipe.activations.keep else 0
            # With assumed rows a lack of room is only a hint.
            if aligned:
                _tried(
                    notes if reading.assumed else problems,
                    lambda: require_room(sites, rows, recipe.located_alignment()),
                )
            shards = layout.sizes["fsdp"] * layout.sizes["tensor"]
            report["memory"] = memory(target, source, sites, reading, recipe, shards)
            rebuilt = {site for site, item in report["memory"]["sites"].items() if item["kept_as"] != "dense"}
            report["time"] = time(target, source, sites, chosen, reading, recipe, layout.devices, rebuilt)
            available = report["memory"]["available"]
            if available and report["memory"]["peak"] > available:
                notes.append(
                    f"the estimated peak of {report['memory']['peak'] / 2**30:.1f} GiB is more than this machine's"
                    f" {available / 2**30:.1f} GiB; see activations.keep, alignment.layer_pairs and --mesh"
                )
    report["mergeable"] = not problems
    return report


def _tried(problems: list[str], work: Any) -> Any:
    """Returns the result of `work`; on a user's error None, and adds the error to the problems (or notes)."""
    try:
        return work()
    except InputError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def operators(chain: Chain) -> list[dict[str, Any]]:
    """Returns the operators that run, in order, with their needs and whether they choose on validation texts."""
    return [
        {"name": step.operator.name, "needs": sorted(step.operator.needs), "chooses": step.operator.chooses}
        for step in chain
    ]


def _require_solver(recipe: Recipe, target: Side, source: Side, chosen: Mapping[str, ParamSpec]) -> bool:
    solver = solver_of(recipe.located_alignment())
    if not recipe.activations.keep:
        require_streamable(recipe.located_alignment())
    if isinstance(solver, ShapeCheckingSolver):
        for site, units in sites_of(target, source, chosen, recipe.alignment.structure).units.items():
            try:
                solver.check_shape(*units)
            except InputError as error:
                raise InputError(f"site {site}: {error}") from None
    return True


def _reading(recipe: Recipe, tokenizers: Mapping[str, TextTokenizer]) -> Reading:
    options = recipe.activations
    texts = read_texts(recipe.place(recipe.texts)).first(options.max_texts)
    both = [tokenizers["target"], tokenizers["source"]]
    rows, documents = pair_rows(texts, both, pooling=options.pooling, max_tokens=options.max_tokens)
    tokens = [sum(len(document.ids) for document in model) for model in documents]
    return Reading(rows=len(rows), target_tokens=tokens[0], source_tokens=tokens[1], assumed=False)


def _shared_positions(recipe: Recipe, tokenizers: Mapping[str, TextTokenizer]) -> tuple[int, int]:
    texts = read_texts(recipe.place(recipe.texts)).part(recipe.activations.max_texts, recipe.seed).texts
    return require_shared(tokenizers["target"], tokenizers["source"], texts, otherwise=WITHOUT)
