"""Plain parameters to frozen results. Ranges and choices stand once, in the signature of each ``run_x``."""

from __future__ import annotations

from collections.abc import Callable

from .coarse_space import CoarseSpaceResult, run_coarse_space
from .damping import DampingResult, run_damping
from .fisher import FisherResult, run_fisher
from .kfac import KfacResult, run_kfac

# The notebooks that can be regenerated, and the function whose signature states their parameters.
NOTEBOOKS: dict[str, Callable] = {
    "01_fisher": run_fisher,
    "02_kfac": run_kfac,
    "03_damping": run_damping,
}

__all__ = [
    "NOTEBOOKS",
    "CoarseSpaceResult",
    "DampingResult",
    "FisherResult",
    "KfacResult",
    "run_coarse_space",
    "run_damping",
    "run_fisher",
    "run_kfac",
]
