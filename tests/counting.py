"""Counts what a call asks of the device: operations sent to it, views not counted, and numbers read from it."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What makes the host wait on a GPU. `.tolist()`, `.cpu()` and `.numpy()` of a device's tensor copy it first.
# Views that are not marked as such, and memory without a kernel.
FREE = (
    "detach",
    "_unsafe_view",
    "alias",
    "lift_fresh",
    "squeeze_",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "promote_types",
    "_record_function_enter_new",
    "_record_function_exit",
)
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class Counting(TorchDispatchMode):
    """``with Counting() as seen: ...`` then ``seen.operations``, ``seen.reads`` and ``seen.names``.

    ``.tolist()`` of a CPU tensor is not an operation; it is counted through :meth:`listening`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.reads = 0

    @property
    def operations(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS:
            self.reads += 1
        elif not func.is_view and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Counting:
        self._tolist = torch.Tensor.tolist
        mine, original = self, self._tolist

        def tolist(tensor):
            mine.reads += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return original(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        torch.Tensor.tolist = self._tolist
        super().__exit__(*exc)
