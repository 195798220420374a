"""Grouped and depthwise convolutions: one layer with exact blocks between groups, and a pair of factors for each."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import Model, assert_close, fisher_by_backward, normal
from torch import Tensor, nn
from torch.nn import functional

import kfac_viz as kv
from kfac_viz.method.one_hot import OneHot
from kfac_viz.method.sample_space import SampleSpace
from kfac_viz.pages.layer_map import blocks_missed


def pooled(s: Model, x: Tensor) -> Tensor:
    h = torch.tanh(s.conv(x))
    return s.head(torch.cat([h.flatten(2).mean(2), h.flatten(2)[..., 0]], 1))


def net(conv: nn.Module) -> Model:
    return Model(pooled, conv=conv, head=nn.Linear(2 * conv.out_channels, 3))


def chain(s: Model, x: Tensor) -> Tensor:
    return s.head(torch.tanh(s.last(torch.tanh(s.like(torch.tanh(s.conv(x)))))).flatten(2).sum(2))


def words_and_channels(s: Model, x: Tensor) -> Tensor:
    h = s.table((x[:, 0] > 0).long()).flatten(1, 2).mT  # one word for each pixel
    return s.head(torch.tanh(s.conv(h)).mean(2))


MODELS = {
    "groups": lambda: net(nn.Conv2d(4, 6, 2, groups=2)),
    "depthwise": lambda: net(nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    "no bias": lambda: net(nn.Conv2d(4, 8, 2, stride=2, groups=4, bias=False)),
    "a kernel of 1": lambda: net(nn.Conv2d(4, 4, 1, groups=2)),
    "dilated, reflected": lambda: net(nn.Conv2d(4, 4, 2, dilation=2, padding=1, padding_mode="reflect", groups=2)),
    "one position": lambda: net(nn.Conv2d(4, 4, 3, groups=2)),
    "called twice": lambda: Model(
        lambda s, x: s.head(torch.tanh(s.conv(torch.tanh(s.conv(x)))).flatten(2).sum(2)),
        conv=nn.Conv2d(4, 4, 2, groups=2), head=nn.Linear(4, 3),
    ),
    "beside layers of its shape": lambda: Model(  # conv: 2 × (9→2), like and last: 9→2 and 2 × (9→2)
        lambda s, x: s.head(torch.tanh(
            s.conv(x) + s.like(x[:, :2]).repeat(1, 2, 1, 1) * s.last(x.flip(1))
        ).flatten(2).sum(2)),
        conv=nn.Conv2d(4, 4, 2, groups=2), like=nn.Conv2d(2, 2, 2), last=nn.Conv2d(4, 4, 2, groups=2),
        head=nn.Linear(4, 3),
    ),
    "a chain": lambda: Model(
        chain, conv=nn.Conv2d(4, 4, 2, groups=4), like=nn.Conv2d(4, 2, 1), last=nn.Conv2d(2, 2, 2, groups=2),
        head=nn.Linear(2, 3),
    ),
    "the weight used in other groups": lambda: Model(
        lambda s, x: s.head(torch.tanh(
            functional.conv2d(x[:, :2], s.conv.weight, s.conv.bias) + s.conv(x)
        ).flatten(2).sum(2)),
        conv=nn.Conv2d(4, 4, 2, groups=2), head=nn.Linear(4, 3),
    ),
    "the bias added again": lambda: Model(
        lambda s, x: s.head(torch.tanh((s.conv(x) * 2).flatten(2).sum(2) + s.conv.bias)),
        conv=nn.Conv2d(4, 4, 2, groups=2), head=nn.Linear(4, 3),
    ),
    "a weight of its own": lambda: Model(
        lambda s, x: s.head(torch.tanh(functional.conv2d(x, s.conv, groups=2)).flatten(2).sum(2)),
        conv=nn.Parameter(torch.randn(4, 2, 2, 2)), head=nn.Linear(4, 3),
    ),
    "after an embedding": lambda: Model(
        words_and_channels, table=nn.Embedding(2, 4), conv=nn.Conv1d(4, 4, 2, groups=2), head=nn.Linear(4, 3),
    ),
}  # fmt: skip
SHAPE = (4, 3, 3)
GROUPED = [name for name in MODELS if name != "a weight of its own"]


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", MODELS)
def test_the_fisher_is_that_of_autograd(name, likelihood):
    model, x = make(name), normal(4, *SHAPE)
    F = kv.capture(model, x, likelihood=likelihood)
    assert F.partition.layers[F.partition.index("conv")].groups == (1 if name == "a weight of its own" else
                                                                      getattr(model.conv, "groups", 1))  # fmt: skip
    expected = fisher_by_backward(model, x, F.partition, likelihood)
    v = normal(F.partition.size, 3)
    assert_close(F.dense(), expected)
    assert_close(F @ v, expected @ v)
    assert_close(F @ v[:, 0], expected @ v[:, 0])
    assert_close(F.diagonal(), expected.diagonal())
    for l, rows in enumerate(F.partition.slices):
        for m, columns in enumerate(F.partition.slices):
            assert_close(F.block(l, m), expected[rows, columns])
    J = torch.stack([F.pull(s) for s in torch.eye(F.S * F.N).double().view(-1, F.S, F.N)])
    assert_close(J.T @ J / F.N, expected)
    space = SampleSpace(F)
    for l, s in enumerate(F.partition.slices):
        assert_close(space.kernel(l), J[:, s] @ J[:, s].T / F.N)
    assert_close(space.norms(), F.partition.norms(expected), 1e-7)


@pytest.mark.parametrize("conv, shape", [
    (nn.Conv1d(4, 4, 2, groups=4), (4, 5)), (nn.Conv1d(6, 3, 2, groups=3, bias=False), (6, 4)),
    (nn.Conv3d(2, 4, 2, groups=2), (2, 2, 3, 2)),
])  # fmt: skip
def test_other_dimensions(conv, shape):
    torch.manual_seed(1)
    model, x = net(conv).double(), normal(3, *shape)
    F = kv.capture(model, x, likelihood="categorical")
    assert_close(F.dense(), fisher_by_backward(model, x, F.partition, "categorical"))
    assert F.a[0].shape[0] == conv.groups == F.kronecker().G[0].shape[0]


def test_the_inputs_are_the_patches_of_each_group():
    model, x = make("groups"), normal(4, *SHAPE)
    F = kv.capture(model, x, likelihood="categorical")
    patches = functional.unfold(x, 2).mT.unflatten(2, (2, -1)).movedim(2, 0)  # (groups, N, L, 8)
    assert_close(F.a[0], torch.cat([patches, torch.ones_like(patches[..., :1])], -1))
    assert F.g[0].shape == (2, F.S, 4, 4, 3)
    A = torch.einsum("hnti,hntj->hij", F.a[0], F.a[0]) / (4 * 4)
    assert_close(F.kronecker().A[0], A)
    assert str(F.partition.layers[0]) == "conv: 2 × (8+1→3)"


def factors_of(F: kv.Fisher, l: int, convention: str) -> tuple[Tensor, Tensor]:
    """(A, G) of every group of layer l from its inputs and vectors, written out."""
    layer = F.partition.layers[l]
    a, g = F.a[l], F.g[l]
    expand = convention == "expand" or isinstance(a, OneHot)
    a = (a.dense() if isinstance(a, OneHot) else a).reshape(layer.groups, *a.shape[-3:])
    g = g.view(layer.groups, *g.shape[-4:])
    if not expand:
        a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
    T = a.shape[2]
    return torch.einsum("hnti,hntj->hij", a, a) / (F.N * T), torch.einsum("hsnto,hsntp->hop", g, g) / F.N


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", GROUPED)
def test_kfac_has_a_pair_of_factors_for_each_group(name, convention):
    F = kv.capture(make(name), normal(4, *SHAPE), likelihood="categorical")
    layers, λ = range(len(F.partition)), 0.1
    pairs = [factors_of(F, l, convention) for l in layers]
    v = normal(F.partition.size, 2)
    blocks = torch.block_diag(*(torch.kron(g, a) for A, G in pairs for a, g in zip(A, G, strict=True)))
    M = kv.KFAC(F, λ, "eigen", convention)
    expected = torch.linalg.inv(blocks + λ * torch.eye(len(blocks)).double())
    assert_close(M.dense(), expected, 1e-10)
    assert_close(M @ v, expected @ v, 1e-10)
    values = torch.cat([d.flatten() for d in M.eigenvalues()]).sort()[0]
    assert_close(values, torch.linalg.eigvalsh(expected), 1e-10)
    assert_close(torch.block_diag(*M.factors.blocks()), blocks)
    U = torch.block_diag(*M.factors.basis())
    assert_close((U * torch.cat([d.flatten() for d in M.eigenvalues()])) @ U.T, expected, 1e-10)
    assert [d.shape for d in M.eigenvalues()] == [layer.shape for layer in F.partition.layers]

    def damped(a: Tensor, g: Tensor) -> Tensor:
        π = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
        root = λ**0.5
        return torch.kron(g + root / π * torch.eye(len(g)).double(), a + π * root * torch.eye(len(a)).double())

    units = [(a, g) for A, G in pairs for a, g in zip(A, G, strict=True)]
    expected = torch.linalg.inv(torch.block_diag(*(damped(a, g) for a, g in units)))
    M = kv.KFAC(F, λ, "factored", convention)
    assert_close(torch.linalg.inv(torch.block_diag(*M.factors.blocks(λ))), expected, 1e-10)
    assert_close(M.dense(), expected, 1e-10)
    assert_close(M @ v, expected @ v, 1e-10)
    assert_close(torch.cat([d.flatten() for d in M.eigenvalues()]).sort()[0], torch.linalg.eigvalsh(expected), 1e-10)


@pytest.mark.parametrize("name", ["groups", "no bias", "beside layers of its shape", "after an embedding"])
def test_the_map_of_layers_says_what_kfac_misses_of_each_block(name):
    F = kv.capture(make(name), normal(4, *SHAPE), likelihood="categorical")
    exact, norms = F.dense(), SampleSpace(F).norms().diagonal()
    missed = []
    for l, s in enumerate(F.partition.slices):
        pairs = zip(*factors_of(F, l, "expand"), strict=True)
        missed.append((exact[s, s] - torch.block_diag(*(torch.kron(g, a) for a, g in pairs))).norm())
    assert_close(blocks_missed(F, norms), torch.stack(missed), 1e-6)


def test_a_group_that_is_singular_is_named():
    x = normal(4, *SHAPE)
    x[:, 2] = 0
    F = kv.capture(make("no bias"), x, likelihood="categorical")
    with pytest.raises(ValueError, match="Group 2 of layer 'conv' is singular"):
        kv.KFAC(F, 0.0)
    g = [X.clone() for X in F.kronecker().G]
    g[0][3] *= -1
    with pytest.raises(ValueError, match="Factor G of group 3 of layer 'conv' is not positive semi-definite"):
        kv.KFAC(kv.KroneckerFactors(F.partition, F.kronecker().A, tuple(g)), 0.1)


def test_the_factored_rule_falls_back_to_eigenvectors_in_groups_as_well():
    x = torch.tensor([1.0, 2, 4, 8]).double().view(1, 4, 1, 1).expand(4, *SHAPE)  # A of the groups has rank one
    F = kv.capture(make("no bias"), x, likelihood="categorical")
    M, v = kv.KFAC(F, 1e-60, "factored"), normal(F.partition.size)
    assert M.fallbacks and (M @ v).isfinite().all()
    assert_close(M.dense() @ v, M @ v, 1e-6)


@pytest.mark.parametrize("name", ["groups", "depthwise", "no bias", "one position", "beside layers of its shape"])
def test_ekfac_has_the_variances_along_the_eigenvectors_of_each_group(name):
    F = kv.capture(make(name), normal(4, *SHAPE), likelihood="categorical")
    matrix, units = F.dense(), []
    for l in range(len(F.partition)):
        units += zip(*factors_of(F, l, "expand"), strict=True)
    U = torch.block_diag(*(torch.kron(*(torch.linalg.eigh(X)[1].contiguous() for X in (g, a))) for a, g in units))
    expected = U @ torch.diag(1 / ((U.T @ matrix @ U).diagonal() + 0.1)) @ U.T
    M, v = kv.EKFAC(F, 0.1), normal(F.partition.size)
    assert_close(M.dense(), expected, 1e-9)
    assert_close(M @ v, expected @ v, 1e-9)


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("name", ["groups", "depthwise", "beside layers of its shape"])
def test_columns_of_spectral_and_smooth_are_of_the_whole_layer(name, rule):
    F = kv.capture(make(name), normal(4, *SHAPE), likelihood="categorical")
    M, v = kv.KFAC(F, 0.1, rule), normal(F.partition.size)
    matrix = F.dense()
    blocks = [
        torch.block_diag(*map(torch.kron, *(X.view(-1, *X.shape[-2:]) for X in (M.factors.G[l], M.factors.A[l]))))
        for l in range(len(F.partition))
    ]
    for space, largest in ((kv.coarse.spectral, True), (kv.coarse.smooth, False)):
        for count in (1, 5, 100):
            Z = space(M, count)
            for block, (W, U) in zip(blocks, Z.factors, strict=True):
                k = min(count, len(block))
                assert W.shape[1] == k
                columns = torch.einsum("ok,ik->oik", W, U).flatten(0, 1)
                d = (columns * (block @ columns)).sum(0)
                assert_close(columns.T @ columns, torch.eye(k).double(), 1e-11)
                assert float((block @ columns - columns * d).abs().max()) < 1e-12 * float(block.norm())
                ends = torch.linalg.eigvalsh(block).sort(descending=largest)[0][:k]
                assert float((d.sort(descending=largest)[0] - ends).abs().max()) < 1e-12 * float(block.norm())
            assert_close(F.galerkin(Z), Z.dense().T @ matrix @ Z.dense(), 1e-11)
            assert_close(F.image(Z).restrict(v), Z.dense().T @ matrix @ v, 1e-11)
    A = F.damped(0.1)
    for Z in (kv.coarse.nicolaides(F, 3), kv.coarse.random(F, 3), kv.coarse.krylov(A, M, v, 3),
              kv.coarse.spectral(M.factors.leading(3, full=0), 3)):  # fmt: skip
        assert_close(F.galerkin(Z), Z.dense().T @ matrix @ Z.dense(), 1e-11)


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["groups", "beside layers of its shape", "a chain", "after an embedding"])
def test_the_kronecker_model_takes_each_group_for_a_layer(name, convention):
    F = kv.capture(make(name), normal(4, *SHAPE), likelihood="categorical")
    one_hot = [isinstance(a, OneHot) for a in F.a]
    reduced = [convention == "reduce" and not one for one in one_hot]
    T = max(1 if less else g.shape[-2] for g, less in zip(F.g, reduced, strict=True))
    rows = []
    for a, g, layer, less, one in zip(F.a, F.g, F.partition.layers, reduced, one_hot, strict=True):
        a = (a.dense() if one else a).reshape(layer.groups, *a.shape[-3:])
        for a_, g_ in zip(a, g.view(layer.groups, *g.shape[-4:]), strict=True):
            if less:
                a_, g_ = a_.mean(1, keepdim=True), g_.sum(2, keepdim=True)
            t = a_.shape[1]
            if t == 1:
                a_, g_ = (x.repeat_interleave(T, -2) / T**0.5 for x in (a_, g_))
            else:
                a_, g_ = (functional.pad(x, (0, 0, 0, T - t)) for x in (a_ / t**0.5, g_))
            rows.append((a_.flatten(0, 1), g_.flatten(0, 2)))
    matrix = torch.cat([torch.cat([torch.kron(g.T @ h, a.T @ b) for b, h in rows], 1) for a, g in rows]) / F.N**2
    K, v = kv.KroneckerFisher(F, convention), normal(F.partition.size, 2)
    assert_close(K.dense(), matrix)
    assert_close(K @ v, matrix @ v)
    assert_close(K @ v[:, 0], matrix @ v[:, 0])
    for Z in (kv.coarse.spectral(F, 3), kv.coarse.random(F, 3), kv.coarse.nicolaides(F, 2),
              kv.coarse.krylov(F.damped(0.1), kv.KFAC(F, 0.1), v[:, 0], 2)):  # fmt: skip
        assert_close(K.galerkin(Z), Z.dense().T @ matrix @ Z.dense(), 1e-11)
    for l, m in ((0, 1), (1, 0), (0, -1)):
        A, G = F.factors(l, m, convention)
        if A.ndim == 2:
            A, G = A[None, None], G[None, None]
        block = torch.cat([torch.cat([torch.kron(g, a) for g, a in zip(*row, strict=True)], 1)
                           for row in zip(G, A, strict=True)])  # fmt: skip
        assert_close(block, matrix[F.partition.slices[l], F.partition.slices[m]])


@pytest.mark.parametrize("name", ["groups", "a chain"])
def test_the_tridiagonal_inverse_of_two_layers_is_exact(name):
    """``M⁻¹`` has K's blocks on the diagonal and next to it, what lies between groups included."""
    F = kv.capture(make(name), normal(4, *SHAPE), likelihood="categorical")
    K, M, λ = kv.KroneckerFisher(F).dense(), kv.BlockTridiagonal(F, 0.1), 0.1
    plain, damped = [], []
    for l in range(len(F.partition)):
        for a, g in zip(*factors_of(F, l, "expand"), strict=True):
            π = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
            plain.append(torch.kron(g, a))
            damped.append(torch.kron(g + λ**0.5 / π * torch.eye(len(g)).double(),
                                     a + π * λ**0.5 * torch.eye(len(a)).double()))  # fmt: skip
    K = K - torch.block_diag(*plain) + torch.block_diag(*damped)
    found = torch.linalg.inv(M.dense())
    for l, rows in enumerate(F.partition.slices):
        for columns in F.partition.slices[l : l + 2]:
            assert_close(found[rows, columns], K[rows, columns], 1e-9)


