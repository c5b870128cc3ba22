"""A run directory: its manifest, and stages that are skipped when their output is intact."""

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from tmjax.allocator import give_back_freed_memory
from tmjax.errors import InputError
from tmjax.files.atomic import PARTIAL, partial_name, remove, write_json, write_text
from tmjax.files.lock import OutputLock
from tmjax.files.owned import delete, refuse_foreign, walk
from tmjax.files.paths import refuse_name
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import (
    MANIFEST,
    Manifest,
    Record,
    find_manifest,
    is_current,
    load_manifest,
    refuse_other_format,
)
from tmjax.runs.peak_memory import peak_rss_mib
from tmjax.runs.run_facts import Output, Stage, Unfinished
from tmjax.runs.run_files import EDITED, RECIPE, is_edited, is_own, listed, own_files, partial_of, split
from tmjax.runs.team import ALONE, Team


def resumes(path: Path, key: Mapping[str, str]) -> bool:
    """Returns whether a path is a run with this key, so that `RunDirectory.start` goes on with it."""
    values = find_manifest(path)
    return values is not None and is_current(values) and values.get("key") == key


#: Called with (stage, steps done, steps in all): (0, 0) at the beginning of a stage, (1, 0) at its end.
Show: TypeAlias = Callable[[str, int, int], None]


def quiet(_stage: str, _done: int, _total: int) -> None:
    """Shows no progress."""


