"""One look for every figure, whatever the reader's own style: a palette for methods, and rcParams as a plain dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Style(NamedTuple):
    """How one method is drawn everywhere, told apart by colour, marker and line alike."""

    label: str
    color: str
    marker: str = "o"
    line: str = "-"

    @property
    def ink(self) -> str:
        """The colour, dark enough for words on white: a contrast of at least 4.5 : 1 (WCAG 2.2, 1.4.3)."""
        channels = [int(self.color[i : i + 2], 16) for i in (1, 3, 5)]
        for shade in range(100, 0, -1):
            darker = [round(channel * shade / 100) for channel in channels]
            if 1.05 / (luminance([x / 255 for x in darker]) + 0.05) >= 4.5:
                break
        return "#" + "".join(f"{x:02X}" for x in darker)


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance of a colour whose channels are in [0, 1] (WCAG 2.2)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def words_on(rgb: Sequence[float]) -> str:
    """Black or white, whichever stands out from this colour: by 4.5 : 1 at least."""
    return "black" if luminance(rgb) > 0.179 else "white"


# Told apart under the common colour vision deficiencies: methods in colours of Okabe and Ito, what corrects them in
# warm ones, and coarse spaces in the muted ones of Paul Tol. Block Jacobi is one blue, whatever it does in its blocks.
BLUE, NAVY = "#0072B2", "#003F66"  # navy where λ is shared out between K-FAC's factors
METHODS: dict[str, Style] = {
    "exact": Style("exact natural gradient", "#000000", "*", "-"),
    "gradient": Style("gradient", "#888888", "h", ":"),
    "none": Style("no preconditioner", "#888888", "h", ":"),
    "adam": Style("Adam", "#56B4E9", "v", ":"),
    "diagonal": Style("diagonal", "#56B4E9", "v", "--"),
    "block-diagonal": Style("exact blocks", BLUE, "s", "--"),
    "kfac": Style("K-FAC", BLUE, "o", "-"),
    "muon": Style("Muon", "#CC79A7", "P", "-."),
    "soap": Style("SOAP", "#009E73", "d", ":"),
    "shampoo-optimizer": Style("Shampoo", "#B8860B", "^", ":"),
    "shampoo": Style("Shampoo's square", "#B8860B", "^", "--"),
    "nearest": Style("nearest, Frobenius", "#C51B7D", "v", "-."),
    "kl": Style("nearest, KL", "#5E3C99", "D", "-"),
    "factored": Style("K-FAC, factored", NAVY, "p", "-."),
    "sampled": Style("K-FAC, sampled labels", "#882255", "X", "-."),
    "ekfac": Style("EKFAC", "#009E73", "d", "--"),
    "block-tridiagonal": Style("block-tridiagonal", "#CC79A7", "P", "-"),
    "additive": Style("two-level, additive", "#E69F00", "^", "-"),
    "a-def1": Style("two-level, A-DEF1", "#CC6677", "<", "--"),
    "a-def2": Style("two-level, A-DEF2", "#8C510A", ">", "-."),
    "balanced": Style("two-level, balanced", "#D55E00", "D", "-"),
}

SPACES: dict[str, Style] = {
    "smooth": Style("trailing eigenvectors", "#999933", "s", "--"),
    "random": Style("random", "#BBA94F", "X", ":"),
    "nicolaides": Style("constants", "#44AA99", "^", "-"),
    "optimal": Style("optimal", "#332288", "*", "--"),
    "krylov": Style("Krylov pieces", "#AA4499", "P", "-."),
    "spectral": Style("leading eigenvectors", "#117733", "D", "-"),
}

SIGNED = "RdBu_r"  # zero is white, for matrices whose sign means something
INK = "#222222"
MUTED = "#666666"
FAINT = "#BBBBBB"


def styled(space: str, correction: str) -> Style:
    """The colour says which columns, the line how they are combined."""
    style = SPACES[space]
    return style._replace(label=f"{style.label}, {correction}", line="-" if correction == "balanced" else ":")


def rc(size: float = 9.5) -> dict:
    """All rcParams for ``matplotlib.rc_context``, but for the backend's: matplotlib's own defaults with these changes,
    so that nothing of the reader's style is left; ``size`` is the text size in points."""
    from matplotlib import rcParamsDefault

    return {key: value for key, value in rcParamsDefault.items() if not key.startswith(("backend", "interactive"))} | {
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same outlines everywhere
        "font.size": size,
        "axes.titlesize": size * 1.05,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": size,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "xtick.labelsize": size * 0.95,
        "ytick.labelsize": size * 0.95,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "legend.frameon": False,
        "legend.fontsize": size * 0.95,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "figure.facecolor": "white",
        "svg.fonttype": "path",
        "svg.hashsalt": "kfac_viz",
        "path.simplify": False,
    }
