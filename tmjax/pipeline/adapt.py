"""The stages of an adaptation, each with its input hash: features, training of every arm, evaluation, report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tmjax
from tmjax.activations import store as activation_store
from tmjax.activations.capture import capture
from tmjax.adapt.checkpoints import Checkpoints
from tmjax.adapt.data import Batches
from tmjax.adapt.guidance import SITE, SourceFeatures, by_depth, by_plan, last_tokens, start_maps
from tmjax.adapt.modes import Lora, shardings_of
from tmjax.adapt.peft import write_adapter
from tmjax.adapt.recipe import AdaptRecipe
from tmjax.adapt.step import Objective
from tmjax.adapt.train import Facts, Trainer, TrainResult
from tmjax.convert import hf
from tmjax.evaluate.controls import derangement
from tmjax.hub.atomic import atomic_directory, remove
from tmjax.hub.rundir import RunDirectory, digest, read_manifest
from tmjax.models.decoder import init_params
from tmjax.pipeline.adapt_inputs import AdaptInputs
from tmjax.pipeline.adapt_start import PLACEBOS, Show, Starts
from tmjax.pipeline.alignment import Warn, refuse_nested
from tmjax.pipeline.forgetting import measure_forgetting
from tmjax.pipeline.merge import evaluation_facts
from tmjax.pipeline.training_log import StepLog
from tmjax.recipe import dump_recipe
from tmjax.report.training import adapted_card, write_training_report
from tmjax.typing import Array

ADAPTED = "adapted"
SFT = "control:sft"
_INPUTS = ("source", "target", "texts", "valid", "test")


class Adapt:
    """One run of an adaptation; every stage resumes, training from its newest checkpoint."""

    def __init__(
        self,
        recipe: AdaptRecipe,
        *,
        overwrite: bool = False,
        show: Show = lambda stage, done, total, note: None,
        warn: Warn = lambda message: None,
    ) -> None:
        self.recipe, self.inputs = recipe, AdaptInputs(recipe)
        self.show, self.warn = show, warn
        self.starts = Starts(self.inputs, show, warn)
        path = Path(recipe.out)
        hashes = self.inputs.hashes
        refuse_nested(recipe)
        told = recipe.model_dump(mode="json", exclude={"out", "mesh", "other_texts", *_INPUTS})
        key = {"recipe": digest(told)} | hashes
        if self.inputs.run is not None:
            key["run"] = digest(read_manifest(self.inputs.run)["outputs"])
        previous = read_manifest(path)
        if previous is None or previous.get("key") != key:
            self.inputs.check(warn)
        layout = self.inputs.layout
        named = self.inputs.names | {name: getattr(recipe, name) for name in ("texts", "valid", "test")}
        header = {
            "tmjax": tmjax.__version__,
            "seed": recipe.seed,
            "inputs": {name: {"path": named[name], "sha256": value} for name, value in hashes.items()},
            "evaluation": {},
            "source_gain": None,
            "update": {},
            "alignment": {},
            "training": {},
        }
        here = {"mesh": layout.sizes, "devices": layout.devices, "platform": jax.devices()[0].platform}
        self.run = RunDirectory.start(path, dump_recipe(recipe), header, key=key, overwrite=overwrite, here=here)
        self._key = key

    # Guidance.

    def _features(self, which: str) -> activation_store.Activations:
        """Stored features of `target`, `source` or `random_source` at the spans of the training texts."""
        inputs, recipe = self.inputs, self.recipe
        start = recipe.start if which == "target" else None

        def work(partial: Path) -> None:
            rows, (of_target, of_source) = inputs.rows
            model = inputs.target if which == "target" else inputs.source
            params = model.params
            if which == "random_source":
                places = shardings_of(inputs.layout, model.rows, model.spec)
                params = init_params(model.spec, jax.random.key(recipe.seed), places)
            elif which == "target":
                params = self.starts.of(ADAPTED, "sft", recipe.start)[1]
            documents = last_tokens(of_target if which == "target" else of_source)
            capture(
                model.spec,
                params,
                rows,
                documents,
                partial,
                sites=(SITE,),
                dtype=inputs.dtype,
                layout=inputs.layout,
                progress=lambda done, total: self.show(f"features:{which}", done, total, ""),
            )

        return activation_store.read(
            self.run.stage(f"features:{which}", [self._key, which, start], f"features/{which}", work)
        )

    def _guidance(self, arm: str) -> tuple[SourceFeatures, dict[str, Array], dict[str, Array], list[float]]:
        """The source's features for batches, initial maps, frozen statistics, variance explained by the maps."""
        inputs = self.inputs
        held = self._features("random_source" if arm == "control:random_source" else "source")
        layers = by_depth(inputs.target.spec.layers, held.layers)
        if self.recipe.guidance.layers == "plan":
            layers = by_plan(list(inputs.alignment.layer_plans.values()))
        order = derangement(len(held.rows), self.recipe.seed) if arm == "control:shuffled_rows" else None
        source = SourceFeatures.of(held, inputs.rows[1][0], layers, order)
        return source, *start_maps(self._features("target"), source, penalty=self.recipe.guidance.penalty)

    # Training.

    def _arms(self) -> dict[str, tuple[str, str]]:
        """Mode and start of every arm."""
        mode, start = self.recipe.mode, self.recipe.start
        arms = {ADAPTED: (mode, start)}
        if self.recipe.controls:
            if (mode, start) != ("sft", "target"):
                arms[SFT] = ("sft", "target")
            if mode in ("guided", "residual-frozen"):
                arms |= dict.fromkeys(PLACEBOS, (mode, start))
        return arms

    def _train(self, arm: str, mode: str, start: str, lr: float) -> tuple[TrainResult, Objective, dict[str, Any]]:
        recipe, inputs, training = self.recipe, self.inputs, self.recipe.training
        kind, trained, frozen = self.starts.of(arm, "sft" if mode == "guided" else mode, start)
        guidance, facts = None, {}
        if mode == "guided":
            guidance, maps, statistics, explained = self._guidance(arm)
            frozen = frozen | statistics
            facts = {"source_layers": guidance.layers, "explained_at_start": explained}
            trained = trained | maps
        documents, counts = inputs.texts.documents(inputs.tokenizer)
        data = Batches(
            documents,
            tokens=training.tokens_per_step,
            seed=recipe.seed,
            lengths=training.row_lengths,
            max_tokens=recipe.max_tokens,
            counts=counts,
            guidance=guidance,
            multiple=inputs.layout.batch_multiple,
        )
        config = training.config(lr, recipe.dtype, recipe.guidance.weight if mode == "guided" else 0.0)
        objective = Objective(inputs.target.spec, config, kind, inputs.layout.mesh)
        folder = self.run.path / "training" / arm / f"lr-{lr:g}"
        keeper = Checkpoints(folder / "checkpoints", [self._key, arm, lr], keep=training.keep)
        log = StepLog(folder / "log.csv")

        def progress(fact: Facts) -> None:
            log.add(fact)
            note = f"loss {fact.loss:.3f}, {fact.tokens / fact.seconds:,.0f} tokens/s"
            note += "" if log.valid is None else f", validation {log.valid:.4f} bits/byte"
            self.show(f"{arm} lr {lr:g}", fact.step, config.steps, note)

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
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "best_step": result.steps if chosen is None else chosen.step,
            "valid_bits_per_byte": None if chosen is None else chosen.loss,
            "valid_history": [] if chosen is None else [list(item) for item in chosen.history],
            "shapes": [list(shape) for shape in sorted({(data.rows(i), n) for i, n in enumerate(data.shapes)})],
        }
        return result, objective, facts

    def train(self, arm: str) -> Path:
        """The checkpoint of one arm: trained with every learning rate, the best on validation text folded and kept."""
        mode, start = self._arms()[arm]

        def work(partial: Path) -> dict[Any, Any]:
            tried, best = [], None
            for lr in self.recipe.training.lr:
                result, objective, facts = self._train(arm, mode, start, lr)
                tried.append(facts)
                if best is None or facts["valid_bits_per_byte"] < best[2]["valid_bits_per_byte"]:
                    best = (result, objective, facts)
            result, objective, facts = best
            target = self.inputs.target
            hf.write(target.with_params(result.params), partial, max_shard_size=self.recipe.export.max_shard_size)
            if isinstance(objective.mode, Lora) and arm == ADAPTED:
                with atomic_directory(self.run.path / "adapter", overwrite=True) as adapter:
                    base = self.inputs.names["target"]
                    write_adapter(objective.mode, target.spec, target.rows, result.trained, adapter, base=base)
            told = {("training", arm): facts | {"mode": mode, "init": start, "tried": tried}}
            if self.recipe.merges and arm == ADAPTED:
                merge = read_manifest(self.inputs.run) if self.inputs.run else self.starts.merge().run.manifest
                told |= {name: merge[name] for name in ("update", "alignment")}
            return told

        output = "merged" if arm == ADAPTED else f"controls/{arm}"
        path = self.run.stage(f"train:{arm}", [self._key, arm, mode, start], output, work)
        for checkpoints in (self.run.path / "training" / arm).glob("lr-*/checkpoints"):
            remove(checkpoints)  # needed until the result is there
        return path

    # What came of it.

    def evaluate(self, checkpoints: Mapping[str, Path]) -> None:
        """Scores every arm's checkpoint on the test texts, with paired intervals and the gain due to the source."""
        inputs = self.inputs
        if inputs.test is None:
            return

        def work(partial: Path) -> dict[Any, Any]:
            scorer = inputs.scorer(inputs.target, inputs.test)
            scores = {"target": scorer(inputs.target.params)}
            if inputs.names["source"]:
                scores["source"] = inputs.scorer(inputs.source, inputs.test)(inputs.source.params)
            for done, (arm, path) in enumerate(checkpoints.items()):
                scores[arm] = scorer(inputs.load(path).params)
                self.show("evaluate", done + 1, len(checkpoints), "")
            with partial.open("wb") as stream:
                np.savez(stream, bytes=scorer.bytes, **{arm: value.nll for arm, value in scores.items()})
            return evaluation_facts(scores, draws=self.recipe.evaluation.draws, seed=self.recipe.seed, merged=ADAPTED)

        key = [self._key, list(checkpoints), self.recipe.evaluation.model_dump()]
        self.run.stage("evaluate", key, "scores.npz", work)

    def all(self) -> dict[str, Any]:
        """Every stage of the recipe; returns the manifest."""
        checkpoints = {arm: self.train(arm) for arm in self._arms()}
        self.evaluate(checkpoints)
        inputs = self.inputs
        measure_forgetting(
            self.run,
            inputs.other_texts,
            lambda texts: inputs.scorer(inputs.target, texts),
            lambda: (inputs.target.params, inputs.load(checkpoints[ADAPTED]).params),
            arm=ADAPTED,
            key=[self._key, ADAPTED, *self._arms()[ADAPTED]],
            options=self.recipe.evaluation,
            seed=self.recipe.seed,
        )

        def card(partial: Path) -> None:
            partial.write_text(adapted_card(self.recipe, self.run.manifest), encoding="utf-8")

        def report(partial: Path) -> None:
            write_training_report(partial, self.run.path, self.recipe, self.run.manifest)

        facts = {name: self.run.manifest.get(name) for name in ("evaluation", "source_gain", "training")}
        facts |= {"forgetting": self.run.manifest["forgetting"]} if "forgetting" in self.run.manifest else {}
        self.run.stage("card", facts, "merged/README.md", card)
        self.run.stage("report", facts, "report.html", report)
        return self.run.manifest
