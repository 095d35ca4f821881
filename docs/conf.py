"""Settings of the documentation: Sphinx with MyST, because it reads Markdown and checks every internal link."""

from importlib import import_module

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import fastuft

# Some modules import a name on its first use, and autodoc shows those that a module has already.
for module in ("fastuft", "fastuft.evaluate"):
    face = import_module(module)
    vars(face).update({name: getattr(face, name) for name in face.__all__ if name != "evaluate"})

project = "fastuft"
author = "The fastuft developers"
copyright = "2026, the fastuft developers"
release = fastuft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# Signatures show short type names; the text of each argument comes from its docstring.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fastuft"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]


def inline_math(writer: HTML5Translator, node: nodes.math) -> None:
    """Formulas are MathML, which browsers render natively: they need no external script and work offline."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def displayed_math(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
