"""Errors that a user can act on: one line that says what, where and what to do."""


class TmjaxError(Exception):
    """Base of every error shown to the user without a traceback; `exit_code` is the process's exit status."""

    exit_code = 2


class InputError(TmjaxError):
    """A file, name, shape or option that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that does not hold what its config says; lists every difference."""


class RowMismatchError(InputError):
    """Source and target activations whose rows do not pair the same pieces of text."""


class NonFiniteError(InputError):
    """NaN or infinity in weights, activations or costs."""


class NoTransferError(TmjaxError):
    """A merge into which nothing measurable came from the source."""

    exit_code = 3


def by_name(name: str) -> type[TmjaxError]:
    """The class of an error that another process reported by its name."""
    kinds = (TmjaxError, InputError, CheckpointError, RowMismatchError, NonFiniteError, NoTransferError)
    return next(kind for kind in kinds if kind.__name__ == name)


def summarise(items: list[str], limit: int = 6) -> str:
    """Joins the first `limit` items on one line and counts the rest."""
    shown = "; ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}; and {len(items) - limit} more"
