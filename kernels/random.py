"""Launcher of philox.cu: counter-based random bits, the same on both backends."""

from __future__ import annotations

import numpy as np

from ._build import THREADS, Array, Module, Source, grid

_SOURCE = Source("philox.cu", ("tapegrad_philox",))
_WORDS = 4  # what one encryption gives


def philox_bits(xp: Module, counter: Array, key: Array, *, count: int) -> Array | None:
    """Return the `count` uint64 of `numpy.random.Philox(key=key, counter=counter).random_raw`.

    counter  int64, 0-d, not negative.
    key      uint64 (2,), the lower word first.

    None when `count` is 0.
    """
    if count <= 0:
        return None
    out = xp.empty(count, np.uint64)
    _SOURCE.kernel("tapegrad_philox")(
        grid(-(-count // _WORDS)),
        (THREADS,),
        (out, xp.asarray(counter), key, np.int64(count)),
    )
    return out
