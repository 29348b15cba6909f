"""What operations do with their arguments before they call a primitive."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad.linear import cast
from tapegrad.tensor import ArrayLike, Operand, Tensor


def as_tensor(x: ArrayLike) -> Tensor:
    """Return a Tensor: x itself, a Variable's value, or a copy of an array, number or list."""
    if type(x) is Tensor:
        return x
    return x._read() if isinstance(x, Operand) else Tensor(x)


def as_floating(x: ArrayLike) -> Tensor:
    """Return a Tensor as it is, but integers as floats: negated, unsigned ones would wrap."""
    x = as_tensor(x)
    if x._array.dtype.kind in "biu":
        return cast(x, dtype=np.result_type(x._array.dtype, np.float32))
    return x


def normalize_axis(name: str, axis: Any, ndim: int) -> int:
    """Return an axis counted from the front; raise `ValueError` where there is no such axis."""
    try:
        number = operator.index(axis)
    except TypeError:
        raise TypeError(f"[{name}] axis must be an integer, got {axis!r}") from None
    if not -ndim <= number < ndim:
        raise np.exceptions.AxisError(
            f"[{name}] axis {number} is out of bounds for a tensor of {ndim} dimensions"
        )
    return number % ndim


def normalize_axes(name: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """Return axes counted from the front, all of them for None; refuse one given twice."""
    if axis is None:
        return tuple(range(ndim))
    if not isinstance(axis, Sequence):
        return (normalize_axis(name, axis, ndim),)
    axes = tuple(normalize_axis(name, a, ndim) for a in axis)
    if len(set(axes)) != len(axes):
        raise ValueError(f"[{name}] an axis is given twice in {tuple(axis)}")
    return axes


def normalize_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of Python ints; an int stands for one axis."""
    try:
        if isinstance(shape, (list, tuple)):
            return tuple(operator.index(length) for length in shape)
        if isinstance(shape, (Operand, np.ndarray)) and shape.ndim == 1:
            return tuple(operator.index(length) for length in shape)
        return (operator.index(shape),)
    except TypeError:
        raise TypeError(f"[{name}] a shape holds integers, got {shape!r}") from None
