"""How the time of extraction and alignment grows with texts, layers and width, beside what a formula predicts.

    python experiments/bench/scaling.py --out runs/scaling          # some minutes on two cores
    python experiments/bench/scaling.py --out runs/scaling --quick  # a smoke test; its exponents mean nothing

Random checkpoints (a Qwen 2 target, a wider and deeper Llama source, float32) read real verses at 1, 2, 4 and 8 times
the texts, the layers of both or the width of both, one of them at a time. Width grows by heads and MLP units, heads
keep their size. Timed are `tmjax.extract_activations` (tokenising and writing included) and `tmjax.align` with a fixed
number of Sinkhorn iterations, so that time is a function of size alone: `scaling` with threshold 0, `max_iterations`
and `check_every` both that number. Everything is warm: every size runs once untimed. Repeats go over all sizes before
the next begins, in an order that the seed shuffles, so that a busy moment of the machine does not fall on one size; the
fastest of a size counts (other work only ever adds), the median is kept beside.

The formula. With D texts of T tokens and R rows each, N rows in all, P parameters of projections, L and M layers, U
units of all sites of a layer, n and k units of a plan's site, I iterations:

    extraction = [2 P sum T + 4 L heads head_dim sum T^2 + 2 L U sum T R] / a    forward pass, attention, averages
               + b sum T                                                         tokenising
               + c N L U                                                         writing

    alignment  = d L M N sum n k                                                 costs
               + e L M I sum n k                                                 iterations
               + f N sum (L n + M k)                                             statistics, standardised activations

The first is summed over both models. The six rates come from the base size alone: b, c and f from timing their part by
itself, e from what more iterations take than one, a and d from the rest. What the formula then gives at the other sizes
is fitted like the times (least squares through the logarithms), so that measured and predicted exponents can be
compared: not 1 or 2, but what those sizes should show.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from flops import forward_flops, pooling_flops

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tmjax.activations import store  # noqa: E402
from tmjax.activations.extract import extract_activations  # noqa: E402
from tmjax.align.alignment import align, plan_site  # noqa: E402
from tmjax.align.features import FeatureSite  # noqa: E402
from tmjax.align.statistics import statistics  # noqa: E402
from tmjax.checkpoints.load import load_model  # noqa: E402
from tmjax.checkpoints.model import Model  # noqa: E402
from tmjax.models.sites import SITES  # noqa: E402
from tmjax.models.spec import DecoderSpec  # noqa: E402
from tmjax.recipes.merge import AlignmentOptions  # noqa: E402
from tmjax.text.documents import Texts, read_texts  # noqa: E402
from tmjax.text.rows import pair_rows  # noqa: E402
from tmjax.text.tokenizer import load_tokenizer  # noqa: E402
from tools.make_checkpoint import family_spec, make_checkpoint  # noqa: E402

PAIR = REPO / "experiments/swahili"
TEXTS = PAIR / "texts/swahili.calibration.jsonl"
FACTORS = ("texts", "layers", "width")
STAGES = ("extraction", "alignment")


@dataclasses.dataclass(frozen=True)
class Base:
    """The size that everything is a multiple of: texts, layers and heads of target and source."""

    texts: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    head_dim: int
    iterations: int
    times: tuple[int, ...]


BASE = Base(texts=64, layers=(2, 3), heads=(3, 6), head_dim=64, iterations=100, times=(1, 2, 4, 8))
QUICK = Base(texts=4, layers=(1, 2), heads=(2, 4), head_dim=8, iterations=5, times=(1, 2))


class Case:
    """One size: two models in memory, texts, and the sums that the formula is made of."""

    def __init__(self, base: Base, factor: str, times: int, folder: Path, seed: int) -> None:
        self.factor, self.times = factor, times
        self.folder = folder / f"{factor}-{times}"
        by = {name: times if name == factor else 1 for name in FACTORS}
        self.texts: Texts = read_texts(str(TEXTS)).first(base.texts * by["texts"])
        made = zip(("target", "source"), ("qwen2", "llama"), base.layers, base.heads, strict=True)
        self.models = tuple(
            _model(self.folder / name, family, name, layers * by["layers"], heads * by["width"], base.head_dim, seed)
            for name, family, layers, heads in made
        )
        tokenizers = [load_tokenizer(model.directory) for model in self.models]
        self.pair = partial(pair_rows, self.texts, tokenizers, pooling="span", max_tokens=512)
        self.rows, self.documents = self.pair()
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    @property
    def activations(self) -> tuple[store.Activations, store.Activations]:
        """What the last extraction wrote."""
        return tuple(store.read(self.folder / "activations" / name) for name in ("target", "source"))

    def extract(self) -> None:
        """Both models read the texts; activations of all sites on disk."""
        extract_activations(*self.models, self.texts, self.folder / "activations", overwrite=True)

    def align(self, iterations: int) -> None:
        """All plans of the last extraction, each by exactly so many iterations; refuses to time anything else."""
        exact = {"threshold": 0.0, "max_iterations": iterations, "check_every": iterations}
        options = AlignmentOptions(epsilon=0.1, solver_options=exact)
        found = align(*self.activations, self.models[0].projections, options)
        for site, plans in found.plans.items():
            if set(np.asarray(plans.iterations).tolist()) != {iterations} or np.any(plans.fallback):
                raise RuntimeError(f"{site}: not {iterations} iterations of the scaling form")

    def terms(self, iterations: int) -> dict[str, dict[str, float]]:
        """What each rate of the formula is multiplied by."""
        products = tokens = values = 0
        for model, documents in zip(self.models, self.documents, strict=True):
            spec, lengths = model.spec, [len(document.ids) for document in documents]
            counts = [len(document.rows) for document in documents]
            products += forward_flops(model.family, spec, lengths)
            products += pooling_flops(spec, spec.sites, lengths, counts)
            tokens += sum(lengths)
            values += len(self.rows) * spec.layers * sum(spec.axis_size(SITES[site]) for site in spec.sites)
        target, source = (model.spec for model in self.models)
        used = {site: tuple(x.axis_size(SITES[site]) for x in (target, source)) for site in target.sites}
        entries = sum(n * k for site, (n, k) in used.items() if site in self.plan_sites)
        entries *= target.layers * source.layers
        read = len(self.rows) * sum(target.layers * n + source.layers * k for n, k in used.values())
        return {
            "extraction": {"products": products, "tokenising": tokens, "writing": values},
            "alignment": {"costs": entries * len(self.rows), "iterations": entries * iterations, "statistics": read},
        }

    @property
    def plan_sites(self) -> set[str]:
        """Sites that have plans."""
        rows = self.models[0].projections.values()
        return {plan_site(site) for row in rows for site in (row.input_site, row.output_site)}


def _model(directory: Path, family: str, name: str, layers: int, heads: int, head_dim: int, seed: int) -> Model:
    tokenizer = PAIR / name
    width = heads * head_dim
    spec = family_spec(
        family,
        vocab=load_tokenizer(tokenizer).size,
        hidden=width,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=head_dim,
        mlp=2 * width,
        max_positions=2048,
        tied_embeddings=True,
    )
    return load_model(make_checkpoint(directory, family, spec, scale=0.02, seed=seed, tokenizer=tokenizer))


def clock(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parts_of(base: Case) -> dict[str, Callable[[], object]]:
    """What the rates are measured by: parts of extraction and alignment at the base size, each alone."""

    def ones(spec: DecoderSpec) -> dict[str, np.ndarray]:
        return {
            site: np.ones((spec.layers, len(base.rows), spec.axis_size(SITES[site])), np.float32) for site in spec.sites
        }

    values = [(model.spec, ones(model.spec)) for model in base.models]

    def write() -> None:
        for spec, held in values:
            with tempfile.TemporaryDirectory(dir=base.folder) as folder:
                store.create(Path(folder), base.rows, spec.layers, {site: x.shape[2] for site, x in held.items()})
                for site, x in held.items():
                    store.write_rows(Path(folder), site, {0: x})

    def measure() -> None:
        target, source = base.activations
        for site in target.sites:
            statistics(target.site(site)), statistics(source.site(site))
            if site in base.plan_sites:
                jax.block_until_ready(FeatureSite.of(target.site(site), source.site(site), centred=True))

    return {"tokenising": base.pair, "writing": write, "statistics": measure, "one iteration": partial(base.align, 1)}


def rates(base: Case, parts: Mapping[str, Sequence[float]], iterations: int) -> dict[str, dict[str, float]]:
    """Seconds per unit of every term, from the base size alone."""
    part = {name: min(seconds) for name, seconds in parts.items()}
    whole = {stage: min(base.seconds[stage]) for stage in STAGES}
    part["iterations"] = (whole["alignment"] - part["one iteration"]) * iterations / (iterations - 1)
    part["products"] = whole["extraction"] - part["tokenising"] - part["writing"]
    part["costs"] = whole["alignment"] - part["iterations"] - part["statistics"]
    return {
        stage: {name: max(part[name], 0.0) / size for name, size in terms.items()}
        for stage, terms in base.terms(iterations).items()
    }


def exponents(times: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """`fitted`: the slope of ln seconds over ln times by least squares; `last`: that of the last doubling alone."""
    x, y = np.log(times), np.log(seconds)
    return {"fitted": float(np.polyfit(x, y, 1)[0]), "last": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}


def table(points: Sequence[Mapping], found: Mapping) -> str:
    """Seconds of every size, measured (predicted), and exponents, as a Markdown table."""
    times = sorted({point["times"] for point in points})
    columns = [f"{n}x" for n in times]
    lines = [
        "| stage | of | " + " | ".join(columns) + " | exponent | predicted | last doubling | predicted |",
        "|---" * (len(times) + 6) + "|",
    ]
    for stage in STAGES:
        for factor in FACTORS:
            own = {p["times"]: p[stage] for p in points if p["factor"] in (factor, "base")}
            cells = [f"{own[n]['fastest']:.3g} ({own[n]['predicted']:.3g})" for n in times]
            measured, predicted = found[factor][stage]["measured"], found[factor][stage]["predicted"]
            lines.append(
                f"| {stage} | {factor} | " + " | ".join(cells) + f" | **{measured['fitted']:.2f}** "
                f"| {predicted['fitted']:.2f} | {measured['last']:.2f} | {predicted['last']:.2f} |"
            )
    return "\n".join(lines)


def plot(points: Sequence[Mapping], found: Mapping, path: Path) -> None:
    """Fastest times with a bar up to the median, predicted ones dashed; a panel per stage, axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tmjax"}
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for stage, panel in zip(STAGES, panels, strict=True):
        for factor, colour, marker in zip(FACTORS, ("C0", "C1", "C2"), "osd", strict=True):
            own = sorted((p for p in points if p["factor"] in (factor, "base")), key=lambda p: p["times"])
            times = [p["times"] for p in own]
            fastest = np.array([p[stage]["fastest"] for p in own])
            spread = np.array([[0.0, p[stage]["median"] - p[stage]["fastest"]] for p in own]).T
            each = {name: found[factor][stage][name]["fitted"] for name in ("measured", "predicted")}
            label = f"{factor}: {each['measured']:.2f} (predicted {each['predicted']:.2f})"
            panel.errorbar(times, fastest, spread, color=colour, marker=marker, markersize=4, label=label)
            panel.plot(times, [p[stage]["predicted"] for p in own], color=colour, linestyle="--", linewidth=1)
        panel.set(xscale="log", yscale="log", title=f"{stage}, seconds", xlabel="times the base size")
        panel.set_xticks(times, [f"{n}" for n in times])
        panel.minorticks_off()
        panel.legend(title="exponent", fontsize="small")
        panel.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Folder for scaling.json and scaling.svg.")],
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every size.")] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: a smoke test.")] = False,
) -> None:
    """Measures, fits, prints the table, writes scaling.json and scaling.svg."""
    base = QUICK if quick else BASE
    generator = np.random.default_rng(seed)
    setting = {
        "base": dataclasses.asdict(base),
        "repeats": repeats,
        "seed": seed,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "jax": jax.__version__,
    }
    print(setting)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        wanted = [("base", 1), *((factor, n) for factor in FACTORS for n in base.times[1:])]
        cases = [Case(base, factor, n, Path(name), seed) for factor, n in wanted]
        parts = parts_of(cases[0])
        timed: dict[str, list[float]] = {name: [] for name in parts}
        for number in range(repeats + 1):
            # The base is short and everything is compared with it.
            for index in generator.permutation([0, 0, 0, *range(1, len(cases))]):
                case = cases[index]
                took = {"extraction": clock(case.extract), "alignment": clock(partial(case.align, base.iterations))}
                own = {name: clock(work) for name, work in parts.items()} if index == 0 else {}
                print(f"{number} {case.factor} {case.times}x: {took | own}", file=sys.stderr)
                for stage in STAGES if number else ():
                    case.seconds[stage].append(took[stage])
                for name in own if number else ():
                    timed[name].append(own[name])
        rate = rates(cases[0], timed, base.iterations)
        points = [_point(case, rate, base.iterations) for case in cases]
    found = {factor: {stage: _compare(points, factor, stage) for stage in STAGES} for factor in FACTORS}
    setting |= {"load_after": os.getloadavg()[0], "wall_seconds": time.perf_counter() - started}
    out.mkdir(parents=True, exist_ok=True)
    result = {"setting": setting, "seconds_per_term": rate, "points": points, "exponents": found}
    (out / "scaling.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot(points, found, out / "scaling.svg")
    print(table(points, found))
    print(f"{setting['wall_seconds']:.0f} s in all; {out / 'scaling.json'}, {out / 'scaling.svg'}")


def _point(case: Case, rate: Mapping[str, Mapping[str, float]], iterations: int) -> dict:
    terms = case.terms(iterations)
    point = {
        "factor": case.factor,
        "times": case.times,
        "texts": len(case.texts),
        "rows": len(case.rows),
        "layers": [model.spec.layers for model in case.models],
        "width": [model.spec.hidden for model in case.models],
    }
    for stage in STAGES:
        parts = {name: rate[stage][name] * size for name, size in terms[stage].items()}
        point[stage] = {
            "seconds": case.seconds[stage],
            "fastest": min(case.seconds[stage]),
            "median": float(np.median(case.seconds[stage])),
            "predicted": sum(parts.values()),
            "predicted_parts": parts,
            "terms": terms[stage],
        }
    return point


def _compare(points: Sequence[Mapping], factor: str, stage: str) -> dict[str, dict[str, float]]:
    own = sorted((p for p in points if p["factor"] in (factor, "base")), key=lambda p: p["times"])
    times = [p["times"] for p in own]
    return {
        name: exponents(times, [p[stage][key] for p in own])
        for name, key in (("measured", "fastest"), ("predicted", "predicted"))
    }


if __name__ == "__main__":
    typer.run(main)
