"""How the site is built: `pip install -e ".[docs]" && sphinx-build docs docs/_build`.

Sphinx with MyST, as JAX, Flax and optax have it: pages are Markdown that GitHub shows
too, and the reference comes from the docstrings. The theme is furo: light and dark by
the reader's system, readable on a phone, and little to configure.
"""

from __future__ import annotations

import logging
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the package, and the benchmarks beside it

import jlora  # noqa: E402

project = "jlora"
author = "the authors of jlora"
version = release = jlora.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "README.md"]  # README.md is for GitHub

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them

html_theme = "furo"
html_title = "jlora"
html_static_path = ["_static"]
html_copy_source = False
html_show_sphinx = False


class _Whole(logging.Filter):
    """Folders may be empty while their pages are being written."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "toctree glob pattern" not in str(record.msg)


logging.getLogger("sphinx.sphinx.directives.other").addFilter(_Whole())
