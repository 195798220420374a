"""What the studies train: digits, toys and differential equations, each a :class:`Problem`."""

from .equations import Equation, Jet, burgers, equation, heat, poisson
from .problem import ACTIVATIONS, Problem
from .toys import attention, autoencoder, convolutional, deep_linear, digits, planted

__all__ = [
    "ACTIVATIONS", "Equation", "Jet", "Problem", "attention", "autoencoder", "burgers", "convolutional", "deep_linear",
    "digits", "equation", "heat", "planted", "poisson",
]  # fmt: skip
