"""The paper's experiments: align, fuse, adapt, evaluate, controls, curves, and tables beside the published numbers.

    python experiments/paper/run.py --dry-run            # checks all six recipes; no network, no accelerator
    python experiments/paper/run.py malay                # into runs/paper/malay
    python experiments/paper/run.py experiments/swahili/paper.yaml

A real run of the six needs the hub (80 GB of models and data sets) and an accelerator with the memory that `--dry-run`
estimates. A recipe may also name local checkpoints, texts and tasks. Every stage resumes: give the same command again.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check import dry_run
from experiment import Experiment
from schema import load_recipe, recipe_file, recipe_names
from tables import paper_tables, plot_curve

from tmjax import cli
from tmjax.files.atomic import write_bytes, write_json, write_text

#: Kinds of arms, the most telling first.
ORDER = ("target", "source", "fused", "adapted", "curve", "control")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    cli.prepare()
    for recipe in () if dry else told:
        begin = time.perf_counter()
        experiment = Experiment(recipe, out / recipe.name)
        arms = experiment.arms(curves=curves)
        made = time.perf_counter()
        results = {}
        for arm in sorted(arms, key=lambda arm: ORDER.index(arm.kind)):
            results[arm.name] = experiment.ask(arm)
            # What is measured so far, in the order of the arms: an interrupted run leaves a table too.
            measured = [(item, results[item.name]) for item in arms if item.name in results]
            table = paper_tables(recipe, measured)
            write_text(experiment.folder / "table.md", table)
            print(f"{recipe.name}: {len(results)} of {len(arms)} models measured", file=sys.stderr)
        write_json(experiment.folder / "results.json", {arm.name: result for arm, result in measured})
        if curves:
            write_bytes(experiment.folder / "alpha.png", plot_curve(recipe, measured))
        print(table)
        spent = f"{made - begin:.0f} s to make, {time.perf_counter() - made:.0f} s to measure"
        print(f"{recipe.name}: {len(measured)} models, {spent}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli.run(application=app, name="paper"))
