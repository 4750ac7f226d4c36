"""The documentation site: `make docs`."""

import rbf_jax

project = "rbf_jax"
version = release = rbf_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "rbf_jax"
exclude_patterns = ["_build"]
autodoc_default_options = {"members": True, "undoc-members": False, "member-order": "bysource"}
autodoc_typehints = "description"
napoleon_use_ivar = True
