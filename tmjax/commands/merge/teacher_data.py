"""Teacher data of a merge: calibration and generated texts, and the source's probabilities of the target's tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.commands.callbacks import Warn
from tmjax.commands.merge.inputs import WITHOUT, Inputs
from tmjax.recipes.merge import Recipe
from tmjax.recipes.objectives import GenerationOptions
from tmjax.runs.directory import RunDirectory
from tmjax.teacher.edges import Edges
from tmjax.teacher.generation import Generation, TextFilter
from tmjax.teacher.lines import Examples
from tmjax.teacher.stages import TeacherStages
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.documents import Texts
from tmjax.transfer.source_view import TeacherData

#: Generated texts are left out beyond this ratio to the given ones in bits per byte of the target, as in adaptation.
FOREIGN = GenerationOptions().foreign


class Running(Protocol):
    """Members of a session that teacher data uses."""

    recipe: Recipe
    inputs: Inputs
    run: RunDirectory
    warn: Warn

    def step(self, stage: str) -> Callable[[int, int], None]:
        """Returns a callback that shows the progress of a stage."""
        ...


class MergeTeacher:
    """Makes the teacher data of a merge, each part a stage of the run.

    `reference` names the model whose generated texts limit those of other models, in number and in bytes.
    """

    def __init__(self, session: Running, reference: str) -> None:
        self.session, self.inputs, self.recipe = session, session.inputs, session.recipe
        self.stages = TeacherStages(session.run, session.step, session.warn)
        self.reference = reference
        steps = [step for step in session.inputs.chain if "teacher" in step.operator.needs]
        self.count = max((getattr(step.options, "generated_texts", 0) for step in steps), default=0)
        self.tokens = max((getattr(step.options, "tokens", 0) for step in steps), default=0)
        self.examples = next((step.options.examples for step in steps if hasattr(step.options, "examples")), None)

    @property
    def _longest(self) -> int:
        return min(self.recipe.activations.max_tokens, self.inputs.target.spec.max_positions)

    def _key(self, name: str) -> list[object]:
        hashes = [self.inputs.hashes[key] for key in ("texts", "source", "target")]
        recipe = self.recipe
        return [
            name,
            hashes,
            self.count,
            self.tokens,
            self.examples,
            recipe.activations.max_tokens,
            recipe.dtype,
            recipe.seed,
        ]

    def _teacher(self, model: Model) -> Teacher:
        return Teacher.of(model, dtype=self.inputs.dtype, layout=self.inputs.layout)

    def generated(self, name: str, model: Model) -> tuple[str, ...]:
        """Returns texts that a model generates; none, with a warning, if all are foreign to the target."""
        if not self.count:
            return ()
        reference = None if name == self.reference else self.generated(self.reference, self.inputs.source)
        if reference == ():
            return ()
        texts = self.stages.generated_texts(
            name,
            self._key(name),
            lambda: self._teacher(model),
            self.inputs.texts,
            Generation(self.count, tokens=self.tokens, examples=self._edges().examples),
            seed=self.recipe.seed,
            settings=self._filter(reference),
        )
        return texts.texts.texts

    def _filter(self, reference: tuple[str, ...] | None) -> TextFilter:
        """Returns the filter of a model's texts: the target judges the true source's, others are limited to as many."""
        without = "predictions are solved for on the calibration texts alone"
        if reference is None:
            return TextFilter(judge=self._bits_per_byte, foreign=FOREIGN, without=without)
        size = sum(len(text.encode()) for text in reference)
        return TextFilter(max_texts=len(reference), max_bytes=size, without=without)

    def _bits_per_byte(self, texts: Texts) -> np.ndarray:
        inputs = self.inputs
        scores = inputs.scorer(inputs.target, inputs.target_tokenizer, texts)(inputs.target.params)
        return scores.nll / np.log(2) / scores.bytes

    def data(self, name: str, model: Model) -> TeacherData:
        """Makes the teacher data of a model of the source's architecture.

        Args:
            name: Its name in stages and folders.
            model: The model.

        Raises:
            InputError: The two tokenizers never begin a token together.
        """
        inputs = self.inputs
        texts, edges = (*inputs.texts.texts, *self.generated(name, model)), self._edges()
        probabilities = self.stages.probabilities(
            name,
            self._key(name),
            lambda: self._teacher(model),
            inputs.target_tokenizer,
            texts,
            max_tokens=min(self._longest, inputs.source.spec.max_positions),
            examples=replace(self._examples, count=edges.examples) if edges.lines else None,
            advice=WITHOUT,
        )
        if name == self.reference:
            self.stages.warn_few_shared(name)
        tokenizer = inputs.target_tokenizer
        documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(texts)]
        probabilities = edges.of(probabilities, documents)
        return TeacherData(tuple(ids[: self._longest] for ids in documents), len(inputs.texts), probabilities)

    @property
    def _examples(self) -> Examples:
        return Examples(self.inputs.texts.texts, self.examples, self.recipe.seed)

    def _edges(self) -> Edges:
        """The edges at which the true source follows the given texts; those of the controls are the same."""
        inputs = self.inputs
        return self.stages.edges(
            self._key(self.reference),
            lambda: (self._teacher(inputs.source), self._teacher(inputs.target)),
            self._examples,
            max_tokens=min(self._longest, inputs.source.spec.max_positions),
        )
