"""The loss of a model on a batch as a function of its parameters, which can be differentiated more than once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..method.checks import evaluation, own_precision, same_random_state
from ..method.partition import Partition, Piece
from .layers import named
from .likelihood import nll
from .record import eager


class Loss:
    """The loss as a function of the parameters of some layers, with copies of everything else.

    Attributes:
        leaves: copies of these parameters, by their names in the model.
        custom: names of the functions in it that are not PyTorch's own.
    """

    def __init__(
        self, model: nn.Module, partition: Partition, inputs: tuple[Tensor, ...], targets: Tensor, likelihood: str
    ) -> None:
        self.model, self.partition, self.likelihood = model, partition, likelihood
        self.inputs = tuple(x.detach().clone() for x in inputs)
        self.targets = targets.detach().clone() if isinstance(targets, Tensor) else targets
        self.names = {p: name for name, p in model.named_parameters()}
        self.copies = {name: p.detach().clone() for p, name in self.names.items()}
        self.buffers = {name: x.detach().clone() for name, x in model.named_buffers()}
        self.places = dict(_places(model, self.names | {x: name for name, x in model.named_buffers()}))
        self.leaves = {name: self.copies[name].requires_grad_() for name, _ in self.pieces(partition)}
        self.custom: list[str] = []

    def pieces(self, partition: Partition) -> list[tuple[str, Piece]]:
        """Every piece of the layers, with the name that its parameter has in the model."""
        own = zip(partition.layers, partition.own_parameters(self.model), strict=True)
        return [(self.names[p], piece) for layer, each in own for p, piece in zip(each, layer.pieces, strict=True)]

    def moved(self, direction: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
        """Other values of the parameters, ``leaves + step · direction``."""
        values = {name: self.leaves[name].detach().add(v, alpha=step) for name, v in direction.items()}
        return self.leaves | {name: value.requires_grad_() for name, value in values.items()}

    def gradients(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The gradient at these values, which can be differentiated again; None where none arrives."""
        buffers = {name: x.clone() for name, x in self.buffers.items()}  # the forward pass may write into them
        device = self.inputs[0].device
        contexts = (torch.enable_grad(), evaluation(self.model), same_random_state(device), own_precision(device),
                    eager(), sdpa_kernel(SDPBackend.MATH))  # fmt: skip
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            values = self.copies | dict(leaves) | buffers
            given = {place: values[name] for place, name in self.places.items()}
            outputs = functional_call(self.model, given, self.inputs, tie_weights=False)
            loss = nll(outputs, self.targets, self.likelihood)
            if loss.grad_fn is None:
                return dict.fromkeys(leaves)
            self._look(loss)
            try:
                grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"PyTorch cannot differentiate this model: {error}") from error
        return dict(zip(leaves, grads, strict=True))

    def _look(self, loss: Tensor) -> None:
        """Note custom functions; refuse a parameter that is used past the model's own attribute for it."""
        nodes = list(graph_of(loss))
        own = [node.variable for node in nodes if hasattr(node, "variable")]
        if past := [self.names[p] for p in own if p in self.names]:
            raise ValueError(
                f"The forward pass takes parameter {past[0]!r} from elsewhere than its module, where no copy of it can "
                "stand in; read it as an attribute of the module."
            )
        custom = (node.name() for node in nodes if isinstance(node, BackwardCFunction))
        self.custom = sorted({name.removesuffix("Backward") for name in custom})

    def reached(self, grads: Mapping[str, Tensor | None]) -> Partition:
        """The layers that a gradient has arrived at. Loose parameters that it has not are left out.

        Raises:
            ValueError: any other layer without a gradient.
        """
        depends = {name for name, grad in grads.items() if grad is not None}
        owners = zip(self.partition.layers, self.partition.own_parameters(self.model), strict=True)
        idle = [layer for layer, own in owners if not any(self.names[p] in depends for p in own)]
        kept = [name for name in self.partition.names if name not in {layer.name for layer in idle}]
        if not kept or not all(layer.loose for layer in idle):
            raise ValueError(
                f"No gradient reaches layers {[layer.name for layer in idle]} from the outputs: they took no part, or "
                f"what follows has no derivative. Name the others: {named(kept)}."
            )
        return self.partition.without(layer.name for layer in idle)


def _places(model: nn.Module, names: Mapping[Tensor, str]) -> Iterator[tuple[str, str]]:
    """Where each module holds a parameter or a buffer, with the name of that tensor in the model. A module that is
    listed twice comes once: PyTorch's own search for tied weights would leave a copy in it."""
    for prefix, module in model.named_modules():
        for place, x in (
            *module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ):
            yield place, names[x]


def graph_of(tensor: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every node that autograd has recorded for this tensor."""
    seen, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            left += [following for following, _ in node.next_functions]
