"""One thread per computation: small matrices gain nothing from more, and lose a lot on cores that are shared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_lock = threading.RLock()  # the counts are global: who comes second waits


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's and NumPy's linear algebra on one thread each; numbers are then the same on every machine size."""
    with _lock:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with _libraries().limit(limits=1):
                yield
        finally:
            torch.set_num_threads(before)


@cache
def _libraries():
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
