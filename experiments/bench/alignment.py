"""Side by side on the CPU: our scaling Sinkhorn, ott-jax, POT and the authors' scheme, on the same problems.

One process, interleaved, warm, medians and spread; every plan's marginal error is recomputed in float64.
Run `python experiments/bench/alignment.py --help`. Needs the extra `bench` (PyTorch, POT).
"""

import functools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import torch
import typer
from baseline import streaming_sinkhorn

from tmjax import ot
from tmjax.activations.capture import CaptureOptions
from tmjax.activations.extract import extract_activations
from tmjax.checkpoints.load import load_model
from tmjax.ot.solvers.ott_jax import Geometry, LinearProblem
from tmjax.ot.solvers.ott_jax import Sinkhorn as OttSinkhorn
from tmjax.ot.solvers.scaling import Scaling
from tmjax.text.documents import read_texts

HERE = Path(__file__).resolve().parent
PAIR = HERE.parent / "swahili"
THRESHOLD = 1e-6
ROWS = 1000
#: Standard deviation of the noise on tiled real units, relative to the unit's own.
NOISE = 0.5
Outcome = tuple[np.ndarray, int | list[int]]


@dataclass
class Method:
    """One contender: `call` runs it, `plan` reads from its output the first plan [n, k] and the iterations."""

    call: Callable[[], object]
    plan: Callable[[object], Outcome]
    seconds: list[float] = field(default_factory=list)
    output: object = None


