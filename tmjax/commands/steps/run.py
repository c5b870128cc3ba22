"""A run of several steps: every step a stage of one run directory, the score of every model, one report."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import tmjax
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.commands.compare import compare_results
from tmjax.commands.evaluate import RESULTS, EvaluationRequest, evaluate_models
from tmjax.commands.steps.resolve import Step, located, model_place, resolve_steps, resolved_values
from tmjax.commands.steps.step_keys import StepKey, step_keys
from tmjax.commands.steps.work import Signals, check_step, run_step
from tmjax.errors import InputError, TmjaxError
from tmjax.files import lock
from tmjax.files.jsonfile import read_json
from tmjax.files.paths import refuse_overlap
from tmjax.recipes.base import dump_values
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.steps_recipe import StepsRecipe
from tmjax.report.steps_page import write_steps_report
from tmjax.runs.command import given_command
from tmjax.runs.directory import RunDirectory
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import Manifest, Record, find_manifest, is_current, load_manifest
from tmjax.runs.run_facts import Change, EvaluationFacts, InputFacts, StepFacts
from tmjax.sharding import hosts
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.text.documents import read_texts

#: The row of the model that the first step begins with.
FIRST = "target"
REPORT = "report.html"
#: Folder of the scores of models that no step has scored.
SCORES = "scores"


class Steps:
    """One run of a recipe of several steps. Every step resumes, and finished ones are not repeated.

    Args:
        recipe: The recipe.
        base: Folder of the recipe file, to which its paths may be relative.
        overwrite: Whether finished steps that the recipe has changed, and those after them, are replaced; and another
            run in the output.
        progress: Called with a stage, steps done and steps in all.
        warn: Called with a line that the user should read.

    Raises:
        InputError: An input is wrong, or the output holds something else, is in use, or would lose a finished step.
    """

    def __init__(
        self,
        recipe: StepsRecipe,
        *,
        base: Path | None = None,
        overwrite: bool = False,
        progress: Progress = quiet,
        warn: Warn = silent,
    ) -> None:
        self.recipe, self.out = recipe.placed(), Path(recipe.out)
        resolved, missing = resolve_steps(recipe, base)
        if missing:
            raise InputError(f"give {' and '.join(f'--{name}' for name in missing)} or name them in the recipe")
        self.steps = located(resolved, self.out)
        self.signals = Signals(progress, warn, overwrite)
        hosts.together(lambda: self._check(resolved))
        self.keys, inputs = hosts.together(lambda: step_keys(resolved))
        hosts.require_same("inputs", [key.whole for key in self.keys])
        self.run = self._begin(resolved, inputs, overwrite=overwrite)

    def _check(self, resolved: Sequence[Step]) -> None:
        """Raises InputError for settings and places that a step would refuse."""
        for step in resolved:
            with _named(step.name):
                check_step(step)
        for step in self.steps:
            outside = {key: name for key, name in step.inputs().items() if not Path(name).is_relative_to(self.out)}
            refuse_overlap(self.out, [(f"{step.name}: {key}", name) for key, name in outside.items()])

    def _begin(self, resolved: Sequence[Step], inputs: dict[str, tuple[str, str]], *, overwrite: bool) -> RunDirectory:
        """Creates the run directory, or goes on with it under the present recipe."""
        recipe, layout = self.recipe, Layout(self.recipe.mesh or AUTO)
        values = resolved_values(recipe, resolved)
        header = Manifest(
            tmjax=tmjax.__version__,
            seed=recipe.seed,
            inputs={key: InputFacts(path=name, sha256=value) for key, (name, value) in inputs.items()},
            mesh=layout.sizes,
            devices=layout.devices,
            processes=hosts.count(),
            platform=jax.devices()[0].platform,
            key={"recipe": digest([key.whole for key in self.keys])},
            steps={},
            commands=given_command(recipe.out),
        )
        text, show = dump_values(values), self.signals.progress

        def start() -> RunDirectory | None:
            if not hosts.is_first():
                return None
            previous = find_manifest(self.out)
            if previous is None or not is_current(previous) or previous.get("steps") is None:
                return RunDirectory.start(self.out, text, header, overwrite=overwrite, team=hosts, show=show)
            if not overwrite:
                self._refuse_changed(load_manifest(self.out))
            return RunDirectory.amend(self.out, text, header, team=hosts, show=show)

        started = hosts.together(start)
        return hosts.together(lambda: started or RunDirectory.follow(self.out, header, team=hosts, show=show))

    def _refuse_changed(self, manifest: Manifest | None) -> None:
        """Raises InputError if a finished step of the run has other settings or inputs now."""
        steps = {} if manifest is None else manifest.steps or {}
        for step, key in zip(self.steps, self.keys, strict=True):
            facts = steps.get(step.name)
            if facts is not None and facts.key != key.model and manifest and step.name in manifest.outputs:
                raise InputError(
                    f"step {step.name} of {self.out} has finished with other settings or inputs; --overwrite repeats "
                    "it and the steps after it, or choose another --out"
                )

    def all(self) -> dict[str, Any]:
        """Runs every step and scores the models; returns the manifest."""
        manifest = self.run.manifest
        manifest.seed = self.recipe.seed
        names = [step.name for step in self.steps]
        for name in [name for name in manifest.steps or {} if name not in names]:
            manifest.outputs.pop(name, None)
            manifest.stages.pop(name, None)
            self.signals.warn(f"{self.out / name} is of a step that the recipe does not have any more; it stays there")
        manifest.steps = {name: facts for name, facts in (manifest.steps or {}).items() if name in names}
        with _shown_command(self.recipe.out):
            for step, key in zip(self.steps, self.keys, strict=True):
                self._step(step, key)
            manifest.steps = {name: manifest.steps[name] for name in names}
            self._evaluate()
        self._report()
        return manifest.to_json()

    def _step(self, step: Step, key: StepKey) -> None:
        def work(path: Path) -> Record:
            with _named(step.name):
                measured = run_step(step, path, self.signals.of(step.name))
            place = Path(self._model(step))
            inside = place.is_relative_to(self.out)
            model = place.relative_to(self.out).as_posix() if inside else str(place)
            facts = StepFacts(kind=step.kind, key=key.model, model=model, measured=measured)
            return lambda manifest: manifest.record("steps", step.name, facts)

        self.run.nested(step.name, key.whole, step.name, work)

    def _model(self, step: Step) -> str:
        return model_place(self.steps, step, self.out)

    # Scores.

    def _evaluate(self) -> None:
        """Records the score of every step's model on the test texts, and its change against the first target."""
        recipe, manifest = self.recipe, self.run.manifest
        manifest.evaluation = {}
        if recipe.test is None:
            self.run.save()
            return
        sha256 = read_texts(recipe.place(recipe.test)).sha256
        first = str(self.steps[0].settings.target)
        places = {FIRST: self._score(FIRST, first, [self._first_hash(), sha256])}
        for step, key in zip(self.steps, self.keys, strict=True):
            own = self.out / step.name
            if not _scored(step, own, sha256):
                # A LoRA is scored as the adapter that it is.
                model = str(own) if step.kind == "convert" else self._model(step)
                own = self._score(step.name, model, [key.whole, sha256])
            places[step.name] = own
        if not hosts.is_first():
            return
        manifest.evaluation = {name: _facts(place) for name, place in places.items()}
        compared = compare_results([str(place) for place in places.values()], seed=recipe.seed)
        results = compared["compare"]["bits_per_byte"]["results"]
        for name, facts in (manifest.steps or {}).items():
            change = results[str(places[name])]["difference"]
            facts.change = Change(bits_per_byte=change["value"], ci95=change["ci95"])
        self.run.save()

    def _first_hash(self) -> str:
        return self.run.manifest.inputs[f"{self.steps[0].name}.target"].sha256

    def _score(self, name: str, model: str, key: object) -> Path:
        """Scores a model on the test texts; returns the folder of its scores."""
        recipe, signals = self.recipe, self.signals.of(f"score {name}")
        request = EvaluationRequest([model], recipe.place(str(recipe.test)), seed=recipe.seed, mesh=recipe.mesh)

        def work(path: Path) -> None:
            evaluate_models(request, out=path, overwrite=True, progress=signals.progress, warn=signals.warn)
            signals.progress("evaluate", 1, 0)

        return self.run.nested(f"score:{name}", key, f"{SCORES}/{name}", work)

    def _report(self) -> None:
        manifest = self.run.manifest
        sections = manifest.to_json({"steps", "evaluation"})

        def work(partial: Path) -> None:
            write_steps_report(partial, self.recipe.out, resolved_values(self.recipe, self.steps), manifest.to_json())

        self.run.stage("report", [sections, [key.whole for key in self.keys]], REPORT, work, joint=False)

    # Results.

    def result_run(self) -> Path | None:
        """Returns the directory of the last step that is a run, whose result can be published; None without one."""
        return next((self.out / step.name for step in reversed(self.steps) if step.is_run), None)


