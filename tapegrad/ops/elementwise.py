"""Elementwise operations: arithmetic, powers, exponentials, trigonometry, choices, types."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad.formulas import gradient_formula, one_launch
from tapegrad.kernels import elementwise as kernels
from tapegrad.linear import add as _add
from tapegrad.linear import cast as _cast
from tapegrad.linear import zeros_like as _zeros_like
from tapegrad.ops import logic
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Operand, Tensor

# ---- the product of the reverse pass


def _scale(xp: Module, g: Any, d: Any) -> Array:
    y = g * d
    if type(g) is float or type(g) is int:  # no condition for CuPy's where
        return y if g != 0 else xp.zeros_like(y)
    if type(d) is float or type(d) is int:
        if d - d == 0:  # finite: the product is right as it is
            return y
    elif xp is np and not (holds_nan(y) if y.ndim else y != y):
        return y
    # On a GPU asking costs more (a synchronisation) than choosing.
    return with_zeros(xp, y, g == 0)


def _scale_both(xp: Module, a: Any, b: Any) -> Array:
    y = a * b
    if xp is np and not (holds_nan(y) if y.ndim else y != y):
        return y
    return with_zeros(xp, y, (a == 0) | (b == 0))


def with_zeros(xp: Module, y: Any, wins: Any) -> Array:
    """Return a product with 0 where a zero factor wins."""
    if xp is np:  # a zero that the product gave keeps its sign, as where no NaN was met
        wins = wins & (y != y)
    return xp.where(wins, y.dtype.type(0), y)


def holds_nan(y: Any) -> bool:
    """Tell whether an array on a CPU holds a NaN."""
    if y.dtype.char in "fd":  # a dot product is the fastest way to ask: half of the product's time
        flat = y.reshape(-1)
        dot = flat.dot(flat)
        return bool(dot != dot)
    return bool(np.isnan(y).any())


# The product g*d in which a zero upstream gradient g gives zero whatever the derivative d is, NaN
# and infinities included. "This element does not matter" is what a zero upstream says, and what
# `where` says about the branch that it does not take. A product of its own, because a rule with
# where(g == 0, ...) would make g a constant and destroy second derivatives.
scale: Primitive = primitive(
    "scale",
    _scale,
    lambda G, _y, _g, d: scale(G, d),
    lambda G, _y, g, _d: scale_both(G, g),
    kernel=kernels.scale,
)
# The same with both factors: a derivative of d reaches back through a branch that was not taken,
# where the factor g is zero, and the G that comes from there may be infinite.
scale_both: Primitive = primitive(
    "scale_both",
    _scale_both,
    lambda G, _y, _a, b: scale_both(G, b),
    lambda G, _y, a, _b: scale_both(G, a),
)


# ---- arithmetic

_subtract: Primitive = primitive(
    "subtract",
    lambda xp, x1, x2: x1 - x2,
    lambda g, _y, _x1, _x2: g,
    lambda g, _y, _x1, _x2: _negative(g),
)
_multiply: Primitive = primitive(
    "multiply",
    lambda xp, x1, x2: x1 * x2,
    lambda g, _y, _x1, x2: scale(g, x2),
    lambda g, _y, x1, _x2: scale(g, x1),
)


def _divide_vjp_x1(g: Tensor, _y: Any, _x1: Any, x2: Any) -> Tensor:
    if type(x2) in (float, int) and x2 != 0:
        return _divide(g, x2)
    return scale(g, _divide(1, x2))


_divide: Primitive = primitive(
    "divide",
    lambda xp, x1, x2: x1 / x2,
    _divide_vjp_x1,
    lambda g, y, _x1, x2: scale(g, _negative(_divide(y, x2))),
)


def _divided(xp: Module, x1: Any, x2: Any) -> tuple[Array, Array]:
    """Return x1 // x2 and x1 % x2 of floats as NumPy defines them, for CuPy.

    CuPy's own are floor(x1 / x2) and what that leaves: 1.0 // 0.1 is 10, 1.0 % inf is NaN.
    """
    dtype = xp.result_type(x1, x2)
    wide = np.promote_types(dtype, np.float32)
    x1, x2 = (
        xp.full((), x, wide) if type(x) in (float, int) else x.astype(wide, copy=False)
        for x in (x1, x2)
    )
    rest = xp.fmod(x1, x2)  # exact, with the sign of x1
    quotient = (x1 - rest) / x2
    below = (rest != 0) & ((rest < 0) != (x2 < 0))
    quotient = xp.rint(xp.where(below, quotient - 1, quotient))
    quotient = xp.where(quotient == 0, xp.copysign(quotient, x1 / x2), quotient)
    rest = xp.where(below, rest + x2, xp.where(rest == 0, xp.copysign(rest, x2), rest))
    return xp.where(x2 == 0, x1 / x2, quotient).astype(dtype), rest.astype(dtype)


def _floor_divide_forward(xp: Module, x1: Any, x2: Any) -> Array:
    if xp is np or xp.result_type(x1, x2).kind != "f":
        return x1 // x2
    return _divided(xp, x1, x2)[0]


def _remainder_forward(xp: Module, x1: Any, x2: Any) -> Array:
    if xp is np or xp.result_type(x1, x2).kind != "f":
        return x1 % x2
    return _divided(xp, x1, x2)[1]


_floor_divide: Primitive = primitive("floor_divide", _floor_divide_forward, None, None)
_remainder: Primitive = primitive(
    "remainder",
    _remainder_forward,
    lambda g, _y, _x1, _x2: g,
    lambda g, _y, x1, x2: scale(g, _negative(_floor_divide(x1, x2))),
)
_negative: Primitive = primitive("negative", lambda xp, x: -x, lambda g, _y, _x: _negative(g))
_positive: Primitive = primitive("positive", lambda xp, x: xp.positive(x), lambda g, _y, _x: g)


def add(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 + x2, element by element, with NumPy's broadcasting.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.add([1.0, 2.0], 3.0))
    tg.Tensor([4. 5.], shape=(2,), dtype=float32)
    """
    return _add(x1, x2)


