"""What every picture keeps: a sentence above, type that can be read, one colour for one thing, marks where it clips."""

from itertools import pairwise
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import kfac_viz as kv
from kfac_viz.show import METHODS, SPACES, CurveView, MapView, Plot, Style
from kfac_viz.show.live import Live
from kfac_viz.show.style import luminance, rc
from kfac_viz.studies.common.result import curve

NETWORK = dict(n=40, widths=(5, 4))
PICTURES = {  # run, plot, parameters, and what a slider changes
    "fisher": (NETWORK | dict(repeats=2), dict(damping=0.1, weight=-1.0, samples=2)),
    "hessian": (NETWORK | dict(repeats=2), dict(damping=0.1, steps=50)),
    "kfac": (NETWORK | dict(repeats=2, steps=3), dict(damping=0.1, steps=5)),
    "kronecker_products": (dict(n=40, repeats=2, steps=3), dict(damping=0.1, steps=5)),
    "damping": (NETWORK | dict(repeats=2, steps=3), dict(damping=0.1, steps=5)),
    "two_levels": (
        dict(local=8, subdomains=(2, 4), shown=3, clusters=(2, 5), n=60, repeats=2),
        dict(damping=0.1, sweeps=3),
    ),
    "coarse_space": (NETWORK, dict(damping=1.0, per_layer=1, correction="additive")),
    "one_step": (NETWORK, dict(damping=1.0, per_layer=1, correction="additive", steps=5)),
    "coarse_space_sizes": (NETWORK | dict(sizes=(0, 1, 3), repeats=2), dict(damping=1.0)),
    "depth": (
        dict(
            layers=(2, 3),
            width=6,
            n=40,
            steps=2,
            repeats=2,
            networks=("planted",),
            damping_shares=(1e-3, 1e-2),
            measured="",
        ),
        dict(damping_share=0.05, per_layer=2, steps=3),
    ),
    "layer_overlap": (NETWORK | dict(repeats=2, steps=3), dict(damping=0.1, steps=5)),
    "pde": (dict(widths=(6, 5), points=24, steps=5, at_step=4, per_layer=2), dict(damping=1e-3, at_step=2)),
    "solving": ({}, dict(damping=0.1)),
    "training": ({}, {}),
    "published": ({}, {}),
    "which_method": ({}, {}),
    "speed": ({}, {}),
}
MEASURED = ("speed", "training", "published", "which_method")  # whose pictures no slider moves
SMALLEST = 11  # pixels, of type in a picture of 900: what a panel has in a window of 1366 × 768


@pytest.fixture(scope="module", params=PICTURES)
def picture(request):
    """A study on a small network with its plot, which no test changes."""
    first, _ = PICTURES[request.param]
    study = getattr(kv.studies, request.param)
    result = study.run(**first)
    return SimpleNamespace(name=request.param, study=study, result=result, plot=study.Plot(result))


@pytest.fixture(scope="module")
def live(picture):
    """Another plot of the same, as a panel draws it."""
    return Live(picture.study.Plot(picture.result))


def test_a_sentence_stands_above_and_says_a_number(picture):
    name, result, plot = picture.name, picture.result, picture.plot
    head, where = plot.title.get_text(), plot.subtitle.get_text()
    assert head == result.headline and where.startswith(result.where)
    assert any(letter.isdigit() for letter in head) and " " in head and not head.endswith(".")
    assert name in MEASURED or ("λ = " in where and any(data in where for data in ("digits", "planted", "Poisson")))
    for text in (plot.title, plot.subtitle):
        assert text.get_window_extent().x1 <= plot.figure.bbox.width, text.get_text()
    label = plot.figure.get_label()
    assert label.startswith(f"{head}. {result.where}. ") and label.endswith(".")


def test_type_can_be_read(picture):
    figure = picture.plot.figure
    share = 900 / figure.bbox.width
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            assert text.get_fontsize() * figure.dpi / 72 * share >= SMALLEST - 1e-6, text.get_text()


def test_words_stand_out_from_their_ground(picture):
    """A contrast of 4.5 : 1, on white and in the cells of maps."""
    figure = picture.plot.figure
    grounds = {}
    for ax in figure.axes:
        for mesh in (x for x in ax.collections if isinstance(x, QuadMesh)):
            colours = mesh.cmap(mesh.norm(mesh.get_array()))
            colours = colours.reshape(-1, int(ax.get_xlim()[1]), 4)
            for text in ax.texts:
                column, row = map(int, text.get_position())
                grounds[id(text)] = colours[row, column, :3]
    for text in figure.findobj(Text):
        on_image = text.axes is not None and text.axes.images and text in text.axes.texts
        if text.get_visible() and text.get_text().strip() and not on_image:
            both = luminance(to_rgb(text.get_color())), luminance(grounds.get(id(text), (1, 1, 1)))
            assert (max(both) + 0.05) / (min(both) + 0.05) >= 4.5, text


def test_matrices_are_drawn_as_matplotlib_draws_them(picture, live, monkeypatch):
    """To the last bit: a live panel writes their pixels by itself."""
    quick = np.asarray(live.picture(picture.result))
    monkeypatch.setattr(live, "_draw", lambda artist: artist.draw(live.canvas.get_renderer()))
    np.testing.assert_array_equal(quick, np.asarray(live.picture(picture.result)))


