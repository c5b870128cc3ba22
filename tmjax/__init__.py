"""tmjax: merge large language models of different architectures by optimal transport, in JAX.

The names in `_HOMES` are loaded when first used, so that importing the package costs nothing. `align`, `fuse`,
`evaluate` and `adapt` are packages and, called, the functions of the same name.
"""

import importlib
import types
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_model": "tmjax.checkpoints.load",
    "export": "tmjax.checkpoints.hf",
    "read_texts": "tmjax.text.documents",
    "extract_activations": "tmjax.activations.extract",
    "align": "tmjax.align.alignment",
    "fuse": "tmjax.transfer.fuse",
    "require_transfer": "tmjax.transfer.update_table",
    "evaluate": "tmjax.evaluate.bits",
    "adapt": "tmjax.commands.adapt.run",
}
__all__ = ["CallablePackage", "__version__", *_HOMES]


class CallablePackage(types.ModuleType):
    """A package that is also a function: `tmjax.align(...)` is `tmjax.align.alignment.align(...)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the function."""
        return _home(self.__name__.rpartition(".")[2])(*args, **options)


def _home(name: str) -> Any:
    return getattr(importlib.import_module(_HOMES[name]), name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tmjax' has no attribute {name!r}")
    found = _home(name)
    # Importing it may have bound the package of the same name, which is what the name means from now on.
    return globals().get(name, found)
