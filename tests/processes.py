"""Several processes for one test: a function that each of them runs, and a time limit after which they are ended."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 8  # seconds of the process group; a loaded machine may need more only to start


def together(
    worker: Callable[..., Any], size: int, meeting: Any, *args: Any, seconds: float = 300, backend: str = "gloo"
) -> list[Any]:
    """What ``worker(rank, *args)`` returns in each of so many processes, joined by a backend; its error as text.

    They are forked from a server that has imported the package once. None where a process has ended without a word, or
    was ended after so many ``seconds``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kfac_viz.train.optimizer", "kfac_viz.problems"])
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_run, args=(worker, rank, size, backend, f"file://{meeting}", end, args), daemon=True)
        for rank, (_, end) in enumerate(pipes)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()
    deadline, found = time.monotonic() + seconds, []
    for pipe, _ in pipes:
        try:
            found.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(max(0.0, deadline - time.monotonic())) else None)
        except EOFError:
            found.append(None)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    return found


def _run(
    worker: Callable[..., Any], rank: int, size: int, backend: str, meeting: str, end: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT if worker.__name__.startswith("ends") else 120)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=limit)
    try:
        end.send_bytes(pickle.dumps(worker(rank, *args)))  # tensors by value, not in shared memory
    except Exception:
        end.send_bytes(pickle.dumps(traceback.format_exc()))
    if dist.is_initialized() and not worker.__name__.startswith("ends"):
        dist.destroy_process_group()
