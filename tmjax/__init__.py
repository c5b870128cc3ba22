"""tmjax: merge large language models of different architectures by optimal transport, in JAX.

The functions are those of `tmjax.api`. All but `align` and `evaluate`, which are packages here, are also names of this
package; they are loaded when first used, so that importing the package costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = ("adapt", "convert", "export", "fuse", "load_model", "merge", "read_texts", "run", "vocabulary")
__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'tmjax' has no attribute {name!r}")
    return getattr(importlib.import_module("tmjax.api"), name)
