"""Choosing alpha and beta on validation text: a grid per group of projections, one group after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tmjax.fuse.apply import Coefficients
from tmjax.recipe import ALL_ROLES, FusionOptions

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


def fixed(alpha: float, options: FusionOptions, roles: Sequence[str] = ALL_ROLES) -> Fit:
    """The same alpha for each of the `roles`; beta as the recipe says (`fit` counts as tied: fitting is off)."""
    beta = options.beta if isinstance(options.beta, float | int) else -alpha
    return Fit({role: (alpha, float(beta)) for role in roles})


def candidates(options: FusionOptions) -> list[tuple[float, float]]:
    """The (alpha, beta) pairs tried for one group, smallest alpha first."""
    alphas = sorted(options.alphas)
    if options.beta == "tied":
        return [(alpha, -alpha) for alpha in alphas]
    betas: Sequence[float] = options.betas if options.beta == "fit" else (float(options.beta),)
    return [(alpha, beta) for alpha in alphas for beta in sorted(betas, key=abs)]


def fit(
    options: FusionOptions,
    loss: Callable[[Coefficients], float],
    progress: Callable[[int, int], None],
    roles: Sequence[str] = ALL_ROLES,
) -> Fit:
    """Coordinate search: for each group in turn the candidate with the smallest loss, the other groups held.

    Starts from the first candidate everywhere. Every arm of a comparison makes the same number of trials.
    """
    grid = candidates(options)
    groups = [[role for role in group if role in roles] for group in GROUPS[options.groups].values()]
    groups = [group for group in groups if group]
    chosen = dict.fromkeys(roles, grid[0])
    trials: list[Trial] = []
    best = float("inf")
    total = len(groups) * len(grid)
    for group in groups:
        results = []
        for pair in grid:
            setting = chosen | dict.fromkeys(group, pair)
            value = loss(setting)
            results.append(value)
            trials.append(Trial(setting, value))
            progress(len(trials), total)
        best = min(results)
        chosen |= {role: grid[results.index(best)] for role in group}
    return Fit(chosen, best, trials)
