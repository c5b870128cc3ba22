"""Stages of an adaptation, each with its input hash: features, training of every arm, evaluation, report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tmjax
from tmjax.checkpoints import hf
from tmjax.commands.adapt.arm_data import DataOfArms
from tmjax.commands.adapt.arms import ADAPTED, Arm, arms_of
from tmjax.commands.adapt.budget_stage import plan_budget
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.source_parts import SourceParts
from tmjax.commands.adapt.start import Show, Starts
from tmjax.commands.adapt.training import ArmTrainer, Schedule
from tmjax.commands.callbacks import Warn, silent, tell_notes
from tmjax.commands.forgetting import measure_forgetting
from tmjax.commands.lora_stage import export_as_lora
from tmjax.commands.merge.session import refuse_nested
from tmjax.commands.notes import note_blank, note_hidden
from tmjax.commands.result_pages import write_result_pages
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import atomic_directory, remove
from tmjax.files.lock import OutputLock
from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.base import BESIDE_CHECKPOINT, dump_recipe
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.report.training_page import adapted_card, write_training_report
from tmjax.runs.command import given_command
from tmjax.runs.directory import RunDirectory, resumes
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import Manifest, Record, load_manifest
from tmjax.runs.run_facts import InputFacts, ScheduleFacts, TrainingFacts
from tmjax.sharding import hosts
from tmjax.teacher.stages import TeacherStages
from tmjax.train.budget import Budget
from tmjax.train.modes import Lora
from tmjax.train.peft import write_adapter
from tmjax.typing import Params

_INPUTS = ("source", "target", "texts", "valid", "test")


class Adapt:
    """One run of an adaptation. Every stage resumes; training resumes from its newest checkpoint.

    Args:
        recipe: The recipe.
        overwrite: Whether another run in the output is replaced.
        show: Called with (stage, done, all, note) while a stage runs.
        warn: Called with a line that the user should read.
        arms: The arms by name; those of the recipe unless given. A study has more arms than one run.
        schedules: The (steps, learning rate) pairs that each arm tries; those of the recipe unless given.

    Raises:
        InputError: An input is wrong, or the output is not a run of this recipe.
    """

    def __init__(
        self,
        recipe: AdaptRecipe,
        *,
        overwrite: bool = False,
        show: Show = lambda stage, done, total, note: None,
        warn: Warn = silent,
        arms: Mapping[str, Arm] | None = None,
        schedules: Mapping[str, Sequence[Schedule]] | None = None,
    ) -> None:
        for line in recipe.moved():
            warn(line)
        recipe = with_dtype(recipe.placed())
        if recipe.tokens is not None:
            Budget.of(recipe.tokens)  # too few are refused before anything is written
        self.recipe, self.inputs = recipe, AdaptInputs(recipe)
        self.show, self.warn = show, warn
        self.arms = dict(arms or arms_of(recipe))
        self.starts = Starts(self.inputs, show, warn)
        hosts.together(lambda: refuse_nested(recipe))
        path = Path(recipe.out)
        lock = hosts.together(lambda: OutputLock(path) if hosts.is_first() else None)
        try:
            self._key = hosts.together(self._input_hashes)
            hosts.require_same("inputs", self._key)
            self.run = self._begin(path, overwrite=overwrite)
        finally:
            if lock is not None:  # the run holds it too by now
                lock.release()
        self._make_trainer()
        self.budget = None
        if recipe.budgeted:
            self.budget = plan_budget(recipe, self.run, self._key, self.trainer.tokens_per_second)
            self.recipe = self.inputs.recipe = self.budget.applied(recipe)
            self._key = self._key | {"budget": str(self.budget.tokens)}
            self._make_trainer()
        self.schedules = schedules or dict.fromkeys(self.arms, self.recipe.training.schedules)

    def _make_trainer(self) -> None:
        parts = SourceParts(TeacherStages(self.run, self._step, self.warn), self._key, self.inputs)
        data = DataOfArms(parts, self.starts)
        self.trainer = ArmTrainer(self.inputs, self.starts, data, self.run.path / "training", self._key, self.show)

    def _step(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.show(stage, done, total, "")

    def _input_hashes(self) -> dict[str, str]:
        """Hashes everything that the results of the run depend on."""
        unset = {name for name in ("budget", "tokens") if getattr(self.recipe, name) is None}
        without = dict.fromkeys({"out", "mesh", "other_texts", "places", *_INPUTS, *unset}, True) | BESIDE_CHECKPOINT
        values = self.recipe.model_dump(mode="json", exclude=without)
        if not self.recipe.training.average:  # runs of versions without the option stay the same runs
            del values["training"]["average"]
        if self.recipe.sources:  # their content is hashed with the other inputs
            values["sources"] = [entry.weight for entry in self.recipe.sources]
        else:
            del values["sources"], values["mixing"]
        key = {"recipe": digest(values)} | self.inputs.hashes
        if self.inputs.run is not None:
            key["run"] = digest(load_manifest(self.inputs.run).to_json({"outputs"})["outputs"])
        return key

    def _begin(self, path: Path, *, overwrite: bool) -> RunDirectory:
        """Creates or resumes the run directory, after all inputs have been checked."""
        recipe, inputs, layout = self.recipe, self.inputs, self.inputs.layout
        if not hosts.agree(resumes(path, self._key)):
            hosts.together(lambda: inputs.check(self.warn))
            tell_notes(inputs.notes, self.warn)
        texts = inputs.held_out
        note_blank([inputs.texts.texts, texts.valid, texts.test, *texts.other_texts.values()], self.warn)
        names = inputs.names | {name: getattr(recipe, name) for name in ("texts", "valid", "test")}
        header = Manifest(
            tmjax=tmjax.__version__,
            seed=recipe.seed,
            inputs={name: InputFacts(path=names[name], sha256=value) for name, value in inputs.hashes.items()},
            notes=inputs.notes,
            training={},
            generated={},
            teacher={},
            key=self._key,
            commands=given_command(recipe.out),
            mesh=layout.sizes,
            devices=layout.devices,
            processes=hosts.count(),
            platform=jax.devices()[0].platform,
        )

        def show(stage: str, done: int, total: int) -> None:
            self.show(stage, done, total, "")

        def start() -> RunDirectory | None:
            if not hosts.is_first():
                return None
            return RunDirectory.start(path, dump_recipe(recipe), header, overwrite=overwrite, team=hosts, show=show)

        started = hosts.together(start)
        return hosts.together(lambda: started or RunDirectory.follow(path, header, team=hosts, show=show))

    def _arm_key(self, name: str, schedules: Sequence[Schedule]) -> list[Any]:
        """Returns the part of a stage's key that identifies an arm and its schedules, beside the recipe."""
        description, own = self.arms[name].description(), list(schedules)
        if own == self.recipe.training.schedules:
            return [description]
        return [description, [list(item) for item in own]]

    def train(self, name: str, schedules: Sequence[Schedule] | None = None) -> Path:
        """Trains one arm with every schedule and writes the best on validation text as a checkpoint.

        Args:
            name: The arm.
            schedules: The (steps, learning rate) pairs to try; those of the run unless given.

        Returns:
            The path of the checkpoint.
        """
        arm = self.arms[name]
        schedules = self.schedules[name] if schedules is None else schedules

        def work(partial: Path) -> Record:
            tried, best = [], None

            def attempt(steps: int, lr: float) -> float:
                nonlocal best
                result, objective, facts = self.trainer.train(name, arm, (steps, lr))
                tried.append(facts)
                if best is None or facts["valid_bits_per_byte"] < best[2]["valid_bits_per_byte"]:
                    best = (result, objective, facts)
                # The model before the first step has no part in the comparison of rates.
                return min((loss for step, loss in facts["valid_history"] if step), default=0.0)

            if self.budget is not None:
                self.budget.search(attempt)
            else:
                for steps, lr in schedules:
                    attempt(steps, lr)
            result, objective, facts = best
            target = self.inputs.target
            hf.write(target.with_params(result.params), partial, max_shard_size=self.recipe.export.max_shard_size)
            if isinstance(objective.mode, Lora) and name == ADAPTED:
                self._write_adapter(objective.mode, result.trained)
            settings = {"mode": arm.mode, "terms": sorted(arm.terms), "texts_by": arm.texts_by, "init": arm.start}
            trained = TrainingFacts(**facts, **settings, tried=[ScheduleFacts(**item) for item in tried])
            merge = None
            if self.recipe.merges and name == ADAPTED:
                merge = load_manifest(self.inputs.run) if self.inputs.run else self.starts.merge().run.manifest

            def record(manifest: Manifest) -> None:
                manifest.record("training", name, trained)
                if merge is not None:
                    manifest.update, manifest.alignment = merge.update, merge.alignment

            return record

        output = "merged" if name == ADAPTED else f"controls/{name}"
        path = self.run.stage(f"train:{name}", [self._key, name, *self._arm_key(name, schedules)], output, work)
        if hosts.is_first():
            for checkpoints in (self.run.path / "training" / name).glob("*/checkpoints"):
                remove(checkpoints)  # needed until the result is there
        return path

    def _write_adapter(self, mode: Lora, trained: Params) -> None:
        """Writes the matrices of low-rank updates as `adapter`; the first process does, with those of all devices."""
        target, whole = self.inputs.target, hosts.to_host(dict(trained))
        if hosts.is_first():
            with atomic_directory(self.run.path / "adapter", overwrite=True) as adapter:
                base = self.inputs.names["target"]
                write_adapter(mode, target.spec, target.rows, whole, adapter, base=base)

    def evaluate(self, checkpoints: Mapping[str, Path]) -> None:
        """Scores every arm on the test texts, with paired intervals and the gain due to the source.

        Args:
            checkpoints: The path of every arm's checkpoint.
        """
        inputs = self.inputs
        if inputs.held_out.test is None:
            return

        def work(partial: Path) -> Record:
            scorer = inputs.scorer(inputs.target, inputs.held_out.test)
            scores = {"target": scorer(inputs.target.params)}
            for name in inputs.source_names:
                model = inputs.source_model(name)
                scores[name] = inputs.scorer(model, inputs.held_out.test)(model.params)
            for done, (arm, path) in enumerate(checkpoints.items()):
                scores[arm] = scorer(inputs.load(path).params)
                self.show("evaluate", done + 1, len(checkpoints), "")
            if hosts.is_first():
                with partial.open("wb") as stream:
                    np.savez(stream, bytes=scorer.bytes, **{arm: value.nll for arm, value in scores.items()})
            note_hidden(scores, self.warn)
            options = self.recipe.evaluation
            left_out = {arm.without: name for name, arm in self.arms.items() if arm.without and name in scores}
            return evaluation_facts(
                scores, draws=options.draws, seed=self.recipe.seed, merged=ADAPTED, left_out=left_out
            ).record

        key = [self._key, list(checkpoints), self.recipe.evaluation.model_dump()]
        self.run.stage("evaluate", key, "scores.npz", work)

    def all(self) -> dict[str, Any]:
        """Runs every stage of the recipe; returns the manifest."""
        checkpoints = {name: self.train(name) for name in self.arms}
        self.evaluate(checkpoints)
        inputs, key = self.inputs, [self._key, *self._arm_key(ADAPTED, self.schedules[ADAPTED])]
        measure_forgetting(
            self.run,
            inputs.held_out.other_texts,
            lambda texts: inputs.scorer(inputs.target, texts),
            lambda: (inputs.target.params, inputs.load(checkpoints[ADAPTED]).params),
            arm=ADAPTED,
            key=key,
            options=self.recipe.evaluation,
            seed=self.recipe.seed,
        )

        names, place = inputs.names, inputs.located["target"]
        result = checkpoints[ADAPTED]
        export_as_lora(self.run, self.recipe.export, key, target=names["target"], place=place, result=result)

        def report(partial: Path) -> None:
            write_training_report(partial, self.run.path, self.recipe, self.run.manifest.to_json())

        write_result_pages(
            self.run,
            self.recipe,
            inputs.parents,
            sections={"evaluation", "source_gain", "gain_by_source", "training", "forgetting", "lora"},
            card=adapted_card,
            report=report,
        )
        return self.run.manifest.to_json()