class RunDirectory:
    """One run. `manifest.json` is written first and after every stage; a finished stage with intact files is reused.

    The first process of a team changes the directory, and the others follow its manifest. `show` is called with
    (name, 0, 0) at the beginning of a stage and with (name, 1, 0) at its end.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        header: Manifest,
        *,
        lock: OutputLock | None = None,
        team: Team = ALONE,
        show: Show = quiet,
    ) -> None:
        """Takes the present manifest, and the `header` of a new run with the environment of this process."""
        self.path, self.manifest, self.team = path, manifest, team
        self._header, self._show = header, show
        self._unlock = (lambda: None) if lock is None else weakref.finalize(self, lock.release)

    def close(self) -> None:
        """Releases the lock of the directory. The end of the process or of this object releases it too."""
        self._unlock()

    @classmethod
    def start(
        cls,
        path: Path,
        recipe_yaml: str,
        header: Manifest,
        *,
        overwrite: bool = False,
        team: Team = ALONE,
        show: Show = quiet,
    ) -> "RunDirectory":
        """Creates the run, or resumes an existing one whose key is the header's `key`.

        Takes the lock of `path`. Raises InputError if another process has it, or if `path` is anything else;
        `overwrite` replaces a run's own files alone.
        """
        with _locked(path) as lock:
            if resumes(path, header.key):
                manifest = load_manifest(path)
                return cls(path, manifest, header, lock=lock, team=team, show=show)._resume(recipe_yaml)
            _clear(path, overwrite=overwrite)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, header.model_copy(deep=True), header, lock=lock, team=team, show=show)
            run.save()
            write_text(path / RECIPE, recipe_yaml)
            return run

    @classmethod
    def amend(
        cls, path: Path, recipe_yaml: str, header: Manifest, *, team: Team = ALONE, show: Show = quiet
    ) -> "RunDirectory":
        """Resumes a run under another recipe: finished stages that it does not change stay."""
        with _locked(path) as lock:
            manifest = load_manifest(path)
            if manifest is None:
                raise InputError(f"{path} is not a run of tmjax (no {MANIFEST})")
            manifest.key, manifest.inputs = header.key, header.inputs
            added = [each for each in header.commands or [] if each not in (manifest.commands or [])]
            manifest.commands = [*(manifest.commands or []), *added] or None
            return cls(path, manifest, header, lock=lock, team=team, show=show)._resume(recipe_yaml)

    @classmethod
    def follow(cls, path: Path, header: Manifest, *, team: Team = ALONE, show: Show = quiet) -> "RunDirectory":
        """Opens the run that another process has started; raises InputError if this host has no access to it."""
        if not resumes(path, header.key):
            raise InputError(
                f"{path.absolute()} is not the directory that the first process sees; the output must lie on a file"
                " system that all processes share"
            )
        return cls(path, load_manifest(path), header, team=team, show=show)

    def _resume(self, recipe_yaml: str) -> "RunDirectory":
        """Deletes the remains of an interrupted process, and marks all stages as reused until they are run again."""
        path, manifest = self.path, self.manifest
        own = self._listed()
        delete(path, [name for name in walk(path) if partial_of(name) is not None and is_own(name, own)])
        if manifest.unfinished is not None:
            remove(partial_name(path / manifest.unfinished.output))
        for stage in manifest.stages.values():
            stage.reused = True
        self.save()
        recipe = path / RECIPE
        if not recipe.is_file() or recipe.read_text(encoding="utf-8") != recipe_yaml:  # killed before it was written
            write_text(recipe, recipe_yaml)
        return self

    def save(self) -> None:
        """Writes the manifest atomically."""
        if self.team.is_first():
            write_json(self.path / MANIFEST, self.manifest.to_json())

    def finished(self, stage: str, key: object) -> bool:
        """Whether a stage with this input hash has finished and its files are intact.

        A text for people, which a user may have edited, only has to exist.
        """
        entry = self.manifest.outputs.get(stage)
        if entry is None or entry.key != digest(key):
            return False
        sizes = {name: (size, _size(self.path / name)) for name, size in entry.files.items()}
        return all(now == size or (now > 0 and name.endswith(EDITED)) for name, (size, now) in sizes.items())

    def stage(
        self,
        name: str,
        key: object,
        output: str,
        work: Callable[[Path], Record | None],
        *,
        joint: bool = True,
    ) -> Path:
        """Runs `work(partial)` unless the stage is finished; returns the path of its output.

        `work` writes a directory (or a file, if `output` has a suffix) under the temporary path it gets and may return
        a function that writes facts into the manifest. The output is renamed into place, then the manifest records it.
        All processes of a team do joint work; the first one writes, or all do in a directory. Other work is done by the
        first process alone and records nothing.
        """
        path = self.path / output
        first = self.team.is_first()
        if self.team.agree(first and self.finished(name, key)):
            return path
        refuse_foreign(path, self.team.agree(self._foreign(output) if first else []))
        started = time.perf_counter()
        self._show(name, 0, 0)
        partial = partial_name(path)
        if first:
            self._unfinished(output, [])
            remove(partial)
            partial.parent.mkdir(parents=True, exist_ok=True)
            if not path.suffix:
                partial.mkdir()
        self.team.barrier(f"{name} begins")
        try:
            record = work(partial) if joint or first else None
            self.team.barrier(f"{name} ends")
        except BaseException:
            if first:
                remove(partial)
            raise
        if first:
            names = [output] if partial.is_file() else [f"{output}/{file}" for file in walk(partial)]
            self._unfinished(output, names)  # so that they are known as ours if the process dies here
            self._replace(partial, path, output)
            sizes = {file: (self.path / file).stat().st_size for file in sorted(names)}
            self.manifest.outputs[name] = Output(key=digest(key), files=sizes)
            self.manifest.unfinished = None
        self._finish(name, started, record)
        return path

    def nested(self, name: str, key: object, output: str, work: Callable[[Path], Record | None]) -> Path:
        """Runs `work(path)` unless it is finished; returns the path, a directory below the run.

        Unlike a stage the work writes into its place, resumes by itself, and knows which files there are its own: it is
        another run, or a directory with a record of its files. All processes of a team do it.
        """
        path, first = self.path / output, self.team.is_first()
        if self.team.agree(first and self.finished(name, key)):
            return path
        started = time.perf_counter()
        self._show(name, 0, 0)
        if first and self.manifest.outputs.pop(name, None) is not None:
            self.save()  # the present files may be replaced by others of the same sizes
        record = work(path)
        self.team.barrier(f"{name} ends")
        if first:
            sizes = {f"{output}/{file}": (path / file).stat().st_size for file in sorted(own_files(path))}
            self.manifest.outputs[name] = Output(key=digest(key), files=sizes)
        self._finish(name, started, record)
        return path

    def _finish(self, name: str, started: float, record: Record | None) -> None:
        """Records time and facts of a stage that has ended."""
        seconds = round(time.perf_counter() - started, 3)
        self.manifest.run_in(self._header)
        self.manifest.stages[name] = Stage(seconds=seconds, peak_rss_mib=peak_rss_mib(), reused=False)
        if record is not None:
            record(self.manifest)
        self.save()
        self.team.barrier(f"{name} recorded")
        self._show(name, 1, 0)
        give_back_freed_memory()

    def _unfinished(self, output: str, files: list[str]) -> None:
        """Records the output that is being written, and the files that will be renamed into place."""
        earlier = self.manifest.unfinished
        known = set(files) | set(() if earlier is None else earlier.files)
        self.manifest.unfinished = Unfinished(output=output, files=sorted(known))
        self.save()

    def _listed(self) -> set[str]:
        """Returns the names of files that stages have written or were writing."""
        return listed(self.path, self.manifest.to_json({"outputs", "unfinished"}))

    def _foreign(self, output: str) -> list[str]:
        """Returns the names below an output that no stage has written."""
        path, own = self.path / output, self._listed()
        names = [f"{output}/{name}" for name in walk(path)] if path.is_dir() else []
        return sorted(name for name in names if not is_own(name, own))

    def _replace(self, partial: Path, path: Path, output: str) -> None:
        """Renames a finished output over the present one; files that no stage has written stay in it."""
        if path.is_dir():
            own = self._listed()
            delete(path, [name for name in walk(path) if is_own(f"{output}/{name}", own)])
            if any(walk(path)):  # they were added while the stage was running
                for name in list(walk(partial)):
                    (path / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial / name, path / name)
            remove(partial if any(walk(path)) else path)
        elif output.endswith(EDITED):
            sizes = [entry.files[output] for entry in self.manifest.outputs.values() if output in entry.files]
            if any(is_edited(path, size) for size in sizes):
                os.replace(path, path.with_name(path.name + ".old"))
        if partial.exists():
            os.replace(partial, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[OutputLock]:
    """Takes the lock of an output, and releases it if the block fails."""
    lock = OutputLock(path)
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def _clear(path: Path, *, overwrite: bool) -> None:
    """Deletes an old run to make room; raises InputError for anything that must not be deleted."""
    names = set(walk(path)) - {MANIFEST + PARTIAL} if refuse_name(path).is_dir() else set()
    if not names:
        return
    values = find_manifest(path)
    if values is None:
        raise InputError(
            f"{path} exists and is not a run of tmjax (it holds {sorted(names)[0]}); choose another output directory"
        )
    if not overwrite:
        refuse_other_format(path, values)
        raise InputError(f"{path} is a run with another recipe or other inputs; choose another --out or --overwrite")
    own, others = split(path, values)
    refuse_foreign(path, others)
    delete(path, sorted(own, key=lambda name: name == MANIFEST))  # the last one says that the others are ours


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
