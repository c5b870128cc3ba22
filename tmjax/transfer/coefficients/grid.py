"""Choosing alpha and beta on validation text: a grid per group of projections, one group after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tmjax.recipes.base import ALL_ROLES
from tmjax.recipes.merge import CoefficientOptions
from tmjax.transfer.contribution import Coefficients

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "all": {"all": ("q", "k", "v", "o", "gate", "up", "down", "embed", "norm")},
    "kind": {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "stream": ("embed", "norm")},
    "role": {role: (role,) for role in ("q", "k", "v", "o", "gate", "up", "down", "embed", "norm")},
}


@dataclass(frozen=True)
class Trial:
    """One setting that was tried and the loss it gave."""

    coefficients: dict[str, tuple[float, float]]
    loss: float


@dataclass(frozen=True)
class Fit:
    """The chosen coefficients by role (numbers, or arrays if learned) and everything that was tried."""

    coefficients: Coefficients
    loss: float | None = None
    trials: list[Trial] = field(default_factory=list)


def fixed(alpha: float, options: CoefficientOptions, roles: Sequence[str] = ALL_ROLES) -> Fit:
    """The same alpha for each of the `roles`; beta as the recipe says (`fit` counts as tied: fitting is off)."""
    beta = options.beta if isinstance(options.beta, float | int) else -alpha
    return Fit({role: (alpha, float(beta)) for role in roles})


def candidates(options: CoefficientOptions) -> list[tuple[float, float]]:
    """The (alpha, beta) pairs tried for one group, smallest alpha first."""
    alphas = sorted(options.alphas)
    if options.beta == "tied":
        return [(alpha, -alpha) for alpha in alphas]
    betas: Sequence[float] = options.betas if options.beta == "fit" else (float(options.beta),)
    return [(alpha, beta) for alpha in alphas for beta in sorted(betas, key=abs)]


def fit(
    options: CoefficientOptions,
    loss: Callable[[Coefficients], float],
    progress: Callable[[int, int], None],
    roles: Sequence[str] = ALL_ROLES,
    screen: Callable[[Coefficients], float] | None = None,
) -> Fit:
    """Coordinate search: for each group in turn the candidate with the smallest loss, the other groups held.

    Starts from the first candidate everywhere. Every arm of a comparison makes the same number of trials. With a
    `screen`, a cheaper loss, candidates are compared by that, and the best of a group is taken if its `loss` is smaller
    than without it.
    """
    grid = candidates(options)
    groups = [[role for role in group if role in roles] for group in GROUPS[options.groups].values()]
    groups.append([role for role in roles if role not in {name for group in groups for name in group}])
    groups = [group for group in groups if group]
    chosen = dict.fromkeys(roles, grid[0])
    trials: list[Trial] = []
    best = float("inf") if screen is None else loss(chosen)
    total = len(groups) * len(grid)
    for group in groups:
        results = []
        for pair in grid:
            setting = chosen | dict.fromkeys(group, pair)
            value = (screen or loss)(setting)
            results.append(value)
            trials.append(Trial(setting, value))
            progress(len(trials), total)
        better = chosen | dict.fromkeys(group, grid[results.index(min(results))])
        if screen is None:
            chosen, best = better, min(results)
        elif better != chosen and (value := loss(better)) < best:
            chosen, best = better, value
    return Fit(chosen, best, trials)
