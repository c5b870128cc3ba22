"""One program of a plan, compiled in a process of its own: the compilers may end the process where they fail."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax

from tmjax import backend
from tmjax.commands.doctor.side import Side, describe_side
from tmjax.commands.plan.adapt_programs import adapt_entries
from tmjax.commands.plan.communication import collectives
from tmjax.commands.plan.counting import counted
from tmjax.commands.plan.host_estimate import host_estimate
from tmjax.commands.plan.machines import parse_topology
from tmjax.commands.plan.merge_programs import merge_entries
from tmjax.commands.plan.planned import Entry, Placement, Planned, Workload, device_bytes
from tmjax.errors import TmjaxError
from tmjax.recipes.adapt import AdaptRecipe, build_adapt_recipe
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.merge import Recipe
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.transfer.recipe import build_recipe


def read_models(recipe: Recipe | AdaptRecipe) -> dict[str, Side]:
    """Describes target and source by their configs; of an adaptation without a source, the target alone."""
    names = {"target": recipe.target, "source": recipe.source}
    return {name: describe_side(name, recipe.place(model), []) for name, model in names.items() if model}


def recipe_of_values(values: dict[str, Any], kind: str) -> Recipe | AdaptRecipe:
    """Builds the recipe of a merge or of an adaptation (`kind`)."""
    return build_adapt_recipe(values) if kind == "adapt" else build_recipe(values)


def entries_of(recipe: Recipe | AdaptRecipe, sides: dict[str, Side], place: Placement, work: Workload) -> list[Entry]:
    """Lists the programs of a recipe."""
    entries = adapt_entries if isinstance(recipe, AdaptRecipe) else merge_entries
    return list(entries(recipe, sides, place, work))


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Answers a task: the facts of its program, or without one the names of all programs.

    Choices by the kind of device are made for the devices of the task's topology.
    """
    topology = parse_topology(task["topology"])
    devices = topology.open()
    backend.compile_for(topology.machine)
    recipe, work = with_dtype(recipe_of_values(task["recipe"], task["kind"])), Workload(**task["work"])
    sides = read_models(recipe)
    widths = [side.spec.hidden for side in sides.values()]
    layout = Layout(task["mesh"] or recipe.mesh or AUTO, widths, devices=devices)
    entries = entries_of(recipe, sides, Placement(layout, devices[0]), work)
    if task["program"] is None:
        host = host_estimate(recipe, sides, work, layout.sizes["fsdp"] * layout.sizes["tensor"])
        return {"mesh": layout.sizes, "programs": [[stage, name] for stage, name, _ in entries], "host": host}
    maker = next(maker for stage, name, maker in entries if [stage, name] == task["program"])
    return compiled_facts(maker(), layout)


def compiled_facts(planned: Planned, layout: Layout) -> dict[str, Any]:
    """Lowers and compiles a program.

    Returns:
        Seconds of the compiler, bytes on a device, work of a device, collectives.
    """
    traced = planned.function.trace(*planned.arguments)
    work = counted(traced.jaxpr, layout.sizes, planned.turns)
    live, began = device_bytes(planned.live), time.process_time()
    facts: dict[str, Any] = {
        "calls": planned.calls,
        "settings": dict(planned.settings),
        "live_bytes": live,
        "flops": work.flops,
        "bytes": work.bytes,
    }
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return facts | {"compiles": False, "reason": _reason(str(error)), "needed_bytes": _needed(str(error))}
    memory = program.memory_analysis()
    beside = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or beside + memory.temp_size_in_bytes
    facts |= {
        "compiles": True,
        "compile_cpu_seconds": time.process_time() - began,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
    }
    try:
        moved = collectives(program.as_text(), planned.turns)
    except jax.errors.JaxRuntimeError:  # the text of some TPU programs cannot be made
        return facts | {"collectives": None}
    return facts | {"collectives": [each.facts() for each in moved]}


def _needed(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's refusal."""
    used = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    return float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]] if used else None


def _reason(message: str) -> str:
    used = re.search(r"Used [\d.]+\w of [\d.]+\w \w+", message)
    return used[0] if used else " ".join(message.split())[:200]


def main() -> None:
    """Reads a task from the first file, and writes the facts of its program to the second; of no program, all names."""
    task, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    try:
        facts = answer(task)
    except TmjaxError as error:
        facts = {"error": str(error)}
    output.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
