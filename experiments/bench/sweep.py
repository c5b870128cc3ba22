"""A sweep of (alpha, beta) against a plain loop over the same settings, and against separate commands.

    python experiments/bench/sweep.py experiments/swahili/recipe.yaml

Everything but the commands runs in one process, batch of the sweep and plain loop over the same settings in turn, so
that both see the same machine. The plain loop fuses and scores one setting after
the other from the same transported weights in memory, with the compiled forward of `tmjax merge`; both are warm.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer


def main(
    recipe: Annotated[Path, typer.Argument(help="Recipe with validation texts.")],
    settings: Annotated[int, typer.Option(help="Number of (alpha, beta) settings.")] = 200,
    commands: Annotated[int, typer.Option(help="Runs of `tmjax fuse` to time.")] = 3,
    devices: Annotated[int, typer.Option(help="CPU devices; 0: one per core, as `tmjax sweep` does.")] = 0,
) -> None:
    """Prints seconds per setting of all three, ratios, compilations, and the largest difference in bits per byte."""
    jax.config.update("jax_num_cpu_devices", devices or len(os.sched_getaffinity(0)))

    from tmjax.commands.merge.context import merge_context
    from tmjax.commands.merge.run import Merge
    from tmjax.commands.sweep.score import SettingsScorer
    from tmjax.recipes.base import read_recipe
    from tmjax.sharding.mesh import Layout
    from tmjax.transfer.recipe import build_recipe

    with tempfile.TemporaryDirectory() as folder:
        told = build_recipe(
            read_recipe(recipe) | {"out": f"{folder}/run", "controls": False, "mesh": "data=1"}, base=recipe.parent
        )
        merge = Merge(told)
        merge.align()
        inputs = merge.inputs
        target, step = inputs.target, next(step for step in inputs.chain if step.contributes)
        context = merge_context(merge.session, "fuse")
        contribution = step.operator.contribute(target.params, merge.view(), step.options, context)
        across = -(-settings // 8)
        grid = [(a, b) for a in np.linspace(0, 0.3, across) for b in np.linspace(-0.2, 0.15, 8)][:settings]
        pairs = [dict.fromkeys(contribution.items, (float(a), float(b))) for a, b in grid]

        layout = Layout(f"data={jax.device_count()}")
        scorer = SettingsScorer(
            target, inputs.target_tokenizer, inputs.valid, max_settings=settings, dtype=inputs.dtype, layout=layout
        )
        placed = scorer.place([contribution])

        def batched(some: list) -> np.ndarray:
            return scorer.bits_per_byte(scorer(placed, some))

        def plain(some: list) -> np.ndarray:
            fused = (contribution.rule(target.params, contribution.items, one) for one in some)
            return np.asarray([inputs.valid_scorer(params).bits_per_byte for params in fused])

        def timed(run, some: list) -> tuple[np.ndarray, float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            values = run(some)
            return values, (time.perf_counter() - wall) / len(some), (time.process_time() - cpu) / len(some)

        batched(pairs[:1]), plain(pairs[:1])
        walls, cpus, worst = [], [], 0.0
        for start in range(0, settings, scorer.batch):
            some = pairs[start : start + scorer.batch]
            one, many = timed(plain, some), timed(batched, some)
            walls.append((one[1], many[1], len(some)))
            cpus.append((one[2], many[2], len(some)))
            worst = max(worst, float(np.abs(many[0] / one[0] - 1).max()))
        print(f"{settings} settings, {len(walls)} batches of up to {scorer.batch} on {scorer.devices} devices")
        print(f"forward compiled {scorer.compilations} time(s), {scorer.compile_seconds:.1f} s")
        for name, times in (("wall", np.asarray(walls)), ("processor", np.asarray(cpus))):
            mean, ratios = np.average(times[:, :2], axis=0, weights=times[:, 2]), times[:, 0] / times[:, 1]
            print(
                f"{name}: plain {1e3 * mean[0]:.0f} ms, sweep {1e3 * mean[1]:.0f} ms a setting (means); ratio "
                f"{mean[0] / mean[1]:.2f}, of batches {ratios.min():.2f} to {ratios.max():.2f}, median "
                f"{np.median(ratios):.2f}"
            )
        print(f"largest relative difference in bits per byte {worst:.1e}")
        if commands:
            # A run with the recipe's own coefficients left out: each command loads, fuses, writes and evaluates one.
            merge.run.close()
            took = []
            for number in range(commands):
                alpha = f"{0.01 * (number + 1):.2f}"
                command = [
                    sys.executable,
                    "-m",
                    "tmjax",
                    "fuse",
                    told.out,
                    "--alpha",
                    alpha,
                    "--overwrite",
                    "--json",
                ]
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                took.append(time.perf_counter() - started)
                if done.returncode:
                    raise SystemExit(done.stderr)
                json.loads(done.stdout)
            print(
                f"`tmjax fuse` from the same alignment: {np.median(took):.1f} s a setting, "
                f"ratio {np.median(took) / np.median(np.asarray(walls)[:, 1]):.0f}"
            )


if __name__ == "__main__":
    typer.run(main)
