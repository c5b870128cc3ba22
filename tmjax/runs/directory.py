"""A run directory: manifest, stages that are skipped when their output is intact, nothing half-written."""

import contextlib
import hashlib
import json
import os
import platform
import resource
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from tmjax.allocator import give_back_freed_memory
from tmjax.checkpoints.formats.weights import weight_files
from tmjax.checkpoints.hub import COMPANIONS, CONFIG_NAME, extra_templates, read_json
from tmjax.errors import InputError
from tmjax.files.atomic import PARTIAL, partial_name, remove, write_json, write_text
from tmjax.files.lock import OutputLock
from tmjax.files.owned import delete, refuse_foreign, walk
from tmjax.files.paths import refuse_name
from tmjax.runs.run_files import EDITED, MANIFEST, RECIPE, is_edited, is_own, listed, partial_of, split

_PACKAGES = ("jax", "flax", "ott-jax", "transformers", "orbax-checkpoint", "numpy")
_BLOCK = 2**22


def digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_files(files: list[Path]) -> str:
    """SHA-256 over names and contents of files, in name order."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        total.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                total.update(block)
    return total.hexdigest()


def sha256_checkpoint(directory: Path) -> str:
    """Hash of what a checkpoint directory says: weights, index, config, tokenizer; of an orbax directory every file."""
    wanted = {directory / name for name in (CONFIG_NAME, *COMPANIONS, "tmjax.json")}
    files = [*(file for file in wanted if file.is_file()), *weight_files(directory)]
    nested = [file for name in ("params", "hf") for file in (directory / name).rglob("*") if file.is_file()]
    return sha256_files(files + nested + extra_templates(directory))


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    with contextlib.suppress(OSError, StopIteration):  # getrusage begins at what the parent process held
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide numbers."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run directory; None if `path` is not one."""
    if not (path / MANIFEST).is_file():
        return None
    manifest = read_json(path / MANIFEST)
    return manifest if "tmjax" in manifest and "stages" in manifest else None


class Team(Protocol):
    """The processes of a job that share a run directory (see `sharding.hosts`)."""

    def is_first(self) -> bool:
        """Whether this is the process that writes and decides."""

    def barrier(self, name: str) -> None:
        """Waits for all processes."""

    def agree(self, value: Any) -> Any:
        """The first process's value, on every process."""


class Alone:
    """A team of one."""

    def is_first(self) -> bool:
        """Yes."""
        return True

    def barrier(self, name: str) -> None:
        """Nobody to wait for."""

    def agree(self, value: Any) -> Any:
        """The value."""
        return value


