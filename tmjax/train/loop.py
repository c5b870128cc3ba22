"""The training loop: steps, validation with selection and early stop, checkpoints, handling of NaN."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError, NonFiniteError
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import Layout
from tmjax.train.data import Batch, Batches
from tmjax.train.feed import ahead, step_data
from tmjax.train.modes import Frozen, Mode, Plain
from tmjax.train.optimizer import TrainConfig, Weights, learning_rate
from tmjax.train.selection import Selection
from tmjax.train.step import Losses, Objective, State, fold, start, step
from tmjax.typing import Array, Params


class Facts(NamedTuple):
    """A step's losses before its update (`text` in nats per token), and the validation loss after it (or None).

    `tokens` are those predicted and `seconds` the time since training (re)started.
    """

    step: int
    loss: float
    text: float
    guide: float
    teacher: float
    norm: float
    lr: float
    tokens: int
    seconds: float
    valid: float | None = None


#: Called with the facts of every step.
Progress = Callable[[Facts], None]


class Keeper(Protocol):
    """Storage of states (see `train.checkpoints`)."""

    def latest(self, like: State) -> tuple[int, State, Selection] | None:
        """Returns steps, state and selection of the newest checkpoint; None if there is none."""

    def save(self, count: int, state: State, selection: Selection) -> None:
        """Stores a state; need not wait until it is written."""

    def wait(self) -> None:
        """Waits until everything is written."""


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training.

    Attributes:
        params: Parameters of the model, the best on validation text, else the last.
        trained: The trained arrays of the same step.
        losses: Losses of the steps made in this process.
        steps: Steps made in all.
        selection: Validation losses and the best of them; None without validation.
        stopped_early: Whether `patience` ended it.
    """

    params: dict[str, Array]
    trained: dict[str, Array]
    losses: np.ndarray
    steps: int
    selection: Selection | None
    stopped_early: bool = False


@dataclass(frozen=True)
class Trainer:
    """Training with validation, early stop and checkpoints.

    A training that resumes from a checkpoint gives the numbers of one that was not interrupted.

    Attributes:
        objective: The training problem.
        layout: The device mesh.
        validate: Returns the loss of a model's parameters on validation text; called before the first step, every
            `validate_every` steps and after the last. The best parameters are the result.
        validate_every: Steps between validations.
        patience: Validations in a row without a better loss that end the training.
        keeper: Storage of checkpoints, from the newest of which training resumes.
        keep_every: Steps between checkpoints; the last step has one too.
        progress: Called with the facts of every step.
    """

    objective: Objective
    layout: Layout = field(default_factory=Layout)
    validate: Callable[[Params], float] | None = None
    validate_every: int = 50
    patience: int | None = None
    keeper: Keeper | None = None
    keep_every: int = 100
    progress: Progress | None = None

    def run(self, trained: Params, frozen: Frozen, data: Iterable[Batch]) -> TrainResult:
        """Trains for `config.steps` steps.

        Args:
            trained: The arrays to be trained, float32, on their devices; donated.
            frozen: Arrays that are not trained.
            data: Batches from the first on.

        Returns:
            The best model on validation text, else the last.

        Raises:
            InputError: `data` ends early.
            NonFiniteError: A loss or gradient is not a number; the last good state is stored first.
        """
        config = self.objective.config
        state, selection, done = start(self.objective, dict(trained)), Selection(), 0
        checkpoint = self.keeper.latest(state) if self.keeper else None
        if checkpoint is not None:
            done, state, selection = checkpoint
        elif self.validate is not None:
            self._validate(0, state, frozen, selection)
        facts = _Reporter(config, self.progress, done)
        stopped = self._exhausted(selection)
        steps = step_data(self._batches(data, done), self.layout, config.accumulate)
        with contextlib.closing(ahead(steps)) as made:
            while done < config.steps and not stopped:
                batches, tokens = next(made, (None, 0))
                if batches is None:
                    raise InputError(f"the training data ended after {done} of {config.steps} steps")
                rate, weights = facts.rates[done], Weights.at(config, done)
                state, losses = step(self.objective, state, frozen, batches, rate, weights)
                done += 1
                measured = None
                if self.validate is not None and (done % self.validate_every == 0 or done == config.steps):
                    self._require_healthy(state, facts, losses, done, selection)
                    measured = self._validate(done, state, frozen, selection)
                    stopped = self._exhausted(selection)
                bad = facts.add(done, losses, tokens, measured)
                if bad or done == config.steps:
                    self._require_healthy(state, facts, losses, done, selection)
                if self.keeper and (done % self.keep_every == 0 or done == config.steps or stopped):
                    self._require_healthy(state, facts, losses, done, selection)
                    self.keeper.save(done, state, selection)
        facts.flush()
        if self.keeper:
            self.keeper.wait()
        best = state.trained if selection.trained is None else selection.trained
        folded = fold(self.objective.mode, best, frozen)
        losses = np.asarray([fact.loss for fact in facts.all])
        return TrainResult(folded, best, losses, done, selection if self.validate else None, stopped)

    def _validate(self, done: int, state: State, frozen: Frozen, selection: Selection) -> float:
        """Shows the trained arrays, or their average where that is better, to `selection`; returns the loss."""
        arrays, mode = state.trained, self.objective.mode
        loss = self.validate(fold(mode, arrays, frozen))
        if state.average and done:
            averaged = self.validate(fold(mode, state.average, frozen))
            if averaged < loss:
                loss, arrays = averaged, state.average
        selection.see(done, loss, arrays)
        return loss

    def _batches(self, data: Iterable[Batch], done: int) -> Iterator[Batch]:
        skipped = done * self.objective.config.accumulate
        if isinstance(data, Batches):
            return data.after(skipped)
        return itertools.islice(iter(data), skipped, None)

    def _exhausted(self, selection: Selection) -> bool:
        return self.patience is not None and selection.worse >= self.patience

    def _require_healthy(
        self, state: State, facts: "_Reporter", losses: Losses, done: int, selection: Selection
    ) -> None:
        if bool(state.healthy):
            return
        facts.flush()
        last = next((i for i, fact in enumerate(facts.all) if not np.isfinite([fact.loss, fact.norm]).all()), None)
        if last is not None:
            done, loss, norm = facts.all[last].step, facts.all[last].loss, facts.all[last].norm
        else:
            loss, norm = _total(self.objective.config, done, losses), float(losses.norm)
        kept = ""
        if self.keeper:
            good = state._replace(healthy=jnp.ones_like(state.healthy))
            self.keeper.save(done - 1, good, selection)
            self.keeper.wait()
            kept = f"; the state after step {done - 1} is kept"
        fault = f"the loss became {loss}" if not np.isfinite(loss) else f"the gradient's norm became {norm}"
        raise NonFiniteError(f"{fault} at step {done}{kept}; lower the learning rate")


