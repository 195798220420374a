"""Results to matplotlib figures, and figures to files. Nothing here computes, and nothing here knows widgets."""

from .coarse_sizes import CoarseSizesPlot, plot_coarse_sizes
from .coarse_space import CoarseSpacePlot, plot_coarse_space
from .damping import DampingPlot, plot_damping
from .depth import DepthPlot, plot_depth
from .fisher import FisherPlot, plot_fisher
from .kfac import KfacPlot, plot_kfac
from .origin import OriginPlot, plot_origin
from .page import save_page
from .save import save
from .speed import SpeedPlot, plot_speed
from .style import FLAVOURS, METHODS, SPACES

__all__ = [
    "FLAVOURS",
    "METHODS",
    "SPACES",
    "CoarseSizesPlot",
    "CoarseSpacePlot",
    "DampingPlot",
    "DepthPlot",
    "FisherPlot",
    "KfacPlot",
    "OriginPlot",
    "SpeedPlot",
    "plot_coarse_sizes",
    "plot_coarse_space",
    "plot_damping",
    "plot_depth",
    "plot_fisher",
    "plot_kfac",
    "plot_origin",
    "plot_speed",
    "save",
    "save_page",
]
