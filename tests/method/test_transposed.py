"""Transposed convolutions: the weight is a matrix that spreads pixels over patches, the bias a vector of its own."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import Model, assert_close, fisher_by_backward, normal, targets_for
from torch import Tensor, nn
from torch.nn import functional

import kfac_viz as kv


def pooled(s: Model, x: Tensor) -> Tensor:
    h = torch.tanh(s.up(x)).flatten(2)
    return s.head(torch.cat([h.mean(2), h[..., 0], h[..., -1]], 1))


def net(up: nn.Module) -> Model:
    return Model(pooled, up=up, head=nn.Linear(3 * up.out_channels, 3))


def tied(s: Model, x: Tensor) -> Tensor:
    """An autoencoder whose decoder is the transpose of its encoder."""
    return functional.conv_transpose2d(torch.tanh(s.down(x)), s.down.weight, stride=2, groups=s.down.groups).flatten(1)


def tied_the_other_way(s: Model, x: Tensor) -> Tensor:
    return functional.conv2d(torch.tanh(s.up(x)), s.up.weight, s.shift, stride=2, groups=s.up.groups).flatten(1)


MODELS = {
    "plain": (lambda: net(nn.ConvTranspose2d(2, 3, 2)), (2, 3, 2)),
    "no bias": (lambda: net(nn.ConvTranspose2d(2, 3, 2, bias=False)), (2, 3, 2)),
    "strided, padded": (lambda: net(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1)), (2, 3, 2)),
    "other on each axis": (
        lambda: net(nn.ConvTranspose2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2))), (2, 3, 2),
    ),
    "more output padding than stride": (
        lambda: net(nn.ConvTranspose2d(2, 3, 2, stride=1, dilation=3, output_padding=2)), (2, 3, 2),
    ),
    "groups": (lambda: net(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)), (4, 2, 3)),
    "depthwise": (lambda: net(nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)), (4, 2, 3)),
    "one dimension": (lambda: net(nn.ConvTranspose1d(2, 3, 3, stride=2)), (2, 4)),
    "one dimension, groups": (lambda: net(nn.ConvTranspose1d(4, 4, 3, padding=1, groups=2)), (4, 3)),
    "three dimensions": (lambda: net(nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1))), (2, 2, 2, 1)),
    "output size": (
        lambda: Model(
            lambda s, x: s.head(torch.tanh(s.up(x, output_size=(6, 4))).flatten(2).sum(2)),
            up=nn.ConvTranspose2d(2, 3, 2, stride=2), head=nn.Linear(3, 3),
        ), (2, 3, 2),
    ),
    "called twice": (
        lambda: Model(
            lambda s, x: s.head(torch.tanh(s.up(torch.tanh(s.up(x)))).flatten(2).sum(2)),
            up=nn.ConvTranspose2d(2, 2, 2), head=nn.Linear(2, 3),
        ), (2, 3, 2),
    ),
    "parameters by themselves": (
        lambda: Model(
            lambda s, x: s.head(torch.tanh(functional.conv_transpose2d(x, s.up, s.shift)).flatten(2).sum(2)),
            up=torch.randn(2, 3, 2, 2), shift=torch.randn(3), head=nn.Linear(3, 3),
        ), (2, 3, 2),
    ),
    "tied": (lambda: Model(tied, down=nn.Conv2d(1, 2, 2, stride=2)), (1, 4, 4)),
    "tied, groups": (lambda: Model(tied, down=nn.Conv2d(2, 4, 2, stride=2, groups=2)), (2, 2, 4)),
    "tied the other way": (
        lambda: Model(tied_the_other_way, up=nn.ConvTranspose2d(2, 1, 2, stride=2), shift=torch.randn(2)), (2, 2, 1),
    ),
    "tied the other way, depthwise": (
        lambda: Model(tied_the_other_way, up=nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2), shift=torch.randn(2)),
        (2, 2, 1),
    ),
}  # fmt: skip


def build(name: str, n: int = 4) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, shape = MODELS[name]
    return make().double(), normal(n, *shape)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("name", MODELS)
def test_the_fisher_is_that_of_autograd(name, likelihood):
    model, x = build(name)
    F = kv.capture(model, x, likelihood=likelihood)
    assert F.partition.size == sum(p.numel() for p in model.parameters())
    expected, v = fisher_by_backward(model, x, F.partition, likelihood), normal(F.partition.size, 2)
    assert_close(F.dense(), expected)
    assert_close(F @ v, expected @ v)
    assert_close(F.diagonal(), expected.diagonal())
    assert_close(F.damped(0.1).solve(v), torch.linalg.solve(expected + 0.1 * torch.eye(len(v)).double(), v), 1e-10)


def test_the_weight_is_the_module_and_the_bias_a_vector_of_its_own():
    model, _ = build("plain")
    partition = kv.partition_of(model)
    assert partition.names == ("up", "up.bias", "head")
    assert [layer.shape for layer in partition.layers[:2]] == [(3 * 4, 2), (3, 1)] and partition.layers[1].vector
    W, b, _ = partition.split(partition.pack(model))
    assert torch.equal(W, model.up.weight.flatten(1).T) and torch.equal(b[:, 0], model.up.bias)
    assert kv.partition_of(model, layers=["up"]).names == ("up", "up.bias")
    assert kv.partition_of(model, layers=["up.bias"]).names == ("up.bias",)
    partition.add_(model, torch.ones(partition.size).double(), 0.5)
    assert torch.equal(partition.split(partition.pack(model))[0], W + 0.5)
    grouped = kv.partition_of(build("groups")[0])
    v = torch.arange(grouped.size).double()
    model = build("groups")[0]
    before = model.up.weight.detach().clone()
    grouped.add_(model, v)
    V = grouped.split(v)[0].view(2, 12, 2).mT.reshape(4, 3, 2, 2)  # (groups, out / groups · kernel, in / groups)
    assert torch.equal(model.up.weight.detach() - before, V + before - before)


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["plain", "strided, padded", "groups", "depthwise", "other on each axis"])
def test_kfac_has_a_of_pixels_and_g_of_patches_of_the_gradient(name, convention):
    """The factors of a convolution, with inputs and outputs exchanged."""
    model, x = build(name)
    targets = targets_for(model(x).detach(), "categorical")
    F = kv.capture(model, x, targets, likelihood="categorical", fisher="empirical")
    outputs = []
    hook = model.up.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    loss = functional.cross_entropy(model(x), targets, reduction="sum")
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, outputs)
    up, groups, N = model.up, model.up.groups, len(x)
    patches = functional.unfold(gradient, up.kernel_size, up.dilation, up.padding, up.stride)
    windows = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in
               zip(gradient.shape[2:], up.padding, up.dilation, up.kernel_size, up.stride, strict=True)]  # fmt: skip
    patches = patches.unflatten(2, windows)[..., : x.shape[2], : x.shape[3]].flatten(2)
    a = x.flatten(2).mT.unflatten(2, (groups, -1)).movedim(2, 0)  # (groups, N, T, in / groups)
    g = patches.mT.unflatten(2, (groups, -1)).movedim(2, 0)
    if convention == "reduce":
        a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
    A = torch.einsum("hnti,hntj->hij", a, a) / (N * a.shape[2])
    G = torch.einsum("hnto,hntp->hop", g, g) / N
    factors = F.kronecker(convention)
    assert_close(factors.A[0].view(A.shape), A)
    assert_close(factors.G[0].view(G.shape), G)
    block = torch.block_diag(*map(torch.kron, G, A))
    M, s = kv.KFAC(F, 0.1, "eigen", convention), F.partition.slices[0]
    assert_close(M.dense()[s, s], torch.linalg.inv(block + 0.1 * torch.eye(len(block)).double()), 1e-10)
    if up.bias is not None:  # its block is exact
        s = F.partition.slices[1]
        assert_close(M.dense()[s, s], torch.linalg.inv(F.dense()[s, s] + 0.1 * torch.eye(len(up.bias)).double()), 1e-10)


@pytest.mark.parametrize("name", ["strided, padded", "groups", "called twice"])
def test_both_levels_and_the_kronecker_model(name):
    model, x = build(name)
    F = kv.capture(model, x, likelihood="categorical")
    A, M, v = F.damped(0.1), kv.KFAC(F, 0.1, "factored"), normal(F.partition.size)
    K = kv.KroneckerFisher(F)
    matrix = K.dense()
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-12 * float(torch.linalg.eigvalsh(matrix)[-1])
    assert_close(K @ v, matrix @ v, 1e-11)
    for Z in (kv.coarse.spectral(F, 3), kv.coarse.nicolaides(F, 2), kv.coarse.krylov(A, M, v, 2)):
        Zd, Ad, Md = Z.dense(), A.dense(), M.dense()
        Q = Zd @ torch.linalg.inv(Zd.T @ Ad @ Zd) @ Zd.T
        P = A.eye() - Ad @ Q
        assert_close(kv.TwoLevel(A, M, Z) @ v, (Q + P.T @ Md @ P) @ v, 1e-9)
        assert_close(K.galerkin(Z), Zd.T @ matrix @ Zd, 1e-11)


def test_an_input_that_does_not_fit_is_told_by_name():
    model, x = build("plain")
    with pytest.raises(ValueError, match=r"Layer 'up' expects .* of shape \(N, 2, height, width\); got \(4, 3, 3, 2\)"):
        kv.capture(model, normal(4, 3, 3, 2), likelihood="categorical")


def test_a_weight_used_in_other_groups_is_refused_and_the_advice_works():
    model = Model(
        lambda s, x: s.head(torch.tanh(
            s.up(x).repeat(1, 2, 1, 1) + functional.conv_transpose2d(x, s.up.weight, groups=2)
        ).flatten(2).sum(2)),
        up=nn.ConvTranspose2d(2, 3, 2), head=nn.Linear(6, 3),
    ).double()  # fmt: skip
    x = normal(4, 2, 3, 2)
    with pytest.raises(ValueError, match=r"'up.weight' is also used by conv_transpose2d.*layers=\['up.bias', 'head'\]"):
        kv.capture(model, x, likelihood="categorical")
    with pytest.warns(UserWarning, match="Outside the Fisher"):
        F = kv.capture(model, x, likelihood="categorical", layers=["up.bias", "head"])
    assert_close(F.dense(), fisher_by_backward(model, x, F.partition, "categorical"))


# ---- training ----------------------------------------------------------------------------------------


def autoencoder(groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=groups), nn.Tanh(),
        nn.ConvTranspose2d(4, 1, 3, 1, 1), nn.Flatten(),
    ).double()  # fmt: skip


OPTIONS = {"likelihood": "gaussian", "fisher": "mc", "damping": 0.1, "observe_every": 1, "refresh_every": 1,
           "per_layer": 3, "step_rule": "fixed", "lr": 0.01}  # fmt: skip


def train(model: nn.Module, opt: kv.TwoLevelKFAC, steps: int) -> list[float]:
    x, losses = normal(16, 1, 6, 6, seed=2), []
    for _ in range(steps):
        opt.zero_grad()
        loss = kv.nll(model(x), x.flatten(1), "gaussian")
        loss.backward()
        opt.observe(x)
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolutional_autoencoder_trains_with_every_parameter_in_its_layers(groups):
    model = autoencoder(groups)
    opt = kv.TwoLevelKFAC(model, **OPTIONS, momentum=0.0, coarse_window=1)
    assert opt.partition.size == sum(p.numel() for p in model.parameters())
    before = opt.partition.pack(model)
    losses = train(model, opt, 1)
    T, g = opt.preconditioner, opt.partition.pack_grad(model)
    assert_close(opt.partition.pack(model) - before, -0.01 * (T @ g), 1e-10)
    losses += train(model, opt, 15)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("groups", [1, 4])
def test_its_training_goes_on_from_a_checkpoint(groups):
    model = autoencoder(groups)
    opt = kv.TwoLevelKFAC(model, **OPTIONS, momentum=0.9)
    train(model, opt, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = autoencoder(groups)
    other.load_state_dict(state["model"])
    again = kv.TwoLevelKFAC(other, **OPTIONS, momentum=0.9)
    again.load_state_dict(state["opt"])
    assert train(model, opt, 3) == train(other, again, 3)
