"""How a plain script ends: an error that its user can act on is one line, as in the commands of tmjax."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tmjax.errors import TmjaxError


@contextmanager
def script(name: str, *, resumes: bool = False) -> Iterator[None]:
    """Runs the body of a script; exit status 2 for bad input, 130 for an interrupt, `name: error: ...` on stderr.

    `resumes`: the same command goes on where it was interrupted, and says so.
    """
    try:
        yield
    except TmjaxError as error:
        message, status = " ".join(str(error).split()), error.exit_code
    except KeyboardInterrupt:
        message, status = "interrupted; the same command resumes" if resumes else "interrupted", 130
    else:
        return
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(status)
