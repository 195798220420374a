"""Whatever style the reader has chosen for matplotlib, figures and panels are the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.style
import pytest

import kfac_viz as kv
from kfac_viz.show.live import READ, Live
from kfac_viz.show.style import rc
from kfac_viz.studies import coarse_space, damping

NETWORK = dict(widths=(5, 4), n=40)
STUDIES = {
    "matrices": (coarse_space.run, coarse_space.Plot, NETWORK | dict(per_layer=2)),
    "curves": (damping.run, damping.Plot, NETWORK | dict(repeats=1, steps=2)),
}


def seaborn() -> None:
    import seaborn

    seaborn.set_theme(context="talk", style="darkgrid", palette="pastel", font="serif")


def own_file() -> None:
    """As a matplotlibrc file that somebody has made for a journal."""
    matplotlib.rcParams.update({
        "figure.dpi": 300, "savefig.bbox": "tight", "savefig.facecolor": "red", "savefig.dpi": 50, "font.size": 5,
        "xtick.direction": "in", "xtick.minor.visible": True, "axes.grid": True, "lines.marker": "x",
        "ytick.right": True, "axes.formatter.use_mathtext": True, "image.cmap": "jet", "legend.loc": "center",
        "image.interpolation": "bicubic", "mathtext.fontset": "cm", "svg.hashsalt": None, "path.snap": False,
        "figure.autolayout": True, "axes.titley": 2.0, "axes.unicode_minus": False, "lines.antialiased": False,
        "text.hinting": "none", "path.sketch": (1, 100, 2), "font.family": "cursive",
    })  # fmt: skip


STYLES = {
    "dark_background": lambda: matplotlib.style.use("dark_background"),
    "usetex": lambda: matplotlib.rcParams.update({"text.usetex": True}),
    "seaborn": seaborn,
    "own file": own_file,
    "fast": lambda: matplotlib.style.use(["classic", "fast"]),
}
EACH = [*((style, "matrices") for style in STYLES), ("own file", "curves")]


@pytest.fixture
def style(request):
    """Switches the reader's style on."""
    with matplotlib.rc_context():
        yield STYLES[request.param]


@cache
def results(study: str):
    run, plot, choices = STUDIES[study]
    return plot, run(**choices), run(**choices, damping=0.1)


def saved(study: str, folder: Path) -> dict[str, bytes]:
    plot, result, _ = results(study)
    kv.save(plot.draw(result), result, "figure", folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The files of every study in matplotlib's own style."""
    return {study: saved(study, tmp_path_factory.mktemp("plain")) for study in STUDIES}


@pytest.mark.parametrize(("style", "study"), EACH, indirect=["style"])
def test_a_saved_figure(study, style, plain, tmp_path):
    style()
    chosen = dict(matplotlib.rcParams)
    files = saved(study, tmp_path)
    assert dict(matplotlib.rcParams) == chosen
    assert len(files) == 4 and [name for name in files if files[name] != plain[study][name]] == []


@pytest.mark.parametrize(("style", "study"), EACH, indirect=["style"])
def test_a_frame_of_a_panel(study, style):
    """Also where the style changes after the figure was built."""
    plot, first, second = results(study)
    opened = Live.of(plot, first, None)
    pictures = [opened.show(result, "PNG").picture for result in (first, second)]
    assert pictures[0] != pictures[1]
    style()
    chosen = dict(matplotlib.rcParams)
    for live in (opened, Live.of(plot, first, None)):
        assert [live.show(result, "PNG").picture for result in (first, second)] == pictures
    assert dict(matplotlib.rcParams) == chosen


@pytest.mark.parametrize("chosen", ["dark_background", "fast"])
def test_a_panel_under_another_style(chosen):
    def opened():
        return kv.panel(coarse_space.run, coarse_space.Plot, large=[], **STUDIES["matrices"][2])

    plain = opened()
    with matplotlib.rc_context():
        STYLES[chosen]()
        panel = opened()
        assert bytes(panel._picture.value) == bytes(plain._picture.value)
        view = panel._view(panel._values | {"damping": 0.1})
    assert view == plain._view(plain._values | {"damping": 0.1})
    for each in (plain, panel):
        each.close()


def test_nothing_else_is_read_of_the_style_while_a_frame_is_drawn(monkeypatch):
    """What READ leaves out has no effect on a frame: hatches, which there are none of, and fonts, which every text
    names."""
    read = set()
    plots = [results(study) for study in STUDIES]
    lives = [Live.of(plot, first, None) for plot, first, _ in plots]
    get = type(matplotlib.rcParams).__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(type(matplotlib.rcParams), "__getitem__", lambda self, key: read.add(key) or get(self, key))
        for live, (_, _, second) in zip(lives, plots, strict=True):
            live.plot.update(second)
            live._paint_first()
            live._paint_second()
    assert {key for key in read if not key.startswith(("font.", "hatch."))} <= set(READ)


def test_the_backend_is_left_alone():
    assert not {"backend", "backend_fallback", "interactive"} & set(rc())
    before = matplotlib.get_backend()
    with matplotlib.rc_context(rc()):
        assert matplotlib.get_backend() == before