def _scored(step: Step, place: Path, sha256: str) -> bool:
    """Whether a step has scored its own model on these texts, as others are scored."""
    if step.kind == "evaluate":
        return read_json(place / RESULTS).get("texts", {}).get("sha256") == sha256
    if not step.is_run:
        return False
    manifest, settings = load_manifest(place), step.settings
    test = None if manifest is None else manifest.inputs.get("test")
    usual = with_dtype(settings).dtype == "float32" and settings.evaluation.max_tokens is None
    return usual and test is not None and test.sha256 == sha256


def _facts(place: Path) -> EvaluationFacts:
    """Reads the score of a step's model from its run, or from a folder of `tmjax evaluate`."""
    manifest = load_manifest(place)
    if manifest is not None:
        return next(manifest.evaluation[arm] for arm in ("adapted", "merged") if arm in manifest.evaluation)
    return EvaluationFacts(**read_json(place / RESULTS)["evaluation"])


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Begins the message of an error with the name of the step."""
    try:
        yield
    except TmjaxError as error:
        error.args = (f"{name}: {error}",)
        raise


@contextlib.contextmanager
def _shown_command(out: str) -> Iterator[None]:
    """Lets the runs of steps record the command as it is published: with the last name of the run directory."""
    lines = given_command(out)
    if lines is None:
        yield
        return
    with lock.command(shlex.split(lines[0])):
        yield
