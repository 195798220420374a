"""Seeded models and data: real digits, and the toy problems of the 2020 paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..method.checks import check_count, check_seed
from .problem import Problem, multilayer_perceptron, seeded
from .rounding import perturbed


def digits(
    widths: Sequence[int] = (12, 12, 12),
    n: int = 500,
    seed: int = 0,
    *,
    side: int = 8,
    activation: str = "tanh",
    standardised_on: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Handwritten digits (scikit-learn's 1,797 of 8×8 pixels), ten classes, a multilayer perceptron.

    Args:
        widths: of the hidden layers.
        n: examples, drawn without replacement.
        seed: of the draw and of the weights.
        side: 8, or 4 for pixels averaged two by two, so that the whole Fisher fits on a screen.
        activation: ``"tanh"``, ``"relu"`` or ``"sigmoid"``.
        standardised_on: the first so many examples, whose mean and deviation standardise all; None for all. Where
            others are to test (:meth:`Problem.split`), they have no part in it then.

    >>> digits(widths=(4,), n=50, side=4)
    Problem(digits 4×4, 50 examples, categorical, 118 parameters in 2 layers (68 + 50))

    Raises:
        ValueError: more examples than there are, or another size, activation or seed.
    """
    x, y = _digits(n, seed, side)
    model = multilayer_perceptron([side * side, *widths, 10], activation, seed)
    inputs = _standardised(x, standardised_on)
    return Problem(model, inputs, y, "categorical", f"digits {side}×{side}").to(device, dtype)


