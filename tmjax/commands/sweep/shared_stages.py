"""Stages of a sweep that settings share: activations, alignment and contributions of one recipe."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from tmjax.commands.callbacks import Progress, Warn
from tmjax.commands.merge.context import merge_context
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.merge.session import Session
from tmjax.commands.merge.source_stages import SourceStages
from tmjax.errors import InputError
from tmjax.recipes.merge import CoefficientOptions, Recipe
from tmjax.runs.directory import RunDirectory
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import AlignmentRecord, Manifest, Record
from tmjax.transfer.contribution import Contribution
from tmjax.transfer.operator import Chain, code_hashes, operators_of
from tmjax.transfer.projections import with_masks


@dataclasses.dataclass(frozen=True)
class SharedSession:
    """The session of one variant. Its stages have a name and a folder per input hash, so that variants share them."""

    recipe: Recipe
    inputs: Inputs
    run: RunDirectory
    progress: Progress
    warn: Warn

    def step(self, stage: str) -> Callable[[int, int], None]:
        """Returns a callback that shows the progress of a stage."""
        return lambda done, total: self.progress(stage, done, total)

    def stage(self, name: str, key: object, output: str, work: Callable[[Path], AlignmentRecord | None]) -> Path:
        """Runs a stage unless it is finished for this input hash."""
        label = digest(key)[:8]

        def labelled(partial: Path) -> Record:
            record = work(partial)

            def shared(manifest: Manifest) -> None:
                if record is not None:
                    record(manifest.shared_facts(label))

            return shared

        return self.run.stage(f"{name}:{label}", key, f"shared/{label}/{output}", labelled)


def contributing(recipe: Recipe) -> Chain:
    """Returns the operators that a sweep can fuse by given coefficients; those that choose on text are left out.

    Raises:
        InputError: Another operator is in the list, none is left, or coefficients are to be learned.
    """
    if recipe.coefficients.fit != CoefficientOptions().fit:
        raise InputError("a sweep fuses contributions by given coefficients: leave coefficients.fit out")
    steps = [step for step in operators_of(recipe) if not step.operator.chooses]
    others = [step.operator.name for step in steps if not step.contributes]
    if others:
        raise InputError(f"a sweep fuses contributions by given coefficients: leave the operator {others[0]} out")
    if not steps:
        raise InputError(
            "a sweep fuses contributions by given coefficients: add an operator that has some, as transport"
        )
    return tuple(steps)


class Variant:
    """Alignment and contributions of one recipe of a sweep, inside the sweep's run directory."""

    def __init__(self, recipe: Recipe, session: Session) -> None:
        inputs = Inputs(recipe, like=session.inputs)
        self.session = SharedSession(recipe, inputs, session.run, session.progress, session.warn)
        self.recipe, self.inputs, self.source = recipe, inputs, SourceStages(self.session)

    def key(self) -> list[object]:
        """Returns the key of the contributions: everything that they depend on. Masks are applied afterwards."""
        options = [
            [step.operator.name, {**step.options.model_dump(mode="json"), "mask_top_k": None}]
            for step in contributing(self.recipe)
        ]
        code = code_hashes(contributing(self.recipe))
        return [self.source.alignment_key(), options, *([code] if code else [])]

    def contributions(self) -> list[Contribution]:
        """Makes the contributions, without masks."""
        view, context = self.source.view(), merge_context(self.session, "transport")
        results = []
        for step in contributing(self.recipe):
            options = step.options
            if "mask_top_k" in type(options).model_fields:
                options = options.model_copy(update={"mask_top_k": None})
            results.append(step.operator.contribute(self.inputs.target.params, view, options, context))
        return results

    def masked(self, contributions: Sequence[Contribution]) -> list[Contribution]:
        """Applies the masks of this recipe."""
        limits = [getattr(step.options, "mask_top_k", None) for step in contributing(self.recipe)]
        return [
            each if limit is None else with_masks(each, self.source.align(), limit)
            for each, limit in zip(contributions, limits, strict=True)
        ]
