"""One step in the making: what the gradients ask of each parameter, and writing all of it or, if it is bad, nothing."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..method.checks import finite
from ..method.partition import Piece
from ..method.two_level import TwoLevel
from .layout import Layout
from .options import Options, check_group
from .plain import MOMENTS, Moments, adam, no_moments
from .update import Update


class Move(NamedTuple):
    """What a step does to a parameter p, or to a piece of it: what is added to it, and what is left in its state.

    A parameter without curvature has no piece.
    """

    p: Tensor
    piece: Piece | None
    step: Tensor
    left: dict[str, Tensor]

    def of(self, x: Tensor) -> Tensor:
        """What is meant of p, or of anything in its shape: a view."""
        return x if self.piece is None else self.piece.of(x)


class Step:
    """The gradients as they are now, and what becomes of them.

    Args:
        layout: of the layers that have curvature.
        groups, state: the optimizer's; ``state`` has the momentum of each parameter of a layer, and the moments of
            each other one.
        options: of the optimizer.

    Attributes:
        grads: to be descended, one for each parameter that has one, with the weight decay that is part of the loss.
        g: the same over the layers, (P,).

    Raises:
        ValueError, TypeError: no gradient, a sparse one, or a group whose options were edited out of range.
    """

    def __init__(
        self, layout: Layout, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Tensor]], options: Options
    ) -> None:
        self.layout, self.groups, self.state, self.options = layout, groups, state, options
        self.grads: dict[Tensor, Tensor] = {}
        for group in groups:
            check_group(group)
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            found = [p.grad for p in params]
            if any(grad.layout != torch.strided for grad in found):
                raise ValueError("Sparse gradients are not supported; build the embedding with sparse=False.")
            if group["maximize"]:
                found = torch._foreach_neg(found)
            if group["weight_decay"] and not options.decoupled:
                found = torch._foreach_add(found, params, alpha=group["weight_decay"])
            self.grads.update(zip(params, found, strict=True))
        if not self.grads:
            raise ValueError("No parameter of the optimizer has a gradient; call loss.backward() first.")
        self.g = layout.joined(self.grads)

    # ---- momentum -------------------------------------------------------------------------------------

    def last(self, p: Tensor) -> Tensor | None:
        """The momentum of a parameter, None where it has none yet."""
        return self.state.get(p, {}).get("momentum_buffer")

    def moments(self, p: Tensor) -> Moments:
        """The moments of a parameter without curvature, where the model is now."""
        none, own = no_moments(p), self.state.get(p, {})
        return tuple(own[name].to(zero) if name in own else zero for name, zero in zip(MOMENTS, none, strict=True))

    def buffer(self, p: Tensor, name: str = "momentum_buffer", like: Tensor | None = None) -> Tensor:
        """Something in the state of a parameter to write into, made or moved to the dtype and device of ``like``."""
        like, last = p if like is None else like, self.state.get(p, {}).get(name)
        if last is None or (last.dtype, last.device) != (like.dtype, like.device):
            self.state[p][name] = torch.zeros_like(like) if last is None else last.to(like)
        return self.state[p][name]

    def momentum(self) -> Tensor | None:
        """The layers' momentum (P,), zero where there is none yet or none is wanted; None without any momentum."""

        def wanted(group: dict[str, Any]) -> bool:
            """Under the quadratic rule, where it is a direction of its own, not in a layer that is to stand still."""
            return bool(group["momentum"] and (self.options.step_rule != "quadratic" or group["lr"]))

        if not any(map(wanted, self.layout.groups)):
            return None
        moving = [p for p in self.layout.covered if p in self.grads and wanted(self.layout.group[p])]
        last = {p: self.last(p) for p in moving}
        return self.layout.joined({p: buffer for p, buffer in last.items() if buffer is not None})

    # ---- what moves -----------------------------------------------------------------------------------

    def moving(self, v: Tensor, known: Collection[str]) -> Tensor:
        """v, zero where no step is taken: its length must not depend on what stays. That is where there is no gradient,
        and in layers that are not ``known`` to the statistics, where λ alone would set the length of the step."""
        partition = self.layout.partition
        for name, s in zip(partition.names, partition.slices, strict=True):
            if name not in known:
                v[s] = 0
        if not self.layout.covered <= self.grads.keys():
            for (_, p), view in zip(self.layout.pieces, self.layout.split(v), strict=True):
                if p not in self.grads:
                    view.zero_()
        return v

    def moves(self, proposed: Update) -> list[Move]:
        """What happens to every parameter that has a gradient: in layers as proposed, elsewhere Adam's step."""
        pieces, split, left = self.layout.pieces, self.layout.split, [{}] * len(self.layout.pieces)
        if proposed.momentum is not None:
            left = [{"momentum_buffer": x} for x in split(proposed.momentum)]
        triples = zip(pieces, split(proposed.step), left, strict=True)
        moves = [Move(p, piece, step.to(p.dtype), x) for (piece, p), step, x in triples if p in self.grads]
        for group in self.groups:
            plain = [p for p in group["params"] if p in self.grads and p not in self.layout.covered]
            if plain:
                grads, before = [self.grads[p] for p in plain], [self.moments(p) for p in plain]
                steps, after = adam(grads, before, lr=group["plain_lr"], beta1=float(group["momentum"]))
                after = [dict(zip(MOMENTS, x, strict=True)) for x in after]
                moves += [Move(p, None, step.to(p.dtype), x) for p, step, x in zip(plain, steps, after, strict=True)]
        return [self._shrinking(move) for move in moves] if self.options.decoupled else moves

    def plain_slope(self, moves: list[Move]) -> Tensor | None:
        """``gᵀδ`` over the parameters without curvature, None where none moves: the change that their steps should make
        to the loss, to first order."""
        products = [(self.grads[x.p] * x.step).sum(dtype=self.g.dtype) for x in moves if x.piece is None]
        return torch.stack(products).sum() if products else None

    def _shrinking(self, move: Move) -> Move:
        """The move with decoupled weight decay in it."""
        group = self.layout.group[move.p]
        if not group["weight_decay"]:
            return move
        lr = group["plain_lr" if move.piece is None else "lr"]
        return move._replace(step=torch.add(move.step, move.of(move.p), alpha=-lr * group["weight_decay"]))

    # ---- writing it -----------------------------------------------------------------------------------

    def write(
        self, moves: list[Move], facts: dict[str, Tensor], T: TwoLevel, length: float
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Take the step, or ``length`` of it, if all that it would write is finite. T, which it comes from, helps to
        find what is not. The momentum of a shorter step is shorter; moments are averages of gradients, and stay.

        Returns:
            The facts as numbers, read in the one look at the device; and None. If capturable there is no such look: the
            facts stay on the device, and so does the answer whether the step was skipped.
        """
        params = [move.of(move.p) for move in moves]
        held = [move for move in moves if move.piece is not None and move.left]
        steps, left = [move.step for move in moves], [move.left["momentum_buffer"] for move in held]
        if length != 1.0:
            steps, left = torch._foreach_mul(steps, length), torch._foreach_mul(left, length) if left else []
        new = torch._foreach_add(params, steps)
        left = [x.to(move.p.dtype) for move, x in zip(held, left, strict=True)]
        moments = [(move.p, name, x) for move in moves if move.piece is None for name, x in move.left.items()]
        written = [*new, *(x for x in left if x.dtype != self.g.dtype)]  # what is finite in v may overflow there
        written += [x for _, _, x in moments]
        numbers = torch.stack([*facts.values(), self.g.sum(), *torch._foreach_norm(written, dtype=self.g.dtype)])
        left += [x for _, _, x in moments]

        def buffers() -> list[Tensor]:
            """The state that takes ``left``, made only when that is to be written: a refused step leaves none."""
            return [move.of(self.buffer(move.p)) for move in held] + [self.buffer(*moment) for moment in moments]

        skipped = None
        if self.options.capturable:
            fine = numbers.isfinite().all()
            new = [torch.where(fine, x, p) for p, x in zip(params, new, strict=True)]
            left = [torch.where(fine, x, old) for old, x in zip(buffers(), left, strict=True)]
            skipped = ~fine
        else:
            read = numbers.tolist()
            if not all(map(math.isfinite, read)):
                self._check(written, read[: len(facts)], T)
            facts = dict(zip(facts, read, strict=False))
        torch._foreach_copy_(params, new)
        if left:
            torch._foreach_copy_(buffers(), left)
        return facts, skipped

    def _check(self, written: list[Tensor], facts: list[float], T: TwoLevel) -> None:
        """Raise the sentence for a step that is not finite, where it comes in; sums may overflow by themselves."""
        if all(map(math.isfinite, facts)) and all(finite([self.g, *written])):
            return
        self.check_gradient()
        T.partition.check_finite(T._apply(self.g), "The preconditioned gradient")
        dtype = self.layout.pieces[0][1].dtype
        raise ValueError(
            f"The step would overflow parameters of {dtype}, or the model of the loss does so in {self.g.dtype}; "
            "nothing was written. Scale the loss, lower lr, or raise damping."
        )

    def check_gradient(self) -> None:
        """Refuse NaN and inf in the gradient, naming the layer or parameter."""
        self.layout.partition.check_finite(self.g, "The gradient")
        others = [p for p in self.grads if p not in self.layout.covered]
        for p, fine in zip(others, finite([self.grads[p] for p in others]), strict=True):
            if not fine:
                raise ValueError(f"The gradient holds NaN or inf in parameter {self.layout.names.get(p, '?')!r}.")
