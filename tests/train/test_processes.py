"""On several processes the step is the one that a single process takes on the joined batch, or an error on all."""

from __future__ import annotations

import copy
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Positions, conv, mlp, normal
from processes import LIMIT, together
from torch import Tensor, nn

import kfac_viz as kv
from kfac_viz.method.two_level import CORRECTIONS
from kfac_viz.train import distributed
from kfac_viz.train.curvature import RunningCurvature
from kfac_viz.train.optimizer import TwoLevelKFAC
from kfac_viz.train.options import FIRST_LEVELS, SPACES
from kfac_viz.train.statistics import _joined

N, STEPS = 11, 3
CUTS = {1: [0, 11], 2: [0, 4, 11], 3: [0, 5, 7, 11], 4: [0, 3, 4, 9, 11]}
BASE = {"likelihood": "categorical", "fisher": "exact", "step_rule": "fixed", "lr": 0.3, "damping": 0.1, "per_layer": 2,
        "observe_every": 1, "refresh_every": 1}  # fmt: skip
DDP = nn.parallel.DistributedDataParallel


# ---- networks --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Words and learned positions, attention, a norm, and a head that is the table of words transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.places = nn.Parameter(torch.randn(3, 4))
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places
        h = self.norm(h + self.mix(h, h, h, need_weights=False)[0])
        return h.mean(1) @ self.words.weight.T


class Skipping(nn.Module):
    """A layer that only batches take part in whose first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.always(x))
        return self.head(torch.tanh(self.sometimes(h)) if x[0, 0] > 0 else h)


def frozen() -> nn.Module:
    model = mlp((4, 5, 5, 3))
    model[2].requires_grad_(False)
    return model


def words(step: int) -> Tensor:
    return torch.randint(5, (N, 3), generator=torch.Generator().manual_seed(step))


def images(step: int) -> Tensor:
    return normal(N, 2, 5, 5, seed=step)


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    model = conv()
    model(images(0).float())
    return model


def vectors(step: int) -> Tensor:
    return normal(N, 4, seed=step)


@dataclass
class Case:
    """A network, its batches, and options of the optimizer; ``parts`` of each rank's batch are observed one by one."""

    options: dict[str, Any] = field(default_factory=dict)
    build: Any = mlp
    inputs: Any = vectors
    parts: int = 1
    ranks: tuple[int, ...] = (3,)

    def targets(self, step: int) -> Tensor:
        if self.options.get("likelihood", "categorical") == "categorical":
            return (torch.arange(N) + step) % 3
        y = normal(N, 3, seed=100 + step)
        return y if self.options["likelihood"] == "gaussian" else (y > 0).double()


