"""The stages up to the alignment, each with its input hash: activations (or their moments), plans."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import tmjax
from tmjax.activations import store as activation_store
from tmjax.activations.blocks import paired_blocks
from tmjax.activations.capture import CaptureOptions, capture
from tmjax.align import storage as alignment_store
from tmjax.align.alignment import Alignment, align, needed_sites
from tmjax.align.moments import Moments
from tmjax.align.streaming import align_moments, gather, load_moments, save_moments
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.notes import note_blank
from tmjax.files.lock import OutputLock
from tmjax.files.paths import refuse_overlap
from tmjax.models.decoder import init_params
from tmjax.recipes.merge import Placed, Recipe, dump_recipe
from tmjax.runs.directory import RunDirectory, digest, read_manifest
from tmjax.sharding import hosts
from tmjax.transfer.controls import Control, derangement

#: (stage, steps done, steps in all) while a stage runs.
#: Hears of a stage how much of how much is done; with a total of 0 that it begins (0 is done) or has ended (1).
Progress = Callable[[str, int, int], None]
Warn = Callable[[str], None]
_INPUTS = ("source", "target", "texts", "valid", "test")


def quiet(_stage: str, _done: int, _total: int) -> None:
    """No progress display."""


def refuse_nested(recipe: Placed) -> None:
    """Raises InputError if a local input is the output, lies inside it or holds it."""
    named: list[tuple[str, str | None]] = [(name, getattr(recipe, name, None)) for name in _INPUTS]
    named += [("other_texts", name) for name in recipe.other_texts]
    named += [("same_size_source", getattr(recipe, "same_size_source", None))]
    named += [("fusion.base", recipe.fusion.base)] if isinstance(recipe, Recipe) else []
    refuse_overlap(recipe.out, [(what, name and recipe.place(name)) for what, name in named])


def tell_notes(notes: Mapping[str, Sequence[str]], warn: Warn) -> None:
    """Warns of what a user should know of the checkpoints, by name."""
    for name, lines in notes.items():
        for line in lines:
            warn(f"{name}: {line}")


class AlignmentRun:
    """A run of a recipe up to the alignment; every stage resumes."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        amend: bool = False,
        progress: Progress = quiet,
        warn: Warn = lambda message: None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        # `also`: what makes the run another one beside its recipe and inputs.
        for line in recipe.moved():
            warn(line)
        recipe = recipe.placed()
        self.recipe, self.inputs = recipe, Inputs(recipe)
        self.progress, self.warn = progress, warn
        self._alignment: Alignment | None = None
        path = Path(recipe.out)
        hosts.together(lambda: refuse_nested(recipe))
        lock = hosts.together(lambda: OutputLock(path) if hosts.is_first() else None)
        try:
            self._begin(path, overwrite=overwrite, amend=amend, also=dict(also or {}))
        finally:
            if lock is not None:  # the run holds it too by now
                lock.release()

    def _begin(self, path: Path, *, overwrite: bool, amend: bool, also: Mapping[str, str]) -> None:
        """Creates or resumes the run directory, after everything that it needs was found to be good."""
        recipe = self.recipe
        hashes = hosts.together(lambda: self.inputs.hashes)
        hosts.require_same("inputs", hashes)
        # What may change without making another run of it: where things lie and are computed, whether a no-op passes.
        without = {
            "out",
            "allow_negligible",
            "mesh",
            "other_texts",
            "same_size_source",
            "self_source",
            "places",
            *_INPUTS,
        }
        told = recipe.model_dump(mode="json", exclude=without)
        key = {"recipe": digest(told)} | hashes | dict(also)
        previous = read_manifest(path)
        if hosts.agree(previous is None or previous.get("key") != key):
            hosts.together(self.inputs.check)
            tell_notes(self.inputs.notes, self.warn)
        read = self.inputs
        note_blank([read.all_texts, read.valid, read.test, *read.other_texts.values()], self.warn)
        layout = self.inputs.layout
        header = {
            "tmjax": tmjax.__version__,
            "seed": recipe.seed,
            "inputs": {
                name: {"path": recipe.fusion.base if name == "base" else getattr(recipe, name), "sha256": value}
                for name, value in hashes.items()
            },
            "notes": self.inputs.notes,
            "evaluation": {},
            "source_gain": None,
            "update": {},
            "alignment": {},
        }
        here = {
            "mesh": layout.sizes,
            "devices": layout.devices,
            "processes": hosts.count(),
            "platform": jax.devices()[0].platform,
        }

        def start() -> RunDirectory | None:
            if not hosts.is_first():
                return None
            if amend:
                return RunDirectory.amend(path, dump_recipe(recipe), header, key=key, here=here)
            return RunDirectory.start(path, dump_recipe(recipe), header, key=key, overwrite=overwrite, here=here)

        started = hosts.together(start)
        self.run = hosts.together(lambda: started or RunDirectory.follow(path, key, here))
        self.run.team = hosts
        self.run.show = self.progress

    def step(self, stage: str) -> Callable[[int, int], None]:
        """Shows how far a stage is."""
        return lambda done, total: self.progress(stage, done, total)

    # Input hashes of the stages, each holding those of what it reads.

    def _activation_key(self, model: str) -> object:
        hashes = {name: self.inputs.hashes[name] for name in ("texts", "source", "target")}
        told = self.recipe.activations.model_dump(), self.recipe.fusion.roles, self.recipe.dtype
        return [model, hashes, *told, self.recipe.alignment.structure]

    def _alignment_key(self) -> object:
        return [self._activation_key("source"), self.recipe.alignment.model_dump(mode="json")]

    def _fuse_key(self, arm: str) -> object:
        options = self.recipe.model_dump(mode="json", include={"fusion", "alpha", "evaluation", "export", "seed"})
        return [arm, self._alignment_key(), options, self.inputs.hashes.get("valid")]

    # Stages.

    @property
    def capture_options(self) -> CaptureOptions:
        """Sites that the alignment needs, and batches."""
        return CaptureOptions(
            sites=needed_sites(self.inputs.projections.values(), self.recipe.alignment.structure),
            batch_tokens=self.recipe.activations.batch_tokens,
            memory_mib=self.recipe.activations.memory_mib,
            dtype=self.inputs.dtype,
            layout=self.inputs.layout,
        )

    def activations(self, which: str) -> activation_store.Activations:
        """Captures the activations of `target`, `source` or `random_source`."""
        name = f"activations:{which}"

        def work(partial: Path) -> dict[Any, Any]:
            rows, (target_documents, source_documents) = self.inputs.rows
            model = self.inputs.target if which == "target" else self.inputs.source
            params = self.random_source() if which == "random_source" else model.params
            capture(
                model.spec,
                params,
                rows,
                target_documents if which == "target" else source_documents,
                partial,
                self.capture_options,
                progress=self.step(name),
            )
            return {("rows",): {"documents": len(self.inputs.texts), "rows": len(rows), "pooling": rows.pooling}}

        key = [self._activation_key(which), self.recipe.seed if which == "random_source" else None]
        return activation_store.read(self.run.stage(name, key, f"activations/{which}", work))

    def moments(self, which: str, control: Control | None = None) -> dict[str, Moments]:
        """Sums over the rows of `target` and `source` (or of a control's source), where activations are not kept."""
        name = f"moments:{which}"

        def work(partial: Path) -> dict[Any, Any]:
            rows, (target_documents, source_documents) = self.inputs.rows
            target, source = self.inputs.target, self.inputs.source
            params = self.random_source() if control and control.random_source else source.params
            blocks = paired_blocks(
                (target.spec, target.params, target_documents),
                (source.spec, params, source_documents),
                rows,
                self.capture_options,
                block_rows=self.recipe.activations.block_rows,
                progress=self.step(name),
            )
            shuffled = (
                (lambda count: derangement(count, self.recipe.seed)) if control and control.shuffle_rows else None
            )
            found = gather(
                blocks,
                self.inputs.projections.values(),
                order=shuffled,
                structure=self.recipe.alignment.structure,
            )
            if hosts.is_first():
                save_moments(found, partial)
            return {("rows",): {"documents": len(self.inputs.texts), "rows": len(rows), "pooling": rows.pooling}}

        key = [self._activation_key(which), self.recipe.seed if control else None]
        return load_moments(self.run.stage(name, key, f"moments/{which}.safetensors", work))

    def random_source(self) -> dict[str, jax.Array]:
        """Fresh random weights of the source's architecture."""
        source = self.inputs.source
        return init_params(source.spec, jax.random.key(self.recipe.seed), self.inputs.shardings(source))

    def align(self) -> Alignment:
        """Activations of both models, then all plans; what did not converge is said once."""
        if self._alignment is not None:
            return self._alignment
        find = self._aligned("source", None, "alignment")

        def work(partial: Path) -> dict[Any, Any]:
            found = find()
            if hosts.is_first():
                alignment_store.save(found, partial)
            models = {"target": self.inputs.target.spec, "source": self.inputs.source.spec}
            heads = {name: {"heads": spec.heads, "kv_heads": spec.kv_heads} for name, spec in models.items()}
            return {"alignment": found.certificates(), "layer_plans": found.layer_facts(), "attention": heads}

        path = self.run.stage("alignment", self._alignment_key(), "alignment", work)
        found = alignment_store.load(path)
        for site, held in found.certificates().items():
            if held["converged"] < held["problems"]:
                missing = held["problems"] - held["converged"]
                self.warn(
                    f"{missing} of {held['problems']} plans of {site} did not converge (marginal error up to "
                    f"{held['max_marginal_error']:.1e}); raise alignment.max_iterations or alignment.epsilon"
                )
        self._alignment = found
        return found

    def control_alignment(self, control: Control) -> Alignment:
        """The alignment of a control, which intervenes before it."""
        if not (control.random_source or control.shuffle_rows):
            return self.align()
        which = control.name.removeprefix("control:") if not self.recipe.activations.keep else "source"
        return self._aligned("random_source" if control.random_source else which, control, control.name)()

    def _aligned(self, which: str, control: Control | None, step: str) -> Callable[[], Alignment]:
        """What aligns the target with a source, its activations (or their moments) being there."""
        random = control is not None and control.random_source
        params = self.random_source() if random else self.inputs.source.params
        models = (self.inputs.target.spec, self.inputs.target.params), (self.inputs.source.spec, params)
        how = {"mesh": self.inputs.layout.mesh, "progress": self.step(step), "models": models}
        projections, options = self.inputs.projections, self.recipe.alignment
        if not self.recipe.activations.keep:
            held = self.moments(which, control)
            return lambda: align_moments(held, projections, options, **how)
        target, source = self.activations("target"), self.activations(which)
        shuffled = control is not None and control.shuffle_rows
        order = derangement(len(source.rows), self.recipe.seed) if shuffled else None
        return lambda: align(target, source, projections, options, source_rows=order, **how)
