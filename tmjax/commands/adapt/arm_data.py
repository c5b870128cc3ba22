"""Data of every arm: texts, features and probabilities of the source, or of its replacement in a control."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tmjax.activations.store import Activations
from tmjax.commands.adapt.arms import Arm, data_name, texts_name
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.source_parts import SourceParts
from tmjax.commands.adapt.start import Starts
from tmjax.teacher.probabilities import TeacherProbabilities
from tmjax.teacher.span_features import by_depth, by_plan, read_out_metric
from tmjax.teacher.stages import TeacherStages
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.documents import Texts
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.train.guidance import Moments, SourceFeatures, moments_of, start_maps
from tmjax.train.modes import map_sharding
from tmjax.train.texts import TrainingTexts
from tmjax.transfer.controls import derangement
from tmjax.typing import Array

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
        parts: Texts and probabilities of the sources.
        starts: Initial arrays of the arms.
    """

    parts: SourceParts
    starts: Starts
    # On the object: models and texts go when the run does.
    _texts: dict[str, TrainingTexts] = field(default_factory=dict)
    _moments: dict[str, Moments] = field(default_factory=dict)
    _started: dict[Arm, _Start] = field(default_factory=dict)
    _spans: dict[str | None, tuple[Rows, list[list[TokenisedDocument]]]] = field(default_factory=dict)

    @property
    def stages(self) -> TeacherStages:
        """Stages of the run that run a teacher."""
        return self.parts.stages

    @property
    def key(self) -> object:
        """Input hash of the run."""
        return self.parts.key

    @property
    def inputs(self) -> AdaptInputs:
        """Inputs of the adaptation."""
        return self.parts.inputs

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
            mixture = self.parts.probabilities(arm, self.texts(arm).texts.texts)
            probabilities = mixture.probabilities
            facts["teacher_positions"] = len(probabilities.document)
            names = self.parts.names(arm.without)
            if self.parts.several:
                facts["source_shares"] = dict(zip(names, mixture.shares.tolist(), strict=True))
        return ArmData(self.texts(arm), guidance, maps, statistics, probabilities, facts)

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

    def texts(self, arm: Arm) -> TrainingTexts:
        """Returns the given texts, followed by texts that the models of an arm generate, if any."""
        if arm.texts_by is None:
            return self.inputs.texts
        name = texts_name(self.parts.named_like(arm))
        if name not in self._texts:
            self._texts[name] = self._with_generated(self.inputs.texts.texts, arm)
        return self._texts[name]

    def _with_generated(self, given: Texts, arm: Arm) -> TrainingTexts:
        generated, repeat = self.parts.generated(arm), self.inputs.recipe.generation.repeat
        ids = [f"{name}:{turn}" for turn in range(repeat) for name in given.ids]
        texts = Texts(given.path, (*ids, *generated.texts.ids), (*given.texts * repeat, *generated.texts.texts))
        return TrainingTexts(texts, ended=(*[True] * len(ids), *generated.ended))

    def _spans_of(self, arm: Arm) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """Returns the spans of an arm's texts that both models read, and the documents of target and source."""
        if arm.texts_by not in self._spans:
            self._spans[arm.texts_by] = self.inputs.rows_of(self.texts(arm).texts)
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
            return self.parts.teacher(arm.teacher), rows, documents

        layers = by_depth(inputs.target.spec.layers, inputs.source.spec.layers)
        if options.layers == "plan":
            layers = by_plan(list(inputs.alignment.layer_plans.values()))
        used = sorted({*layers, inputs.source.spec.layers - 1})  # a metric reads the last
        key = [self.key, arm.teacher, None, arm.texts_by]
        stored = self.stages.features(data_name(arm.teacher, arm), key, features_of, used)
        metric = None
        if (arm.metric or options.metric) == "fisher":
            model, params = self.parts.model(arm.teacher)
            metric = read_out_metric(model.spec, params, stored)
        name = data_name(arm.teacher, arm)
        if name not in self._moments:
            self._moments[name] = moments_of(stored, layers)
        spans = self._spans_of(arm)[1][0]
        features = SourceFeatures.of(stored, spans, layers, metric, moments=self._moments[name])
        features = replace(features, own_rows=inputs.layout.own_rows)
        return features.reordered(derangement(len(stored.rows), inputs.recipe.seed)) if arm.shuffled else features
