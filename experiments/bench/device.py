"""All pairs of layers of one site on one accelerator: bytes read per second against a copy on the same device.

    python experiments/bench/device.py                     # 16 x 32 layers, 2048 x 4096 units, 2000 rows
    python experiments/bench/device.py --all-sites         # every site of a 1B target and an 8B source

Runs on any backend, the CPU too (choose small sizes there). Activations are random with shared directions (seed
stated): they need not be real, since time depends on sizes and iterations, which are printed.
"""

import dataclasses
import json
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

from tmjax.align import plans
from tmjax.align.features import FeatureSite
from tmjax.ot import cost_matrix, make_solver, standardise
from tmjax.ot.solvers.log_domain import Potentials
from tmjax.ot.solvers.scaling import Scaling

#: Sites of Llama-3.2-1B (target) and Llama-3.1-8B (source): units of either. mlp_hidden's plan serves gate and up.
SITES = {
    "attn_in": (2048, 4096),
    "q": (2048, 4096),
    "k": (512, 1024),
    "v": (512, 1024),
    "attn_mix": (2048, 4096),
    "attn_out": (2048, 4096),
    "mlp_in": (2048, 4096),
    "mlp_hidden": (8192, 14336),
    "mlp_out": (2048, 4096),
}
SHARED = 64


def features(layers: int, rows: int, units: int, noise: float, key: jax.Array, shared: jax.Array) -> jax.Array:
    """Standardised float16 activations [layers, rows, units]: shared directions [rows, SHARED] and noise."""

    def layer(key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        x = shared @ jax.random.normal(first, (SHARED, units)) / SHARED**0.5
        return standardise(x + noise * jax.random.normal(second, (rows, units))).astype(jnp.float16)

    return jax.lax.map(layer, jax.random.split(key, layers))


def timed(call, repeats: int) -> tuple[list[float], object]:
    """Seconds of `repeats` calls after one that compiles, and the last result."""
    result = jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds, result


def copy_rate(mib: int = 1024) -> float:
    """Bytes per second of a copy of `mib` MiB on the device, read and written both counted."""
    x = jnp.zeros((mib * 2**18,), jnp.float32)
    copies = 20

    @jax.jit
    def many(x: jax.Array) -> jax.Array:
        # Each copy depends on the one before and changes a bit of it, so that none is left out.
        return jax.lax.fori_loop(0, copies, lambda i, y: y + 1.0, x)

    seconds, _ = timed(lambda: many(x), 5)
    return 2 * x.nbytes * copies / float(np.median(seconds))


def iteration_rate(site: FeatureSite, pairs: jax.Array, solver: Scaling, repeats: int) -> float:
    """Bytes per second that iterations read (the kernel twice each), for the problems that are iterated together."""
    problem = jax.vmap(lambda pair: site.problem(pair[0], pair[1]))(pairs)
    problem = jax.block_until_ready(dataclasses.replace(problem, cost=cost_matrix(problem.cost), features=None))
    batch, n, k = problem.cost.shape
    start = Potentials(
        jnp.ones((batch, n)), jnp.zeros((batch, k)), jnp.zeros((batch,), jnp.int32), jnp.full((batch,), jnp.inf)
    )
    dtype = jnp.dtype(solver.kernel_dtype)

    def seconds(count: int) -> float:
        # Tested once, after so many: what two numbers of iterations differ by is iterations and nothing else.
        fixed = dataclasses.replace(solver, threshold=0.0, max_iterations=count, check_every=count)
        run = jax.jit(lambda p, s: fixed._scale(p, s, jnp.zeros((batch,), bool), dtype, 0.0))
        return float(np.median(timed(lambda: run(problem, start), repeats)[0]))

    few, many = 10, 110
    return (many - few) * batch * 2 * n * k * dtype.itemsize / max(seconds(many) - seconds(few), 1e-9)


def measure(
    name: str, shape: tuple[int, int], layers: tuple[int, int], rows: int, solver: Scaling, repeats: int, seed: int
) -> dict:
    """Times all pairs of one site, costs and certificates included, and an iteration alone."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shared = jax.random.normal(keys[0], (rows, SHARED))
    site = FeatureSite(
        *(
            features(count, rows, units, 2.0, key, shared)
            for count, units, key in zip(layers, shape, keys[1:], strict=True)
        )
    )
    count = layers[0] * layers[1]
    keep_cost, keep_kernel, together = solver.form(shape, count, rows)
    pairs = jnp.asarray(np.argwhere(np.ones(layers)).astype(np.int32))

    seconds, found = timed(lambda: plans.solve_chunk(site, pairs, solver, False, "potentials", None, None), repeats)
    rate = iteration_rate(site, pairs[:together], solver, repeats) if keep_kernel else None
    iterations = np.asarray(found.iterations)
    return {
        "site": name,
        "units": shape,
        "pairs": count,
        "kernel": solver.kernel_dtype,
        "kept": "cost and kernel" if keep_cost else "kernel" if keep_kernel else "nothing",
        "together": together,
        "seconds": float(np.median(seconds)),
        "spread": [min(seconds), max(seconds)],
        "iterations": [int(iterations.min()), float(iterations.mean()), int(iterations.max())],
        "converged": int(np.sum(found.converged)),
        "max_marginal_error": float(np.max(found.marginal_error)),
        "iteration_bytes_per_second": rate,
    }


def main(
    layers: str = "16x32",
    units: str = "2048x4096",
    rows: int = 2000,
    epsilon: float = 0.1,
    repeats: int = 3,
    seed: int = 0,
    memory_mib: Annotated[int, typer.Option(help="for costs and kernels")] = 8192,
    all_sites: Annotated[bool, typer.Option("--all-sites", help="every site of a 1B target and an 8B source")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Prints seconds, iterations, certificates and gigabytes per second for float32 and bfloat16 kernels."""
    count = tuple(int(part) for part in layers.split("x"))
    shapes = SITES if all_sites else {"site": tuple(int(part) for part in units.split("x"))}
    copy = copy_rate(64 if jax.default_backend() == "cpu" else 1024)
    device = jax.devices()[0]
    result = {"device": device.device_kind, "layers": count, "rows": rows, "epsilon": epsilon, "seed": seed}
    result |= {"copy_bytes_per_second": copy, "sites": []}
    for kernel in ("float32", "bfloat16"):
        solver = make_solver("scaling", epsilon=epsilon, threshold=1e-6, kernel_dtype=kernel, memory_mib=memory_mib)
        for name, shape in shapes.items():
            row = measure(name, shape, count, rows, solver, repeats, seed)
            row["of_copy"] = (row["iteration_bytes_per_second"] or np.nan) / copy
            result["sites"].append(row)
            if not as_json:
                print(
                    f"{name:10} {shape[0]}x{shape[1]} {kernel:8} {row['seconds']:8.3f} s {row['spread']}  iterations "
                    f"{row['iterations']}  {row['together']} together, kept {row['kept']}  "
                    f"{row['of_copy'] * copy / 1e9:.0f} GB/s, {row['of_copy']:.2f} of a copy  "
                    f"error {row['max_marginal_error']:.1e}, {row['converged']}/{row['pairs']} converged"
                )
        total = sum(row["seconds"] for row in result["sites"] if row["kernel"] == kernel)
        result[f"seconds_{kernel}"] = total
        if not as_json:
            print(f"{kernel}: {total:.2f} s in all; copy {copy / 1e9:.0f} GB/s on {device.device_kind}")
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
