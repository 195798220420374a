"""What several processes send, on paper and here: bytes of a step for up to 1,024 ranks, and measured for 1 to 4.

``ranks_counted.csv`` has :func:`kfac_viz.studies.speed.counted_across_ranks`, and no measurement. ``ranks_cpu.csv`` has
the processor seconds of one rank's step in parts, and the bytes that it handed to collectives, as counted by itself.

    python tests/benchmarks ranks
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import arguments, describe, write
from torch import nn

import kfac_viz as kv
from kfac_viz.studies.speed import RANKS, WIDTHS, counted_across_ranks

WIDTH, DEPTH, BATCH, STEPS = 512, 4, 64, 20  # of each rank's batch; the first STEPS warm up


def measured(rank: int, ranks: int, meeting: str, out: str) -> None:
    """Train on one of the ranks, and write what rank 0 took for its part of a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    hidden = [m for _ in range(DEPTH - 1) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH)))
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", per_layer=4)
    seconds: dict[str, list[float]] = {"forward, backward": [], "observe": [], "step": []}
    for i in range(2 * STEPS):
        if i == STEPS:
            before = dict(opt.ranks.traffic)
        x, y = torch.randn(BATCH, WIDTH), torch.randint(WIDTH, (BATCH,))
        marks = [time.process_time()]
        opt.zero_grad()
        kv.nll(model(x), y, "categorical").backward()
        marks.append(time.process_time())
        opt.observe(x)
        marks.append(time.process_time())
        opt.step()
        marks.append(time.process_time())
        if i >= STEPS:
            for name, a, b in zip(seconds, marks, marks[1:], strict=False):
                seconds[name].append(b - a)
    if rank == 0:
        found = {name: statistics.fmean(times) for name, times in seconds.items()}
        found |= {name: (n - before[name]) / STEPS for name, n in opt.ranks.traffic.items()}
        torch.save(found, out)
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Write both tables."""
    args = arguments(__doc__, argv)
    counted = [
        {"width": width, "ranks": ranks, "quantity": name, "value": f"{value:.4g}"}
        for width in WIDTHS
        for ranks in RANKS
        for name, value in counted_across_ranks(width, ranks).items()
    ]
    write(args.out / "ranks_counted.csv", counted, {}, quiet=True)
    torch.set_num_threads(1)
    rows = []
    for ranks in (1, 2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "found.pt")
            mp.spawn(measured, (ranks, str(Path(folder) / "meeting"), out), ranks)
            found = torch.load(out)
        rows += [{"ranks": ranks, "quantity": name, "per_step": f"{value:.4g}"} for name, value in found.items()]
    write(args.out / "ranks_cpu.csv", rows, {"width": WIDTH, "depth": DEPTH, "batch": BATCH} | describe())
