"""`tmjax evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import Draws, JobFlags, Mesh, OutputFlags, names_of
from tmjax.cli.terminal import print_note, progress_display, show_result
from tmjax.errors import InputError


@dataclass(frozen=True)
class TaskFlags:
    """Tasks of lm-eval, and the form of their questions."""

    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, comma-separated.")] = None
    tasks_dir: Annotated[
        Path | None, typer.Option("--tasks-dir", help="Folder of your own tasks (YAML) and their data files.")
    ] = None
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")] = (
        None
    )
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of a task.")] = None
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask tasks as conversations in the tokenizer's chat format.")
    ] = False


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: directories or hub ids.")],
    *,
    texts: Annotated[str | None, typer.Option("--texts", help="Held-out texts, for bits per byte.")] = None,
    tasks: TaskFlags,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and per-document scores, which `tmjax compare` reads.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, of few-shot examples and of sampling.")] = 0,
    draws: Draws = 10000,
    mesh: Mesh = None,
    job: JobFlags,
    output: OutputFlags,
) -> None:
    """Bits per byte of checkpoints on held-out text, with 95% intervals over documents, and tasks of lm-eval."""
    names = names_of(tasks.tasks)
    if texts is None and not names:
        raise InputError("give --texts FILE, --tasks NAMES or both")
    with join_job(job), progress_display() as (progress, warn):
        from tmjax.commands.evaluate import EvaluationRequest, TaskOptions, evaluate_models

        own = tasks.tasks_dir, tasks.num_fewshot, tasks.limit, tasks.chat_template
        request = EvaluationRequest(models, texts, TaskOptions(names, *own) if names else None, draws, seed, mesh)
        result = evaluate_models(request, out=out, overwrite=output.overwrite, progress=progress, warn=warn)

    def show(console: Any) -> None:
        from tmjax.report.tables import evaluation_rows, rich_table, task_rows

        if texts is not None:
            console.print(rich_table(f"Bits per byte on {texts}", *evaluation_rows(result)))
        if names:
            console.print(rich_table(f"Tasks (lm-eval {result['lm_eval']})", *task_rows(result)))
        for name, notes in result.get("notes", {}).items():
            for note in notes:
                print_note(console, f"{name}: {note}")

    show_result(result, show, as_json=output.as_json)
