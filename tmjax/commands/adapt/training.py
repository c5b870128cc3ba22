"""The training of one arm: objective, batches, checkpoints, and a log with a line per step."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.commands.adapt.arm_data import DataOfArms
from tmjax.commands.adapt.arms import Arm
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.start import Show, Starts
from tmjax.recipes.adapt import TrainingOptions
from tmjax.sharding import hosts
from tmjax.train.checkpoints import Checkpoints
from tmjax.train.data import Batches
from tmjax.train.loop import Facts, Trainer, TrainResult
from tmjax.train.optimizer import TrainConfig
from tmjax.train.step import Objective, padding_of
from tmjax.typing import Array, Params

#: Steps over which throughput is measured; the first compiles and does not count.
MEASURED_STEPS = 8
#: Steps and learning rate.
Schedule = tuple[int, float]


def schedule_name(training: TrainingOptions, steps: int, lr: float) -> str:
    """Returns the folder of one schedule: `lr-X`, with the number of steps where the recipe has several."""
    return f"lr-{lr:g}" + (f"-steps-{steps}" if len(training.steps) > 1 else "")


@dataclass(frozen=True)
class ArmTrainer:
    """Trains the arms of one adaptation.

    Attributes:
        inputs: Inputs of the adaptation.
        starts: Initial arrays of the arms.
        data: The data of the arms.
        folder: Folder of logs and checkpoints, which are in `ARM/SCHEDULE`.
        key: Input hash of the run; checkpoints of another one are deleted.
        show: Called with (stage, done, all, note) after every step.
    """

    inputs: AdaptInputs
    starts: Starts
    data: DataOfArms
    folder: Path
    key: object
    show: Show

    def train(self, name: str, arm: Arm, schedule: Schedule) -> tuple[TrainResult, Objective, dict[str, Any]]:
        """Trains one arm with one schedule; returns the result, its objective, and facts for the manifest."""
        recipe, inputs, training = self.inputs.recipe, self.inputs, self.inputs.recipe.training
        steps, lr = schedule
        if recipe.budgeted:  # the first rounds of a search are short
            training = training.model_copy(update={"warmup": min(training.warmup, steps // 4)})
        if arm.anneal is not None:
            training = training.model_copy(update={"anneal": arm.anneal})
        mode, trained, frozen = self.starts.of(arm)
        data = self.data.of(arm)
        documents, counts = data.texts.documents(inputs.tokenizer)
        batches = Batches(
            documents,
            tokens=training.tokens_per_step,
            seed=recipe.seed,
            lengths=training.row_lengths,
            max_tokens=recipe.max_tokens,
            counts=counts,
            guidance=data.guidance,
            teacher=data.probabilities,
            multiple=inputs.layout.batch_multiple,
        )
        config = TrainConfig.of(
            training,
            steps,
            lr,
            recipe.dtype,
            guide_weight=0.0 if data.guidance is None else recipe.guidance.weight,
            teacher_weight=0.0 if data.probabilities is None else recipe.distillation.weight,
        )
        padding = padding_of(inputs.tokenizer.known(inputs.target.spec.vocab))
        objective = Objective(inputs.target.spec, config, mode, inputs.layout.mesh, padding)
        folder = self.folder / name / schedule_name(training, steps, lr)
        result = self._run(name, objective, folder, (trained | data.maps, frozen | data.statistics), batches)
        chosen = result.selection
        facts = data.facts | {
            "texts": len(documents),
            "lr": lr,
            "folder": folder.name,
            "planned_steps": steps,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "best_step": result.steps if chosen is None else chosen.step,
            "valid_bits_per_byte": None if chosen is None else chosen.loss,
            "valid_history": [] if chosen is None else [list(item) for item in chosen.history],
            "shapes": [list(shape) for shape in sorted({(batches.rows(i), n) for i, n in enumerate(batches.shapes)})],
        }
        return result, objective, facts

    def tokens_per_second(self) -> float:
        """Measures the throughput of plain training of the target on the given texts, without compilation."""
        recipe, inputs = self.inputs.recipe, self.inputs
        mode, trained, frozen = self.starts.of(Arm("sft", "target"))
        documents, counts = inputs.texts.documents(inputs.tokenizer)
        options = {"tokens": recipe.training.tokens_per_step, "seed": recipe.seed, "max_tokens": recipe.max_tokens}
        multiple = inputs.layout.batch_multiple
        batches = Batches(documents, **options, lengths=1, counts=counts, multiple=multiple)
        training = recipe.training.model_copy(update={"warmup": 0, "accumulate": 1})
        config = TrainConfig.of(training, MEASURED_STEPS, 1e-6, recipe.dtype)
        objective = Objective(inputs.target.spec, config, mode, inputs.layout.mesh)
        facts: list[Facts] = []
        Trainer(objective, inputs.layout, progress=facts.append).run(trained, frozen, batches)
        return (facts[-1].tokens - facts[0].tokens) / (facts[-1].seconds - facts[0].seconds)

    def _run(
        self,
        name: str,
        objective: Objective,
        folder: Path,
        arrays: tuple[dict[str, Array], dict[str, Any]],
        batches: Batches,
    ) -> TrainResult:
        """Runs the training loop with checkpoints and the log in `folder`; `arrays` are trained and frozen ones."""
        training, config, inputs = self.inputs.recipe.training, objective.config, self.inputs
        keeper = Checkpoints(folder / "checkpoints", [self.key, name, config.steps, config.lr], keep=training.keep)
        log = StepLog(folder / "log.csv")

        def progress(fact: Facts) -> None:
            if hosts.is_first():
                log.add(fact)
            note = f"loss {fact.loss:.3f}, {fact.tokens / fact.seconds:,.0f} tokens/s"
            note += "" if log.valid is None else f", validation {log.valid:.4f} bits/byte"
            self.show(f"{name} {folder.name}", fact.step, config.steps, note)

        def validate(params: Params) -> float:
            return hosts.agree(inputs.valid_scorer(params).bits_per_byte)

        trainer = Trainer(
            objective,
            inputs.layout,
            validate=None if inputs.held_out.valid is None else validate,
            validate_every=training.validate_every,
            patience=training.patience,
            keeper=keeper,
            keep_every=training.keep_every,
            progress=progress,
        )
        try:
            return trainer.run(*arrays, batches)
        finally:
            keeper.close()
            log.close()


class StepLog:
    """`log.csv` of a training. Steps that are repeated after an interruption replace their lines.

    `valid` is the last validation loss.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._stream, self.valid = file, None, None

    def add(self, fact: Facts) -> None:
        """Writes the line of a step."""
        if self._stream is None:
            self._open(fact.step)
        if fact.valid is not None:
            self.valid = fact.valid
        csv.writer(self._stream).writerow(["" if value is None else value for value in fact])
        self._stream.flush()

    def _open(self, step: int) -> None:
        kept = [list(Facts._fields)]
        if self._file.is_file():
            with self._file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))[1:]
            kept += [row for row in rows if len(row) == len(Facts._fields) and int(row[0]) < step]
        partial = self._file.with_suffix(".csv.new")
        self._stream = partial.open("w", newline="", encoding="utf-8")
        csv.writer(self._stream).writerows(kept)
        self._stream.flush()
        os.replace(partial, self._file)

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()