def _total(config: TrainConfig, count: int, losses: Losses) -> float:
    """Returns the weighted loss that step `count` minimised."""
    weights = Weights.at(config, count - 1)
    return float(losses.text + weights.guide * losses.guide + weights.teacher * losses.teacher)


class _Reporter:
    """Reads losses one step late, so that the host prepares a batch while the device computes."""

    def __init__(self, config: TrainConfig, progress: Progress | None, done: int) -> None:
        self.config, self.progress, self.all = config, progress, []
        self.rates = np.asarray(learning_rate(config)(jnp.arange(config.steps)))
        self._begin, self._tokens = time.perf_counter(), 0
        self._waiting: tuple[int, Losses, int, float | None] | None = None

    def add(self, count: int, losses: Losses, tokens: int, measured: float | None) -> bool:
        """Takes a step's losses; returns whether those of the one before are no numbers."""
        bad = self.flush()
        self._tokens += tokens
        self._waiting = (count, losses, self._tokens, measured)
        return bad or (measured is not None and self.flush())

    def flush(self) -> bool:
        """Reports the losses of the step before; returns whether they are no numbers."""
        if self._waiting is None:
            return False
        count, losses, tokens, measured = self._waiting
        self._waiting = None
        seconds = time.perf_counter() - self._begin
        loss = _total(self.config, count, losses)
        fact = Facts(count, loss, *(float(x) for x in losses), float(self.rates[count - 1]), tokens, seconds, measured)
        self.all.append(fact)
        if self.progress is not None:
            self.progress(fact)
        return not np.isfinite([loss, fact.norm]).all()


def train(
    spec: DecoderSpec,
    params: Params,
    data: Iterable[Batch],
    config: TrainConfig,
    *,
    mode: Mode | None = None,
    frozen: Frozen | None = None,
    progress: Progress | None = None,
    layout: Layout | None = None,
    **options: object,
) -> TrainResult:
    """Trains a float32 copy of parameters.

    The result depends only on the arguments: the same ones give the same bits on the same machine.

    Args:
        spec: The architecture.
        params: Parameters, or the arrays that `mode` trains.
        data: Batches from the first on.
        config: Steps and optimiser.
        mode: The map from trained and frozen arrays to parameters; all parameters are trained unless given.
        frozen: Arrays that are not trained.
        progress: Called with the facts of every step.
        layout: The device mesh.
        **options: Further fields of `Trainer`.

    Returns:
        The best model on validation text, else the last.

    Raises:
        InputError: As `Trainer.run` does.
        NonFiniteError: As `Trainer.run` does.
    """
    layout = layout or Layout()
    trained = {path: jnp.array(value, jnp.float32, copy=True) for path, value in params.items()}
    objective = Objective(spec, config, mode or Plain(), layout.mesh)
    return Trainer(objective, layout, progress=progress, **options).run(trained, frozen or {}, data)
