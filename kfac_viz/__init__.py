"""See curvature in neural networks, and what a coarse correction to K-FAC can and cannot do.

>>> import torch, kfac_viz as kv
>>> problem = kv.problems.digits(widths=(4, 4), side=4, n=50)
>>> F = kv.capture(problem.model, problem.inputs, likelihood=problem.likelihood)
>>> A, M = F.damped(1e-2), kv.KFAC(F, damping=1e-2)
>>> T = kv.TwoLevel(A, M, kv.coarse.spectral(F, per_layer=2), correction="balanced")
>>> kv.captured_decrease(A, problem.gradient(), T @ problem.gradient()) > 0
True
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .method import coarse
from .method.columns import CoarseSpace
from .method.fisher import Fisher
from .method.kfac import EKFAC, KFAC, BlockTridiagonal
from .method.kronecker import KroneckerFactors
from .method.kronecker_fisher import KroneckerFisher
from .method.krylov import captured_decrease, condition_number, exact_direction, pcg, spectrum
from .method.operator import Damped, Dense, Operator
from .method.partition import Partition
from .method.preconditioner import BlockDiagonal, Diagonal, Exact, Identity, Nothing, Preconditioner
from .method.two_level import CoarseCorrection, TwoLevel
from .scores.capture import capture
from .scores.hessian import Hessian
from .scores.layers import partition_of
from .scores.likelihood import nll

try:
    __version__ = version("kfac_viz")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0"

# Loaded at first use, so that importing the package costs little more than importing torch.
_LAZY = {
    "TwoLevelKFAC": "train.optimizer:TwoLevelKFAC",
    "exercises": "studies.common.exercises",
    "explore": "pages.explore:explore",
    "pages": "pages",
    "panel": "show.panel:panel",
    "problems": "problems",
    "save": "show.save:save",
    "studies": "studies",
}

__all__ = [
    "BlockDiagonal", "BlockTridiagonal", "CoarseCorrection", "CoarseSpace", "Damped", "Dense", "Diagonal", "EKFAC",
    "Exact", "Fisher", "Hessian", "Identity", "KFAC", "KroneckerFactors", "KroneckerFisher", "Nothing", "Operator",
    "Partition", "Preconditioner", "TwoLevel", "captured_decrease", "capture", "coarse", "condition_number",
    "exact_direction", "nll", "partition_of", "pcg", "spectrum", *_LAZY,
]  # fmt: skip


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'kfac_viz' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = import_module(f".{module}", __name__)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