def autoencoder(
    widths: Sequence[int] = (12, 6, 12),
    n: int = 500,
    seed: int = 0,
    *,
    side: int = 8,
    activation: str = "tanh",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """The digits again, as their own targets: pixels in [0, 1] with a Bernoulli likelihood.

    The arguments are those of :func:`digits`.

    >>> autoencoder(widths=(4,), n=50, side=4)
    Problem(digits 4×4 autoencoder, 50 examples, bernoulli, 148 parameters in 2 layers (68 + 80))
    """
    x, _ = _digits(n, seed, side)
    model = multilayer_perceptron([side * side, *widths, side * side], activation, seed)
    return Problem(model, x, x.clone(), "bernoulli", f"digits {side}×{side} autoencoder").to(device, dtype)


class Attention(nn.Module):
    """A classifier of tokens (N, T, features): an embedding, one of PyTorch's encoder layers, their mean, a head."""

    def __init__(self, features: int, width: int, heads: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.encoder = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def attention(
    width: int = 8,
    n: int = 500,
    seed: int = 0,
    *,
    heads: int = 2,
    side: int = 8,
    standardised_on: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """The digits seen by a small transformer: patches of 2×2 pixels are tokens, each with its place in the image.

    Args:
        width: of the tokens inside, a multiple of ``heads``; the hidden layer of the encoder is twice as wide.
        n, seed, side, standardised_on: as for :func:`digits`.
        heads: of the attention.

    >>> attention(width=4, n=50, side=4).inputs.shape  # 4 tokens, each of 4 pixels and its place
    torch.Size([50, 4, 6])
    """
    check_count("heads", heads, least=1)
    if check_count("width", width, least=1) % heads:
        raise ValueError(f"width must be a multiple of the {heads} heads; got {width}.")
    x, y = _digits(n, seed, side)
    x = _standardised(x, standardised_on)
    patches = nn.functional.unfold(x.view(n, 1, side, side), 2, stride=2).mT
    places = torch.linspace(-1, 1, side // 2, dtype=x.dtype, device=x.device)
    places = torch.cartesian_prod(places, places).expand(n, -1, -1)
    with seeded(seed):
        model = Attention(6, width, heads, 2 * width, 10).to(torch.float64)
    return Problem(model, torch.cat([patches, places], 2), y, "categorical", f"digits {side}×{side} as tokens").to(
        device, dtype
    )


def convolutional(
    channels: tuple[int, int] = (8, 16),
    n: int = 500,
    seed: int = 0,
    *,
    standardised_on: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """The digits as images, seen by two convolutions of 3×3 with stride 2 and a Linear layer.

    Args:
        channels: that each convolution makes.
        n, seed, standardised_on: as for :func:`digits`.

    >>> convolutional(n=50).inputs.shape
    torch.Size([50, 1, 8, 8])
    """
    data, (first, second) = digits((), n, seed, standardised_on=standardised_on), channels
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(1, first, 3, stride=2, padding=1), nn.Tanh(),
            nn.Conv2d(first, second, 3, stride=2, padding=1), nn.Tanh(),
            nn.Flatten(), nn.Linear(4 * second, 10),
        ).to(torch.float64)  # fmt: skip
    images = data.inputs.view(-1, 1, 8, 8)
    return Problem(model, images, data.targets, "categorical", "digits 8×8, convolutions").to(device, dtype)


def planted(
    depth: int = 4,
    width: int = 10,
    n: int = 500,
    seed: int = 0,
    *,
    activation: str | None = "tanh",
    batch_norm: bool = False,
    residual: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """The toy problem of the 2020 paper: Gaussian inputs of dimension 10, labels from a planted linear model and
    noise of standard deviation 0.1.

    Args:
        depth: number of Linear layers, at least 1.
        activation: ``None`` for a linear network.
        batch_norm: after every hidden layer, with statistics settled on the data; its scales and shifts stay outside
            the Fisher, as in that paper.
        residual: add the input of every hidden layer but the first to what it gives: ``x + tanh(W x + b)``.

    >>> planted(depth=3, width=5, n=50)
    Problem(planted, 50 examples, gaussian, 91 parameters in 3 layers (55 + 30 + 6))
    """
    check_count("depth", depth, least=1)
    x, y = _regression(n, 10, 1, seed)
    model = multilayer_perceptron([10, *[width] * (depth - 1), 1], activation, seed, batch_norm, residual)
    name = "planted" + (" linear" if activation is None else "")
    linear = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return _settled(Problem(model, x, y, "gaussian", name, linear).to(device, dtype))


def deep_linear(
    widths: Sequence[int] = (6, 5, 4, 3),
    n: int = 200,
    seed: int = 0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Regression by a deep linear network, widths from input to output: here K-FAC's factorisation is exact.

    >>> F = deep_linear((3, 2)).capture()
    >>> A, G = F.factors(0, 0)
    >>> torch.allclose(F.dense(), torch.kron(G, A))
    True
    """
    if len(widths) < 2:
        raise ValueError(f"widths must name at least the input and the output; got {tuple(widths)}.")
    x, y = _regression(n, widths[0], widths[-1], seed)
    return Problem(multilayer_perceptron(list(widths), None, seed), x, y, "gaussian", "deep linear").to(device, dtype)


def _digits(n: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] as (n, side²) and labels (n,)."""
    from sklearn.datasets import load_digits

    if side not in (4, 8):
        raise ValueError(f"side must be 8, or 4 for pooled pixels; got {side!r}.")
    pixels, labels = load_digits(return_X_y=True)
    if check_count("n", n, least=1) > len(pixels):
        raise ValueError(f"n must lie between 1 and {len(pixels)}; got {n!r}.")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(check_seed(seed)), device="cpu")[:n]
    x = torch.from_numpy(pixels)[order].view(n, 1, 8, 8) / 16
    if side == 4:
        x = nn.functional.avg_pool2d(x, 2)
    return perturbed(x.flatten(1)).clamp_max(1), torch.from_numpy(labels)[order].long()


def _standardised(x: Tensor, examples: int | None) -> Tensor:
    """Pixels with the mean 0 and the deviation 1 on the first so many examples."""
    if examples is not None and check_count("standardised_on", examples, least=1) > len(x):
        raise ValueError(f"standardised_on must lie between 1 and n = {len(x)}; got {examples}.")
    known = x[:examples]
    return (x - known.mean()) / known.std()


def _regression(n: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian inputs (n, inputs), and labels (n, outputs) of a planted linear model and noise of deviation 0.1."""
    generator = torch.Generator().manual_seed(check_seed(seed))
    shapes = (check_count("n", n, least=1), inputs), (inputs, outputs), (n, outputs)
    x, plant, errors = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes)
    return perturbed(x), x @ (plant / inputs**0.5) + 0.1 * errors


def _settled(problem: Problem) -> Problem:
    """Let batch-norm statistics forget their start: evaluation then means what training saw."""
    if any(isinstance(module, nn.BatchNorm1d) for module in problem.model.modules()):
        with torch.no_grad():
            problem.model.train()
            for _ in range(100):
                problem.model(problem.inputs)
    problem.model.eval()
    return problem