def subtract(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 - x2, element by element, with NumPy's broadcasting.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.subtract([1.0, 2.0], 3.0))
    tg.Tensor([-2. -1.], shape=(2,), dtype=float32)
    """
    return _subtract(x1, x2)


def multiply(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 * x2, element by element, with NumPy's broadcasting.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.multiply([1.0, 2.0], 3.0))
    tg.Tensor([3. 6.], shape=(2,), dtype=float32)
    """
    return _multiply(x1, x2)


def divide(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 / x2, element by element; integers give floats, as in NumPy.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.divide([1.0, 2.0], 4.0))
    tg.Tensor([0.25 0.5 ], shape=(2,), dtype=float32)
    """
    return _divide(x1, x2)


def floor_divide(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return floor(x1 / x2), element by element; piecewise constant, so it has no gradient.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.floor_divide([7.0, -7.0], 2.0))
    tg.Tensor([ 3. -4.], shape=(2,), dtype=float32)
    """
    return _floor_divide(x1, x2)


def remainder(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 - floor(x1 / x2) * x2, element by element, with the sign of x2 (Python's %).

    The derivatives are 1 and -floor(x1 / x2). Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.remainder([7.0, -7.0], 2.0))
    tg.Tensor([1. 1.], shape=(2,), dtype=float32)
    """
    return _remainder(x1, x2)


def negative(x: ArrayLike, /) -> Tensor:
    """Return -x, element by element.

    >>> print(tg.negative([1.0, -2.0]))
    tg.Tensor([-1.  2.], shape=(2,), dtype=float32)
    """
    return _negative(x)


def positive(x: ArrayLike, /) -> Tensor:
    """Return +x, a new tensor of the same values.

    >>> print(tg.positive([1.0, -2.0]))
    tg.Tensor([ 1. -2.], shape=(2,), dtype=float32)
    """
    return _positive(x)


# ---- powers and roots


def _power_vjp_x1(g: Tensor, _y: Any, x1: Any, x2: Any) -> Tensor:
    if type(x2) in (float, int) and x2 == 2:
        return scale(g, _multiply(x1, 2))
    # scale(x2, ...) makes the derivative of x**0 zero at 0 too, where 0 * 0**-1 would be NaN.
    return scale(g, scale(x2, _power(x1, x2 - 1)))


def _power_vjp_x2(g: Tensor, y: Any, x1: Any, _x2: Any) -> Tensor:
    # The logarithm of a base that is not positive counts as 0: 0**x is 0, and a negative base has
    # a power for integer exponents only, where no derivative exists.
    if type(x1) in (float, int):
        return scale(g, _multiply(y, math.log(x1) if x1 > 0 else 0.0))
    return scale(g, _multiply(y, _log(where(logic.greater(x1, 0), x1, 1))))


def _power_forward(xp: Module, x1: Any, x2: Any) -> Array:
    integers = xp is not np and xp.result_type(x1, x2).kind in "iu"
    if integers and (x2 < 0 if type(x2) is int else (x2 < 0).any()):  # CuPy answers 0
        raise ValueError("Integers to negative integer powers are not allowed.")
    return x1**x2


_power: Primitive = primitive("power", _power_forward, _power_vjp_x1, _power_vjp_x2)
_square: Primitive = primitive(
    "square", lambda xp, x: x * x, lambda g, _y, x: scale(g, _multiply(x, 2))
)
_sqrt: Primitive = primitive(
    "sqrt", lambda xp, x: xp.sqrt(x), lambda g, y, _x: scale(g, _divide(0.5, y))
)
_rsqrt: Primitive = primitive(
    "rsqrt",
    lambda xp, x: 1 / xp.sqrt(x),
    lambda g, y, x: scale(g, _multiply(_divide(y, x), -0.5)),
)
_reciprocal: Primitive = primitive(
    "reciprocal", lambda xp, x: 1 / x, lambda g, y, _x: scale(g, _negative(_square(y)))
)


def _hypot_vjp(g: Tensor, y: Any, x: Any) -> Tensor:
    # At the origin 0, the sub-gradient of least norm.
    return scale(g, _divide(x, where(logic.equal(y, 0), 1, y)))


_hypot: Primitive = primitive(
    "hypot",
    lambda xp, x1, x2: xp.hypot(x1, x2),
    lambda g, y, x1, _x2: _hypot_vjp(g, y, x1),
    lambda g, y, _x1, x2: _hypot_vjp(g, y, x2),
)


def power(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 ** x2, element by element.

    The derivatives are x2 * x1**(x2 - 1), which is 0 for x2 = 0 everywhere, and x1**x2 * log(x1),
    where the logarithm of a base <= 0 counts as 0. Raises `ValueError` for shapes that do not
    broadcast and for integers to negative integer powers.

    >>> print(tg.power([1.0, 2.0, 3.0], 2))
    tg.Tensor([1. 4. 9.], shape=(3,), dtype=float32)
    """
    return _power(x1, x2)


def square(x: ArrayLike, /) -> Tensor:
    """Return x * x, element by element.

    >>> print(tg.square([1.0, 2.0, 3.0]))
    tg.Tensor([1. 4. 9.], shape=(3,), dtype=float32)
    """
    return _square(x)


def sqrt(x: ArrayLike, /) -> Tensor:
    """Return the square root of each element: NaN below 0; the derivative at 0 is infinite.

    >>> print(tg.sqrt([4.0, 9.0]))
    tg.Tensor([2. 3.], shape=(2,), dtype=float32)
    """
    return _sqrt(x)


def rsqrt(x: ArrayLike, /) -> Tensor:
    """Return 1 / sqrt(x), element by element.

    >>> print(tg.rsqrt([4.0, 16.0]))
    tg.Tensor([0.5  0.25], shape=(2,), dtype=float32)
    """
    return _rsqrt(x)


def reciprocal(x: ArrayLike, /) -> Tensor:
    """Return 1 / x, element by element.

    >>> print(tg.reciprocal([2.0, 4.0]))
    tg.Tensor([0.5  0.25], shape=(2,), dtype=float32)
    """
    return _reciprocal(x)


def hypot(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return sqrt(x1**2 + x2**2) without overflow; the derivatives at (0, 0) are 0.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.hypot(3.0, 4.0))
    tg.Tensor(5.0, shape=(), dtype=float32)
    """
    return _hypot(x1, x2)


# ---- exponentials and logarithms

_exp: Primitive = primitive("exp", lambda xp, x: xp.exp(x), lambda g, y, _x: scale(g, y))
_exp2: Primitive = primitive(
    "exp2", lambda xp, x: xp.exp2(x), lambda g, y, _x: scale(g, _multiply(y, math.log(2)))
)
# exp(x), not y + 1: for x = -20 the sum has lost every digit in float32.
_expm1: Primitive = primitive(
    "expm1", lambda xp, x: xp.expm1(x), lambda g, _y, x: scale(g, _exp(x))
)
_log: Primitive = primitive(
    "log", lambda xp, x: xp.log(x), lambda g, _y, x: scale(g, _reciprocal(x))
)
_log2: Primitive = primitive(
    "log2",
    lambda xp, x: xp.log2(x),
    lambda g, _y, x: scale(g, _divide(1 / math.log(2), x)),
)
_log10: Primitive = primitive(
    "log10",
    lambda xp, x: xp.log10(x),
    lambda g, _y, x: scale(g, _divide(1 / math.log(10), x)),
)
_log1p: Primitive = primitive(
    "log1p", lambda xp, x: xp.log1p(x), lambda g, _y, x: scale(g, _reciprocal(_add(x, 1)))
)


def _logaddexp_share(x: Any, other: Any) -> Tensor:
    """Return exp(x) / (exp(x) + exp(other)), 0 where both are the same infinity."""
    both_infinite = logic.logical_and(logic.equal(x, other), logic.isinf(x))
    difference = where(both_infinite, math.inf, _subtract(other, x))
    return _reciprocal(_add(_exp(difference), 1))


_logaddexp: Primitive = primitive(
    "logaddexp",
    lambda xp, x1, x2: xp.logaddexp(x1, x2),
    lambda g, _y, x1, x2: scale(g, _logaddexp_share(x1, x2)),
    lambda g, _y, x1, x2: scale(g, _logaddexp_share(x2, x1)),
)


def _xlogy_forward(xp: Module, x1: Any, x2: Any) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        # A number's logarithm is a number again, or it would make float32 float64.
        y = x1 * (float(np.log(x2)) if type(x2) in (float, int) else xp.log(x2))
    return xp.where((x1 == 0) & (x2 == x2), y.dtype.type(0), y)


_xlogy: Primitive = primitive(
    "xlogy",
    _xlogy_forward,
    # log(x2), but 0 at (0, 0), where xlogy(x, x) is meant to have the derivative 0.
    lambda g, _y, x1, x2: scale(
        g, _log(where(logic.logical_and(logic.equal(x1, 0), logic.equal(x2, 0)), 1, x2))
    ),
    lambda g, _y, x1, x2: scale(g, scale(x1, _divide(1, x2))),
)


def exp(x: ArrayLike, /) -> Tensor:
    """Return e**x, element by element.

    >>> print(tg.exp(0.0))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    return _exp(x)


def exp2(x: ArrayLike, /) -> Tensor:
    """Return 2**x, element by element.

    >>> print(tg.exp2([1.0, 3.0]))
    tg.Tensor([2. 8.], shape=(2,), dtype=float32)
    """
    return _exp2(x)


def expm1(x: ArrayLike, /) -> Tensor:
    """Return e**x - 1, element by element, accurate near 0.

    >>> print(tg.expm1(1e-10))
    tg.Tensor(1e-10, shape=(), dtype=float32)
    """
    return _expm1(x)


def log(x: ArrayLike, /) -> Tensor:
    """Return the natural logarithm, element by element: -inf at 0, NaN below.

    >>> print(tg.log([1.0, 0.0]))
    tg.Tensor([  0. -inf], shape=(2,), dtype=float32)
    """
    return _log(x)


def log2(x: ArrayLike, /) -> Tensor:
    """Return the logarithm to base 2, element by element.

    >>> print(tg.log2(8.0))
    tg.Tensor(3.0, shape=(), dtype=float32)
    """
    return _log2(x)


def log10(x: ArrayLike, /) -> Tensor:
    """Return the logarithm to base 10, element by element.

    >>> print(tg.log10(10.0))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    return _log10(x)


def log1p(x: ArrayLike, /) -> Tensor:
    """Return log(1 + x), element by element, accurate near 0.

    >>> print(tg.log1p(1e-10))
    tg.Tensor(1e-10, shape=(), dtype=float32)
    """
    return _log1p(x)


def logaddexp(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return log(exp(x1) + exp(x2)), element by element, without overflow.

    The derivatives are exp(x1 - y) and exp(x2 - y), both 0 where both arguments are -inf.
    Raises `ValueError` for shapes that do not broadcast.

    >>> print(f"{tg.logaddexp(1000.0, 1000.0):.3f}")
    1000.693
    """
    return _logaddexp(x1, x2)


def xlogy(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 * log(x2), element by element, and 0 where x1 is 0 (unless x2 is NaN).

    The derivatives are log(x2) and x1 / x2, and 0 where both arguments are 0.
    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.xlogy([0.0, 1.0], [0.0, 1.0]))
    tg.Tensor([0. 0.], shape=(2,), dtype=float32)
    """
    return _xlogy(x1, x2)


# ---- trigonometric and hyperbolic functions

_sin: Primitive = primitive("sin", lambda xp, x: xp.sin(x), lambda g, _y, x: scale(g, _cos(x)))
_cos: Primitive = primitive(
    "cos", lambda xp, x: xp.cos(x), lambda g, _y, x: scale(g, _negative(_sin(x)))
)
_tan: Primitive = primitive(
    "tan", lambda xp, x: xp.tan(x), lambda g, y, _x: scale(g, _add(_square(y), 1))
)
_asin: Primitive = primitive(
    "asin",
    lambda xp, x: xp.arcsin(x),
    lambda g, _y, x: scale(g, _rsqrt(_subtract(1, _square(x)))),
)
_acos: Primitive = primitive(
    "acos",
    lambda xp, x: xp.arccos(x),
    lambda g, _y, x: scale(g, _negative(_rsqrt(_subtract(1, _square(x))))),
)
_atan: Primitive = primitive(
    "atan",
    lambda xp, x: xp.arctan(x),
    lambda g, _y, x: scale(g, _reciprocal(_add(_square(x), 1))),
)


def _atan2_share(x: Any, x1: Any, x2: Any) -> Tensor:
    """Return x / (x1**2 + x2**2), and 0 at the origin, where the angle has no slope."""
    radius = _hypot(x1, x2)  # squares would be 0 or infinite for what is not
    radius = where(logic.equal(radius, 0), 1, radius)
    return _divide(_divide(x, radius), radius)


_atan2: Primitive = primitive(
    "atan2",
    lambda xp, x1, x2: xp.arctan2(x1, x2),
    lambda g, _y, x1, x2: scale(g, _atan2_share(x2, x1, x2)),
    lambda g, _y, x1, x2: scale(g, _negative(_atan2_share(x1, x1, x2))),
)
_sinh: Primitive = primitive("sinh", lambda xp, x: xp.sinh(x), lambda g, _y, x: scale(g, _cosh(x)))
_cosh: Primitive = primitive("cosh", lambda xp, x: xp.cosh(x), lambda g, _y, x: scale(g, _sinh(x)))
_tanh_grad = gradient_formula("tanh_grad", lambda o, g, y: o.scale(g, o.subtract(1, o.square(y))))
_tanh: Primitive = primitive("tanh", lambda xp, x: xp.tanh(x), lambda g, y, _x: _tanh_grad(g, y))
_asinh: Primitive = primitive(
    "asinh",
    lambda xp, x: xp.arcsinh(x),
    lambda g, _y, x: scale(g, _reciprocal(_hypot(x, 1))),
)
_acosh: Primitive = primitive(
    "acosh",
    lambda xp, x: xp.arccosh(x),
    lambda g, _y, x: scale(g, _multiply(_rsqrt(_subtract(x, 1)), _rsqrt(_add(x, 1)))),
)
_atanh: Primitive = primitive(
    "atanh",
    lambda xp, x: xp.arctanh(x),
    lambda g, _y, x: scale(g, _reciprocal(_subtract(1, _square(x)))),
)


def sin(x: ArrayLike, /) -> Tensor:
    """Return the sine of each element, in radians.

    >>> print(tg.sin(0.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _sin(x)


def cos(x: ArrayLike, /) -> Tensor:
    """Return the cosine of each element, in radians.

    >>> print(tg.cos(0.0))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    return _cos(x)


def tan(x: ArrayLike, /) -> Tensor:
    """Return the tangent of each element, in radians; the derivative is 1 + tan(x)**2.

    >>> print(tg.tan(0.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _tan(x)


def asin(x: ArrayLike, /) -> Tensor:
    """Return the inverse sine, in radians from -pi/2 to pi/2; NaN outside -1 to 1.

    The derivative is 1 / sqrt(1 - x**2), infinite at both ends.

    >>> print(tg.asin(1.0))
    tg.Tensor(1.5707964, shape=(), dtype=float32)
    """
    return _asin(x)


def acos(x: ArrayLike, /) -> Tensor:
    """Return the inverse cosine, in radians from 0 to pi; NaN outside -1 to 1.

    The derivative is -1 / sqrt(1 - x**2), infinite at both ends.

    >>> print(tg.acos(1.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _acos(x)


def atan(x: ArrayLike, /) -> Tensor:
    """Return the inverse tangent, in radians; the derivative is 1 / (1 + x**2).

    >>> print(tg.atan(1.0))
    tg.Tensor(0.7853982, shape=(), dtype=float32)
    """
    return _atan(x)


def atan2(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return the angle of the point (x2, x1), in radians from -pi to pi.

    The derivatives are x2 / r**2 and -x1 / r**2 with r**2 = x1**2 + x2**2, and 0 at the origin.
    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.atan2(1.0, -1.0))
    tg.Tensor(2.3561945, shape=(), dtype=float32)
    """
    return _atan2(x1, x2)


def sinh(x: ArrayLike, /) -> Tensor:
    """Return the hyperbolic sine of each element.

    >>> print(tg.sinh(0.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _sinh(x)


def cosh(x: ArrayLike, /) -> Tensor:
    """Return the hyperbolic cosine of each element.

    >>> print(tg.cosh(0.0))
    tg.Tensor(1.0, shape=(), dtype=float32)
    """
    return _cosh(x)


def tanh(x: ArrayLike, /) -> Tensor:
    """Return the hyperbolic tangent of each element; the derivative is 1 - tanh(x)**2.

    >>> print(tg.tanh([0.0, 100.0]))
    tg.Tensor([0. 1.], shape=(2,), dtype=float32)
    """
    return _tanh(x)


def asinh(x: ArrayLike, /) -> Tensor:
    """Return the inverse hyperbolic sine; the derivative is 1 / sqrt(1 + x**2).

    >>> print(tg.asinh(0.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _asinh(x)


def acosh(x: ArrayLike, /) -> Tensor:
    """Return the inverse hyperbolic cosine, NaN below 1; the derivative is 1 / sqrt(x**2 - 1).

    >>> print(tg.acosh(1.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _acosh(x)


def atanh(x: ArrayLike, /) -> Tensor:
    """Return the inverse hyperbolic tangent, NaN outside -1 to 1; the derivative is 1 / (1 - x**2).

    >>> print(tg.atanh(0.0))
    tg.Tensor(0.0, shape=(), dtype=float32)
    """
    return _atanh(x)


# ---- absolute value, sign, choices

_abs: Primitive = primitive("abs", lambda xp, x: xp.abs(x), lambda g, _y, x: scale(g, _sign(x)))
_sign: Primitive = primitive("sign", lambda xp, x: xp.sign(x), lambda g, _y, _x: _zeros_like(g))


def _larger_share(xp: Module, x1: Any, x2: Any) -> Array:
    share = (x1 > x2) + 0.5 * (x1 == x2)
    return share.astype(xp.result_type(x1, x2))


# The share of x1 in max(x1, x2): 1 or 0, and a half at a tie, the sub-gradient of least norm.
_larger: Primitive = primitive("larger_share", _larger_share, None, None)

_maximum: Primitive = primitive(
    "maximum",
    lambda xp, x1, x2: xp.maximum(x1, x2),
    lambda g, _y, x1, x2: scale(g, _larger(x1, x2)),
    lambda g, _y, x1, x2: scale(g, _larger(x2, x1)),
)
_minimum: Primitive = primitive(
    "minimum",
    lambda xp, x1, x2: xp.minimum(x1, x2),
    lambda g, _y, x1, x2: scale(g, _larger(x2, x1)),
    lambda g, _y, x1, x2: scale(g, _larger(x1, x2)),
)
# One side of clip: as maximum and minimum, but a tie goes to x whole.
_clip_below: Primitive = primitive(
    "clip_below",
    lambda xp, x, low: xp.maximum(x, low),
    lambda g, _y, x, low: where(logic.greater_equal(x, low), g, 0),
    lambda g, _y, x, low: where(logic.less(x, low), g, 0),
)
_clip_above: Primitive = primitive(
    "clip_above",
    lambda xp, x, high: xp.minimum(x, high),
    lambda g, _y, x, high: where(logic.less_equal(x, high), g, 0),
    lambda g, _y, x, high: where(logic.greater(x, high), g, 0),
)
_where: Primitive = primitive(
    "where",
    lambda xp, condition, x1, x2: xp.where(condition, x1, x2),
    None,
    lambda g, _y, condition, _x1, _x2: where(condition, g, 0),
    lambda g, _y, condition, _x1, _x2: where(condition, 0, g),
)


def abs(x: ArrayLike, /) -> Tensor:
    """Return the absolute value of each element; the derivative at 0 is 0.

    >>> print(tg.abs([-2.0, 3.0]))
    tg.Tensor([2. 3.], shape=(2,), dtype=float32)
    """
    return _abs(x)


def sign(x: ArrayLike, /) -> Tensor:
    """Return -1, 0 or 1 by the sign of each element, NaN for NaN; the derivative is 0.

    >>> print(tg.sign([-2.0, 0.0, 3.0]))
    tg.Tensor([-1.  0.  1.], shape=(3,), dtype=float32)
    """
    return _sign(x)


def maximum(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return the larger of each pair, NaN if one is NaN; a tie splits the gradient in halves.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.maximum([1.0, 5.0], 3.0))
    tg.Tensor([3. 5.], shape=(2,), dtype=float32)
    """
    return _maximum(x1, x2)


def minimum(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return the smaller of each pair, NaN if one is NaN; a tie splits the gradient in halves.

    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.minimum([1.0, 5.0], 3.0))
    tg.Tensor([1. 3.], shape=(2,), dtype=float32)
    """
    return _minimum(x1, x2)


def clip(x: ArrayLike, /, min: ArrayLike | None = None, max: ArrayLike | None = None) -> Tensor:
    """Return x limited to min .. max, element by element; either may be None.

    The derivative for x is 1 from bound to bound, both included; the bounds get the rest.
    Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.clip([-2.0, 0.5, 2.0], 0.0, 1.0))
    tg.Tensor([0.  0.5 1. ], shape=(3,), dtype=float32)
    """
    y = x if min is None else _clip_below(x, min)
    y = y if max is None else _clip_above(y, max)
    return _positive(y) if min is None and max is None else y  # type: ignore[return-value]


def where(condition: ArrayLike, x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return x1 where the condition holds, else x2, element by element.

    The branch that is not taken gets a zero gradient, also where its own derivative is infinite
    or NaN. Raises `ValueError` for shapes that do not broadcast.

    >>> print(tg.where([True, False], 1.0, 2.0))
    tg.Tensor([1. 2.], shape=(2,), dtype=float32)
    """
    if type(condition) in (float, int):
        condition = bool(condition)
    if type(x1) in (float, int) and type(x2) in (float, int):
        x1 = Tensor(float(x1) if type(x2) is float else x1)  # type: ignore[arg-type]
    return _where(condition, x1, x2)


# ---- rounding: piecewise constant, so without a gradient

_floor: Primitive = primitive("floor", lambda xp, x: xp.floor(x), None)
_ceil: Primitive = primitive("ceil", lambda xp, x: xp.ceil(x), None)
_round: Primitive = primitive("round", lambda xp, x: xp.rint(x), None)
_trunc: Primitive = primitive("trunc", lambda xp, x: xp.trunc(x), None)


def floor(x: ArrayLike, /) -> Tensor:
    """Return the largest integer not above each element; no gradient flows through it.

    >>> print(tg.floor([1.5, -1.5]))
    tg.Tensor([ 1. -2.], shape=(2,), dtype=float32)
    """
    return _floor(x)


def ceil(x: ArrayLike, /) -> Tensor:
    """Return the smallest integer not below each element; no gradient flows through it.

    >>> print(tg.ceil([1.5, -1.5]))
    tg.Tensor([ 2. -1.], shape=(2,), dtype=float32)
    """
    return _ceil(x)


def round(x: ArrayLike, /) -> Tensor:
    """Return the nearest integer, halves to even; no gradient flows through it.

    >>> print(tg.round([1.5, 2.5]))
    tg.Tensor([2. 2.], shape=(2,), dtype=float32)
    """
    return _round(x)


def trunc(x: ArrayLike, /) -> Tensor:
    """Return each element without its fraction; no gradient flows through it.

    >>> print(tg.trunc([1.5, -1.5]))
    tg.Tensor([ 1. -1.], shape=(2,), dtype=float32)
    """
    return _trunc(x)


# ---- the error function

# W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969):
# erf near 0, and erfc in a middle and a far range; each to about 1e-16 relative. Highest power
# first.
_ERF_NEAR = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
     3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2,
     1.28261652607737228e3, 2.84423683343917062e3),
)  # fmt: skip
_ERFC_MIDDLE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
     6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2,
     1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
     1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3,
     3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip
_ERFC_FAR = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1,
     1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4),
    (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1,
     6.05183413124413191e-2, 2.33520497626869185e-3),
)  # fmt: skip


def _ratio(z: Array, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    above, below = (_polynomial(z, row) for row in coefficients)
    return above / below


def _polynomial(z: Array, coefficients: tuple[float, ...]) -> Array:
    total = z * 0 + coefficients[0]
    for c in coefficients[1:]:
        total = total * z + c
    return total


def _erf_forward(xp: Module, x: Array) -> Array:
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)
    x = x.astype(np.promote_types(dtype, np.float32))
    size = xp.abs(x)
    # Each range is computed with its own arguments, clamped so that none can overflow.
    small = xp.minimum(size, 0.46875)
    near = small * _ratio(small * small, _ERF_NEAR)
    middle = xp.clip(size, 0.46875, 4.0)
    far = xp.clip(size, 4.0, 6.0)  # erf(6) is 1 to the last bit of float64
    inverse = 1 / (far * far)
    erfc_far = (
        xp.exp(-far * far) / far * (1 / math.sqrt(math.pi) - inverse * _ratio(inverse, _ERFC_FAR))
    )
    erfc = xp.where(size <= 4.0, xp.exp(-middle * middle) * _ratio(middle, _ERFC_MIDDLE), erfc_far)
    y = xp.where(size <= 0.46875, near, 1 - erfc)
    y = xp.where(xp.isnan(x), x, xp.copysign(y, x))
    return y.astype(dtype)


_erf: Primitive = primitive(
    "erf",
    _erf_forward,
    lambda g, _y, x: scale(g, _multiply(_exp(_negative(_square(x))), 2 / math.sqrt(math.pi))),
    kernel=one_launch("erf"),
)


def erf(x: ArrayLike, /) -> Tensor:
    """Return the error function 2/sqrt(pi) * integral of exp(-t**2) from 0 to each element.

    The derivative is 2/sqrt(pi) * exp(-x**2). Values by W. J. Cody's approximations (1969).

    >>> print(tg.erf([0.0, 10.0]))
    tg.Tensor([0. 1.], shape=(2,), dtype=float32)
    """
    return _erf(x)


# ---- types

_discretize: Primitive = primitive(
    "cast_to_discrete", lambda xp, x, *, dtype: x.astype(dtype), None
)


def astype(x: ArrayLike, dtype: Any, /, *, copy: bool = True) -> Tensor:
    """Return x with its elements as `dtype`; a gradient comes back in the type of x.

    Through an integer or boolean type no gradient flows. `copy=False` gives x itself where the
    type is right already; a Tensor never changes, so this is only a matter of identity.
    Raises `TypeError` for a type that is not numeric.

    >>> print(tg.astype([1.7, 2.2], tg.int32))
    tg.Tensor([1 2], shape=(2,), dtype=int32)
    """
    try:
        wanted = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"[astype] {error}") from None
    if wanted.kind not in "biuf" and wanted.name != "bfloat16":
        raise TypeError(f"[astype] dtype must be a real number type or bool, got {wanted}")
    if not copy and isinstance(x, Operand) and x.dtype == wanted:
        return x._read()
    return (_discretize if wanted.kind in "biu" else _cast)(x, dtype=wanted)
