"""`tmjax doctor`."""

from tmjax.cli.options import Json, Mesh, PairFlags, pair_of
from tmjax.cli.terminal import show_result
from tmjax.errors import InputError, summarise


def doctor(flags: PairFlags, mesh: Mesh = None, as_json: Json = False) -> None:
    """Before any weight is read: can these two be merged, what is mapped, what memory and time will it take."""
    from tmjax.commands.doctor.examine import examine
    from tmjax.commands.doctor.summary import doctor_summary

    settings, has_texts = pair_of(flags, mesh)
    report = examine(settings, texts=has_texts)
    show_result(report, lambda console: console.print(doctor_summary(report), highlight=False), as_json=as_json)
    if not report["mergeable"]:
        raise InputError(f"{settings.source} cannot be merged into {settings.target}: {summarise(report['problems'])}")
