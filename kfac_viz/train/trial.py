"""A step that the loss after it judges: what there was before, to compare with and to go back to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .distributed import ALONE, Alone
from .step import Step


class Trial:
    """Parameters, their state and the loss before a step.

    Args:
        step: the step that is about to be taken.
        closure: recomputes the loss.
        loss: what it returned before the step.
        ranks: the processes with a part of the batch each, by the mean of whose losses the step is judged.

    Attributes:
        before: the value and the state of every parameter that the step moves.
        plain: those of them without curvature.

    Raises:
        TypeError: a loss that is not one number.
    """

    def __init__(self, step: Step, closure: Callable[[], Tensor], loss: Any, ranks: Alone = ALONE) -> None:
        self.step, self.closure, self.ranks = step, closure, ranks
        self.loss = ranks.mean(lambda: _number(loss))
        own = {p: step.state.get(p, {}) for p in step.grads}
        self.before = {p: (p.clone(), {name: x.clone() for name, x in state.items()}) for p, state in own.items()}
        self.plain = [p for p in self.before if p not in step.layout.covered]

    def change(self) -> float:
        """How much the loss has gone up since, weight decay included; if the closure fails, no step was taken."""
        try:
            with torch.enable_grad():
                after = self.ranks.mean(lambda: _number(self.closure()))
        except BaseException:
            self.restore()
            raise
        change = (-1.0 if self.step.groups[0]["maximize"] else 1.0) * (after - self.loss)
        for p, (value, _) in self.before.items():
            decay = 0.0 if self.step.options.decoupled else self.step.layout.group[p]["weight_decay"]
            if decay:
                change += 0.5 * decay * float(p.square().sum() - value.square().sum())
        return change

    def restore(self, params: Iterable[Tensor] | None = None) -> None:
        """Parameters and their state as they were, or some of them."""
        for p in self.before if params is None else params:
            value, state = self.before[p]
            p.copy_(value)
            self.step.state.pop(p, None)
            if state:
                self.step.state[p].update({name: x.clone() for name, x in state.items()})

    def reject(self) -> None:
        """Everything as it was, but for the momentum of the layers, which would lead the same way again."""
        self.restore()
        for p in self.before:
            if p in self.step.layout.covered:
                self.step.buffer(p).zero_()


def _number(loss: Any) -> float:
    """What a closure returned, as a number."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return float(loss.detach())
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return float(loss)
    kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"The closure must return the loss, one number, for steps to be judged by it; got {kind}.")


def loss_alone(closure: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The closure, told that its gradient is not needed, if it is one that can be told."""
    try:
        told = "backward" in inspect.signature(closure).parameters
    except (TypeError, ValueError):  # a function that is not written in Python has no signature
        told = False
    return functools.partial(closure, backward=False) if told else closure
