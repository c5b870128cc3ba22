"""Stages that measure a source, and the views of it for the arms of a merge."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import jax

from tmjax.activations import store as activation_store
from tmjax.activations.blocks import paired_blocks
from tmjax.activations.capture import CaptureOptions, capture
from tmjax.activations.store import Activations
from tmjax.align import storage as alignment_store
from tmjax.align.alignment import Alignment, align, needed_sites, solver_hash
from tmjax.align.moments import Moments
from tmjax.align.streaming import align_moments, gather, load_moments, save_moments
from tmjax.commands.callbacks import Warn
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.merge.teacher_data import MergeTeacher
from tmjax.models.decoder import init_params
from tmjax.models.spec import DecoderSpec
from tmjax.recipes.merge import Recipe
from tmjax.runs.directory import RunDirectory
from tmjax.runs.manifest import AlignmentRecord
from tmjax.runs.run_facts import AlignmentFacts, HeadCounts, LayerPlanFacts, PlanFacts, RowFacts
from tmjax.sharding import hosts
from tmjax.teacher.span_features import last_tokens
from tmjax.text.rows import TokenisedDocument
from tmjax.text.token_map import TokenMap, read_token_map
from tmjax.transfer.source_view import PairedActivations, PairedFeatures, RowOrder, SourceView
from tmjax.typing import Params

#: Name of the true source in stages and folders.
SOURCE = "source"


class Staged(Protocol):
    """Members of a session that the stages use."""

    recipe: Recipe
    inputs: Inputs
    run: RunDirectory
    warn: Warn

    def step(self, stage: str) -> Callable[[int, int], None]:
        """Returns a callback that shows the progress of a stage."""
        ...

    def stage(self, name: str, key: object, output: str, work: Callable[[Path], AlignmentRecord | None]) -> Path:
        """Runs a stage unless it is finished."""
        ...


@dataclass(frozen=True)
class Origin:
    """The model that a source's data is made with.

    Attributes:
        model: Name of the model in stages and folders: `source`, or the name of the control that made it.
        params: Makes its parameters.
        seed: Seed of fresh weights; None for the source's own.
        order: Order of the source's rows; None leaves it.
        rows: Name of that order in stages and folders.
    """

    model: str
    params: Callable[[], Params]
    seed: int | None = None
    order: RowOrder | None = None
    rows: str | None = None

    @property
    def is_source(self) -> bool:
        """Whether this is the true source with its own rows."""
        return self.model == SOURCE and self.order is None


class SourceStages:
    """Stages of activations, alignment and teacher data, and views of the source made from them."""

    def __init__(self, session: Staged) -> None:
        self.session, self.recipe, self.inputs = session, session.recipe, session.inputs
        self.teacher = MergeTeacher(session, SOURCE)
        self._alignment: Alignment | None = None

    # Input hashes of the stages. Each includes those of the stages that it reads.

    def activation_key(self, model: str) -> object:
        """Returns the key of activations: everything that they depend on."""
        hashes = {name: self.inputs.hashes[name] for name in ("texts", "source", "target")}
        settings = self.recipe.activations.model_dump(), sorted(self.inputs.projections), self.recipe.dtype
        seed = self.inputs.row_seed
        # Only where it chose rows, so that it changes no other key.
        return [model, hashes, *settings, self.recipe.alignment.structure, *([] if seed is None else [seed])]

    def alignment_key(self) -> object:
        """Returns the key of the alignment: everything that it depends on."""
        code = solver_hash(self.recipe.located_alignment())
        key = [self.activation_key(SOURCE), self.recipe.alignment.model_dump(mode="json")]
        return key if code is None else [*key, code]

    # Views.

    def view(self) -> SourceView:
        """Returns the true source as operators see it."""
        return self._view(Origin(SOURCE, lambda: self.inputs.source.params))

    def _view(self, origin: Origin) -> SourceView:
        source = self.inputs.source
        model = source if origin.model == SOURCE else replace(source, params=origin.params())
        origin = replace(origin, params=lambda: model.params)
        return SourceView(
            model,
            alignment=functools.cache(lambda: self.align() if origin.is_source else self._align_control(origin)),
            activations=functools.cache(lambda: self.paired(origin)),
            features=lambda sites: self.features(origin, tuple(sites)),
            token_map=functools.cache(self._token_map),
            teacher=functools.cache(lambda: self.teacher.data(origin.model, model, origin.seed)),
            reordered=lambda order, name: self._view(replace(origin, order=order, rows=name)),
            reinitialised=lambda seed, name: self._view(
                Origin(name, lambda: self._fresh_weights(seed), seed, origin.order, origin.rows)
            ),
        )

    def _fresh_weights(self, seed: int) -> dict[str, jax.Array]:
        """Draws random weights of the source's architecture."""
        source = self.inputs.source
        return init_params(source.spec, jax.random.key(seed), self.inputs.shardings(source))

    def _token_map(self) -> TokenMap:
        inputs = self.inputs
        vocabularies = inputs.target.spec.vocab, inputs.source.spec.vocab
        return read_token_map(inputs.target_tokenizer, inputs.source_tokenizer, inputs.texts.texts, vocabularies)

    @property
    def _capture_options(self) -> CaptureOptions:
        """Sites that the alignment needs, batches and devices."""
        inputs, activations = self.inputs, self.recipe.activations
        return CaptureOptions(
            sites=needed_sites(inputs.projections.values(), self.recipe.alignment.structure),
            batch_tokens=activations.batch_tokens,
            memory_mib=activations.memory_mib,
            dtype=inputs.dtype,
            layout=inputs.layout,
        )

    # Stages.

    def activations(self, model: str, params: Params, seed: int | None = None) -> Activations:
        """Captures the activations of `target`, or of a model of the source's architecture."""
        inputs, name = self.inputs, f"activations:{model}"

        def work(partial: Path) -> AlignmentRecord:
            rows, (target_documents, source_documents) = inputs.rows
            capture(
                (inputs.target if model == "target" else inputs.source).spec,
                params,
                rows,
                target_documents if model == "target" else source_documents,
                partial,
                self._capture_options,
                progress=self.session.step(name),
            )
            return self._row_record

        key = [self.activation_key(model), seed]
        return activation_store.read(self.session.stage(name, key, f"activations/{model}", work))

    def paired(self, origin: Origin) -> PairedActivations:
        """Returns activations of the target and of a source at paired rows."""
        target = self.activations("target", self.inputs.target.params)
        source = self.activations(origin.model, origin.params(), origin.seed)
        return PairedActivations(
            target, source if origin.order is None else source.reordered(origin.order(len(source.rows)))
        )

    def features(self, origin: Origin, sites: tuple[str, ...]) -> PairedFeatures:
        """Captures some sites of the target and of a source at the last token of every row."""
        inputs = self.inputs
        rows, (target_documents, source_documents) = inputs.rows

        def captured(name: str, spec: DecoderSpec, params: Params, documents: list[TokenisedDocument]) -> Activations:
            stage = f"features:{name}"

            def work(partial: Path) -> None:
                capture(
                    spec,
                    params,
                    rows,
                    last_tokens(documents),
                    partial,
                    CaptureOptions(sites, dtype=inputs.dtype, layout=inputs.layout),
                    progress=self.session.step(stage),
                )

            key = [self.activation_key(name), sites, origin.seed if name == origin.model else None]
            return activation_store.read(self.session.stage(stage, key, f"features/{name}", work))

        target = captured("target", inputs.target.spec, inputs.target.params, target_documents)
        source = captured(origin.model, inputs.source.spec, origin.params(), source_documents)
        if origin.order is not None:
            source = source.reordered(origin.order(len(source.rows)))
        return PairedFeatures(target, source, target_documents)

    def _row_record(self, facts: AlignmentFacts) -> None:
        (rows, _), (shared, _) = self.inputs.rows, self.inputs.shared_rows
        facts.rows = RowFacts(
            documents=len(self.inputs.texts),
            rows=len(rows),
            pooling=rows.pooling,
            shared=len(shared) if len(rows) < len(shared) else None,
        )

    def moments(self, origin: Origin) -> Mapping[str, Moments]:
        """Sums moments over the rows of target and source, for runs that keep no activations."""
        which = origin.rows or origin.model
        name = f"moments:{which}"

        def work(partial: Path) -> AlignmentRecord:
            inputs = self.inputs
            rows, (target_documents, source_documents) = inputs.rows
            blocks = paired_blocks(
                (inputs.target.spec, inputs.target.params, target_documents),
                (inputs.source.spec, origin.params(), source_documents),
                rows,
                self._capture_options,
                block_rows=self.recipe.activations.block_rows,
                progress=self.session.step(name),
            )
            structure = self.recipe.alignment.structure
            sums = gather(blocks, inputs.projections.values(), order=origin.order, structure=structure)
            if hosts.is_first():
                save_moments(sums, partial)
            return self._row_record

        key = [self.activation_key(which), None if origin.is_source else self.recipe.seed]
        return load_moments(self.session.stage(name, key, f"moments/{which}.safetensors", work))

    def align(self) -> Alignment:
        """Aligns target and source as a stage; warns once of plans that did not converge."""
        if self._alignment is not None:
            return self._alignment
        solve = self._aligner(Origin(SOURCE, lambda: self.inputs.source.params))

        def work(partial: Path) -> AlignmentRecord:
            solved = solve()
            if hosts.is_first():
                alignment_store.save(solved, partial)
            specs = {"target": self.inputs.target.spec, "source": self.inputs.source.spec}

            def record(facts: AlignmentFacts) -> None:
                facts.alignment = {site: PlanFacts(**item) for site, item in solved.certificates().items()}
                facts.layer_plans = {role: LayerPlanFacts(**item) for role, item in solved.layer_facts().items()}
                facts.attention = {
                    name: HeadCounts(heads=spec.heads, kv_heads=spec.kv_heads) for name, spec in specs.items()
                }

            return record

        path = self.session.stage("alignment", self.alignment_key(), "alignment", work)
        alignment = alignment_store.load(path)
        for site, item in alignment.certificates().items():
            if item["converged"] < item["problems"]:
                missing = item["problems"] - item["converged"]
                self.session.warn(
                    f"{missing} of {item['problems']} plans of {site} did not converge (marginal error up to "
                    f"{item['max_marginal_error']:.1e}); raise alignment.max_iterations or alignment.epsilon"
                )
        self._alignment = alignment
        return alignment

    def _align_control(self, origin: Origin) -> Alignment:
        """Aligns the target with the source of a control, which is no stage of the run."""
        alignment = self._aligner(origin)()
        self.session.step(_alignment_step(origin))(1, 0)
        return alignment

    def _aligner(self, origin: Origin) -> Callable[[], Alignment]:
        """Makes the activations (or moments) of a source; returns a function that aligns the target with it."""
        target, source = self.inputs.target, self.inputs.source
        settings = {
            "mesh": self.inputs.layout.mesh,
            "progress": self.session.step(_alignment_step(origin)),
            "models": ((target.spec, target.params), (source.spec, origin.params())),
        }
        projections, options = self.inputs.projections, self.recipe.located_alignment()
        if not self.recipe.activations.keep:
            sums = self.moments(origin)
            return lambda: align_moments(sums, projections, options, **settings)
        pair = self.paired(origin)
        return lambda: align(*pair, projections, options, **settings)


def _alignment_step(origin: Origin) -> str:
    """Name under which the progress of an alignment is shown."""
    return "alignment" if origin.is_source else f"alignment:{origin.rows or origin.model}"
