"""Launchers of philox.cu and dropout.cu: random numbers by counting, equal on both backends."""

from __future__ import annotations

import numpy as np

from ._build import (
    FLOATING,
    ITEM_BYTES,
    THREADS,
    Array,
    Module,
    Source,
    cpp_type,
    grid,
    pack_width,
)

_SOURCE = Source("philox.cu", ("tapegrad_philox",))
_DROPOUT = Source(
    "dropout.cu",
    *(tuple(f"tapegrad_dropout<{t}, {n}>" for n in (1, 16 // ITEM_BYTES[t])) for t in FLOATING),
)
_WORDS = 4  # of 64 bits: what one encryption gives


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


def dropout(
    xp: Module, x: Array, counter: Array, key: Array, *, rate: float
) -> tuple[Array, Array] | None:
    """Return (x * factors, factors): a factor is 1 / (1 - rate), or 0 with probability `rate`.

    x is floating and C-contiguous, else the answer is None; counter and key as for `philox_bits`.
    Element i is kept where the i-th 32 bits of the stream are below (1 - rate) 2^32.
    """
    t = cpp_type(x)
    if t is None:
        return None
    y, factors = xp.empty_like(x), xp.empty_like(x)
    width = pack_width(xp, t, 0, x, y, factors)
    factor = x.dtype.type(1) / x.dtype.type(1.0 - rate)
    accumulator = np.float64 if t == "double" else np.float32
    _DROPOUT.kernel(f"tapegrad_dropout<{t}, {width}>")(
        grid(-(-x.size // (2 * _WORDS))),
        (THREADS,),
        (
            *(x, y, factors, xp.asarray(counter), key, np.int64(x.size)),
            *(np.int64(round((1.0 - rate) * 2**32)), accumulator(factor)),
        ),
    )
    return y, factors
