"""Whether a result survives other rounding: the same problems with inputs that differ in the last bit."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..method.checks import check_seed

VARIABLE = "KFAC_VIZ_PERTURB"  # a seed; the command sets it for ``figures --perturb``


def perturbed(x: Tensor) -> Tensor:
    """The inputs x of a problem, each entry times ``1 ± ε`` with a random sign where :data:`VARIABLE` is set; x itself
    where it is not.

    ε is the distance from 1 to the next number of x's dtype, so that an entry moves by one or two last bits. What is
    published may not depend on them.

    >>> x = torch.ones(2, dtype=torch.float64)
    >>> perturbed(x) is x
    True

    Raises:
        ValueError: the variable holds no seed.
    """
    if not (text := os.environ.get(VARIABLE, "")):
        return x
    if not text.isdecimal():
        raise ValueError(f"The environment variable {VARIABLE} holds a seed, a whole number; got {text!r}.")
    generator = torch.Generator().manual_seed(check_seed(int(text)))
    signs = 2 * torch.randint(0, 2, x.shape, generator=generator, device="cpu") - 1
    return x * (1 + torch.finfo(x.dtype).eps * signs.to(x))