CASES = {
    "the plain case": Case(ranks=(1, 2, 3, 4)),
    "one level": Case({"per_layer": 0}, ranks=(2,)),
    **{f"space {x}": Case({"coarse": x}) for x in SPACES},
    "columns in all": Case({"total": 5}),
    **{f"correction {x}": Case({"correction": x}) for x in CORRECTIONS},
    "Kronecker coarse operator": Case({"coarse": "nicolaides", "coarse_operator": "kronecker"}),
    "rule eigen": Case({"rule": "eigen"}),
    **{f"factors {x}": Case({"factors": x}) for x in ("shampoo", "nearest", "kl")},
    **{f"first level {x}": Case({"first_level": x} | ({"per_layer": 0} if x == "exact" else {})) for x in FIRST_LEVELS},
    "kl_clip": Case({"step_rule": "kl_clip", "momentum": 0.9}),
    "quadratic": Case({"step_rule": "quadratic", "lr": 1.0, "weight_decay": 0.01}, ranks=(2, 4)),
    "line search": Case({"step_rule": "line_search", "lr": 8.0, "damping": 1e-2}, ranks=(2, 4)),
    **{f"likelihood {x}": Case({"likelihood": x}) for x in ("gaussian", "bernoulli")},
    "empirical": Case({"fisher": "empirical"}, ranks=(2, 3)),
    "sampled": Case({"fisher": "mc", "samples": 2}, ranks=(2, 3)),
    "few examples": Case({"coarse_examples": 7, "coarse_window": 2}, ranks=(2, 4)),
    "fewer examples than ranks": Case({"coarse_examples": 2}, ranks=(4,)),
    "steps without an observation": Case({"observe_every": 2, "refresh_every": 2}),
    "accumulated": Case({"decay": 0.5}, parts=2, ranks=(2, 3)),
    "attention": Case(build=Attention, inputs=words, ranks=(2, 3)),
    "attention, Shampoo": Case({"factors": "shampoo"}, Attention, words),
    "positions, reduced": Case({"convention": "reduce"}, lambda: Positions(3), lambda i: normal(N, 2, 3, seed=i)),
    "convolutions": Case(build=convolutional, inputs=images),
    "groups": Case(build=grouped, inputs=images),
    "frozen": Case(build=frozen),
    "unused on one rank": Case(build=Skipping, ranks=(2, 3)),
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(model: nn.Module, case: Case, cut: list[int], *, batches: list[int], group: Any = None) -> list[Tensor]:
    """The weights after each step on these batches of the cut; in one process all of them, else this rank's own."""
    options = BASE | case.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = TwoLevelKFAC(model, **options)
        apart = case.build is Skipping and group is None
        if options["fisher"] == "mc" and group is None:
            capture_by_rank(opt, cut)
        plain, found = model.module if group else model, []
        for step in range(STEPS):
            x = case.inputs(step)
            y = case.targets(step).to(x.device)

            def closure(x=x, y=y, backward=True):
                opt.zero_grad()
                total = 0.0
                parts = [parts_of(b, cut, case.parts) for b in batches]
                pieces = [p for part in zip(*parts, strict=True) for p in (part if apart else [torch.cat(part)])]
                for i, piece in enumerate(pieces):
                    with model.no_sync() if group and i + 1 < len(pieces) else nullcontext():
                        n = sum(len(p) for p in pieces)
                        share = kv.share(n, group) if group else 1.0
                        loss = share * len(piece) / n * kv.nll(model(x[piece]), y[piece], options["likelihood"])
                        if backward:
                            loss.backward()
                        total = total + loss.detach()
                        if backward and closure.observing:
                            targets = {"targets": y[piece]} if options["fisher"] == "empirical" else {}
                            opt.observe(x[piece], **targets)
                return total

            closure.observing = True
            closure()
            closure.observing = False
            opt.step(closure if options["step_rule"] in ("quadratic", "line_search") else None)
            found.append(flat(plain))
    return found, opt


def parts_of(batch: int, cut: list[int], parts: int) -> list[Tensor]:
    """The numbers of the examples of a rank, in parts."""
    return list(torch.arange(cut[batch], cut[batch + 1]).tensor_split(parts))


def capture_by_rank(opt: TwoLevelKFAC, cut: list[int]) -> None:
    """Have labels drawn by the generator of each rank for its own examples."""

    class One(distributed.Alone):
        def __init__(self, rank: int) -> None:
            self.rank = rank

    def capture(model, inputs, targets, partition):
        found = []
        for rank, (a, b) in enumerate(itertools.pairwise(cut)):
            opt.curvature.ranks = One(rank)
            found.append(RunningCurvature.capture(opt.curvature, model, (inputs[0][a:b],), targets, partition))
        return _joined([F for F, _ in found], [1.0] * len(found)), found[0][1]

    opt.curvature.capture = capture


def every_case(rank: int) -> dict[str, Any]:
    """Errors of every case: of the first step, of the last, and whether all ranks have the same bits."""
    groups = {R: dist.new_group(range(R)) for R in CUTS}
    found = {}
    for (name, case), R in itertools.product(CASES.items(), CUTS):
        if R not in case.ranks or rank >= R:
            continue
        model = case.build().double()
        twin = copy.deepcopy(model)
        start = flat(model)
        wrapped = DDP(model, process_group=groups[R], find_unused_parameters=case.build is Skipping)
        mine, opt = trained(wrapped, case, CUTS[R], batches=[rank], group=groups[R])
        bits = [torch.empty_like(mine[-1]) for _ in range(R)]
        dist.all_gather(bits, mine[-1], group=groups[R])
        if rank:
            continue
        one, _ = trained(twin, case, CUTS[R], batches=list(range(R)))
        errors = [float((a - b).norm() / (b - start).norm()) for a, b in zip(mine, one, strict=True)]
        found[f"{name}, {R} ranks"] = errors[0], errors[-1], all(torch.equal(bits[0], b) for b in bits), opt.ranks.size
    return found


def test_every_case_is_the_step_of_one_process_on_the_joined_batch(tmp_path):
    found, *others = together(every_case, 4, tmp_path / "meeting")
    assert isinstance(found, dict), found
    assert all(isinstance(other, dict) for other in others), others
    assert len(found) == sum(len(case.ranks) for case in CASES.values())
    wrong = {name: x for name, x in found.items() if not (x[0] <= 1e-12 and x[1] <= 1e-10 and x[2])}
    assert not wrong, wrong
    assert all(name.endswith(f"{size} ranks") for name, (*_, size) in found.items())


def on_gpus(rank: int) -> float:
    """The error of three steps of two ranks on a GPU each, against one process on the CPU."""
    torch.cuda.set_device(rank)
    case, model = Case({"step_rule": "quadratic"}), mlp()
    there = Case(case.options, inputs=lambda step: vectors(step).cuda())
    twin = copy.deepcopy(model)
    wrapped = DDP(model.cuda(), device_ids=[rank])
    mine, _ = trained(wrapped, there, CUTS[2], batches=[rank], group=dist.group.WORLD)
    one, _ = trained(twin, case, CUTS[2], batches=[0, 1])
    return float((mine[-1].cpu() - one[-1]).norm() / one[-1].norm())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs a GPU for each of two ranks")
def test_two_gpus_take_the_steps_of_one_processor(tmp_path):
    assert all(error < 1e-10 for error in together(on_gpus, 2, tmp_path / "meeting", backend="nccl"))


# ---- faults ----------------------------------------------------------------------------------------------------------


def refused(call: Any) -> str:
    """The sentence of what is raised, with its kind; empty if nothing is."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def replica(rank: int, **options: Any) -> tuple[nn.Module, TwoLevelKFAC, Tensor, Tensor]:
    """A model over all ranks, its optimizer, and a batch of this rank's own whose gradient has been computed."""
    model = DDP(mlp())
    opt = TwoLevelKFAC(model, **BASE | options)
    x, y = normal(4, 4, seed=rank), torch.arange(4) % 3
    kv.nll(model(x), y, "categorical").backward()
    return model, opt, x, y


def faults(rank: int) -> dict[str, Any]:
    """Make one of three ranks fail, in many ways, and collect the sentence that each rank raises."""
    warnings.simplefilter("ignore")
    told = {}

    model, opt, x, y = replica(rank)
    before, saved = flat(model), opt.state_dict()["param_groups"][0]["curvature"]
    told["NaN"] = refused(lambda: opt.observe(x * (torch.nan if rank == 1 else 1.0)))
    told["no batch"] = refused(lambda: opt.observe(x[: 4 if rank else 0]))
    told["observed by some"] = refused(opt.step if rank == 2 else lambda: opt.observe(x))
    told["other kind"] = refused(lambda: opt.observe(x if rank else [1.0]))
    state = opt.state_dict()["param_groups"][0]["curvature"]
    told["nothing has changed"] = bool(torch.equal(flat(model), before) and torch.equal(state[0], saved[0]))
    opt.observe(x)
    opt.param_groups[0]["lr"] = 0.3 if rank else 0.2
    told["other lr"] = refused(opt.step)
    opt.param_groups[0]["lr"] = 0.3
    with model.no_sync():
        opt.zero_grad()
        kv.nll(model(x), y, "categorical").backward()
    told["gradients apart"] = refused(opt.step)
    opt.zero_grad()
    kv.nll(model(x), y, "categorical").backward()
    told["nothing has moved"] = bool(torch.equal(flat(model), before))
    told["goes on"] = refused(opt.step)
    twin = copy.deepcopy(opt)
    told["a copy"] = twin.ranks.size, twin.ranks.rank == rank
    with torch.no_grad():
        model.module[0].bias += rank == 2
    opt.zero_grad()
    kv.nll(model(x), y, "categorical").backward()
    told["weights apart"] = refused(lambda: (opt.observe(x), opt.step()))

    told["other option"] = refused(lambda: TwoLevelKFAC(DDP(mlp()), **BASE | {"damping": 0.2 if rank == 1 else 0.1}))
    layers = ["0", "2"] if rank == 2 else ["0"]
    told["other layers"] = refused(lambda: TwoLevelKFAC(DDP(mlp()), **BASE, layers=layers))
    told["capturable"] = refused(lambda: TwoLevelKFAC(DDP(mlp()), **BASE, capturable=True))
    told["a part"] = refused(lambda: TwoLevelKFAC(nn.Sequential(DDP(mlp()), nn.Linear(3, 3).double()), **BASE))

    model, opt, x, y = replica(rank, step_rule="line_search")
    opt.observe(x)
    before, calls = flat(model), []

    def closure(backward=True):
        calls.append(backward)
        if rank == 1 and not backward:
            raise KeyError("no data")
        loss = kv.nll(model(x), y, "categorical")
        if backward:
            opt.zero_grad()
            loss.backward()
        return loss

    told["closure"] = refused(lambda: opt.step(closure))
    told["restored"] = bool(torch.equal(flat(model), before))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TwoLevelKFAC(mlp(), **BASE)
        model, opt, *_ = replica(rank)
        opt.observe(normal(3 + rank, 4))
        asked = kv.share(3 + rank)
        told["shares"] = asked * 12 / 3
        replica(rank)[1].observe(normal(3 + rank, 4))
    said = [str(w.message) for w in caught]
    told["warnings"] = [text for text in said if "kv.share" in text or "one of several" in text]
    told |= {name: refused(lambda model=model: TwoLevelKFAC(model, **BASE)) for name, model in spread().items()}
    return told


def spread() -> dict[str, nn.Module]:
    """Models of which each rank has a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.pipelining import SplitPoint, pipeline
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (3,))
    return {
        "FSDP": FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")),
        "fully_shard": fully_shard(mlp(), mesh=mesh),
        "tensor parallel": parallelize_module(mlp((4, 6, 3)), mesh, {"0": ColwiseParallel()}),
        "pipeline": pipeline(mlp(), (normal(2, 4),), split_spec={"2": SplitPoint.BEGINNING}),
    }


def test_what_is_wrong_on_one_rank_is_told_on_all_and_changes_nothing(tmp_path):
    first, *others = together(faults, 3, tmp_path / "meeting")
    assert isinstance(first, dict), first
    for rank, other in enumerate(others, 1):
        assert isinstance(other, dict), other
        assert other.pop("shares") == pytest.approx(3 + rank)
        assert other == {name: x for name, x in first.items() if name != "shares"}
    expected = {
        "NaN": "ValueError: On rank 1: The inputs of the model hold NaN or inf.",
        "no batch": "ValueError: On rank 0: The batch is empty",
        "observed by some": "rank 0 at observe(), rank 1 at observe(), rank 2 at step()",
        "other kind": "TypeError: On rank 0: inputs must be tensors",
        "other lr": "Ranks differ at step(): lr of group 0 is 0.2 on rank 0 and 0.3 on rank 1",
        "gradients apart": "The gradients differ between ranks",
        "weights apart": "The parameters differ between ranks",
        "other option": "Ranks differ at TwoLevelKFAC(): damping is 0.1 on rank 0 and 0.2 on rank 1",
        "other layers": "Ranks differ at TwoLevelKFAC(): layer '2' is missing on rank 0 and (3, 6) on rank 2",
        "capturable": "capturable=True decides nothing on the host",
        "a part": "Only a part of the model is in DistributedDataParallel",
        "closure": "RuntimeError: On rank 1: KeyError: 'no data'",
        "FSDP": "sharded by FSDP (FullyShardedDataParallel)",
        "fully_shard": "sharded by FSDP (FSDPModule)",
        "tensor parallel": "DTensors, spread over ranks by tensor parallelism",
        "pipeline": "The model is a pipeline (Pipe)",
    }
    for name, part in expected.items():
        assert part in first[name], (name, first[name])
    assert first["nothing has changed"] and first["nothing has moved"] and first["restored"]
    assert first["goes on"] == "" and first["a copy"] == (3, True)
    assert first["shares"] == pytest.approx(3)
    alone, uneven = first["warnings"]
    assert "one of several" in alone and "kv.share(n)" in uneven


def ends_while_others_wait(rank: int) -> str:
    """One rank ends without a word; what the others are told when they observe."""
    model, opt, x, y = replica(rank)
    dist.barrier()
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    sentence = refused(lambda: opt.observe(x))
    return f"{time.monotonic() - start:.1f} {sentence}"


def test_a_rank_that_dies_ends_the_others_with_its_name(tmp_path):
    first, dead, last = together(ends_while_others_wait, 3, tmp_path / "meeting")
    assert dead is None
    for sentence in (first, last):
        seconds, text = sentence.split(" ", 1)
        assert text.startswith("RuntimeError: Rank 1 does not answer"), sentence
        assert float(seconds) < LIMIT + distributed.LOOK_EVERY + distributed.GRACE + 30, "on a loaded machine"


# ---- what is saved, and what travels ---------------------------------------------------------------------------------


def saving(rank: int, path: str) -> dict[str, Any]:
    """Two of three ranks train and save; one and three go on. And what two ranks have sent."""
    warnings.simplefilter("ignore")
    groups = {R: dist.new_group(range(R)) for R in (1, 2, 3)}
    case, found = Case({"step_rule": "quadratic", "coarse_examples": 9}), {}
    if rank < 2:
        model = DDP(mlp(), process_group=groups[2])
        _, opt = trained(model, case, CUTS[2], batches=[rank], group=groups[2])
        states = [None] * 2
        dist.all_gather_object(states, opt.state_dict()["param_groups"][0]["curvature"][0], group=groups[2])
        found["the same state"] = bool(torch.equal(*states))
        found["traffic"], found["counters"] = dict(opt.ranks.traffic), opt.diagnostics
        found["shown"] = repr(opt)
        if rank == 0:
            torch.save([model.module.state_dict(), opt.state_dict()], path)
    dist.barrier()
    weights, state = torch.load(path, weights_only=True)
    for R in (1, 2, 3):
        if rank < R:
            model = DDP(mlp(), process_group=groups[R])
            model.module.load_state_dict(weights)
            opt = TwoLevelKFAC(model, **BASE | case.options)
            opt.load_state_dict(state)
            own = slice(CUTS[R][rank], CUTS[R][rank + 1])
            x, y = case.inputs(7)[own], case.targets(7)[own]

            def closure(model=model, opt=opt, x=x, y=y, group=groups[R]):
                opt.zero_grad()
                loss = kv.share(len(x), group) * kv.nll(model(x), y, "categorical")
                loss.backward()
                return loss

            closure()
            opt.observe(x)
            opt.step(closure)
            found[R] = flat(model)
    return found


def test_what_two_ranks_save_one_and_three_resume_and_what_travels_is_counted(tmp_path):
    found = together(saving, 3, tmp_path / "meeting", str(tmp_path / "state.pt"))
    assert all(isinstance(x, dict) for x in found), found
    one, two, three = (found[0][R] for R in (1, 2, 3))
    assert float((one - two).norm() / one.norm()) < 1e-12 and float((one - three).norm() / one.norm()) < 1e-12
    assert torch.equal(found[1][3], three) and torch.equal(found[2][3], three)
    assert found[0]["the same state"]

    # by the docstring of Shards and the header of 64 bytes: layers of 5 × 5 and 3 × 6, exact vectors, float64
    L, w, S, sizes = 2, 8, 3, ((5, 5), (3, 6))
    room = (9, 9 // 2, 9 // 3)  # of the first, second and third batch in the window
    kept = [max(len([i for i in (11 * j // n for j in range(n)) if a <= i < b]) for a, b in ((0, 4), (4, 11)))
            for n in room]  # fmt: skip
    vectors = [w * n * sum(i + S * o for o, i in sizes) for n in kept]
    headers = 1 + 3 + 3 + 2 * 3  # TwoLevelKFAC(), observe(), step(), the loss before and after each step
    assert found[0]["traffic"] == found[1]["traffic"] == {
        "messages summed": 3,
        "bytes summed": 3 * w * sum(i * (i + 1) + o * (o + 1) for o, i in sizes) // 2,
        "messages gathered": headers + 2 * 3,
        "bytes gathered": 64 * headers + 3 * 32 * L + sum(vectors),
    }  # fmt: skip
    assert found[0]["counters"].items() >= found[0]["traffic"].items()
    assert "2 ranks, replicated" in found[0]["shown"]


# ---- the line of README ----------------------------------------------------------------------------------------------


def test_the_line_of_readme_trains():
    readme = (Path(kv.__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^torchrun .*$", readme, re.MULTILINE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *shlex.split(line)[1:]]  # a free port
    said = subprocess.run(torchrun, capture_output=True, text=True, timeout=500, check=True).stdout
    assert float(re.match(r"loss (\S+) after 30 steps on 2 ranks", said).group(1)) < 1.2  # 2.3 to begin with
    assert "messages gathered" in said
