"""Settings of the documentation: ``sphinx-build -W -b html docs docs/_build/html``."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import structlin

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
# Makes torchvision importable if its compiled operators are missing, because transformers imports it.
_file = Path(__file__).parents[1] / "tests" / "child_processes" / "sitecustomize.py"
_spec = spec_from_file_location("torchvision_repair", _file)
sys.modules["torchvision_repair"] = _repair = module_from_spec(_spec)  # keeps alive what it registers
_spec.loader.exec_module(_repair)

project = "structlin"
author = "The structlin developers"
copyright = "The structlin developers"
version = release = structlin.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "structure_pages",
    "result_tables",
]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_extensions"]
# Single backticks in docstrings are code.
default_role = "code"
nitpicky = False

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"structlin {version}"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
