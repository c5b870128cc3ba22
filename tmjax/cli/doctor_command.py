"""`tmjax doctor`."""

from tmjax.cli.options import Json, Mesh, RecipeFile, Source, Target, TextFile, pair_of
from tmjax.cli.terminal import open_console, print_json
from tmjax.errors import InputError, summarise


def doctor(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Target = None,
    texts: TextFile = None,
    mesh: Mesh = None,
    as_json: Json = False,
) -> None:
    """Before any weight is read: can these two be merged, what is mapped, what memory and time will it take."""
    from tmjax.commands.doctor.examine import examine
    from tmjax.commands.doctor.summary import doctor_summary

    settings, has_texts = pair_of(recipe, locals())
    report = examine(settings, texts=has_texts)
    if as_json:
        print_json(report)
    else:
        open_console().print(doctor_summary(report), highlight=False)
    if not report["mergeable"]:
        raise InputError(f"{settings.source} cannot be merged into {settings.target}: {summarise(report['problems'])}")
