"""Launcher of philox.cu: counter-based random bits, the same on both backends."""

from __future__ import annotations

import numpy as np

from ._build import THREADS, Array, Module, Source, grid

_SOURCE = Source("philox.cu", ("tapegrad_philox",))
_WORDS = 4  # of a counter, and of what one encryption gives


def philox_bits(xp: Module, count: int, *, key: int, counter: int) -> Array | None:
    """Return the `count` uint64 of `numpy.random.Philox(key=key, counter=counter).random_raw`.

    `key` is a number of 128 bits, `counter` one of 256. None when `count` is 0.
    """
    if count <= 0:
        return None
    out = xp.empty(count, np.uint64)
    first = counter + 1  # NumPy increments before the first block
    _SOURCE.kernel("tapegrad_philox")(
        grid(-(-count // _WORDS)),
        (THREADS,),
        (out, np.int64(count), *_words(key, 2), *_words(first, _WORDS)),
    )
    return out


def _words(value: int, count: int) -> list[np.uint64]:
    """Return the lowest 64-bit words of `value`, the lowest first."""
    return [np.uint64(value >> 64 * i & (2**64 - 1)) for i in range(count)]
