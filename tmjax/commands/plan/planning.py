"""A plan: every program of a recipe compiled for a machine that need not be there, with memory, work and time."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmjax.commands.doctor.side import Side
from tmjax.commands.plan.compiling import read_models
from tmjax.commands.plan.machines import Figures, Topology, environment, require_compiler
from tmjax.commands.plan.planned import Workload
from tmjax.errors import InputError
from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.merge import Recipe

#: Part of the memory that a plan leaves free.
SPARE = 0.1
#: Seconds after which the compiler of one program is stopped.
LIMIT = 1800
_MODULE = "tmjax.commands.plan.compiling"


@dataclass(frozen=True)
class Question:
    """What is planned.

    Attributes:
        recipe: The recipe of a merge or an adaptation.
        topology: Devices that it would run on.
        work: Amount of text.
        mesh: Device mesh; the recipe's, or one chosen over all devices, unless given.
        only: Stages, or programs as `STAGE PROGRAM`, that are planned; all unless given.
    """

    recipe: Recipe | AdaptRecipe
    topology: Topology
    work: Workload
    mesh: str | None = None
    only: tuple[str, ...] = ()

    def names(self, stage: str, program: str) -> bool:
        """Whether a program is planned."""
        return not self.only or bool({stage, stage.split(":")[0], f"{stage} {program}"} & set(self.only))

    def task(self, program: list[str] | None) -> dict[str, Any]:
        """The task of a process: one program, or to list all."""
        recipe = self.recipe
        # Local names are found from any folder.
        names = {name: recipe.place(given) for name in ("source", "target") if (given := getattr(recipe, name))}
        return {
            "recipe": recipe.model_dump(mode="json") | names,
            "kind": "adapt" if isinstance(recipe, AdaptRecipe) else "merge",
            "topology": self.topology.text,
            "mesh": self.mesh,
            "work": asdict(self.work),
            "program": program,
        }


def plan(question: Question, show: Callable[..., None] = lambda stage, done, total, note: None) -> dict[str, Any]:
    """Compiles every program of a recipe, each in a process of its own.

    Args:
        question: What is planned.
        show: Called with (stage, programs done, all programs, the program that is compiled).

    Returns:
        The report in plain values; `fits` is false if a program does not compile or fit.

    Raises:
        InputError: The compiler is missing, or the recipe and its models cannot be planned.
    """
    if getattr(question.recipe, "sources", ()):
        raise InputError("plan reads one source; plan each alone with --source, the training step is the same")
    require_compiler(question.topology)
    listed = _answer(question, None)
    if "programs" not in listed:
        raise InputError(f"cannot plan: {listed.get('error') or listed.get('reason')}")
    programs = [item for item in listed["programs"] if question.names(*item)]
    if not programs:
        stages = ", ".join(dict.fromkeys(stage for stage, _ in listed["programs"]))
        raise InputError(f"no stage of that name; the recipe's stages are {stages}")
    figures, rows = question.topology.figures, []
    for done, (stage, name) in enumerate(programs):
        show("programs", done, len(programs), f"{stage} {name}")
        facts = _answer(question, [stage, name])
        if "error" in facts:
            facts = {"compiles": False, "reason": facts["error"]}
        rows.append({"stage": stage, "program": name} | _judged(facts, figures, listed["mesh"]))
    show("programs", len(programs), len(programs), "")
    stages: dict[str, float] = {}
    for row in rows:
        stages[row["stage"]] = stages.get(row["stage"], 0.0) + (row.get("stage_seconds") or 0.0)
    return {
        "fits": all(row["fits"] for row in rows),
        "topology": question.topology.text,
        "devices": question.topology.devices,
        "mesh": listed["mesh"],
        "memory": figures.memory,
        "figures": asdict(figures),
        "work": asdict(question.work),
        "programs": rows,
        "stages": stages,
        "seconds": sum(stages.values()),
        "host": listed["host"],
    }


def _answer(question: Question, program: list[str] | None) -> dict[str, Any]:
    """Runs one task in a process; its end by a signal, an error or the limit of time is the answer otherwise."""
    with tempfile.TemporaryDirectory(prefix="tmjax-plan-") as folder:
        files = Path(folder) / "task.json", Path(folder) / "facts.json"
        files[0].write_text(json.dumps(question.task(program)))
        variables = {**os.environ, **environment(question.topology)}
        command = [sys.executable, "-m", _MODULE, *map(str, files)]
        try:
            ended = subprocess.run(
                command, env=variables, capture_output=True, text=True, errors="replace", timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return {"compiles": False, "reason": f"the compiler took more than {LIMIT // 60} minutes"}
        if files[1].is_file():
            return json.loads(files[1].read_text())
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return {"compiles": False, "reason": f"the compiler ended by signal {name}"}
    lines = ended.stderr.strip().splitlines() or ["no message"]
    return {"compiles": False, "reason": f"the process ended with status {ended.returncode}: {lines[-1][:200]}"}


def _judged(facts: dict[str, Any], figures: Figures, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Adds to the facts of a program its whole memory, whether it fits, its time, and what would make it fit."""
    if not facts["compiles"]:
        needed = facts.get("needed_bytes")
        advice = _advice(facts | {"temporary_bytes": needed}, figures, mesh) if needed else []
        return facts | {"fits": False, "advice": advice}
    whole = facts["peak_bytes"] + facts["live_bytes"]
    fits = whole <= figures.memory * (1 - SPARE)
    moved = sum(item["bytes"] * item["turns"] for item in facts["collectives"] or ())
    times = {
        "compute": sum(flops / figures.peak[kind] for kind, flops in facts["flops"].items()),
        "memory": facts["bytes"] / figures.bandwidth,
        "interconnect": moved / figures.interconnect,
    }
    bound = max(times, key=lambda name: times[name])
    return facts | {
        "whole_bytes": whole,
        "fits": fits,
        "seconds": times,
        "bound": bound,
        "stage_seconds": facts["calls"] * times[bound],
        "advice": [] if fits else _advice(facts, figures, mesh),
    }


