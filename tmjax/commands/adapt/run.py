"""The stages of an adaptation, each with its input hash: features, training of every arm, evaluation, report."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tmjax
from tmjax.checkpoints import hf
from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.arms import ADAPTED, Arm, arms_of
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.material import Material
from tmjax.commands.adapt.start import Show, Starts
from tmjax.commands.adapt.training_log import StepLog
from tmjax.commands.forgetting import measure_forgetting
from tmjax.commands.merge.aligned import Warn, refuse_nested, tell_notes
from tmjax.commands.notes import note_blank, note_hidden
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import atomic_directory, remove
from tmjax.files.lock import OutputLock
from tmjax.recipes.adapt import AdaptRecipe, TrainingOptions, build_adapt_recipe
from tmjax.recipes.merge import dump_recipe
from tmjax.report.training import adapted_card, write_training_report
from tmjax.runs.directory import RunDirectory, resumes
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import InputFacts, Manifest, Record, ScheduleFacts, TrainingFacts, load_manifest
from tmjax.train.checkpoints import Checkpoints
from tmjax.train.data import Batches
from tmjax.train.loop import Facts, Trainer, TrainResult
from tmjax.train.modes import Lora
from tmjax.train.peft import write_adapter
from tmjax.train.step import Objective, padding_of

_INPUTS = ("source", "target", "texts", "valid", "test")


def schedule_name(training: TrainingOptions, steps: int, lr: float) -> str:
    """The folder of one schedule: `lr-X`, with the number of steps where the recipe has several."""
    return f"lr-{lr:g}" + (f"-steps-{steps}" if len(training.steps) > 1 else "")


class Adapt:
    """One run of an adaptation; every stage resumes, training from its newest checkpoint.

    `arms` and the (steps, learning rate) pairs that each tries are those of the recipe, unless others are given: a
    study has more arms than one run.
    """

    def __init__(
        self,
        recipe: AdaptRecipe,
        *,
        overwrite: bool = False,
        show: Show = lambda stage, done, total, note: None,
        warn: Warn = lambda message: None,
        arms: Mapping[str, Arm] | None = None,
        schedules: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> None:
        for line in recipe.moved():
            warn(line)
        recipe = recipe.placed()
        self.recipe, self.inputs = recipe, AdaptInputs(recipe)
        self.show, self.warn = show, warn
        self.starts = Starts(self.inputs, show, warn)
        path = Path(recipe.out)
        refuse_nested(recipe)
        with OutputLock(path):
            key = self._begin(path, overwrite=overwrite)
        self._key = key
        self.arms = dict(arms or arms_of(recipe))
        self.schedules = schedules or dict.fromkeys(self.arms, recipe.training.schedules)
        self.material = Material(self.run, key, self.inputs, self.starts, show)

    def _begin(self, path: Path, *, overwrite: bool) -> dict[str, str]:
        """Creates or resumes the run directory, after everything that it needs was found to be good; its key."""
        recipe, warn = self.recipe, self.warn
        hashes = self.inputs.hashes
        told = recipe.model_dump(mode="json", exclude={"out", "mesh", "other_texts", "places", *_INPUTS})
        key = {"recipe": digest(told)} | hashes
        if self.inputs.run is not None:
            key["run"] = digest(load_manifest(self.inputs.run).to_json({"outputs"})["outputs"])
        if not resumes(path, key):
            self.inputs.check(warn)
            tell_notes(self.inputs.notes, warn)
        inputs = self.inputs
        note_blank([inputs.texts.texts, inputs.valid, inputs.test, *inputs.other_texts.values()], warn)
        layout = self.inputs.layout
        named = self.inputs.names | {name: getattr(recipe, name) for name in ("texts", "valid", "test")}
        header = Manifest(
            tmjax=tmjax.__version__,
            seed=recipe.seed,
            inputs={name: InputFacts(path=named[name], sha256=value) for name, value in hashes.items()},
            notes=self.inputs.notes,
            training={},
            generated={},
            teacher={},
            key=key,
            mesh=layout.sizes,
            devices=layout.devices,
            platform=jax.devices()[0].platform,
        )
        self.run = RunDirectory.start(
            path,
            dump_recipe(recipe),
            header,
            overwrite=overwrite,
            show=lambda stage, done, total: self.show(stage, done, total, ""),
        )
        return key

    # Training.

    def _train(self, name: str, arm: Arm, steps: int, lr: float) -> tuple[TrainResult, Objective, dict[str, Any]]:
        recipe, inputs, training = self.recipe, self.inputs, self.recipe.training
        if arm.anneal is not None:
            training = training.model_copy(update={"anneal": arm.anneal})
        kind, trained, frozen = self.starts.of(name, arm.mode, arm.start)
        guidance, lessons, facts = None, None, {}
        if "guidance" in arm.terms:
            guidance, maps, statistics, explained = self.material.guidance(arm)
            frozen = frozen | statistics
            facts = {"source_layers": guidance.layers, "explained_at_start": explained}
            trained = trained | maps
        if "distillation" in arm.terms:
            lessons = self.material.taught(arm)
            facts["teacher_positions"] = len(lessons.document)
        documents, counts = self.material.texts(arm.writer).documents(inputs.tokenizer)
        facts["texts"] = len(documents)
        data = Batches(
            documents,
            tokens=training.tokens_per_step,
            seed=recipe.seed,
            lengths=training.row_lengths,
            max_tokens=recipe.max_tokens,
            counts=counts,
            guidance=guidance,
            lessons=lessons,
            multiple=inputs.layout.batch_multiple,
        )
        config = training.config(
            steps,
            lr,
            recipe.dtype,
            guide_weight=0.0 if guidance is None else recipe.guidance.weight,
            teach_weight=0.0 if lessons is None else recipe.distillation.weight,
        )
        padding = padding_of(inputs.tokenizer.known(inputs.target.spec.vocab))
        objective = Objective(inputs.target.spec, config, kind, inputs.layout.mesh, padding)
        what = schedule_name(training, steps, lr)
        folder = self.run.path / "training" / name / what
        keeper = Checkpoints(folder / "checkpoints", [self._key, name, steps, lr], keep=training.keep)
        log = StepLog(folder / "log.csv")

        def progress(fact: Facts) -> None:
            log.add(fact)
            note = f"loss {fact.loss:.3f}, {fact.tokens / fact.seconds:,.0f} tokens/s"
            note += "" if log.valid is None else f", validation {log.valid:.4f} bits/byte"
            self.show(f"{name} {what}", fact.step, config.steps, note)

        score = None if inputs.valid is None else (lambda params: inputs.valid_scorer(params).bits_per_byte)
        trainer = Trainer(
            objective,
            inputs.layout,
            validate=score,
            validate_every=training.validate_every,
            patience=training.patience,
            keeper=keeper,
            keep_every=training.keep_every,
            progress=progress,
        )
        try:
            result = trainer.run(trained, frozen, data)
        finally:
            keeper.close()
            log.close()
        chosen = result.selection
        facts |= {
            "lr": lr,
            "folder": what,
            "planned_steps": steps,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "best_step": result.steps if chosen is None else chosen.step,
            "valid_bits_per_byte": None if chosen is None else chosen.loss,
            "valid_history": [] if chosen is None else [list(item) for item in chosen.history],
            "shapes": [list(shape) for shape in sorted({(data.rows(i), n) for i, n in enumerate(data.shapes)})],
        }
        return result, objective, facts

    def _told(self, name: str) -> list[Any]:
        """What decides, beside the recipe, what an arm becomes."""
        arm, own = self.arms[name], list(self.schedules[name])
        told = [arm.told()]
        return told if own == self.recipe.training.schedules else [*told, [list(item) for item in own]]

    def train(self, name: str) -> Path:
        """The checkpoint of one arm: trained with every schedule, the best on validation text folded and kept."""
        arm = self.arms[name]

        def work(partial: Path) -> Record:
            tried, best = [], None
            for steps, lr in self.schedules[name]:
                result, objective, facts = self._train(name, arm, steps, lr)
                tried.append(facts)
                if best is None or facts["valid_bits_per_byte"] < best[2]["valid_bits_per_byte"]:
                    best = (result, objective, facts)
            result, objective, facts = best
            target = self.inputs.target
            hf.write(target.with_params(result.params), partial, max_shard_size=self.recipe.export.max_shard_size)
            if isinstance(objective.mode, Lora) and name == ADAPTED:
                with atomic_directory(self.run.path / "adapter", overwrite=True) as adapter:
                    base = self.inputs.names["target"]
                    write_adapter(objective.mode, target.spec, target.rows, result.trained, adapter, base=base)
            what = {"mode": arm.mode, "terms": sorted(arm.terms), "writer": arm.writer, "init": arm.start}
            trained = TrainingFacts(**facts, **what, tried=[ScheduleFacts(**item) for item in tried])
            merge = None
            if self.recipe.merges and name == ADAPTED:
                merge = load_manifest(self.inputs.run) if self.inputs.run else self.starts.merge().run.manifest

            def record(manifest: Manifest) -> None:
                manifest.record("training", name, trained)
                if merge is not None:
                    manifest.update, manifest.alignment = merge.update, merge.alignment

            return record

        output = "merged" if name == ADAPTED else f"controls/{name}"
        path = self.run.stage(f"train:{name}", [self._key, name, *self._told(name)], output, work)
        for checkpoints in (self.run.path / "training" / name).glob("*/checkpoints"):
            remove(checkpoints)  # needed until the result is there
        return path

    # What came of it.

    def evaluate(self, checkpoints: Mapping[str, Path]) -> None:
        """Scores every arm's checkpoint on the test texts, with paired intervals and the gain due to the source."""
        inputs = self.inputs
        if inputs.test is None:
            return

        def work(partial: Path) -> Record:
            scorer = inputs.scorer(inputs.target, inputs.test)
            scores = {"target": scorer(inputs.target.params)}
            if inputs.names["source"]:
                scores["source"] = inputs.scorer(inputs.source, inputs.test)(inputs.source.params)
            for done, (arm, path) in enumerate(checkpoints.items()):
                scores[arm] = scorer(inputs.load(path).params)
                self.show("evaluate", done + 1, len(checkpoints), "")
            with partial.open("wb") as stream:
                np.savez(stream, bytes=scorer.bytes, **{arm: value.nll for arm, value in scores.items()})
            note_hidden(scores, self.warn)
            options = self.recipe.evaluation
            return evaluation_facts(scores, draws=options.draws, seed=self.recipe.seed, merged=ADAPTED).record

        key = [self._key, list(checkpoints), self.recipe.evaluation.model_dump()]
        self.run.stage("evaluate", key, "scores.npz", work)

    def all(self) -> dict[str, Any]:
        """Every stage of the recipe; returns the manifest."""
        checkpoints = {name: self.train(name) for name in self.arms}
        self.evaluate(checkpoints)
        inputs = self.inputs
        measure_forgetting(
            self.run,
            inputs.other_texts,
            lambda texts: inputs.scorer(inputs.target, texts),
            lambda: (inputs.target.params, inputs.load(checkpoints[ADAPTED]).params),
            arm=ADAPTED,
            key=[self._key, *self._told(ADAPTED)],
            options=self.recipe.evaluation,
            seed=self.recipe.seed,
        )

        def card(partial: Path) -> None:
            partial.write_text(adapted_card(self.recipe, self.run.manifest.to_json()), encoding="utf-8")

        def report(partial: Path) -> None:
            write_training_report(partial, self.run.path, self.recipe, self.run.manifest.to_json())

        facts = self.run.manifest.to_json({"evaluation", "source_gain", "training", "forgetting"})
        self.run.stage("card", facts, "merged/README.md", card)
        self.run.stage("report", facts, "report.html", report)
        return self.run.manifest.to_json()


def adapt(*, overwrite: bool = False, **recipe: Any) -> tuple[Model, dict[str, Any]]:
    """`tmjax adapt` in Python: the adapted model and the run's manifest.

    `recipe` are the keys of its recipe: at least `target`, `texts` and `out`, mostly `source`, `valid` and `mode`;
    paths as on the command line. What is in `out` already is not done again. Raises InputError naming wrong keys.
    """
    told = build_adapt_recipe({name: str(x) if isinstance(x, Path) else x for name, x in recipe.items()})
    run = Adapt(told, overwrite=overwrite, warn=lambda message: warnings.warn(message, stacklevel=2))
    try:
        manifest = run.all()
    finally:
        run.run.close()
    return run.inputs.load(run.run.path / "merged"), manifest
