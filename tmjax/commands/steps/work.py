"""One step: the command of its kind, run in a directory below the run, and its numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.run import Adapt
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.commands.convert import convert, extract_lora, parse_dtype
from tmjax.commands.evaluate import EvaluationRequest, TaskOptions, evaluate_models
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.merge.run import Merge
from tmjax.commands.steps.resolve import Step
from tmjax.commands.vocabulary_transplant import VocabularyRequest, check_request, new_vocabulary
from tmjax.evaluate.tasks import require_lm_eval
from tmjax.recipes.steps_recipe import VocabularyStep
from tmjax.runs.run_facts import Cell
from tmjax.sharding import hosts

Measured = dict[str, Cell]


@dataclass(frozen=True)
class Signals:
    """Signals of a step.

    Attributes:
        progress: Called with a stage, steps done and steps in all.
        warn: Called with a warning.
        overwrite: Whether an unfinished run of another recipe in the place of the step is replaced.
    """

    progress: Progress = quiet
    warn: Warn = silent
    overwrite: bool = False

    def of(self, name: str) -> "Signals":
        """Returns those of a step, which name it."""
        return Signals(
            lambda stage, done, total: self.progress(f"{name} {stage}", done, total),
            lambda message: self.warn(f"{name}: {message}"),
            self.overwrite,
        )


def check_step(step: Step) -> None:
    """Raises InputError for settings of a step that do not go together; reads no input."""
    settings: Any = step.settings
    if step.kind == "merge":
        Inputs(settings).check_settings()
    elif step.kind == "adapt":
        inputs = AdaptInputs(settings)
        inputs.check_settings()
        if settings.merges and inputs.run is None:
            Inputs(inputs.merge_recipe()).check_settings()
    elif step.kind == "vocabulary":
        check_request(_vocabulary_request(settings))
    elif step.kind == "evaluate" and settings.tasks:
        require_lm_eval()


def run_step(step: Step, out: Path, signals: Signals) -> Measured:
    """Runs a step, or goes on with it.

    Args:
        step: The step, with the places of its models.
        out: Its directory. What tmjax wrote there of another step is replaced.
        signals: Progress and warnings.

    Returns:
        Its numbers.

    Raises:
        InputError: As the command of the step raises it.
    """
    return _WORK[step.kind](step.settings, out, signals)


def _vocabulary_request(settings: VocabularyStep) -> VocabularyRequest:
    return VocabularyRequest(
        settings.target,
        settings.tokenizer,
        settings.add,
        settings.texts,
        settings.init,
        settings.source,
        settings.multiple_of,
    )


def _alone(work: Callable[[], Mapping[str, Cell]]) -> Measured:
    """Runs work of the first process alone; returns its numbers on every process."""
    done = hosts.together(lambda: dict(work()) if hosts.is_first() else {})
    return hosts.agree(done)


def _vocabulary(settings: Any, out: Path, signals: Signals) -> Measured:
    def work() -> Mapping[str, Cell]:
        size = settings.max_shard_size
        request = _vocabulary_request(settings)
        facts = new_vocabulary(request, out, max_shard_size=size, overwrite=True, warn=signals.warn)
        for note in facts["notes"]:
            signals.warn(note)
        names = ("init", "rows_before", "rows", "kept", "new", "tokens_per_byte_before", "tokens_per_byte")
        return {name: facts[name] for name in names if name in facts}

    return _alone(work)


def _convert(settings: Any, out: Path, signals: Signals) -> Measured:
    def work() -> Mapping[str, Cell]:
        if settings.to == "lora":
            done = extract_lora(settings.target, out, base=settings.base, rank=settings.rank, overwrite=True)
            errors = list(done.errors.values())
            mean = sum(errors) / len(errors)
            return {"to": "lora", "rank": settings.rank, "mean_error": mean, "max_error": max(errors)}
        form = {"to": settings.to, "dtype": parse_dtype(settings.dtype), "max_shard_size": settings.max_shard_size}
        converted = convert(settings.target, out, **form, overwrite=True)
        for note in converted.notes:
            signals.warn(note)
        return {"to": settings.to, "dtype": settings.dtype, "parameters": converted.parameters}

    return _alone(work)


def _merge(settings: Any, out: Path, signals: Signals) -> Measured:
    merge = Merge(settings, overwrite=signals.overwrite, progress=signals.progress, warn=signals.warn)
    try:
        merge.all()
        gain = merge.run.manifest.source_gain
    finally:
        merge.run.close()
    measured: Measured = {"preset": settings.preset, "source": settings.source}
    return measured | ({} if gain is None else {"source_gain": gain.bits_per_byte})


def _adapt(settings: Any, out: Path, signals: Signals) -> Measured:
    def show(stage: str, done: int, total: int, _note: str) -> None:
        signals.progress(stage, done, total)

    adapt = Adapt(settings, overwrite=signals.overwrite, show=show, warn=signals.warn)
    try:
        adapt.all()
        facts, gain = adapt.run.manifest.training["adapted"], adapt.run.manifest.source_gain
    finally:
        adapt.run.close()
    measured: Measured = {"mode": settings.mode, "steps": facts.steps, "lr": facts.lr, "best_step": facts.best_step}
    return measured | ({} if gain is None else {"source_gain": gain.bits_per_byte})


def _evaluate(settings: Any, out: Path, signals: Signals) -> Measured:
    tasks = None
    if settings.tasks:
        folder = None if settings.tasks_dir is None else Path(settings.tasks_dir)
        tasks = TaskOptions(settings.tasks, folder, settings.num_fewshot, settings.limit, settings.chat_template)
    own = settings.draws, settings.seed, settings.mesh
    result = evaluate_models(
        EvaluationRequest([settings.target], settings.test, tasks, *own),
        out=out,
        overwrite=True,
        progress=signals.progress,
        warn=signals.warn,
    )
    signals.progress("evaluate", 1, 0)
    asked = result.get("tasks", {}).get(settings.target, {}).get("results", {})
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in asked.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric and isinstance(value, int | float)
    }


_WORK: Mapping[str, Callable[[Any, Path, Signals], Measured]] = {
    "vocabulary": _vocabulary,
    "merge": _merge,
    "adapt": _adapt,
    "convert": _convert,
    "evaluate": _evaluate,
}
