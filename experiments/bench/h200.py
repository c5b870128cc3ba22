"""A whole merge of real shapes on one accelerator, from random weights: seconds per stage, use of the device, memory.

    python experiments/bench/h200.py                                  # Llama-3.2-1B <- Llama-3.1-8B
    python experiments/bench/h200.py --layer-pairs coarse --kernel-dtype bfloat16 --json
    python experiments/bench/h200.py --tiny                           # a smoke test, on a CPU too

One process, no network, no PyTorch, no checkpoint, no tokenizer (`--checkpoints DIR` goes through the disk). Weights
are N(0, 0.02) in bfloat16, made on the device; texts are random token ids, all of `--tokens` tokens. A text is one row,
as with `sequence` pooling, or `--rows-per-text` spans of equal length. Time depends on sizes, and on the iterations of
the solver, which are printed: random activations take few, real ones tens to hundreds (`--iterations 100`).

Stages, each with what it needs before it:

    forward  the forward pass of one batch, without and with the averages: no copy to the host, no disk
    extract  activations of target and source, as `tmjax merge` makes them: kept on disk, or summed up (--activations)
    align    plans of all sites and pairs of layers
    fuse     transport and fusion with a fixed alpha
    export   the merged checkpoint, on disk

FLOPs of the model are 2 x parameters x tokens (projections only: no embedding, no head) and attention (see flops.py);
MFU is those over seconds over the peak of the devices. One batch runs before `forward` and `extract` are timed, so
compilation is outside; `align` and `fuse` compile inside, and what that took is said beside.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import jax
import jax.numpy as jnp
import stages as run_stage
import typer
from flops import forward_flops, matrix_parameters
from stages import Clock, Setting
from synthetic import FAMILY, SHAPES, random_model, random_texts, shape_of

from tmjax.align.sizes import sites_of
from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.cli import run
from tmjax.commands.doctor.estimate import Reading, memory
from tmjax.errors import InputError
from tmjax.files.atomic import write_json
from tmjax.models.spec import shared_projections
from tmjax.recipes.merge import ActivationOptions, AlignmentOptions, Recipe
from tmjax.sharding.mesh import Layout

#: Dense bfloat16 TFLOP/s of one device, without sparsity, by a part of its name (makers' data sheets); first hit wins.
PEAKS = {
    "h100 pcie": 756, "h100 nvl": 835, "h100": 989, "h200": 989, "gh200": 989, "a100": 312, "tpu v4": 275,
    "v5 lite": 197, "v5e": 197, "v5p": 459, "v6 lite": 918, "v6e": 918,
}  # fmt: skip
STAGES = ("forward", "extract", "align", "fuse", "export")
NEEDS = {"align": ("extract",), "fuse": ("extract", "align"), "export": ("extract", "align", "fuse")}
#: What a stage should stay below on one H200, in seconds; and the least MFU of the extraction.
AIMS = {"align": 60.0, "fuse": 30.0, "merge": 300.0}
MFU_AIM = 0.45
ALPHA = 0.05


def stages_of(text: str) -> tuple[str, ...]:
    """The stages asked for and those that they need, in order; raises InputError for a name that is none."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in STAGES:
            raise InputError(f"--stages {name} is not one of {', '.join(STAGES)}")
    wanted = {*asked, *(need for name in asked for need in NEEDS.get(name, ()))}
    return tuple(name for name in STAGES if name in wanted)


def solver_options(kernel_dtype: str, iterations: int | None) -> dict[str, str | int | float]:
    """Options of the scaling solver; with `iterations` it does exactly so many and never asks whether it is done."""
    exact = {} if iterations is None else {"threshold": 0.0, "max_iterations": iterations, "check_every": iterations}
    return {"kernel_dtype": kernel_dtype} | exact


def peak_of(kind: str, told: float | None) -> float | None:
    """Dense bfloat16 TFLOP/s of a device by its name, or as told; None if not known."""
    return told or next((float(value) for part, value in PEAKS.items() if part in kind.lower()), None)


def estimated(models: Mapping[str, Model], setting: Setting, keep: bool) -> dict[str, float]:
    """GiB by stage that `tmjax doctor` expects the run to take."""
    sized = [
        SimpleNamespace(spec=m.spec, rows=m.rows, parameters=m.size, bytes=sum(p.nbytes for p in m.params.values()))
        for m in models.values()
    ]
    recipe = Recipe(
        source="-", target="-", texts="-", out="-", activations=ActivationOptions(keep=keep), alignment=setting.options
    )
    reading = Reading(len(setting.rows), *(sum(setting.lengths),) * 2, assumed=False)
    sites = sites_of(*sized, setting.projections)
    shards = setting.layout.sizes["fsdp"] * setting.layout.sizes["tensor"]
    held = memory(*sized, sites, reading, recipe, shards)
    return {stage: size / 2**30 for stage, size in held["stages"].items()}


