"""What the arms of an adaptation learn from, each a stage of the run: written texts, features, probabilities."""

import functools
from pathlib import Path
from typing import Any

import jax

from tmjax.activations import store as activation_store
from tmjax.activations.capture import CaptureOptions, capture
from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.arms import ADAPTED, Arm
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.adapt.start import Show, Starts
from tmjax.commands.generated_texts import write_texts
from tmjax.models.decoder import init_params
from tmjax.runs.directory import RunDirectory
from tmjax.teacher.probabilities import Taught, teach_texts
from tmjax.teacher.vocabulary_map import few_shared
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.train.guidance import SITE, SourceFeatures, by_depth, by_plan, last_tokens, read_out_metric, start_maps
from tmjax.train.modes import shardings_of
from tmjax.train.texts import TrainingTexts
from tmjax.transfer.controls import derangement
from tmjax.typing import Array, Params


class Material:
    """Makes and keeps what arms learn from."""

    def __init__(self, run: RunDirectory, key: object, inputs: AdaptInputs, starts: Starts, show: Show) -> None:
        self.run, self.key, self.inputs, self.starts, self.show = run, key, inputs, starts, show
        self.recipe = inputs.recipe
        # On the object, not on the class: models and texts go when the run does.
        self.texts = functools.cache(self._texts)
        self.rows = functools.cache(self._rows)

    def _model(self, which: str) -> tuple[Model, Params]:
        """`target`, `source`, or `random_source`: the source's architecture with fresh random weights."""
        inputs = self.inputs
        model = inputs.target if which == "target" else inputs.source
        if which != "random_source":
            return model, model.params
        places = shardings_of(inputs.layout, model.rows, model.spec)
        return model, init_params(model.spec, jax.random.key(self.recipe.seed), places)

    def written(self, writer: str) -> Texts:
        """The texts that a model wrote; as many for every writer as the source has left, or as there are."""
        inputs, how = self.inputs, self.recipe.written
        limit = None if writer == "source" else len(self.written("source"))

        def work(partial: Path) -> dict[Any, Any]:
            model, params = self._model(writer)
            judge = (lambda texts: inputs.scorer(inputs.target, texts)), inputs.target.params
            return write_texts(
                partial,
                (model, params),
                inputs.texts.texts,
                how.writing(),
                familiar_to=judge if writer == "source" else None,
                foreign=how.foreign,
                name=writer,
                first=limit,
                seed=self.recipe.seed,
                dtype=inputs.dtype,
                layout=inputs.layout,
                progress=lambda done, total: self.show(f"written:{writer}", done, total, "texts"),
            )

        key = [self.key, writer, how.model_dump()]
        path = self.run.stage(f"written:{writer}", key, f"written/{writer}.jsonl", work)
        return read_texts(str(path))

    def _texts(self, writer: str | None) -> TrainingTexts:
        """What an arm is trained on: the given texts, then the written ones."""
        given = self.inputs.texts
        if writer is None:
            return given
        more = self.written(writer)
        own = given.texts
        times = self.recipe.written.repeat
        ids = [f"{name}:{turn}" for turn in range(times) for name in own.ids]
        return TrainingTexts(Texts(own.path, (*ids, *more.ids), (*own.texts * times, *more.texts)))

    def _rows(self, writer: str | None) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """Spans that both models read of an arm's texts; documents of the target, then of the source."""
        return self.inputs.rows_of(self.texts(writer).texts)

    def _features(self, which: str, writer: str | None) -> activation_store.Activations:
        """Stored features of `target`, `source` or `random_source` at the spans of an arm's texts."""
        inputs, recipe = self.inputs, self.recipe
        start = recipe.start if which == "target" else None
        name = f"{which}-on-{writer}" if writer else which

        def work(partial: Path) -> None:
            rows, (of_target, of_source) = self.rows(writer)
            model, params = self._model(which)
            if which == "target":
                params = self.starts.of(ADAPTED, "sft", recipe.start)[1]
            capture(
                model.spec,
                params,
                rows,
                last_tokens(of_target if which == "target" else of_source),
                partial,
                CaptureOptions((SITE,), dtype=inputs.dtype, layout=inputs.layout),
                progress=lambda done, total: self.show(f"features:{name}", done, total, ""),
            )

        key = [self.key, which, start, writer]
        return activation_store.read(self.run.stage(f"features:{name}", key, f"features/{name}", work))

    def guidance(self, arm: Arm) -> tuple[SourceFeatures, dict[str, Array], dict[str, Array], list[float]]:
        """The source's features for batches, initial maps, frozen statistics, variance explained by the maps."""
        inputs, options = self.inputs, self.recipe.guidance
        held = self._features(arm.teacher, arm.writer)
        layers = by_depth(inputs.target.spec.layers, held.layers)
        if options.layers == "plan":
            layers = by_plan(list(inputs.alignment.layer_plans.values()))
        order = derangement(len(held.rows), self.recipe.seed) if arm.shuffled else None
        metric = None
        if (arm.metric or options.metric) == "fisher":
            model, params = self._model(arm.teacher)
            metric = read_out_metric(model.spec, params, held)
        source = SourceFeatures.of(held, self.rows(arm.writer)[1][0], layers, order, metric)
        return source, *start_maps(self._features("target", arm.writer), source, penalty=options.penalty)

    def taught(self, arm: Arm) -> Taught:
        """The teacher's probabilities at the shared positions of an arm's texts."""
        inputs, options = self.inputs, self.recipe.distillation
        name = f"{arm.teacher}-on-{arm.writer}" if arm.writer else arm.teacher

        def work(partial: Path) -> dict[Any, Any]:
            model, params = self._model(arm.teacher)
            found, facts = teach_texts(
                model,
                params,
                inputs.tokenizer,
                self.texts(arm.writer).texts.texts,
                most=self.recipe.max_tokens,
                search=options.search(),
                dtype=inputs.dtype,
                layout=inputs.layout,
                progress=lambda done, total: self.show(f"taught:{name}", done, total, ""),
            )
            found.save(partial)
            return {("taught", name): facts}

        key = [self.key, arm.teacher, arm.writer, options.model_dump()]
        found = Taught.load(self.run.stage(f"taught:{name}", key, f"taught/{name}.npz", work))
        facts = self.run.manifest["taught"][name]
        warning = few_shared(facts["positions"], facts["of"])
        if warning and arm.teacher == "source":
            self.starts.warn(warning)
        if arm.shuffled:
            order = derangement(len(found.document), self.recipe.seed)
            found = found._replace(ids=found.ids[order], weight=found.weight[order])
        return found
