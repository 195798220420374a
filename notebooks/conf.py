"""The static site, ``make site``: README, every executed notebook, and the pages that need no kernel."""

import html
import re
import shutil
from pathlib import Path

from PIL import Image
from sphinx.application import Sphinx

from kfac_viz.command.main import source_hash, tables_hash
from kfac_viz.show.files import sha256

HERE = Path(__file__).parent
ROOT = HERE.parent
FIGURES = ROOT / "figures"

project, author, copyright = "kfac_viz", "the authors of kfac_viz", "the authors of kfac_viz, MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
exclude_patterns = ["**/.ipynb_checkpoints", "class"]
html_theme, html_title, html_show_sourcelink, html_show_sphinx = "furo", "kfac_viz", False, False
html_static_path, html_css_files = ["site.css"], ["site.css"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nitpicky = True  # a name of this package that a docstring points to has to be on a page
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|pathlib|matplotlib|ipywidgets|scipy|numpy|pandas)\..*"),
    ("py:class", r"(Tensor|Path|Figure|LinearOperator|Saved|t\.Any|[-0-9.e]+)"),  # in signatures
    ("py:class", r"kfac_viz\..*\.(Result|Range|Panel|Verdict|Eigen|Image|ParameterSpace|Piece|(Has)?Scores|Stacks)"),
]
autodoc_member_order, autodoc_typehints_format, python_maximum_signature_line_length = "bysource", "short", 100
suppress_warnings = ["myst.xref_missing", "myst.header"]  # README's links into the repository

nb_execution_mode, nb_execution_timeout, nb_execution_raise_on_error = "cache", 600, True
# What was executed is kept for as long as the package and the measured tables stay as they are.
kept = FIGURES / ".made" / "site" / sha256(f"{source_hash()}{tables_hash(FIGURES / 'benchmarks')}".encode())[:12]
for older in kept.parent.glob("*"):
    if older != kept:
        shutil.rmtree(older, ignore_errors=True)
nb_execution_cache_path = str(kept)
# Of a live panel the picture that it carries for pages without a kernel; nothing is loaded from elsewhere.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_ipywidgets_js: dict[str, dict[str, str]] = {}


def setup(app: Sphinx) -> None:
    app.connect("build-finished", copy_live_pages)
    app.connect("build-finished", mend_pages)


def mend_pages(app: Sphinx, error: Exception | None) -> None:
    """Let the links of README and gallery, which are those of the repository, lead to their places on the site, and
    give each picture the words that it carries."""
    if error is not None or app.builder.format != "html":
        return
    site = Path(app.outdir)

    def link(target: re.Match) -> str:
        path = Path(target[1])
        if path.suffix == ".ipynb" or path.name == "notation.md":
            return f'href="{path.stem}.html"'
        if path.name == "README.md":
            return 'href="gallery.html"'
        if path.suffix == ".html":
            return f'href="live/{path.name}"'
        source = ROOT / path if path.parent.name else FIGURES / path
        source = source if source.exists() else ROOT / path
        there = site / source.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, there)
        return f'href="{source.relative_to(ROOT).as_posix()}"'

    def words(image: re.Match) -> str:
        with Image.open(site / image[1]) as picture:
            return f'alt="{html.escape(getattr(picture, "text", {}).get("Description", ""))}" src="{image[1]}"'

    download = r'<a class="reference download internal" download="" href="_downloads/\w+/(\w+\.html)">'
    for page in site.glob("*.html"):
        text = re.sub(download, r'<a href="live/\1">', page.read_text(encoding="utf-8"))  # to be opened, not kept
        text = re.sub(r'href="#([\w/.]*\.(?:ipynb|md|html|svg|csv|json|py|cff))"', link, text)
        page.write_text(re.sub(r'alt="_images/[^"]*" src="(_images/[^"]*\.png)"', words, text), encoding="utf-8")


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
        for picture in (*FIGURES.glob("*.png"), *FIGURES.glob("*.webp")):
            shutil.copy(picture, thumbnails)
