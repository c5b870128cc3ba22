"""The paper's experiments: align, fuse, adapt, evaluate, controls, curves, and tables beside the published numbers.

    python experiments/paper/run.py --dry-run            # checks all six recipes; no network, no accelerator
    python experiments/paper/run.py malay --out runs/malay

A real run needs the hub (80 GB of models and data sets) and an accelerator with the memory that `--dry-run` estimates.
A recipe may also name local checkpoints, texts and tasks. Every stage resumes: give the same command again.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check import dry_run, merge_recipe
from data import prepare
from schema import PaperRecipe, load_recipe, recipe_file, recipe_names
from tables import published_table

from tmjax import cli
from tmjax.errors import InputError
from tmjax.hub.atomic import write_json, write_text
from tmjax.pipeline import Merge
from tmjax.pipeline.evaluation import RESULTS, TaskOptions, evaluate_models

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Experiment:
    """One recipe in a folder: texts, a merge per preset and source, an adaptation of each, tasks asked of all."""

    def __init__(self, recipe: PaperRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.files = prepare(recipe, folder / "texts")

    def merge(self, preset: str, source: str, name: str) -> Path:
        """The run directory of a merge with all controls."""
        out = self.folder / name
        told = merge_recipe(self.recipe, preset, source, self.files, str(out))
        Merge(told, warn=lambda message: print(f"warning: {message}", file=sys.stderr)).all()
        return out

    def adapt(self, run: Path) -> Path | None:
        """Residual-frozen adaptation of a merge with its controls, SFT among them; None if tmjax has no such stage."""
        if "adapt" not in {command.name or command.callback.__name__ for command in cli.app.registered_commands}:
            return None
        out, training = run.with_name(f"{run.name}-adapted"), self.recipe.training
        rows = len(Path(self.files["calibration"]).read_text(encoding="utf-8").splitlines())
        told = {
            "target": str(run),
            "mode": "residual-frozen",
            **{"texts": self.files["calibration"], "valid": self.files["valid"], "test": self.files["test"]},
            "out": str(out),
            "alpha": training.alpha,
            "controls": True,
            "max_tokens": training.tokens,
            "training": {
                "lr": [training.learning_rate],
                "steps": max(1, training.epochs * rows // training.batch),
                "tokens_per_step": training.batch * training.tokens,
            },
        }
        file = self.folder / f"{out.name}.yaml"
        write_text(file, yaml.safe_dump(told, sort_keys=False))
        if cli.run(["adapt", str(file)]) != 0:
            raise InputError(f"the adaptation {file} failed, see above")
        return out

    def curve(self, run: Path, preset: str) -> Iterator[tuple[str, str]]:
        """Merges from the same alignment at every alpha of the curve."""
        for alpha in self.recipe.alphas:
            out = self.folder / f"{run.name}-alpha-{alpha:g}"
            told = merge_recipe(self.recipe, preset, self.recipe.source, self.files, str(out))
            Merge(told.model_copy(update={"alpha": alpha, "controls": False})).all()
            yield f"{preset}, alpha {alpha:g}", str(out / "merged")

    def arms(self, *, curves: bool) -> dict[str, str]:
        """Every checkpoint that is asked the tasks, by its name in the tables; what is missing is made."""
        found = {"target": self.recipe.target, "source": self.recipe.source}
        for preset in self.recipe.presets:
            pairs = [("", self.recipe.source), *((f"-source-{i}", s) for i, s in enumerate(self.recipe.sources, 1))]
            for suffix, source in pairs:
                label = preset + (f", source {source}" if suffix else "")
                run = self.merge(preset, source, preset + suffix)
                found[label] = str(run / "merged")
                if not suffix:
                    found |= {f"{label}, {arm.name}": str(arm) for arm in sorted((run / "controls").glob("control:*"))}
                    if curves:
                        found |= dict(self.curve(run, preset))
                adapted = self.adapt(run)
                if adapted is not None:
                    found[f"{label}, adapted"] = str(adapted / "merged")
                    found |= {
                        f"{label}, adapted, {arm.name}": str(arm)
                        for arm in sorted((adapted / "controls").glob("control:*"))
                    }
        return found

    def evaluate(self, arms: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Task results of every arm; those on disk are read."""
        options = TaskOptions(
            self.recipe.task_names,
            self.recipe.tasks_folder,
            self.recipe.num_fewshot,
            self.recipe.limit,
            self.recipe.chat_template,
        )
        found = {}
        for label, checkpoint in arms.items():
            place = self.folder / "results" / label.replace("/", "_").replace(", ", "-").replace(" ", "-")
            if not (place / RESULTS).is_file():
                evaluate_models([checkpoint], self.files["test"], tasks=options, out=place)
            found[label] = json.loads((place / RESULTS).read_text(encoding="utf-8"))
        return found


@app.command()
def run(
    recipes: Annotated[list[str] | None, typer.Argument(help="Names or .yaml files; all of this folder's.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only check, offline.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for everything that a recipe makes.")] = Path("runs/paper"),
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Also merge at every alpha of the curve.")
    ] = True,
) -> None:
    """Checks recipes, or runs them and prints their tables beside the published numbers."""
    told = [load_recipe(recipe_file(name)) for name in recipes or recipe_names()]
    for recipe in told:
        facts = dry_run(recipe)
        sizes = ", ".join(
            f"{preset} {item['peak'] / 2**30:.0f} GiB at its peak, {item['alignment'] / 2**30:.1f} GiB on disk"
            for preset, item in facts["memory"].items()
        )
        print(f"{recipe.name}: {len(facts['tasks'])} tasks; {sizes}", file=sys.stderr)
    for recipe in () if dry else told:
        experiment = Experiment(recipe, out / recipe.name)
        results = experiment.evaluate(experiment.arms(curves=curves))
        table = published_table(recipe, results)
        write_text(experiment.folder / "table.md", table)
        write_json(experiment.folder / "results.json", {"recipe": recipe.name, "results": results})
        print(table)


if __name__ == "__main__":
    sys.exit(cli.run(application=app, name="paper"))
