"""Every way in which a model may use its parameters, against per-example derivatives that share no code with the package."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close, normal, output_hessian
from torch import Tensor, nn
from torch.nn import functional

import kfac_viz as kv


class Model(nn.Module):
    """Modules and parameters by name, and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


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
    "without bias": (lambda: with_attention(lambda s, x: s.head(s.mix(x, x, x)[0].mean(1)), bias=False, **BLOCK), TOKENS),
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
        lambda: Model(lambda s, x: s.head(x + torch.relu_(s.one(x))), one=nn.Linear(4, 4), head=nn.Linear(4, 3)), PLAIN),
    "flattened": (
        lambda: Model(lambda s, x: s.head(torch.tanh(s.one(x.flatten(0, 1))).view(len(x), -1, 5).mean(1)),
                      one=nn.Linear(4, 5), head=nn.Linear(5, 3)), TOKENS),
    "flattened the other way": (
        lambda: Model(lambda s, x: s.head(torch.tanh(s.one(x.transpose(0, 1).flatten(0, 1))).view(-1, len(x), 5).mean(0)),
                      one=nn.Linear(4, 5), head=nn.Linear(5, 3)), TOKENS),
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
    found = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = found[name].clone()
    return found


def directional(model: nn.Module, x: Tensor, tangents: dict[str, Tensor]) -> Tensor:
    """The derivative of every example's outputs along ``tangents``, (N, outputs), one example and output at a time."""
    parameters = dict(model.named_parameters())

    def along(output: Tensor) -> Tensor:
        grads = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = zip(parameters, grads, strict=True)
        return sum(((grad * tangents[name]).sum() for name, grad in pairs if grad is not None), torch.zeros(()).double())

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
