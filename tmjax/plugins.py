"""Objects of other packages, by entry point, dotted path or file: what a user adds without touching this package."""

import hashlib
import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from tmjax.errors import InputError


def offered(group: str) -> dict[str, metadata.EntryPoint]:
    """Entry points that installed packages offer in a group, by name; none of them is loaded."""
    return {entry.name: entry for entry in metadata.entry_points(group=group)}


def plugin_file(name: str) -> str | None:
    """Returns the file of a name `FILE.py:NAME`; None for names of another form."""
    place, colon, _ = name.rpartition(":")
    return place if colon and place.endswith(".py") else None


def beside(name: str, base: Path | None) -> str:
    """Returns a name `FILE.py:NAME` with the path of the file in the folder `base`, if it lies there and not here."""
    file = plugin_file(name)
    if base is None or file is None or Path(file).exists() or not (base / file).exists():
        return name
    return f"{base / file}{name.removeprefix(file)}"


def code_hash(kind: type) -> str | None:
    """Returns the SHA-256 of the file that defines a class; None for those of this package."""
    package = __name__.partition(".")[0]
    if kind.__module__.partition(".")[0] == package:
        return None
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def load_plugin(name: str, group: str, kind: str) -> Any | None:
    """Loads an object of another package.

    Args:
        name: Name of an entry point of the group, `package.module:NAME` or `FILE.py:NAME`.
        group: Group of entry points, for example `tmjax.solvers`.
        kind: Word for such an object in messages, for example "solver".

    Returns:
        The object; None if the name is neither an entry point nor a path.

    Raises:
        InputError: The object cannot be imported; says why.
    """
    entry = offered(group).get(name)
    if entry is None and ":" not in name:
        return None
    try:
        if entry is not None:
            return entry.load()
        place, _, attribute = name.rpartition(":")
        file = plugin_file(name)
        module = importlib.import_module(place) if file is None else _module_of(Path(file).expanduser())
        return getattr(module, attribute)
    except (ImportError, AttributeError, OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{kind} {name!r} cannot be imported: {error}") from None


def _module_of(file: Path) -> ModuleType:
    """The module of a file, which is run once."""
    if not file.is_file():
        raise OSError(f"{file} does not exist")
    # One name per place: files of the same name in two folders are two modules.
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    name = f"tmjax_plugin_{file.stem}_{place}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