# ---- training ----------------------------------------------------------------------------------------

OPTIONS = {"likelihood": "categorical", "fisher": "exact", "damping": 0.1, "observe_every": 1, "refresh_every": 1,
           "per_layer": 3, "step_rule": "fixed", "lr": 0.05}  # fmt: skip


def train(model: nn.Module, opt: kv.TwoLevelKFAC, steps: int, first: int = 0) -> list[float]:
    losses = []
    for i in range(first, first + steps):
        x = normal(8, 4, 3 + i % 2, 3, seed=i)
        opt.zero_grad()
        loss = kv.nll(model(x), (x.sum((1, 2, 3)) > 0).long(), "categorical")
        loss.backward()
        opt.observe(x)
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("name", ["groups", "depthwise", "beside layers of its shape"])
def test_the_first_step_is_the_preconditioned_gradient_and_averages_are_of_each_group(name, rule):
    model = make(name)
    opt = kv.TwoLevelKFAC(model, **OPTIONS, rule=rule, momentum=0.0, coarse_window=1, decay=0.5)
    before = opt.partition.pack(model)
    F = kv.capture(model, normal(8, *SHAPE, seed=0), likelihood="categorical")
    train(model, opt, 1)
    T, g = opt.preconditioner, opt.partition.pack_grad(model)
    assert_close(opt.partition.pack(model) - before, -0.05 * (T @ g), 1e-10)
    Ad, Zd = F.dense() + 0.1 * torch.eye(F.partition.size).double(), T.Z.dense()
    Q, M = Zd @ torch.linalg.inv(Zd.T @ Ad @ Zd) @ Zd.T, kv.KFAC(F, 0.1, rule).dense()
    P = torch.eye(len(Ad)).double() - Ad @ Q
    assert_close(T @ g, Q @ g + P.T @ M @ P @ g, 1e-9)
    second = kv.capture(model, normal(8, 4, 4, 3, seed=1), likelihood="categorical")
    train(model, opt, 1, first=1)
    for l in range(len(F.partition)):
        for which, found in enumerate((opt.preconditioner.M.factors.A[l], opt.preconditioner.M.factors.G[l])):
            one, two = (factors_of(x, l, "expand")[which] for x in (F, second))
            assert_close(found.view(one.shape), (0.5 * one + two) / 1.5)


