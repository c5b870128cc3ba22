"""Data of every arm: texts, features and probabilities of the source, or of its replacement in a control."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tmjax.activations.store import Activations
from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.arms import RANDOM_MODEL, Arm, data_name
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.start import Starts
from tmjax.models.decoder import init_params
from tmjax.teacher.edges import Edges
from tmjax.teacher.generation import GeneratedTexts, Generation, TextFilter
from tmjax.teacher.lines import Examples
from tmjax.teacher.probabilities import Search, TeacherProbabilities
from tmjax.teacher.span_features import by_depth, by_plan, read_out_metric
from tmjax.teacher.stages import TeacherStages
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.documents import Texts
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.train.guidance import Moments, SourceFeatures, moments_of, start_maps
from tmjax.train.modes import map_sharding, shardings_of
from tmjax.train.texts import TrainingTexts
from tmjax.transfer.controls import derangement
from tmjax.typing import Array, Params

#: Source features, initial maps, statistics, and part of the variance that each map explains.
_Start = tuple[SourceFeatures, dict[str, np.ndarray], dict[str, np.ndarray], list[float]]


@dataclass(frozen=True)
class ArmData:
    """The training data of one arm; in a control the source's part is replaced.

    Attributes:
        texts: The training texts.
        guidance: Source features at the spans of the texts, if the arm is guided.
        maps: Initial maps of guidance, to be trained.
        statistics: Frozen statistics of guidance.
        probabilities: A teacher's probabilities on the texts, if the arm is distilled.
        facts: Facts of these for the manifest.
    """

    texts: TrainingTexts
    guidance: SourceFeatures | None
    maps: dict[str, Array]
    statistics: dict[str, Array]
    probabilities: TeacherProbabilities | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class DataOfArms:
    """Makes the data of arms. Each part that a teacher makes is a stage of the run.

    Attributes:
        stages: Stages of the run that run a teacher.
        key: Input hash of the run.
        inputs: Inputs of the adaptation.
        starts: Initial arrays of the arms.
    """

    stages: TeacherStages
    key: object
    inputs: AdaptInputs
    starts: Starts
    # On the object: models and texts go when the run does.
    _texts: dict[str | None, TrainingTexts] = field(default_factory=dict)
    _moments: dict[str, Moments] = field(default_factory=dict)
    _started: dict[Arm, _Start] = field(default_factory=dict)
    _spans: dict[str | None, tuple[Rows, list[list[TokenisedDocument]]]] = field(default_factory=dict)

    def of(self, arm: Arm) -> ArmData:
        """Returns the data of an arm, in fresh arrays because training donates them."""
        guidance, maps, statistics, probabilities, facts = None, {}, {}, None, {}
        if "guidance" in arm.terms:
            if arm not in self._started:
                self._started.clear()  # the maps of one arm at a time
                self._started[arm] = self._start(arm)
            guidance, maps, statistics, explained = self._started[arm]
            maps, statistics = ({path: self._fresh(x) for path, x in part.items()} for part in (maps, statistics))
            facts = {"source_layers": guidance.layers, "explained_at_start": explained}
        if "distillation" in arm.terms:
            probabilities = self._probabilities(arm)
            facts["teacher_positions"] = len(probabilities.document)
        return ArmData(self.texts(arm.texts_by), guidance, maps, statistics, probabilities, facts)

    def _start(self, arm: Arm) -> _Start:
        """Returns source features, initial maps and statistics (on the host) of an arm, and what the maps explain.

        They are the same for every schedule; moments are those of all arms with the same features.
        """
        guidance, target = self._guidance(arm), self._target_features(arm)
        name = data_name("target", arm)
        if name not in self._moments:
            self._moments[name] = moments_of(target, range(target.layers))
        penalty = self.inputs.recipe.guidance.penalty
        maps, statistics, explained = start_maps(target, guidance, penalty=penalty, moments=self._moments[name])
        return guidance, *({p: np.asarray(x) for p, x in part.items()} for part in (maps, statistics)), explained

    def _fresh(self, value: np.ndarray) -> Array:
        """Returns a copy on the devices: of maps [L, k, n] split like parameters, else whole on each."""
        layout = self.inputs.layout
        if layout.mesh is None:
            return jnp.array(value, copy=True)
        whole = NamedSharding(layout.mesh, PartitionSpec())
        return jax.device_put(value, map_sharding(layout, value.shape) if value.ndim == 3 else whole, may_alias=False)

    def texts(self, texts_by: str | None) -> TrainingTexts:
        """Returns the given texts, followed by texts that a model generates, if any."""
        if texts_by not in self._texts:
            given = self.inputs.texts
            self._texts[texts_by] = given if texts_by is None else self._with_generated(given.texts, texts_by)
        return self._texts[texts_by]

    def _with_generated(self, given: Texts, texts_by: str) -> TrainingTexts:
        generated, repeat = self._generated(texts_by), self.inputs.recipe.generation.repeat
        ids = [f"{name}:{turn}" for turn in range(repeat) for name in given.ids]
        texts = Texts(given.path, (*ids, *generated.texts.ids), (*given.texts * repeat, *generated.texts.texts))
        return TrainingTexts(texts, ended=(*[True] * len(ids), *generated.ended))

    def _generated(self, texts_by: str) -> GeneratedTexts:
        """Texts that a model generates; of the source, those familiar to the target, of others at most as many."""
        inputs, options = self.inputs, self.inputs.recipe.generation
        by_source = texts_by == "source"
        settings = TextFilter(
            judge=self._bits_per_byte if by_source else None,
            foreign=options.foreign,
            max_texts=None if by_source else len(self._generated("source")),
        )
        return self.stages.generated_texts(
            texts_by,
            [self.key, texts_by, options.model_dump()],
            lambda: self._teacher(texts_by),
            inputs.texts.texts,
            Generation.of(options, self._edges().examples),
            seed=inputs.recipe.seed,
            settings=settings,
        )

    def _bits_per_byte(self, texts: Texts) -> np.ndarray:
        """Bits per byte of every text under the target [N]."""
        inputs = self.inputs
        scores = inputs.scorer(inputs.target, texts)(inputs.target.params)
        return scores.nll / np.log(2) / scores.bytes

    def _model(self, name: str) -> tuple[Model, Params]:
        """Returns a model and its parameters: `target`, `source` or RANDOM_MODEL."""
        inputs = self.inputs
        model = inputs.target if name == "target" else inputs.source
        if name != RANDOM_MODEL:
            return model, model.params
        places = shardings_of(inputs.layout, model.rows, model.spec)
        return model, init_params(model.spec, jax.random.key(inputs.recipe.seed), places)

    def _teacher(self, name: str) -> Teacher:
        model, params = self._model(name)
        return Teacher.of(model, params, dtype=self.inputs.dtype, layout=self.inputs.layout)

    def _spans_of(self, arm: Arm) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """Returns the spans of an arm's texts that both models read, and the documents of target and source."""
        if arm.texts_by not in self._spans:
            self._spans[arm.texts_by] = self.inputs.rows_of(self.texts(arm.texts_by).texts)
        return self._spans[arm.texts_by]

    def _target_features(self, arm: Arm) -> Activations:
        """Captures features of the initial model at the spans of an arm's texts, as a stage."""
        inputs, start = self.inputs, self.inputs.recipe.start

        def features_of() -> tuple[Teacher, Rows, list[TokenisedDocument]]:
            rows, (documents, _) = self._spans_of(arm)
            params = self.starts.of(Arm("sft", start))[1]
            return Teacher.of(inputs.target, params, dtype=inputs.dtype, layout=inputs.layout), rows, documents

        key = [self.key, "target", start, arm.texts_by]
        return self.stages.features(data_name("target", arm), key, features_of)

    def _guidance(self, arm: Arm) -> SourceFeatures:
        """Returns the standardised source features of an arm, or those of its control."""
        inputs, options = self.inputs, self.inputs.recipe.guidance

        def features_of() -> tuple[Teacher, Rows, list[TokenisedDocument]]:
            rows, (_, documents) = self._spans_of(arm)
            return self._teacher(arm.teacher), rows, documents

        layers = by_depth(inputs.target.spec.layers, inputs.source.spec.layers)
        if options.layers == "plan":
            layers = by_plan(list(inputs.alignment.layer_plans.values()))
        used = sorted({*layers, inputs.source.spec.layers - 1})  # a metric reads the last
        key = [self.key, arm.teacher, None, arm.texts_by]
        stored = self.stages.features(data_name(arm.teacher, arm), key, features_of, used)
        metric = None
        if (arm.metric or options.metric) == "fisher":
            model, params = self._model(arm.teacher)
            metric = read_out_metric(model.spec, params, stored)
        name = data_name(arm.teacher, arm)
        if name not in self._moments:
            self._moments[name] = moments_of(stored, layers)
        spans = self._spans_of(arm)[1][0]
        features = SourceFeatures.of(stored, spans, layers, metric, moments=self._moments[name])
        features = replace(features, own_rows=inputs.layout.own_rows)
        return features.reordered(derangement(len(stored.rows), inputs.recipe.seed)) if arm.shuffled else features

    def _probabilities(self, arm: Arm) -> TeacherProbabilities:
        """Returns the teacher's probabilities on an arm's texts, or those of its control."""
        recipe, name, edges = self.inputs.recipe, data_name(arm.teacher, arm), self._edges()
        probabilities = self.stages.probabilities(
            name,
            [self.key, arm.teacher, arm.texts_by, recipe.distillation.model_dump()],
            lambda: self._teacher(arm.teacher),
            self.inputs.tokenizer,
            self.texts(arm.texts_by).texts.texts,
            max_tokens=recipe.max_tokens,
            search=Search.of(recipe.distillation),
            examples=replace(self._examples, count=edges.examples) if edges.lines else None,
        )
        if arm.teacher == "source":
            self.stages.warn_few_shared(name)
        tokenizer = self.inputs.tokenizer
        texts = self.texts(arm.texts_by).texts.texts
        probabilities = edges.of(
            probabilities, [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(texts)]
        )
        if not arm.shuffled:
            return probabilities
        return probabilities.reordered(derangement(len(probabilities.document), recipe.seed))

    def _edges(self) -> Edges:
        """The edges at which the true source follows the given texts; those of the controls are the same."""
        recipe = self.inputs.recipe
        return self.stages.edges(
            [self.key, recipe.distillation.model_dump()],
            lambda: (self._teacher("source"), self._teacher("target")),
            self._examples,
            max_tokens=recipe.max_tokens,
            search=Search.of(recipe.distillation),
        )

    @property
    def _examples(self) -> Examples:
        recipe = self.inputs.recipe
        return Examples(self.inputs.texts.texts.texts, recipe.generation.examples, recipe.seed)
