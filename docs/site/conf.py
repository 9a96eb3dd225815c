"""The site: `sphinx-build -W docs/site OUT` builds it offline.

The pages are Markdown, the reference comes from the docstrings, the gallery from `examples/`, which is executed.
"""

import os
import sys
import warnings
from pathlib import Path

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

from lightning_modules._version import __version__  # noqa: E402, of these sources, whatever is installed

project = "lightning-em"
author = "the authors of lightning-em"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["**/GALLERY_HEADER.rst"]
html_theme = "furo"
html_title = f"lightning-em {release}"
html_show_sphinx = html_show_copyright = False

# Markdown: headings can be linked to, as on GitHub.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings: single backticks are code, and link where they name something that is documented.
default_role = "py:obj"
napoleon_custom_sections = [("Shape", "Shape")]
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
# what scikit-learn gives every estimator has pages there
_ROUTED = ("fit", "partial_fit", "predict", "score", "transform")
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": ", ".join(f"set_{name}_request" for name in _ROUTED),
}

# Links to other projects without a connection: what docstrings name, in inventories that `docs/inventories.py` writes.
intersphinx_mapping = {
    name: (address, str(Path(__file__).parent / "inventories" / f"{name}.inv"))
    for name, address in {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "lightning": "https://lightning.ai/docs/pytorch/stable/",
        "pyg": "https://pytorch-geometric.readthedocs.io/en/latest/",
        "sklearn": "https://scikit-learn.org/stable/",
        "numpy": "https://numpy.org/doc/stable/",
    }.items()
}

sphinx_gallery_conf = {
    "examples_dirs": str(PROJECT / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": "ExampleTitleSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "abort_on_example_error": True,
    "remove_config_comments": True,
}

# What a reader of an example can do nothing about.
warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch_geometric")
os.environ.setdefault("MPLBACKEND", "Agg")
