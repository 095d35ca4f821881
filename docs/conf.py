"""Settings of the documentation: Sphinx with MyST, because it reads Markdown and checks every internal link."""

import fastuft

project = "fastuft"
author = "The fastuft developers"
copyright = "2026, the fastuft developers"
release = fastuft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# Signatures stand with short type names; the text of each argument is that of its docstring.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fastuft"
