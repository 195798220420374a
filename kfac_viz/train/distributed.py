"""What the processes of a data-parallel run tell each other, by the collectives of ``torch.distributed`` alone.

Every rank goes through the same collectives in the same order. Before any data travel, the ranks exchange a header of
64 bytes: where each of them is, whether it has failed, and what has to agree (:meth:`Ranks.agree`). So an error on one
rank is raised on all, in the same words, before anything has changed.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..method.checks import check_count, warn
from ..method.names import wrapper_chain

PLACES = ("TwoLevelKFAC()", "observe()", "step()", "the closure")  # where a rank may be
HEADER = 8  # float64 numbers: place, whether all is well, a digest of what has to agree, and up to five others
LOOK_EVERY, GRACE = 2.0, 6.0  # seconds: looks of a waiting rank at whether another has failed; for those to answer

T = TypeVar("T")


class Outcome(NamedTuple):
    """What :meth:`Ranks.agree` is about: a result, what has to be the same on all ranks, and numbers that all learn."""

    result: Any
    same: Mapping[str, Any] = {}
    numbers: Sequence[float] = ()


class Alone:
    """One process, which has nobody to tell: the same calls as :class:`Ranks`, and nothing travels.

    Attributes:
        size, rank: how many processes there are, and which of them this one is.
        traffic: messages and bytes by collective, as far as this rank handed them in.
    """

    size, rank = 1, 0
    traffic: Mapping[str, int] = {}

    def agree(self, place: str, work: Callable[[], Outcome]) -> tuple[Any, list[list[float]]]:
        """The result of the work, and the numbers of each rank."""
        outcome = work()
        return outcome.result, [list(outcome.numbers)]

    def mean(self, loss: Callable[[], float]) -> float:
        """The mean of a number over the ranks."""
        return loss()


ALONE = Alone()


class Ranks(Alone):
    """The processes of a group, each of which has a replica of the model and its own share of every batch.

    Args:
        group: that of the model's ``DistributedDataParallel``, whose time limit holds here as well.
        device: of the model. Messages are on it with nccl, and on the CPU with gloo.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._gloo = "nccl" not in str(dist.get_backend(group))
        self.device = torch.device("cpu") if self._gloo else device
        self.traffic = {f"{what} {how}": 0 for how in ("summed", "gathered") for what in ("messages", "bytes")}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to the default group of its process, and is alone where there is none."""
        if self.group != dist.group.WORLD:
            raise TypeError("An optimizer over a part of the processes cannot be pickled; save its state_dict().")
        return _of_the_world, (self.device,)

    # ---- collectives ------------------------------------------------------------------------------------

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of tensors of one dtype, all in one message. The same bits on every rank."""
        flat = torch.cat([x.reshape(-1) for x in tensors]).to(self.device)
        self._count("summed", flat)
        self._finish(lambda: dist.all_reduce(flat, group=self.group, async_op=True), "a sum over ranks")
        pieces = flat.to(tensors[0].device).split([x.numel() for x in tensors])
        return [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]

    def gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """x (n,) of every rank, where n differs between ranks as ``sizes`` says; shorter ones travel padded."""
        longest = x.numel() if sizes is None else max(sizes)
        mine = x.new_zeros(longest, device=self.device)
        mine[: x.numel()] = x.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._count("gathered", mine)
        self._finish(lambda: dist.all_gather(found, mine, group=self.group, async_op=True), "a gathering of ranks")
        return [y.to(x.device)[:n] for y, n in zip(found, sizes or [longest] * self.size, strict=True)]

    def agree(self, place: str, work: Callable[[], Outcome]) -> tuple[Any, list[list[float]]]:
        """Do the work and find out whether it went well everywhere, and in agreement.

        Raises:
            ValueError, TypeError, RuntimeError: the work has failed on some rank, ranks are at different places or
                differ in what has to agree; the same sentence on all ranks, before any of them goes on.
        """
        outcome, error = Outcome(None), None
        try:
            outcome = work()
        except Exception as caught:
            error = caught
        header = [float(PLACES.index(place)), float(error is None), _digest(outcome.same), *outcome.numbers]
        header = torch.tensor(header + [0.0] * (HEADER - len(header)), dtype=torch.float64, device="cpu")
        rows = [row.tolist() for row in self.gather(header)]
        places, fine, digests, *_ = zip(*rows, strict=True)
        if len(set(places)) > 1:
            where = ", ".join(f"rank {r} at {PLACES[int(p)]}" for r, p in enumerate(places))
            raise ValueError(f"Ranks have to observe and step together, each as often as the others; {where}.")
        if not all(fine):
            self._raise_everywhere(error)
        if len(set(digests)) > 1:
            self._tell_differences(place, outcome.same)
        return outcome.result, [row[3 : 3 + len(outcome.numbers)] for row in rows]

    def mean(self, loss: Callable[[], float]) -> float:
        _, rows = self.agree("the closure", lambda: Outcome(None, {}, (loss(),)))
        return sum(row[0] for row in rows) / self.size

    def _count(self, how: str, x: Tensor) -> None:
        self.traffic[f"messages {how}"] += 1
        self.traffic[f"bytes {how}"] += x.numel() * x.element_size()

    # ---- when something is wrong ------------------------------------------------------------------------

    def _objects(self, mine: Any) -> list[Any]:
        """An object of every rank; only to tell an error."""
        found = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def _raise_everywhere(self, error: Exception | None) -> None:
        """Raise the error of the first rank that has one, on all."""
        kind = TypeError if isinstance(error, TypeError) else ValueError if isinstance(error, ValueError) else None
        told = self._objects(None if error is None else (kind or RuntimeError, kind is None, type(error), str(error)))
        rank, (kind, foreign, own, text) = next((r, x) for r, x in enumerate(told) if x is not None)
        raise kind(f"On rank {rank}: {f'{own.__name__}: ' * foreign}{text}") from error

    def _tell_differences(self, place: str, same: Mapping[str, Any]) -> None:
        """Raise a sentence that names the first difference."""
        told = self._objects({key: repr(value) for key, value in same.items()})
        for r, other in enumerate(told):
            for key in (*told[0], *(key for key in other if key not in told[0])):
                if (one := told[0].get(key, "missing")) != (two := other.get(key, "missing")):
                    raise ValueError(f"Ranks differ at {place}: {key} is {one} on rank 0 and {two} on rank {r}.")

    def _finish(self, start: Callable[[], dist.Work], what: str) -> None:
        """Run a collective to its end.

        Raises:
            RuntimeError: some rank did not take part within the time limit of the group, or its process has ended;
                the sentence names it.
        """
        try:
            work = start()
            while not self._over(work):
                if self._failure_told():
                    raise RuntimeError("another rank has told of it")
        except RuntimeError as error:
            raise RuntimeError(f"{self._missing()} ({what}: {str(error).splitlines()[0]})") from error

    def _over(self, work: dist.Work) -> bool:
        """Wait for some seconds; nccl waits by itself, on the device."""
        if not self._gloo:
            work.wait()
            return True
        try:
            work.wait(timedelta(seconds=LOOK_EVERY))
        except RuntimeError:
            if work.is_completed():  # so that the error is its own, and not that of waiting
                raise
            return False
        return True

    @property
    def _key(self) -> str:
        """Of notes in the store of the process group: the collective that failed, counted alike on all ranks."""
        messages = sum(n for name, n in self.traffic.items() if name.startswith("messages"))
        return f"kfac_viz/{self.group.group_name}/{messages}/{self.traffic['bytes gathered']}"

    def _failure_told(self) -> bool:
        try:
            return _store().check([f"{self._key}/failed"])
        except RuntimeError:
            return False

    def _missing(self) -> str:
        """A sentence that names the ranks that do not answer in the store. All who wait look into it."""

        def answered(note: str, seconds: float) -> list[int]:
            """Say that this rank is here, wait for the others, and return the ranks that were."""
            store.set(f"{self._key}/{note}/{self.rank}", "here")
            keys = [f"{self._key}/{note}/{r}" for r in range(self.size)]
            end = time.monotonic() + seconds
            while not store.check(keys) and time.monotonic() < end:
                time.sleep(0.1)
            return [r for r, key in enumerate(keys) if store.check([key])]

        try:
            store = _store()
            store.set(f"{self._key}/failed", "")
            here = answered("asked", GRACE)
            if self.rank == 0:  # which may hold the store that others still read
                answered("read", LOOK_EVERY + 1)
            else:
                store.set(f"{self._key}/read/{self.rank}", "here")
        except RuntimeError:
            return "The store of the process group does not answer: rank 0, or the launcher that holds it, has ended."
        silent = [r for r in range(self.size) if r not in here]
        if not silent:
            return "A message between the ranks has failed, and all of them are there."
        names = f"Rank {silent[0]} does" if len(silent) == 1 else f"Ranks {', '.join(map(str, silent))} do"
        return f"{names} not answer: ended by an error, or busy beyond the time limit of the process group."


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _of_the_world(device: torch.device) -> Alone:
    return Ranks(dist.group.WORLD, device) if dist.is_initialized() else ALONE


