"""The networks on which the ladder is climbed: five to choose a diagnostic on, and two to judge it by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...problems import attention, autoencoder, convolutional, digits
from ...problems.problem import Problem, multilayer_perceptron, seeded

EXAMPLES = 300  # to train on, and as many to test; half as many texts, which have 28 vectors each
LETTERS = " abcdefghijklmnopqrstuvwxyz."
CONTEXT = 8  # letters from which the next one is to be told


class Task(NamedTuple):
    """A network with the examples to train it on, and others to test it."""

    train: Problem
    test: Problem


def _split(problem: Problem) -> Task:
    return Task(*problem.split(EXAMPLES))


class Letters(nn.Module):
    """A GPT-like model: letters and their places embedded, one encoder layer that looks back alone, the next letter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), width), nn.Embedding(CONTEXT, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(CONTEXT, device=text.device).expand(len(text), -1)
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf, dtype=self.head.weight.dtype, device=text.device).triu(1)
        return self.head(self.block(self.letters(text) + self.places(places), mask)[:, -1])


def _next_letter(seed: int) -> Task:
    """The next letter of an English text: the description of a data set that scikit-learn ships. The first two thirds
    train, the last third tests."""
    from sklearn.datasets import load_breast_cancer

    text = re.sub(r"[^a-z.]+", " ", load_breast_cancer().DESCR.lower())
    codes = torch.tensor([LETTERS.index(letter) for letter in text])
    windows = codes.unfold(0, CONTEXT + 1, 1)
    border = 2 * len(windows) // 3
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = Letters().double()
    found = []
    for part in (windows[:border], windows[border + CONTEXT :]):
        chosen = part[torch.randperm(len(part), generator=generator)[: EXAMPLES // 2]]
        found.append(Problem(model, chosen[:, :-1], chosen[:, -1], "categorical", "next letter"))
    return Task(*found)


def _residual(seed: int) -> Problem:
    """Digits by twenty layers, to each of which but the first and the last its input is added."""
    data = digits((), 2 * EXAMPLES, seed, side=4)
    model = multilayer_perceptron([16, *[8] * 19, 10], "tanh", seed, residual=True)
    return replace(data, model=model, name="digits 4×4, 20 residual layers")


CHOSEN_ON: dict[str, Callable[[int], Task]] = {
    "classifier": lambda seed: _split(digits((12, 12, 12), 2 * EXAMPLES, seed, side=4)),
    "autoencoder": lambda seed: _split(autoencoder((16, 8, 16), 2 * EXAMPLES, seed, side=4)),
    "deep classifier": lambda seed: _split(digits((8,) * 10, 2 * EXAMPLES, seed, side=4)),
    "attention": lambda seed: _split(attention(8, 2 * EXAMPLES, seed, side=4)),
    "convolutional": lambda seed: _split(convolutional((6, 8), 2 * EXAMPLES, seed)),
}
JUDGED_ON: dict[str, Callable[[int], Task]] = {
    "next letter": _next_letter,
    "residual": lambda seed: _split(_residual(seed)),
}
