"""Settings of the site: README, the rooms and reports as they were executed, and the API. At the top of the repository:

    sphinx-build -M html . _docs -c docs -W
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # for pages.py beside this file, and for the modules of this clone

project, author = "condexp", "the condexp authors"
root_doc = "README"
include_patterns = ["*.md", "docs/**", "nbs/*.ipynb", "reports/*.md", "reports/*.ipynb"]
exclude_patterns = ["docs/templates", "docs/contents.md", "nbs/index.ipynb", "_docs", "**/.*"]
templates_path, html_static_path = [str(HERE / "templates")], ["site.css"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx_copybutton"]
extensions += ["sphinx-mathjax-offline", "pages"]
pygments_dark_style = "github-dark"
html_theme, html_title, html_css_files = "furo", "condexp", ["site.css"]
html_copy_source = html_show_copyright = False

nb_execution_mode = "off"  # notebooks are committed as they were executed
nb_render_markdown_format = "myst"
nb_code_prompt_show, nb_code_prompt_hide = "Show code", "Hide code"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
maximum_signature_line_length = 90
autodoc_inherit_docstrings = False
