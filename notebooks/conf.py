"""The static site, ``make site``: README, every executed notebook, and the pages that need no kernel."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures"

project, author, copyright = "kfac_viz", "the authors of kfac_viz", "the authors of kfac_viz, MIT licence"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
exclude_patterns = ["**/.ipynb_checkpoints", "class"]
html_theme, html_title, html_show_sourcelink, html_show_sphinx = "furo", "kfac_viz", False, False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "myst.header"]  # README's links into the repository

nb_execution_mode, nb_execution_timeout, nb_execution_raise_on_error = "cache", 600, True
nb_execution_cache_path = str(HERE.parent / "figures" / ".made" / "site")
# Of a live panel the picture that it carries for pages without a kernel; nothing is loaded from elsewhere.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js: dict[str, dict[str, str]] = {}


def setup(app: Sphinx) -> None:
    app.connect("build-finished", copy_live_pages)


def copy_live_pages(app: Sphinx, error: Exception | None) -> None:
    """The pages with sliders of their own, apart from the notebooks' pages of the same names, and thumbnails."""
    if error is None and app.builder.format == "html":
        shutil.rmtree(Path(app.outdir).parent / "jupyter_execute", ignore_errors=True)  # what myst-nb leaves behind
        live = Path(app.outdir) / "live"
        live.mkdir(exist_ok=True)
        for page in sorted(FIGURES.glob("*.html")):
            back = '<a href="../index.html">What else there is to see</a>'
            text = page.read_text(encoding="utf-8").replace("<!-- back -->", back)
            (live / page.name).write_text(text, encoding="utf-8")
        thumbnails = Path(app.outdir) / "figures"
        thumbnails.mkdir(exist_ok=True)
        for picture in (*FIGURES.glob("*.png"), *FIGURES.glob("*.webp"), *FIGURES.glob("*.html")):
            shutil.copy(picture, thumbnails)
