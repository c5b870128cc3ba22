"""Where the training of an arm begins: the target or a merge, as trained and frozen arrays of a mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tmjax.align.alignment import Alignment
from tmjax.commands.adapt.arms import Arm
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.merge.aligned import Warn
from tmjax.commands.merge.run import Merge
from tmjax.models.spec import projections
from tmjax.train.modes import FrozenBase, Lora, Mode, Plain, residuals, shardings_of
from tmjax.transfer.apply import Coefficients, fuse_params, transport_model
from tmjax.transfer.coefficients.grid import fixed
from tmjax.transfer.controls import CONTROLS
from tmjax.typing import Array, Params

#: Called with (stage, steps done, all steps, a note) while a stage runs.
Show = Callable[[str, int, int, str], None]


class _Transported(NamedTuple):
    """What an arm transports: alignment, source parameters, coefficients, and the merge's checkpoint.

    There is no checkpoint where transported weights with the coefficients are the whole merge.
    """

    alignment: Alignment
    source: Params
    coefficients: Coefficients
    checkpoint: Path | None


class Starts:
    """Makes the arrays at which the arms of one adaptation begin.

    Args:
        inputs: Inputs of the adaptation.
        show: Called while a merge inside the run goes on.
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
        """Returns alignment, coefficients and source of an arm whose start or residual is transported."""
        inputs, options = self.inputs, self.inputs.recipe
        if arm.merge_control is None and inputs.run is not None:
            coefficients = inputs.coefficients
            whole = (inputs.run_recipe.solves or inputs.run_recipe.blends) and options.alpha is None
            if options.alpha is not None:
                coefficients = fixed(options.alpha, inputs.run_recipe.fusion, tuple(coefficients)).coefficients
            checkpoint = inputs.run / "merged" if whole else None
            return _Transported(inputs.alignment, inputs.source.params, coefficients, checkpoint)
        merge = self.merge()
        if arm.merge_control is not None:
            control = CONTROLS[arm.merge_control]
            path = merge.control(control)
            facts = merge.run.manifest["controls"][arm.merge_control]
            alignment = merge.control_alignment(control)
            params = merge.random_source() if control.random_source else inputs.source.params
        else:
            path = merge.fuse()
            facts, alignment, params = merge.run.manifest["coefficients"], merge.align(), inputs.source.params
        pairs = {role: (item["alpha"], item["beta"]) for role, item in facts["by_role"].items()}
        return _Transported(alignment, params, pairs, path if merge.recipe.solves or merge.recipe.blends else None)

    def of(self, arm: Arm) -> tuple[Mode, dict[str, Array], dict[str, Any]]:
        """Returns mode, trained and frozen arrays (float32) before the first step; guidance comes on top."""
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
            fusion = (inputs.run_recipe or self.merge().recipe).fusion
            alignment, source, pairs, checkpoint = self._transported(arm)
            moved = transport_model(alignment, target.rows, target.params, inputs.source.rows, source, fusion)
            if arm.start == "merged" and checkpoint is not None:
                params = inputs.load(checkpoint).params
            elif arm.start == "merged":
                params = fuse_params(target.rows, target.params, moved, pairs, bias_rule=fusion.bias)
            if arm.mode == "residual-frozen":
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
