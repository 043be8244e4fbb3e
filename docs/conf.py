"""Sphinx configuration. Build with ``make docs``."""

import sb3_rfm

project = "sb3_rfm"
author = "The sb3_rfm authors"
copyright = f"2026, {author}"
release = sb3_rfm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results/**"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "sb3_rfm"
