"""Inputs of an adaptation: models, a merge to begin from, training texts, scorers; loaded when first used."""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tmjax.activations.store import read
from tmjax.align import storage as alignment_store
from tmjax.align.alignment import Alignment
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.load import checkpoint_notes, config_directory, load_model, require_plain
from tmjax.checkpoints.model import Model
from tmjax.commands.callbacks import Warn
from tmjax.commands.held_out import HeldOut
from tmjax.commands.lora_stage import require_exportable
from tmjax.errors import InputError, summarise
from tmjax.evaluate.bits import Scorer
from tmjax.recipes.adapt import WITH_SOURCE, AdaptRecipe
from tmjax.recipes.base import read_recipe
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.merge import Recipe
from tmjax.recipes.sources import SOURCE
from tmjax.runs.hashes import sha256_checkpoint
from tmjax.runs.manifest import load_manifest
from tmjax.runs.run_files import RECIPE
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.teacher.vocabulary_map import require_shared
from tmjax.text.documents import Texts
from tmjax.text.rows import Rows, TokenisedDocument, pair_rows
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.train.optimizer import TrainConfig
from tmjax.train.texts import TrainingTexts, leaked, read_training_texts
from tmjax.transfer.contribution import Coefficients
from tmjax.transfer.recipe import build_recipe
from tmjax.transfer.source_view import PairedActivations, SourceView


