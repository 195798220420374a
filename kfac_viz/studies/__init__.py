"""One file for each question: its parameters, what is computed, how it is drawn, and its exercises."""

from __future__ import annotations

from collections.abc import Callable

from ..parameters import take
from ..show.save import save
from .claims import ClaimsPlot, ClaimsResult, run_claims
from .coarse_sizes import CoarseSizesPlot, CoarseSizesResult, run_coarse_sizes
from .coarse_space import CoarseSpacePlot, CoarseSpaceResult, run_coarse_space
from .damping import DampingPlot, DampingResult, run_damping
from .depth import DepthPlot, DepthResult, run_depth
from .exhibits import Published
from .fisher import FisherPlot, FisherResult, run_fisher
from .kfac import KfacPlot, KfacResult, run_kfac
from .one_step import OneStepPlot, OneStepResult, run_one_step
from .origin import OriginPlot, OriginResult, run_origin
from .pde import PdePlot, PdeResult, run_pde
from .playground import save_moving, save_page
from .published import PublishedPlot, PublishedResult, run_published, toy
from .race import save_race
from .speed import SpeedPlot, SpeedResult, run_speed
from .training import TrainingPlot, TrainingResult, run_training
from .which import WhichPlot, WhichResult, run_which

plot_claims = ClaimsPlot.draw
plot_coarse_sizes, plot_coarse_space, plot_damping = CoarseSizesPlot.draw, CoarseSpacePlot.draw, DampingPlot.draw
plot_depth, plot_fisher, plot_kfac = DepthPlot.draw, FisherPlot.draw, KfacPlot.draw
plot_origin, plot_pde, plot_speed = OriginPlot.draw, PdePlot.draw, SpeedPlot.draw
plot_one_step, plot_published, plot_training = OneStepPlot.draw, PublishedPlot.draw, TrainingPlot.draw
plot_which = WhichPlot.draw

# The notebooks that can be regenerated, and the function whose signature states their parameters.
NOTEBOOKS: dict[str, Callable] = {
    "00_playground": run_coarse_space,
    "01_fisher": run_fisher,
    "02_kfac": run_kfac,
    "03_damping": run_damping,
    "04_where_it_comes_from": run_origin,
    "05_coarse_space": run_coarse_space,
    "05_one_step": run_one_step,
    "05_coarse_space_sizes": run_coarse_sizes,
    "06_claims": run_claims,
    "06_depth": run_depth,
    "07_training": run_training,
    "08_published": run_published,
    "09_speed": run_speed,
    "10_pde": run_pde,
    "11_which_method": run_which,
}
for _name, _run in reversed(NOTEBOOKS.items()):
    _run.notebook = _name  # what a panel says; of two notebooks the first
