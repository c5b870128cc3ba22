"""The stages of a merge, each with its input hash: alignment, fuse, controls, evaluate, report."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.checkpoints import hf
from tmjax.checkpoints.hub import read_json
from tmjax.checkpoints.load import load_model
from tmjax.commands.forgetting import measure_forgetting
from tmjax.commands.merge.aligned import AlignmentRun
from tmjax.commands.merge.other_sources import other_sources
from tmjax.commands.merge.samples import sample_texts
from tmjax.commands.merge.teacher_data import Predictions
from tmjax.commands.notes import note_hidden
from tmjax.commands.report import REPORT, SAMPLES
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer, Scores
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import write_json
from tmjax.models.spec import DecoderSpec
from tmjax.recipes.merge import Recipe, build_recipe, read_recipe
from tmjax.report.card import model_card
from tmjax.report.html import write_report
from tmjax.runs.manifest import BlendFacts, CoefficientFacts, ControlFacts, Manifest, Record, SolveFacts, read_manifest
from tmjax.runs.run_files import RECIPE
from tmjax.sharding import hosts
from tmjax.train.data import Batch, Batches
from tmjax.train.step import next_token_loss
from tmjax.transfer.coefficients.grid import Fit
from tmjax.transfer.coefficients.learned import BatchLoss
from tmjax.transfer.controls import CONTROLS, Control, derangement, plan_permutations
from tmjax.transfer.merge import Regressed, fuse
from tmjax.transfer.operators.embeddings import Blended, Lexicon, read_lexicon
from tmjax.transfer.operators.predictions import Solved
from tmjax.transfer.update_table import require_transfer
from tmjax.typing import ArrayLike, Params


class Merge(AlignmentRun):
    """One run of a recipe; every stage resumes."""

    def _fuse(self, arm: str, alignment: Alignment, control: Control | None, source: Params, partial: Path) -> Record:
        """Transports, chooses coefficients on `valid`, writes the checkpoint of one arm; records manifest facts."""
        inputs = self.inputs
        fused = fuse(
            alignment,
            inputs.target,
            inputs.source,
            self.recipe.fusion,
            alpha=self.recipe.alpha,
            **inputs.validation,
            training=self._training(),
            activations=self._regressed(control),
            lexicon=self._lexicon(control) if self.recipe.blends else None,
            wanted=Predictions(self).wanted(control) if self.recipe.solves else None,
            source_params=source,
            permutations=plan_permutations(alignment, self.recipe.seed) if control and control.permute_plan else None,
            zero_source=control is not None and control.zero_source,
            progress=self.step(arm),
            dtype=inputs.dtype,
            layout=inputs.layout,
            known=inputs.target_tokenizer.known(inputs.target.spec.vocab),
        )
        if control is None:
            warning = require_transfer(fused.table, allow_negligible=self.recipe.allow_negligible)
            if warning:
                self.warn(warning)
        hf.write(fused.model, partial, max_shard_size=self.recipe.export.max_shard_size)
        lexical = _blend_facts(fused.blended) if fused.blended else None
        solve = _solve_facts(fused.solved) if fused.solved else None
        fit = _fit_facts(fused.fit)

        def record(manifest: Manifest) -> None:
            if control is None:
                manifest.update, manifest.coefficients = fused.table, CoefficientFacts(**fit)
                manifest.lexical, manifest.solve = lexical, solve
            else:
                facts = ControlFacts(**fit, update=fused.table, lexical=lexical, solve=solve)
                manifest.record("controls", arm, facts)

        return record

    def _lexicon(self, control: Control | None) -> Lexicon:
        """The target's tokens as the source reads them; for controls given other tokens' source embeddings.

        Rows shuffled: before the map is fitted; plan permuted: what the map, rightly fitted, makes of other tokens.
        """
        inputs, seed = self.inputs, self.recipe.seed
        vocabularies = inputs.target.spec.vocab, inputs.source.spec.vocab
        found = read_lexicon(inputs.target_tokenizer, inputs.source_tokenizer, inputs.texts.texts, vocabularies)
        if control and control.shuffle_rows:
            return found._replace(before=derangement(len(found.ids), seed))
        if control and control.permute_plan:
            return found._replace(after=derangement(len(found.ids), seed))
        return found

    def _training(self) -> tuple[Iterable[Batch], BatchLoss] | None:
        """Calibration batches, the same for all arms, and the target's loss, where coefficients are learned."""
        options = self.recipe.fusion
        if options.fit != "learned" or self.recipe.alpha is not None:
            return None
        tokenizer, spec = self.inputs.target_tokenizer, self.inputs.target.spec
        documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(self.inputs.texts.texts)]
        longest = min(spec.max_positions, self.recipe.activations.max_tokens)
        data = Batches(
            documents, tokens=options.learning.batch_tokens, seed=self.recipe.seed, lengths=2, max_tokens=longest
        )
        return data, _token_loss(spec)

    def _regressed(self, control: Control | None) -> Regressed | None:
        """The activations that a closed-form transport solves on, the control's where it has its own."""
        if self.recipe.fusion.transport != "regression" or not self.recipe.activations.keep:
            return None
        random = control is not None and control.random_source
        shuffled = control is not None and control.shuffle_rows
        held = self.activations("target"), self.activations("random_source" if random else "source")
        return Regressed(*held, derangement(len(held[1].rows), self.recipe.seed) if shuffled else None)

    def fuse(self) -> Path:
        """The merged checkpoint."""
        alignment = self.align()

        def work(partial: Path) -> Record:
            return self._fuse("fuse", alignment, None, self.inputs.source.params, partial)

        return self.run.stage("fuse", self._fuse_key("merged"), "merged", work)

    def control(self, control: Control) -> Path:
        """The checkpoint of one control arm: intervenes before alignment, then everything is run again."""

        def work(partial: Path) -> Record:
            params = self.random_source() if control.random_source else self.inputs.source.params
            return self._fuse(control.name, self.control_alignment(control), control, params, partial)

        return self.run.stage(control.name, self._fuse_key(control.name), f"controls/{control.name}", work)

    def from_other_sources(self) -> dict[str, tuple[Path, object]]:
        """By arm, the checkpoint of the same merge from another source, and its input hash."""
        found = {}
        for arm, told in other_sources(self.recipe).items():
            amend = hosts.agree(read_manifest(Path(told.out)) is not None)
            other = Merge(
                told,
                amend=amend,
                progress=lambda stage, done, total, arm=arm: self.progress(f"{arm}, {stage}", done, total),
                warn=lambda message, arm=arm: self.warn(f"{arm}: {message}"),
            )
            found[arm] = other.fuse(), other._fuse_key("merged")
        return found

    def evaluate(self, checkpoints: Mapping[str, Path], also: Sequence[object] = ()) -> None:
        """Scores every arm's checkpoint on the test texts, with paired intervals and the gain due to the source.

        `also` are the input hashes of checkpoints that are not this run's own.
        """
        inputs = self.inputs
        if inputs.recipe.test is None:
            return

        def work(partial: Path) -> Record:
            scores: dict[str, Scores] = {}

            def score(arm: str, scorer: Scorer, params: Params) -> None:
                scores[arm] = scorer(params)
                self.progress("evaluate", len(scores), 2 + len(checkpoints))

            scorer = inputs.scorer(inputs.target, inputs.target_tokenizer, inputs.test)
            score("target", scorer, inputs.target.params)
            own = inputs.scorer(inputs.source, inputs.source_tokenizer, inputs.test)
            score("source", own, inputs.source.params)
            for arm, path in checkpoints.items():
                score(arm, scorer, load_model(path, placement=inputs.layout.place).params)
            if hosts.is_first():
                with partial.open("wb") as stream:
                    np.savez(stream, bytes=scorer.bytes, **{arm: value.nll for arm, value in scores.items()})
            note_hidden(scores, self.warn)
            facts = evaluation_facts(scores, draws=self.recipe.evaluation.draws, seed=self.recipe.seed)
            return facts.record

        keys = [*(self._fuse_key(arm) for arm in checkpoints), *also]
        self.run.stage(
            "evaluate", [keys, inputs.hashes["test"], self.recipe.evaluation.model_dump()], "scores.npz", work
        )

    def samples(self, merged: Path) -> Path:
        """What target and merged model write after beginnings of the test texts."""
        inputs = self.inputs
        texts = inputs.test or inputs.valid or inputs.texts

        def work(partial: Path) -> None:
            models = {"target": inputs.target, "merged": load_model(merged, placement=inputs.layout.place)}
            written = sample_texts(models, texts, self.recipe.seed, inputs.layout)
            if hosts.is_first():
                write_json(partial, {"samples": written})

        return self.run.stage("samples", [self._fuse_key("merged"), texts.sha256], SAMPLES, work)

    def all(self) -> dict[str, Any]:
        """Every stage of the recipe; returns the manifest."""
        merged = self.fuse()
        checkpoints = {"merged": merged}
        if self.recipe.controls:
            checkpoints |= {name: self.control(control) for name, control in CONTROLS.items()}
        others = self.from_other_sources()
        checkpoints |= {arm: path for arm, (path, _) in others.items()}
        self.evaluate(checkpoints, [key for _, key in others.values()])
        inputs = self.inputs
        measure_forgetting(
            self.run,
            inputs.other_texts,
            lambda texts: inputs.scorer(inputs.target, inputs.target_tokenizer, texts),
            lambda: (inputs.target.params, load_model(merged, placement=inputs.layout.place).params),
            arm="merged",
            key=self._fuse_key("merged"),
            options=self.recipe.evaluation,
            seed=self.recipe.seed,
        )
        samples = self.samples(merged)
        alignment = self.align()

        def card(partial: Path) -> None:
            partial.write_text(model_card(self.recipe, self.run.manifest.to_json()), encoding="utf-8")

        def report(partial: Path) -> None:
            manifest = self.run.manifest.to_json()
            write_report(partial, self.run.path, self.recipe, manifest, alignment, read_json(samples)["samples"])

        facts = self.run.manifest.to_json({"evaluation", "coefficients", "source_gain", "update", "forgetting"})
        self.run.stage("card", facts, f"{merged.name}/README.md", card, joint=False)
        self.run.stage("report", facts, REPORT, report, joint=False)
        return self.run.manifest.to_json()