class AdaptInputs:
    """Inputs of an adaptation, loaded when first used.

    Args:
        recipe: The recipe.

    Raises:
        InputError: The target is a run without an alignment.
    """

    def __init__(self, recipe: AdaptRecipe) -> None:
        self.recipe = recipe
        self.held_out = HeldOut(recipe)
        self._sources: dict[str, Model] = {}
        target = Path(recipe.place(recipe.target))
        self.run = target if load_manifest(target) is not None else None
        if self.run is not None and not (self.run / "alignment").is_dir():
            raise InputError(f"{self.run} is a run without an alignment; give a run of tmjax merge, or a checkpoint")

    @functools.cached_property
    def run_recipe(self) -> Recipe | None:
        """The recipe of the merge that is adapted, if it is a run."""
        return None if self.run is None else build_recipe(read_recipe(self.run / RECIPE) | {"out": str(self.run)})

    @property
    def names(self) -> dict[str, str | None]:
        """Names of source and target. A run stands for the models that it merged, unless the recipe names a source."""
        run, recipe = self.run_recipe, self.recipe
        sources: dict[str, str | None] = {name: each.source for name, each in recipe.named_sources.items()}
        if not sources:
            sources = {SOURCE: None if run is None else run.source}
        return sources | {"target": recipe.target if run is None else run.target}

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources that there are: `source`, and `source-2` and so on of several."""
        return tuple(name for name, given in self.names.items() if name != "target" and given)

    @functools.cached_property
    def located(self) -> dict[str, str | None]:
        """Present paths of source and target."""
        own, run = self.recipe, self.run_recipe
        of_run = {name for name in (SOURCE, "target") if run and (name == "target" or not own.named_sources)}
        return {name: given and (run if name in of_run else own).place(given) for name, given in self.names.items()}

    @property
    def parents(self) -> dict[str, tuple[str, str]]:
        """Name and present place of the target, and of every source where the result has something of it."""
        used = ("target", *(self.source_names if self.recipe.terms or self.recipe.merges else ()))
        return {which: (str(self.names[which]), str(self.located[which])) for which in used}

    def merge_recipe(self) -> Recipe:
        """Returns the recipe of the merge that this adaptation needs, in a folder of its run.

        By default weights alone are merged, because residual-frozen training is of transported weights.
        """
        own, plain = self.recipe, {"preset": "barycentric"}
        settings = self.run_recipe.model_dump(mode="json") if self.run_recipe is not None else plain | own.merge
        shared = {name: getattr(own, name) for name in ("texts", "valid", "alpha", "mesh", "dtype", "seed")}
        given = {name: value for name, value in shared.items() if value is not None}
        if own.max_texts is not None:
            given["activations"] = settings.get("activations", {}) | {"max_texts": own.max_texts}
        known = {} if self.run_recipe is None else self.run_recipe.places
        given["places"] = known | own.places
        out = {"out": str(Path(own.out) / "merge"), "test": None, "controls": False, "sources": []}
        return build_recipe(settings | given | self.names | out)

    @functools.cached_property
    def layout(self) -> Layout:
        """The device mesh; chosen over all devices unless the recipe says otherwise."""
        named = [name for name in self.located.values() if name]
        return Layout(self.recipe.mesh or AUTO, [describe(config_directory(name)).spec.hidden for name in named])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that forward passes compute in."""
        return jnp.dtype(with_dtype(self.recipe).dtype)

    def load(self, path: str | Path) -> Model:
        """Loads a checkpoint onto the mesh."""
        return load_model(path, placement=self.layout.place)

    @functools.cached_property
    def target(self) -> Model:
        """The target model."""
        return self.load(self.located["target"])

    @property
    def source(self) -> Model:
        """The source model, or the first of several."""
        return self.source_model(SOURCE)

    def source_model(self, name: str) -> Model:
        """Returns one of the sources."""
        if name not in self._sources:
            self._sources[name] = self.load(self.located[name])
        return self._sources[name]

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The target's tokenizer."""
        return load_tokenizer(self.target.directory, self.target.spec.vocab)

    @functools.cached_property
    def texts(self) -> TrainingTexts:
        """The given training texts."""
        return read_training_texts(self.recipe.place(self.recipe.texts)).first(self.recipe.max_texts)

    def rows_of(self, texts: Texts) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """Returns spans of texts that both models read, and the documents of the target, then of the source."""
        tokenizers = [self.tokenizer, load_tokenizer(self.source.directory, self.source.spec.vocab)]
        return pair_rows(texts, tokenizers, pooling="span", max_tokens=self.recipe.max_tokens)

    @functools.cached_property
    def alignment(self) -> Alignment:
        """The alignment of the run that is adapted."""
        return alignment_store.load(self.run / "alignment")

    def merged_source(self) -> SourceView:
        """Returns the source of the run that is adapted, as its operators see it."""
        folder = self.run / "activations"
        return SourceView(
            self.source,
            alignment=lambda: self.alignment,
            activations=lambda: PairedActivations(*(read(folder / name) for name in ("target", "source"))),
        )

    @functools.cached_property
    def coefficients(self) -> Coefficients:
        """The alpha and beta of every projection in the run that is adapted."""
        facts = load_manifest(self.run).coefficients
        if facts is None:
            raise InputError(f"{self.run} has an alignment and no merge; run tmjax fuse {self.run} first")
        return {role: (item.alpha, item.beta) for role, item in facts.by_role.items()}

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every input."""
        models = {name: sha256_checkpoint(resolve(path)) for name, path in self.located.items() if path}
        texts = {"texts": self.texts.texts, "valid": self.held_out.valid, "test": self.held_out.test}
        return models | {name: value.sha256 for name, value in texts.items() if value is not None}

    @functools.cached_property
    def notes(self) -> dict[str, list[str]]:
        """Notes of the checkpoints of source and target; see `Model.notes`."""
        return {name: list(checkpoint_notes(path)) for name, path in self.located.items() if path}

    def scorer(self, model: Model, texts: Texts) -> Scorer:
        """Makes the scorer of texts for models of an architecture."""
        options = self.recipe.evaluation
        limits: dict[str, Any] = {"batch_tokens": options.batch_tokens, "max_tokens": options.max_tokens}
        tokenizer = load_tokenizer(model.directory, model.spec.vocab)
        return Scorer(model.spec, tokenizer, texts, dtype=self.dtype, layout=self.layout, **limits)

    @functools.cached_property
    def valid_scorer(self) -> Scorer:
        """Scorer of the validation texts under the target's architecture."""
        return self.scorer(self.target, self.held_out.valid)

    def check_settings(self) -> None:
        """Raises InputError for settings that do not go together; reads no input but the recipe of a run."""
        recipe = self.recipe
        training = recipe.training
        if (recipe.terms or recipe.mode in WITH_SOURCE) and not self.names["source"]:
            raise InputError(f"mode {recipe.mode} takes a source: give --source")
        self._refuse_several()
        if recipe.merges and self.run is None and not self.names["source"]:
            raise InputError("init merged takes a source to merge: give --source, or a run of tmjax merge as --target")
        if recipe.guidance.layers == "plan" and "guidance" in recipe.terms and self.run is None:
            raise InputError("guidance.layers plan takes a run of tmjax merge as --target")
        if recipe.valid is None and (len(training.schedules) > 1 or training.patience is not None):
            raise InputError("steps, learning rates and early stop are chosen on validation texts: give --valid FILE")
        if recipe.valid is None and recipe.budgeted:
            raise InputError("a budget is spent on what validation texts choose: give --valid FILE")
        for steps in training.steps:
            TrainConfig.of(training, steps, training.lr[0], self.dtype.name)

    def _refuse_several(self) -> None:
        """Raises InputError if there are several sources, and a term or a start that takes one alone."""
        recipe = self.recipe
        if recipe.sources and "guidance" in recipe.terms:
            advice = "set combine: [distillation, generated]" if recipe.mode == "combined" else "mode combined"
            raise InputError(f"guidance takes the features of one source: {advice}, or give one source")
        if recipe.sources and recipe.merges:
            raise InputError(
                f"mode {recipe.mode} with init {recipe.start} merges one source: give one source, or mode combined "
                "with init target"
            )

    def check(self, warn: Warn) -> None:
        """Loads everything, so that faults are reported before anything is written; warns of leaks."""
        self.check_settings()
        recipe = self.recipe
        if recipe.terms and self.texts.dialogues is not None:
            raise InputError(f"{recipe.texts} holds dialogues; mode {recipe.mode} reads plain documents (a text field)")
        require_plain(self.located["target"])
        require_exportable(recipe.export, self.names["target"], self.located["target"])
        spec = self.target.spec
        if spec.learned_positions and recipe.max_tokens > spec.max_positions:
            raise InputError(f"max_tokens is {recipe.max_tokens}, the model learned {spec.max_positions} positions")
        for name, heldout in (("test", self.held_out.test), ("validation", self.held_out.valid)):
            leaks = [] if heldout is None else leaked(self.texts.texts, heldout)
            if leaks:
                warn(
                    f"{len(leaks)} of {len(heldout)} {name} documents are inside the training texts {recipe.texts}; "
                    f"scores on them measure memory: {summarise(leaks)}"
                )
        _ = self.held_out.other_texts
        if "guidance" in recipe.terms:
            self.rows_of(self.texts.texts)
        if "distillation" in recipe.terms:
            for name in self.source_names:
                model, several = self.source_model(name), bool(recipe.sources)
                source = load_tokenizer(model.directory, model.spec.vocab)
                advice = f"leave {name} {self.names[name]} out" if several else "adapt without them: mode guided"
                require_shared(self.tokenizer, source, self.texts.texts.texts, otherwise=advice)
        self.texts.documents(self.tokenizer)
