"""Choosing alpha and beta on validation text: a grid per group of projections, one group after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tmjax.fuse.apply import Coefficients
from tmjax.recipe import FusionOptions

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "all": {"all": ("q", "k", "v", "o", "gate", "up", "down")},
    "kind": {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")},
    "role": {role: (role,) for role in ("q", "k", "v", "o", "gate", "up", "down")},
}


@dataclass(frozen=True)
class Trial:
    """One setting that was tried and the loss it gave."""

    coefficients: dict[str, tuple[float, float]]
    loss: float


@dataclass(frozen=True)
class Fit:
    """The chosen coefficients by role and everything that was tried."""

    coefficients: dict[str, tuple[float, float]]
    loss: float | None = None
    trials: list[Trial] = field(default_factory=list)


def fixed(alpha: float, options: FusionOptions) -> Fit:
    """The same alpha for every role; beta as the recipe says (`fit` counts as tied: fitting is off)."""
    beta = options.beta if isinstance(options.beta, float | int) else -alpha
    return Fit({role: (alpha, float(beta)) for role in options.roles})


def candidates(options: FusionOptions) -> list[tuple[float, float]]:
    """The (alpha, beta) pairs tried for one group, smallest alpha first."""
    alphas = sorted(options.alphas)
    if options.beta == "tied":
        return [(alpha, -alpha) for alpha in alphas]
    betas: Sequence[float] = options.betas if options.beta == "fit" else (float(options.beta),)
    return [(alpha, beta) for alpha in alphas for beta in sorted(betas, key=abs)]


def fit(options: FusionOptions, loss: Callable[[Coefficients], float], progress: Callable[[int, int], None]) -> Fit:
    """Coordinate search: for each group in turn the candidate with the smallest loss, the other groups held.

    Starts from the first candidate everywhere. Every arm of a comparison makes the same number of trials.
    """
    grid = candidates(options)
    groups = {name: [role for role in roles if role in options.roles] for name, roles in GROUPS[options.groups].items()}
    groups = {name: roles for name, roles in groups.items() if roles}
    chosen = dict.fromkeys(options.roles, grid[0])
    trials: list[Trial] = []
    best = float("inf")
    total = len(groups) * len(grid)
    for roles in groups.values():
        results = []
        for pair in grid:
            setting = chosen | dict.fromkeys(roles, pair)
            value = loss(setting)
            results.append(value)
            trials.append(Trial(setting, value))
            progress(len(trials), total)
        best = min(results)
        chosen |= {role: grid[results.index(best)] for role in roles}
    return Fit(chosen, best, trials)
