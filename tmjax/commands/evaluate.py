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
from tmjax.commands.notes import note_blank, note_hidden
from tmjax.commands.progress import Progress, Warn, quiet
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
    """Which tasks are asked, and how."""

    names: Sequence[str]
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False


def evaluate_models(
    directories: Sequence[str],
    texts: str | None = None,
    *,
    tasks: TaskOptions | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    draws: int = 10000,
    seed: int = 0,
    mesh: str | None = None,
    progress: Progress = quiet,
    warn: Warn = lambda message: None,
) -> dict[str, Any]:
    """Bits per byte on one text file with 95% intervals, and task metrics with standard errors, of checkpoints.

    With `out`, results and what every document scored are written there: in the folder itself for one model, else in
    one folder per model, of its name. Raises InputError for bad input before any model is loaded, where that is known.
    """
    with contextlib.ExitStack() as stack:
        places = {} if out is None else _places(directories, out)
        if out is not None:
            read = [("the checkpoint", directory) for directory in directories] + [("texts", texts)]
            refuse_overlap(out, [*read, ("tasks", tasks and tasks.folder)])
            hosts.together(lambda: hosts.is_first() and _reserve(stack, out, places.values(), overwrite=overwrite))
        return _evaluate(directories, texts, tasks, places, overwrite, draws, seed, mesh, progress, warn)


def _evaluate(
    directories: Sequence[str],
    texts: str | None,
    tasks: TaskOptions | None,
    places: Mapping[str, Path],
    overwrite: bool,
    draws: int,
    seed: int,
    mesh: str | None,
    progress: Progress,
    warn: Warn,
) -> dict[str, Any]:
    documents = None if texts is None else read_texts(texts)
    note_blank([documents], warn)
    if tasks is not None:
        task_manager(tasks.names, tasks.folder)
    scores: dict[str, Scores] = {}
    asked: dict[str, TaskResults] = {}
    notes: dict[str, list[str]] = {}
    for done, directory in enumerate(directories):
        layout = Layout(mesh or AUTO, [describe(config_directory(directory)).spec.hidden])
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
        result["evaluation"] = evaluation_facts(scores, draws=draws, seed=seed).to_json()["evaluation"]
    if tasks is not None:
        result["lm_eval"] = require_lm_eval()
        result["tasks"] = {name: _task_facts(held, tasks) for name, held in asked.items()}
    for directory, place in places.items():
        if hosts.is_first():
            own = {key: value[directory] for key, value in result.items() if key != "lm_eval"}
            told = {"tmjax": tmjax.__version__, "model": directory, "seed": seed} | result | own
            told |= {} if documents is None else {"texts": {"path": texts, "sha256": documents.sha256}}
            _write(place, told, scores.get(directory), asked.get(directory), overwrite=overwrite)
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


def _task_facts(held: TaskResults, tasks: TaskOptions) -> dict[str, Any]:
    facts = {field.name: getattr(held, field.name) for field in dataclasses.fields(held) if field.name != "samples"}
    return facts | {"limit": tasks.limit, "chat_template": tasks.chat_template}


def _places(directories: Sequence[str], out: Path) -> dict[str, Path]:
    """Where the results of each model go."""
    if len(directories) == 1:
        return {directories[0]: out}
    names = [Path(d).resolve().name if Path(d).exists() else Path(d).name for d in directories]
    if len(set(names)) < len(names):
        raise InputError(f"--out names a folder after each model, and two are called {max(names, key=names.count)}")
    return {directory: out / name for directory, name in zip(directories, names, strict=True)}


def _reserve(stack: contextlib.ExitStack, out: Path, places: Iterable[Path], *, overwrite: bool) -> None:
    """Holds the locks of the outputs as long as the stack is open; refuses what exists."""
    for place in dict.fromkeys([out, *places]):
        stack.enter_context(OutputLock(place))
    for place in places:
        refuse_existing(place, overwrite=overwrite)


def _write(
    place: Path, told: dict[str, Any], scores: Scores | None, asked: TaskResults | None, *, overwrite: bool
) -> None:
    with atomic_directory(place, overwrite=overwrite) as partial:
        write_json(partial / RESULTS, told)
        if scores is not None:
            np.savez(partial / SCORES, bytes=scores.bytes, model=scores.nll)
        if asked is not None:
            (partial / SAMPLES).mkdir()
            for task, samples in asked.samples.items():
                lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
                (partial / SAMPLES / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
