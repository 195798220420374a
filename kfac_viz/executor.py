"""Run notebooks through papermill, several at a time, each worker a process of its own.

A worker reads one order per line of standard input and answers with one event per line. It is started as a
script, so that it never imports the package (and torch): only the notebooks' kernels do. It ends when its
input ends, so also when the process that started it is killed, and its kernel ends with it.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator

# Small matrices are faster on one thread, and kernels side by side would fight over the cores.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not the user's of the same name
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # no warning of the debugger in each kernel
}


def run_notebooks(orders: list[dict], workers: int) -> Iterator[tuple[int, dict] | None]:
    """Execute each order, the keyword arguments of ``papermill.execute_notebook``.

    Yields:
        ``(index of the order, event)``; an event is ``{"cell": 3}`` when that cell of the notebook starts,
        counted from 1, and finally ``{"error": None}`` or ``{"error": "what happened", "cell": 3}``.
        ``None`` when half a second has passed without an event.
    """
    waiting, events, processes = queue.SimpleQueue(), queue.SimpleQueue(), []
    for numbered in enumerate(orders):
        waiting.put(numbered)
    threads = [
        threading.Thread(target=_feed, args=(waiting, events, processes), daemon=True)
        for _ in range(min(workers, len(orders)))
    ]
    for thread in threads:
        thread.start()
    left = len(orders)
    try:
        while left:
            try:
                index, event = events.get(timeout=0.5)
            except queue.Empty:
                yield None
                continue
            left -= "error" in event
            yield index, event
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended; its kernel ends by itself


def _feed(waiting: queue.SimpleQueue, events: queue.SimpleQueue, processes: list[subprocess.Popen]) -> None:
    """Keep one worker busy, and replace it if it dies."""
    process = None
    while not waiting.empty():
        try:
            index, order = waiting.get_nowait()
        except queue.Empty:
            break
        if process is None or process.poll() is not None:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for the process that started it
            )
            processes.append(process)
        event, cell = {}, None
        try:
            print(json.dumps(order), file=process.stdin, flush=True)
            while "error" not in event:
                event = json.loads(process.stdout.readline())
                cell = event.get("cell", cell)
                events.put((index, event))
        except (OSError, ValueError):  # a broken pipe, or the empty line at its end
            process.kill()
            process.wait()
            events.put((index, {"error": "The process that ran the notebook died.", "cell": cell}))
    if process:
        process.stdin.close()


def _work() -> None:
    from papermill import execute_notebook
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    logging.disable()  # errors are answered

    class Engine(NBClientEngine):
        """papermill's own, which also says when a cell starts."""

        @classmethod
        def execute_managed_notebook(cls, nb_man, *args, **kwargs):
            start = nb_man.cell_start

            def cell_start(source, cell_index, **more):
                nonlocal cell
                injected = ["injected-parameters" in each.metadata.tags for each in nb_man.nb.cells]
                cell = cell_index + 1 - any(injected[: cell_index + 1])
                print(json.dumps({"cell": cell}), file=answers, flush=True)
                start(source, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, *args, **kwargs)

    papermill_engines.register("telling", Engine)
    orders = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    while True:
        order = orders.get()
        for attempt in (1, 2):
            cell, result = None, {"error": None}
            try:
                execute_notebook(**order, engine_name="telling", kernel_name="python3", progress_bar=False,
                                 store_widget_state=False, extra_arguments=["--log-level=50"])
            except PapermillExecutionError as failure:
                result = {"error": f"{failure.ename}: {failure.evalue}", "cell": cell}
            except Exception as failure:
                result = {"error": f"{type(failure).__name__}: {failure}", "cell": cell}
            # Kernels that start at the same moment may pick the same port: try once more before any cell ran.
            if result["error"] is None or cell or attempt == 2:
                break
        print(json.dumps(result), file=answers, flush=True)


def _read(orders: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    _work()
