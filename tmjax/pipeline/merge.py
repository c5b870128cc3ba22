"""The stages of a merge, each with its input hash: alignment, fuse, controls, evaluate, report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.convert import hf
from tmjax.convert.model import load_model
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scores
from tmjax.evaluate.bootstrap import resample, source_gain
from tmjax.evaluate.controls import CONTROLS, Control, plan_permutations
from tmjax.fuse.coefficients import Fit
from tmjax.fuse.diagnostics import require_transfer
from tmjax.fuse.merge import fuse
from tmjax.hub.rundir import RECIPE, read_manifest
from tmjax.pipeline.alignment import AlignmentRun
from tmjax.pipeline.forgetting import measure_forgetting
from tmjax.recipe import Recipe, build_recipe, read_recipe
from tmjax.report.card import model_card
from tmjax.report.html import write_report
from tmjax.sharding import hosts
from tmjax.typing import Params


class Merge(AlignmentRun):
    """One run of a recipe; every stage resumes."""

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
                    params = (
                        inputs.target.params if path is None else load_model(path, placement=inputs.layout.place).params
                    )
                    scores[arm] = scorer(params)
                self.progress("evaluate", done + 1, len(arms))
            if hosts.is_first():
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
        measure_forgetting(self.run, self.inputs, self._fuse_key("merged"), merged)
        alignment = self.align()

        def card(partial: Path) -> None:
            partial.write_text(model_card(self.recipe, self.run.manifest), encoding="utf-8")

        def report(partial: Path) -> None:
            write_report(partial, self.run.path, self.recipe, self.run.manifest, alignment)

        facts = {name: self.run.manifest.get(name) for name in ("evaluation", "coefficients", "source_gain", "update")}
        facts |= {"forgetting": self.run.manifest["forgetting"]} if "forgetting" in self.run.manifest else {}
        self.run.stage("card", facts, f"{merged.name}/README.md", card, joint=False)
        self.run.stage("report", facts, "report.html", report, joint=False)
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
