"""Plain parameters to frozen results. Ranges and choices stand once, in the signature of each ``run_x``."""

from __future__ import annotations

from collections.abc import Callable

from .coarse_sizes import CoarseSizesResult, run_coarse_sizes
from .coarse_space import CoarseSpaceResult, run_coarse_space
from .damping import DampingResult, run_damping
from .depth import DepthResult, run_depth
from .fisher import FisherResult, run_fisher
from .kfac import KfacResult, run_kfac
from .origin import OriginResult, run_origin
from .speed import SpeedResult, run_speed

# The notebooks that can be regenerated, and the function whose signature states their parameters.
NOTEBOOKS: dict[str, Callable] = {
    "00_playground": run_coarse_space,
    "01_fisher": run_fisher,
    "02_kfac": run_kfac,
    "03_damping": run_damping,
    "04_where_it_comes_from": run_origin,
    "05_coarse_space": run_coarse_space,
    "06_depth": run_depth,
    "09_speed": run_speed,
}

__all__ = [
    "NOTEBOOKS",
    "CoarseSizesResult",
    "CoarseSpaceResult",
    "DampingResult",
    "DepthResult",
    "FisherResult",
    "KfacResult",
    "OriginResult",
    "SpeedResult",
    "run_coarse_sizes",
    "run_coarse_space",
    "run_damping",
    "run_depth",
    "run_fisher",
    "run_kfac",
    "run_origin",
    "run_speed",
]
