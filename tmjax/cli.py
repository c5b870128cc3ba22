"""The command line: thin typer commands over the pipeline. Results to standard output, all else to standard error."""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax import interrupt
from tmjax.errors import InputError, TmjaxError, summarise
from tmjax.files import lock
from tmjax.sharding import job

app = typer.Typer(
    name="tmjax",
    help="Merge large language models of different architectures by optimal transport.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe (YAML); flags win over it.", show_default=False)]
Source = Annotated[str | None, typer.Option(help="Source checkpoint: directory or hub id.")]
Target = Annotated[str | None, typer.Option(help="Target checkpoint, whose architecture is kept.")]
TextFile = Annotated[
    str | None, typer.Option("--texts", help="Calibration texts: .jsonl, .txt or hf:NAME[:split[:field]].")
]
Valid = Annotated[str | None, typer.Option(help="Texts on which coefficients are chosen.")]
Test = Annotated[str | None, typer.Option(help="Texts on which the result is measured.")]
Others = Annotated[
    list[str] | None,
    typer.Option("--other-texts", help="Texts of another language or domain, scored before and after; repeatable."),
]
SameSize = Annotated[
    str | None, typer.Option(help="A model no larger than the target, merged as well where controls are run.")
]
Out = Annotated[str | None, typer.Option(help="Run directory.")]
Preset = Annotated[str | None, typer.Option(help="predictions (default), quick, barycentric or paper.")]
Alpha = Annotated[float | None, typer.Option(help="Fixes alpha and switches fitting off.")]
Controls = Annotated[bool | None, typer.Option("--controls/--no-controls", help="Run every control arm too.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Mesh = Annotated[
    str | None, typer.Option(help="Device mesh, for example data=2,fsdp=2,tensor=2; default: auto, over all devices.")
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="One process of a job (TPU pod, SLURM, ...); all run the same command.")
]
Coordinator = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0, where --distributed cannot find the job by itself.")
]
Processes = Annotated[int | None, typer.Option("--num-processes", min=1, help="Processes of the job.")]
Process = Annotated[int | None, typer.Option("--process-id", min=0, help="Number of this process, from 0.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Negligible = Annotated[
    bool | None, typer.Option("--allow-negligible", help="Warn instead of refusing when nothing came from the source.")
]


def _stages(*, everything: bool) -> Callable[..., None]:
    """The command that runs all stages, or only those up to the alignment: both take the same flags."""

    def command(
        recipe: RecipeFile = None,
        source: Source = None,
        target: Target = None,
        texts: TextFile = None,
        valid: Valid = None,
        test: Test = None,
        other_texts: Others = None,
        same_size_source: SameSize = None,
        out: Out = None,
        preset: Preset = None,
        alpha: Alpha = None,
        controls: Controls = None,
        seed: Seed = None,
        mesh: Mesh = None,
        allow_negligible: Negligible = None,
        distributed: Distributed = False,
        coordinator: Coordinator = None,
        num_processes: Processes = None,
        process_id: Process = None,
        overwrite: Overwrite = False,
        as_json: Json = False,
    ) -> None:
        told = _recipe(recipe, locals())
        with _job(locals()), _progress() as (progress, warn):
            from tmjax.commands.merge.run import Merge

            merge = Merge(told, overwrite=overwrite, progress=progress, warn=warn)
            if everything:
                merge.all()
            else:
                merge.align()
            manifest = merge.run.manifest.to_json()
        _show_run(told.out, manifest, as_json)

    return command


app.command("merge", help="Merge a source model into a target model: all stages, controls, evaluation, report.")(
    _stages(everything=True)
)
app.command("align", help="Only activations and alignment; `tmjax fuse RUN` goes on from there.")(
    _stages(everything=False)
)


@app.command()
def fuse(
    run: Annotated[Path, typer.Argument(help="Run directory of `tmjax align` or `tmjax merge`.")],
    alpha: Alpha = None,
    controls: Controls = None,
    valid: Valid = None,
    test: Test = None,
    other_texts: Others = None,
    mesh: Mesh = None,
    allow_negligible: Negligible = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: Processes = None,
    process_id: Process = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fuse, evaluate and report from an existing alignment, perhaps with another alpha."""
    from tmjax.commands.merge.run import Merge, open_run

    changes = _given(locals(), ("alpha", "controls", "valid", "test", "other_texts", "allow_negligible"))
    told = open_run(run, changes | _given(locals(), ("mesh",)))
    if changes and (run / "merged").exists() and not overwrite:
        raise InputError(f"{run} already holds a merge; pass --overwrite to fuse it again with other settings")
    with _job(locals()), _progress() as (progress, warn):
        manifest = Merge(told, amend=True, progress=progress, warn=warn).all()
    _show_run(told.out, manifest, as_json)


@app.command()
def adapt(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Annotated[str | None, typer.Option(help="Target checkpoint, or a run of tmjax merge.")] = None,
    texts: Annotated[
        str | None, typer.Option("--texts", help="Training texts: text, prompt and response, or messages.")
    ] = None,
    valid: Annotated[str | None, typer.Option(help="Texts on which steps and learning rate are chosen.")] = None,
    test: Test = None,
    other_texts: Others = None,
    out: Out = None,
    mode: Annotated[
        str | None, typer.Option(help="guided, distilled, source-written, combined, residual-frozen, lora or sft.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Where training begins: target or merged.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Coefficient of what is transported; default: the merge's.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Updates of every arm; several by commas.")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rate, or several: 3e-4,1e-3; validation text chooses.")
    ] = None,
    controls: Controls = None,
    seed: Seed = None,
    mesh: Mesh = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a target on texts, guided by a source or on top of a merge, beside controls of the same budget."""
    from tmjax.recipes.adapt import build_adapt_recipe
    from tmjax.recipes.base import read_recipe

    values = read_recipe(recipe) if recipe else {}
    given = _given(locals(), ("source", "target", "texts", "valid", "test", "out", "mode", "init", "alpha"))
    given |= _given(locals(), ("controls", "seed", "mesh", "other_texts"))
    missing = [name for name in ("target", "texts", "out") if name not in values | given]
    if missing:
        raise InputError(f"give {', '.join('--' + name for name in missing)} or name them in a recipe")
    listed = {
        name: [part.strip() for part in value.split(",")] for name, value in (("lr", lr), ("steps", steps)) if value
    }
    training = dict(values.get("training") or {}) | listed
    told = build_adapt_recipe(values | given | {"training": training}, base=recipe.parent if recipe else None)
    with _progress() as (progress, warn):
        from tmjax.commands.adapt.run import Adapt

        manifest = Adapt(told, overwrite=overwrite, show=progress, warn=warn).all()
    if as_json:
        _print_json(manifest)
        return
    from tmjax.report.training import adapt_summary

    _console().print(adapt_summary(manifest))
    _console().print(f"Run directory {told.out} (with merged, report.html, plots)")


@app.command()
def solvers(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Target = None,
    texts: TextFile = None,
    valid: Valid = None,
    test: Test = None,
    out: Out = None,
    solvers: Annotated[
        str, typer.Option("--solvers", help="Names, comma-separated; options as name:key=value:key=value.")
    ] = "sinkhorn,scaling",
    alpha: Alpha = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare OT solvers on the same real problems: time, certificate, what the maps explain, quality of the merge."""
    told = _recipe(recipe, locals())
    names = list(dict.fromkeys(name.strip() for name in solvers.split(",") if name.strip()))
    with _progress() as (progress, warn):
        from tmjax.commands.solvers.run import SolverComparison, parse_solver

        for name in names:
            parse_solver(name, told.alignment)
        manifest = SolverComparison(told, overwrite=overwrite, progress=progress, warn=warn).compare(names)
    if as_json:
        _print_json(manifest)
        return
    from tmjax.report.solver_page import solver_rows
    from tmjax.report.tables import rich_table

    _console().print(rich_table("Solvers on the same problems", *solver_rows(manifest)))
    _console().print(f"Run directory {told.out} (with solvers.html, plots)")


@app.command()
def sweep(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Target = None,
    texts: TextFile = None,
    valid: Valid = None,
    test: Test = None,
    out: Out = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=a,b,c or KEY=low:high:step (ends included), repeatable. KEY: any dotted recipe key, or alpha, "
            "beta, epsilon, solver, alpha.PART, beta.PART with PART attention, mlp, q, k, v, o, gate, up or down. "
            "With --random also KEY=low..high and KEY=log:low..high."
        ),
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=1, help="Draw so many settings instead of all combinations.")
    ] = None,
    write_best: Annotated[
        bool, typer.Option("--write-best", help="Write the best setting's checkpoint to best/.")
    ] = False,
    preset: Preset = None,
    alpha: Alpha = None,
    seed: Seed = None,
    mesh: Mesh = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: Processes = None,
    process_id: Process = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score many settings of a recipe on the validation texts: a grid or random draws, in one compiled program.

    Writes results.csv (results.parquet too where pyarrow is installed, the optional extra `sweep`), plots, sweep.html.
    """
    told = _recipe(recipe, locals())
    if told.mesh is None:
        _every_core()
    with _job(locals()), _live() as (progress, warn, show):
        from tmjax.commands.sweep.run import Sweep

        run = Sweep(
            told,
            grid or [],
            random=random,
            write_best=write_best,
            overwrite=overwrite,
            progress=progress,
            warn=warn,
            show=show,
        )
        manifest = run.sweep()
    if as_json or job.silent():
        _print_json(manifest)
        return
    from tmjax.report.sweep_page import sweep_summary

    _console().print(sweep_summary(manifest, run.rows()), highlight=False)
    done = [
        name for name in ("results.csv", "results.parquet", "sweep.html", "best") if (Path(told.out) / name).exists()
    ]
    _console().print(f"Run directory {told.out} (with {', '.join(done)})")


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: directories or hub ids.")],
    texts: Annotated[str | None, typer.Option("--texts", help="Held-out texts, for bits per byte.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, comma-separated.")] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option("--tasks-dir", help="Folder of your own tasks (YAML) and their data files.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of a task.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask tasks as conversations in the tokenizer's chat format.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and per-document scores, which `tmjax compare` reads.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, of few-shot examples and of sampling.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 10000,
    mesh: Mesh = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: Processes = None,
    process_id: Process = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Bits per byte of checkpoints on held-out text, with 95% intervals over documents, and tasks of lm-eval."""
    names = list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))
    if texts is None and not names:
        raise InputError("give --texts FILE, --tasks NAMES or both")
    with _job(locals()), _progress() as (progress, warn):
        from tmjax.commands.evaluate import TaskOptions, evaluate_models

        result = evaluate_models(
            models,
            texts,
            tasks=TaskOptions(names, tasks_dir, num_fewshot, limit, chat_template) if names else None,
            out=out,
            overwrite=overwrite,
            draws=draws,
            seed=seed,
            mesh=mesh,
            progress=progress,
            warn=warn,
        )
    if as_json or job.silent():
        _print_json(result)
        return
    from tmjax.report.tables import evaluation_rows, rich_table, task_rows

    if texts is not None:
        _console().print(rich_table(f"Bits per byte on {texts}", *evaluation_rows(result)))
    if names:
        _console().print(rich_table(f"Tasks (lm-eval {result['lm_eval']})", *task_rows(result)))
    for name, notes in result.get("notes", {}).items():
        for note in notes:
            _console().print(f"Note: {name}: {note}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory of `tmjax merge` or `tmjax fuse`.")],
    as_json: Json = False,
) -> None:
    """Write a merge's report.html again from its run directory: one page that needs no network."""
    from tmjax.commands.report import rebuild_report

    with _progress() as (_, warn):
        page = rebuild_report(run, warn)
    if as_json:
        _print_json({"run": str(run), "report": str(page)})
    else:
        _console().print(str(page), highlight=False, soft_wrap=True)


@app.command()
def compare(
    results: Annotated[
        list[str],
        typer.Argument(help="Run directories, RUN:ARM, folders of `evaluate --out`; differences are to the first."),
    ],
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the differences (PNG).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 10000,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Results on the same documents, pair by pair: differences with 95% intervals over documents."""
    from tmjax.commands.compare import compare_results, write_plot

    with write_plot(plot, overwrite=overwrite) as write:
        result = compare_results(results, draws=draws, seed=seed)
        write(result["compare"])
    if as_json:
        _print_json(result)
        return
    from tmjax.report.comparison import compare_rows
    from tmjax.report.tables import rich_table

    _console().print(rich_table("Pair by pair on the same documents", *compare_rows(result["compare"])))
    for note in result["notes"]:
        _console().print(note, highlight=False)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id or orbax directory of ours.")],
    out: Annotated[Path, typer.Argument(help="Output directory.")],
    to: Annotated[str, typer.Option(help="hf or orbax.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, for example 5GB.")] = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint between Hugging Face and orbax, bit for bit unless --dtype asks for another."""
    from tmjax.commands.convert import convert, parse_dtype

    if to not in ("hf", "orbax"):
        raise InputError(f"--to {to!r} is not known; write hf or orbax")
    done = convert(model, out, to=to, dtype=parse_dtype(dtype), max_shard_size=max_shard_size, overwrite=overwrite)
    name, size = done.family.model_type, done.parameters
    result = {"input": model, "output": str(out), "to": to, "model_type": name, "parameters": size, "dtype": dtype}
    if as_json:
        _print_json(result | {"notes": list(done.notes)})
    else:
        _console().print(f"{model} -> {out} ({to}, {name}, {size:,} parameters)")
        for note in done.notes:
            _console().print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Target = None,
    texts: TextFile = None,
    mesh: Mesh = None,
    as_json: Json = False,
) -> None:
    """Before any weight is read: can these two be merged, what is mapped, what memory and time will it take."""
    from tmjax.commands.doctor.examine import examine
    from tmjax.commands.doctor.summary import doctor_summary

    told, has_texts = _pair(recipe, locals())
    report = examine(told, texts=has_texts)
    if as_json:
        _print_json(report)
    else:
        _console().print(doctor_summary(report), highlight=False)
    if not report["mergeable"]:
        raise InputError(f"{told.source} cannot be merged into {told.target}: {summarise(report['problems'])}")


_FLAGS = (
    "source",
    "target",
    "texts",
    "valid",
    "test",
    "other_texts",
    "same_size_source",
    "out",
    "preset",
    "alpha",
    "controls",
    "seed",
    "mesh",
    "allow_negligible",
)


def _given(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: options[name] for name in names if options.get(name) is not None}


def _recipe(file: Path | None, options: dict[str, Any]) -> Any:
    from tmjax.recipes.base import read_recipe
    from tmjax.transfer.recipe import build_recipe

    values = read_recipe(file) if file else {}
    given = _given(options, _FLAGS)
    missing = [name for name in ("source", "target", "texts", "out") if name not in values | given]
    if missing:
        raise InputError(f"give {', '.join('--' + name for name in missing)} or name them in a recipe")
    return build_recipe(values | given, base=file.parent if file else None)


def _pair(file: Path | None, options: dict[str, Any]) -> tuple[Any, bool]:
    """A recipe of which only the two models must be known, and whether it names texts."""
    from tmjax.recipes.base import read_recipe
    from tmjax.transfer.recipe import build_recipe

    values = (read_recipe(file) if file else {}) | _given(options, ("source", "target", "texts", "mesh"))
    missing = [name for name in ("source", "target") if name not in values]
    if missing:
        raise InputError(f"give {' and '.join('--' + name for name in missing)} or name them in a recipe")
    recipe = build_recipe({"texts": "-", "out": "-"} | values, base=file.parent if file else None)
    return recipe, "texts" in values


@contextlib.contextmanager
def _job(options: dict[str, Any]) -> Iterator[None]:
    """Joins the job that the options name, if any, for the time of the work."""
    place = [options[name] for name in ("coordinator", "num_processes", "process_id")]
    if not options["distributed"]:
        if any(value is not None for value in place):
            raise InputError("--coordinator, --num-processes and --process-id go with --distributed")
        yield
        return
    job.join(*place)
    yield


def _print_json(value: Any) -> None:
    if job.silent():
        return
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # the stream's encoding, or a file name that is not valid text
        text = json.dumps(value, allow_nan=False)
    print(text)


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr)
    # A pipe or a log has no width of its own; 80 columns would fold every table.
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def _show_run(out: str, manifest: dict[str, Any], as_json: bool) -> None:
    if as_json or job.silent():
        _print_json(manifest)
        return
    from tmjax.report.tables import run_summary

    _console().print(run_summary(manifest))
    done = [name for name in ("merged", "report.html", "plots") if (Path(out) / name).exists()]
    _console().print(f"Run directory {out}" + (f" (with {', '.join(done)})" if done else ""))


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """A progress display on standard error, and a function that prints a warning above it.

    A stage may have a note beside its name.
    """
    from tmjax.report.progress import Bars, Lines

    if job.silent():
        yield interrupt.checked(lambda stage, done, total, note="": None), lambda message: None
        return
    console = _console(stderr=True)
    with Bars(console) if console.is_terminal else Lines(sys.stderr) as display:
        yield interrupt.checked(display.step), lambda message: display.say(f"tmjax: warning: {message}")


def _every_core() -> None:
    """One CPU device per core, each of which takes settings of its own, unless devices were chosen already."""
    import jax

    if "device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0:
        return
    with contextlib.suppress(RuntimeError):  # the backend has started
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


@contextlib.contextmanager
def _live() -> Iterator[tuple[Callable[..., None], Callable[[str], None], Callable[[Any, int], None]]]:
    """As `_progress`, and below it a table of a sweep's rows so far, given them and the number of all settings."""
    from rich.console import Group
    from rich.live import Live

    from tmjax.report.progress import Bars, Lines
    from tmjax.report.sweep_page import live_table

    if job.silent():
        yield interrupt.checked(lambda stage, done, total: None), lambda message: None, lambda rows, total: None
        return
    console = _console(stderr=True)
    if not console.is_terminal:
        with Lines(sys.stderr) as lines:
            yield (
                interrupt.checked(lines.step),
                lambda message: lines.say(f"tmjax: warning: {message}"),
                lambda rows, total: None,
            )
        return
    bars = Bars(console)
    shown = [0.0]
    with Live(bars.display, console=console, refresh_per_second=4) as display:

        def show(rows: Any, total: int) -> None:
            if len(rows) == total or time.monotonic() > shown[-1] + 0.5:
                display.update(Group(bars.display, live_table(rows, total)))
                shown[:] = [time.monotonic()]

        yield interrupt.checked(bars.update), lambda message: bars.say(f"tmjax: warning: {message}"), show


def prepare() -> None:
    """Settings of the process: quiet libraries, compiled programs kept between runs, freed memory within one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    from tmjax.allocator import keep_freed_memory

    keep_freed_memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmjax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# typer may use the click package or its own copy of it; the base of its errors is public in neither.
_ClickError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def run(arguments: list[str] | None = None, *, application: typer.Typer = app, name: str = "tmjax") -> int:
    """Runs a command line and returns its exit status: 0 done, 2 bad input, 3 refused, 130 interrupted.

    An error is one line on standard error, `name: error: ...`. The tools of this repository run through it too.
    """

    for stream in (sys.stdout, sys.stderr):  # a table with characters that the stream lacks shows them escaped
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")
    with interrupt.noticed(), lock.command([name, *(sys.argv[1:] if arguments is None else arguments)]):
        return _ended(arguments, application, name)


def _ended(arguments: list[str] | None, application: typer.Typer, name: str) -> int:
    """Runs a command line; what it ends with is said and turned into an exit status."""

    def fail(message: str, code: int) -> int:
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
        if job.joined():
            lock.release_all()
            job.end(code)
        return code

    interrupted = "interrupted; the same command resumes" if application is app else "interrupted"
    memory = "lower batch_tokens and memory_mib in the recipe"
    try:
        result = typer.main.get_command(application).main(arguments, prog_name=name, standalone_mode=False)
        if result != 130:
            job.leave()
            return 0
        return fail(interrupted, 130)  # typer turns an interrupt inside a command into this status
    except (KeyboardInterrupt, typer.Abort):
        return fail(interrupted, 130)
    except Exception as error:
        if interrupt.noted():  # native code and libraries make of an interrupt what they like
            return fail(interrupted, 130)
        if isinstance(error, TmjaxError):
            return fail(str(error), error.exit_code)
        if isinstance(error, _ClickError):
            return fail(f"{error.format_message()} (see {name} --help)", 2)
        if isinstance(error, MemoryError):
            return fail(f"out of memory; {memory}", 1)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return fail(f"{where}{error.strerror or error}", 2)
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            return fail(f"out of device memory; {memory}, or use --mesh", 1)
        if not job.joined() or type(error).__name__ != "JaxRuntimeError":
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        return fail(f"another process of this job died or failed ({reason}); the same command resumes", 1)


@app.callback()
def _main() -> None:
    prepare()


def main() -> None:
    """Console script."""
    if "--distributed" in sys.argv[1:] and job.LOG not in os.environ:
        sys.exit(job.supervise(sys.argv[1:]))
    try:
        code = run()
    except BaseException:
        if job.joined():  # or the traceback would wait for the other processes
            try:
                traceback.print_exc()
            finally:
                job.end(1)
        raise
    interrupt.ignore()
    sys.exit(code)


if __name__ == "__main__":
    main()