def _advice(facts: Mapping[str, Any], figures: Figures, mesh: Mapping[str, int]) -> list[str]:
    """Names settings that would make a program fit."""
    room = figures.memory * (1 - SPARE)
    # Arguments and results lie as the mesh says; only temporary memory grows with a batch.
    fixed = facts["live_bytes"] + facts.get("argument_bytes", 0)
    temporary = facts["temporary_bytes"]
    result = []
    if 0 < room - fixed < temporary:
        scale = (room - fixed) / temporary
        result = [f"{key} at most {max(1, int(value * scale)):,}" for key, value in facts["settings"].items() if value]
    split = mesh["fsdp"] * mesh["tensor"]
    needed = (fixed + temporary) / room
    more = max(2, math.ceil(split * needed))
    result.append(f"a mesh that splits parameters over {more} devices instead of {split}")
    return result


def workload_of(recipe: Recipe | AdaptRecipe, count: int | None, tokens: int | None) -> Workload:
    """The amount of text of a recipe: as given, else as its texts are, else 300 texts of 200 tokens.

    Args:
        recipe: The recipe.
        count: Number of texts; None: not given.
        tokens: Tokens of a text; None: not given.
    """
    if count is None or tokens is None:
        read = _read(recipe)
        if read is not None:
            valid = min(read[0], 300)
            return Workload(count or read[0], tokens or read[1], valid, assumed=count is not None or tokens is not None)
    count, tokens = count or 300, tokens or 200
    return Workload(count, tokens, min(count, 300))


def _read(recipe: Recipe | AdaptRecipe) -> tuple[int, int] | None:
    """Number and mean length of a recipe's texts in the target's tokens; None where they cannot be read."""
    from tmjax.text.documents import read_texts
    from tmjax.text.tokenizer import load_tokenizer

    if recipe.texts == "-":
        return None
    try:
        sides: dict[str, Side] = read_models(recipe)
        target = sides["target"]
        tokenizer = load_tokenizer(target.directory, target.spec.vocab)
        texts = read_texts(recipe.place(recipe.texts)).texts
    except InputError:
        return None
    lengths = [len(encoding.ids) + 2 for encoding in tokenizer.encode(texts)]
    return len(lengths), max(2, -(-sum(lengths) // len(lengths)))
