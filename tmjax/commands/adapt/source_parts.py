"""What the sources of an adaptation say: edges, generated texts and probabilities of each, and their mixture."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.arms import ALL_SOURCES, RANDOM_MODEL, Arm, data_name, source_of, stand_in, texts_name
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.errors import InputError
from tmjax.models.decoder import init_params
from tmjax.recipes.sources import SOURCE
from tmjax.teacher.edges import Edges
from tmjax.teacher.generation import GeneratedTexts, Generation, TextFilter
from tmjax.teacher.lines import Examples
from tmjax.teacher.mixing import Mixture, counts_of, mixed, shares_of_documents, source_seed
from tmjax.teacher.probabilities import Search, TeacherProbabilities
from tmjax.teacher.stages import TeacherStages
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.documents import Texts
from tmjax.train.modes import shardings_of
from tmjax.transfer.controls import derangement
from tmjax.typing import Params

#: Consequence of a source without a text of use beside others.
_OTHERS = "the texts of the other sources are used"


@dataclass(frozen=True)
class SourceParts:
    """Asks the sources of an adaptation, or their replacements in a control; each answer is a stage of the run.

    Attributes:
        stages: Stages of the run that run a teacher.
        key: Input hash of the run.
        inputs: Inputs of the adaptation.
    """

    stages: TeacherStages
    key: object
    inputs: AdaptInputs
    # On the object: they go when the run does.
    _shares: dict[str | None, np.ndarray] = field(default_factory=dict)
    _mixed: dict[Arm, Mixture] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether there are several sources."""
        return len(self.inputs.source_names) > 1

    def names(self, without: str | None) -> list[str]:
        """Returns the sources of an arm."""
        return [name for name in self.inputs.source_names if name != without]

    def model(self, name: str) -> tuple[Model, Params]:
        """Returns a model and its parameters: `target`, a source, or the random model of its architecture."""
        inputs = self.inputs
        model = inputs.target if name == "target" else inputs.source_model(source_of(name))
        if not name.startswith(RANDOM_MODEL):
            return model, model.params
        places = shardings_of(inputs.layout, model.rows, model.spec)
        return model, init_params(model.spec, jax.random.key(inputs.recipe.seed), places)

    def teacher(self, name: str) -> Teacher:
        """Returns a model of `model` as it is asked."""
        model, params = self.model(name)
        return Teacher.of(model, params, dtype=self.inputs.dtype, layout=self.inputs.layout)

    def edges(self, source: str) -> Edges:
        """Returns the edges at which a true source follows the given texts; those of the controls are the same."""
        recipe = self.inputs.recipe
        return self.stages.edges(
            [self.key, recipe.distillation.model_dump()],
            lambda: (self.teacher(source), self.teacher("target")),
            self._examples,
            name=source,
            max_tokens=recipe.max_tokens,
            search=Search.of(recipe.distillation),
        )

    @property
    def _examples(self) -> Examples:
        recipe = self.inputs.recipe
        return Examples(self.inputs.texts.texts.texts, recipe.generation.examples, recipe.seed)

    def shares(self, without: str | None) -> np.ndarray:
        """Returns the shares of an arm's sources, of sum 1: as the recipe weighs them, or as they predict given texts.

        The shares of the true sources are those of the controls too.
        """
        if without not in self._shares:
            recipe, names = self.inputs.recipe, self.names(without)
            given = recipe.named_sources
            weights = np.asarray([given[name].weight if name in given else 1.0 for name in names])
            if recipe.mixing == "prediction" and len(names) > 1:
                texts = self.inputs.texts.texts.texts
                parts = [self._probabilities_of(name, Arm("sft", "target"), texts) for name in names]
                vocab = self.inputs.target.spec.vocab
                weights = shares_of_documents(parts, self._documents(texts), weights, vocab)
            self._shares[without] = weights / weights.sum()
        return self._shares[without]

    def counts(self, without: str | None) -> dict[str, int]:
        """Returns how many texts each source of an arm generates; all arms have as many together."""
        total = self.inputs.recipe.generation.texts
        return dict(zip(self.names(without), counts_of(total, self.shares(without)), strict=True))

    def named_like(self, arm: Arm) -> Arm:
        """Returns the arm by which generated texts are named.

        Texts without a source that generates none anyway are those of all sources.
        """
        if arm.without is None or arm.texts_by is None:
            return replace(arm, without=None)
        every = self.counts(None)
        same = {name: count for name, count in every.items() if count} == self.counts(arm.without)
        return replace(arm, without=None) if same else arm

    def generated(self, arm: Arm) -> GeneratedTexts:
        """Returns texts that the models of an arm generate.

        Of sources those familiar to the target are kept, of others at most as many.

        Raises:
            InputError: No text is of use.
        """
        texts_by = str(arm.texts_by)
        if texts_by == "target":
            limit = TextFilter(foreign=self.inputs.recipe.generation.foreign, max_texts=len(self._by_sources(arm)))
            return self._generate("target", "target", self.inputs.recipe.generation.texts, limit, self._seed(SOURCE))
        return self._by_sources(arm, RANDOM_MODEL if texts_by == RANDOM_MODEL else SOURCE)

    def _by_sources(self, arm: Arm, teacher: str = SOURCE) -> GeneratedTexts:
        """Returns the texts of all sources of an arm, or of the random models that stand for them."""
        options, arm = self.inputs.recipe.generation, self.named_like(arm)
        parts = []
        for source, count in self.counts(arm.without).items():
            if not count:
                continue
            ending = f"-without-{arm.without}" if arm.without else ""
            judge = TextFilter(self._bits_per_byte, options.foreign, without=_OTHERS if self.several else None)
            part = self._generate(source, f"{source}{ending}", count, judge, self._seed(source))
            if teacher != SOURCE and len(part):
                limit = TextFilter(foreign=options.foreign, max_texts=len(part))
                model = stand_in(teacher, source)
                part = self._generate(model, f"{model}{ending}", count, limit, self._seed(source))
            parts.append(part)
        if len(parts) == 1 and not self.several:
            return parts[0]
        if not any(map(len, parts)) and arm.without is None:
            raise InputError("no text of any source is of use; raise generation.foreign, or leave generated texts out")
        return _joined(parts)

    def _seed(self, source: str) -> int:
        """Returns a seed of a source's own, so that sources do not go on from the same words."""
        return source_seed(self.inputs.recipe.seed, self.inputs.source_names.index(source))

    def _generate(self, model: str, name: str, count: int, settings: TextFilter, seed: int) -> GeneratedTexts:
        """Runs the stage in which a model generates texts."""
        options = self.inputs.recipe.generation
        source = SOURCE if model == "target" else source_of(model)
        return self.stages.generated_texts(
            name,
            [self.key, model, options.model_dump(), *([count] if self.several else [])],
            lambda: self.teacher(model),
            self.inputs.texts.texts,
            replace(Generation.of(options, self.edges(source).examples), texts=count),
            seed=seed,
            settings=settings,
        )

    def _bits_per_byte(self, texts: Texts) -> np.ndarray:
        """Bits per byte of every text under the target [N]."""
        inputs = self.inputs
        scores = inputs.scorer(inputs.target, texts)(inputs.target.params)
        return scores.nll / np.log(2) / scores.bytes

    def probabilities(self, arm: Arm, texts: Sequence[str]) -> Mixture:
        """Returns the probabilities of an arm's sources, mixed, and the mean weights; in a control the replacements'.

        Args:
            arm: The arm.
            texts: Its texts.
        """
        recipe, names = self.inputs.recipe, self.names(arm.without)
        if len(names) == 1:
            result = Mixture(self._probabilities_of(names[0], arm, texts), np.ones(1))
        elif arm in self._mixed:
            result = self._mixed[arm]
        else:
            parts = [self._probabilities_of(name, arm, texts) for name in names]
            documents = self._documents(texts) if recipe.mixing == "prediction" else None
            keep, vocab = recipe.distillation.keep, self.inputs.target.spec.vocab
            result = mixed(parts, self.shares(arm.without), keep=keep, documents=documents, vocab=vocab)
            self._mixed.clear()  # one arm at a time
            self._mixed[arm] = result
        if not arm.shuffled:
            return result
        order = derangement(len(result.probabilities.document), recipe.seed)
        return result._replace(probabilities=result.probabilities.reordered(order))

    def _documents(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.inputs.tokenizer
        return [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(texts)]

    def _probabilities_of(self, source: str, arm: Arm, texts: Sequence[str]) -> TeacherProbabilities:
        """Returns the probabilities of one source, or of the model that stands for it, on an arm's texts."""
        recipe, edges, named = self.inputs.recipe, self.edges(source), self.named_like(arm)
        model = stand_in(arm.teacher, source)
        name = data_name(model, named)
        texts_by = arm.texts_by and texts_name(named)
        probabilities = self.stages.probabilities(
            name,
            [self.key, model, texts_by, recipe.distillation.model_dump()],
            lambda: self.teacher(model),
            self.inputs.tokenizer,
            texts,
            max_tokens=recipe.max_tokens,
            search=Search.of(recipe.distillation),
            examples=replace(self._examples, count=edges.examples) if edges.lines else None,
        )
        if arm.teacher == SOURCE:
            self.stages.warn_few_shared(name, f"{source}: " if self.several else "")
        return edges.of(probabilities, self._documents(texts))


def _joined(parts: Sequence[GeneratedTexts]) -> GeneratedTexts:
    """Joins the texts of several models."""
    numbered = list(enumerate(parts, 1))
    ids = tuple(f"{number}:{name}" for number, part in numbered for name in part.texts.ids)
    texts = tuple(text for part in parts for text in part.texts.texts)
    return GeneratedTexts(Texts(ALL_SOURCES, ids, texts), tuple(end for part in parts for end in part.ended))
