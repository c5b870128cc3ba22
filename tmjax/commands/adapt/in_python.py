"""`tmjax adapt` as a function."""

import warnings
from pathlib import Path
from typing import Any

from tmjax.checkpoints.model import Model
from tmjax.commands.adapt.run import Adapt
from tmjax.recipes.adapt import build_adapt_recipe


def adapt(*, overwrite: bool = False, **recipe: Any) -> tuple[Model, dict[str, Any]]:
    """Adapts a target as `tmjax adapt` does.

    Stages that have finished in `out` are not run again.

    Args:
        overwrite: Whether another run in `out` is replaced.
        **recipe: The keys of the recipe: at least `target`, `texts` and `out`, mostly `source` (or a list `sources`),
            `valid` and `mode`; paths as on the command line.

    Returns:
        The adapted model and the run's manifest.

    Raises:
        InputError: Keys or inputs are wrong.
    """
    values = {name: _plain(value) for name, value in recipe.items()}
    run = Adapt(
        build_adapt_recipe(values),
        overwrite=overwrite,
        warn=lambda message: warnings.warn(message, stacklevel=2),
    )
    try:
        manifest = run.all()
    finally:
        run.run.close()
    return run.inputs.load(run.run.path / "merged"), manifest


def _plain(value: Any) -> Any:
    """Returns paths as text, those of lists too."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
