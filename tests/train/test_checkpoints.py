"""``torch.distributed.checkpoint`` loses nothing of an optimizer, and states of the version before can be loaded."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import mlp, normal, opened
from torch import nn
from torch.distributed.checkpoint import state_dict as api

import kfac_viz as kv

pytestmark = pytest.mark.filterwarnings("ignore:Adam's steps", "ignore:Left out of", "ignore:torch.distributed")
X, Y = normal(12, 4), torch.arange(12) % 3
OPTIONS = {
    "likelihood": "categorical", "observe_every": 2, "refresh_every": 3, "coarse_window": 2, "per_layer": 2,
    "damping": 0.1,
}  # fmt: skip
WAYS = {
    "as it is": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "whole": {"full_state_dict": True},
    "whole, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "on the CPU": {"cpu_offload": True},
}


class Mixed(nn.Module):
    """Layers, one of them never used; a weight without curvature; a parameter that is left out once it is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last, self.scale = mlp(), nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.idle = nn.Linear(2, 2)
        self.last.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x)) * self.scale.exp()


def mixed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Mixed().double()


def plain(seed: int = 0) -> nn.Module:
    return mlp((4, 5, 5, 3), seed=seed)


def run(model: nn.Module, opt: kv.TwoLevelKFAC, steps: int) -> None:
    searching = opt.options.step_rule == "line_search"
    for _ in range(steps):

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = kv.nll(model(X), Y, "categorical")
            loss.backward()
            return loss

        closure()
        opt.observe(X)
        opt.step(closure if searching else None)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(params=["plain", "mixed"])
def build(request):
    return {"plain": plain, "mixed": mixed}[request.param]


@pytest.mark.parametrize("through", ["memory", "a folder"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"step_rule": "line_search"}, {"momentum": 0.0, "capturable": True}], ids=str)
def test_a_run_goes_on_bit_for_bit_from_a_distributed_checkpoint(build, way, options, through, tmp_path):
    chosen = api.StateDictOptions(**WAYS[way])
    straight = build()
    opt = kv.TwoLevelKFAC(straight, **OPTIONS | options)
    run(straight, opt, 5)
    saved = {"model": straight.state_dict(), "opt": api.get_optimizer_state_dict(straight, opt, options=chosen)}
    if through == "a folder":
        dcp.save(saved, checkpoint_id=tmp_path)
    saved = copy.deepcopy(saved)
    run(straight, opt, 4)

    model = build(seed=1)
    again = kv.TwoLevelKFAC(model, **OPTIONS | options)
    if through == "a folder":
        template = api.get_optimizer_state_dict(model, again, options=chosen)
        saved = {"model": model.state_dict(), "opt": template}
        dcp.load(saved, checkpoint_id=tmp_path)
    model.load_state_dict(saved["model"])
    api.set_optimizer_state_dict(model, again, saved["opt"], options=chosen)
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in opt.param_groups]
    run(model, again, 4)
    assert torch.equal(weights(model), weights(straight))
    assert again.diagnostics == opt.diagnostics


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_replaces_all_of_a_run_that_is_further(build, way, tmp_path):
    """Nothing of the longer window, or of the larger levels, of the one that loads is mixed in."""
    chosen = api.StateDictOptions(**WAYS[way])
    early = build()
    first = kv.TwoLevelKFAC(early, **OPTIONS)
    run(early, first, 1)
    kept, expected = copy.deepcopy(early.state_dict()), str(opened(first.state_dict())["curvature"])
    dcp.save({"opt": api.get_optimizer_state_dict(early, first, options=chosen)}, checkpoint_id=tmp_path)
    late = build(seed=1)
    second = kv.TwoLevelKFAC(late, **OPTIONS)
    run(late, second, 7)
    template = {"opt": api.get_optimizer_state_dict(late, second, options=chosen)}
    dcp.load(template, checkpoint_id=tmp_path)
    late.load_state_dict(kept)
    api.set_optimizer_state_dict(late, second, template["opt"], options=chosen)
    assert str(opened(second.state_dict())["curvature"]) == expected
    for model, opt in ((early, first), (late, second)):
        run(model, opt, 3)
    assert torch.equal(weights(early), weights(late))


