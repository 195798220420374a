"""What every study is given: a model, a full batch of data, and the likelihood that joins them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..method.checks import check_choice, check_count, check_seed, evaluation
from ..method.fisher import Fisher
from ..method.partition import Partition
from ..scores.capture import capture
from ..scores.layers import partition_of
from ..scores.likelihood import nll

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Problem:
    """A model, a full batch of data and the likelihood that joins them.

    Attributes:
        model: in training mode only where it has batch norm to settle; evaluated in eval mode.
        inputs: (N, …), or a tuple of arguments of the model.
        targets: see :func:`kfac_viz.nll`.
        layers: names of those that the Fisher is to cover; None for all.
    """

    model: nn.Module
    inputs: Tensor | tuple[Tensor, ...]
    targets: Tensor
    likelihood: str
    name: str = ""
    layers: tuple[str, ...] | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Of the model's forward pass."""
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    @cached_property
    def partition(self) -> Partition:
        return partition_of(self.model, self.layers)

    def loss(self) -> Tensor:
        """Mean negative log-likelihood of the batch in eval mode, a scalar."""
        with evaluation(self.model):
            return nll(self.model(*self.arguments), self.targets, self.likelihood)

    def gradient(self) -> Tensor:
        """Gradient of :meth:`loss` over the partition, (P,); leaves ``.grad`` alone."""
        twin = self.twin()
        twin.loss().backward()
        return self.partition.pack_grad(twin.model)

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
        """What ``optimizer.step`` calls to know the loss and, unless told ``backward=False``, its gradient."""

        def evaluate(backward: bool = True) -> Tensor:
            if not backward:
                with torch.no_grad():
                    return self.loss()
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return evaluate

    def capture(self, fisher: str = "exact", **options) -> Fisher:
        """The Fisher of this problem; see :func:`kfac_viz.capture`."""
        if fisher == "empirical":
            options["targets"] = self.targets
        options.setdefault("layers", self.layers)
        return capture(self.model, self.inputs, likelihood=self.likelihood, fisher=fisher, **options)

    def trained(self, steps: int, lr: float = 1e-2) -> Self:
        """A copy of the problem after full-batch Adam steps, deterministic."""
        return next(self.stages([steps], lr))

    def stages(self, steps: Iterable[int], lr: float = 1e-2) -> Iterator[Self]:
        """Copies of the problem after these numbers of Adam steps, ascending, from one run; see :meth:`trained`."""
        twin, done = self.twin(), 0
        optimizer = torch.optim.Adam(twin.model.parameters(), lr=lr)
        for count in steps:
            check_count("steps", count, least=done)
            for _ in range(count - done):
                optimizer.zero_grad()
                twin.loss().backward()
                optimizer.step()
            optimizer.zero_grad()
            done = count
            yield twin.twin()

    def twin(self) -> Self:
        """The same problem with a copy of the network, which may be moved."""
        return replace(self, model=copy.deepcopy(self.model))

    def split(self, examples: int) -> tuple[Self, Self]:
        """The first so many examples, to train on, and all others, to test on; both have this problem's network."""
        check_count("examples", examples, least=1)
        if examples >= len(self.targets):
            raise ValueError(f"A split of {len(self.targets)} examples leaves none to test on; got {examples}.")

        def part(which: slice) -> Self:
            inputs = tuple(x[which] for x in self.inputs) if isinstance(self.inputs, tuple) else self.inputs[which]
            return replace(self, inputs=inputs, targets=self.targets[which])

        return part(slice(None, examples)), part(slice(examples, None))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Problem:
        """A copy on another device or in another floating dtype."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x

        inputs = tuple(map(moved, self.inputs)) if isinstance(self.inputs, tuple) else moved(self.inputs)
        model = copy.deepcopy(self.model).to(device, dtype)
        return replace(self, model=model, inputs=inputs, targets=moved(self.targets))

    def __repr__(self) -> str:
        return f"Problem({self.name}, {len(self.arguments[0])} examples, {self.likelihood}, {self.partition})"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules that are built inside draw their weights by this seed, on the CPU; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(check_seed(seed))
        yield


class WithInput(nn.Sequential):
    """Its modules one after another, and their input added to what they give."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def multilayer_perceptron(
    widths: list[int], activation: str | None, seed: int, batch_norm: bool = False, residual: bool = False
) -> nn.Sequential:
    """Linear layers with PyTorch's own initialisation, drawn in float64 whatever the default dtype is."""
    for width in widths:
        check_count("Every width", width, least=1)
    act: Callable[[], nn.Module] | None = None
    if activation is not None:
        act = ACTIVATIONS[check_choice("activation", activation, tuple(ACTIVATIONS))]
    modules: list[nn.Module] = []
    generator = torch.Generator().manual_seed(check_seed(seed))  # the process's own may be in use in another thread
    for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        linear = skip_init(nn.Linear, fan_in, fan_out, dtype=torch.float64)
        nn.init.kaiming_uniform_(linear.weight, 5**0.5, generator=generator)
        nn.init.uniform_(linear.bias, -1 / sqrt(fan_in), 1 / sqrt(fan_in), generator)
        layer: list[nn.Module] = [linear]
        if hidden := i < len(widths) - 2:
            layer.extend([nn.BatchNorm1d(fan_out, dtype=torch.float64, device="cpu")] if batch_norm else [])
            layer.extend([act()] if act is not None else [])
        modules.extend([WithInput(*layer)] if residual and hidden and fan_in == fan_out and i else layer)
    return nn.Sequential(*modules)
