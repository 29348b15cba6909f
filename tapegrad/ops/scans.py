"""Cumulative sums and products, and the product over axes, right at zeros in every order."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module, is_short
from tapegrad.linear import broadcast_to as _broadcast_to
from tapegrad.linear import reshape as _reshape
from tapegrad.linear import zeros_like as _zeros_like
from tapegrad.ops import elementwise as ew
from tapegrad.ops.arguments import as_tensor, normalize_axes, normalize_axis
from tapegrad.ops.reductions import Axis, count, spread
from tapegrad.ops.shape import concat, permute_dims
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Tensor, constant

# `reverse` means from the last element to the first.


def _along(xp: Module, scan: Any, x: Array, axis: int, reverse: bool) -> Array:
    if not reverse:
        return scan(x, axis=axis)
    return xp.flip(scan(xp.flip(x, axis), axis=axis), axis)


def _shifted(xp: Module, x: Array, *, axis: int, by: int, fill: float) -> Array:
    y = xp.full_like(x, fill)
    lead = (slice(None),) * axis
    if by > 0:
        y[(*lead, slice(by, None))] = x[(*lead, slice(None, -by))]
    else:
        y[(*lead, slice(None, by))] = x[(*lead, slice(-by, None))]
    return y


# Move the elements along an axis: what comes in is `fill`, what goes out is lost.
_shift: Primitive = primitive(
    "shift",
    _shifted,
    lambda g, _y, _x, *, axis, by, fill: _shift(g, axis=axis, by=-by, fill=0.0),
)


def _sums(xp: Module, x: Array, *, axis: int) -> Array:
    wide = np.float32 if is_short(x.dtype) else None
    y = xp.cumsum(x, axis=axis, dtype=wide)
    return y if wide is None else y.astype(x.dtype)


_cumulative_sum: Primitive = primitive(
    "cumulative_sum",
    lambda xp, x, *, axis, reverse: _along(xp, functools.partial(_sums, xp), x, axis, reverse),
    lambda g, _y, _x, *, axis, reverse: _cumulative_sum(g, axis=axis, reverse=not reverse),
)


def _recurrence_forward(xp: Module, a: Array, b: Array, *, axis: int, reverse: bool) -> Array:
    a, b = xp.moveaxis(a, axis, 0), xp.moveaxis(b, axis, 0)
    y = xp.empty(b.shape, xp.result_type(a, b))
    steps = range(len(b))
    last: Any = None
    for i in reversed(steps) if reverse else steps:
        # A zero stays zero: a factor that overflowed must not make NaN of it.
        y[i] = b[i] if last is None else b[i] + xp.where(last == 0, last, a[i] * last)
        last = y[i]
    return xp.moveaxis(y, 0, axis)


def _recurrence_vjp(
    needs: tuple[bool, ...], g: Tensor, y: Any, a: Any, _b: Any, *, axis: int, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    step = -1 if reverse else 1
    later = _shift(a, axis=axis, by=-step, fill=0.0)
    total = _recurrence(later, g, axis=axis, reverse=not reverse)
    before = _shift(y, axis=axis, by=step, fill=0.0)
    return ew.scale(total, before) if needs[0] else None, total


# y[i] = a[i] * y[i-1] + b[i] along an axis, beginning with b. Its derivative is a recurrence
# again, and so products have derivatives of every order.
_recurrence: Primitive = primitive("recurrence", _recurrence_forward, joint_vjp=_recurrence_vjp)


def _cumulative_prod_vjp(g: Tensor, _y: Any, x: Any, *, axis: int, reverse: bool) -> Tensor:
    # d y[k] / d x[i] is the product of all before i, times that of i+1 to k. Dividing y[k] by x[i]
    # would be shorter, and wrong at zeros (as TensorFlow's was, issue 3862).
    step = -1 if reverse else 1
    before = _cumulative_prod(_shift(x, axis=axis, by=step, fill=1.0), axis=axis, reverse=reverse)
    factors = _shift(x, axis=axis, by=-step, fill=0.0)
    return ew.scale(_recurrence(factors, g, axis=axis, reverse=not reverse), before)


_cumulative_prod: Primitive = primitive(
    "cumulative_prod",
    lambda xp, x, *, axis, reverse: _along(xp, xp.cumprod, x, axis, reverse),
    _cumulative_prod_vjp,
)


def _prod_vjp(g: Tensor, _y: Any, x: Any, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    # The product of all others, in one flat axis: of those before, times that of those after.
    kept = tuple(i for i in range(x.ndim) if i not in axis)
    order = kept + axis
    lead = tuple(x.shape[i] for i in kept)
    last = len(lead)
    flat = _reshape(permute_dims(x, order), shape=(*lead, count(x.shape, axis)))
    before, after = (
        _cumulative_prod(_shift(flat, axis=last, by=by, fill=1.0), axis=last, reverse=by < 0)
        for by in (1, -1)
    )
    others = _reshape(ew.multiply(before, after), shape=tuple(x.shape[i] for i in order))
    back = tuple(order.index(i) for i in range(x.ndim))
    return ew.scale(spread(g, x, axis), permute_dims(others, back))


_prod: Primitive = primitive(
    "prod", lambda xp, x, *, axis, keepdims: xp.prod(x, axis=axis, keepdims=keepdims), _prod_vjp
)


def _scan_axis(name: str, x: Tensor, axis: int | None) -> int:
    if axis is not None:
        return normalize_axis(name, axis, x.ndim)
    if x.ndim != 1:
        raise ValueError(f"[{name}] axis must be given for x of shape {x.shape}")
    return 0


def _after_initial(y: Tensor, axis: int, value: int) -> Tensor:
    """Put one slice of `value` in front along an axis."""
    shape = (*y.shape[:axis], 1, *y.shape[axis + 1 :])
    like_y = ew.add(_zeros_like(_broadcast_to(constant(value, y.dtype), shape=shape)), value)
    return concat([like_y, y], axis=axis)


def cumulative_sum(
    x: ArrayLike, /, axis: int | None = None, *, include_initial: bool = False
) -> Tensor:
    """Return the running sum along an axis, which may be left out for a 1-d x.

    include_initial  whether the result begins with 0, and so is one longer.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.cumulative_sum([1.0, 2.0, 3.0]))
    tg.Tensor([1. 3. 6.], shape=(3,), dtype=float32)
    """
    x = as_tensor(x)
    axis = _scan_axis("cumulative_sum", x, axis)
    y = _cumulative_sum(x, axis=axis, reverse=False)
    return _after_initial(y, axis, 0) if include_initial else y


def cumulative_prod(
    x: ArrayLike, /, axis: int | None = None, *, include_initial: bool = False
) -> Tensor:
    """Return the running product along an axis, which may be left out for a 1-d x.

    include_initial  whether the result begins with 1, and so is one longer.

    Right at zeros, in every order. Raises `ValueError` for an axis that x does not have.

    >>> print(tg.cumulative_prod([1.0, 2.0, 3.0]))
    tg.Tensor([1. 2. 6.], shape=(3,), dtype=float32)
    """
    x = as_tensor(x)
    axis = _scan_axis("cumulative_prod", x, axis)
    y = _cumulative_prod(x, axis=axis, reverse=False)
    return _after_initial(y, axis, 1) if include_initial else y


def prod(x: ArrayLike, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return the product over the given axes, over all of them for None.

    The derivative is the product of the others, right at zeros in every order. Arguments and
    errors are those of `sum`.

    >>> print(tg.prod([2.0, 3.0]))
    tg.Tensor(6.0, shape=(), dtype=float32)
    """
    x = as_tensor(x)
    return _prod(x, axis=normalize_axes("prod", axis, x.ndim), keepdims=keepdims)