def room(folder: Path) -> dict[str, float | None]:
    """GiB of the host's memory, free on the disk of `folder`, and of one device (None: the host's)."""
    device = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": host / 2**30,
        "disk": shutil.disk_usage(folder).free / 2**30,
        "device": device and device / 2**30,
    }


def kept(wanted: str, needs: Mapping[str, Mapping[str, float]], there: Mapping[str, float | None]) -> bool:
    """Whether activations are kept: as asked for, or (`auto`) if they fit; raises InputError if nothing fits."""
    if wanted != "auto":
        return wanted == "keep"
    if needs["keep"]["activations (on disk)"] < 0.9 * there["disk"]:
        return True
    if needs["stream"]["moments"] < 0.8 * (there["device"] or there["host"]):
        return False
    raise InputError("neither the activations (disk) nor their moments (device) fit; use fewer texts or smaller shapes")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def _main(
    target: Annotated[str, typer.Option(help="layers,hidden,mlp,heads,kv_heads,head_dim,vocab or a name.")] = "",
    source: Annotated[str, typer.Option(help=f"The same. Names: {', '.join(SHAPES)}.")] = "",
    texts: Annotated[int | None, typer.Option(min=2, help="Default: 2000.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of every text. Default: 512.")] = None,
    rows_per_text: Annotated[int, typer.Option(min=1, help="1 is sequence pooling; more are spans.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1)] = 16384,
    memory_mib: Annotated[int | None, typer.Option(help="Of a batch's averages; default: all its tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="What forward passes compute in: bfloat16 or float32.")] = "bfloat16",
    activations: Annotated[str, typer.Option(help="keep, stream or auto (what fits).")] = "auto",
    epsilon: Annotated[float, typer.Option(min=0)] = AlignmentOptions().epsilon,
    layer_pairs: Annotated[str, typer.Option(help="all, coarse or band.")] = "all",
    kernel_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many, for time that real pairs take.")
    ] = None,
    solver_memory_mib: Annotated[int | None, typer.Option(help="Default: a quarter of the device's memory.")] = None,
    mesh: Annotated[str | None, typer.Option(help="As in tmjax merge; default: one device.")] = None,
    stages: Annotated[str, typer.Option(help=f"Of {', '.join(STAGES)}.")] = "forward,extract,align,fuse",
    checkpoints: Annotated[Path | None, typer.Option(help="Write both checkpoints here and load them.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Dense bfloat16 peak of one device.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where activations go; default: a temporary folder.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes and few texts: a smoke test.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the JSON, written again after every stage.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only one line of JSON.")] = False,
) -> None:
    """Runs the stages, prints a table and one line of JSON."""
    names = {"target": target or ("tiny-target" if tiny else "llama-3.2-1b")}
    names["source"] = source or ("tiny-source" if tiny else "llama-3.1-8b")
    texts, tokens = texts or (40 if tiny else 2000), tokens or (48 if tiny else 512)
    if rows_per_text >= tokens:
        raise InputError(f"--rows-per-text {rows_per_text}: a text of {tokens} tokens has at most {tokens - 1} rows")
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"--dtype {dtype} is neither bfloat16 nor float32")
    if layer_pairs not in ("all", "coarse", "band"):
        raise InputError(f"--layer-pairs {layer_pairs} is not one of all, coarse, band")
    if activations not in ("auto", "keep", "stream"):
        raise InputError(f"--activations {activations} is not one of auto, keep, stream")
    wanted = stages_of(stages)
    specs = {side: shape_of(name) for side, name in names.items()}
    layout, device = Layout(mesh), jax.devices()[0]
    options = AlignmentOptions(
        epsilon=epsilon,
        layer_pairs=layer_pairs,
        memory_mib=solver_memory_mib,
        solver_options=solver_options(kernel_dtype, iterations),
    )
    rows, documents = random_texts(texts, tokens, rows_per_text, min(s.vocab for s in specs.values()), seed)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        setting = Setting(
            layout,
            rows,
            documents,
            shared_projections(*(FAMILY.params(spec) for spec in specs.values())),
            jnp.dtype(dtype),
            batch_tokens,
            memory_mib,
            options,
            peak_of(device.device_kind, peak_tflops),
            Path(temporary),
        )
        clock = Clock()
        report = {
            "device": device.device_kind, "devices": layout.devices, "mesh": layout.sizes, "jax": jax.__version__,
            **names, "texts": texts, "tokens": tokens, "rows": len(rows), "pooling": rows.pooling, "seed": seed,
            "dtype": dtype, "batch_tokens": batch_tokens, "alignment": options.model_dump(mode="json"),
            "parameters": {side: matrix_parameters(FAMILY, spec) for side, spec in specs.items()},
            "flops": {side: forward_flops(FAMILY, spec, setting.lengths) for side, spec in specs.items()},
            "peak_tflops_per_device": setting.peak, "stages": clock.stages,
        }  # fmt: skip
        if out is not None:
            clock.saved = lambda: write_json(out, report)
        with clock.stage("random weights"):
            models = {
                side: random_model(spec, seed + number, layout, setting.folder / side)
                for number, (side, spec) in enumerate(specs.items())
            }
        if checkpoints is not None:
            models = through_disk(clock, models, checkpoints, layout)
        report["memory_estimated_gib"] = {how: estimated(models, setting, how == "keep") for how in ("keep", "stream")}
        report["memory_there_gib"] = room(setting.folder)
        keep = kept(activations, report["memory_estimated_gib"], report["memory_there_gib"])
        report["activations"] = "keep" if keep else "stream"
        merge(setting, clock, models, wanted, keep)
    own = (entry["seconds"] for name, entry in clock.stages.items() if name.split()[0] in ("extract", "align", "fuse"))
    report["merge_seconds"] = sum(own)
    clock.saved()
    if not as_json:
        print(table(report))
    print(json.dumps(report, allow_nan=False))


def through_disk(clock: Clock, models: dict[str, Model], checkpoints: Path, layout: Layout) -> dict[str, Model]:
    """The same models, written and loaded again; those given are forgotten before."""
    with clock.stage("write checkpoints"):
        for side, model in models.items():
            export(model, checkpoints / side, overwrite=True)
    sides = list(models)
    models.clear()
    with clock.stage("load"):
        found = {side: load_model(checkpoints / side, placement=layout.place) for side in sides}
        jax.block_until_ready([dict(model.params) for model in found.values()])
    return found


def merge(setting: Setting, clock: Clock, models: Mapping[str, Model], wanted: tuple[str, ...], keep: bool) -> None:
    """Runs the stages in their order; each leaves its entry with the clock."""
    for side in models if "forward" in wanted else ():
        run_stage.forward(setting, clock, side, models[side])
    if "extract" not in wanted:
        return
    held = run_stage.extract(setting, clock, models, keep)
    if "align" not in wanted:
        return
    alignment = run_stage.align(setting, clock, held, keep)
    del held
    if "fuse" not in wanted:
        return
    fused = run_stage.fuse(clock, alignment, models, ALPHA)
    if "export" in wanted:
        with clock.stage("export"):
            export(fused.model, setting.folder / "merged")


def table(report: Mapping) -> str:
    """The stages, one per line, with what is aimed at on one H200."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{report['target']} <- {report['source']}, {report['texts']} texts x {report['tokens']} tokens, "
        f"{report['rows']} rows ({report['pooling']}), activations: {report['activations']}",
        f"{report['devices']} x {report['device']}, peak {cell(report['peak_tflops_per_device'], 'g')} TFLOP/s each",
        "stage                seconds  compiling   TFLOP/s    MFU  device GiB  host GiB  aim",
    ]
    for name, entry in report["stages"].items():
        aim = f"MFU >= {MFU_AIM:.0%}" if name.startswith("extract") else f"< {AIMS[name]:g} s" if name in AIMS else ""
        lines.append(
            f"{name:18} {entry['seconds']:9.2f} {entry['compiling']:10.2f} {cell(entry.get('tflops'), '.3g'):>9} "
            f"{cell(entry.get('mfu'), '.1%'):>6} {cell(entry['device_peak_gib'], '.1f'):>11} "
            f"{entry['host_peak_gib']:9.1f}  {aim}".rstrip()
        )
        for what in ("model", "model and averages"):
            if what in entry:
                lines.append(
                    f"  {what:20} {1e3 * entry[what]['seconds_per_batch']:.1f} ms a batch of {entry['batch']}, "
                    f"{entry[what]['tflops']:.3g} TFLOP/s, MFU {cell(entry[what]['mfu'], '.1%')}"
                )
        for site, held in entry.get("sites", {}).items():
            solved = "statistics only"
            if "problems" in held:
                solved = (
                    f"{held['problems']} pairs, at most {held['max_iterations']} iterations, "
                    f"{held['converged']} converged, {held['log_domain']} in the log domain, {held['stored']}"
                )
            lines.append(f"  {site:20} {held['seconds']:.2f} s, {solved}")
    lines.append(f"{'merge':18} {report['merge_seconds']:9.2f}  aim < {AIMS['merge']:g} s")
    for how, held in report["memory_estimated_gib"].items():
        told = ", ".join(f"{stage} {size:.1f}" for stage, size in held.items())
        lines.append(f"GiB if activations: {how}, estimated: {told}")
    there = ", ".join(f"{what} {cell(size, '.1f')}" for what, size in report["memory_there_gib"].items())
    return "\n".join([*lines, f"GiB there: {there}"])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run(arguments, application=app, name="h200")


if __name__ == "__main__":
    sys.exit(main())