class RunDirectory:
    """One run: `manifest.json` is written first and after every stage; a finished stage with intact files is reused.

    Of a team's processes only the first changes the directory; the others follow its manifest. `here` are the facts of
    this process (devices, mesh) that the manifest tells of whoever did the latest work.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], here: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.here = dict(here or {})
        self.team: Team = Alone()
        self._unlock: Callable[[], object] = lambda: None
        #: Hears of every stage that is run: (name, 0, 0) as it begins, (name, 1, 0) once it has ended.
        self.show: Callable[[str, int, int], None] = lambda stage, done, total: None

    def close(self) -> None:
        """Releases the lock of the directory; the end of the process, and of the last use of this object, do too."""
        self._unlock()

    def _locked(self, lock: OutputLock) -> "RunDirectory":
        self._unlock = weakref.finalize(self, lock.release)
        return self

    @classmethod
    def start(
        cls,
        path: Path,
        recipe_yaml: str,
        header: Mapping[str, Any],
        *,
        key: Mapping[str, str],
        overwrite: bool,
        here: Mapping[str, Any] | None = None,
    ) -> "RunDirectory":
        """Creates the run, or resumes the one that is there if its `key` (hashes of recipe and inputs) is the same.

        Holds the lock of `path` from now on. Raises InputError if another process does, or `path` holds anything else;
        `overwrite` replaces a run's own files, nothing else.
        """
        lock = OutputLock(path)
        try:
            return cls._start(path, recipe_yaml, header, key, overwrite, here)._locked(lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _start(
        cls,
        path: Path,
        recipe_yaml: str,
        header: Mapping[str, Any],
        key: Mapping[str, str],
        overwrite: bool,
        here: Mapping[str, Any] | None,
    ) -> "RunDirectory":
        previous = read_manifest(path)
        if previous is not None and previous.get("key") == key:
            return cls._resume(path, previous, recipe_yaml, here)
        if refuse_name(path).is_dir() and (names := set(walk(path)) - {MANIFEST + PARTIAL}):
            if previous is None:
                raise InputError(
                    f"{path} exists and is not a run of tmjax (it holds {sorted(names)[0]}); choose another output"
                    " directory"
                )
            if not overwrite:
                raise InputError(
                    f"{path} is a run with another recipe or other inputs; choose another --out or --overwrite"
                )
            own, others = split(path, previous)
            refuse_foreign(path, others)
            delete(path, sorted(own, key=lambda name: name == MANIFEST))  # the last one says that the others are ours
        path.mkdir(parents=True, exist_ok=True)
        told = {**header, **(here or {}), "versions": versions(), "key": dict(key), "stages": {}, "outputs": {}}
        run = cls(path, told, here)
        run.save()
        write_text(path / RECIPE, recipe_yaml)
        return run

    @classmethod
    def _resume(
        cls, path: Path, manifest: dict[str, Any], recipe_yaml: str, here: Mapping[str, Any] | None
    ) -> "RunDirectory":
        run = cls(path, manifest, here)
        held = listed(path, manifest)
        delete(path, [name for name in walk(path) if partial_of(name) is not None and is_own(name, held)])
        if manifest.get("unfinished"):
            remove(partial_name(path / manifest["unfinished"]["output"]))
        for stage in manifest["stages"].values():
            stage["reused"] = True  # until it is run again
        run.save()
        recipe = path / RECIPE
        if not recipe.is_file() or recipe.read_text(encoding="utf-8") != recipe_yaml:  # killed before it was written
            write_text(recipe, recipe_yaml)
        return run

    @classmethod
    def amend(
        cls,
        path: Path,
        recipe_yaml: str,
        header: Mapping[str, Any],
        *,
        key: Mapping[str, str],
        here: Mapping[str, Any] | None = None,
    ) -> "RunDirectory":
        """Resumes a run under another recipe: finished stages that it does not change stay."""
        lock = OutputLock(path)
        try:
            manifest = read_manifest(path)
            if manifest is None:
                raise InputError(f"{path} is not a run of tmjax (no {MANIFEST})")
            manifest |= {"key": dict(key), "inputs": header["inputs"]}
            return cls._resume(path, manifest, recipe_yaml, here)._locked(lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def follow(cls, path: Path, key: Mapping[str, str], here: Mapping[str, Any] | None = None) -> "RunDirectory":
        """The run that another process has started; raises InputError if this host does not see it."""
        manifest = read_manifest(path)
        if manifest is None or manifest.get("key") != key:
            raise InputError(
                f"{path.absolute()} is not the directory that the first process sees; the output must lie on a file"
                " system that all processes share"
            )
        return cls(path, manifest, here)

    def save(self) -> None:
        """Writes the manifest atomically."""
        if self.team.is_first():
            write_json(self.path / MANIFEST, self.manifest)

    def finished(self, stage: str, key: object) -> bool:
        """Whether a stage with this input hash has finished and its files are still whole.

        A text for people, which its user may have edited, only has to be there.
        """
        entry = self.manifest["outputs"].get(stage)
        if entry is None or entry["key"] != digest(key):
            return False
        sizes = {name: (size, _size(self.path / name)) for name, size in entry["files"].items()}
        return all(now == size or (now > 0 and name.endswith(EDITED)) for name, (size, now) in sizes.items())

    def stage(
        self,
        name: str,
        key: object,
        output: str,
        work: Callable[[Path], Mapping[str, Any] | None],
        *,
        joint: bool = True,
    ) -> Path:
        """Runs `work(partial)` unless the stage is finished; returns the path of its output.

        `work` writes a directory (or a file, if `output` has a suffix) under the temporary path it gets and returns
        what goes into the manifest's top level. The output is renamed into place, then the manifest records it. All
        processes of a team do joint work, of which the first (or all, in a directory) write; only the first does other
        work, which then has no facts.
        """
        path = self.path / output
        first = self.team.is_first()
        if self.team.agree(first and self.finished(name, key)):
            return path
        refuse_foreign(path, self.team.agree(self._foreign(output) if first else []))
        started = time.perf_counter()
        self.show(name, 0, 0)
        partial = partial_name(path)
        if first:
            self._unfinished(output, [])
            remove(partial)
            partial.parent.mkdir(parents=True, exist_ok=True)
            if not path.suffix:
                partial.mkdir()
        self.team.barrier(f"{name} begins")
        try:
            facts = work(partial) if joint or first else None
            self.team.barrier(f"{name} ends")
        except BaseException:
            if first:
                remove(partial)
            raise
        if first:
            names = [output] if partial.is_file() else [f"{output}/{file}" for file in walk(partial)]
            self._unfinished(output, names)  # so that they are known for ours if the process dies here
            self._replace(partial, path, output)
            sizes = {file: (self.path / file).stat().st_size for file in sorted(names)}
            self.manifest["outputs"][name] = {"key": digest(key), "files": sizes}
            del self.manifest["unfinished"]
        seconds = round(time.perf_counter() - started, 3)
        self.manifest |= self.here
        self.manifest["stages"][name] = {"seconds": seconds, "peak_rss_mib": peak_rss_mib(), "reused": False}
        for key_path, value in (facts or {}).items():
            place = self.manifest
            *parents, last = key_path if isinstance(key_path, tuple) else (key_path,)
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        self.save()
        self.team.barrier(f"{name} recorded")
        self.show(name, 1, 0)
        give_back_freed_memory()
        return path

    def _unfinished(self, output: str, files: list[str]) -> None:
        """Notes what is being written, and the files that will be renamed into place."""
        known = set((self.manifest.get("unfinished") or {}).get("files", ())) | set(files)
        self.manifest["unfinished"] = {"output": output, "files": sorted(known)}
        self.save()

    def _foreign(self, output: str) -> list[str]:
        """Names below an output that no stage has written."""
        path, held = self.path / output, listed(self.path, self.manifest)
        names = [f"{output}/{name}" for name in walk(path)] if path.is_dir() else []
        return sorted(name for name in names if not is_own(name, held))

    def _replace(self, partial: Path, path: Path, output: str) -> None:
        """Renames a finished output into place of the one there; files that no stage has written stay in it."""
        if path.is_dir():
            held = listed(self.path, self.manifest)
            delete(path, [name for name in walk(path) if is_own(f"{output}/{name}", held)])
            if any(walk(path)):  # they came while the stage was running
                for name in list(walk(partial)):
                    (path / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial / name, path / name)
            remove(partial if any(walk(path)) else path)
        elif output.endswith(EDITED):
            sizes = [entry["files"][output] for entry in self.manifest["outputs"].values() if output in entry["files"]]
            if any(is_edited(path, size) for size in sizes):
                os.replace(path, path.with_name(path.name + ".old"))
        if partial.exists():
            os.replace(partial, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
