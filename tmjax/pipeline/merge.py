"""The stages of a merge, each with its input hash: activations, alignment, fuse, controls, evaluate, report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tmjax
from tmjax.activations import store as activation_store
from tmjax.activations.capture import capture
from tmjax.align import store as alignment_store
from tmjax.align.alignment import Alignment, align, needed_sites
from tmjax.convert import hf
from tmjax.convert.model import load_model
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer, Scores
from tmjax.evaluate.bootstrap import resample, source_gain
from tmjax.evaluate.controls import CONTROLS, Control, derangement, plan_permutations
from tmjax.fuse.coefficients import Fit
from tmjax.fuse.diagnostics import require_transfer
from tmjax.fuse.merge import fuse
from tmjax.hub.rundir import RECIPE, RunDirectory, digest, read_manifest
from tmjax.hub.texts import read_texts
from tmjax.hub.tokenizer import load_tokenizer
from tmjax.models.decoder import init_params
from tmjax.pipeline.inputs import Inputs
from tmjax.recipe import Recipe, build_recipe, dump_recipe, read_recipe
from tmjax.report.card import model_card
from tmjax.report.html import write_report
from tmjax.typing import Params

#: (stage, steps done, steps in all) while a stage runs.
Progress = Callable[[str, int, int], None]
Warn = Callable[[str], None]
_INPUTS = ("source", "target", "texts", "valid", "test")


def _quiet(_stage: str, _done: int, _total: int) -> None:
    """No progress display."""


def _refuse_nested(recipe: Recipe) -> None:
    """Raises InputError if a local input lies inside the output, where --overwrite would delete it."""
    out = Path(recipe.out).resolve()
    for name in _INPUTS:
        value = getattr(recipe, name)
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(out):
            raise InputError(f"{name} lies inside the output {recipe.out}; choose another output directory")


class Merge:
    """One run of a recipe; every stage resumes."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        amend: bool = False,
        progress: Progress = _quiet,
        warn: Warn = lambda message: None,
    ) -> None:
        self.recipe, self.inputs = recipe, Inputs(recipe)
        self.progress, self.warn = progress, warn
        self._alignment: Alignment | None = None
        path = Path(recipe.out)
        hashes = self.inputs.hashes
        _refuse_nested(recipe)
        # What may change without making another run of it: where things lie, and whether a no-op is let through.
        told = recipe.model_dump(mode="json", exclude={"out", "allow_negligible", *_INPUTS})
        key = {"recipe": digest(told)} | hashes
        previous = read_manifest(path)
        if previous is None or previous.get("key") != key:
            self.inputs.check()
        layout = self.inputs.layout
        header = {
            "tmjax": tmjax.__version__,
            "seed": recipe.seed,
            "mesh": layout.sizes,
            "devices": layout.devices,
            "platform": jax.devices()[0].platform,
            "inputs": {name: {"path": getattr(recipe, name), "sha256": value} for name, value in hashes.items()},
            "evaluation": {},
            "source_gain": None,
            "update": {},
            "alignment": {},
        }
        if amend:
            self.run = RunDirectory.amend(path, dump_recipe(recipe), header, key=key)
        else:
            self.run = RunDirectory.start(path, dump_recipe(recipe), header, key=key, overwrite=overwrite)

    def _step(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)

    # Input hashes of the stages, each holding those of what it reads.

    def _activation_key(self, model: str) -> object:
        hashes = {name: self.inputs.hashes[name] for name in ("texts", "source", "target")}
        return [model, hashes, self.recipe.activations.model_dump(), list(self.recipe.fusion.roles), self.recipe.dtype]

    def _alignment_key(self) -> object:
        return [self._activation_key("source"), self.recipe.alignment.model_dump(mode="json")]

    def _fuse_key(self, arm: str) -> object:
        options = self.recipe.model_dump(mode="json", include={"fusion", "alpha", "evaluation", "export", "seed"})
        return [arm, self._alignment_key(), options, self.inputs.hashes.get("valid")]

    # Stages.

    def activations(self, which: str) -> activation_store.Activations:
        """Captures the activations of `target`, `source` or `random_source`."""
        name = f"activations:{which}"

        def work(partial: Path) -> dict[Any, Any]:
            rows, (target_documents, source_documents) = self.inputs.rows
            model = self.inputs.target if which == "target" else self.inputs.source
            params = self._random_source() if which == "random_source" else model.params
            capture(
                model.spec,
                params,
                rows,
                target_documents if which == "target" else source_documents,
                partial,
                sites=needed_sites(self.inputs.projections.values()),
                batch_tokens=self.recipe.activations.batch_tokens,
                memory_mib=self.recipe.activations.memory_mib,
                dtype=self.inputs.dtype,
                place=self.inputs.layout.place_batch,
                multiple=self.inputs.layout.batch_multiple,
                progress=self._step(name),
            )
            return {("rows",): {"documents": len(self.inputs.texts), "rows": len(rows), "pooling": rows.pooling}}

        key = [self._activation_key(which), self.recipe.seed if which == "random_source" else None]
        return activation_store.read(self.run.stage(name, key, f"activations/{which}", work))

    def _random_source(self) -> dict[str, jax.Array]:
        params = init_params(self.inputs.source.spec, jax.random.key(self.recipe.seed))
        rows = {row.path: row for row in self.inputs.source.rows}
        shardings = {path: self.inputs.place(rows[path], value.shape) for path, value in params.items()}
        return {
            path: value if shardings[path] is None else jax.device_put(value, shardings[path])
            for path, value in params.items()
        }

    def align(self) -> Alignment:
        """Activations of both models, then all plans; what did not converge is said once."""
        if self._alignment is not None:
            return self._alignment
        target, source = self.activations("target"), self.activations("source")

        def work(partial: Path) -> dict[Any, Any]:
            found = align(
                target, source, self.inputs.projections, self.recipe.alignment, progress=self._step("alignment")
            )
            alignment_store.save(found, partial)
            return {"alignment": found.certificates()}

        path = self.run.stage("alignment", self._alignment_key(), "alignment", work)
        found = alignment_store.load(path)
        for site, held in found.certificates().items():
            if held["converged"] < held["problems"]:
                missing = held["problems"] - held["converged"]
                self.warn(
                    f"{missing} of {held['problems']} plans of {site} did not converge (marginal error up to "
                    f"{held['max_marginal_error']:.1e}); raise alignment.max_iterations or alignment.epsilon"
                )
        self._alignment = found
        return found

    def _fuse(
        self, arm: str, alignment: Alignment, control: Control | None, source: Params, partial: Path
    ) -> dict[Any, Any]:
        """Transports, chooses coefficients on `valid`, writes the checkpoint of one arm; returns manifest facts."""
        inputs = self.inputs
        fused = fuse(
            alignment,
            inputs.target,
            inputs.source,
            self.recipe.fusion,
            alpha=self.recipe.alpha,
            loss=lambda params: inputs.valid_scorer(params).bits_per_byte,
            source_params=source,
            permutations=plan_permutations(alignment, self.recipe.seed) if control and control.permute_plan else None,
            zero_source=control is not None and control.zero_source,
            progress=self._step(arm),
        )
        if control is None:
            warning = require_transfer(fused.table, allow_negligible=self.recipe.allow_negligible)
            if warning:
                self.warn(warning)
        hf.write(fused.model, partial, max_shard_size=self.recipe.export.max_shard_size)
        facts = _fit_facts(fused.fit)
        if control is None:
            return {"update": fused.table, "coefficients": facts}
        return {("controls", arm): facts | {"update": fused.table}}

    def fuse(self) -> Path:
        """The merged checkpoint."""
        alignment = self.align()

        def work(partial: Path) -> dict[Any, Any]:
            return self._fuse("fuse", alignment, None, self.inputs.source.params, partial)

        return self.run.stage("fuse", self._fuse_key("merged"), "merged", work)

    def control(self, control: Control) -> Path:
        """The checkpoint of one control arm: intervenes before alignment, then everything is run again."""

        def work(partial: Path) -> dict[Any, Any]:
            params = self._random_source() if control.random_source else self.inputs.source.params
            return self._fuse(control.name, self._control_alignment(control), control, params, partial)

        return self.run.stage(control.name, self._fuse_key(control.name), f"controls/{control.name}", work)

    def _control_alignment(self, control: Control) -> Alignment:
        if not (control.random_source or control.shuffle_rows):
            return self.align()
        target = self.activations("target")
        source = self.activations("random_source" if control.random_source else "source")
        order = derangement(len(source.rows), self.recipe.seed) if control.shuffle_rows else None
        step = self._step(control.name)
        return align(target, source, self.inputs.projections, self.recipe.alignment, source_rows=order, progress=step)

    def evaluate(self, checkpoints: Mapping[str, Path]) -> None:
        """Scores every arm's checkpoint on the test texts, with paired intervals and the gain due to the source."""
        inputs = self.inputs
        if inputs.recipe.test is None:
            return
        arms = {"target": None, "source": None, **checkpoints}

        def work(partial: Path) -> dict[Any, Any]:
            scorer = inputs.scorer(inputs.target, inputs.target_tokenizer, inputs.test)
            scores: dict[str, Scores] = {}
            for done, (arm, path) in enumerate(arms.items()):
                if arm == "source":
                    own = inputs.scorer(inputs.source, inputs.source_tokenizer, inputs.test)
                    scores[arm] = own(inputs.source.params)
                else:
                    params = inputs.target.params if path is None else load_model(path, placement=inputs.place).params
                    scores[arm] = scorer(params)
                self.progress("evaluate", done + 1, len(arms))
            with partial.open("wb") as stream:
                np.savez(stream, bytes=scorer.bytes, **{arm: value.nll for arm, value in scores.items()})
            return evaluation_facts(scores, draws=self.recipe.evaluation.draws, seed=self.recipe.seed)

        keys = [self._fuse_key(arm) for arm in checkpoints]
        self.run.stage(
            "evaluate", [keys, inputs.hashes["test"], self.recipe.evaluation.model_dump()], "scores.npz", work
        )

    def all(self) -> dict[str, Any]:
        """Every stage of the recipe; returns the manifest."""
        merged = self.fuse()
        checkpoints = {"merged": merged}
        if self.recipe.controls:
            checkpoints |= {name: self.control(control) for name, control in CONTROLS.items()}
        self.evaluate(checkpoints)
        alignment = self.align()

        def card(partial: Path) -> None:
            partial.write_text(model_card(self.recipe, self.run.manifest), encoding="utf-8")

        def report(partial: Path) -> None:
            write_report(partial, self.run.path, self.recipe, self.run.manifest, alignment)

        facts = {name: self.run.manifest.get(name) for name in ("evaluation", "coefficients", "source_gain", "update")}
        self.run.stage("card", facts, f"{merged.name}/README.md", card)
        self.run.stage("report", facts, "report.html", report)
        return self.run.manifest


