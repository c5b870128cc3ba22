"""Tasks of EleutherAI's lm-evaluation-harness, by name or from a folder of YAML files, on our forward.

`lm-eval` is an optional dependency and takes seconds to import: all of it is imported where it is used.
"""

import contextlib
import difflib
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmjax.errors import InputError, summarise

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from tmjax.evaluate.lm_eval_model import TmjaxLM

#: Draws of the harness's own bootstrap, for metrics whose standard error has no formula.
BOOTSTRAP = 1000


def require_lm_eval() -> str:
    """Returns the version of lm-eval; raises InputError if it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise InputError("tasks need lm-eval: pip install 'tmjax[eval]'") from None


def task_manager(names: Sequence[str], folder: str | Path | None) -> "TaskManager":
    """Returns a manager that knows all of `names`; of `folder` alone if possible (the harness's tasks take seconds).

    Raises InputError for a folder without tasks and for unknown names, with similar known names.
    """
    require_lm_eval()
    if not names:
        raise InputError("name at least one task: --tasks a,b")
    with contextlib.redirect_stdout(sys.stderr):
        from lm_eval.tasks import TaskManager

        if folder is not None:
            if not Path(folder).is_dir():
                raise InputError(f"{folder} is not a directory of tasks")
            # Data files are read from inside the folder, where a relative path would lead elsewhere.
            whole = str(Path(folder).resolve())
            local = _loaded(lambda: TaskManager(include_path=whole, include_defaults=False), f"tasks in {folder}")
            if not local.task_index:
                raise InputError(f"{folder} holds no task (a .yaml file with a `task:` key)")
            if all(name in local.task_index for name in names):
                return local
        manager = _everything(None if folder is None else str(Path(folder).resolve()))
    known = manager.task_index
    unknown = [name for name in names if name not in known]
    if unknown:
        close = {name: difflib.get_close_matches(name, known, n=3, cutoff=0.5) for name in unknown}
        suggestions = [f"{name} (perhaps {', '.join(matches)})" if matches else name for name, matches in close.items()]
        where = f", nor in {folder}" if folder else ""
        raise InputError(f"not a task of lm-eval {require_lm_eval()}{where}: {summarise(suggestions)}")
    return manager


@functools.lru_cache(maxsize=2)
def _everything(folder: str | None) -> "TaskManager":
    """Returns a manager of the harness's tasks and those of a folder; indexing thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return _loaded(lambda: TaskManager(include_path=folder), "tasks")


@dataclass(frozen=True)
class TaskResults:
    """Scores of a model: metrics with standard errors by task, samples by task, and the settings of the tasks.

    `tokens_sha256` is the hash of all token ids whose log-likelihoods were taken.
    """

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    documents: dict[str, int]
    shots: dict[str, int]
    versions: dict[str, Any]
    tokens_sha256: str


def run_tasks(
    model: "TmjaxLM",
    names: Sequence[str],
    *,
    folder: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    seed: int = 0,
) -> TaskResults:
    """Evaluates a model on tasks; relative data files of tasks in `folder` are looked for there.

    Raises InputError if a task is not known, its data cannot be read, or the model has no chat template but one is
    asked for.
    """
    if chat_template and not model.tokenizer.chat_template:
        raise InputError(f"the tokenizer of {model.name} has no chat template; leave --chat-template out")
    manager = task_manager(names, folder)
    with contextlib.redirect_stdout(sys.stderr):
        from lm_eval import evaluator

        # The data are loaded first, so that later errors are not errors of the data.
        tasks = load_tasks(manager, names, folder)
        outcome = evaluator.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            apply_chat_template=chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return TaskResults(
        {name: _metrics(values) for name, values in outcome["results"].items()},
        outcome["samples"],
        {name: counts["effective"] for name, counts in outcome["n-samples"].items()},
        dict(outcome["n-shot"]),
        dict(outcome["versions"]),
        model.tokens_sha256,
    )


def load_tasks(manager: "TaskManager", names: Sequence[str], folder: str | Path | None) -> list[Any]:
    """Loads tasks and groups with their data, relative data files from `folder`; raises InputError if that fails."""

    def load(name: str) -> list[Any]:
        loaded = manager.load([name])
        return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())

    with contextlib.chdir(folder) if folder else contextlib.nullcontext():
        return [task for name in names for task in _loaded(lambda name=name: load(name), f"task {name}")]


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Collects numbers by metric, such as `acc` and `acc_stderr`; a filter other than `none` stays in the name."""
    by_name = {key.replace(",none", ""): value for key, value in values.items() if "," in key}
    return {key: value if isinstance(value, int | float) else None for key, value in by_name.items()}


def _loaded(work: Any, subject: str) -> Any:
    """Returns the result of `work`; turns any exception into an InputError of one line."""
    try:
        return work()
    except Exception as error:  # the harness and `datasets` raise many unrelated types for the same user mistakes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {subject}: {reason}") from None
