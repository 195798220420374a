"""Steps that do not wait: numbers read on the host and operations sent to the device, counted without a device."""

from __future__ import annotations

import pytest
import torch
from counting import Counting
from torch import nn

import kfac_viz as kv

X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
ONE, TWO = {"per_layer": 0}, {"per_layer": 4}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def deep(layers: int = 16, device: str = "cpu") -> nn.Module:
    """A network of Linear layers of three shapes, neighbours unlike each other."""
    torch.manual_seed(0)
    widths = [8, *(8 if i % 2 else 12 for i in range(layers - 1)), 4]
    made = [m for a, b in zip(widths[:-1], widths[1:], strict=True) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    return nn.Sequential(*made).to(device)


def ready(layers: int = 16, device: str = "cpu", **options) -> tuple[kv.TwoLevelKFAC, nn.Module]:
    """An optimizer that has taken a step, and whose next observation is far away."""
    model = deep(layers, device)
    opt = kv.TwoLevelKFAC(model, likelihood="categorical", observe_every=10**6, refresh_every=1,
                          **{"per_layer": 4} | options)  # fmt: skip
    kv.nll(model(X.to(device)), Y.to(device), "categorical").backward()
    opt.observe(X.to(device))
    opt.step()
    return opt, model


class Kinds(nn.Module):
    """An embedding, a depthwise convolution and a transposed one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, channels), nn.Conv1d(channels, channels, 3, groups=channels)
        self.up, self.head = nn.ConvTranspose1d(channels, 4, 2, groups=2), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.up(torch.tanh(self.conv(self.table(x).mT)))).mean(2))


def counted(call) -> Counting:
    with Counting() as seen:
        call()
    return seen


def test_the_counter_counts():
    """Negative control."""
    x = torch.ones(3)
    seen = counted(lambda: (x.mul(2), x.view(3, 1), x.sum().item(), x.tolist()))
    assert (seen.operations, seen.reads, dict(seen.names)) == (2, 2, {"mul": 1, "sum": 1})


@pytest.mark.parametrize("layers", [8, 16, 32])
@pytest.mark.parametrize(("space", "most"), [(ONE, 60), (TWO, 120)], ids=["one level", "two levels"])
def test_a_plain_step_reads_one_number_and_its_operations_do_not_grow_with_layers(space, most, layers):
    opt, _ = ready(layers, **space)
    step = counted(opt.step)
    assert step.reads <= 1 and step.operations <= most
    assert step.operations == counted(ready(2 * layers, **space)[0].step).operations


@pytest.mark.parametrize("step_rule", ["fixed", "kl_clip", "quadratic"])
@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("space", [ONE, TWO], ids=["one level", "two levels"])
def test_reads_of_a_step_an_observation_and_a_refresh(space, rule, step_rule):
    for layers in (4, 16):
        opt, _ = ready(layers, rule=rule, step_rule=step_rule, **space)
        assert counted(opt.step).reads <= 1
        opt.curvature.observed_at = -(10**7)
        assert counted(lambda: opt.observe(X)).reads <= 2  # noqa: B023
        assert counted(lambda: opt.preconditioner).reads <= 4  # noqa: B023


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("space", [ONE, TWO], ids=["one level", "two levels"])
def test_tables_and_groups_are_not_read_and_a_step_does_not_grow_with_groups(space, rule):
    words = torch.randint(0, 9, (32, 8), generator=torch.Generator().manual_seed(0))
    operations = []
    for channels in (4, 16):
        torch.manual_seed(0)
        model = Kinds(channels)
        opt = kv.TwoLevelKFAC(model, likelihood="categorical", observe_every=10**6, refresh_every=1, rule=rule, **space)
        kv.nll(model(words), Y, "categorical").backward()
        opt.observe(words)
        opt.step()
        step = counted(opt.step)
        assert step.reads <= 1
        operations.append(step.operations)
        opt.curvature.observed_at = -(10**7)
        assert counted(lambda: opt.observe(words)).reads <= 2  # noqa: B023
        assert counted(lambda: opt.preconditioner).reads <= 4  # noqa: B023
    assert operations[0] == operations[1]


def test_a_new_layer_of_a_known_shape_costs_an_observation_its_own_passes_alone():
    """The forward and backward passes and the 1 that is appended: nothing else is done layer by layer."""
    few, many = (ready(layers)[0] for layers in (16, 32))
    for opt in (few, many):
        opt.curvature.observed_at = -(10**7)
    few, many = (counted(lambda opt=opt: opt.observe(X)).operations for opt in (few, many))
    passes = 6  # addmm, tanh, their two backward products, the ones and the cat
    assert many - few <= 16 * passes


@pytest.mark.parametrize("space", [ONE, TWO], ids=["one level", "two levels"])
@pytest.mark.parametrize("step_rule", ["fixed", "kl_clip", "quadratic"])
def test_capturable_reads_nothing_and_steps_alike(step_rule, space):
    models = []
    for capturable in (False, True):
        opt, model = ready(4, capturable=capturable, step_rule=step_rule, **space)
        step = counted(opt.step)
        assert step.reads == (0 if capturable else 1)
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert all(isinstance(value, (int, float)) for value in opt.diagnostics.values())
    assert torch.equal(*models)


def test_capturable_masks_a_bad_gradient_and_tells_at_the_next_observation():
    opt, model = ready(4, capturable=True)
    model[0].weight.grad[0, 0] = torch.nan
    before, state = (
        [p.detach().clone() for p in model.parameters()],
        {k: v["momentum_buffer"].clone() for k, v in opt.state.items()},
    )
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(opt.state[p]["momentum_buffer"], buffer) for p, buffer in state.items())
    opt.curvature.observed_at = -(10**7)
    with pytest.warns(UserWarning, match="1 steps since the last observation were skipped"):
        opt.observe(X)
    model[0].weight.grad.zero_()
    opt.step()
    assert not torch.equal(model[0].weight, before[0]) or not torch.equal(model[2].weight, before[2])


def test_capturable_refuses_what_is_decided_on_the_host():
    opt, model = ready(4, capturable=True, step_rule="quadratic")
    with pytest.raises(ValueError, match="capturable=True decides nothing on the host"):
        opt.step(lambda: kv.nll(model(X), Y, "categorical"))


@pytest.mark.parametrize("space", [ONE, TWO], ids=["one level", "two levels"])
def test_a_plain_step_runs_on_the_meta_device(space):
    """Where no tensor has numbers, a read of one or a stray tensor of the CPU is an error."""
    opt, model = ready(4, capturable=True, **space)
    assert torch.isfinite(model[0].weight).all()
    T = opt.preconditioner
    moved = torch.nn.Module.to(model, "meta")
    meta = kv.TwoLevelKFAC(moved, likelihood="categorical", capturable=True, observe_every=10**6,
                           **{"per_layer": 4} | space)  # fmt: skip
    meta.curvature = opt.curvature
    meta.curvature._T = on_meta(T)
    for p in moved.parameters():
        p.grad = torch.empty_like(p)
    meta.curvature.factors.A = {k: v.to("meta") for k, v in meta.curvature.factors.A.items()}
    meta.curvature.factors.G = {k: v.to("meta") for k, v in meta.curvature.factors.G.items()}
    meta.step()
    assert all(p.is_meta for p in moved.parameters())


def on_meta(value, seen=None):
    """A copy of an object of the package whose tensors are on the meta device."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {key: on_meta(item, seen) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_meta(item, seen) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(on_meta(item, seen) for item in value)
    if type(value).__module__.startswith("kfac_viz") and not isinstance(value, kv.Partition):
        twin = seen[id(value)] = object.__new__(type(value))
        for key, item in vars(value).items():
            object.__setattr__(twin, key, on_meta(item, seen))
        return twin
    return value


@CUDA
@pytest.mark.parametrize("space", [ONE, TWO], ids=["one level", "two levels"])
def test_a_plain_step_does_not_synchronise(space):
    opt, _ = ready(4, "cuda", capturable=True, **space)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
def test_a_plain_step_can_be_captured_in_a_cuda_graph():
    opt, model = ready(4, "cuda", capturable=True)
    twin, expected = ready(4, "cuda", capturable=True)
    for _ in range(3):
        opt.step(), twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    graph.replay()
    twin.step()
    torch.testing.assert_close(model[0].weight, expected[0].weight)


@CUDA
def test_a_plain_step_can_be_compiled():
    opt, model = ready(4, "cuda", capturable=True)
    twin, expected = ready(4, "cuda", capturable=True)
    torch.compile(opt.step)()
    twin.step()
    torch.testing.assert_close(model[0].weight, expected[0].weight)
