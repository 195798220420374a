"""How far a number may be from the published one and still count as the same."""

from __future__ import annotations

import math
from typing import NamedTuple


class Tolerance(NamedTuple):
    """The larger of ``absolute`` and of ``relative`` times the smaller of the two magnitudes.

    A count is the same within ``Tolerance(absolute=2)``; what lies below ``absolute`` on either side of zero is noise.
    A ``relative`` of 9 lets a number be ten times another one. By default a number may move by one unit in the last of
    the four digits that a table keeps.

    >>> Tolerance(relative=0.01).used(1.0, 1.005), Tolerance(absolute=2).used(30, 33), Tolerance().used(0.1, -0.1)
    (0.5, 1.5, inf)
    """

    relative: float = 1e-3
    absolute: float = 0.0

    def used(self, made: float, published: float) -> float:
        """The difference as a share of what is allowed: more than 1 is too much, inf where a sign or NaN differs."""
        if made == published or (math.isnan(made) and math.isnan(published)):
            return 0.0
        smaller = min(abs(made), abs(published)) if made * published > 0 else 0.0
        allowed = max(self.absolute, self.relative * smaller if math.isfinite(smaller) else 0.0)
        share = abs(made - published) / allowed if allowed else math.inf
        return round(share, 6) if math.isfinite(share) else math.inf

    def beyond(self, value: float, times: float = 2.0) -> float:
        """A number that is ``times`` as far from ``value`` as it may be, away from zero."""
        return value + math.copysign(times * max(self.absolute, self.relative * abs(value)), value)