def test_every_artist_that_moves_is_animated(picture, live):
    """After an update the picture over the old background is that of a fresh figure."""
    first, then = PICTURES[picture.name]
    before, after = picture.result, picture.study.run(**first | then)
    fresh = Live(picture.study.Plot(after))
    start = np.asarray(live.picture(before), dtype=float)
    assert live.plot.fits(after)
    moved, whole = (np.asarray(x.picture(after), dtype=float) for x in (live, fresh))
    assert (abs(moved - whole).max(axis=2) > 60).mean() < 5e-4
    assert picture.name in MEASURED or (abs(moved - start).max(axis=2) > 60).mean() > 1e-4


def test_one_colour_for_one_thing():
    assert METHODS["kfac"].color == METHODS["block-diagonal"].color == kv.studies.two_levels.BLOCKS.color
    corrections = {METHODS[name].color for name in ("additive", "a-def1", "a-def2", "balanced")}
    spaces = {style.color for style in SPACES.values()}
    others = {style.color for name, style in METHODS.items() if style.label.split()[0] != "two-level,"}
    assert len(corrections) == 4 and len(spaces) == len(kv.coarse.SPACES)
    assert not corrections & spaces and not (corrections | spaces) & others


def test_a_map_finds_the_place_of_each_number():
    places = [("two", "x"), ("two", "y"), ("one", "x"), ("one", "y")]
    values = dict(zip(places, (0.1, 0.2, 0.3, 0.4), strict=True))
    with matplotlib.rc_context(rc()):
        view = MapView(Figure().subplots(), [(*place, 0.0) for place in places], "title", limits=(0, 1))
        view.update([(*place, values[place]) for place in reversed(places)])
        fresh = MapView(Figure().subplots(), [(*place, values[place]) for place in places], "title", limits=(0, 1))
    assert view.words() == "title. two: 0.10, 0.20; one: 0.30, 0.40."
    np.testing.assert_array_equal(view.mesh.get_array(), fresh.mesh.get_array())
    assert [t.get_text() for t in view.texts] == [t.get_text() for t in fresh.texts]


def test_the_layers_of_a_transformer_are_named_and_no_name_covers_another():
    result = kv.studies.coarse_space.run(data="attention", n=40)
    names, partition = result.partition.names, result.partition
    assert f"{partition.size} of {partition.size} parameters in {len(names)} layers" in result.where
    with matplotlib.rc_context(rc()):
        view = kv.studies.coarse_space.Plot(result).views["fisher"]
        labels, numbers = view.ax.get_yticklabels(), view.ax.get_xticklabels()
        assert [t.get_text() for t in labels] == [f"{l + 1}: {x.split('.')[-1]}" for l, x in enumerate(names)]
        boxes, below = ([text.get_window_extent() for text in texts] for texts in (labels, numbers))
    assert all(upper.y0 >= lower.y1 - 3 for upper, lower in pairwise(boxes))  # the boxes of letters without tails
    assert all(left.x1 <= right.x0 for left, right in pairwise(below))
    assert min(box.x0 for box in boxes) >= 0
    for (l, m), region in zip(np.ndindex(len(names), len(names)), view.regions(), strict=True):
        assert f"({names[l]})" in region[-1] and f"({names[m]})" in region[-1]


SERIES = {"a": Style("a", "#0072B2"), "b": Style("b", "#D55E00", "s", "--")}


def view_of(curves, **options):
    with matplotlib.rc_context(rc()):
        ax = Figure().subplots()
        return CurveView(ax, SERIES, curves, "title", x="x", xlim=(0.5, 5), ylim=(1, 10), **options)


def test_bands_reach_from_the_lowest_to_the_highest_seed():
    view = view_of({"a": curve([1, 2, 4], [[2, 3, 4], [3, 4, 5], [4, 6, 8]])})
    assert list(view.lines) == ["a"]  # no curve, no line
    np.testing.assert_array_equal(view.lines["a"].get_ydata(), [3, 4, 5])
    corners = view.bands["a"].get_paths()[0].vertices
    assert {(1.0, 2.0), (1.0, 4.0), (4.0, 4.0), (4.0, 8.0)} <= set(map(tuple, corners))


def test_what_leaves_the_axes_is_marked_where_it_leaves():
    view = view_of({"a": curve([1, 2, 3, 4], [5, 20, 30, 5]), "b": curve([1, 2, 3, 4], [0.0, -1, 2, 0.5])})
    above, below = (marks.get_offsets().tolist() for marks in view.leaves)
    assert above == [[2, 10], [3, 10]] and below == [[2, 1], [4, 1]]  # zero has no place on the axis, either


def test_of_two_equal_curves_both_can_be_seen():
    same = curve(range(1, 40), np.full(39, 3.0))
    lines = view_of({"a": same, "b": same}).lines
    first, second = lines.values()
    assert first.get_linewidth() > second.get_linewidth() and first.get_markersize() > second.get_markersize()
    assert first.get_markevery() != second.get_markevery()


def test_a_plot_that_adds_what_changes_and_cannot_change_it_is_refused():
    class Still(Plot):
        def build(self, result):
            self.words = lambda result: ""

    class Forgetful(Still):
        def build(self, result):
            super().build(result)
            self.add(self.text(1, 1, "0.5"))

    result = SimpleNamespace(headline="One half", where="Here", partition=1)
    assert Still(result).figure.get_label()
    with pytest.raises(TypeError, match="Forgetful adds what changes, and has no move"):
        Forgetful(result)
