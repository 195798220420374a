"""Every way in which a model may use its parameters, against per-example derivatives that share no code with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import Model, assert_close, normal, output_hessian
from torch import Tensor, nn
from torch.nn import functional

import kfac_viz as kv


class Subclass(nn.Linear):
    """A layer with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(2 * super().forward(x)) + functional.linear(x * x, self.weight)


class GRUCell(nn.Module):
    """A gated recurrent unit written with Linear layers, over the positions of a sequence."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.x, self.h, self.head, self.m = nn.Linear(n, 3 * m), nn.Linear(m, 3 * m), nn.Linear(m, 3), m

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.m)
        for t in range(x.shape[1]):
            (a, b, c), (d, e, f) = self.x(x[:, t]).chunk(3, 1), self.h(h).chunk(3, 1)
            reset, update = torch.sigmoid(a + d), torch.sigmoid(b + e)
            h = (1 - update) * torch.tanh(c + reset * f) + update * h
        return self.head(h)


def attention(**options) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(4, 2, **options)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):  # which starts at 0
            nn.init.normal_(p)
    return layer


def encoder(layers: int = 1, **options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def mean_of(s: Model, x: Tensor) -> Tensor:
    return s.head(s.body(x).mean(1))


def with_attention(call: Callable[..., Tensor], **options) -> Model:
    return Model(call, mix=attention(**options), head=nn.Linear(4, 3))


def conv_net(conv: nn.Module, space: int) -> nn.Module:
    x = torch.zeros(2, 2, *(5,) * space)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(conv(x).flatten(1).shape[1], 3))


def norm_net(norm: nn.Module, shape: tuple[int, ...] = (4,)) -> nn.Module:
    for p in norm.parameters():
        nn.init.normal_(p, 1.0)
    return Model(
        lambda s, x: s.head(torch.tanh(s.norm(x)).flatten(1)), norm=norm, head=nn.Linear(torch.Size(shape).numel(), 3)
    )


def settled(norm: nn.Module) -> nn.Module:
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def tied(bias: bool) -> Model:
    def run(s: Model, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(s.enc(x)), s.enc.weight.t(), s.shift if bias else None)

    return Model(run, enc=nn.Linear(4, 3), **({"shift": torch.randn(4)} if bias else {}))


def tied_words() -> Model:
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6)
    head.weight = table.weight
    return Model(lambda s, x: s.head(torch.tanh(s.table(x)).mean(1)), table=table, head=head)


def tied_modules() -> nn.Module:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), nn.Linear(4, 3))


TOKENS, PLAIN, IMAGE = (5, 4), (4,), (2, 5, 5)
BLOCK = {"batch_first": True}
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # attention
    "self": (lambda: with_attention(lambda s, x: s.head(s.mix(x, x, x)[0].mean(1)), **BLOCK), TOKENS),
    "self, weights off": (
        lambda: with_attention(lambda s, x: s.head(s.mix(x, x, x, need_weights=False)[0].mean(1)), **BLOCK), TOKENS),
    "self, tokens first": (
        lambda: with_attention(lambda s, x: s.head(s.mix(*3 * (x.transpose(0, 1),))[0].mean(0))), TOKENS),
    "cross": (lambda: with_attention(lambda s, x: s.head(s.mix(x[:, :2], x, x)[0].mean(1)), **BLOCK), TOKENS),
    "three sources": (
        lambda: with_attention(lambda s, x: s.head(s.mix(x[:, :2], x, torch.sin(x))[0].mean(1)), **BLOCK), TOKENS),
    "other sizes": (
        lambda: with_attention(lambda s, x: s.head(s.mix(x[:, :2], x[..., :3], x[..., :2])[0].mean(1)),
                               kdim=3, vdim=2, **BLOCK), TOKENS),
    "biases of k and v": (
        lambda: with_attention(lambda s, x: s.head(s.mix(x, x, x)[0].mean(1)), add_bias_kv=True, **BLOCK), TOKENS),
    "without bias": (
        lambda: with_attention(lambda s, x: s.head(s.mix(x, x, x)[0].mean(1)), bias=False, **BLOCK), TOKENS),
    "masked": (
        lambda: with_attention(lambda s, x: s.head(s.mix(
            x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool(), need_weights=False)[0].mean(1)), **BLOCK), TOKENS),
    "padded": (
        lambda: with_attention(lambda s, x: s.head(s.mix(x, x, x, key_padding_mask=x[..., 0] > 1)[0].mean(1)), **BLOCK),
        TOKENS),
    "encoder layer": (lambda: Model(mean_of, body=encoder(**BLOCK), head=nn.Linear(4, 3)), TOKENS),
    "two layers, norms first": (
        lambda: Model(mean_of, body=encoder(2, norm_first=True, **BLOCK), head=nn.Linear(4, 3)), TOKENS),
    "encoder, tokens first": (
        lambda: Model(lambda s, x: s.head(s.body(x.transpose(0, 1)).mean(0)), body=encoder(), head=nn.Linear(4, 3)),
        TOKENS),
    "decoder": (
        lambda: Model(lambda s, x: s.head(s.body(x[:, :2], x).mean(1)), head=nn.Linear(4, 3),
                      body=nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)), TOKENS),
    "class token and places": (
        lambda: Model(lambda s, x: s.head(s.body(torch.cat([s.token.expand(len(x), -1, -1), x], 1) + s.shift)[:, 0]),
                      token=torch.randn(1, 1, 4), shift=torch.randn(4), body=encoder(**BLOCK), head=nn.Linear(4, 3)),
        TOKENS),
    # reused, transposed, shared
    "tied": (lambda: tied(False), PLAIN),
    "tied, bias of its own": (lambda: tied(True), PLAIN),
    "tied words": (tied_words, ()),
    "tied modules": (tied_modules, PLAIN),
    "used twice": (
        lambda: Model(lambda s, x: s.head(torch.tanh(s.one(torch.tanh(s.one(x))))), one=nn.Linear(4, 4),
                      head=nn.Linear(4, 3)), PLAIN),
    "bias used again": (lambda: Model(lambda s, x: torch.tanh(s.one(x)) * s.one.bias, one=nn.Linear(4, 4)), PLAIN),
    "without its bias": (
        lambda: Model(lambda s, x: s.one(x) * functional.linear(x.sin(), s.one.weight), one=nn.Linear(4, 3)), PLAIN),
    "some rows": (
        lambda: Model(lambda s, x: s.one(x)[:, :2] + functional.linear(x.sin(), s.one.weight[1:3], s.one.bias[1:3]),
                      one=nn.Linear(4, 3)), PLAIN),
    # functions
    "functional": (
        lambda: Model(lambda s, x: functional.linear(torch.tanh(functional.linear(x, s.one, s.b)), s.two),
                      one=torch.randn(5, 4), b=torch.randn(5), two=torch.randn(3, 5)), PLAIN),
    "products": (
        lambda: Model(lambda s, x: torch.tanh(x @ s.one + s.b) @ s.two, one=torch.randn(4, 5), b=torch.randn(5),
                      two=torch.randn(5, 3)), PLAIN),
    "scaled": (
        lambda: Model(lambda s, x: s.one(x) * s.scale * s.gain + s.shift, one=nn.Linear(4, 3), scale=torch.randn(3),
                      gain=torch.randn(()), shift=torch.randn(1, 3)), PLAIN),
    "subclass": (lambda: nn.Sequential(Subclass(4, 5), nn.Linear(5, 3)), PLAIN),
    "written-out GRU": (lambda: GRUCell(4, 3), TOKENS),
    "in place": (
        lambda: Model(lambda s, x: s.head(torch.relu_(s.one(x)).mean(1)), one=nn.Linear(4, 5), head=nn.Linear(5, 3)),
        TOKENS),
    "in place and skip": (
        lambda: Model(lambda s, x: s.head(x + torch.relu_(s.one(x))), one=nn.Linear(4, 4), head=nn.Linear(4, 3)),
        PLAIN),
    "flattened": (
        lambda: Model(lambda s, x: s.head(torch.tanh(s.one(x.flatten(0, 1))).view(len(x), -1, 5).mean(1)),
                      one=nn.Linear(4, 5), head=nn.Linear(5, 3)), TOKENS),
    "flattened the other way": (
        lambda: Model(lambda s, x: s.head(torch.tanh(s.one(x.transpose(0, 1).flatten(0, 1))).view(
                      -1, len(x), 5).mean(0)), one=nn.Linear(4, 5), head=nn.Linear(5, 3)), TOKENS),
    # convolutions
    "conv, one axis": (lambda: conv_net(nn.Conv1d(2, 3, 3, stride=2, padding=1), 1), (2, 5)),
    "conv, strided and dilated": (lambda: conv_net(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 2)), 2), IMAGE),
    "conv, same": (lambda: conv_net(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), 2), IMAGE),
    "conv, reflected": (lambda: conv_net(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2), IMAGE),
    "conv, groups": (lambda: conv_net(nn.Conv2d(2, 4, 3, stride=2, groups=2), 2), IMAGE),
    "conv, depthwise": (lambda: conv_net(nn.Conv2d(2, 2, 3, groups=2, bias=False), 2), IMAGE),
    "conv, three axes": (lambda: conv_net(nn.Conv3d(2, 2, (1, 2, 3), stride=(2, 1, 1)), 3), (2, 5, 5, 5)),
    # embeddings and norms
    "embedding": (lambda: Model(mean_of, body=nn.Embedding(6, 4), head=nn.Linear(4, 3)), ()),
    "embedding, padded": (lambda: Model(mean_of, body=nn.Embedding(6, 4, padding_idx=2), head=nn.Linear(4, 3)), ()),
    "layer norm": (lambda: norm_net(nn.LayerNorm(4)), PLAIN),
    "layer norm, two axes": (lambda: norm_net(nn.LayerNorm((5, 4)), TOKENS), TOKENS),
    "layer norm, positions": (lambda: norm_net(nn.LayerNorm(4, bias=False), TOKENS), TOKENS),
    "rms norm": (lambda: norm_net(nn.RMSNorm(4)), PLAIN),
    "batch norm": (lambda: norm_net(settled(nn.BatchNorm1d(4))), PLAIN),
    "batch norm, images": (lambda: norm_net(settled(nn.BatchNorm2d(2)), IMAGE), IMAGE),
    "group norm": (lambda: norm_net(nn.GroupNorm(1, 2), IMAGE), IMAGE),
    "instance norm": (lambda: norm_net(nn.InstanceNorm2d(2, affine=True), IMAGE), IMAGE),
}  # fmt: skip


def build(name: str, n: int = 6) -> tuple[nn.Module, Tensor]:
    make, shape = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
        for p in model.parameters():
            p.data = p.data.double()
        x = normal(n, *shape) if shape else torch.randint(0, 6, (n, 5), generator=torch.Generator().manual_seed(1))
    return model, x


def random_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in model.named_parameters():
        found[name] = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = found[name].clone()
    return found


def directional(model: nn.Module, x: Tensor, tangents: dict[str, Tensor]) -> Tensor:
    """The derivative of every example's outputs along ``tangents``, (N, outputs), one example and output at a time."""
    parameters = dict(model.named_parameters())

    def along(output: Tensor) -> Tensor:
        grads = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = [(g, tangents[name]) for name, g in zip(parameters, grads, strict=True) if g is not None]
        return sum(((g * tangent).sum() for g, tangent in pairs), torch.zeros(()).double())

    return torch.stack([torch.stack([along(y) for y in model(z[None])[0].flatten()]) for z in x])


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", ZOO)
def test_every_use_is_in_the_fisher(name, likelihood):
    """``g_iᵀ F g_j`` for random gradients of all parameters, whatever the layout of a layer is."""
    model, x = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F = kv.capture(model, x, likelihood=likelihood)
    assert F.partition.size == F.partition.total == sum(p.numel() for p in model.parameters())
    tangents = [random_gradients(model, seed) for seed in range(4)]
    G = []
    for tangent in tangents:
        for key, p in model.named_parameters():
            p.grad = tangent[key]
        G.append(F.partition.pack_grad(model))
    G = torch.stack(G, 1)
    H = output_hessian(model(x), likelihood)
    r = torch.stack([directional(model, x, tangent) for tangent in tangents])
    expected = torch.einsum("ina,nab,jnb->ij", r, H, r) / len(x)
    assert_close(G.T @ (F @ G), expected, 1e-11)
    assert_close(G.T @ F.dense() @ G, expected, 1e-11)
    assert_close(F.diagonal(), F.dense().diagonal(), 1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 17])
