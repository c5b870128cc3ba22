"""Inputs that a recipe names: models, tokenizers, texts, mesh; loaded when first used."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.align.alignment import solver_of
from tmjax.align.sizes import Sites, require_room, row_budget, sites_of
from tmjax.align.streaming import require_streamable
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.load import checkpoint_notes, config_directory, load_model, require_plain
from tmjax.checkpoints.model import Model
from tmjax.commands.held_out import HeldOut
from tmjax.commands.lora_stage import require_exportable
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer
from tmjax.models.spec import ParamSpec
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.merge import Recipe
from tmjax.runs.hashes import sha256_checkpoint
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.teacher.vocabulary_map import require_shared
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import Rows, TokenisedDocument, pair_rows, sample_rows
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.transfer.chain import aligns, chain_of, chain_projections, needs_of
from tmjax.transfer.operator import Chain
from tmjax.typing import Params

#: Advice where the source's probabilities cannot be read as probabilities of the target's tokens.
WITHOUT = "merge without the source's predictions: preset barycentric"
#: Several sources, and operators that take one.
ONE_SOURCE = "no operator of this recipe reads several sources: add predictions to operators, or give one source"


@dataclass(frozen=True)
class Inputs:
    """Inputs that a recipe names, loaded when first used.

    `like` are inputs of a recipe that names the same files; common inputs are taken from it.
    """

    recipe: Recipe
    like: "Inputs | None" = None

    @functools.cached_property
    def held_out(self) -> HeldOut:
        """Texts that nothing is fitted on."""
        return HeldOut(self.recipe)

    @property
    def valid(self) -> Texts | None:
        """The validation texts."""
        return self.held_out.valid

    @property
    def test(self) -> Texts | None:
        """The test texts."""
        return self.held_out.test

    @property
    def other_texts(self) -> Mapping[str, Texts]:
        """Texts of other languages or domains, by the names that they were given by."""
        return self.held_out.other_texts

    @functools.cached_property
    def chain(self) -> Chain:
        """The operators that run."""
        return chain_of(self.recipe)

    def _same(self, name: str) -> object:
        """Returns an input of `like`; None without one."""
        return None if self.like is None else getattr(self.like, name)

    @property
    def _same_activations(self) -> bool:
        return self.like is not None and self.recipe.activations == self.like.recipe.activations

    @functools.cached_property
    def layout(self) -> Layout:
        """The device mesh; chosen over all devices unless the recipe says otherwise."""
        if self.like is not None:
            return self.like.layout
        further = [entry.source for entry in self.recipe.further_sources.values()]
        every = [self.recipe.place(name) for name in (self.recipe.source, self.recipe.target, *further)]
        return Layout(self.recipe.mesh or AUTO, [describe(config_directory(name)).spec.hidden for name in every])

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """The dtype that forward passes compute in."""
        return jnp.dtype(with_dtype(self.recipe).dtype)

    def shardings(self, model: Model) -> dict[str, jax.sharding.Sharding | None]:
        """Returns the sharding of every parameter of a model, by path."""
        rows = [row for row in model.rows if row.tied_to is None]
        return {row.path: self.layout.place(row, row.stacked_shape(model.spec)) for row in rows}

    @functools.cached_property
    def source(self) -> Model:
        """The source model."""
        return self._same("source") or load_model(self.recipe.place(self.recipe.source), placement=self.layout.place)

    @functools.cached_property
    def target(self) -> Model:
        """The target model."""
        return self._same("target") or load_model(self.recipe.place(self.recipe.target), placement=self.layout.place)

    @functools.cached_property
    def further_sources(self) -> dict[str, Model]:
        """The sources after the first, by their names in stages."""
        if self.like is not None:
            return self.like.further_sources
        named = self.recipe.further_sources.items()
        return {k: load_model(self.recipe.place(each.source), placement=self.layout.place) for k, each in named}

    @functools.cached_property
    def source_tokenizer(self) -> TextTokenizer:
        """The source's tokenizer."""
        return self._same("source_tokenizer") or load_tokenizer(self.source.directory, self.source.spec.vocab)

    @functools.cached_property
    def target_tokenizer(self) -> TextTokenizer:
        """The target's tokenizer."""
        return self._same("target_tokenizer") or load_tokenizer(self.target.directory, self.target.spec.vocab)

    @functools.cached_property
    def all_texts(self) -> Texts:
        """All calibration texts of the file."""
        return read_texts(self.recipe.place(self.recipe.texts))

    @functools.cached_property
    def texts(self) -> Texts:
        """The calibration texts."""
        if self._same_activations:
            return self.like.texts
        return self.all_texts.part(self.recipe.activations.max_texts, self.recipe.seed)

    @functools.cached_property
    def shared_rows(self) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """Shared rows of the calibration texts; documents of the target, then of the source."""
        if self._same_activations:
            return self.like.shared_rows
        options = self.recipe.activations
        tokenizers = [self.target_tokenizer, self.source_tokenizer]
        return pair_rows(self.texts, tokenizers, pooling=options.pooling, max_tokens=options.max_tokens)

    @functools.cached_property
    def rows(self) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """The rows that are recorded, and the documents with these rows."""
        layers = self.target.spec.layers, self.source.spec.layers
        limit = row_budget(self.sites, layers, self.recipe.activations)
        return self.shared_rows if limit is None else sample_rows(*self.shared_rows, limit, self.recipe.seed)

    @property
    def row_seed(self) -> int | None:
        """The seed that chose the rows; None where all are recorded."""
        return self.recipe.seed if len(self.rows[0]) < len(self.shared_rows[0]) else None

    @functools.cached_property
    def sites(self) -> Sites:
        """The sites that the alignment needs."""
        return sites_of(self.target, self.source, self.projections, self.recipe.alignment.structure)

    @functools.cached_property
    def projections(self) -> dict[str, ParamSpec]:
        """The target's rows of the projections that are transported, by role."""
        return chain_projections(self.chain, self.target.rows, self.source.rows)

    @property
    def bases(self) -> dict[str, str]:
        """Base checkpoints of operators, as `base`, or as `base-1`, `base-2` if there are several."""
        names = list(dict.fromkeys(self.recipe.bases().values()))
        return {f"base-{number}" if len(names) > 1 else "base": name for number, name in enumerate(names, 1)}

    @property
    def models(self) -> dict[str, str]:
        """Names of source and target in the recipe; of several sources all."""
        further = {name: entry.source for name, entry in self.recipe.further_sources.items()}
        return {"source": self.recipe.source, "target": self.recipe.target} | further

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every input."""
        if self._same_activations:
            return self.like.hashes
        named = self.models | self.bases
        models = {name: sha256_checkpoint(resolve(self.recipe.place(path))) for name, path in named.items()}
        texts = {name: getattr(self, name) for name in ("texts", "valid", "test")}
        return models | {name: value.sha256 for name, value in texts.items() if value is not None}

    @functools.cached_property
    def notes(self) -> dict[str, list[str]]:
        """Notes on the checkpoints of source and target; see `Model.notes`. Further sources say who reads them."""
        notes = {name: list(checkpoint_notes(self.recipe.place(given))) for name, given in self.models.items()}
        first = [step.operator.name for step in self.chain if step.operator.needs != {"teacher"}]
        for name in self.recipe.further_sources if first else ():
            notes[name].append(f"its predictions are mixed in; {' and '.join(first)} read the first source alone")
        return notes

    def scorer(self, model: Model, tokenizer: TextTokenizer, texts: Texts) -> Scorer:
        """Makes the scorer of texts for models of an architecture."""
        options = self.recipe.evaluation
        return Scorer(
            model.spec,
            tokenizer,
            texts,
            batch_tokens=options.batch_tokens,
            max_tokens=options.max_tokens,
            dtype=self.dtype,
            layout=self.layout,
        )

    @functools.cached_property
    def valid_scorer(self) -> Scorer:
        """Scorer of the validation texts under the target's architecture."""
        return self.scorer(self.target, self.target_tokenizer, self.valid)

    @property
    def validation(self) -> dict[str, Callable[[Params], float]]:
        """Losses for choices of operators: bits per byte on the validation texts, and on the part for screening."""
        if self.valid is None:
            return {}
        limit = self.recipe.screen_texts
        losses = {"loss": lambda params: self.valid_scorer(params).bits_per_byte}
        if limit is not None and limit < len(self.valid):
            losses["screen"] = lambda params: self._screen_scorer(params).bits_per_byte
        return losses

    @functools.cached_property
    def _screen_scorer(self) -> Scorer:
        return self.scorer(self.target, self.target_tokenizer, self.valid.spread(self.recipe.screen_texts))

    def check_settings(self) -> None:
        """Raises InputError for settings that do not go together; reads no input."""
        recipe = self.recipe
        if not self.chain:
            raise InputError("at a fixed alpha no operator of this recipe is left: they all choose on validation texts")
        chosen = [step for step in self.chain if step.contributes or step.operator.chooses]
        if recipe.alpha is None and recipe.valid is None and chosen:
            raise InputError("alpha is chosen on validation texts: give --valid FILE, or fix it with --alpha X")
        if recipe.sources and "teacher" not in needs_of(self.chain):
            raise InputError(ONE_SOURCE)
        solver_of(recipe.located_alignment())
        if not recipe.activations.keep:
            require_streamable(recipe.located_alignment())
            for step in self.chain:
                if "activations" in step.operator.needs:
                    raise InputError(
                        f"the operator {step.operator.name} needs the activations; set activations.keep: true"
                    )

    def check(self) -> None:
        """Loads everything, so that faults are reported before anything is written."""
        self.check_settings()
        recipe, needs = self.recipe, needs_of(self.chain)
        require_plain(recipe.place(recipe.target))
        require_exportable(recipe.export, recipe.target, recipe.place(recipe.target))
        for name in ("layout", "texts", "valid", "test", "other_texts", "target", "source", "rows"):
            getattr(self, name)
        if recipe.controls and recipe.same_size_source is not None:
            load_tokenizer(load_model(recipe.place(recipe.same_size_source)).directory)
        if "teacher" in needs:
            require_shared(self.target_tokenizer, self.source_tokenizer, self.texts.texts, otherwise=WITHOUT)
            for name, model in self.further_sources.items():
                tokenizer = load_tokenizer(model.directory, model.spec.vocab)
                advice = f"leave {name} {recipe.further_sources[name].source} out"
                require_shared(self.target_tokenizer, tokenizer, self.texts.texts, otherwise=advice)
        if aligns(self.chain):
            require_room(self.sites, len(self.rows[0]) if recipe.activations.keep else 0, recipe.located_alignment())
