"""Train on several processes: ``torchrun --nproc-per-node 2 -m kfac_viz.data_parallel``.

Each rank takes its own rows of every batch. The steps are those of one process with whole batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kfac_viz as kv


def main(steps: int = 30, batch: int = 101) -> None:
    """Train a small classifier of digits, and print its loss from rank 0."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    problem = kv.problems.digits(widths=(16, 16), n=500, side=4, seed=0)  # the same on every rank
    model = DistributedDataParallel(problem.model)
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", per_layer=4)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        whole = torch.randperm(500, generator=order)[:batch]
        mine = whole.tensor_split(dist.get_world_size())[dist.get_rank()]
        x, y = problem.inputs[mine], problem.targets[mine]
        opt.zero_grad()
        loss = kv.share(len(x)) * kv.nll(model(x), y, "categorical")  # without share, ranks with fewer rows count more
        loss.backward()
        opt.observe(x)
        opt.step()
    if dist.get_rank() == 0:
        print(f"loss {float(problem.loss().detach()):.3f} after {steps} steps on {dist.get_world_size()} ranks")
        print({name: n for name, n in opt.diagnostics.items() if name.startswith(("messages", "bytes"))})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
