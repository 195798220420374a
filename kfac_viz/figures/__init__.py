"""Results to matplotlib figures, and figures to files. Nothing here computes, and nothing here knows widgets."""

from .coarse_space import CoarseSpacePlot, plot_coarse_space
from .save import save
from .style import METHODS, SPACES

__all__ = ["METHODS", "SPACES", "CoarseSpacePlot", "plot_coarse_space", "save"]
