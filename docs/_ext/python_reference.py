"""The public functions, as directives that autodoc fills from their docstrings."""

from tmjax import api


def functions() -> str:
    """Returns an entry for every function of `tmjax.api`."""
    entries = "".join(f".. autofunction:: {api.__name__}.{name}\n" for name in api.__all__)
    return f"```{{eval-rst}}\n{entries}```\n"
