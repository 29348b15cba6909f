"""Reductions: sums, means, norms, extremes, log-sum-exp, truth and places."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module, is_short
from tapegrad.linear import broadcast_to as _broadcast_to
from tapegrad.linear import reshape as _reshape
from tapegrad.linear import sum_over
from tapegrad.ops import elementwise as ew
from tapegrad.ops import logic
from tapegrad.ops.arguments import as_floating, as_tensor, normalize_axes, normalize_axis
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Tensor

Axis = int | tuple[int, ...] | None


def kept_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape after a reduction that keeps the reduced axes with length 1."""
    return tuple(1 if i in axes else length for i, length in enumerate(shape))


def spread(g: Tensor, x: Any, axes: tuple[int, ...]) -> Tensor:
    """Give every reduced element its result's gradient."""
    kept = kept_shape(x.shape, axes)
    if g.shape != kept:
        g = _reshape(g, shape=kept)
    return g if kept == x.shape else _broadcast_to(g, shape=x.shape)


# ---- sums and what is made of them


def _sum_forward(
    xp: Module, x: Array, *, axis: tuple[int, ...], keepdims: bool, dtype: Any
) -> Array:
    if xp is np and is_short(x.dtype) and (dtype is None or dtype == x.dtype):
        return sum_over(xp, x, axis, keepdims)
    return xp.sum(x, axis=axis, keepdims=keepdims, dtype=dtype)


_sum: Primitive = primitive(
    "sum",
    _sum_forward,
    lambda g, _y, _x, *, axis, keepdims, dtype: spread(g, _x, axis),
)


def sum(x: ArrayLike, /, axis: Axis = None, *, dtype: Any = None, keepdims: bool = False) -> Tensor:
    """Return the sum over the given axes, over all of them for None.

    axis      an axis or several; negative ones count from the end.
    dtype     of the result; None keeps a floating type and widens integers, as NumPy does.
    keepdims  whether the reduced axes stay, with length 1.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.sum([[1.0, 2.0], [3.0, 4.0]], axis=0))
    tg.Tensor([4. 6.], shape=(2,), dtype=float32)
    """
    x = as_tensor(x)
    return _sum(x, axis=normalize_axes("sum", axis, x.ndim), keepdims=keepdims, dtype=dtype)


def count(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[i] for i in axes)