@pytest.mark.parametrize("name", ["self, tokens first", "encoder layer", "tied words", "flattened the other way"])
def test_the_examples_are_found_whatever_their_number(name, n):
    """Also where there are as many positions as examples, and where only one example can be seen."""
    model, x = build(name, n)
    if n == 1:
        with pytest.warns(UserWarning, match="One example alone cannot show"):
            F = kv.capture(model, x, likelihood="gaussian")
    else:
        F = kv.capture(model, x, likelihood="gaussian")
    tangent = random_gradients(model, 3)
    g = F.partition.pack_grad(model)
    assert F.N == n
    assert_close(g @ (F @ g), directional(model, x, tangent).square().sum() / n, 1e-11)


def test_one_example_is_told_once_that_it_cannot_be_checked():
    model, x = build("encoder layer", 1)
    with pytest.warns(UserWarning, match="One example alone cannot show") as told:
        kv.capture(model, x, likelihood="gaussian")
        kv.capture(model, x, likelihood="gaussian")
    assert len(told) == 1 and told[0].filename == __file__


def test_as_many_positions_as_examples_do_not_confuse_a_model_that_was_seen_before():
    """The place of the examples is remembered by the form of the pass, and looked for again where it does not fit."""
    model, x = build("self, tokens first", 6)
    kv.capture(model, x, likelihood="gaussian")
    for y in (normal(5, 5, 4, seed=3), normal(7, 3, 4, seed=4)):
        F, tangent = kv.capture(model, y, likelihood="gaussian"), random_gradients(model, 5)
        g = F.partition.pack_grad(model)
        assert_close(g @ (F @ g), directional(model, y, tangent).square().sum() / len(y), 1e-11)


