"""A job of several processes: joining it, keeping its output readable, and saying in one line how it ended.

jax.distributed starts and watches the processes. Its runtime and the collectives are native code that print to standard
output and, when another process dies, end this one with a stack trace. So what native code prints goes to a log file,
and the command runs under a small parent process that turns such an end into one line.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from tmjax.errors import InputError

#: Set for the process that does the work: the file that takes the output of native code.
LOG = "TMJAX_NATIVE_LOG"
_DIED = "detected fatal errors"
#: Seconds without a sign of life after which a process counts as dead, where no collective has failed before.
HEARTBEAT_S = 60
_joined = False


def joined() -> bool:
    """Whether this process has joined a job."""
    return _joined


def silent() -> bool:
    """Whether another process shows progress and results."""
    if not _joined:
        return False
    from tmjax.sharding import hosts  # not above: it imports JAX, which a process must not do before it joins

    return not hosts.is_first()


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the job: arguments that are None are detected on a TPU pod, under SLURM, Open MPI or Kubernetes.

    Must come before anything that uses a device. Raises InputError if there is no such job.
    """
    global _joined
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise InputError("--coordinator HOST:PORT, --num-processes N and --process-id I belong together")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"--coordinator {coordinator!r}: write HOST:PORT")
        if not 0 <= process < processes:
            raise InputError(f"--process-id {process} is not one of {processes} processes (0 to {processes - 1})")
    _redirect_native_output()
    import jax

    loopback = coordinator is not None and host in ("127.0.0.1", "localhost")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate" if coordinator is not None else None,
            coordinator_bind_address=coordinator if loopback else None,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError:
        raise InputError(
            "--distributed found no TPU pod, SLURM, Open MPI or Kubernetes job around it; give --coordinator HOST:PORT"
            " --num-processes N --process-id I"
        ) from None
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot join the job at {coordinator or 'the coordinator found'}: {reason}") from None
    _joined = True


def leave() -> None:
    """Waits for the other processes to be done, then leaves the job."""
    global _joined
    if _joined:
        import jax

        jax.distributed.shutdown()
        _joined = False


def end(code: int) -> None:
    """Ends this process at once with an exit status: a failed one must not wait for the others to shut down."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whoever read them may be gone
        os._exit(code)


def _redirect_native_output() -> None:
    """Sends what native code writes to descriptors 1 and 2 to the log; Python's own streams stay where they were."""
    path = os.environ.get(LOG)
    if path is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def supervise(arguments: Sequence[str]) -> int:
    """Runs `tmjax` with these arguments in a child process and returns its exit status.

    The status is 1, with one line on standard error, where a signal ended the child, as jax.distributed does when
    another process died.
    """
    handle, name = tempfile.mkstemp(prefix="tmjax-", suffix=".log")
    os.close(handle)
    log = Path(name)
    # A group of its own: the terminal's interrupt comes here once, and is passed on once.
    child = subprocess.Popen(
        [sys.executable, "-m", "tmjax", *arguments],
        env=os.environ | {LOG: name},
        stdin=subprocess.PIPE,
        process_group=0,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    code = child.wait()
    if code >= 0:
        log.unlink(missing_ok=True)
        return code
    if _DIED in log.read_text(encoding="utf-8", errors="replace"):
        cause = "another process of this job died or cannot be reached"
    else:
        cause = f"this process was ended by {signal.Signals(-code).name}"
        cause += " (out of memory?)" if -code == signal.SIGKILL else ""
    print(f"tmjax: error: {cause}; the same command resumes (log: {log})", file=sys.stderr)
    return 1
