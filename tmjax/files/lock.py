"""One writer per output: an advisory lock that ends with its process, and a record of who holds it.

The lock is `flock` on a hidden file beside the output (inside it where the folder above cannot be written to), so the
kernel releases it when the process dies, however it dies. NFS and most cluster file systems pass it on to other hosts.
The file is deleted on release; whoever opened it before locks an unlinked file, sees that and starts again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmjax.errors import InputError
from tmjax.files.paths import refuse_name

SUFFIX = ".tmjax-lock"
#: What file systems without locks answer.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NAME_BYTES = 200
_COMMAND_CHARACTERS = 160


@dataclass
class _Held:
    """A lock of this process, counted: one thread may take it again."""

    descriptor: int
    file: Path
    made: list[Path]
    thread: int
    process: int = field(default_factory=os.getpid)
    count: int = 1


_guard = threading.RLock()
_held: dict[Path, _Held] = {}
_handles: "set[OutputLock]" = set()
_command: list[str] = []


class OutputLock:
    """Holds the lock of an output from its making to `release`; the thread that holds it may make another.

    An output is a directory unless said otherwise. Raises InputError saying who holds it, or why the place cannot be
    written to.
    """

    def __init__(self, path: Path, *, directory: bool = True) -> None:
        self._path: Path | None = None
        real = refuse_name(path) if directory else Path(os.path.realpath(path))
        with _guard:
            mine = _held.get(real)
            if mine is None:
                _held[real] = _acquire(real, path)
            elif mine.thread != threading.get_ident():
                raise InputError(_refusal(path, _record()))
            else:
                mine.count += 1
            self._path = real
            _handles.add(self)

    def release(self) -> None:
        """Gives the lock up; a second call does nothing."""
        with _guard:
            path, self._path = self._path, None
            _handles.discard(self)
            held = _held.get(path) if path is not None else None
            if held is None:
                return
            held.count -= 1
            if held.count == 0:
                del _held[path]
                _give_up(held)

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def command(arguments: Sequence[str]) -> Iterator[None]:
    """For the time of a command, records it with every lock; releases at the end what it has not released."""
    before, said = set(_handles), list(_command)
    _command[:] = arguments
    try:
        yield
    finally:
        release_all(keep=before)
        _command[:] = said


def release_all(keep: "set[OutputLock] | frozenset[OutputLock]" = frozenset()) -> None:
    """Releases every lock of this process but `keep`."""
    for handle in set(_handles) - keep:
        handle.release()


def lock_files(path: Path) -> tuple[Path, Path]:
    """Where the lock of an output can lie: beside it, or inside it."""
    name = path.name
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}{SUFFIX}"), path / SUFFIX


def _acquire(real: Path, shown: Path) -> _Held:
    beside, inside = lock_files(real)
    made: list[Path] = []
    try:
        try:
            return _lock(beside, shown, made)
        except OSError as error:
            if error.errno not in _DENIED or not (real.is_dir() and os.access(real, os.W_OK)):
                raise
            return _lock(inside, shown, made)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"cannot write to {shown}: {error.strerror or error}") from None
    except InputError:
        _remove_empty(made)
        raise


def _lock(file: Path, shown: Path, made: list[Path]) -> _Held:
    while True:
        _make_parents(file.parent, made)
        try:
            descriptor = _open(file)
        except FileNotFoundError:  # another process has just deleted the folder that it had made
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                record = _read(descriptor)
                os.close(descriptor)
                raise InputError(_refusal(shown, record)) from None
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            warnings.warn(
                f"the file system of {shown} has no locks: see to it that no other command writes there", stacklevel=2
            )
        if _is_still(file, descriptor):
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # a full disk, or a file of another user's: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_record()).encode(), 0)
    return _Held(descriptor, file, made, threading.get_ident())


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not file.exists():
            raise
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether the locked file is the one that the name means now."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _give_up(held: _Held) -> None:
    if held.process == os.getpid():  # a forked child shares the lock and must not end it
        if _is_still(held.file, held.descriptor):
            with contextlib.suppress(OSError):
                held.file.unlink()
        _remove_empty(held.made)
    os.close(held.descriptor)


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir()
        except FileExistsError:
            continue
        made.append(new)


def _remove_empty(made: list[Path]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _record() -> dict[str, Any]:
    said = shlex.join(_command or [Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    if len(said) > _COMMAND_CHARACTERS:
        said = said[: _COMMAND_CHARACTERS - 3] + "..."
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": said,
    }


def _read(descriptor: int) -> dict[str, Any]:
    """What the holder wrote; it may be about to."""
    for _ in range(20):
        with contextlib.suppress(ValueError, OSError):
            record = json.loads(os.pread(descriptor, 2**16, 0))
            if isinstance(record, dict):
                return record
        time.sleep(0.02)
    return {}


def _refusal(path: Path, record: dict[str, Any]) -> str:
    who = "another command"
    if {"host", "process", "since", "command"} <= record.keys():
        who = f"`{record['command']}` (host {record['host']}, process {record['process']}, since {record['since']})"
    return f"{path} is being written by {who}; wait for it, stop it, or choose another output"
