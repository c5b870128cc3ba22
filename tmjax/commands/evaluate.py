"""`tmjax evaluate`: bits per byte and tasks of several checkpoints, and the folder that `tmjax compare` reads."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tmjax
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.load import config_directory, load_model
from tmjax.checkpoints.model import Model
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.commands.notes import note_blank, note_hidden
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer, Scores
from tmjax.evaluate.facts import evaluation_facts
from tmjax.evaluate.tasks import TaskResults, require_lm_eval, run_tasks, task_manager
from tmjax.files.atomic import atomic_directory, write_json
from tmjax.files.lock import OutputLock
from tmjax.files.owned import refuse_existing
from tmjax.files.paths import refuse_overlap
from tmjax.sharding import hosts
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer

RESULTS, SAMPLES, SCORES = "results.json", "samples", "scores.npz"


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-eval, and the form of their questions."""

    names: Sequence[str]
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """Requested measurements.

    Attributes:
        directories: Checkpoints: directories or hub ids.
        texts: Held-out texts, for bits per byte.
        tasks: Tasks of lm-eval.
        draws: Bootstrap draws.
        seed: Seed of the bootstrap, of few-shot examples and of sampling.
        mesh: Device mesh; chosen over all devices unless given.
    """

    directories: Sequence[str]
    texts: str | None = None
    tasks: TaskOptions | None = None
    draws: int = 10000
    seed: int = 0
    mesh: str | None = None


def evaluate_models(
    request: EvaluationRequest,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
    warn: Warn = silent,
) -> dict[str, Any]:
    """Measures bits per byte with 95% intervals, and task metrics with standard errors, of checkpoints.

    Args:
        request: The measurements.
        out: Folder of results and per-document scores; for several models it has a folder for each.
        overwrite: Whether existing results are replaced.
        progress: Called with a stage, models done and models in all.
        warn: Called with a warning.

    Returns:
        `evaluation`, `tasks`, `lm_eval` and `notes`, as `--json` prints them.

    Raises:
        InputError: An input is wrong, before any model is loaded where that is known by then.
    """
    directories, tasks = request.directories, request.tasks
    with contextlib.ExitStack() as stack:
        places = {} if out is None else _places(directories, out)
        if out is not None:
            read = [("the checkpoint", directory) for directory in directories] + [("texts", request.texts)]
            refuse_overlap(out, [*read, ("tasks", tasks and tasks.folder)])
            hosts.together(lambda: hosts.is_first() and _reserve(stack, out, places.values(), overwrite=overwrite))
        return _evaluate(request, places, overwrite, progress, warn)


def _evaluate(
    request: EvaluationRequest, places: Mapping[str, Path], overwrite: bool, progress: Progress, warn: Warn
) -> dict[str, Any]:
    directories, texts, tasks, seed = request.directories, request.texts, request.tasks, request.seed
    documents = None if texts is None else read_texts(texts)
    note_blank([documents], warn)
    if tasks is not None:
        task_manager(tasks.names, tasks.folder)
    scores: dict[str, Scores] = {}
    asked: dict[str, TaskResults] = {}
    notes: dict[str, list[str]] = {}
    for done, directory in enumerate(directories):
        layout = Layout(request.mesh or AUTO, [describe(config_directory(directory)).spec.hidden])
        model = load_model(directory, placement=layout.place)
        if documents is not None:
            scorer = Scorer(model.spec, load_tokenizer(model.directory, model.spec.vocab), documents, layout=layout)
            scores[directory] = scorer(model.params)
        if tasks is not None:
            asked[directory] = _asked(model, directory, layout, tasks, seed)
        notes |= {directory: list(model.notes)} if model.notes else {}
        progress("evaluate", done + 1, len(directories))
    result: dict[str, Any] = {"notes": notes} if notes else {}
    if documents is not None:
        note_hidden(scores, warn)
        result["evaluation"] = evaluation_facts(scores, draws=request.draws, seed=seed).to_json()["evaluation"]
    if tasks is not None:
        result["lm_eval"] = require_lm_eval()
        result["tasks"] = {name: _task_facts(task_results, tasks) for name, task_results in asked.items()}
    for directory, place in places.items():
        if hosts.is_first():
            own = {key: value[directory] for key, value in result.items() if key != "lm_eval"}
            record = {"tmjax": tmjax.__version__, "model": directory, "seed": seed} | result | own
            record |= {} if documents is None else {"texts": {"path": texts, "sha256": documents.sha256}}
            _write(place, record, scores.get(directory), asked.get(directory), overwrite=overwrite)
    return result


def _asked(model: Model, directory: str, layout: Layout, tasks: TaskOptions, seed: int) -> TaskResults:
    from tmjax.evaluate.lm_eval_model import TmjaxLM

    return run_tasks(
        TmjaxLM(model, layout=layout, name=directory, seed=seed),
        tasks.names,
        folder=tasks.folder,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        chat_template=tasks.chat_template,
        seed=seed,
    )


def _task_facts(results: TaskResults, tasks: TaskOptions) -> dict[str, Any]:
    facts = {
        field.name: getattr(results, field.name) for field in dataclasses.fields(results) if field.name != "samples"
    }
    return facts | {"limit": tasks.limit, "chat_template": tasks.chat_template}


def _places(directories: Sequence[str], out: Path) -> dict[str, Path]:
    """Returns the output directory of each model."""
    if len(directories) == 1:
        return {directories[0]: out}
    names = [Path(d).resolve().name if Path(d).exists() else Path(d).name for d in directories]
    if len(set(names)) < len(names):
        raise InputError(f"--out names a folder after each model, and two are called {max(names, key=names.count)}")
    return {directory: out / name for directory, name in zip(directories, names, strict=True)}


def _reserve(stack: contextlib.ExitStack, out: Path, places: Iterable[Path], *, overwrite: bool) -> None:
    """Locks the outputs until the stack is closed; refuses existing ones."""
    for place in dict.fromkeys([out, *places]):
        stack.enter_context(OutputLock(place))
    for place in places:
        refuse_existing(place, overwrite=overwrite)


def _write(
    place: Path, record: dict[str, Any], scores: Scores | None, asked: TaskResults | None, *, overwrite: bool
) -> None:
    with atomic_directory(place, overwrite=overwrite) as partial:
        write_json(partial / RESULTS, record)
        if scores is not None:
            np.savez(partial / SCORES, bytes=scores.bytes, model=scores.nll)
        if asked is not None:
            (partial / SAMPLES).mkdir()
            for task, samples in asked.samples.items():
                lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
                (partial / SAMPLES / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
