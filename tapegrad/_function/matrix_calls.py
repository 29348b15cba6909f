"""How products of matrices, and the layers made of them, become calls of NumPy."""

from __future__ import annotations

from tapegrad._function.elementwise_calls import relu_grad, zeros
from tapegrad._function.layout import joined
from tapegrad._function.lowering import Lowering, Place, lowers, static
from tapegrad._function.program import Step, Value
from tapegrad._function.shape_calls import sum_rows


@lowers("matmul")
def _matmul(b: Lowering, step: Step) -> bool:
    x1, x2 = step.inputs
    y = step.outputs[0]
    if type(x1) is not Value or type(x2) is not Value or not x1.dtype == x2.dtype == y.dtype:
        return False
    pair = b.layout.pairs.get(step)
    if pair is not None and b.is_one_product(pair):
        full = b.extended[pair.activation]
        place = static(b.joined_destination(pair))
        b.call(_product(x1, x2, y), static(full), b.of(pair.upstream), place)
        b.set(y, b.destinations[y])
        return True
    places = b.of(x1), b.of(x2)
    _multiply_matrices(b, *places, b.out(step))
    return True


def _multiply_matrices(b: Lowering, left: Place, right: Place, out: Place) -> None:
    product = _product(left, right, out)
    if _is_turned(out):
        left, right, out = b.turned(right), b.turned(left), b.turned(out)
    if out.kind == "static" and not out.bind().flags.c_contiguous:
        product = "matmul"  # beside a column of ones: dot writes to whole arrays alone
    elif b.layout.active and _is_thin_transpose(left, right):
        turned, right = right, b.arena(right.shape, right.dtype)
        b.line("{}[...] = {}", right, turned)
    b.call(product, left, right, out)


def _product(left: Value | Place, right: Value | Place, out: Value | Place) -> str:
    """Return the function that the meaning calls: for thin matrices the two round otherwise."""
    plain = len(left.shape) == len(right.shape) == 2 and out.dtype.char in "fd"
    return "dot" if plain and (1, 1) not in (left.shape, right.shape) else "matmul"


def _is_thin_transpose(left: Place, right: Place) -> bool:
    """Tell whether a product would be of two transposes, thin ones with a large result.

    OpenBLAS takes 65 us for (128, 10) by (10, 512), the gradient of what a classifier's last layer
    reads, and 13 with the copy of one of them.
    """
    return (
        _is_turned(left)
        and _is_turned(right)
        and left.shape[1] <= 16
        and left.shape[0] * right.shape[1] >= 1 << 14
    )


def _is_turned(place: Place) -> bool:
    if place.kind != "static":
        return place.turned
    array = place.bind()
    return array.ndim == 2 and bool(array.T.flags.c_contiguous)


# ---- linear layers


@lowers("linear", "linear_relu")
def _linear(b: Lowering, step: Step) -> bool:
    x, w, bias = step.inputs
    y = step.outputs[0]
    if not x.dtype == w.dtype == bias.dtype:
        return False
    both = joined(w, bias) if w not in b.copies and bias not in b.copies else None
    places = b.of(x), b.of(w), b.of(bias)
    out = b.out(step)
    if x in b.extended and both is not None and out.kind != "local":
        full = b.extended[x]
        if _is_turned(out):
            b.call("dot", static(both.T), static(full), b.turned(out))
        else:
            b.call("dot", static(full.T), static(both), out)
    else:
        _multiply_matrices(b, places[0], places[1], out)
        b.call("add", out, places[2], out)
    if step.name == "linear_relu":
        b.call("maximum", out, zeros(b, y), out)
    return True


@lowers("linear_relu_grad")
def _linear_relu_grad(b: Lowering, step: Step) -> bool:
    if not relu_grad(b, step):
        return False
    bias = step.outputs[1]
    if b.pair_of_bias(bias) is not None:
        b.set(bias, b.destinations[bias])
    elif b.uses(bias):
        sum_rows(b, step, b.of(step.outputs[0]), 1)
    return True