def test_compiled_parts_run_as_they_were_written():
    model, x = build("encoder layer")
    expected = kv.capture(copy.deepcopy(model), x, likelihood="gaussian").dense()
    model.body = torch.compile(model.body, backend="eager")
    F = kv.capture(model, x, likelihood="gaussian")
    assert F.partition.size == F.partition.total and torch.equal(F.dense(), expected)


def test_half_precision_is_captured_in_single_precision():
    model, x = build("encoder layer")
    F = kv.capture(model.to(torch.bfloat16), x.bfloat16(), likelihood="gaussian")
    assert F.dtype == torch.float32
    exact = kv.capture(model.double(), x.bfloat16().double(), likelihood="gaussian")
    assert float((F.dense().double() - exact.dense()).norm()) < 0.05 * float(exact.dense().norm())


# ---- what K-FAC makes of them --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["eigen", "factored"])
@pytest.mark.parametrize("name", ["layer norm, positions", "layer norm, two axes", "rms norm", "batch norm, images"])
def test_the_block_of_a_norm_is_exact_and_takes_the_whole_damping(name, rule):
    model, x = build(name)
    F = kv.capture(model, x, likelihood="categorical")
    s = F.partition.slices[F.partition.index("norm")]
    expected = torch.linalg.inv(F.dense()[s, s] + 0.1 * torch.eye(s.stop - s.start, dtype=torch.float64))
    M = kv.KFAC(F, 0.1, rule)
    assert_close(M.dense()[s, s], expected, 1e-11)
    v = normal(F.partition.size)
    assert_close((M @ v)[s], expected @ v[s], 1e-11)
    assert_close(M.with_damping(0.3).dense(), kv.KFAC(F, 0.3, rule).dense(), 1e-12)


