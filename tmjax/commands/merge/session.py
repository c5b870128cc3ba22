"""A session: one recipe, its inputs and the run directory that its stages write to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

import tmjax
from tmjax.commands.callbacks import Progress, Warn, quiet, silent, tell_notes
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.notes import note_blank
from tmjax.files.lock import OutputLock
from tmjax.files.paths import refuse_overlap
from tmjax.recipes.base import BESIDE_CHECKPOINT, Placed, dump_recipe
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.merge import Recipe
from tmjax.runs.command import given_command
from tmjax.runs.directory import RunDirectory
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import Manifest, Record, find_manifest, is_current
from tmjax.runs.run_facts import InputFacts
from tmjax.sharding import hosts

_INPUTS = ("source", "target", "texts", "valid", "test")
#: Settings that do not invalidate a run: places of files and of the computation, and whether a no-op passes.
_WITHOUT_EFFECT = {"out", "allow_negligible", "mesh", "other_texts", "same_size_source", "self_source", "places"}


def refuse_nested(recipe: Placed) -> None:
    """Raises InputError if a local input is the output, is inside it or contains it."""
    refuse_overlap(recipe.out, [(key, recipe.place(name)) for key, name in recipe.inputs().items()])


@dataclass(frozen=True)
class Session:
    """One recipe, its inputs and its run directory.

    Attributes:
        recipe: The recipe, with the places that its local inputs have now.
        inputs: The inputs that it names.
        run: The run directory.
        progress: Called with a stage, steps done and steps in all.
        warn: Called with a warning.
    """

    recipe: Recipe
    inputs: Inputs
    run: RunDirectory
    progress: Progress = quiet
    warn: Warn = silent

    def step(self, stage: str) -> Callable[[int, int], None]:
        """Returns a callback that shows the progress of a stage."""
        return lambda done, total: self.progress(stage, done, total)

    def stage(self, name: str, key: object, output: str, work: Callable[[Path], Record | None]) -> Path:
        """Runs a stage unless it is finished; see `RunDirectory.stage`."""
        return self.run.stage(name, key, output, work)


def open_session(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    amend: bool = False,
    progress: Progress = quiet,
    warn: Warn = silent,
    extra_key: Mapping[str, str] | None = None,
) -> Session:
    """Creates or resumes the run directory of a recipe, after all inputs have been checked.

    Args:
        recipe: The recipe.
        overwrite: Whether a run of another recipe is replaced.
        amend: Whether an existing run goes on under this recipe; stages that it does not change stay.
        progress: Called with a stage, steps done and steps in all.
        warn: Called with a warning.
        extra_key: Hashes that make the run another one, beside those of recipe and inputs.

    Raises:
        InputError: An input is wrong, or the output holds something else or is in use.
    """
    for line in recipe.moved():
        warn(line)
    recipe = with_dtype(recipe.placed())
    inputs, path = Inputs(recipe), Path(recipe.out)
    hosts.together(lambda: refuse_nested(recipe))
    lock = hosts.together(lambda: OutputLock(path) if hosts.is_first() else None)
    try:
        run = _begin(recipe, inputs, overwrite, amend, progress, warn, dict(extra_key or {}))
    finally:
        if lock is not None:  # the run has it too by now
            lock.release()
    return Session(recipe, inputs, run, progress, warn)


def _begin(
    recipe: Recipe,
    inputs: Inputs,
    overwrite: bool,
    amend: bool,
    progress: Progress,
    warn: Warn,
    extra_key: Mapping[str, str],
) -> RunDirectory:
    path, hashes = Path(recipe.out), hosts.together(lambda: inputs.hashes)
    hosts.require_same("inputs", hashes)
    excluded = dict.fromkeys(_WITHOUT_EFFECT | set(_INPUTS), True) | BESIDE_CHECKPOINT
    settings = recipe.model_dump(mode="json", exclude=excluded)
    if recipe.sources:  # their content is hashed with the other inputs
        settings["sources"] = [entry.weight for entry in recipe.sources]
    else:
        del settings["sources"], settings["mixing"]
    key = {"recipe": digest(settings)} | hashes | dict(extra_key)
    previous = find_manifest(path)
    if hosts.agree(previous is None or not is_current(previous) or previous.get("key") != key):
        hosts.together(inputs.check)
        tell_notes(inputs.notes, warn)
    note_blank([inputs.all_texts, inputs.valid, inputs.test, *inputs.other_texts.values()], warn)
    layout = inputs.layout
    header = Manifest(
        tmjax=tmjax.__version__,
        seed=recipe.seed,
        inputs={
            name: InputFacts(path=(inputs.models | inputs.bases).get(name) or getattr(recipe, name), sha256=value)
            for name, value in hashes.items()
        },
        notes=inputs.notes,
        mesh=layout.sizes,
        devices=layout.devices,
        processes=hosts.count(),
        platform=jax.devices()[0].platform,
        key=key,
        commands=given_command(recipe.out),
    )

    def start() -> RunDirectory | None:
        if not hosts.is_first():
            return None
        if amend:
            return RunDirectory.amend(path, dump_recipe(recipe), header, team=hosts, show=progress)
        return RunDirectory.start(path, dump_recipe(recipe), header, overwrite=overwrite, team=hosts, show=progress)

    started = hosts.together(start)
    return hosts.together(lambda: started or RunDirectory.follow(path, header, team=hosts, show=progress))
