"""Draws and moves: plots and their parts, panels, files. It knows none of the studies."""

from .bars import StepBars
from .curves import Curve, CurveView, empty_line, plain_numbers
from .maps import MapView, ratios
from .parts import ColourBar, MatrixView, PairView, limit_of
from .plot import Plot
from .style import FAINT, INK, METHODS, MUTED, SPACES, Style, styled
from .tolerance import Tolerance

__all__ = [
    "FAINT", "INK", "METHODS", "MUTED", "SPACES", "ColourBar", "Curve", "CurveView", "MapView", "MatrixView",
    "PairView", "Plot", "StepBars", "Style", "Tolerance", "empty_line", "limit_of", "plain_numbers", "ratios", "styled",
]  # fmt: skip