def van_loan(matrix: Tensor, out: int, features: int) -> Tensor:
    """The nearest product (out, out) ⊗ (features, features), by the singular vectors of the rearranged matrix."""
    R = matrix.view(out, features, out, features).transpose(1, 2).reshape(out * out, features * features)
    U, s, V = torch.linalg.svd(R)
    return torch.kron((s[0] * U[:, 0]).view(out, out), V[0].view(features, features))


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["tied", "tied, bias of its own", "tied words"])
def test_a_tied_weight_gets_the_product_nearest_to_the_sum_over_its_uses(name, convention):
    model, x = build(name)
    F = kv.capture(model, x, likelihood="categorical")
    l = next(l for l, n in enumerate(F.swapped) if n)
    a, g, T = F.a[l], F.g[l], F.a[l].shape[2] - F.swapped[l]
    N, terms = F.N, []
    for rows, vectors in ((a[0, :, :T], g[:, :, :T]), (g[0, :, T:], a[:, :, T:])):
        if convention == "reduce":
            rows, vectors = rows.mean(1, keepdim=True), vectors.sum(2, keepdim=True)
        A = torch.einsum("nti,ntj->ij", rows, rows) / (N * rows.shape[1])
        terms.append((A, torch.einsum("snto,sntp->op", vectors, vectors) / N))
    (A1, G1), (G2, A2) = terms
    layer = F.partition.layers[l]
    expected = van_loan(torch.kron(G1, A1) + torch.kron(G2, A2), layer.out, layer.features)
    A, G = F.factors(l, l, convention)
    assert_close(torch.kron(G, A), expected, 1e-10)
    assert min(float(torch.linalg.eigvalsh(X)[0] / torch.linalg.eigvalsh(X)[-1]) for X in (A, G)) > -1e-12


