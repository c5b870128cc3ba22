"""The public functions, as directives that autodoc fills from their docstrings."""

import tmjax


def functions() -> str:
    """Returns an entry for every function of `tmjax.api`."""
    try:
        from tmjax import api

        places = {name: f"{api.__name__}.{name}" for name in api.__all__}
    except ImportError:
        places = {name: f"{home}.{name}" for name, home in tmjax._HOMES.items()}
    entries = "".join(f".. autofunction:: {place}\n" for place in places.values())
    return f"```{{eval-rst}}\n{entries}```\n"
