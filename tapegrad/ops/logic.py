"""Comparisons and logic, element by element: boolean results, without a gradient."""

from __future__ import annotations

from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Tensor

_equal: Primitive = primitive("equal", lambda xp, x1, x2: x1 == x2, None, None)
_not_equal: Primitive = primitive("not_equal", lambda xp, x1, x2: x1 != x2, None, None)
_less: Primitive = primitive("less", lambda xp, x1, x2: x1 < x2, None, None)
_less_equal: Primitive = primitive("less_equal", lambda xp, x1, x2: x1 <= x2, None, None)
_greater: Primitive = primitive("greater", lambda xp, x1, x2: x1 > x2, None, None)
_greater_equal: Primitive = primitive("greater_equal", lambda xp, x1, x2: x1 >= x2, None, None)
_logical_and: Primitive = primitive(
    "logical_and", lambda xp, x1, x2: xp.logical_and(x1, x2), None, None
)
_logical_or: Primitive = primitive(
    "logical_or", lambda xp, x1, x2: xp.logical_or(x1, x2), None, None
)
_logical_xor: Primitive = primitive(
    "logical_xor", lambda xp, x1, x2: xp.logical_xor(x1, x2), None, None
)
_logical_not: Primitive = primitive("logical_not", lambda xp, x: xp.logical_not(x), None)
_bitwise_and: Primitive = primitive("bitwise_and", lambda xp, x1, x2: x1 & x2, None, None)
_bitwise_or: Primitive = primitive("bitwise_or", lambda xp, x1, x2: x1 | x2, None, None)
_bitwise_xor: Primitive = primitive("bitwise_xor", lambda xp, x1, x2: x1 ^ x2, None, None)
_bitwise_invert: Primitive = primitive("bitwise_invert", lambda xp, x: ~x, None)
_isfinite: Primitive = primitive("isfinite", lambda xp, x: xp.isfinite(x), None)
_isinf: Primitive = primitive("isinf", lambda xp, x: xp.isinf(x), None)
_isnan: Primitive = primitive("isnan", lambda xp, x: xp.isnan(x), None)


def equal(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether x1 == x2, element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.equal([1.0, 2.0], 1.0))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _equal(x1, x2)


def not_equal(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether x1 != x2, element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.not_equal([1.0, 2.0], 1.0))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _not_equal(x1, x2)


def less(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether x1 < x2, element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.less([1.0, 2.0], 2.0))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _less(x1, x2)


def less_equal(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether x1 <= x2, element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.less_equal([1.0, 2.0], 1.0))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _less_equal(x1, x2)


def greater(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether x1 > x2, element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.greater([1.0, 2.0], 1.0))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _greater(x1, x2)


def greater_equal(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether x1 >= x2, element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.greater_equal([1.0, 2.0], 2.0))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _greater_equal(x1, x2)


def logical_and(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether both are true (not 0), element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.logical_and([True, False], True))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _logical_and(x1, x2)


def logical_or(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether one is true (not 0), element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.logical_or([True, False], False))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _logical_or(x1, x2)


def logical_xor(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return whether exactly one is true (not 0), element by element.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.logical_xor([True, False], False))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _logical_xor(x1, x2)


def logical_not(x: ArrayLike, /) -> Tensor:
    """Return whether each element is false (0).

    >>> print(tg.logical_not([True, False]))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _logical_not(x)


def bitwise_and(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 & x2 on integers or booleans, element by element.

    Raises `TypeError` for floats, `ValueError` for shapes that do not broadcast.

    >>> print(tg.bitwise_and([1, 3], 2))
    tg.Tensor([0 2], shape=(2,), dtype=int64)
    """
    return _bitwise_and(x1, x2)


def bitwise_or(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 | x2 on integers or booleans, element by element.

    Raises `TypeError` for floats, `ValueError` for shapes that do not broadcast.

    >>> print(tg.bitwise_or([1, 3], 2))
    tg.Tensor([3 3], shape=(2,), dtype=int64)
    """
    return _bitwise_or(x1, x2)


def bitwise_xor(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 ^ x2 on integers or booleans, element by element.

    Raises `TypeError` for floats, `ValueError` for shapes that do not broadcast.

    >>> print(tg.bitwise_xor([1, 3], 2))
    tg.Tensor([3 1], shape=(2,), dtype=int64)
    """
    return _bitwise_xor(x1, x2)


def bitwise_invert(x: ArrayLike, /) -> Tensor:
    """Return ~x on integers or booleans, element by element; raises `TypeError` for floats.

    >>> print(tg.bitwise_invert([True, False]))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _bitwise_invert(x)


def isfinite(x: ArrayLike, /) -> Tensor:
    """Return whether each element is neither infinite nor NaN.

    >>> print(tg.isfinite([1.0, float('inf')]))
    tg.Tensor([ True False], shape=(2,), dtype=bool)
    """
    return _isfinite(x)


def isinf(x: ArrayLike, /) -> Tensor:
    """Return whether each element is infinite.

    >>> print(tg.isinf([1.0, float('inf')]))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _isinf(x)


def isnan(x: ArrayLike, /) -> Tensor:
    """Return whether each element is NaN.

    >>> print(tg.isnan([1.0, float('nan')]))
    tg.Tensor([False  True], shape=(2,), dtype=bool)
    """
    return _isnan(x)