@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["encoder layer", "cross", "class token and places", "embedding", "conv, groups"])
def test_the_kronecker_model_takes_layers_with_other_numbers_of_positions(name, convention):
    """Positive semi-definite, with K-FAC's blocks on its diagonal."""
    model, x = build(name)
    F = kv.capture(model, x, likelihood="categorical")
    K, f = kv.KroneckerFisher(F, convention), F.kronecker(convention)
    matrix = K.dense()
    d = torch.linalg.eigvalsh(matrix)
    assert float(d[0]) > -1e-12 * float(d[-1])
    for l, (s, layer) in enumerate(zip(F.partition.slices, F.partition.layers, strict=True)):
        own = matrix[s, s].unflatten(0, (layer.groups, -1)).unflatten(2, (layer.groups, -1))
        A, G = (X.view(layer.groups, *X.shape[-2:]) for X in (f.dense_A(l), f.G[l]))
        for i in range(layer.groups):
            assert_close(own[i, :, i], torch.kron(G[i], A[i]), 1e-12)
    Z = kv.coarse.spectral(F, 2)
    assert_close(K.galerkin(Z), Z.dense().T @ matrix @ Z.dense(), 1e-11)
    v = normal(F.partition.size)
    assert_close(K @ v, matrix @ v, 1e-11)


def test_the_kronecker_model_of_a_tied_weight_is_refused_by_name():
    model, x = build("tied")
    with pytest.raises(ValueError, match="layer 'enc' is used transposed"):
        kv.KroneckerFisher(kv.capture(model, x, likelihood="gaussian"))


@pytest.mark.parametrize("correction", ["additive", "a-def1", "a-def2", "balanced"])
@pytest.mark.parametrize("name", ["encoder layer", "tied words"])
def test_both_levels_of_a_model_of_many_kinds_of_layers(name, correction):
    model, x = build(name)
    F = kv.capture(model, x, likelihood="categorical")
    A, M = F.damped(0.1), kv.KFAC(F, 0.1, "factored")
    krylov = kv.coarse.krylov(A, M, normal(F.partition.size), 2)
    for Z in (kv.coarse.spectral(F, 3), kv.coarse.nicolaides(F, 2), krylov):
        Zd, Ad, Md = Z.dense(), A.dense(), M.dense()
        Q, eye = Zd @ torch.linalg.inv(Zd.T @ Ad @ Zd) @ Zd.T, A.eye()
        P = eye - Ad @ Q
        expected = {
            "additive": Md + Q, "a-def1": Q + Md @ P, "a-def2": Md + Q @ (eye - Ad @ Md), "balanced": Q + P.T @ Md @ P,
        }[correction]  # fmt: skip
        T, v = kv.TwoLevel(A, M, Z, correction), normal(F.partition.size, seed=4)
        assert_close(T.dense(), expected, 1e-9)
        assert_close(T @ v, expected @ v, 1e-9)


