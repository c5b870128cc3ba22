"""Initial arrays of the training of an arm: those of the target or of a merge, trained and frozen ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tmjax.commands.adapt.arms import Arm
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.callbacks import Warn
from tmjax.commands.merge.run import Merge
from tmjax.models.spec import projections
from tmjax.train.modes import FrozenBase, Lora, Mode, Plain, residuals, shardings_of
from tmjax.transfer.chain import chain_of
from tmjax.transfer.coefficients.grid_search import fixed
from tmjax.transfer.contribution import Coefficients, Context, Contribution
from tmjax.transfer.controls import CONTROLS
from tmjax.transfer.operator import Chain
from tmjax.transfer.source_view import SourceView
from tmjax.typing import Array, Params

#: Called with (stage, steps done, all steps, a note) while a stage runs.
Show = Callable[[str, int, int, str], None]


class _Transported(NamedTuple):
    """Transported contributions of an arm, their coefficients, and the merge's checkpoint.

    The checkpoint is None where contributions with these coefficients are the whole merge.
    """

    contributions: list[Contribution]
    coefficients: Coefficients
    checkpoint: Path | None


class Starts:
    """Makes the initial arrays of the arms of one adaptation.

    Args:
        inputs: Inputs of the adaptation.
        show: Called while a merge inside the run is computed.
        warn: Called with a line that the user should read.
    """

    def __init__(self, inputs: AdaptInputs, show: Show, warn: Warn) -> None:
        self.inputs, self.show, self.warn = inputs, show, warn
        self._merged: Merge | None = None

    def merge(self) -> Merge:
        """Returns the merge inside this run, for modes that need one where the target is not a run."""
        if self._merged is None:
            self._merged = Merge(
                self.inputs.merge_recipe(),
                progress=lambda stage, done, total: self.show(f"merge {stage}", done, total, ""),
                warn=self.warn,
            )
        return self._merged

    def _transported(self, arm: Arm) -> _Transported:
        """Returns contributions and coefficients for an arm that starts from a merge or trains a residual."""
        inputs, alpha = self.inputs, self.inputs.recipe.alpha
        if arm.merge_control is None and inputs.run is not None:
            recipe, coefficients = inputs.run_recipe, inputs.coefficients
            if alpha is not None:
                coefficients = fixed(alpha, recipe.coefficients, tuple(coefficients)).coefficients
            chain = chain_of(recipe.model_copy(update={"alpha": alpha if recipe.alpha is None else recipe.alpha}))
            contributions = self._contributions(chain, inputs.merged_source())
            whole = all(step.contributes for step in chain)
            return _Transported(contributions, coefficients, None if whole else inputs.run / "merged")
        merge = self.merge()
        control = None if arm.merge_control is None else CONTROLS[arm.merge_control]
        path = merge.fuse() if control is None else merge.control(control)
        manifest = merge.run.manifest
        facts = manifest.coefficients if control is None else manifest.controls[control.name]
        pairs = {role: (item.alpha, item.beta) for role, item in facts.by_role.items()}
        contributions = self._contributions(merge.inputs.chain, merge.view(control))
        whole = all(step.contributes for step in merge.inputs.chain)
        return _Transported(contributions, pairs, None if whole else path)

    def _contributions(self, chain: Chain, source: SourceView) -> list[Contribution]:
        """Returns the contributions of a merge's operators."""
        target = self.inputs.target
        context = Context(target=target, load_model=self.inputs.load)
        return [
            step.operator.contribute(target.params, source, step.options, context) for step in chain if step.contributes
        ]

    def of(self, arm: Arm) -> tuple[Mode, dict[str, Array], dict[str, Any]]:
        """Returns mode, trained and frozen arrays (float32) before the first step, without those of guidance."""
        inputs, recipe = self.inputs, self.inputs.recipe
        target, layout = inputs.target, inputs.layout
        rank = recipe.lora.rank if arm.mode == "lora" else 0
        places = shardings_of(layout, target.rows, target.spec, rank)

        def put(path: str, value: Any) -> Array:
            copy = jnp.array(value, jnp.float32, copy=True)
            return jax.device_put(copy, places[path]) if path in places else copy

        params: Params = target.params
        frozen = {}
        if arm.mode == "residual-frozen" or arm.start == "merged":
            contributions, pairs, checkpoint = self._transported(arm)
            if arm.start == "merged" and checkpoint is not None:
                params = inputs.load(checkpoint).params
            elif arm.start == "merged":
                for each in contributions:
                    params = each.rule(params, each.items, pairs)
            if arm.mode == "residual-frozen":
                moved = {role: item for each in contributions for role, item in each.items.items() if each.projections}
                frozen = residuals(target.rows, moved, {role: alpha for role, (alpha, _) in pairs.items()})
        base = {path: put(path, value) for path, value in params.items()}
        if arm.mode == "lora":
            rows, roles = projections(target.rows), recipe.lora.roles
            paths = tuple(row.path for role, row in rows.items() if role in (roles or rows))
            lora = Lora(paths, rank, recipe.lora.alpha)
            return lora, lora.start(base, jax.random.key(recipe.seed), places), base
        if arm.mode != "residual-frozen":
            return Plain(), base, {}
        if arm.start == "merged":
            base |= {path: put(path, base[path] - item.value()) for path, item in frozen.items()}
        if recipe.residual.variant == "frozen_delta":
            return Plain(), base, frozen
        deltas = {path: put(path, item.delta) for path, item in frozen.items()}
        return FrozenBase(), deltas, base | {f"residual.{p}": item._replace(delta=None) for p, item in frozen.items()}