def mean(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return the mean over the given axes, over all of them for None; NaN where there is nothing.

    Arguments and errors are those of `sum`. Integers are summed in float64, as in NumPy.

    >>> print(tg.mean([1.0, 2.0, 6.0]))
    tg.Tensor(3.0, shape=(), dtype=float32)
    """
    x = as_tensor(x)
    axes = normalize_axes("mean", axis, x.ndim)
    # The sum of float16 passes its largest number, 65504, soon; that of integers would wrap.
    half = x.dtype == np.float16
    wide = np.float32 if half else np.float64 if x.dtype.kind in "biu" else None
    dtype = None if wide is None else np.dtype(wide)
    y = ew.divide(_sum(x, axis=axes, keepdims=keepdims, dtype=dtype), count(x.shape, axes))
    return ew.astype(y, x.dtype) if half else y


def _in_float32(reduction: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """Reduce 16 bits with all steps in float32: squares soon pass float16's largest, 65504."""
    return ew.astype(reduction(ew.astype(x, np.float32), **options), x.dtype)


def _divisor(shape: tuple[int, ...], axes: tuple[int, ...], correction: float) -> float:
    """Return n - correction, or 0 where that is below: no variance is negative."""
    n = count(shape, axes) - correction
    return n if n > 0 else 0.0


def var(
    x: ArrayLike, /, axis: Axis = None, *, correction: float = 0.0, keepdims: bool = False
) -> Tensor:
    """Return the variance: the sum of squared deviations from the mean, by n - correction.

    A divisor below 0 counts as 0, as with NumPy: the variance is then infinite or NaN.
    Other arguments and errors are those of `sum`.

    >>> print(tg.var([1.0, 3.0]))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    x = as_tensor(x)
    if is_short(x.dtype):
        return _in_float32(var, x, axis=axis, correction=correction, keepdims=keepdims)
    axes = normalize_axes("var", axis, x.ndim)
    deviation = ew.subtract(x, mean(x, axis=axes, keepdims=True))
    total = sum(ew.square(deviation), axis=axes, keepdims=keepdims)
    return ew.divide(total, _divisor(x.shape, axes, correction))


def std(
    x: ArrayLike, /, axis: Axis = None, *, correction: float = 0.0, keepdims: bool = False
) -> Tensor:
    """Return the standard deviation, the square root of `var`; the gradient is 0 where it is 0.

    Arguments and errors are those of `var`.

    >>> print(tg.std([1.0, 3.0]))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    x = as_tensor(x)
    if is_short(x.dtype):
        return _in_float32(std, x, axis=axis, correction=correction, keepdims=keepdims)
    axes = normalize_axes("std", axis, x.ndim)
    deviation = ew.subtract(x, mean(x, axis=axes, keepdims=True))
    length = _euclidean(deviation, axis=axes, keepdims=keepdims)
    return ew.divide(length, math.sqrt(_divisor(x.shape, axes, correction)))


# ---- norms


def _euclidean_forward(xp: Module, x: Array, *, axis: tuple[int, ...], keepdims: bool) -> Array:
    return xp.sqrt(xp.sum(x * x, axis=axis, keepdims=keepdims))


def _euclidean_vjp(g: Tensor, y: Any, x: Any, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    # An operation of its own, because sqrt(sum(x * x)) has the derivative inf * 0 at the origin:
    # here it is 0, the sub-gradient of least norm.
    length = ew.where(logic.equal(y, 0), 1, y)
    return ew.scale(spread(g, x, axis), ew.divide(x, spread(length, x, axis)))


_euclidean: Primitive = primitive("euclidean_norm", _euclidean_forward, _euclidean_vjp)


def norm(
    x: ArrayLike,
    /,
    *,
    ord: float = 2,
    axis: Axis = None,
    keepdims: bool = False,
) -> Tensor:
    """Return the vector norm of order `ord` over the given axes, over all of them for None.

    ord   2: Euclidean (for a matrix: Frobenius); 1: sum of absolute values; inf or -inf: largest
          or smallest absolute value; 0: number of elements that are not 0; another number p:
          sum(abs(x)**p)**(1/p).

    The gradient at the origin is 0. Other arguments and errors are those of `sum`.

    >>> print(tg.norm([3.0, 4.0]))
    tg.Tensor(5.0, shape=(), dtype=float32)
    """
    x = as_floating(x)
    if is_short(x.dtype):
        return _in_float32(norm, x, ord=ord, axis=axis, keepdims=keepdims)
    axes = normalize_axes("norm", axis, x.ndim)
    if ord == 2:
        return _euclidean(x, axis=axes, keepdims=keepdims)
    if ord == 1:
        return sum(ew.abs(x), axis=axes, keepdims=keepdims)
    if ord == math.inf:
        return max(ew.abs(x), axis=axes, keepdims=keepdims)
    if ord == -math.inf:
        return min(ew.abs(x), axis=axes, keepdims=keepdims)
    if ord == 0:
        return sum(ew.astype(logic.not_equal(x, 0), x.dtype), axis=axes, keepdims=keepdims)
    sizes = ew.abs(x)
    terms = _power_from_0(sizes, ord) if 0 < ord < 1 else ew.power(sizes, ord)
    return _power_from_0(sum(terms, axis=axes, keepdims=keepdims), 1 / ord)


def _power_from_0(x: Tensor, exponent: float) -> Tensor:
    """Return x**exponent, with the gradient 0 at 0, where a root's slope is infinite."""
    zero = logic.equal(x, 0)
    return ew.where(zero, 0, ew.power(ew.where(zero, 1, x), exponent))


# ---- extremes


def _extreme_share(
    xp: Module, x: Array, y: Array, *, axis: tuple[int, ...], keepdims: bool
) -> Array:
    if not keepdims:
        y = y.reshape(kept_shape(x.shape, axis))
    ties = (x == y).astype(x.dtype)
    with np.errstate(invalid="ignore"):  # 0 / 0, and so NaN, where the extreme is NaN
        return ties / ties.sum(axis=axis, keepdims=True)


# The share of each element in its extreme: 1 over the number of ties, which split the gradient.
_share: Primitive = primitive("extreme_share", _extreme_share, None, None)


def _extreme_vjp(g: Tensor, y: Any, x: Any, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    return ew.scale(spread(g, x, axis), _share(x, y, axis=axis, keepdims=keepdims))


_max: Primitive = primitive(
    "max", lambda xp, x, *, axis, keepdims: xp.max(x, axis=axis, keepdims=keepdims), _extreme_vjp
)
_min: Primitive = primitive(
    "min", lambda xp, x, *, axis, keepdims: xp.min(x, axis=axis, keepdims=keepdims), _extreme_vjp
)


def max(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return the largest element over the given axes, NaN if one is NaN; ties share the gradient.

    Arguments and errors are those of `sum`; also `ValueError` where there is no element.

    >>> print(tg.max([1.0, 3.0, 2.0]))
    tg.Tensor(3.0, shape=(), dtype=float32)
    """
    x = as_tensor(x)
    return _max(x, axis=normalize_axes("max", axis, x.ndim), keepdims=keepdims)


def min(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return the smallest element over the given axes, NaN if one is NaN; ties share the gradient.

    Arguments and errors are those of `max`.

    >>> print(tg.min([1.0, 3.0, 2.0]))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    x = as_tensor(x)
    return _min(x, axis=normalize_axes("min", axis, x.ndim), keepdims=keepdims)


# ---- log-sum-exp


def _finite_max_forward(xp: Module, x: Array, *, axis: tuple[int, ...]) -> Array:
    top = xp.max(x, axis=axis, keepdims=True)
    return xp.where(xp.isfinite(top), top, top.dtype.type(0))


# The largest element, kept in its axes, or 0: what is subtracted so that exp cannot overflow. It
# cancels, and so has no part in any derivative.
_finite_max: Primitive = primitive("finite_max", _finite_max_forward, None)


def _logsumexp_forward(xp: Module, x: Array, *, axis: tuple[int, ...], keepdims: bool) -> Array:
    top = _finite_max_forward(xp, x, axis=axis)
    with np.errstate(divide="ignore", over="ignore"):  # log(0) where all elements are -inf
        y = xp.log(sum_over(xp, xp.exp(x - top), axis, keepdims=True)) + top
    return y if keepdims else y.reshape([n for i, n in enumerate(x.shape) if i not in axis])


def _logsumexp_vjp(g: Tensor, _y: Any, x: Any, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    # The softmax by its definition: exp(x - y) would carry the rounding of a large y.
    shares = ew.exp(ew.subtract(x, _finite_max(x, axis=axis)))
    total = sum(shares, axis=axis, keepdims=True)
    return ew.scale(
        spread(g, x, axis), ew.divide(shares, ew.where(logic.equal(total, 0), 1, total))
    )


_logsumexp: Primitive = primitive("logsumexp", _logsumexp_forward, _logsumexp_vjp)


def logsumexp(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return log(sum(exp(x))) over the given axes, without overflow.

    The derivative is the softmax, and 0 where all elements are -inf. Arguments and errors are
    those of `max`.

    >>> print(f"{tg.logsumexp([1000.0, 1000.0]):.3f}")
    1000.693
    """
    x = as_floating(x)
    return _logsumexp(x, axis=normalize_axes("logsumexp", axis, x.ndim), keepdims=keepdims)


# ---- truth and places: no gradients

_all: Primitive = primitive(
    "all", lambda xp, x, *, axis, keepdims: xp.all(x, axis=axis, keepdims=keepdims), None
)
_any: Primitive = primitive(
    "any", lambda xp, x, *, axis, keepdims: xp.any(x, axis=axis, keepdims=keepdims), None
)
_argmax: Primitive = primitive(
    "argmax", lambda xp, x, *, axis, keepdims: xp.argmax(x, axis=axis, keepdims=keepdims), None
)
_argmin: Primitive = primitive(
    "argmin", lambda xp, x, *, axis, keepdims: xp.argmin(x, axis=axis, keepdims=keepdims), None
)


def all(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return whether all elements are true (not 0) over the given axes; no gradient.

    Arguments and errors are those of `sum`.

    >>> print(tg.all([True, False]))
    tg.Tensor(False, shape=(), dtype=bool)
    """
    x = as_tensor(x)
    return _all(x, axis=normalize_axes("all", axis, x.ndim), keepdims=keepdims)


def any(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return whether any element is true (not 0) over the given axes; no gradient.

    Arguments and errors are those of `sum`.

    >>> print(tg.any([True, False]))
    tg.Tensor(True, shape=(), dtype=bool)
    """
    x = as_tensor(x)
    return _any(x, axis=normalize_axes("any", axis, x.ndim), keepdims=keepdims)


def argmax(x: ArrayLike, /, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    """Return the index of the largest element, the first of several, along an axis; no gradient.

    axis  None counts the elements in row order. A NaN is larger than all else; of several NaNs a
          GPU may answer any. Raises `ValueError` for an axis that x does not have, and where
          there is no element.

    >>> print(tg.argmax([1.0, 3.0, 2.0]))
    tg.Tensor(1, shape=(), dtype=int64)
    """
    x = as_tensor(x)
    axis = None if axis is None else normalize_axis("argmax", axis, x.ndim)
    return _argmax(x, axis=axis, keepdims=keepdims)


def argmin(x: ArrayLike, /, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    """Return the index of the smallest element, the first of several, along an axis; no gradient.

    A NaN is smaller than all else here. Arguments and errors are those of `argmax`.

    >>> print(tg.argmin([3.0, 1.0, 2.0]))
    tg.Tensor(1, shape=(), dtype=int64)
    """
    x = as_tensor(x)
    axis = None if axis is None else normalize_axis("argmin", axis, x.ndim)
    return _argmin(x, axis=axis, keepdims=keepdims)
