"""How changes of shape, sums and other reductions become calls of NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._backend import Array, is_short
from tapegrad._function.lowering import Lowering, Place, lowers, static
from tapegrad._function.program import Step, Value
from tapegrad._index import SLOT
from tapegrad.linear import by_product
from tapegrad.tape import Spec

# ---- shapes: views, as long as what they show stays where it is


def _view(
    b: Lowering, step: Step, view: Callable[[Array], Array], text: str, *operands: Any
) -> bool:
    """Let the output be a view of the input."""
    x, y = step.inputs[0], step.outputs[0]
    if b.must_be_written(y):
        return _copied_view(b, step, text, *operands)
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


def _copied_view(b: Lowering, step: Step, text: str, *operands: Any) -> bool:
    x = step.inputs[0]
    if not x.shape or not step.outputs[0].shape:
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
    if not x.shape:
        place = b.of(x)
        if place.kind == "static":
            return False
        b.line("{}.fill({})", b.out(step), place)
        return True
    if b.must_be_written(y):
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
    if not x.shape or not y.shape:
        return False
    place, shape = b.of(x), y.shape
    contiguous = place.array is None or place.array.flags.c_contiguous
    if place.kind == "local" or (place.root is place and contiguous):
        return _view(b, step, lambda a: a.reshape(shape), "{}.reshape({})", shape)
    return _copied_view(b, step, "{}.reshape({})", shape)


@lowers("place", "place_row")
def _place(b: Lowering, step: Step) -> bool:
    if not step.inputs[0].shape:
        return False
    x = b.of(step.inputs[0])
    out = b.out(step)
    b.line("{}.fill(0)", out)
    b.line("{}[{}] = {}", out, step.params["index"], x)
    return True


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


@lowers("one_hot")
def _one_hot(b: Lowering, step: Step) -> bool:
    index, y = step.inputs[0], step.outputs[0]
    if not index.shape:
        return False
    x, classes = b.of(index), np.arange(step.params["depth"])
    chosen = b.like(y, np.dtype(np.bool_))
    out = b.out(step)
    b.line("equal({}[..., None], {}, {})", x, static(classes), chosen)
    b.line("{}[...] = {}", out, chosen)
    return True


# ---- reductions


_REDUCTIONS = {"sum": "add", "max": "maximum", "min": "minimum"}


@lowers(*_REDUCTIONS)
def _reduction(b: Lowering, step: Step) -> bool:
    x, y = step.inputs[0], step.outputs[0]
    axis, keepdims = step.params["axis"], step.params["keepdims"]
    if step.name == "sum" and is_short(x.dtype):
        return False
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
    if not y.shape:
        return False
    lead = len(x.shape) - len(y.shape)
    stretched = tuple(i for i, n in enumerate(x.shape) if i < lead or y.shape[i - lead] != n)
    if b.pair_of_bias(y) is not None:
        b.set(y, b.destinations[y])
        return True
    if is_short(x.dtype):
        return False
    place = b.of(x)
    if stretched == (0,) and len(x.shape) == 2:
        return sum_rows(b, step, place, 0)
    keep = tuple(1 if i in stretched else n for i, n in enumerate(x.shape))
    out = b.out(step)
    b.line("add_reduce({}, {}, {}, {}.reshape({}), True)", place, stretched, x.dtype, out, keep)
    return True


def sum_rows(b: Lowering, step: Step, x: Place, position: int) -> bool:
    """Sum a matrix over its rows as the meaning of sum_to does."""
    if not by_product(np, Spec(0, x.shape, x.dtype)):
        out = b.out(step, position=position)
        b.line("add_reduce({}, 0, {}, {}.reshape({}))", x, x.dtype, out, x.shape[1:])
        return True
    ones = static(np.ones(x.shape[0], x.dtype))
    y = step.outputs[position]
    out = b.out(step, position=position)
    if y.shape == x.shape[1:]:
        b.call("dot", ones, x, out).sums_rows = b.layout.active
    else:
        b.line("{}.dot({}, {}.reshape({}))", ones, x, out, x.shape[1:])
    return True