@pytest.mark.parametrize("options", [
    {}, {"rule": "factored"}, {"coarse": "krylov"}, {"coarse_operator": "kronecker", "correction": "additive"},
    {"coarse": "smooth", "convention": "reduce", "coarse_operator": "kronecker", "correction": "additive"},
])  # fmt: skip
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(options):
    model, options = make("beside layers of its shape"), OPTIONS | options
    opt = kv.TwoLevelKFAC(model, **options)
    losses = train(model, opt, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make("beside layers of its shape")
    other.load_state_dict(state["model"])
    again = kv.TwoLevelKFAC(other, **options)
    again.load_state_dict(state["opt"])
    v = normal(opt.partition.size)
    assert torch.equal(again.preconditioner @ v, opt.preconditioner @ v)
    assert train(model, opt, 6, first=3) == train(other, again, 6, first=3)
    assert all(loss == loss for loss in losses)


def test_nothing_grows_with_the_square_of_the_groups():
    torch.manual_seed(0)
    model, x = net(nn.Conv2d(32, 32, 3, groups=32)), torch.randn(4, 32, 4, 4)
    F = kv.capture(model, x, likelihood="categorical")
    assert F.g[0].numel() == F.S * 4 * 4 * 32 and F.a[0].numel() == 4 * 4 * 32 * 10
    assert F.kronecker().A[0].shape == (32, 10, 10) and F.kronecker().G[0].shape == (32, 1, 1)


def test_a_layer_is_made_of_groups_of_one_size():
    with pytest.raises(ValueError, match="has 5 rows: not 2 groups of one size"):
        kv.method.partition.Layer("conv", 5, 3, groups=2)


@pytest.mark.parametrize("name", ["groups", "after an embedding"])
def test_explore_shows_such_a_model(name):
    panel = kv.explore(make(name), normal(6, *SHAPE), likelihood="categorical")
    assert "exact natural gradient 1, 1, 1" in panel.children[-1].value
