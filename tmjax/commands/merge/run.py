"""Stages of a merge, each with its input hash: alignment, fusion, controls, evaluation, report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.checkpoints import hf
from tmjax.checkpoints.load import load_model
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.commands.forgetting import measure_forgetting
from tmjax.commands.lora_stage import export_as_lora
from tmjax.commands.merge.context import merge_context
from tmjax.commands.merge.other_sources import other_sources
from tmjax.commands.merge.samples import sample_texts
from tmjax.commands.merge.session import open_session
from tmjax.commands.merge.source_stages import SourceStages
from tmjax.commands.notes import note_hidden
from tmjax.commands.report import SAMPLES
from tmjax.commands.result_pages import write_result_pages
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer, Scores
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import write_json
from tmjax.files.jsonfile import read_json
from tmjax.recipes.base import BESIDE_CHECKPOINT, read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.recipes.sources import WITHOUT
from tmjax.report.card import model_card
from tmjax.report.html import write_report
from tmjax.runs.manifest import Manifest, Record, find_manifest, read_manifest
from tmjax.runs.provenance import MERGED
from tmjax.runs.run_facts import CoefficientFacts, ControlFacts
from tmjax.runs.run_files import RECIPE
from tmjax.sharding import hosts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.chain import Merged, apply_chain, fit_facts, needs_of
from tmjax.transfer.controls import CONTROLS, Control, Draw
from tmjax.transfer.operator import code_hashes
from tmjax.transfer.recipe import build_recipe
from tmjax.transfer.source_view import SourceView
from tmjax.transfer.update_table import require_transfer
from tmjax.typing import Params


class Merge:
    """One run of a recipe; every stage resumes.

    Attributes:
        session: Recipe, inputs and run directory.
        source: Stages that measure the source.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        amend: bool = False,
        progress: Progress = quiet,
        warn: Warn = silent,
    ) -> None:
        self.session = open_session(recipe, overwrite=overwrite, amend=amend, progress=progress, warn=warn)
        self.recipe, self.inputs, self.run = self.session.recipe, self.session.inputs, self.session.run
        self.source = SourceStages(self.session)

    def fuse_key(self, arm: str) -> object:
        """Returns the key of the checkpoint of an arm."""
        return fuse_key(self.source, arm)

    # Arms.

    def view(self, control: Control | None = None) -> SourceView:
        """Returns the view of the source for an arm: the true one, or that of a control."""
        view = self.source.view()
        if control is None:
            return view
        vocab = self.inputs.target.spec.vocab
        draw = Draw(self.recipe.seed, vocab, self.inputs.target_tokenizer.known(vocab))
        return control.intervene(view, draw)

    def _merge(self, arm: str, view: SourceView, partial: Path) -> Merged:
        """Applies the operators to the view of an arm, and writes the checkpoint."""
        merged = apply_chain(self.inputs.chain, view, merge_context(self.session, arm))
        hf.write(merged.model, partial, max_shard_size=self.recipe.export.max_shard_size)
        return merged

    def align(self) -> Alignment:
        """Returns the alignment of target and source."""
        return self.source.align()

    def fuse(self) -> Path:
        """Makes the merged checkpoint; returns its path."""
        if "alignment" in needs_of(self.inputs.chain):
            self.align()

        def work(partial: Path) -> Record:
            merged = self._merge("fuse", self.view(), partial)
            warning = require_transfer(merged.table, allow_negligible=self.recipe.allow_negligible)
            if warning:
                self.session.warn(warning)

            def record(manifest: Manifest) -> None:
                manifest.update = {name: dict(row) for name, row in merged.table.items()}
                if merged.fit is not None:
                    manifest.coefficients = CoefficientFacts(**fit_facts(merged.fit))
                manifest.operators = dict(merged.facts)

            return record

        return self.session.stage("fuse", self.fuse_key(MERGED), MERGED, work)

    def control(self, control: Control) -> Path:
        """Makes the checkpoint of one control arm; returns its path."""

        def work(partial: Path) -> Record:
            merged = self._merge(control.name, self.view(control), partial)
            coefficients = {} if merged.fit is None else fit_facts(merged.fit)
            table = {name: dict(row) for name, row in merged.table.items()}
            facts = ControlFacts(**coefficients, update=table, operators=dict(merged.facts))
            return lambda manifest: manifest.record("controls", control.name, facts)

        return self.session.stage(control.name, self.fuse_key(control.name), f"controls/{control.name}", work)

    def from_other_sources(self) -> dict[str, tuple[Path, object]]:
        """Makes the same merge from other sources; returns checkpoint and input hash by arm."""
        results = {}
        for arm, recipe in other_sources(self.recipe).items():
            amend = hosts.agree(find_manifest(Path(recipe.out)) is not None)
            other = Merge(
                recipe,
                amend=amend,
                progress=lambda stage, done, total, arm=arm: self.session.progress(f"{arm}, {stage}", done, total),
                warn=lambda message, arm=arm: self.session.warn(f"{arm}: {message}"),
            )
            results[arm] = other.fuse(), other.fuse_key(MERGED)
        return results

    # Results.

    def evaluate(self, checkpoints: Mapping[str, Path], other_keys: Sequence[object] = ()) -> None:
        """Scores every arm's checkpoint on the test texts, with paired intervals and the gain due to the source.

        `other_keys` are the input hashes of checkpoints that are not this run's own.
        """
        inputs, session = self.inputs, self.session
        if inputs.recipe.test is None:
            return

        def work(partial: Path) -> Record:
            scores: dict[str, Scores] = {}

            def score(arm: str, scorer: Scorer, params: Params) -> None:
                scores[arm] = scorer(params)
                session.progress("evaluate", len(scores), len(inputs.models) + len(checkpoints))

            scorer = inputs.scorer(inputs.target, inputs.target_tokenizer, inputs.test)
            score("target", scorer, inputs.target.params)
            own = inputs.scorer(inputs.source, inputs.source_tokenizer, inputs.test)
            score("source", own, inputs.source.params)
            for name, model in inputs.further_sources.items():
                tokenizer = load_tokenizer(model.directory, model.spec.vocab)
                score(name, inputs.scorer(model, tokenizer, inputs.test), model.params)
            for arm, path in checkpoints.items():
                score(arm, scorer, load_model(path, placement=inputs.layout.place).params)
            if hosts.is_first():
                with partial.open("wb") as stream:
                    np.savez(stream, bytes=scorer.bytes, **{arm: value.nll for arm, value in scores.items()})
            note_hidden(scores, session.warn)
            left_out = {name: arm for name in inputs.models if (arm := f"{WITHOUT}{name}") in scores}
            draws, seed = self.recipe.evaluation.draws, self.recipe.seed
            return evaluation_facts(scores, draws=draws, seed=seed, left_out=left_out).record

        keys = [*(self.fuse_key(arm) for arm in checkpoints), *other_keys]
        options = self.recipe.evaluation.model_dump()
        session.stage("evaluate", [keys, inputs.hashes["test"], options], "scores.npz", work)

    def samples(self, merged: Path) -> Path:
        """Generates texts of target and merged model after beginnings of the test texts; returns their file."""
        inputs = self.inputs
        texts = inputs.test or inputs.valid or inputs.texts

        def work(partial: Path) -> None:
            models = {"target": inputs.target, "merged": load_model(merged, placement=inputs.layout.place)}
            samples = sample_texts(models, texts, self.recipe.seed, inputs.layout)
            if hosts.is_first():
                write_json(partial, {"samples": samples})

        return self.session.stage("samples", [self.fuse_key(MERGED), texts.sha256], SAMPLES, work)

    def all(self) -> dict[str, Any]:
        """Runs every stage of the recipe; returns the manifest as it stands in the file."""
        merged = self.fuse()
        checkpoints = {MERGED: merged}
        if self.recipe.controls:
            checkpoints |= {name: self.control(control) for name, control in CONTROLS.items()}
        others = self.from_other_sources()
        checkpoints |= {arm: path for arm, (path, _) in others.items()}
        self.evaluate(checkpoints, [key for _, key in others.values()])
        self._forgetting(merged)
        self._lora(merged)
        self._pages(self.samples(merged))
        return self.run.manifest.to_json()

    def _forgetting(self, merged: Path) -> None:
        inputs = self.inputs
        measure_forgetting(
            self.run,
            inputs.other_texts,
            lambda texts: inputs.scorer(inputs.target, inputs.target_tokenizer, texts),
            lambda: (inputs.target.params, load_model(merged, placement=inputs.layout.place).params),
            arm=MERGED,
            key=self.fuse_key(MERGED),
            options=self.recipe.evaluation,
            seed=self.recipe.seed,
        )

    def _lora(self, merged: Path) -> None:
        recipe, key = self.recipe, [self.fuse_key(MERGED), self.inputs.hashes["target"]]
        place = recipe.place(recipe.target)
        export_as_lora(self.run, recipe.export, key, target=recipe.target, place=place, result=merged)

    def _pages(self, samples: Path) -> None:
        """Writes model card, report and the record of the result's origin."""
        alignment = self.align() if "alignment" in needs_of(self.inputs.chain) else None

        def report(partial: Path) -> None:
            manifest, texts = self.run.manifest.to_json(), read_json(samples)["samples"]
            write_report(partial, self.run.path, self.recipe, manifest, alignment, texts)

        names = {"target": self.recipe.target} | self.inputs.models
        sections = {"evaluation", "coefficients", "source_gain", "update", "operators", "forgetting", "lora"}
        write_result_pages(
            self.run,
            self.recipe,
            {which: (name, self.recipe.place(name)) for which, name in names.items()},
            sections=sections | {"gain_by_source"},
            card=model_card,
            report=report,
        )


def fuse_key(source: SourceStages, arm: str) -> object:
    """Returns the key of the checkpoint of an arm: everything that it depends on."""
    sections = {"operators", "coefficients", "screen_texts", "alpha", "evaluation", "export", "seed"}
    options = source.recipe.model_dump(mode="json", include=sections, exclude=BESIDE_CHECKPOINT)
    # Code outside the package alone, so that the keys of other runs stay the same.
    code = code_hashes(source.inputs.chain)
    key = [arm, source.alignment_key(), options, source.inputs.hashes.get("valid"), *([code] if code else [])]
    return [*key, source.teacher.several_key()] if source.recipe.sources else key


def open_run(path: Path, changes: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of an existing run, with changes; raises InputError if `path` is not a run."""
    if read_manifest(path) is None:
        raise InputError(f"{path} is not a run of tmjax (no manifest.json)")
    return build_recipe(read_recipe(path / RECIPE) | {"out": str(path)} | dict(changes))