# ---- training ----------------------------------------------------------------------------------------


def train(model: nn.Module, x: Tensor, opt: kv.TwoLevelKFAC, steps: int, batch: int | None = None) -> list[float]:
    y, losses = torch.arange(len(x)) % 3, []
    for _ in range(steps):
        opt.zero_grad()
        parts = [slice(None)] if batch is None else [slice(i, i + batch) for i in range(0, len(x), batch)]
        total = 0.0
        for part in parts:
            loss = kv.nll(model(x[part]), y[part], "categorical") * (len(x[part]) / len(x))
            loss.backward()
            total += float(loss.detach())
        for part in parts:
            opt.observe(x[part])
        opt.step()
        losses.append(total)
    return losses


OPTIONS = {"likelihood": "categorical", "fisher": "exact", "damping": 0.1, "observe_every": 1, "refresh_every": 1,
           "per_layer": 4}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["two layers, norms first", "encoder, tokens first", "tied words", "class token and places", "conv, groups"]
)
def test_every_parameter_moves_by_the_preconditioned_step(name):
    """The first step of the optimizer is −lr T g, for every number of the model, and the loss comes down."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, x = build(name, 12)
        opt = kv.TwoLevelKFAC(model, **OPTIONS, step_rule="fixed", lr=0.05, momentum=0.0, coarse_window=1)
        before = opt.partition.pack(model)
        losses = train(model, x, opt, 1)
        T, g = opt.preconditioner, opt.partition.pack_grad(model)
        assert opt.partition.size == sum(p.numel() for p in model.parameters())
        assert_close(opt.partition.pack(model) - before, -0.05 * (T @ g), 1e-10)
        losses += train(model, x, opt, 15)
    assert losses[-1] < losses[0]


def test_an_encoder_is_accumulated_frozen_saved_and_lowered_as_other_models_are():
    model, x = build("encoder layer", 12)
    twin = copy.deepcopy(model)
    one, parts = (kv.TwoLevelKFAC(m, **OPTIONS, step_rule="fixed", lr=0.05, coarse_window=1) for m in (model, twin))
    train(model, x, one, 2)
    train(twin, x, parts, 2, batch=6)
    assert_close(one.partition.pack(model), one.partition.pack(twin), 1e-10)

    for p in model.body.layers[0].self_attn.parameters():
        p.requires_grad_(False)
    kept = model.body.layers[0].self_attn.in_proj_weight.clone()
    with pytest.warns(UserWarning, match="Left out.*self_attn.q"):
        train(model, x, one, 2)
    assert torch.equal(kept, model.body.layers[0].self_attn.in_proj_weight) and "head" in one.partition.names

    resumed, state = copy.deepcopy(twin), copy.deepcopy(parts.state_dict())
    again = kv.TwoLevelKFAC(resumed, **OPTIONS, step_rule="fixed", lr=0.05, coarse_window=1)
    again.load_state_dict(state)
    assert train(twin, x, parts, 3) == train(resumed, x, again, 3)
    assert torch.equal(parts.partition.pack(twin), again.partition.pack(resumed))

    single = build("encoder layer", 12)[0].float()
    opt = kv.TwoLevelKFAC(single, **OPTIONS, coarse_window=1)
    for _ in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = kv.nll(single(x.float()), torch.arange(12) % 3, "categorical")
        loss.backward()
        opt.observe(x.float())
        opt.step()
    assert all(p.isfinite().all() for p in single.parameters())


def test_a_parameter_in_an_unknown_function_follows_adams_rule():
    model = Model(lambda s, x: s.one(x) * s.scale.exp(), one=nn.Linear(4, 3), scale=torch.zeros(3)).double()
    x = normal(12, 4)
    opt = kv.TwoLevelKFAC(model, **OPTIONS, step_rule="fixed", lr=0.05)
    with pytest.warns(UserWarning, match="Adam's steps.*scale"):
        train(model, x, opt, 4)
    assert opt.partition.names == ("one",) and float(model.scale.detach().norm()) > 0
    assert len(opt.curvature.window.parts) == 4, "the window goes on after the parameter was left out"
