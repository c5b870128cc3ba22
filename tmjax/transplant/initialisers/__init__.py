"""Rows of new tokens, one way per file: every module of this folder with an `INITIALISER` is a way."""

import importlib
import pkgutil
from collections.abc import Mapping

from tmjax.errors import InputError
from tmjax.transplant.initialisers.base import Initialiser

_MODULES = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
#: The initialisers by name.
INITIALISERS: Mapping[str, Initialiser] = {
    module.INITIALISER.name: module.INITIALISER for module in _MODULES if hasattr(module, "INITIALISER")
}


def find_initialiser(name: str) -> Initialiser:
    """Finds an initialiser by its name; raises InputError."""
    if name not in INITIALISERS:
        raise InputError(f"--init {name!r} is not known; write {', '.join(sorted(INITIALISERS))}")
    return INITIALISERS[name]
