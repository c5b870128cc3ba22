"""`tmjax recipe check`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tmjax.cli.options import Json
from tmjax.cli.terminal import show_result


def check(
    file: Annotated[Path, typer.Argument(help="Recipe (YAML) of a merge, an adaptation or several steps.")],
    kind: Annotated[
        Literal["merge", "adapt", "run"] | None,
        typer.Option("--for", help="Command that the recipe is for; by its keys unless given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the recipe that a file stands for, includes and defaults resolved, and the stages of its run."""
    from tmjax.commands.recipe_check import check_recipe

    checked = check_recipe(file, kind)

    def show(console: Any) -> None:
        from tmjax.commands.recipe_check import as_yaml

        # Comments are marked as such: the output is a recipe again.
        console.print(as_yaml(checked), highlight=False, markup=False, soft_wrap=True, end="")

    show_result(checked, show, as_json=as_json)
