"""The linear primitives under everything else: what the reverse pass itself calls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module, concatenated, is_short
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import Tensor

# Here as everywhere: x, y are an operation's input and output, g the upstream gradient. The tape
# undoes broadcasting and promotion, so a rule may answer g for an input that was spread or cast.

add: Primitive = primitive(
    "add",
    lambda xp, x1, x2: x1 + x2,
    lambda g, _y, _x1, _x2: g,
    lambda g, _y, _x1, _x2: g,
)


_add_reduce: Any = np.add.reduce  # in half the time of x.sum


def sum_over(xp: Module, x: Any, axis: tuple[int, ...] | int, keepdims: bool = False) -> Array:
    """Return the sum over axes in the type of x, a floating one."""
    if xp is not np:  # CuPy sums 16 bits in float32 by itself
        return x.sum(axis=axis, keepdims=keepdims, dtype=x.dtype)
    if is_short(x.dtype):
        return _add_reduce(x, axis, np.float32, keepdims=keepdims).astype(x.dtype)
    return _add_reduce(x, axis, x.dtype, keepdims=keepdims)


def by_product(xp: Module, x: Any) -> bool:
    """Tell whether rows are summed, a bias's gradient, by a product with ones.

    It takes half the time that the sum takes, a quarter for small arrays.
    """
    return xp is np and x.ndim == 2 and x.dtype.char in "fd"


@functools.lru_cache(maxsize=64)
def _ones(length: int, kind: str) -> Array:  # hashing a dtype takes 0.1 us
    return np.ones(length, kind)


def _sum_to(xp: Module, x: Array, *, shape: tuple[int, ...]) -> Array:
    if by_product(xp, x):
        rows, columns = x.shape
        if shape == (columns,) or shape == (1, columns):
            ones = _ones(rows, x.dtype.char) if rows <= 1 << 14 else np.ones(rows, x.dtype)
            y = ones.dot(x)  # np.dot goes through Python first
            return y if len(shape) == 1 else y.reshape(shape)
    lead = x.ndim - len(shape)
    stretched = [i for i, length in enumerate(x.shape) if i < lead or shape[i - lead] != length]
    return sum_over(xp, x, tuple(stretched)).reshape(shape)


def _sum_into(
    xp: Module, x: Array, *, shape: tuple[int, ...], out: Sequence[Array | None] = (None,)
) -> Array | None:
    """Sum over the first axes into given memory; where there is none, the meaning does it."""
    lead = x.ndim - len(shape)
    if out[0] is None or not lead or x.shape[lead:] != shape:
        return None
    if not x.flags.c_contiguous:  # CuPy may write `out` in the order that x has
        return None
    return x.sum(axis=tuple(range(lead)), dtype=x.dtype, out=out[0])


sum_to: Primitive = primitive(
    "sum_to",
    _sum_to,
    lambda g, _y, _x, *, shape: broadcast_to(g, shape=_x.shape),
    kernel=_sum_into,
    fills=True,
)


def _broadcast_to(xp: Module, x: Array, *, shape: tuple[int, ...]) -> Array:
    if xp is np and x.ndim == 0:  # what NumPy's function does in 5 us, in 0.6
        y = np.ndarray(shape, x.dtype, np.asarray(x), 0, (0,) * len(shape))
        y.flags.writeable = False
        return y
    return xp.broadcast_to(x, shape)


broadcast_to: Primitive = primitive(
    "broadcast_to",
    _broadcast_to,
    lambda g, _y, _x, *, shape: g,
)

cast: Primitive = primitive(
    "cast",
    lambda xp, x, *, dtype: x.astype(dtype),
    lambda g, _y, _x, *, dtype: g,
)

reshape: Primitive = primitive(
    "reshape",
    lambda xp, x, *, shape: x.reshape(shape),
    lambda g, _y, _x, *, shape: reshape(g, shape=_x.shape),
)

permute: Primitive = primitive(
    "permute",
    lambda xp, x, *, axes: x.transpose(axes),
    lambda g, _y, _x, *, axes: permute(
        g, axes=tuple(sorted(range(len(axes)), key=axes.__getitem__))
    ),
)

# Rows: stack puts equal shapes along a new first axis, row takes one out, and place_row puts one
# back among zeros. Each is the others' derivative.


def _place_row(xp: Module, x: Array, *, index: int, count: int) -> Array:
    out = xp.zeros((count, *x.shape), x.dtype)
    out[index] = x
    return out


stack: Primitive = primitive(
    "stack",
    lambda xp, *xs: np.stack(xs) if xp is np else concatenated(xp, [x[None] for x in xs]),
    joint_vjp=lambda needs, g, _y, *_xs: tuple(
        row(g, index=i) if needed else None for i, needed in enumerate(needs)
    ),
)
row: Primitive = primitive(
    "row",
    lambda xp, x, *, index: x[index],
    lambda g, _y, _x, *, index: place_row(g, index=index, count=_x.shape[0]),
)
place_row: Primitive = primitive(
    "place_row",
    _place_row,
    lambda g, _y, _x, *, index, count: row(g, index=index),
)


def _filled_like(value: int) -> Any:
    def forward(xp: Module, x: Array) -> Array:
        if xp is np and x.ndim == 0:  # a NumPy scalar: operators on it cost a tenth of a 0-d array
            return x.dtype.type(value)
        return xp.full(x.shape, value, x.dtype)

    return forward


ones_like: Primitive = primitive("ones_like", _filled_like(1), None)
zeros_like: Primitive = primitive("zeros_like", _filled_like(0), None)


def fit(g: Tensor, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Undo broadcasting and promotion: bring a gradient to its source's shape and dtype."""
    array = g._array
    if array.shape != shape:
        g = sum_to(g, shape=shape)
    if array.dtype != dtype:
        g = cast(g, dtype=dtype)
    return g
