"""Results to matplotlib figures, and figures to files. Nothing here computes, and nothing here knows widgets."""

from .save import save
from .style import METHODS, SPACES

__all__ = ["METHODS", "SPACES", "save"]
