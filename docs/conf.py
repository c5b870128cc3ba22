"""Sphinx configuration of the documentation; `make docs` builds it with warnings as errors."""

import os
import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # autodoc imports the package
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import tmjax

project = "tmjax"
author = "the tmjax authors"
copyright = "the tmjax authors"
version = release = tmjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "generated",
]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"tmjax {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# The notebook is committed with its outputs; `make docs-check` executes it.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
# Docstrings write code between single backticks, as Markdown does.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def setup(app: Sphinx) -> None:
    """Registers the language of blocks that hold formulas."""
    app.add_lexer("formula", TextLexer)
