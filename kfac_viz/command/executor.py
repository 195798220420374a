"""Run notebooks through papermill, several at a time: a thread each, and a process for each kernel.

A kernel ends by itself when the process that started it does, however that happens.
"""

import logging
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from kfac_viz.checkout import ROOT

# Kernels inherit these. Small matrices are faster on one thread, and kernels side by side would fight over the cores.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not the user's of the same name
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # no warning of the debugger in each kernel
}


def run_notebooks(orders: list[dict], workers: int) -> Iterator[tuple[int, dict]]:
    """Execute each order, the keyword arguments of ``papermill.execute_notebook``.

    Yields:
        ``(index of the order, event)``; an event is ``{"cell": 3}`` when that cell of the notebook starts,
        counted from 1, and finally ``{"error": None}`` or ``{"error": "what happened", "cell": 3}``.
    """
    os.environ.update(_ENVIRONMENT)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) != path[0]:  # kernels import this copy of the package, not an installed one
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, path)])
    events, left = queue.SimpleQueue(), len(orders)
    pool = ThreadPoolExecutor(workers)
    for index, order in enumerate(orders):
        pool.submit(_run, order, lambda event, index=index: events.put((index, event)))
    try:
        while left:
            try:
                index, event = events.get(timeout=0.5)
            except queue.Empty:  # an interrupt is met now and then, on every system
                continue
            left -= "error" in event
            yield index, event
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run(order: dict, tell: Callable[[dict], None]) -> None:
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # errors reach the reader as events
    reached = 0

    def start(cell, cell_index: int) -> None:
        nonlocal reached
        reached += "injected-parameters" not in cell.metadata.tags  # papermill's own cell does not count
        tell({"cell": reached})

    for _ in range(2):
        error = None
        try:
            execute_notebook(
                **order,
                on_cell_start=start,
                kernel_name="python3",
                progress_bar=False,
                store_widget_state=False,
                extra_arguments=["--log-level=50"],
            )
        except PapermillExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        # Kernels that start at the same moment may pick the same port: try once more before any cell ran.
        if error is None or reached:
            break
    tell({"error": error} | ({"cell": reached} if error else {}))
