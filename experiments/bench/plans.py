"""Plans of merges and adaptations at real shapes, for TPU slices and GPUs that are not here, as one table.

    python experiments/bench/plans.py --out runs/plans                                   # needs the extra plan; hours
    python experiments/bench/plans.py --out runs/plans --only h100 --stages predictions  # minutes

Pairs are Llama-3.2-1B <- Llama-3.1-8B and Llama-3.1-8B <- Llama-3.1-70B, from the configs of the tests; no weight is
read. Every plan is written to OUT as JSON and not made again, so an interrupted table goes on. A row is a plan: how
many of its programs compile and fit, the largest memory of a device, the sum of times at published figures (a lower
bound), and the first program that does not fit.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.commands.plan.machines import parse_topology
from tmjax.commands.plan.planned import Workload
from tmjax.commands.plan.planning import Question, plan
from tmjax.files.atomic import write_json
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.transfer.recipe import build_recipe
from tools.script import script

CONFIGS = Path(__file__).resolve().parents[2] / "tests/data/configs"
MODELS = {
    "1B": "released/Llama-3.2-1B.json",
    "8B": "released/Llama-3.1-8B.json",
    "70B": "copied/meta-llama--Meta-Llama-3.1-70B.json",
}
#: Target, source, topologies.
PAIRS = (("1B", "8B", ("v5e-16", "v5p-8", "h100:1")), ("8B", "70B", ("v5p-32", "h100:8")))
GIB = 2**30


def model(folder: Path, name: str) -> str:
    """A directory with the config of a model and nothing else."""
    directory = folder / "models" / name
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CONFIGS / MODELS[name], directory / "config.json")
    return str(directory)


def recipe_of(target: str, source: str, command: str) -> Any:
    """The recipe of a merge with the default preset, or of an adaptation with all terms; both in bfloat16."""
    values: dict[str, Any] = {"target": target, "source": source}
    values |= {"texts": "-", "out": "-", "dtype": "bfloat16"}
    if command == "merge":
        return build_recipe(values)
    training = {"tokens_per_step": 16384, "steps": 300}
    return build_adapt_recipe(values | {"mode": "combined", "training": training})


def row(name: str, report: dict[str, Any]) -> str:
    """A row of the table."""
    programs = report["programs"]
    compiled = [item for item in programs if item["compiles"]]
    bad = next((f"{item['stage']} {item['program']}" for item in programs if not item["fits"]), "")
    fitting = sum(item["fits"] for item in programs)
    largest = max((item["whole_bytes"] for item in compiled), default=0) / GIB
    slowest = max((item["compile_cpu_seconds"] for item in compiled), default=0)
    cells = [name, f"{len(compiled)} of {len(programs)}", str(fitting), f"{largest:.1f}"]
    return "| " + " | ".join([*cells, f"{report['seconds'] / 60:.1f}", f"{slowest:.0f}", bad]) + " |"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the plans.")],
    only: Annotated[str, typer.Option(help="Plans whose name contains this.")] = "",
    stages: Annotated[str, typer.Option(help="Stages, or STAGE PROGRAM, by commas; default: all.")] = "",
) -> None:
    """Makes the plans that are missing and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    print("| plan | compile | fit | largest, GiB | time, minutes | compiler, s | does not fit |\n" + "|---" * 7 + "|")
    chosen = tuple(part.strip() for part in stages.split(",") if part.strip())
    for target, source, topologies in PAIRS:
        for command, texts in (("merge", 300), ("adapt", 2000)):
            for topology in topologies:
                name = f"{target} <- {source}, {command}, {texts} texts, {topology}" + (stages and f", {stages}")
                if only not in name:
                    continue
                file = out / (re.sub(r"\W+", "-", name) + ".json")
                if not file.exists():
                    recipe = recipe_of(model(out, target), model(out, source), command)
                    work = Workload(texts, 200, 300)
                    report = plan(Question(recipe, parse_topology(topology), work, None, chosen))
                    write_json(file, report)
                print(row(name, json.loads(file.read_text())), flush=True)


if __name__ == "__main__":
    with script("plans", resumes=True):
        typer.run(main)
