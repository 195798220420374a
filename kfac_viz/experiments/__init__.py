"""Plain parameters to frozen results. Ranges and choices stand once, in the signature of each ``run_x``."""

from __future__ import annotations

from collections.abc import Callable

from .coarse_space import CoarseSpaceResult, run_coarse_space

# The notebooks that can be regenerated, and the function whose signature states their parameters.
NOTEBOOKS: dict[str, Callable] = {}

__all__ = ["NOTEBOOKS", "CoarseSpaceResult", "run_coarse_space"]
