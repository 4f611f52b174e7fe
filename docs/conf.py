"""Sphinx's settings: ``make docs`` builds ``docs/_build/html``, without network."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # reference.py

project = "batchlr"
author = "The batchlr developers"
copyright = author
release = metadata.version("batchlr")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "reference",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # as on GitHub: links to headings work in both

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = False  # the tables only: a group's names share a page
maximum_signature_line_length = 88
default_role = "py:obj"  # `names` of docstrings are links
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

copybutton_exclude = ".linenos, .gp, .go"  # a console's prompts and output stay behind

smartquotes_action = "De"  # dashes and dots, no quotes: primes are transposes
html_theme = "furo"
html_title = f"batchlr {release}"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
