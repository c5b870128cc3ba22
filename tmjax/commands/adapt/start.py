"""What the training of an arm begins from: the target or a merge, as trained and frozen arrays of a mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tmjax.align.alignment import Alignment
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.merge.aligned import Warn
from tmjax.commands.merge.run import Merge
from tmjax.models.spec import projections
from tmjax.train.modes import FrozenBase, Lora, Mode, Plain, residuals, shardings_of
from tmjax.transfer.apply import Coefficients, fuse_params, transport_model
from tmjax.transfer.coefficients.grid import fixed
from tmjax.transfer.controls import CONTROLS
from tmjax.typing import Array, Params

#: (stage, steps done, steps in all, what else is to be said) while a stage runs.
Show = Callable[[str, int, int, str], None]
#: Placebos of the modes in which a source takes part.
PLACEBOS = ("control:shuffled_rows", "control:random_source")


class Starts:
    """Makes what the arms of one adaptation begin from."""

    def __init__(self, inputs: AdaptInputs, show: Show, warn: Warn) -> None:
        self.inputs, self.show, self.warn = inputs, show, warn
        self._merged: Merge | None = None

    def merge(self) -> Merge:
        """The merge inside this run, for modes that need one which the target does not bring."""
        if self._merged is None:
            self._merged = Merge(
                self.inputs.merge_recipe(),
                progress=lambda stage, done, total: self.show(f"merge {stage}", done, total, ""),
                warn=self.warn,
            )
        return self._merged

    def _aligned(self, arm: str) -> tuple[Alignment, Coefficients, Params, Path | None]:
        """Alignment, coefficients and source parameters of an arm whose start or residual is transported.

        Also the checkpoint of the merge, unless transported weights with the coefficients are all there is to it.
        """
        inputs, options = self.inputs, self.inputs.recipe
        if arm not in PLACEBOS and inputs.run is not None:
            alignment, coefficients = inputs.alignment, inputs.coefficients
            whole = (inputs.run_recipe.solves or inputs.run_recipe.blends) and options.alpha is None
            solved = inputs.run / "merged" if whole else None
            if options.alpha is not None:
                coefficients = fixed(options.alpha, inputs.run_recipe.fusion, tuple(coefficients)).coefficients
            return alignment, coefficients, inputs.source.params, solved
        merge = self.merge()
        if arm in PLACEBOS:
            control = CONTROLS[arm]
            path = merge.control(control)
            facts = merge.run.manifest.controls[arm]
            alignment = merge.control_alignment(control)
            params = merge.random_source() if control.random_source else inputs.source.params
        else:
            path = merge.fuse()
            facts, alignment, params = merge.run.manifest.coefficients, merge.align(), inputs.source.params
        pairs = {r: (item.alpha, item.beta) for r, item in facts.by_role.items()}
        return alignment, pairs, params, path if merge.recipe.solves or merge.recipe.blends else None

    def of(self, arm: str, mode: str, start: str) -> tuple[Mode, dict[str, Array], dict[str, Any]]:
        """Mode, trained and frozen arrays (float32) before the first step; guidance comes on top."""
        inputs, recipe = self.inputs, self.inputs.recipe
        target, layout = inputs.target, inputs.layout
        rank = recipe.lora.rank if mode == "lora" else 0
        places = shardings_of(layout, target.rows, target.spec, rank)

        def put(path: str, value: Any) -> Array:
            copy = jnp.array(value, jnp.float32, copy=True)
            return jax.device_put(copy, places[path]) if path in places else copy

        params: Params = target.params
        held = {}
        if mode == "residual-frozen" or start == "merged":
            fusion = (inputs.run_recipe or self.merge().recipe).fusion
            alignment, pairs, source, solved = self._aligned(arm)
            moved = transport_model(alignment, target.rows, target.params, inputs.source.rows, source, fusion)
            if start == "merged" and solved is not None:
                params = inputs.load(solved).params
            elif start == "merged":
                params = fuse_params(target.rows, target.params, moved, pairs, bias_rule=fusion.bias)
            if mode == "residual-frozen":
                held = residuals(target.rows, moved, {role: alpha for role, (alpha, _) in pairs.items()})
        base = {path: put(path, value) for path, value in params.items()}
        if mode == "lora":
            rows, roles = projections(target.rows), recipe.lora.roles
            paths = tuple(row.path for role, row in rows.items() if role in (roles or rows))
            lora = Lora(paths, rank, recipe.lora.alpha)
            return lora, lora.start(base, jax.random.key(recipe.seed), places), base
        if mode != "residual-frozen":
            return Plain(), base, {}
        if start == "merged":
            base |= {path: put(path, base[path] - item.value()) for path, item in held.items()}
        if recipe.residual.variant == "frozen_delta":
            return Plain(), base, held
        deltas = {path: put(path, item.delta) for path, item in held.items()}
        return FrozenBase(), deltas, base | {f"residual.{p}": item._replace(delta=None) for p, item in held.items()}
