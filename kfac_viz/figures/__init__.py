"""Results to matplotlib figures, and figures to files. Nothing here computes, and nothing here knows widgets."""

from .coarse_space import CoarseSpacePlot, plot_coarse_space
from .damping import DampingPlot, plot_damping
from .fisher import FisherPlot, plot_fisher
from .kfac import KfacPlot, plot_kfac
from .save import save
from .style import FLAVOURS, METHODS, SPACES

__all__ = [
    "FLAVOURS",
    "METHODS",
    "SPACES",
    "CoarseSpacePlot",
    "DampingPlot",
    "FisherPlot",
    "KfacPlot",
    "plot_coarse_space",
    "plot_damping",
    "plot_fisher",
    "plot_kfac",
    "save",
]
