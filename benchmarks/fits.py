"""The exponent with which a cost grows."""

from __future__ import annotations

import math
from collections.abc import Sequence

FITTED = 3  # of the largest sizes: at the small ones it is overhead that is seen


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of log(y) against log(x) by least squares, over the largest x."""
    used = [(math.log(x), math.log(y)) for x, y in sorted(points)[-FITTED:]]
    mean_x = sum(x for x, _ in used) / len(used)
    mean_y = sum(y for _, y in used) / len(used)
    along = sum((x - mean_x) ** 2 for x, _ in used)
    return sum((x - mean_x) * (y - mean_y) for x, y in used) / along
