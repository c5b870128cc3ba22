"""The command line that a run was made with."""

import shlex
from pathlib import Path

from tmjax.files.lock import current_command


def given_command(out: str) -> list[str] | None:
    """Returns the command that runs, as a list of one line; None outside of the command line.

    Args:
        out: The run directory, of which only the last name is written: the command is published with the result.
    """
    words = current_command()
    if not words:
        return None
    name = Path(out).name
    shown = (name if word == out else f"--out={name}" if word == f"--out={out}" else word for word in words)
    return [shlex.join(shown)]