@functools.cache
def _token_loss(spec: DecoderSpec) -> BatchLoss:
    """The same function object for every arm, so that nothing is compiled again."""
    return functools.partial(next_token_loss, spec)


def _blend_facts(blended: Blended) -> BlendFacts:
    """What was chosen (None: nothing), and validation bits per byte without and with it."""
    return BlendFacts(chosen=blended.chosen, valid_bits_per_byte=list(blended.losses), trials=blended.trials)


def _solve_facts(solved: Solved) -> SolveFacts:
    """What the rounds of a solve chose, and how many positions they heard of."""
    return SolveFacts(
        valid_bits_per_byte=solved.losses,
        rounds=solved.chosen,
        trials=solved.trials,
        positions=dict(zip(("true", "source", "all"), solved.positions, strict=True)),
    )


def _mean(value: ArrayLike | float) -> float:
    return float(np.mean(np.asarray(value, np.float64)))


def _fit_facts(chosen: Fit) -> dict[str, Any]:
    """Coefficients by role (means, if learned: by layer they are in the update table), and what was tried."""
    return {
        "by_role": {
            role: {"alpha": _mean(alpha), "beta": _mean(beta)} for role, (alpha, beta) in chosen.coefficients.items()
        },
        "valid_bits_per_byte": chosen.loss,
        "trials": [
            {"loss": trial.loss, "coefficients": {role: list(pair) for role, pair in trial.coefficients.items()}}
            for trial in chosen.trials
        ],
    }


def open_run(path: Path, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of an existing run, with changes; raises InputError if `path` is not a run."""
    if read_manifest(path) is None:
        raise InputError(f"{path} is not a run of tmjax (no manifest.json)")
    return build_recipe(read_recipe(path / RECIPE) | {"out": str(path)} | dict(changes))
