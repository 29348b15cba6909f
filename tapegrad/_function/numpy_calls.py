"""How primitives become calls of NumPy that write into given memory: the same values, bit for bit.

Each entry does what the primitive's meaning does, operation by operation, with `out=` where the
meaning makes new arrays. What is not in the table is computed by its meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._backend import Array
from tapegrad._function.layout import joined
from tapegrad._function.lowering import Lowering, Place, lowers, static
from tapegrad._function.program import Step, Value
from tapegrad._host_memory import aligned
from tapegrad._index import SLOT
from tapegrad.linear import by_product
from tapegrad.tape import Spec

# ---- elementwise

_UFUNCS = {
    "add": "add",
    "subtract": "subtract",
    "multiply": "multiply",
    "divide": "divide",
    "maximum": "maximum",
    "minimum": "minimum",
    "clip_below": "maximum",
    "clip_above": "minimum",
    "negative": "negative",
    "positive": "positive",
    "sqrt": "sqrt",
    "exp": "exp",
    "exp2": "exp2",
    "expm1": "expm1",
    "log": "log",
    "log2": "log2",
    "log10": "log10",
    "log1p": "log1p",
    "logaddexp": "logaddexp",
    "hypot": "hypot",
    "sin": "sin",
    "cos": "cos",
    "tan": "tan",
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "atan2": "arctan2",
    "sinh": "sinh",
    "cosh": "cosh",
    "tanh": "tanh",
    "asinh": "arcsinh",
    "acosh": "arccosh",
    "atanh": "arctanh",
    "abs": "absolute",
    "sign": "sign",
    "floor": "floor",
    "ceil": "ceil",
    "round": "rint",
    "trunc": "trunc",
    "floor_divide": "floor_divide",
    "remainder": "remainder",
    "equal": "equal",
    "not_equal": "not_equal",
    "less": "less",
    "less_equal": "less_equal",
    "greater": "greater",
    "greater_equal": "greater_equal",
    "logical_and": "logical_and",
    "logical_or": "logical_or",
    "logical_xor": "logical_xor",
    "logical_not": "logical_not",
    "isfinite": "isfinite",
    "isinf": "isinf",
    "isnan": "isnan",
}
# On NumPy scalars the operators take a tenth of what ufuncs take.
_OPERATORS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


def _numbers(b: Lowering, step: Step) -> list[Any]:
    """Return the inputs' places, with Python numbers as arrays of the type that they take on.

    A ufunc spends 0.3 us on a Python number, and nothing on a 0-d array of the right type.
    """
    dtypes = {x.dtype for x in step.values()}
    found = []
    shapes = [x.shape for x in step.values()]
    for x in step.inputs:
        if type(x) is Value and x.kind == "constant" and x.size > 1 and len(shapes) == 2:
            array = np.asarray(x.source._array)
            if _holds_one_number(array):
                other = shapes[0] if step.inputs[1] is x else shapes[1]
                if np.broadcast_shapes(*shapes) == other:  # one number does as well
                    found.append(
                        Place("static", (), x.dtype, array=array.reshape(-1)[:1].reshape(()))
                    )
                    continue
        place = b.of(x)
        if type(x) is not Value and len(dtypes) == 1:
            (dtype,) = dtypes
            if dtype.kind == "f" or (dtype.kind in "iu" and type(x) is int and _fits(x, dtype)):
                place = Place("static", (), dtype, array=np.asarray(x, dtype))
        found.append(place)
    return found


def _fits(x: Any, dtype: np.dtype[Any]) -> bool:
    """Tell whether a type holds an integer; NumPy compares with others, and `where` wraps them."""
    if type(x) is not int or dtype.kind not in "iu":
        return True
    return bool(np.iinfo(dtype).min <= x <= np.iinfo(dtype).max)


def _holds_one_number(array: Array) -> bool:
    """Tell whether an array holds the same bits throughout: 0.0 and -0.0 are two numbers."""
    bits = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)
    return bool((bits == bits[0]).all())


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
    if not step.outputs[0].shape:
        x = b.of(step.inputs[0])
        return _scalar(b, step, "{} * {}", x)
    x = b.of(step.inputs[0])
    b.call("multiply", x, x, b.out(step, *step.inputs))
    return True


@lowers("reciprocal")
def _reciprocal(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype != step.inputs[0].dtype:
        return False
    x = b.of(step.inputs[0])
    b.call("divide", _number(1, y.dtype), x, b.out(step, *step.inputs))
    return True


@lowers("rsqrt")
def _rsqrt(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype != step.inputs[0].dtype:
        return False
    x = b.of(step.inputs[0])
    out = b.out(step, *step.inputs)
    b.call("sqrt", x, out)
    b.call("divide", _number(1, y.dtype), out, out)
    return True


@lowers("power")
def _power(b: Lowering, step: Step) -> bool:
    x, exponent = step.inputs
    y = step.outputs[0]
    if not y.shape:
        return _scalar(b, step, "{} ** {}")
    if type(exponent) is Value or not y.shape or y.dtype != x.dtype or x.dtype.kind != "f":
        return False
    # What the operator ** does with these exponents.
    fast = {2: "square", 1: "positive", 0.5: "sqrt"}.get(exponent)
    if fast is None and exponent == -1:
        fast = "reciprocal"
    place = b.of(x)
    if fast is not None:
        b.call(fast, place, b.out(step, x))
    else:
        b.call("power", place, _number(exponent, y.dtype), b.out(step, x))
    return True


@lowers("sigmoid")
def _sigmoid(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype != step.inputs[0].dtype:
        return False
    x, one = b.of(step.inputs[0]), _number(1, y.dtype)
    out = b.out(step, *step.inputs)
    b.call("negative", x, out)
    b.call("exp", out, out)
    b.call("add", one, out, out)
    b.call("divide", one, out, out)
    return True


@lowers("softplus")
def _softplus(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype != step.inputs[0].dtype:
        return False
    x, zero = b.of(step.inputs[0]), _number(0, y.dtype)
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
    places = [b.of(x) if type(x) is Value else _number(x, y.dtype) for x in (x1, x2)]
    b.call("chosen", b.of(condition), *places, b.out(step))
    return True


def _number(value: float, dtype: Any) -> Place:
    return Place("static", (), dtype, array=np.asarray(value, dtype))


# ---- products whose zero factors win: see tapegrad.ops.elementwise.scale


@lowers("scale")
def _scale(b: Lowering, step: Step) -> bool:
    g, d = step.inputs
    y = step.outputs[0]
    if not y.shape and y.dtype.char in "fd":
        constant = type(g) is Value and g.kind == "constant" and g.source._array != 0
        if constant or (type(g) is not Value and g != 0):
            return _scalar(b, step, "{} * {}")  # no factor that could win
        if type(g) is not Value:
            return _scalar(b, step, "{}(np, {}, {})", step.primitive.forward)
        _scalar(b, step, "{} * {}")
        out, places = b.places[y], [b.of(x) for x in step.inputs]
        b.line("if {} != {}: {} = {}(np, {}, {})", out, out, out, step.primitive.forward, *places)
        return True
    if not y.shape or y.dtype.char not in "fd":
        return False
    places = _numbers(b, step)
    if type(g) is not Value:
        if g == 0:
            return False
        b.call("multiply", *places, b.out(step, d))
        return True
    if type(d) is not Value:
        if d - d != 0:
            return False
        b.call("multiply", *places, b.out(step, g))
        return True
    # No factor that could win? Else out is not in the memory of g: it is read once more.
    plain = g.kind == "constant" and bool(np.all(g.source._array != 0))
    out = b.out(step) if g is d else b.out(step, d)
    b.call("multiply" if plain else "scaled", *places, out)
    return True


@lowers("larger_share")
def _larger_share(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape or y.dtype.kind != "f":
        return False
    places = _numbers(b, step)
    larger, equal = (b.like(y, False, np.dtype(np.bool_)) for _ in range(2))
    out = b.out(step)
    b.call("greater", *places, larger)
    b.call("equal", *places, equal)
    b.call("multiply", equal, _number(0.5, y.dtype), out)
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


@lowers("relu")
def _relu(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    if not y.shape:
        return False
    x = b.of(step.inputs[0])
    out = b.out(step, *step.inputs)
    b.call("maximum", x, _zeros(b, y), out)
    return True


def _zeros(b: Lowering, y: Value) -> Place:
    """Return a row of zeros: NumPy compares with it three times faster than with a number."""
    if y in b.layout.feature_major:
        return Place("static", y.shape, y.dtype, array=aligned(y.shape[::-1], y.dtype, 0).T)
    return Place("static", y.shape[-1:], y.dtype, array=np.zeros(y.shape[-1:], y.dtype))


@lowers("relu_grad")
def _relu_grad(b: Lowering, step: Step) -> bool:
    g, y = step.inputs
    if not step.outputs[0].shape or type(g) is not Value or type(y) is not Value:
        return False
    return _masked(b, step, g, y)


def _probe() -> bool:
    """Tell whether relu of -0.0 is +0.0 here, which NumPy does not promise."""
    return all(
        not np.signbit(np.maximum(np.full(n, -0.0, dtype), np.zeros(n, dtype))).any()
        for n in (1, 3, 7, 64, 1000)
        for dtype in ("f", "d")
    )


_RELU_HAS_NO_SIGN = _probe()


def _masked(b: Lowering, step: Step, g: Value, y: Value) -> bool:
    out = step.outputs[0]
    if not g.dtype == y.dtype == out.dtype or out.dtype.char not in "fd" or g.shape != y.shape:
        return False
    gradient, output = b.of(g), b.of(y)
    turned = y in b.layout.feature_major
    if _RELU_HAS_NO_SIGN and y in b.layout.visible:
        # The bits of relu's output are 0 where it is: their sign times g's bits are g's, or those
        # of 0, whatever g is. NaN is seen at the end.
        b.speculates = True
        mask = b.positive(y)
        place = b.out(step, g)
        b.call("multiply", b.integers(gradient), mask, b.integers(place))
        return True
    if b.layout.active:
        mask = b.integers(b.like(y, turned))
        place = b.out(step, g)
        b.call("keep_positive", b.integers(output), b.integers(gradient), mask, b.integers(place))
        return True
    b.call("masked", gradient, output, b.like(y, turned), b.out(step))
    return True


@lowers("linear_relu_grad")
def _linear_relu_grad(b: Lowering, step: Step) -> bool:
    g, y = step.inputs
    if type(g) is not Value or type(y) is not Value or not _masked(b, step, g, y):
        return False
    bias = step.outputs[1]
    if b.pair_of_bias(bias) is not None:
        b.set(bias, b.destinations[bias])
    elif b.uses(bias):
        _sum_rows(b, step, b.of(step.outputs[0]), 1)
    return True


# ---- shapes: views, as long as what they show stays where it is


def _view(b: Lowering, step: Step, view: Any, text: str, *operands: Any) -> bool:
    """Let the output be a view of the input."""
    x, y = step.inputs[0], step.outputs[0]
    if type(x) is not Value or b.is_output(y) or y in b.destinations:
        return _copied_view(b, step, view, text, *operands)
    place = b.of(x)
    if place.kind == "local":
        if not x.shape:
            return False
        out = b.local(y.shape, y.dtype)
        out.holds = (place.root,)
        b.line("{} = " + text, out, place, *operands)
        b.set(y, out)
        place.root.pending += b.uses(y)
        return True
    b.set(y, b.view(place, y.shape, view))
    return True


def _copied_view(b: Lowering, step: Step, view: Any, text: str, *operands: Any) -> bool:
    x = step.inputs[0]
    if type(x) is not Value or not x.shape or not step.outputs[0].shape:
        return False
    place = b.of(x)
    out = b.out(step)
    b.line("{}[...] = " + text, out, place, *operands)
    return True


@lowers("permute")
def _permute(b: Lowering, step: Step) -> bool:
    axes = step.params["axes"]
    return _view(b, step, lambda a: a.transpose(axes), "{}.transpose({})", axes)


@lowers("broadcast_to")
def _broadcast_to(b: Lowering, step: Step) -> bool:
    shape = step.params["shape"]
    x, y = step.inputs[0], step.outputs[0]
    if type(x) is Value and not x.shape:
        place = b.of(x)
        if place.kind == "static":
            return False
        b.line("{}.fill({})", b.out(step), place)
        return True
    if y in b.destinations or b.is_output(y):
        place = b.of(x)
        b.line("{}[...] = {}", b.out(step), place)
        return True
    return _view(b, step, lambda a: np.broadcast_to(a, shape), "broadcast_to({}, {})", shape)


@lowers("row")
def _row(b: Lowering, step: Step) -> bool:
    index = step.params["index"]
    if not step.outputs[0].shape:
        return False
    return _view(b, step, lambda a: a[index], "{}[{}]", index)


@lowers("getitem")
def _getitem(b: Lowering, step: Step) -> bool:
    index = step.params["index"]
    if any(part is SLOT for part in index) or not step.outputs[0].shape:
        return False
    return _view(b, step, lambda a: a[index], "{}[{}]", index)


@lowers("stop_gradient")
def _stop_gradient(b: Lowering, step: Step) -> bool:
    if not step.outputs[0].shape:
        x = step.inputs[0]
        place = b.of(x)
        if place.kind != "local":
            return False
        out = b.local((), place.dtype)
        b.line("{} = {}", out, place)
        b.set(step.outputs[0], out)
        return True
    return _view(b, step, lambda a: a[...], "{}[...]")


@lowers("reshape")
def _reshape(b: Lowering, step: Step) -> bool:
    x, y = step.inputs[0], step.outputs[0]
    if type(x) is not Value or not x.shape or not y.shape:
        return False
    place = b.of(x)
    if place.kind == "local" and not (b.is_output(y) or y in b.destinations):
        return _view(b, step, None, "{}.reshape({})", y.shape)
    contiguous = place.array is None or place.array.flags.c_contiguous
    if place.root is place and contiguous and not (b.is_output(y) or y in b.destinations):
        b.set(y, b.view(place, y.shape, _reshaper(y.shape)))
        return True
    out = b.out(step)
    b.line("{}[...] = {}.reshape({})", out, place, y.shape)
    return True


def _reshaper(shape: tuple[int, ...]) -> Callable[[Array], Array]:
    return lambda array: array.reshape(shape)


def _zeroed(b: Lowering, step: Step, index: Any) -> bool:
    if not step.inputs[0].shape:
        return False
    x = b.of(step.inputs[0])
    out = b.out(step)
    b.line("{}.fill(0)", out)
    b.line("{}[{}] = {}", out, index, x)
    return True


@lowers("place_row")
def _place_row(b: Lowering, step: Step) -> bool:
    return _zeroed(b, step, step.params["index"])


@lowers("place")
def _place(b: Lowering, step: Step) -> bool:
    return _zeroed(b, step, step.params["index"])


@lowers("stack")
def _stack(b: Lowering, step: Step) -> bool:
    if any(type(x) is not Value for x in step.inputs):
        return False
    places = [b.of(x) for x in step.inputs]
    out = b.out(step)
    for i, place in enumerate(places):
        b.line("{}[{}] = {}", out, i, place)
    return True


@lowers("concat")
def _concat(b: Lowering, step: Step) -> bool:
    y, axis = step.outputs[0], step.params["axis"]
    if any(type(x) is not Value or x.dtype != y.dtype for x in step.inputs):
        return False
    places = [b.of(x) for x in step.inputs]
    out = b.out(step)
    start = 0
    for x, place in zip(step.inputs, places, strict=True):
        end = start + x.shape[axis]
        index = (slice(None),) * axis + (slice(start, end),)
        b.line("{}[{}] = {}", out, index, place)
        start = end
    return True


# ---- reductions


_REDUCTIONS = {"sum": "add", "max": "maximum", "min": "minimum"}


@lowers(*_REDUCTIONS)
def _reduction(b: Lowering, step: Step) -> bool:
    y = step.outputs[0]
    x = step.inputs[0]
    if type(x) is not Value:
        return False
    axis, keepdims = step.params["axis"], step.params["keepdims"]
    place = b.of(x)
    name = f"{_REDUCTIONS[step.name]}_reduce"
    dtype = step.params.get("dtype")
    if not y.shape:
        out = b.local((), y.dtype)
        b.line(f"{{}} = {name}({{}}, {{}}, {{}}, None, {{}})", out, place, axis, dtype, keepdims)
        b.set(y, out)
        return True
    b.line(f"{name}({{}}, {{}}, {{}}, {{}}, {{}})", place, axis, dtype, b.out(step), keepdims)
    return True


@lowers("sum_to")
def _sum_to(b: Lowering, step: Step) -> bool:
    x, y = step.inputs[0], step.outputs[0]
    if type(x) is not Value or not y.shape:
        return False
    lead = len(x.shape) - len(y.shape)
    stretched = tuple(i for i, n in enumerate(x.shape) if i < lead or y.shape[i - lead] != n)
    if b.pair_of_bias(y) is not None:
        b.set(y, b.destinations[y])
        return True
    place = b.of(x)
    if stretched == (0,) and len(x.shape) == 2:
        return _sum_rows(b, step, place, 0)
    keep = tuple(1 if i in stretched else n for i, n in enumerate(x.shape))
    out = b.out(step)
    b.line("add_reduce({}, {}, {}, {}.reshape({}), True)", place, stretched, x.dtype, out, keep)
    return True


def _sum_rows(b: Lowering, step: Step, x: Place, position: int) -> bool:
    """Sum a matrix over its rows as the meaning of sum_to does."""
    if not by_product(np, Spec(0, x.shape, x.dtype)):
        out = b.out(step, position=position)
        b.line("add_reduce({}, 0, {}, {}.reshape({}))", x, x.dtype, out, x.shape[1:])
        return True
    ones = Place("static", x.shape[:1], x.dtype, array=np.ones(x.shape[0], x.dtype))
    y = step.outputs[position]
    out = b.out(step, position=position)
    if y.shape == x.shape[1:]:
        b.call("dot", ones, x, out)
        b.lines[-1].sums_rows = b.layout.active
    else:
        b.line("{}.dot({}, {}.reshape({}))", ones, x, out, x.shape[1:])
    return True


# ---- products of matrices


@lowers("matmul")
def _matmul(b: Lowering, step: Step) -> bool:
    x1, x2 = step.inputs
    y = step.outputs[0]
    if type(x1) is not Value or type(x2) is not Value or not x1.dtype == x2.dtype == y.dtype:
        return False
    pair = b.layout.pairs.get(step)
    if pair is not None and b.is_one_product(pair):
        full = b.extended[pair.activation]
        product = _product(x1, x2, y)
        b.call(product, static(full), b.of(pair.upstream), static(b.joined_destination(pair)))
        b.set(y, b.destinations[y])
        return True
    places = b.of(x1), b.of(x2)
    _multiply_matrices(b, _product(x1, x2, y), *places, b.out(step))
    return True


def _multiply_matrices(b: Lowering, product: str, left: Place, right: Place, out: Place) -> None:
    if out.turned or _is_turned(out):
        left, right, out = b.turned(right), b.turned(left), b.turned(out)
    if out.kind == "static" and not out.bind().flags.c_contiguous:
        product = "matmul"  # beside a column of ones: dot writes to whole arrays alone
    elif b.layout.active and _is_thin_transpose(left, right):
        turned, right = right, b.arena(right.shape, right.dtype)
        b.line("{}[...] = {}", right, turned)
    b.call(product, left, right, out)


def _is_thin_transpose(left: Place, right: Place) -> bool:
    """Tell whether a product would be of two transposes, thin ones with a large result.

    OpenBLAS takes 65 us for (128, 10) by (10, 512), the gradient of what a classifier's last layer
    reads, and 13 with the copy of one of them.
    """
    return (
        all(place.turned or _is_turned(place) for place in (left, right))
        and left.shape[1] <= 16
        and left.shape[0] * right.shape[1] >= 1 << 14
    )


def _is_turned(place: Place) -> bool:
    array = place.bind() if place.kind == "static" else None
    return array is not None and array.ndim == 2 and bool(array.T.flags.c_contiguous)


def _product(x1: Value, x2: Value, y: Value) -> str:
    # As the meaning does: for thin matrices the two round otherwise.
    plain = len(x1.shape) == len(x2.shape) == 2 and y.dtype.char in "fd"
    return "dot" if plain and x1.size != 1 and x2.size != 1 else "matmul"


@lowers("linear", "linear_relu")
def _linear(b: Lowering, step: Step) -> bool:
    x, w, bias = step.inputs
    y = step.outputs[0]
    if not x.dtype == w.dtype == bias.dtype:
        return False
    both = joined(w, bias) if w not in b.copied and bias not in b.copied else None
    places = b.of(x), b.of(w), b.of(bias)
    out = b.out(step)
    product = _product(x, w, y)
    if x in b.extended and both is not None and out.kind != "local":
        full = b.extended[x]
        if out.turned or _is_turned(out):
            b.call("dot", static(both.T), static(full), b.turned(out))
        else:
            b.call("dot", static(full.T), static(both), out)
    else:
        _multiply_matrices(b, product, places[0], places[1], out)
        b.call("add", out, places[2], out)
    if step.name == "linear_relu":
        b.call("maximum", out, _zeros(b, y), out)
    return True


@lowers("row_numbers")
def _row_numbers(b: Lowering, step: Step) -> bool:
    index, y = step.inputs[0], step.outputs[0]
    if index.dtype != np.int64 or len(index.shape) != 1:
        return False
    x, out = b.of(index), b.out(step)
    b.call("right_shift", x, _number(63, y.dtype), out)  # -1 for the negative ones, else 0
    b.call("bitwise_and", out, _number(step.params["rows"], y.dtype), out)
    b.call("add", out, x, out)
    return True


@lowers("one_hot")
def _one_hot(b: Lowering, step: Step) -> bool:
    index, y = step.inputs[0], step.outputs[0]
    if not index.shape:
        return False
    x, classes = b.of(index), np.arange(step.params["depth"])
    chosen = b.like(y, False, np.dtype(np.bool_))
    out = b.out(step)
    b.line("equal({}[..., None], {}, {})", x, static(classes), chosen)
    b.line("{}[...] = {}", out, chosen)
    return True


# ---- random numbers


@lowers("random_mask")
def _random_mask(b: Lowering, step: Step) -> bool:
    bits, y = step.inputs[0], step.outputs[0]
    if not y.shape or type(bits) is not Value:
        return False
    shape, count = y.shape, math.prod(y.shape)
    place = b.of(bits)
    limit = step.params["threshold"]
    if limit >= 2**32:
        return False
    out = b.out(step)
    b.line(
        "less({}.view(uint32)[:{}].reshape({}), {}, {})",
        place, count, shape, _number(limit, np.uint32), out,
    )  # fmt: skip
    return True


# ---- writing Variables


_ASSIGNS = {"assign_add": "add", "assign_sub": "subtract"}


@lowers("assign", "assign_add", "assign_sub")
def _assign(b: Lowering, step: Step) -> bool:
    if step.params.get("index", ...) is not ...:
        return False
    (variable,) = step.writes
    target = Place("static", variable.shape, variable.dtype, array=variable._array)
    value = b.of(step.inputs[0])
    if step.name == "assign":
        b.line("{}[...] = {}", target, value)
    else:
        operation = _ASSIGNS[step.name]
        if type(step.inputs[0]) is not Value and variable.dtype.kind in "fiu":
            value = _number(value, variable.dtype)
        same = getattr(value, "dtype", None) == variable.dtype
        if same and not variable.shape and not value.shape:
            if value.kind == "static":
                value = value.array[()]
            b.line(f"{{}}[()] = {{}}[()] {_OPERATORS[operation]} {{}}", target, target, value)
            return True
        casting = "" if same else ", casting='same_kind'"
        b.line(f"{operation}({{}}, {{}}, {{}}{casting})", target, value, target)
    return True


@lowers("gather_gradients")
def _gather(b: Lowering, step: Step) -> bool:
    flat = step.writes[0]._array
    for x, start in zip(step.inputs, step.params["places"], strict=True):
        place = b.of(x)
        part = flat[start : start + x.size].reshape(x.shape)
        there = b.destinations.get(x)
        if there is not None and place is there and there.array.ctypes.data == part.ctypes.data:
            continue  # it was computed there
        b.line("{}[...] = {}", Place("static", x.shape, x.dtype, array=part), place)
    return True