def test_a_checkpoint_before_the_first_observation(build, tmp_path):
    model, twin = build(), build()
    opt, again = (kv.TwoLevelKFAC(m, **OPTIONS, lr=0.2) for m in (model, twin))
    dcp.save({"opt": api.get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    template = {"opt": api.get_optimizer_state_dict(twin, again)}
    dcp.load(template, checkpoint_id=tmp_path)
    api.set_optimizer_state_dict(twin, again, template["opt"])
    assert again.param_groups[0]["lr"] == 0.2 and all(p.grad is None for p in twin.parameters())
    for m, o in ((model, opt), (twin, again)):
        run(m, o, 3)
    assert torch.equal(weights(model), weights(twin))
    untouched = build()
    run(untouched, kv.TwoLevelKFAC(untouched, **OPTIONS, lr=0.2), 3)
    assert torch.equal(weights(model), weights(untouched))


def test_several_groups_of_their_own(tmp_path):
    def optimizer(model):
        first, *others = model.children()
        groups = [{"params": list(first.parameters()), "lr": 0.1}]
        groups.append({"params": [p for m in others for p in m.parameters()], "plain_lr": 0.5, "momentum": 0.5})
        return kv.TwoLevelKFAC(model, groups, **OPTIONS)

    model, twin = plain(), plain(seed=1)
    opt, again = optimizer(model), optimizer(twin)
    run(model, opt, 4)
    opt.param_groups[1]["lr"] = 0.05
    for flat in (False, True):
        chosen = api.StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = copy.deepcopy(api.get_optimizer_state_dict(model, opt, options=chosen))
        api.set_optimizer_state_dict(twin, again, saved, options=chosen)
        twin.load_state_dict(model.state_dict())
        assert [(g["lr"], g["plain_lr"], g["momentum"]) for g in again.param_groups] == [(0.1, 1e-3, 0.9),
                                                                                         (0.05, 0.5, 0.5)]  # fmt: skip
        for m, o in ((model, opt), (twin, again)):
            run(m, o, 2)
        assert torch.equal(weights(model), weights(twin))


def test_a_wrapped_model_saves_what_the_plain_one_loads(tmp_path):
    model, twin = torch.compile(plain(), backend="eager"), plain(seed=1)
    opt, again = (kv.TwoLevelKFAC(m, **OPTIONS) for m in (model, twin))
    run(model, opt, 3)
    dcp.save({"opt": api.get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    template = {"opt": api.get_optimizer_state_dict(twin, again)}
    dcp.load(template, checkpoint_id=tmp_path)
    api.set_optimizer_state_dict(twin, again, template["opt"])
    twin.load_state_dict(model._orig_mod.state_dict())
    for m, o in ((model, opt), (twin, again)):
        run(m, o, 3)
    assert torch.equal(weights(model), weights(twin))


def test_a_first_step_that_is_none_of_a_checkpoint_still_asks_for_an_observation():
    model = plain()
    for lr, gradient in ((0.0, 1.0), (0.1, 0.0)):
        opt = kv.TwoLevelKFAC(model, **OPTIONS, lr=lr)
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        with pytest.raises(ValueError, match="No curvature yet"):
            opt.step()
        assert not opt.state


def test_a_state_of_the_version_before_is_loaded(build):
    """It has the curvature beside its groups, momentum alone in its state, and no rate of its own for plain steps."""
    model, twin = build(), build(seed=1)
    opt, again = kv.TwoLevelKFAC(model, **OPTIONS), kv.TwoLevelKFAC(twin, **OPTIONS, plain_lr=0.01)
    run(model, opt, 3)
    state = opened(opt.state_dict())
    for group in state["param_groups"]:
        del group["plain_lr"], group["curvature"]
    for own in state["state"].values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            own.pop(name, None)
    again.load_state_dict(copy.deepcopy(state))
    twin.load_state_dict(model.state_dict())
    assert again.param_groups[0]["plain_lr"] == 0.01
    opt.param_groups[0]["plain_lr"] = 0.01
    for p in opt.state.keys() - opt._layout.covered:
        opt.state[p].clear()
    for m, o in ((model, opt), (twin, again)):
        run(m, o, 3)
    assert torch.equal(weights(model), weights(twin))


TAMPERED = {
    "must be one tensor of uint8": lambda s: s["param_groups"][0].update(curvature=b"bytes"),
    "must be one tensor of uint8 in": lambda s: s["param_groups"][0].update(curvature=(torch.ones(3),)),
    "cannot be read, it is not whole": lambda s: s["param_groups"][0].update(
        curvature=(s["param_groups"][0]["curvature"][0][:-100],)
    ),
    "has no 'curvature'": lambda s: s["param_groups"][0].update(curvature=None),
    "has no 'plain_lr'": lambda s: s["param_groups"][0].pop("plain_lr"),
    r"state\[5\] has no 'exp_avg'": lambda s: s["state"][5].pop("exp_avg"),
    r"state\[5\]\['exp_avg_sq'\] must have shape": lambda s: s["state"][5].update(exp_avg_sq=torch.ones(2)),
    r"state\[5\]\['step'\] must be a tensor; got int": lambda s: s["state"][5].update(step=3),
    r"state\[5\]\['exp_avg'\] holds NaN": lambda s: s["state"][5]["exp_avg"].fill_(torch.nan),
    r"state\[5\]\['step'\] is a tensor of torch.int64": lambda s: s["state"][5].update(step=torch.tensor(3)),
    "is of no parameter 99": lambda s: s["state"].update({99: {}}),
}


@pytest.mark.parametrize("words", TAMPERED)
def test_a_state_that_is_not_right_is_refused_and_changes_nothing(words):
    model, twin = mixed(), mixed(seed=1)
    opt, again = (kv.TwoLevelKFAC(m, **OPTIONS) for m in (model, twin))
    run(model, opt, 2)
    run(twin, again, 3)
    state = copy.deepcopy(opt.state_dict())
    assert "exp_avg" in state["state"][5] and opt._layout.names[list(opt._layout.group)[5]] == "last.weight"
    TAMPERED[words](state)
    T, before = again.preconditioner, str(opened(again.state_dict()))
    with pytest.raises(ValueError, match=words):
        again.load_state_dict(state)
    assert str(opened(again.state_dict())) == before and again.preconditioner is T
    again.load_state_dict(opt.state_dict())


def test_a_state_is_a_copy_and_can_be_read_without_trust():
    model = mixed()
    opt = kv.TwoLevelKFAC(model, **OPTIONS)
    run(model, opt, 2)
    state, file = opt.state_dict(), io.BytesIO()
    before = str(opened(state)["curvature"])
    torch.save(state, file)
    run(model, opt, 3)
    assert str(opened(state)["curvature"]) == before != str(opened(opt.state_dict())["curvature"])
    file.seek(0)
    assert str(opened(torch.load(file, weights_only=True))["curvature"]) == before
    assert all(group["curvature"] is None for group in opt.param_groups)


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every tensor, number and word in a nest of dictionaries and lists, with the keys that lead to it."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def spoilt(value: Any) -> Iterator[Any]:
    """What may not stand in the place of a saved value."""
    if isinstance(value, torch.Tensor):
        yield from (value.to(torch.complex64), value.tolist())
        if value.is_floating_point() and value.numel():
            yield torch.full_like(value, torch.nan)
    else:
        yield from (3.5j, [], torch.ones(3))


@pytest.mark.parametrize("options", [
    {"coarse": "krylov"}, {"coarse_operator": "kronecker"}, {"factors": "kl"}, {"first_level": "diagonal"},
], ids=str)  # fmt: skip
def test_a_template_reads_every_saved_value(options):
    model = mixed()
    opt = kv.TwoLevelKFAC(model, **OPTIONS | options)
    run(model, opt, 2)
    state = opened(opt.state_dict())
    before, found = str(state), list(leaves(state["curvature"]))
    assert len(found) > 60
    for (*outer, last), value in found:
        inside = functools.reduce(lambda x, key: x[key], outer, state["curvature"])
        for wrong in spoilt(value):
            inside[last] = wrong
            with pytest.raises(ValueError):
                opt.load_state_dict(state)
        inside[last] = value
    for key in state["curvature"].keys() - {"version"}:
        value = state["curvature"].pop(key)
        with pytest.raises(ValueError, match=f"has no '{key}'"):
            opt.load_state_dict(state)
        state["curvature"][key] = value
    assert str(opened(opt.state_dict())) == before
    state["curvature"]["version"] = 3
    with pytest.raises(ValueError, match="has the format 3, and this kfac_viz reads up to 2"):
        opt.load_state_dict(state)


def test_a_parameter_taken_out_of_its_group_is_not_saved_and_saving_changes_nothing():
    straight, watched = plain(), plain()
    opts = [kv.TwoLevelKFAC(model, **OPTIONS) for model in (straight, watched)]
    for model, opt in zip((straight, watched), opts, strict=True):
        run(model, opt, 3)
        del opt.param_groups[0]["params"][1]  # the first bias
    momenta = [opts[1].state[p]["momentum_buffer"].clone() for p in opts[1].param_groups[0]["params"]]
    saved = opts[1].state_dict()["state"]
    assert sorted(saved) == list(range(len(momenta)))
    assert all(torch.equal(saved[i]["momentum_buffer"], m) for i, m in enumerate(momenta))
    for model, opt in zip((straight, watched), opts, strict=True):
        run(model, opt, 3)
    assert torch.equal(weights(straight), weights(watched))
