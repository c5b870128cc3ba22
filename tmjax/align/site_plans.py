"""Neuron plans of a site in the form that is stored: couplings are rebuilt when asked for."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.ot import (
    EdgePlan,
    EntropicPlan,
    FeatureCost,
    HeadMap,
    LinearMap,
    LowRankPlan,
    MatchPlan,
    Plan,
    SignedPlan,
    SparsePlan,
)
from tmjax.typing import Array, ArrayLike, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class FeaturePlan:
    """Entropic plans of pairs of layers whose cost is rebuilt when asked for.

    Potentials f [P, n], g [P, k], epsilon [P]; the pairs' layers [P]; standardised activations zx [L, N, n] and
    zy [M, N, k].
    """

    form: ClassVar[type[EntropicPlan]] = EntropicPlan

    f: ArrayLike
    g: ArrayLike
    epsilon: ArrayLike
    layer: ArrayLike
    source_layer: ArrayLike
    zx: ArrayLike
    zy: ArrayLike

    def at(self, position: Array | int) -> EntropicPlan:
        """The plan at a position."""
        f, g, epsilon, layer, source = (
            jnp.asarray(x)[position] for x in (self.f, self.g, self.epsilon, self.layer, self.source_layer)
        )
        return self.form(f, g, epsilon, FeatureCost(jnp.asarray(self.zx)[layer], jnp.asarray(self.zy)[source]))

    def keep(self, chosen: np.ndarray) -> "FeaturePlan":
        """The plans at these positions."""
        pair_arrays = {
            name: np.asarray(getattr(self, name))[chosen] for name in ("f", "g", "epsilon", "layer", "source_layer")
        }
        return replace(self, **pair_arrays)


@pytree_dataclass
@dataclass(frozen=True)
class SignedFeaturePlan(FeaturePlan):
    """The same of signed plans: the features give the costs and the signs."""

    form: ClassVar[type[EntropicPlan]] = SignedPlan


#: The stored form of plans whose costs are rebuilt.
REBUILT: dict[type[EntropicPlan], type[FeaturePlan]] = {cls.form: cls for cls in (FeaturePlan, SignedFeaturePlan)}
_NAMES = {
    FeaturePlan: "potentials, features",
    LowRankPlan: "factors",
    MatchPlan: "matches",
    EdgePlan: "matches",
    SparsePlan: "sparse",
    LinearMap: "maps",
    HeadMap: "head maps",
}


@pytree_dataclass
@dataclass(frozen=True)
class SitePlans:
    """Plans of a site for pairs of layers, in the smallest form from which `fuse` can rebuild the couplings.

    `solutions`: P plans (pairs may share one); entropic plans are stored without their costs where that is smaller
    (`FeaturePlan`), else dense. `index` [L, M] is a pair's position in them, -1 for a pair without a plan.
    `layer_cost` [L, M] = <cost, Q>, an estimate where `solved` is False (see `pairs`). Certificates [P]: iterations,
    converged, marginal error (L1, larger side), whether the solver fell back to a slower form. `weight_target` [P, n]
    and `weight_source` [P, k] turn rows of Q and Q^T into averages: 1 / their mass, times the least-squares gain if
    the options ask for it; None: n and k.
    """

    solutions: Plan | FeaturePlan
    index: ArrayLike
    layer_cost: ArrayLike
    solved: ArrayLike
    iterations: ArrayLike
    converged: ArrayLike
    marginal_error: ArrayLike
    fallback: ArrayLike
    weight_target: ArrayLike | None = None
    weight_source: ArrayLike | None = None

    @property
    def real_units(self) -> bool:
        """Whether the plans map real units, scales and all, where others map standardised ones."""
        return isinstance(self.solutions, HeadMap)

    @property
    def stored(self) -> str:
        """The stored form: potentials with features, or the plan's own form."""
        return next((name for form, name in _NAMES.items() if isinstance(self.solutions, form)), "dense")

    def pair(self, layer: Array | int, source_layer: Array | int) -> tuple[Plan, Array | None, Array | None]:
        """The plan of a pair of layers and its weights; indices may be traced, the pair must have a plan."""
        position = jnp.asarray(self.index)[layer, source_layer]
        if isinstance(self.solutions, FeaturePlan):
            plan = self.solutions.at(position)
        else:
            plan = jax.tree.map(lambda x: jnp.asarray(x)[position], self.solutions)
        weights = (None if w is None else jnp.asarray(w)[position] for w in (self.weight_target, self.weight_source))
        return plan, *weights

    def plan(self, layer: Array | int, source_layer: Array | int) -> Array:
        """The coupling Q [n, k] of one pair of layers."""
        return self.pair(layer, source_layer)[0].matrix()

    def keep(self, pair_mask_lm: np.ndarray) -> "SitePlans":
        """The plans of the pairs in `pair_mask_lm` (bool [L, M]) alone; `layer_cost` stays whole."""
        index = np.asarray(self.index)
        kept = pair_mask_lm & (index >= 0)
        if kept.sum() == np.sum(index >= 0):
            return self
        chosen, position = np.unique(index[kept], return_inverse=True)  # pairs may share a plan
        fresh = np.full_like(index, -1)
        fresh[kept] = position
        fields = ("iterations", "converged", "marginal_error", "fallback", "weight_target", "weight_source")
        solutions = self.solutions
        solutions = (
            solutions.keep(chosen)
            if isinstance(solutions, FeaturePlan)
            else jax.tree.map(lambda x: x[chosen], solutions)
        )
        some = {name: None if getattr(self, name) is None else getattr(self, name)[chosen] for name in fields}
        return replace(self, solutions=solutions, index=fresh, **some)
