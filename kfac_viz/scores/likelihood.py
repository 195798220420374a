"""Output distributions: the loss that fits the Fisher, and the vectors whose outer products build it.

Scale of the whole package: one example's negative log-likelihood *summed* over its outputs, then the mean
over examples. Each function below works on outputs flattened to (N, R, C): R positions with C classes for
``categorical`` (classes on the last axis), one position with C independent outputs otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..method.checks import check_choice, finite

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
FLAVOURS = ("exact", "mc", "empirical")
INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def nll(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """Mean over examples of the summed negative log-likelihood, a scalar that can be differentiated.

    Args:
        outputs: logits (N, …, C) for ``categorical``; logits (N, …) for ``bernoulli``; means (N, …) for
            ``gaussian``, where the loss is ``½‖y − f‖²``.
        targets: class indices (N, …) for ``categorical``; values in [0, 1], or values, of the shape of
            ``outputs`` otherwise.

    >>> nll(torch.zeros(4, 3), torch.tensor([[1., 2., 2.]] * 4), "gaussian")
    tensor(4.5000)
    """
    check_targets(outputs, targets, likelihood)
    if targets.is_inference() and outputs.requires_grad:
        targets = targets.clone()  # autograd keeps it, and must be able to
    return checked_nll(outputs, targets, likelihood)


def checked_nll(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """:func:`nll` of what has been checked: without a look at the numbers, so that ``torch.func`` can map it."""
    if likelihood == "categorical":
        total = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten().long(), reduction="sum")
    elif likelihood == "bernoulli":
        total = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    else:
        total = 0.5 * (targets - outputs).square().sum()
    return total / outputs.shape[0]


def output_vectors(
    outputs: Tensor,
    likelihood: str,
    flavour: str,
    *,
    targets: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The S vectors per example, shape (S, *outputs.shape), with Σ_s v vᵀ the output-side Fisher.

    - ``exact``: categorical ``√p_c (e_c − p)`` for each class (and position); gaussian the columns of I;
      bernoulli ``√(p(1 − p)) e_c``. S is the number of outputs. (Martens 2020, section 9.)
    - ``mc``: gradients at labels drawn from the model, scaled by ``1/√samples``. S = samples.
    - ``empirical``: gradients at the true labels. S = 1.
    """
    check_likelihood(outputs, likelihood)
    shape = outputs.shape
    f = outputs.detach().reshape(shape[0], -1, shape[-1] if likelihood == "categorical" else outputs[0].numel())
    if flavour == "exact":
        vectors = _exact(f, likelihood)
    elif flavour == "mc":
        vectors = _sampled(f, likelihood, samples, generator)
    else:
        check_targets(outputs, targets, likelihood)
        if likelihood == "categorical":
            labels = functional.one_hot(targets.reshape(f.shape[:2]).long(), f.shape[-1])
            vectors = f.softmax(-1) - labels
        else:
            vectors = (f.sigmoid() if likelihood == "bernoulli" else f) - targets.reshape(f.shape)
        vectors = vectors[None]
    return vectors.detach().reshape(-1, *shape).to(outputs.dtype)


def count_vectors(outputs: Tensor, flavour: str, samples: int) -> int:
    """S, the number of vectors per example that :func:`output_vectors` makes."""
    return {"exact": outputs[0].numel(), "mc": samples, "empirical": 1}[flavour]


def _exact(f: Tensor, likelihood: str) -> Tensor:
    N, R, C = f.shape
    eye = torch.eye(C, dtype=f.dtype, device=f.device)
    if likelihood == "categorical":
        p = f.softmax(-1)
        vectors = p.sqrt()[..., None] * (eye - p[:, :, None, :])  # (N, R, class, C)
    elif likelihood == "bernoulli":
        p = f.sigmoid()
        vectors = (p * (-f).sigmoid()).sqrt()[..., None] * eye  # 1 − p without cancellation
    else:
        vectors = eye.expand(N, R, C, C)
    if R == 1:
        return vectors.permute(2, 0, 1, 3)
    apart = torch.eye(R, dtype=f.dtype, device=f.device)  # positions are independent given the outputs
    return torch.einsum("nrsc,rq->rsnqc", vectors, apart).flatten(0, 1)