def _digest(same: Mapping[str, Any]) -> float:
    """A whole number below 2⁵³, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(repr(list(same.items())).encode()).digest()[:6], "big"))


def check_replicas(norms: Sequence[Sequence[float]], tolerance: float) -> None:
    """Refuse ranks whose gradients, or parameters, have norms that differ; both may hold NaN, if on all.

    Args:
        norms: of gradients and parameters, for each rank.
    """
    advice = {
        "gradients": "DistributedDataParallel has not averaged them; the last backward() of a step belongs outside "
        "no_sync().",
        "parameters": "load the same state on all, and change weights on all alike.",
    }
    for (what, mend), found in zip(advice.items(), zip(*norms, strict=True), strict=True):
        finite = [x for x in found if math.isfinite(x)]
        if len(finite) not in (0, len(found)) or (finite and max(finite) - min(finite) > tolerance * max(finite)):
            each = ", ".join(f"{x:.6g}" for x in found)
            raise ValueError(f"The {what} differ between ranks, with norms {each}: {mend}")


# ---- whose ranks they are --------------------------------------------------------------------------------------------


def ranks_of(model: nn.Module) -> Alone:
    """Those over which a model is replicated, by the ``DistributedDataParallel`` that it is, or that wraps it.

    Raises:
        ValueError: a model of which each rank has a part only, or whose gradients are averaged in part.
    """
    _refuse_parts(model)
    wrappers = [m for m in wrapper_chain(model) if isinstance(m, nn.parallel.DistributedDataParallel)]
    replicas = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if any(m not in wrappers and dist.get_world_size(m.process_group) > 1 for m in replicas):
        raise ValueError(
            "Only a part of the model is in DistributedDataParallel, so that the rest would drift apart between the "
            "ranks; wrap the whole model."
        )
    if not wrappers and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warn(
            "This process is one of several, and the model is not in DistributedDataParallel: it trains by itself, and "
            "the others' batches have no part in its curvature."
        )
    if not wrappers or dist.get_world_size(wrappers[0].process_group) == 1:
        return ALONE
    return Ranks(wrappers[0].process_group, next(model.parameters()).device)


def _refuse_parts(model: nn.Module) -> None:
    """Refuse models whose parameters or layers are spread over ranks."""
    for module in model.modules():
        names = {kind.__name__: kind.__module__ for kind in type(module).__mro__}
        sharded = next((name for name in ("FullyShardedDataParallel", "FSDPModule") if name in names), None)
        if sharded and names[sharded].startswith("torch.distributed"):
            raise ValueError(
                f"The model is sharded by FSDP ({sharded}): each rank holds a slice of every weight, and K-FAC's "
                "factors belong to whole layers. Use DistributedDataParallel."
            )
        if names.get("Pipe", "").startswith("torch.distributed.pipelining"):
            raise ValueError(
                "The model is a pipeline (Pipe), of which each rank runs some layers: no rank sees the model's outputs "
                "together with every layer. Use DistributedDataParallel."
            )
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters()):
        raise ValueError(
            "The model's parameters are DTensors, spread over ranks by tensor parallelism or fully_shard: K-FAC's "
            "factors belong to whole layers. Use DistributedDataParallel."
        )


def share(n: int, group: dist.ProcessGroup | None = None) -> float:
    """``n R / N``, for this rank's n of the N examples that the R ranks have together in a step: 1 in one process.

    ``DistributedDataParallel`` takes the plain mean of the ranks' gradients. Where their batches differ in size, each
    rank multiplies its loss by its share, and that mean is the gradient of the mean over all N examples. All ranks call
    it together; one whole number travels.

    >>> share(10)
    1.0
    """
    check_count("n", n, least=1)
    share.asked = True
    if not (dist.is_available() and dist.is_initialized()):
        return 1.0
    nccl = "nccl" in str(dist.get_backend(group))
    total = torch.tensor([n], device=torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu")
    dist.all_reduce(total, group=group)
    return n * dist.get_world_size(group) / int(total)


share.asked = False  # whether it ever was, in this process: else different sizes give a warning
