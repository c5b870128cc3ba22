"""Teacher data of a merge: calibration and generated texts, and the source's probabilities of the target's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import jax
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.commands.callbacks import Warn
from tmjax.commands.merge.inputs import WITHOUT, Inputs
from tmjax.models.decoder import init_params
from tmjax.recipes.merge import Recipe
from tmjax.recipes.objectives import GenerationOptions
from tmjax.runs.directory import RunDirectory
from tmjax.teacher.edges import Edges
from tmjax.teacher.generation import Generation, TextFilter
from tmjax.teacher.lines import Examples
from tmjax.teacher.mixing import counts_of, mixed, shares_of_documents, source_seed
from tmjax.teacher.probabilities import Search, TeacherProbabilities
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

    `reference` names the first source, whose generated texts limit those of other models, in number and in bytes; each
    further source does so for its own.
    """

    def __init__(self, session: Running, reference: str) -> None:
        self.session, self.inputs, self.recipe = session, session.inputs, session.recipe
        self.stages = TeacherStages(session.run, session.step, session.warn)
        self.reference = reference
        steps = [step for step in session.inputs.chain if "teacher" in step.operator.needs]
        self.count = max((getattr(step.options, "generated_texts", 0) for step in steps), default=0)
        self.tokens = max((getattr(step.options, "tokens", 0) for step in steps), default=0)
        self._learnt: np.ndarray | None = None
        self.examples = next((step.options.examples for step in steps if hasattr(step.options, "examples")), None)

    @property
    def _longest(self) -> int:
        return min(self.recipe.activations.max_tokens, self.inputs.target.spec.max_positions)

    def _key(self, name: str, source: str, *further: object) -> list[object]:
        """Returns the input hash of a stage that asks a source, or a model that stands for it."""
        hashes = [self.inputs.hashes[key] for key in ("texts", source, "target")]
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
            *further,
        ]

    def several_key(self) -> list[object]:
        """Returns the part of a key that is about several sources: their content, weights and mixing."""
        recipe, inputs = self.recipe, self.inputs
        names = [name for name in inputs.models if name != "target"]
        return [[inputs.hashes[name] for name in names], [entry.weight for entry in recipe.sources], recipe.mixing]

    @property
    def _sources(self) -> dict[str, Model]:
        """The true sources by name, the first one first."""
        return {self.reference: self.inputs.source, **self.inputs.further_sources}

    def _several(self, *values: object) -> list[object]:
        """Returns what distinguishes a stage where there are several sources; nothing for one."""
        return [self.several_key(), *values] if self.recipe.sources else []

    def _stand_ins(self, name: str, model: Model, seed: int | None) -> dict[str, tuple[str, Model]]:
        """Returns name and model of every source in an arm: the sources themselves, or random ones of `seed`."""
        result = {self.reference: (name, model)}
        for source, own in self.inputs.further_sources.items():
            ending = source.removeprefix(self.reference)
            fresh = own
            if seed is not None:
                fresh = replace(own, params=init_params(own.spec, jax.random.key(seed), self.inputs.shardings(own)))
            result[source] = (f"{name}{ending}", fresh)
        return result

    def _teacher(self, model: Model) -> Teacher:
        return Teacher.of(model, dtype=self.inputs.dtype, layout=self.inputs.layout)

    def _shares(self) -> np.ndarray:
        """Returns the shares of the sources, of sum 1: as the recipe weighs them, or as they predict given texts."""
        recipe, texts = self.recipe, self.inputs.texts.texts
        weights = np.asarray([entry.weight for entry in recipe.sources] or [1.0])
        if recipe.sources and recipe.mixing == "prediction":
            if self._learnt is None:
                parts = [
                    self._probabilities(source, f"{source}-on-given", model, texts, "given")
                    for source, model in self._sources.items()
                ]
                vocab = self.inputs.target.spec.vocab
                self._learnt = shares_of_documents(parts, self._documents(texts), weights, vocab)
            weights = self._learnt
        return weights / weights.sum()

    def generated(self, name: str, model: Model, seed: int | None = None) -> tuple[str, ...]:
        """Returns texts that the sources of an arm generate; none, with a warning, if all are foreign to the target.

        Args:
            name: Name of the first model in stages: `reference`, or that of a control.
            model: The model that stands for the first source.
            seed: Seed of the random models that stand for further sources; None: the sources themselves.
        """
        if not self.count:
            return ()
        counts = dict(zip(self._sources, counts_of(self.count, self._shares()), strict=True))
        texts: list[str] = []
        for source, (own_name, own) in self._stand_ins(name, model, seed).items():
            texts += self._generated_by(source, own_name, own, counts[source]) if counts[source] else ()
        return tuple(texts)

    def _generated_by(self, source: str, name: str, model: Model, count: int) -> tuple[str, ...]:
        """Returns texts by one model; those of another than the true source are at most as many as the source's."""
        reference = None if name == source else self._generated_by(source, source, self._sources[source], count)
        if reference == ():
            return ()
        number = list(self._sources).index(source)
        texts = self.stages.generated_texts(
            name,
            self._key(name, source, *self._several(count)),
            lambda: self._teacher(model),
            self.inputs.texts,
            Generation(count, tokens=self.tokens, examples=self._edges(source).examples),
            seed=source_seed(self.recipe.seed, number),
            settings=self._filter(reference),
        )
        return texts.texts.texts

    def _filter(self, reference: tuple[str, ...] | None) -> TextFilter:
        """Returns the filter of a model's texts: the target judges the true source's, others are limited to as many."""
        without = "predictions are solved for on the calibration texts alone"
        if self.recipe.sources:
            without = "predictions are solved for on the other texts"
        if reference is None:
            return TextFilter(judge=self._bits_per_byte, foreign=FOREIGN, without=without)
        size = sum(len(text.encode()) for text in reference)
        return TextFilter(max_texts=len(reference), max_bytes=size, without=without)

    def _bits_per_byte(self, texts: Texts) -> np.ndarray:
        inputs = self.inputs
        scores = inputs.scorer(inputs.target, inputs.target_tokenizer, texts)(inputs.target.params)
        return scores.nll / np.log(2) / scores.bytes

    def data(self, name: str, model: Model, seed: int | None = None) -> TeacherData:
        """Makes the teacher data of a model of the source's architecture; of several sources their mixture.

        Args:
            name: Its name in stages and folders.
            model: The model.
            seed: Seed of the random models that stand for further sources; None: the sources themselves.

        Raises:
            InputError: The two tokenizers never begin a token together.
        """
        inputs = self.inputs
        texts = (*inputs.texts.texts, *self.generated(name, model, seed))
        parts = [
            self._probabilities(source, own_name, own, texts, *self._several(self._shares().tolist()))
            for source, (own_name, own) in self._stand_ins(name, model, seed).items()
        ]
        documents, probabilities = self._documents(texts), parts[0]
        if len(parts) > 1:
            given = documents if self.recipe.mixing == "prediction" else None
            keep, vocab = Search().keep, inputs.target.spec.vocab
            probabilities = mixed(parts, self._shares(), keep=keep, documents=given, vocab=vocab).probabilities
        return TeacherData(tuple(ids[: self._longest] for ids in documents), len(inputs.texts), probabilities)

    def _documents(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.inputs.target_tokenizer
        return [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(texts)]

    def _probabilities(
        self, source: str, name: str, model: Model, texts: Sequence[str], *further: object
    ) -> TeacherProbabilities:
        """Returns the probabilities of one source, or of a model that stands for it, on texts."""
        edges = self._edges(source)
        probabilities = self.stages.probabilities(
            name,
            self._key(name, source, *further),
            lambda: self._teacher(model),
            self.inputs.target_tokenizer,
            texts,
            max_tokens=self._longest_of(source),
            examples=replace(self._examples, count=edges.examples) if edges.lines else None,
            advice=WITHOUT,
        )
        if name == source:
            self.stages.warn_few_shared(name, f"{name}: " if self.recipe.sources else "")
        return edges.of(probabilities, self._documents(texts))

    def _longest_of(self, source: str) -> int:
        return min(self._longest, self._sources[source].spec.max_positions)

    @property
    def _examples(self) -> Examples:
        return Examples(self.inputs.texts.texts, self.examples, self.recipe.seed)

    def _edges(self, source: str) -> Edges:
        """The edges at which a true source follows the given texts; those of the controls are the same."""
        return self.stages.edges(
            self._key(source, source),
            lambda: (self._teacher(self._sources[source]), self._teacher(self.inputs.target)),
            self._examples,
            name=source,
            max_tokens=self._longest_of(source),
        )