def real_activations(site: str, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations [L, N, n], [M, N, k] of the bundled pair, at most ROWS rows."""
    target, source = (load_model(PAIR / name) for name in ("target", "source"))
    read = read_texts(str(PAIR / "texts/swahili.calibration.jsonl")).first(texts)
    with tempfile.TemporaryDirectory() as folder:
        options = CaptureOptions((site,))
        both = extract_activations(target, source, read, Path(folder) / "activations", options=options)
        return tuple(np.array(one.site(site))[:, :ROWS] for one in both)


def tiled(x: np.ndarray, units: int, generator: np.random.Generator) -> np.ndarray:
    """Activations [N, units]: the units repeated, each repetition with its own noise."""
    repeated = np.tile(x, (1, -(-units // x.shape[1])))[:, :units]
    return repeated + NOISE * repeated.std(0) * generator.normal(size=repeated.shape)


def features(
    name: str, n: int, k: int, pairs: int, seed: int, real: tuple[np.ndarray, np.ndarray]
) -> tuple[jax.Array, jax.Array]:
    """Standardised activations [pairs, N, n], [pairs, N, k]: "easy" with independent units, "real" from the bundled
    pair's layers.
    """
    generator = np.random.default_rng(seed)
    held = []
    for i in range(pairs):
        if name == "easy":
            x, y = generator.normal(size=(ROWS, n)), generator.normal(size=(ROWS, k))
        else:
            targets, sources = real
            x = tiled(targets[i % len(targets)], n, generator)
            y = tiled(sources[(i // len(targets) + i) % len(sources)], k, generator)
        held.append([ot.standardise(jnp.asarray(z, jnp.float32)) for z in (x, y)])
    return tuple(jnp.stack(side) for side in zip(*held, strict=True))


def l1_error(plan: np.ndarray) -> float:
    """The larger L1 marginal error of a plan [n, k] with uniform marginals, in float64."""
    n, k = plan.shape
    return float(max(np.abs(plan.sum(1) - 1 / n).sum(), np.abs(plan.sum(0) - 1 / k).sum()))


def contenders(both: tuple[jax.Array, jax.Array], cost: jax.Array, epsilon: float) -> dict[str, Method]:
    """Every method on costs [B, n, k]; those on single problems solve the first. "from activations": the matrix product
    that makes the costs is timed too.
    """
    batch = ot.Problem.with_uniform_marginals(cost)
    single = jax.tree.map(lambda x: x[:1], batch)
    first = np.asarray(cost[0], np.float64)
    n, k = first.shape

    def from_potentials(f, g) -> np.ndarray:
        f, g = (np.asarray(x, np.float64) for x in (f, g))
        return np.exp((f[:, None] + g - first) / epsilon)

    def ours(problem: ot.Problem, certified: bool) -> Method:
        solver = Scaling(epsilon=epsilon, threshold=THRESHOLD)
        run = jax.jit(solver.solve_batch if certified else solver.potentials)

        def plan(out) -> Outcome:
            f, g, count = (out.plan.f, out.plan.g, out.iterations) if certified else out
            return from_potentials(f[0], g[0]), np.asarray(count).tolist()

        return Method(functools.partial(run, problem), plan)

    def ott_one(item: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        linear = LinearProblem(Geometry(cost_matrix=item[0], epsilon=epsilon), a=item[1], b=item[2])
        out = OttSinkhorn(threshold=THRESHOLD, max_iterations=2000)(linear)
        return out.f, out.g, out.n_iters

    def ott(run: Callable, problem: ot.Problem) -> Method:
        arguments = (problem.cost, problem.a, problem.b)
        return Method(
            functools.partial(jax.jit(run), arguments),
            lambda out: (from_potentials(out[0][0], out[1][0]), np.asarray(out[2]).tolist()),
        )

    mapped = functools.partial(jax.lax.map, ott_one)

    def ott_from_activations(item: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return ott_one((1 - ot.correlation(item[0], item[1]), item[2], item[3]))

    lazy = ot.Problem(ot.FeatureCost(*both), batch.a, batch.b)
    pairs = cost.shape[0]
    found = {f"ours x{pairs}": ours(batch, False), f"ours + certificate x{pairs}": ours(batch, True)}
    found[f"ott-jax mapped x{pairs}"] = ott(mapped, batch)
    found[f"ott-jax vmapped x{pairs}"] = ott(jax.vmap(ott_one), batch)
    found[f"ours from activations x{pairs}"] = ours(lazy, True)
    arguments = (*both, batch.a, batch.b)
    found[f"ott-jax from activations x{pairs}"] = Method(
        functools.partial(jax.jit(functools.partial(jax.lax.map, ott_from_activations)), arguments),
        found[f"ott-jax mapped x{pairs}"].plan,
    )
    found |= {"ours x1": ours(single, False), "ours + certificate x1": ours(single, True)}
    found["ott-jax x1"] = ott(mapped, single)
    in_torch = torch.from_numpy(np.array(cost[0]))
    found["authors' scheme x1"] = Method(
        lambda: streaming_sinkhorn(in_torch, epsilon, THRESHOLD),
        lambda out: (from_potentials(out[0], out[1]), out[2]),
    )
    # POT tests the L2 norm of the violation, which is at least L1 / sqrt(size).
    options = {"reg": epsilon, "stopThr": THRESHOLD / max(n, k) ** 0.5, "numItermax": 2000, "log": True, "warn": False}

    def pot_method(a, b, c) -> Method:
        return Method(
            lambda: pot.sinkhorn(a, b, c, **options),
            lambda out: (np.asarray(out[0], np.float64), int(out[1]["niter"])),
        )

    found["POT NumPy float64 x1"] = pot_method(np.full(n, 1 / n), np.full(k, 1 / k), first)
    found["POT torch float32 x1"] = pot_method(torch.full((n,), 1 / n), torch.full((k,), 1 / k), in_torch)
    return found


def timed(method: Method) -> None:
    """Runs a method once and keeps the time and its output."""
    method.output = None
    start = time.perf_counter()
    method.output = jax.block_until_ready(method.call())
    method.seconds.append(time.perf_counter() - start)


def compare(both: tuple[jax.Array, jax.Array], epsilon: float, repeats: int) -> dict:
    """Times all methods in turns; a row per method, our iteration against a copy of the kernel's bytes."""
    cost = 1 - ot.correlation(*both)
    methods = contenders(both, cost, epsilon)
    one = jax.tree.map(lambda x: x[:1], ot.Problem.with_uniform_marginals(cost))
    # Tested once, so that exactly so many iterations run; their difference holds neither kernel nor start.
    few, many = (
        jax.jit(Scaling(epsilon=epsilon, threshold=0.0, max_iterations=m, check_every=m).potentials) for m in (10, 50)
    )
    source = torch.from_numpy(np.array(cost[0]))
    target = torch.empty_like(source)
    held, into = source.numpy(), np.zeros(source.shape, np.float32)
    floors = {
        "few": Method(lambda: few(one), lambda _: None),
        "many": Method(lambda: many(one), lambda _: None),
        "torch copy": Method(lambda: [target.copy_(source) for _ in range(20)], lambda _: None),
        "numpy copy": Method(lambda: [np.copyto(into, held) for _ in range(20)], lambda _: None),
    }
    for method in (*methods.values(), *floors.values()):
        timed(method)
        method.seconds.clear()
    for _ in range(repeats):
        for method in (*methods.values(), *floors.values()):
            timed(method)
    rows = {}
    for name, method in methods.items():
        plan, iterations = method.plan(method.output)
        low, middle, high = np.quantile(method.seconds, [0, 0.5, 1])
        rows[name] = {
            "seconds": middle, "min": low, "max": high, "iterations": iterations, "l1_error_float64": l1_error(plan)
        }  # fmt: skip
    medians = {name: float(np.median(method.seconds)) for name, method in floors.items()}
    iteration = (medians["many"] - medians["few"]) / 40
    # PyTorch copies with all cores, NumPy with one: the floor is the faster.
    copy = min(medians["torch copy"], medians["numpy copy"]) / 20
    return {"methods": rows, "iteration_s": iteration, "copy_s": copy, "iteration_over_copy": iteration / copy}


def ratios(rows: dict[str, dict], pairs: int) -> dict[str, float]:
    """How many times longer the others take than ours, for as many problems."""
    found = {}
    for ours in ("ours", "ours + certificate"):
        for name, row in rows.items():
            if not name.startswith("ours") and "from activations" not in name:
                found[f"{name} / {ours}"] = row["seconds"] / rows[f"{ours} {name.split()[-1]}"]["seconds"]
        fastest = min(rows[f"ott-jax {form} x{pairs}"]["seconds"] for form in ("mapped", "vmapped"))
        found[f"faster ott-jax x{pairs} / {ours}"] = fastest / rows[f"{ours} x{pairs}"]["seconds"]
    whole = [rows[f"{name} from activations x{pairs}"]["seconds"] for name in ("ott-jax", "ours")]
    return found | {f"ott-jax / ours + certificate, from activations x{pairs}": whole[0] / whole[1]}


def main(
    size: Annotated[list[str] | None, typer.Option(help="n x k, for example 2048x4096; may be repeated")] = None,
    epsilon: Annotated[list[float] | None, typer.Option(help="may be repeated; 0.1 and 0.03 unless given")] = None,
    problem: Annotated[list[str] | None, typer.Option(help="easy or real; both unless given")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="problems in a batch")] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    seed: int = 0,
    site: str = "attn_in",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Compares the solvers at one L1 marginal error, 1e-6, and prints times, ratios and the bandwidth floor."""
    warnings.filterwarnings("ignore")
    names = ("jax", "ott-jax", "POT", "torch", "numpy")
    setting = {
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "seed": seed, "rows": ROWS, "site": site,
        "noise": NOISE, "pairs": pairs, "repeats": repeats, "threshold": THRESHOLD,
        "device": jax.devices()[0].platform, "versions": {name: version(name) for name in names},
    }  # fmt: skip
    if not as_json:
        print(setting)
    real = real_activations(site, texts=300)
    found = []
    for text in size or ["2048x4096"]:
        n, k = (int(part) for part in text.split("x"))
        for name in problem or ["easy", "real"]:
            both = features(name, n, k, pairs, seed, real)
            for eps in epsilon or [0.1, 0.03]:
                result = compare(both, eps, repeats)
                result |= {"size": text, "problem": name, "epsilon": eps, "ratios": ratios(result["methods"], pairs)}
                found.append(result)
                if not as_json:
                    show(result)
    if as_json:
        print(json.dumps({"setting": setting, "results": found}))


def show(result: dict) -> None:
    """Prints one comparison."""
    print(f"\n{result['problem']} {result['size']}, epsilon {result['epsilon']}")
    for name, row in result["methods"].items():
        print(
            f"  {name:32} {row['seconds']:9.4f} s  [{row['min']:.4f}, {row['max']:.4f}]"
            f"  error {row['l1_error_float64']:.1e}  iterations {row['iterations']}"
        )
    copy = f"copy {1e3 * result['copy_s']:.2f} ms, ratio {result['iteration_over_copy']:.2f}"
    print(f"  one iteration {1e3 * result['iteration_s']:.2f} ms, {copy}")
    for name, ratio in result["ratios"].items():
        print(f"  {name:56} {ratio:6.1f}")


if __name__ == "__main__":
    typer.run(main)
