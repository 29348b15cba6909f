"""How elementwise primitives become calls of NumPy that write into given memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tapegrad._function.lowering import Lowering, Place, lowers, static, static_number
from tapegrad._function.program import Step, Value
from tapegrad._host_memory import aligned

_SAME_NAME = (
    "add subtract multiply divide maximum minimum negative positive sqrt exp exp2 expm1 log "
    "log2 log10 log1p logaddexp hypot sin cos tan sinh cosh tanh sign floor ceil trunc "
    "floor_divide remainder equal not_equal less less_equal greater greater_equal logical_and "
    "logical_or logical_xor logical_not isfinite isinf isnan"
)
_UFUNCS = {name: name for name in _SAME_NAME.split()} | {
    "clip_below": "maximum",
    "clip_above": "minimum",
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "atan2": "arctan2",
    "asinh": "arcsinh",
    "acosh": "arccosh",
    "atanh": "arctanh",
    "abs": "absolute",
    "round": "rint",
}
# On NumPy scalars the operators take a tenth of what ufuncs take.
_OPERATORS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


def _numbers(b: Lowering, step: Step) -> list[Any]:
    """Return the inputs' places, with Python numbers as arrays of the type that they take on.

    So are constants that hold one number everywhere and do not make the result larger. A ufunc
    spends 0.3 us on a Python number, and nothing on a 0-d array of the right type.
    """
    dtypes = {x.dtype for x in step.values()}
    shape = step.outputs[0].shape

    def place_of(x: Any) -> Any:
        if type(x) is Value:
            others = any(other is not x and other.shape == shape for other in step.values())
            number = x.number() if others and x.size > 1 else None
            return b.of(x) if number is None else static(number)
        if len(dtypes) == 1:
            (dtype,) = dtypes
            if dtype.kind == "f" or (dtype.kind in "iu" and type(x) is int and _fits(x, dtype)):
                return static_number(x, dtype)
        return x

    return list(map(place_of, step.inputs))


def _fits(x: Any, dtype: np.dtype[Any]) -> bool:
    """Tell whether a type holds an integer; NumPy compares with others, and `where` wraps them."""
    if type(x) is not int or dtype.kind not in "iu":
        return True
    return bool(np.iinfo(dtype).min <= x <= np.iinfo(dtype).max)


def _scalar(b: Lowering, step: Step, text: str, *operands: Any) -> bool:
    """Write an expression of 0-d values, which are NumPy's scalars."""
    y = step.outputs[0]
    places = [b.of(x) for x in step.inputs]
    out = b.local(y.shape, y.dtype)
    b.line("{} = " + text, out, *operands, *places)
    b.set(y, out)
    return True


@lowers(*_UFUNCS)
def _ufunc(b: Lowering, step: Step) -> bool:
    if not step.outputs[0].shape:
        if step.name in _OPERATORS:
            return _scalar(b, step, f"{{}} {_OPERATORS[step.name]} {{}}")
        braces = ", ".join(["{}"] * len(step.inputs))
        return _scalar(b, step, f"{{}}(np, {braces})", step.primitive.forward)
    places = _numbers(b, step)
    out = b.out(step, *step.inputs)
    b.call(_UFUNCS[step.name], *places, out)
    return True


@lowers("square")
def _square(b: Lowering, step: Step) -> bool:
    x = b.of(step.inputs[0])
    if not step.outputs[0].shape:
        return _scalar(b, step, "{} * {}", x)
    b.call("multiply", x, x, b.out(step, *step.inputs))
    return True


def _is_array_of_its_type(step: Step) -> bool:
    """Tell whether the result has axes, and the type of what it is made of."""
    y = step.outputs[0]
    return bool(y.shape) and y.dtype == step.inputs[0].dtype


