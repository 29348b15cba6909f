"""Elementwise functions that NumPy does not have: programs call them as they call NumPy's own.

Each writes its last argument and looks at its arrays only, so that it can be called for a block of
them at a time: whether there is a NaN, which most have not, is asked while the block is in cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapegrad._backend import Array
from tapegrad.fused import relu_grad
from tapegrad.ops.elementwise import holds_nan


def _holds_nan(x: Array) -> bool:
    if x.itemsize < 8 or x.size <= _DOT:
        return holds_nan(x)
    top = np.maximum.reduce(x, axis=None)
    return bool(top != top)


# From 10,000 elements on OpenBLAS spreads a dot product of float64 over its threads, for which the
# threads of a run would wait: twice the time.
_DOT = 1 << 13


def scaled(g: Array, d: Array, out: Array) -> None:
    """Let out be g * d, and 0 where g is; out is not the memory of g."""
    np.multiply(g, d, out)
    if _holds_nan(out):
        np.copyto(out, 0, where=np.equal(g, 0) & np.isnan(out))


def scaled_both(a: Array, b: Array, out: Array) -> None:
    """Let out be a * b, and 0 where a or b is; out is the memory of neither."""
    np.multiply(a, b, out)
    if _holds_nan(out):
        np.copyto(out, 0, where=(np.equal(a, 0) | np.equal(b, 0)) & np.isnan(out))


def masked(g: Array, y: Array, mask: Array, out: Array) -> None:
    """Let out be g where y > 0, else 0; y is never below 0, mask is scratch, out not g's memory."""
    np.sign(y, mask)
    np.multiply(g, mask, out)
    if _holds_nan(out):  # also where y is NaN
        out[...] = relu_grad.forward(np, g, y)


def keep_positive(y: Array, g: Array, mask: Array, out: Array) -> None:
    """Let out be g where y > 0, else 0, all of them given as their bits; mask is scratch.

    The bits of what is not above 0 are 0, but for NaN and what has a sign: as unsigned numbers
    these are above those of infinity.
    """
    np.sign(y, mask)
    infinity = _BITS_OF_INFINITY[y.itemsize]
    if np.maximum.reduce(y, axis=None, initial=0) > infinity:
        mask[y > infinity] = 0
    np.multiply(g, mask, out)


_BITS_OF_INFINITY = {
    4: np.array(np.inf, np.float32).view(np.uint32)[()],
    8: np.array(np.inf, np.float64).view(np.uint64)[()],
}


def chosen(condition: Array, x1: Array, x2: Array, out: Array) -> None:
    """Let out be x1 where the condition holds, else x2, in the type of out."""
    np.copyto(out, x2, "unsafe")
    np.copyto(out, x1, "unsafe", where=condition)


def converted(x: Array, out: Array) -> None:
    """Let out be x in the type of out."""
    np.copyto(out, x, "unsafe")


OWN_CALLS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (scaled, scaled_both, masked, keep_positive, chosen, converted)
}