def _sampled(f: Tensor, likelihood: str, samples: int, generator: torch.Generator | None) -> Tensor:
    """Drawn where the generator is, and moved: one on the CPU gives the same draws for every device."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    N, R, C = f.shape
    there = generator.device
    if likelihood == "categorical":
        p = f.softmax(-1)
        # NaN would stop multinomial, on a GPU for good; it stays in p, where the capture finds and names it.
        weights = p.flatten(0, 1).nan_to_num(1.0).to(there)
        labels = torch.multinomial(weights, samples, replacement=True, generator=generator)
        where = labels.T.reshape(samples, N, R, 1).to(f.device)
        vectors = p.repeat(samples, 1, 1, 1).scatter_add_(3, where, -p.new_ones(1).expand(where.shape))
    elif likelihood == "bernoulli":
        p = f.sigmoid()
        draws = torch.rand((samples, N, R, C), dtype=f.dtype, device=there, generator=generator)
        vectors = p - (draws.to(f.device) < p).to(f.dtype)
    else:
        vectors = torch.randn((samples, N, R, C), dtype=f.dtype, device=there, generator=generator).to(f.device)
    return vectors / samples**0.5


def check_outputs(outputs: Tensor) -> None:
    """Refuse what is not one floating point tensor (N, …) with at least one example."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError(f"The model must return one floating point tensor; got {_kind(outputs)}.")
    if outputs.layout != torch.strided:
        raise TypeError(f"The model must return a dense tensor; got one of layout {outputs.layout}.")
    if outputs.ndim < 2:
        raise ValueError(f"The model must return (examples, outputs, …); got shape {tuple(outputs.shape)}.")
    if outputs.numel() == 0:
        raise ValueError(f"The batch is empty: outputs have shape {tuple(outputs.shape)}.")


def check_likelihood(outputs: Tensor, likelihood: str) -> None:
    """Refuse outputs that this likelihood cannot be read from."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_outputs(outputs)
    if likelihood == "categorical" and outputs.shape[-1] < 2:
        raise ValueError("categorical needs at least two classes on the last axis; for one logit use 'bernoulli'.")


def check_targets(outputs: Tensor, targets: Tensor | None, likelihood: str) -> None:
    """Refuse targets that do not fit the outputs of the model."""
    check_likelihood(outputs, likelihood)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor; got {_kind(targets)}.")
    if targets.layout != torch.strided:
        raise TypeError(f"targets must be a dense tensor; got one of layout {targets.layout}.")
    if targets.device != outputs.device:
        raise ValueError(f"outputs are on {outputs.device}, targets on {targets.device}; move one of them.")
    expected = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
    if targets.shape != expected:
        raise ValueError(
            f"{likelihood} targets must have shape {tuple(expected)} for outputs {tuple(outputs.shape)}; "
            f"got {tuple(targets.shape)}."
        )
    if likelihood == "categorical":
        if targets.dtype not in INTEGERS:
            raise TypeError(f"categorical targets are class indices of an integer dtype; got {targets.dtype}.")
        low, high = torch.stack(targets.long().aminmax()).tolist()
        if not 0 <= low <= high < outputs.shape[-1]:
            raise ValueError(f"Class indices must lie in 0…{outputs.shape[-1] - 1}; got {low}…{high}.")
    elif targets.dtype not in (outputs.dtype, torch.promote_types(outputs.dtype, torch.float32)):
        raise TypeError(f"{likelihood} targets must be {outputs.dtype} like the outputs; got {targets.dtype}.")
    elif not finite([targets])[0]:
        raise ValueError("targets hold NaN or inf.")
    elif likelihood == "bernoulli" and not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError("bernoulli targets must lie in [0, 1].")


def _kind(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
