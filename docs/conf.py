"""How the site is built: `pip install -e ".[docs]" && sphinx-build docs docs/_build`.

Sphinx with MyST, as JAX, Flax and optax have it: pages are Markdown that GitHub shows
too, and the reference comes from the docstrings. The theme is furo, after a look at
sphinx-book-theme beside it: light and dark by the reader's system, tables and code that
fit a phone, a sidebar of all pages, and 0.4 MB of files where the other has 6.6.
"""

from __future__ import annotations

import logging
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]  # and the benchmarks

import absl.logging  # noqa: E402

import jlora  # noqa: E402

absl.logging.set_verbosity("warning")  # Orbax would tell each file that it writes
logging.getLogger("jax").setLevel("WARNING")  # and JAX each device that it has not

project = "jlora"
author = "the authors of jlora"
version = release = jlora.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "generate",
    "languages",
    "messages",
    "outside",
]
exclude_patterns = ["_build", "_generated", "README.md"]  # README.md is for GitHub

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them

smartquotes_action = "D"  # dashes alone
default_role = "name"  # of docstrings.py
autodoc_default_options = {"member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
nitpick_ignore_regex = [
    # Types of others: their inventories are on the network, and builds are not.
    ("py:class", r"(?!jlora\b).*"),
    ("py:class", r"jlora\b.*\._.*"),  # types without a public name
]
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "jlora"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False
pygments_dark_style = "github-dark"
