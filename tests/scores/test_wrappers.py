"""Compiled, data-parallel and checkpointed models: their layers have the names of the plain model everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, empirical_fisher, mlp, normal
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import kfac_viz as kv
from kfac_viz.method.names import names_of, unwrapped

X, Y = normal(12, 4), torch.arange(12) % 3
OPTIONS = {"likelihood": "categorical", "observe_every": 1, "refresh_every": 2, "per_layer": 2, "damping": 0.1}


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def with_parts(wrap):
    """A wrapper of two parts of a model, one inside the other."""

    def wrapped(model: nn.Module) -> nn.Module:
        model[1][0] = wrap(model[1][0])
        model[1] = wrap(model[1])
        return model

    return wrapped


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled and distributed": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "distributed and compiled": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "compiled parts": with_parts(compiled),
    "parallel parts": with_parts(nn.DataParallel),
    "checkpointed parts": with_parts(checkpoint_wrapper),
}


def plain() -> nn.Module:
    one, two = mlp((4, 5, 6)), mlp((6, 5, 3), seed=1)
    return nn.Sequential(one, two, nn.Linear(3, 3, bias=False).double())


@pytest.fixture
def wrapped(request, tmp_path):
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield WRAPPERS[request.param]
    torch.distributed.destroy_process_group()


def train(model: nn.Module, opt: kv.TwoLevelKFAC, steps: int = 2) -> None:
    for _ in range(steps):
        opt.zero_grad()
        kv.nll(model(X), Y, "categorical").backward()
        opt.observe(X)
        opt.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:Outside the Fisher")
@pytest.mark.parametrize("wrapped", WRAPPERS, indirect=True)
def test_a_wrapped_model_is_captured_under_the_names_of_the_plain_one(wrapped):
    model, names = wrapped(plain()), ["0.2", "1", "2"]
    F = kv.capture(model, X, Y, likelihood="categorical", fisher="empirical", layers=names)
    found = F.partition.names
    assert found == ("0.2", "1.0", "1.2", "2") == kv.partition_of(model, names).names
    assert_close(F.dense(), empirical_fisher(plain(), X, Y, "categorical", found), 1e-12)
    assert list(names_of(model).values()) == [name for name, _ in plain().named_parameters()]


@pytest.mark.parametrize("wrapped", WRAPPERS, indirect=True)
@pytest.mark.parametrize("back", [False, True], ids=["into the plain one", "and back"])
def test_the_state_of_a_wrapped_models_optimizer_fits_the_plain_one(wrapped, back):
    straight = plain()
    train(straight, kv.TwoLevelKFAC(straight, **OPTIONS), 4)
    first, second = (plain(), wrapped(plain())) if back else (wrapped(plain()), plain())
    opt = kv.TwoLevelKFAC(first, **OPTIONS)
    train(first, opt)
    again = kv.TwoLevelKFAC(second, **OPTIONS)
    with torch.no_grad():
        for p, q in zip(second.parameters(), first.parameters(), strict=True):
            p.copy_(q)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(second, again)
    assert torch.equal(weights(second), weights(straight))


def test_a_part_that_is_compiled_on_the_way_changes_nothing():
    model, twin = plain(), plain()
    opts = [kv.TwoLevelKFAC(m, **OPTIONS) for m in (model, twin)]
    train(model, opts[0], 4)
    train(twin, opts[1])
    twin[1] = compiled(twin[1])
    train(twin, opts[1])
    assert torch.equal(weights(model), weights(twin))


def test_names_in_sentences_are_those_of_the_plain_model():
    model = compiled(plain())
    with pytest.raises(ValueError, match=r"\['3'\] are not among.*\['0.0', '0.2', '1.0'"):
        kv.capture(model, X, likelihood="categorical", layers=["3"])
    nn.utils.parametrizations.weight_norm(unwrapped(model)[1][0])
    with pytest.raises(ValueError, match=r"layer '1\.0' is computed"):
        kv.capture(model, X, likelihood="categorical")
    assert unwrapped(model) is model._orig_mod
    for other in (plain(), None, "no model"):
        assert unwrapped(other) is other
