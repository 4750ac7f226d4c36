"""The documentation site: `make docs`. Notebooks are executed, so that their pictures stand in it."""

import shutil
from pathlib import Path

import rbf_jax

project = "rbf_jax"
version = release = rbf_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
html_theme = "furo"
html_title = "rbf_jax"
exclude_patterns = ["_build", "notebooks/README.md"]
autodoc_default_options = {"members": True, "undoc-members": False, "member-order": "bysource"}
autodoc_typehints = "description"
napoleon_use_ivar = True

# Sphinx sees only what lies below its folder.
_here = Path(__file__).parent
shutil.copytree(_here.parent / "notebooks", _here / "notebooks", dirs_exist_ok=True)