@lowers("reciprocal")
def _reciprocal(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not _is_array_of_its_type(step):
        return False
    x = b.of(step.inputs[0])
    b.call("divide", static_number(1, y.dtype), x, b.out(step, *step.inputs))
    return True


@lowers("rsqrt")
def _rsqrt(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not _is_array_of_its_type(step):
        return False
    x = b.of(step.inputs[0])
    out = b.out(step, *step.inputs)
    b.call("sqrt", x, out)
    b.call("divide", static_number(1, y.dtype), out, out)
    return True


@lowers("power")
def _power(b: Lowering, step: Step) -> bool:
    x, exponent = step.inputs
    y = step.outputs[0]
    if not y.shape:
        return _scalar(b, step, "{} ** {}")
    if type(exponent) is Value or y.dtype != x.dtype or x.dtype.kind != "f":
        return False
    # What the operator ** does with these exponents.
    fast = {2: "square", 1: "positive", 0.5: "sqrt", -1: "reciprocal"}.get(exponent)
    place = b.of(x)
    if fast is not None:
        b.call(fast, place, b.out(step, x))
    else:
        b.call("power", place, static_number(exponent, y.dtype), b.out(step, x))
    return True


@lowers("sigmoid")
def _sigmoid(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not _is_array_of_its_type(step):
        return False
    x, one = b.of(step.inputs[0]), static_number(1, y.dtype)
    out = b.out(step, *step.inputs)
    b.call("negative", x, out)
    b.call("exp", out, out)
    b.call("add", one, out, out)
    b.call("divide", one, out, out)
    return True


@lowers("softplus")
def _softplus(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not _is_array_of_its_type(step):
        return False
    x, zero = b.of(step.inputs[0]), static_number(0, y.dtype)
    spare, out = b.arena(y.shape, y.dtype), b.out(step)
    b.call("absolute", x, spare)
    b.call("negative", spare, spare)
    b.call("exp", spare, spare)
    b.call("log1p", spare, spare)
    b.call("maximum", x, zero, out)
    b.call("add", out, spare, out)
    return True


@lowers("cast")
def _cast(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    x = b.of(step.inputs[0])
    if y.shape:
        b.call("converted", x, b.out(step))
        return True
    number = b.local((), y.dtype)
    b.line("{} = {}.astype({})", number, x, y.dtype)
    b.set(y, number)
    return True


@lowers("where")
def _where(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    condition, x1, x2 = step.inputs
    if not y.shape or type(condition) is not Value or condition.dtype.kind != "b":
        return False
    if not (_fits(x1, y.dtype) and _fits(x2, y.dtype)):
        return False
    places = [b.of(x) if type(x) is Value else static_number(x, y.dtype) for x in (x1, x2)]
    b.call("chosen", b.of(condition), *places, b.out(step))
    return True


# ---- products whose zero factors win: see tapegrad.ops.elementwise.scale


@lowers("scale")
def _scale(b: Lowering, step: Step) -> bool:
    g, d = step.inputs
    y = step.outputs[0]
    if y.dtype.char not in "fd":
        return False
    if not y.shape:
        return _scale_number(b, step)
    if type(g) is not Value or type(d) is not Value:
        if not _is_never_zero(g) and (type(d) is Value or d - d != 0):
            return False
        b.call("multiply", *_numbers(b, step), b.out(step, g, d))
        return True
    places = _numbers(b, step)
    # Not in the memory of g, which may be read once more.
    out = b.out(step) if g is d else b.out(step, d)
    b.call("multiply" if _is_never_zero(g) else "scaled", *places, out)
    return True


def _scale_number(b: Lowering, step: Step) -> bool:
    g = step.inputs[0]
    meaning = step.primitive.forward
    if type(g) is not Value and g == 0:
        return _scalar(b, step, "{}(np, {}, {})", meaning)
    _scalar(b, step, "{} * {}")
    if not _is_never_zero(g):
        out, places = b.places[step.outputs[0]], [b.of(x) for x in step.inputs]
        b.line("if {} != {}: {} = {}(np, {}, {})", out, out, out, meaning, *places)
    return True


def _is_never_zero(g: Any) -> bool:
    """Tell whether a factor is known to hold no 0, which would win."""
    if type(g) is not Value:
        return bool(g != 0)
    return g.kind == "constant" and bool(np.all(g.source._array != 0))


@lowers("larger_share")
def _larger_share(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype.kind != "f":
        return False
    places = _numbers(b, step)
    larger, equal = (b.like(y, np.dtype(np.bool_)) for _ in range(2))
    out = b.out(step)
    b.call("greater", *places, larger)
    b.call("equal", *places, equal)
    b.call("multiply", equal, static_number(0.5, y.dtype), out)
    b.call("add", out, larger, out)
    return True


@lowers("scale_both")
def _scale_both(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype.char not in "fd" or any(type(x) is not Value for x in step.inputs):
        return False
    places = [b.of(x) for x in step.inputs]
    b.call("scaled_both", *places, b.out(step))
    return True


# ---- relu


@lowers("relu")
def _relu(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape:
        return False
    x = b.of(step.inputs[0])
    out = b.out(step, *step.inputs)
    b.call("maximum", x, zeros(b, y), out)
    return True


def zeros(b: Lowering, y: Value) -> Place:
    """Return a row of zeros: NumPy compares with it three times faster than with a number."""
    if y in b.layout.feature_major:
        return static(aligned(y.shape[::-1], y.dtype, 0).T)
    return static(np.zeros(y.shape[-1:], y.dtype))


def _probe() -> bool:
    """Tell whether relu of -0.0 is +0.0 here, which NumPy does not promise."""
    return all(
        not np.signbit(np.maximum(np.full(n, -0.0, dtype), np.zeros(n, dtype))).any()
        for n in (1, 3, 7, 64, 1000)
        for dtype in ("f", "d")
    )


_RELU_HAS_NO_SIGN = _probe()


@lowers("relu_grad")
def relu_grad(b: Lowering, step: Step) -> bool:
    """Let a step's first output be g where y > 0, else 0."""
    g, y = step.inputs
    out = step.outputs[0]
    if type(g) is not Value or type(y) is not Value or not out.shape:
        return False
    if not g.dtype == y.dtype == out.dtype or out.dtype.char not in "fd" or g.shape != y.shape:
        return False
    gradient, output = b.of(g), b.of(y)
    if _RELU_HAS_NO_SIGN and y in b.layout.visible:
        # The bits of relu's output are 0 where it is: their sign times g's bits are g's, or those
        # of 0, whatever g is. NaN is seen at the end.
        b.speculates = True
        mask = b.positive(y)
        place = b.out(step, g)
        b.call("multiply", b.integers(gradient), mask, b.integers(place))
        return True
    if b.layout.active:
        mask = b.integers(b.like(y))
        place = b.out(step, g)
        b.call("keep_positive", b.integers(output), b.integers(gradient), mask, b.integers(place))
        return True
    b.call("masked", gradient, output, b.like(y), b.out(step))
    return True


# ---- row numbers and random bits


@lowers("row_numbers")
def _row_numbers(b: Lowering, step: Step) -> bool:
    index, y = step.inputs[0], step.outputs[0]
    if index.dtype != np.int64 or len(index.shape) != 1:
        return False
    x, out = b.of(index), b.out(step)
    b.call("right_shift", x, static_number(63, y.dtype), out)  # -1 for the negative ones, else 0
    b.call("bitwise_and", out, static_number(step.params["rows"], y.dtype), out)
    b.call("add", out, x, out)
    return True


@lowers("random_mask")
def _random_mask(b: Lowering, step: Step) -> bool:
    y, limit = step.outputs[0], step.params["threshold"]
    if not y.shape or limit >= 2**32:
        return False
    shape, count = y.shape, math.prod(y.shape)
    place = b.of(step.inputs[0])
    out = b.out(step)
    b.line(
        "less({}.view(uint32)[:{}].reshape({}), {}, {})",
        place, count, shape, static_number(limit, np.uint32), out,
    )  # fmt: skip
    return True
