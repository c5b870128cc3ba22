"""One recipe's work: a merge per preset and source, curves, adaptations, and the tasks asked of every checkpoint."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from check import merge_recipe
from data import prepare
from schema import PaperRecipe

from tmjax.checkpoints import hf
from tmjax.checkpoints.load import config_directory
from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.run import Adapt
from tmjax.commands.evaluate import RESULTS, EvaluationRequest, TaskOptions, evaluate_models
from tmjax.commands.merge.context import merge_context
from tmjax.commands.merge.run import Merge
from tmjax.errors import InputError
from tmjax.evaluate.tasks import load_tasks, task_manager
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.runs.manifest import read_manifest
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.chain import apply_chain, chain_of
from tmjax.transfer.controls import CONTROLS


@dataclass(frozen=True)
class Arm:
    """A checkpoint that is asked the tasks: `name` is its folder's, `run` the run directory that it came from.

    `alpha` is the coefficient of a point of the curve, whose source contributes nothing if `empty`.
    """

    name: str
    kind: Literal["target", "source", "fused", "adapted", "control", "curve"]
    checkpoint: str
    preset: str = ""
    source: str = ""
    run: Path | None = None
    alpha: float | None = None
    empty: bool = False


class Experiment:
    """One recipe in a folder. Everything resumes: what is finished is read, not made again."""

    def __init__(self, recipe: PaperRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        # Their data first: a task that cannot be asked is to be known before hours of work.
        load_tasks(task_manager(recipe.task_names, recipe.tasks_folder), recipe.task_names, recipe.tasks_folder)
        self.files = prepare(recipe, folder / "texts")

    def merge(self, preset: str, source: str, name: str) -> Merge:
        """The merge of one source under a preset; only that of the recipe's first source has controls."""
        told = merge_recipe(self.recipe, preset, source, self.files, str(self.folder / name))
        told = told.model_copy(update={"controls": source == self.recipe.source})
        merge = Merge(told, warn=_warn)
        merge.all()
        return merge

    def curve(self, merge: Merge) -> Iterator[Arm]:
        """Merges from the same alignment at every alpha, each beside the same without anything of the source."""
        preset = merge.recipe.preset
        for alpha in self.recipe.alphas:
            for empty in (False, True):
                name = f"{preset}-alpha-{alpha:g}" + ("-shrink" if empty else "")
                out = self.folder / "curve" / name
                if not out.is_dir():
                    hf.export(_fused(merge, alpha, empty=empty), out)
                yield Arm(name, "curve", str(out), preset, self.recipe.source, alpha=alpha, empty=empty)

    def adapt(self, run: Path, *, solved: bool) -> Path:
        """Residual-frozen adaptation of a merge; with its controls, plain training among them, where it had some.

        What was `solved` is where training begins, beside the residual that the merge has chosen.
        """
        out, training = run.with_name(f"{run.name}-adapted"), self.recipe.training
        steps, tokens = self._updates()
        told = build_adapt_recipe(
            {
                "target": str(run),
                "mode": "residual-frozen",
                **{"texts": self.files["calibration"], "valid": self.files["valid"], "test": self.files["test"]},
                "other_texts": list(self.recipe.other_texts),
                "out": str(out),
                **({"init": "merged"} if solved else {"alpha": training.alpha}),
                "controls": (run / "controls").is_dir(),
                "seed": self.recipe.seed,
                "max_tokens": training.tokens,
                "training": {
                    "lr": [training.learning_rate],
                    "steps": steps,
                    "tokens_per_step": tokens,
                    # Few texts make few steps.
                    "warmup": min(20, steps // 2),
                    # The settings that the tables were measured with.
                    "validate_every": 20,
                    "patience": None,
                },
            }
        )
        Adapt(told, warn=_warn).all()
        return out

    def _updates(self) -> tuple[int, int]:
        """Steps of the paper's epochs (one per `batch` rows), and tokens that a step must have to read them all."""
        training = self.recipe.training
        tokenizer = load_tokenizer(config_directory(self.recipe.target))
        encodings = tokenizer.encode(read_texts(self.files["calibration"]).texts)
        sizes = [min(len(item.ids) + 1, training.tokens) for item in encodings]
        steps = max(1, training.epochs * len(sizes) // training.batch)
        return steps, max(training.tokens, math.ceil(training.epochs * sum(sizes) / steps))

    def arms(self, *, curves: bool) -> list[Arm]:
        """Every checkpoint that is asked the tasks; what is missing is made."""
        recipe = self.recipe
        found = [Arm("target", "target", recipe.target), Arm("source", "source", recipe.source, source=recipe.source)]
        for preset in recipe.presets:
            for number, source in enumerate((recipe.source, *recipe.sources)):
                name = preset + (f"-source-{number}" if number else "")
                merge = self.merge(preset, source, name)
                run = self.folder / name
                told: dict[str, Any] = {"preset": preset, "source": source}
                found.append(Arm(name, "fused", str(run / "merged"), **told, run=run))
                found += self._controls(run, **told)
                if curves and not number:
                    found += self.curve(merge)
                adapted = self.adapt(run, solved=not all(step.contributes for step in merge.inputs.chain))
                found.append(Arm(adapted.name, "adapted", str(adapted / "merged"), **told, run=adapted))
                found += self._controls(adapted, **told)
        return found

    def _controls(self, run: Path, **told: Any) -> list[Arm]:
        folders = sorted((run / "controls").glob("control:*"))
        return [
            Arm(f"{run.name}-{item.name.removeprefix('control:')}", "control", str(item), **told, run=run)
            for item in folders
        ]

    def ask(self, arm: Arm) -> dict[str, Any]:
        """Task results and bits per byte of an arm; those on disk are read."""
        recipe, place = self.recipe, self.folder / "results" / arm.name
        if not (place / RESULTS).is_file():
            options = TaskOptions(
                recipe.task_names, recipe.tasks_folder, recipe.num_fewshot, recipe.limit, recipe.chat_template
            )
            request = EvaluationRequest([arm.checkpoint], self.files["test"], options, seed=recipe.seed)
            evaluate_models(request, out=place)
        return json.loads((place / RESULTS).read_text(encoding="utf-8"))


def _fused(merge: Merge, alpha: float, *, empty: bool) -> Model:
    """The merge at a fixed alpha, in memory; without anything of the source if `empty`."""
    chain = chain_of(merge.recipe.model_copy(update={"alpha": alpha}))
    view = merge.view(CONTROLS["control:shrink"] if empty else None)
    return apply_chain(chain, view, replace(merge_context(merge.session, "curve"), alpha=alpha)).model


def manifest_of(run: Path) -> dict[str, Any]:
    """The manifest of a run that an arm came from; raises InputError if it is gone."""
    manifest = read_manifest(run)
    if manifest is None:
        raise InputError(f"{run} has no manifest")
    return manifest


def _warn(message: str) -> None:
    print(f"paper: warning: {message}", file=sys.stderr)
