"""The site: `pip install -e ".[docs]" && sphinx-build -W docs build/docs`."""

import os
import sys
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import jaxrnn  # noqa: E402

project, author = "jaxrnn", "The jaxrnn authors"
copyright = author
release = version = jaxrnn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "extensions.docstrings",
    "extensions.drawn",
    "extensions.linked",
    "extensions.mathml",
]
exclude_patterns = ["extensions", "drawings", "_drawings"]
default_role = "py:obj"
smartquotes_action = "D"  # dashes alone
html_math_renderer = "mathml"

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # else every cell repeats what Cell says of its methods
autodoc_typehints_format = "short"
_aliases = [*jaxrnn.typing.__all__, "Activation", "ArrayLike", "Error", "Implementation", "Metrics"]
autodoc_type_aliases = {name: name for name in _aliases}
python_maximum_signature_line_length = 80
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "jaxrnn"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
# A list of versions in the page itself needs no network; a site of many versions says where their common list is.
_versions = quote((HERE / "versions.json").read_text())
html_theme_options = {
    "switcher": {
        "json_url": os.environ.get("JAXRNN_DOCS_VERSIONS", f"data:application/json,{_versions}"),
        "version_match": release,
    },
    "check_switcher": False,
    "navbar_end": ["version-switcher", "theme-switcher"],
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"default_mode": "auto"}
html_sidebars = {name: [] for name in ("cells", "changelog", "development", "gallery", "internals")}
