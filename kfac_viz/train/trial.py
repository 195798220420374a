"""A step that the loss after it judges: what there was before, to compare with and to go back to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Trial:
    """Parameters, momentum and loss before a step.

    Args:
        closure: recomputes the loss.
        loss: what it returned before the step.
        decay: the parameters that are about to move, each with the weight decay that is part of the loss.
        state: of the optimizer; it has the momentum.
        maximize: whether the loss is to go up.
    """

    def __init__(
        self,
        closure: Callable[[], Tensor],
        loss: float,
        decay: dict[Tensor, float],
        state: Mapping[Tensor, dict[str, Tensor]],
        *,
        maximize: bool,
    ) -> None:
        self.closure, self.loss, self.decay, self.state = closure, loss, decay, state
        self.sign = -1.0 if maximize else 1.0
        last = {p: momentum_of(state, p) for p in decay}
        self.before = {p: (p.clone(), None if buffer is None else buffer.clone()) for p, buffer in last.items()}

    def change(self) -> float:
        """How much the loss has gone up since, weight decay included; if the closure fails, no step was taken."""
        try:
            with torch.enable_grad():
                after = number(self.closure())
        except BaseException:
            self.restore()
            raise
        change = self.sign * (after - self.loss)
        for p, (value, _) in self.before.items():
            if self.decay[p]:
                change += 0.5 * self.decay[p] * float(p.square().sum() - value.square().sum())
        return change

    def restore(self) -> None:
        """Parameters and momentum as they were."""
        for p, (value, buffer) in self.before.items():
            p.copy_(value)
            self.state.pop(p, None)
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer.clone()


def momentum_of(state: Mapping[Tensor, dict[str, Tensor]], p: Tensor) -> Tensor | None:
    """The momentum of a parameter, None where it has none yet."""
    return state.get(p, {}).get("momentum_buffer")


def number(loss: Any) -> float:
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