def _fit_facts(chosen: Fit) -> dict[str, Any]:
    return {
        "by_role": {role: {"alpha": alpha, "beta": beta} for role, (alpha, beta) in chosen.coefficients.items()},
        "valid_bits_per_byte": chosen.loss,
        "trials": [
            {"loss": trial.loss, "coefficients": {role: list(pair) for role, pair in trial.coefficients.items()}}
            for trial in chosen.trials
        ],
    }


def evaluation_facts(scores: Mapping[str, Scores], *, draws: int, seed: int) -> dict[str, Any]:
    """Manifest entries `evaluation` and `source_gain` of scored arms."""
    sampled = resample(scores, draws=draws, seed=seed)
    evaluation = {
        arm: {
            "bits_per_byte": sampled.point[arm],
            "ci95": list(sampled.interval(arm)),
            "documents": len(value.nll),
            "bytes": int(value.bytes.sum()),
            "tokens": int(value.tokens.sum()),
        }
        for arm, value in scores.items()
    }
    controls = [arm for arm in scores if arm in CONTROLS]
    return {"evaluation": evaluation, "source_gain": source_gain(sampled, controls) if controls else None}


def open_run(path: Path, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of an existing run, with changes; raises InputError if `path` is not a run."""
    if read_manifest(path) is None:
        raise InputError(f"{path} is not a run of tmjax (no manifest.json)")
    return build_recipe(read_recipe(path / RECIPE) | {"out": str(path)} | dict(changes))


def evaluate_models(
    directories: list[str], texts: str, *, draws: int = 10000, seed: int = 0, progress: Progress = _quiet
) -> dict[str, Any]:
    """Bits per byte of checkpoints on one text file, with 95% intervals: the result of `tmjax evaluate`."""
    documents = read_texts(texts)
    scores = {}
    for done, directory in enumerate(directories):
        model = load_model(directory)
        scores[directory] = Scorer(model.spec, load_tokenizer(model.directory), documents)(model.params)
        progress("evaluate", done + 1, len(directories))
    return {"evaluation": evaluation_facts(scores, draws=draws, seed=seed)["evaluation"]}
