"""What a recipe names: models, tokenizers, texts, mesh; loaded when first asked for."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.align.alignment import solver_of
from tmjax.align.streaming import require_streamable
from tmjax.checkpoints.described import describe
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.load import checkpoint_notes, config_directory, load_model
from tmjax.checkpoints.model import Model
from tmjax.commands.doctor.estimate import require_room, sites_of
from tmjax.commands.held_out import HeldOut
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scorer
from tmjax.models.spec import ParamSpec, shared_projections
from tmjax.recipes.merge import Recipe
from tmjax.runs.hashes import sha256_checkpoint
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.teacher.vocabulary_map import require_shared
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import Rows, TokenisedDocument, pair_rows
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.typing import Params

#: What to do where a source's probabilities cannot be read as those of the target's tokens.
WITHOUT = "merge without the source's predictions: preset barycentric"


@dataclass(frozen=True)
class Inputs(HeldOut):
    """What a recipe names, loaded when first asked for."""

    recipe: Recipe

    @functools.cached_property
    def layout(self) -> Layout:
        """The device mesh; chosen over all devices unless the recipe says otherwise."""
        both = [self.recipe.place(name) for name in (self.recipe.source, self.recipe.target)]
        return Layout(self.recipe.mesh or AUTO, [describe(config_directory(name)).spec.hidden for name in both])

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """The dtype that forward passes compute in."""
        return jnp.dtype(self.recipe.dtype)

    def shardings(self, model: Model) -> dict[str, jax.sharding.Sharding | None]:
        """Where every parameter of a model lives, by path."""
        rows = [row for row in model.rows if row.tied_to is None]
        return {row.path: self.layout.place(row, row.stacked_shape(model.spec)) for row in rows}

    @functools.cached_property
    def source(self) -> Model:
        """The source model."""
        return load_model(self.recipe.place(self.recipe.source), placement=self.layout.place)

    @functools.cached_property
    def target(self) -> Model:
        """The target model."""
        return load_model(self.recipe.place(self.recipe.target), placement=self.layout.place)

    @functools.cached_property
    def source_tokenizer(self) -> TextTokenizer:
        """The source's tokenizer."""
        return load_tokenizer(self.source.directory, self.source.spec.vocab)

    @functools.cached_property
    def target_tokenizer(self) -> TextTokenizer:
        """The target's tokenizer."""
        return load_tokenizer(self.target.directory, self.target.spec.vocab)

    @functools.cached_property
    def all_texts(self) -> Texts:
        """The calibration texts that the file holds."""
        return read_texts(self.recipe.place(self.recipe.texts))

    @functools.cached_property
    def texts(self) -> Texts:
        """The calibration texts."""
        return self.all_texts.part(self.recipe.activations.max_texts, self.recipe.seed)

    @functools.cached_property
    def rows(self) -> tuple[Rows, list[list[TokenisedDocument]]]:
        """Shared rows of the calibration texts; documents of the target, then of the source."""
        options = self.recipe.activations
        tokenizers = [self.target_tokenizer, self.source_tokenizer]
        return pair_rows(self.texts, tokenizers, pooling=options.pooling, max_tokens=options.max_tokens)

    @functools.cached_property
    def projections(self) -> dict[str, ParamSpec]:
        """The target's rows of the projections that are transported, by role."""
        return shared_projections(self.target.rows, self.source.rows, self.recipe.fusion.roles)

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every input."""
        named = {"source": self.recipe.source, "target": self.recipe.target, "base": self.recipe.fusion.base}
        models = {
            name: sha256_checkpoint(resolve(self.recipe.place(path)))
            for name, path in named.items()
            if path is not None
        }
        texts = {name: getattr(self, name) for name in ("texts", "valid", "test")}
        return models | {name: value.sha256 for name, value in texts.items() if value is not None}

    @functools.cached_property
    def notes(self) -> dict[str, list[str]]:
        """What a user should know of source and target and nothing refuses; see `Model.notes`."""
        return {
            name: list(checkpoint_notes(self.recipe.place(getattr(self.recipe, name)))) for name in ("source", "target")
        }

    def scorer(self, model: Model, tokenizer: TextTokenizer, texts: Texts) -> Scorer:
        """Scorer of `texts` for models of this architecture."""
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
        """What `fuse` chooses by: bits per byte on the validation texts, and on the part that screens candidates."""
        most = self.recipe.fusion.screen_texts
        found = {"loss": lambda params: self.valid_scorer(params).bits_per_byte}
        if self.valid is not None and most is not None and most < len(self.valid):
            found["screen"] = lambda params: self._screen_scorer(params).bits_per_byte
        return found

    @functools.cached_property
    def _screen_scorer(self) -> Scorer:
        return self.scorer(self.target, self.target_tokenizer, self.valid.spread(self.recipe.fusion.screen_texts))

    def check(self) -> None:
        """Loads everything, so that whatever is wrong is said before anything is written."""
        if self.recipe.alpha is None and self.recipe.valid is None:
            raise InputError("alpha is chosen on validation texts: give --valid FILE, or fix it with --alpha X")
        solver_of(self.recipe.alignment)
        if not self.recipe.activations.keep:
            require_streamable(self.recipe.alignment)
        if self.recipe.fusion.transport == "regression" and not self.recipe.activations.keep:
            raise InputError("fusion.transport: regression needs the activations; set activations.keep: true")
        for name in ("layout", "texts", "valid", "test", "other_texts", "target", "source", "rows"):
            getattr(self, name)
        if self.recipe.controls and self.recipe.same_size_source is not None:
            load_tokenizer(load_model(self.recipe.place(self.recipe.same_size_source)).directory)
        if self.recipe.solves:
            require_shared(self.target_tokenizer, self.source_tokenizer, self.texts.texts, otherwise=WITHOUT)
        sites = sites_of(self.target, self.source, self.projections, self.recipe.alignment.structure)
        require_room(sites, len(self.rows[0]), self.recipe)
