"""`tmjax evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import Coordinator, Distributed, Json, Mesh, Overwrite, Process, Processes
from tmjax.cli.terminal import open_console, print_json, progress_display
from tmjax.errors import InputError
from tmjax.sharding import job


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
    with join_job(locals()), progress_display() as (progress, warn):
        from tmjax.commands.evaluate import EvaluationRequest, TaskOptions, evaluate_models

        asked = TaskOptions(names, tasks_dir, num_fewshot, limit, chat_template) if names else None
        request = EvaluationRequest(models, texts, asked, draws, seed, mesh)
        result = evaluate_models(request, out=out, overwrite=overwrite, progress=progress, warn=warn)
    if as_json or job.silent():
        print_json(result)
        return
    from tmjax.report.tables import evaluation_rows, rich_table, task_rows

    if texts is not None:
        open_console().print(rich_table(f"Bits per byte on {texts}", *evaluation_rows(result)))
    if names:
        open_console().print(rich_table(f"Tasks (lm-eval {result['lm_eval']})", *task_rows(result)))
    for name, notes in result.get("notes", {}).items():
        for note in notes:
            open_console().print(f"Note: {name}: {note}", highlight=False, markup=False, soft_wrap=True)
