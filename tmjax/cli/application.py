"""The application: settings of the process, errors as one line, exit statuses, jobs of several processes."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer

from tmjax import interrupt
from tmjax.cli.options import JobFlags
from tmjax.errors import InputError, TmjaxError
from tmjax.files import lock
from tmjax.sharding import job

app = typer.Typer(
    name="tmjax",
    help="Merge large language models of different architectures by optimal transport.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def prepare() -> None:
    """Sets the process up: quiet libraries, a cache of compiled programs, an allocator that keeps freed memory."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    from tmjax.allocator import keep_freed_memory

    keep_freed_memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmjax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# typer may use the click package or its own copy of it; the base of its errors is public in neither.
_ClickError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def run(arguments: list[str] | None = None, *, application: typer.Typer = app, name: str = "tmjax") -> int:
    """Runs a command line; an error is one line on standard error, `name: error: ...`.

    Args:
        arguments: The words of the command line; those of the process unless given.
        application: The typer application; tools of this repository pass their own.
        name: Name of the program in messages.

    Returns:
        The exit status: 0 done, 2 bad input, 3 refused, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the stream cannot encode are shown escaped
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")
    with interrupt.noticed(), lock.command([name, *(sys.argv[1:] if arguments is None else arguments)]):
        return _ended(arguments, application, name)


def _ended(arguments: list[str] | None, application: typer.Typer, name: str) -> int:
    """Runs a command line and turns its end into a message and an exit status."""

    def fail(message: str, code: int) -> int:
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
        if job.joined():
            lock.release_all()
            job.end(code)
        return code

    interrupted = "interrupted; the same command resumes" if application is app else "interrupted"
    memory = "lower batch_tokens and memory_mib in the recipe"
    try:
        result = typer.main.get_command(application).main(arguments, prog_name=name, standalone_mode=False)
        if result != 130:
            job.leave()
            return 0
        return fail(interrupted, 130)  # typer turns an interrupt inside a command into this status
    except (KeyboardInterrupt, typer.Abort):
        return fail(interrupted, 130)
    except Exception as error:
        if interrupt.noted():  # native code and libraries may turn an interrupt into any other error
            return fail(interrupted, 130)
        if isinstance(error, TmjaxError):
            return fail(str(error), error.exit_code)
        if isinstance(error, _ClickError):
            return fail(f"{error.format_message()} (see {name} --help)", 2)
        if isinstance(error, MemoryError):
            return fail(f"out of memory; {memory}", 1)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return fail(f"{where}{error.strerror or error}", 2)
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            return fail(f"out of device memory; {memory}, or use --mesh", 1)
        if not job.joined() or type(error).__name__ != "JaxRuntimeError":
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        return fail(f"another process of this job died or failed ({reason}); the same command resumes", 1)


@contextlib.contextmanager
def join_job(flags: JobFlags) -> Iterator[None]:
    """Joins the job that the flags name, if any, for the block."""
    place = flags.coordinator, flags.num_processes, flags.process_id
    if not flags.distributed:
        if any(value is not None for value in place):
            raise InputError("--coordinator, --num-processes and --process-id go with --distributed")
        yield
        return
    job.join(*place)
    yield


@app.callback()
def _main() -> None:
    prepare()


def main() -> None:
    """Runs the console script."""
    if "--distributed" in sys.argv[1:] and job.LOG not in os.environ:
        sys.exit(job.supervise(sys.argv[1:]))
    try:
        code = run()
    except BaseException:
        if job.joined():  # otherwise the traceback would wait for the other processes
            try:
                traceback.print_exc()
            finally:
                job.end(1)
        raise
    interrupt.ignore()
    sys.exit(code)
