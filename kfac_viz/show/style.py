"""One look for every figure: a palette for methods, and rcParams as a plain dict."""

from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    """How one method is drawn everywhere, told apart by colour, marker and line alike."""

    label: str
    color: str
    marker: str = "o"
    line: str = "-"


# Okabe and Ito's colours, told apart under every common colour vision deficiency.
METHODS: dict[str, Style] = {
    "exact": Style("exact natural gradient", "#000000", "*", "-"),
    "gradient": Style("gradient", "#888888", "x", ":"),
    "adam": Style("Adam", "#56B4E9", "v", ":"),
    "diagonal": Style("diagonal", "#56B4E9", "v", "--"),
    "block-diagonal": Style("exact blocks", "#009E73", "s", "--"),
    "kfac": Style("K-FAC", "#0072B2", "o", "-"),
    "factored": Style("K-FAC, factored damping", "#003F66", "p", "-."),
    "sampled": Style("K-FAC, sampled labels", "#882255", "X", "-."),
    "ekfac": Style("EKFAC", "#0072B2", "d", "--"),
    "block-tridiagonal": Style("block-tridiagonal", "#009E73", "P", "-"),
    "additive": Style("two-level, additive", "#E69F00", "^", "-"),
    "a-def1": Style("two-level, A-DEF1", "#CC79A7", "<", "--"),
    "a-def2": Style("two-level, A-DEF2", "#CC79A7", ">", "-."),
    "balanced": Style("two-level, balanced", "#D55E00", "D", "-"),
}

SPACES: dict[str, Style] = {
    "nicolaides": Style("constants (Nicolaides)", "#E69F00", "^", "-"),
    "spectral": Style("leading eigenvectors", "#D55E00", "D", "-"),
    "smooth": Style("trailing eigenvectors", "#009E73", "s", "--"),
    "krylov": Style("Krylov pieces", "#CC79A7", "P", "-."),
    "random": Style("random", "#888888", "x", ":"),
    "optimal": Style("optimal", "#000000", "*", "--"),
}

FLAVOURS: dict[str, Style] = {
    "exact": Style("exact Fisher", "#000000", "*", "-"),
    "mc": Style("Monte Carlo Fisher", "#009E73", "s", "-"),
    "empirical": Style("empirical Fisher", "#CC79A7", "P", "--"),
}

SIGNED = "RdBu_r"  # zero is white, for matrices whose sign means something
INK = "#222222"
MUTED = "#666666"
FAINT = "#BBBBBB"


def rc(size: float = 9.0) -> dict:
    """rcParams for ``matplotlib.rc_context``; ``size`` is the text size in points."""
    return {
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same outlines everywhere
        "font.size": size,
        "axes.titlesize": size * 1.1,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": size,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "xtick.labelsize": size * 0.9,
        "ytick.labelsize": size * 0.9,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "legend.frameon": False,
        "legend.fontsize": size * 0.9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "figure.facecolor": "white",
        "svg.fonttype": "path",
        "svg.hashsalt": "kfac_viz",
        "path.simplify": False,
    }
