"""How softmax and its cross-entropies become calls of NumPy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._backend import Array, is_short
from tapegrad._blocks import for_rows, lanes, loss_rows
from tapegrad._function.layout import is_of_plain_labels
from tapegrad._function.lowering import Lowering, Place, lowers, meaning_of, static
from tapegrad._function.program import Step, Value
from tapegrad._host_memory import aligned
from tapegrad.ops.elementwise import holds_nan


def _one_of_each_row(b: Lowering, x: Value, axis: int) -> Place:
    """Return memory for what a reduction along an axis gives, which stays as one of length 1."""
    axis %= len(x.shape)
    return b.arena((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)


def _exponentials(b: Lowering, x: Place, axis: int, shifted: Place, p: Place, total: Place) -> None:
    """Let p be the exponentials of `shifted`, x less the largest, and `total` their sums."""
    b.line("maximum_reduce({}, {}, None, {}, True)", x, axis, total)
    b.call("subtract", x, total, shifted)
    b.call("exp", shifted, p)
    b.line("add_reduce({}, {}, None, {}, True)", p, axis, total)


@lowers("softmax")
def _softmax(b: Lowering, step: Step) -> bool:
    x = step.inputs[0]
    if is_short(x.dtype):
        return False
    axis = step.params["axis"]
    total = _one_of_each_row(b, x, axis)
    place = b.of(x)
    out = b.out(step, x)
    _exponentials(b, place, axis, out, out, total)
    b.call("divide", out, total, out)
    return True


@lowers("log_softmax")
def _log_softmax(b: Lowering, step: Step) -> bool:
    x = step.inputs[0]
    if is_short(x.dtype):
        return False
    axis = step.params["axis"]
    total = _one_of_each_row(b, x, axis)
    spare = b.arena(x.shape, x.dtype)
    place = b.of(x)
    out = b.out(step, x)
    _exponentials(b, place, axis, out, spare, total)
    b.call("log", total, total)
    b.call("subtract", out, total, out)
    return True


def _flat(array: Array) -> Array:
    return array.reshape(-1)


@lowers("label_cross_entropy", "label_cross_entropy_with_grad")
def _label_cross_entropy(b: Lowering, step: Step) -> bool:
    logits, labels = step.inputs
    n, classes = logits.shape
    if not is_of_plain_labels(step) or not n:
        return False
    dtype = logits.dtype
    with_grad = len(step.outputs) == 2 and b.uses(step.outputs[1]) > 0
    if with_grad and step.outputs[1] in b.layout.feature_major:
        return _feature_major_cross_entropy(b, step)
    x, t = b.of(logits), b.of(labels)
    if logits.size >= _BY_ROWS:
        return _cross_entropy_by_rows(b, step, x, t, with_grad)
    total = b.arena((n, 1), dtype)
    shifted = b.arena((n, classes), dtype)
    index = b.arena((n,), np.int64)
    picked = b.arena((n,), dtype)
    loss = b.out(step)
    p = b.out(step, position=1) if with_grad else b.arena((n, classes), dtype)
    b.bound(check_labels, t, classes)
    _exponentials(b, x, 1, shifted, p, total)
    b.call("add", t, static(np.arange(n) * classes), index)
    flat_shifted = b.view(shifted, (n * classes,), _flat)
    b.line("{}.take({}, None, {}, 'clip')", flat_shifted, index, picked)
    b.call("log", b.view(total, (n,), _flat), loss)
    b.call("subtract", loss, picked, loss)
    if with_grad:
        b.call("divide", p, total, p)
        b.bound(one_less, p, index, picked)
    # A row of -inf alone, or one with a NaN: the meaning says what they give.
    _by_meaning_if_nan(b, step, total, loss, p if with_grad else None)
    return True


def one_less(p: Array, index: Array, spare: Array) -> None:
    """Let p be one less at these places; spare is scratch."""
    flat = p.reshape(-1)
    flat.take(index, None, spare, "clip")
    spare -= 1
    flat.put(index, spare)


def wrong_labels(labels: Array, classes: int) -> None:
    """Raise `ValueError` for the first label that is no class."""
    wrong = labels[(labels < 0) | (labels >= classes)][0]
    raise ValueError(f"[label_cross_entropy] labels must be from 0 to {classes - 1}, got {wrong}")


def check_labels(labels: Array, classes: int) -> None:
    """Raise `ValueError` where a label is no class."""
    # As unsigned numbers the negative ones are larger than any other.
    if np.maximum.reduce(labels.view(np.uint64)) >= classes:
        wrong_labels(labels, classes)


def _by_meaning_if_nan(b: Lowering, step: Step, seen: Place, loss: Place, p: Place | None) -> None:
    """Let a cross-entropy's meaning write its loss and its gradient where `seen` holds a NaN."""
    x, t = map(b.of, step.inputs)
    meaning = meaning_of(step)
    if len(step.outputs) == 1:
        b.line("if {}({}): {}[...] = {}({}, {})", holds_nan, seen, loss, meaning, x, t)
    elif p is not None:
        b.line("if {}({}): {}[...], {}[...] = {}({}, {})", holds_nan, seen, loss, p, meaning, x, t)
    else:
        b.line("if {}({}): {}[...] = {}({}, {})[0]", holds_nan, seen, loss, meaning, x, t)


# Elements from which a pass over memory costs more than the calls of its blocks.
_BY_ROWS = 1 << 17


def _cross_entropy_by_rows(b: Lowering, step: Step, x: Place, t: Place, with_grad: bool) -> bool:
    logits = step.inputs[0]
    n, classes = logits.shape
    loss = b.out(step)
    factor, p = None, None
    scaled = _the_scaling_of(b, step.outputs[1]) if with_grad else None
    if scaled is not None:
        factor = scaled.inputs[0].number()[()]
        p = b.out(scaled)
        b.done.add(scaled)
    elif with_grad:
        p = b.out(step, position=1)
    exact = not b.layout.active
    work = _CrossEntropyByRows((n, classes), logits.dtype, meaning_of(step), factor, exact)
    b.bound(check_labels, t, classes)
    b.bound(work, x, t, loss, p)
    return True


def _the_scaling_of(b: Lowering, x: Value) -> Step | None:
    """Return the step that multiplies a gradient by one number, if nothing else uses it."""
    step = b.only_user(x)
    if step is None or step.name not in ("scale", "multiply"):
        return None
    g, d = step.inputs
    number = g.number() if d is x and type(g) is Value and g.dtype == x.dtype else None
    if number is None or number == 0 or step.outputs[0].shape != x.shape:
        return None
    return step


def _feature_major_cross_entropy(b: Lowering, step: Step) -> bool:
    """Let everything run along contiguous rows: one row for each class.

    Exponentials are taken of the logits as they are, no reduction before them, and the loss is the
    logarithm of their sum over the label's own: exact near 0 too. Where that or the label's own is
    near the ends of what its type can hold (logits beyond some 80 in float32, or as far apart), a
    NaN sends the call the careful way.
    """
    logits, labels = step.inputs
    loss = step.outputs[0]
    n, classes = logits.shape
    x = b.of(logits)
    if x.kind == "local":
        return False
    total_step = _the_sum_of(b, loss)
    scaled = _the_scaling_of(b, step.outputs[1])
    factor = 1.0 if scaled is None else float(scaled.inputs[0].number())
    if scaled is None or math.frexp(factor)[0] != 0.5:  # else 1 / factor is exact
        scaled, factor = None, 1.0
    else:
        b.done.add(scaled)
    b.speculates = True
    dtype = logits.dtype
    t = b.of(labels)
    out = b.turned(b.out(step, position=1) if scaled is None else b.out(scaled))
    hot = b.arena((classes, n), dtype)
    both, sums = b.arena((2 * classes, n), dtype), b.arena((classes + 2, n), dtype)
    e, of_label = b.rows(both, 0, classes), b.rows(both, classes, 2 * classes)
    each, ratio = b.rows(sums, 0, classes), b.view(sums, (n,), lambda a: a[classes - 1])
    scaled_label = b.view(sums, (n,), lambda a: a[-1])
    # Of 64 classes at most no byte of a label is above 127; one of a negative number is.
    b.line("if not {}.tobytes().isascii(): {}({}, {})", t, wrong_labels, t, classes)
    one_hot = np.eye(classes, classes + 1, dtype=dtype) * dtype.type(factor)
    one_hot[:, classes] = math.nan  # of a label that is too large: the careful way tells
    b.line("{}({}, 1, {}, 'clip')", one_hot.take, t, hot)
    b.call("exp", b.turned(x), e)
    b.call("multiply", e, hot, of_label)
    # A product with a square of ones sums over the classes and spreads the sum over them: half the
    # time of calls that reduce and broadcast. The gradient's factor comes with it. Below are the
    # label's own exponential, as small as it was on the way, and with the factor of the sums.
    summing = aligned((classes + 2, 2 * classes), dtype, 0)
    summing[:classes, :classes] = 1 / factor
    summing[-2, classes:] = 1
    summing[-1, classes:] = 1 / factor**2
    b.call("dot", static(summing), both, sums)
    b.call("divide", e, each, out)
    b.call("subtract", out, hot, out)
    # Where the sum is too large or small, so is its ratio to the label's own, or the latter.
    b.call("divide", ratio, scaled_label, ratio)
    seen = b.local((3 * n,), np.uint8)
    b.line("{} = {}.tobytes()", seen, b.view(sums, (3, n), lambda a: _exponents(a[-3:])))
    b.line("if 0 in {} or 127 in {}: {}[0] = nan", seen, seen, ratio)
    if total_step is None:
        b.call("log", ratio, b.out(step))
        return True
    b.line("log({}, {})", ratio, ratio)
    place = b.local((), dtype)
    b.line("{} = {}.dot({})", place, ratio, static(np.ones(n, dtype)))
    b.set(total_step.outputs[0], place)
    b.done.add(total_step)
    b.set(loss, ratio)
    return True


def _the_sum_of(b: Lowering, x: Value) -> Step | None:
    """Return the step that sums a vector, if nothing else uses it."""
    step = b.only_user(x)
    if step is None or step.name != "sum" or step.outputs[0].shape:
        return None
    return step if step.params["dtype"] is None else None


@lowers("probability_cross_entropy", "probability_cross_entropy_with_grad")
def _probability_cross_entropy(b: Lowering, step: Step) -> bool:
    logits, targets = step.inputs
    n, classes = logits.shape
    dtype = logits.dtype
    if dtype.char not in "fd" or targets.dtype != dtype or not n:
        return False
    with_grad = len(step.outputs) == 2 and b.uses(step.outputs[1]) > 0
    x, t = b.of(logits), b.of(targets)
    total, log_total = b.arena((n, 1), dtype), b.arena((n, 1), dtype)
    shifted = b.arena((n, classes), dtype)
    loss = b.out(step)
    p = b.out(step, position=1) if with_grad else b.arena((n, classes), dtype)
    _exponentials(b, x, 1, shifted, p, total)
    b.call("log", total, log_total)
    b.call("subtract", log_total, shifted, shifted)
    b.call("multiply", t, shifted, shifted)
    b.line("add_reduce({}, 1, None, {})", shifted, loss)
    if with_grad:
        b.line("add_reduce({}, 1, None, {}, True)", t, log_total)
        b.call("divide", log_total, total, total)
        b.call("multiply", p, total, p)
        b.call("subtract", p, t, p)
    # A target of 0 beside a logit of -inf, a row of -inf alone or a NaN: as the meaning says.
    _by_meaning_if_nan(b, step, loss, loss, p if with_grad else None)
    return True


# ---- over large arrays


class _CrossEntropyByRows:
    """Losses of rows and their gradients in one pass over memory.

    factor  by which the gradient is multiplied afterwards, or None.
    exact   whether every operation is the meaning's own. Else sums are products with ones, dividing
            by them is one product with the factor, and exponentials are those of the logits, not
            of their distances to the largest: five passes over a block fewer.
    """

    __name__ = "softmax_cross_entropy"

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: Any,
        meaning: Callable[..., Any],
        factor: Any,
        exact: bool,
    ) -> None:
        self._shape = shape
        self._meaning = meaning
        self._factor = factor
        self._one = np.array(1, dtype)
        self._share = self._one if factor is None else np.array(factor, dtype)
        self._ones = None if exact else np.ones(shape[1], dtype)
        rows, classes = shape
        self._block = loss_rows(classes)
        block = min(self._block, rows)
        self._starts = np.arange(block) * classes
        self._scratch = [
            (
                np.empty((2, block), dtype),
                np.empty(block, np.int64),
                np.empty((block, classes), dtype),
            )
            for _ in range(lanes(rows * classes))  # exponentials are worth it beside products too
        ]

    def __call__(self, logits: Array, labels: Array, losses: Array, gradient: Array | None) -> None:
        rows = self._shape[0]

        def work(s: slice, lane: int) -> None:
            n = s.stop - s.start
            sums, places, spare = self._scratch[lane]
            x, t, loss = logits[s], labels[s], losses[s]
            total, picked, place = sums[0, :n], sums[1, :n], places[:n]
            p = spare[:n] if gradient is None else gradient[s]
            np.add(t, self._starts[:n], place)
            quick = self._quickly(x, p, total, picked, place, loss)
            if not quick:
                self._carefully(x, p, total, picked, place, loss)
            if gradient is not None:
                self._derive(p, total, picked, place)
            if not quick and np.isnan(loss).any():  # a row of -inf alone, or one with a NaN
                answer = self._meaning(x, t)
                if gradient is None and not isinstance(answer, tuple):
                    loss[...] = answer
                else:
                    loss[...] = answer[0]
                    if gradient is not None:
                        p[...] = answer[1] if self._factor is None else answer[1] * self._factor

        for_rows(rows, self._block, len(self._scratch), work)

    def _quickly(
        self, x: Array, p: Array, total: Array, picked: Array, place: Array, loss: Array
    ) -> bool:
        """Let p be the exponentials of x, and total what makes them its gradient.

        Tells whether no number on the way is too large or small to go on.
        """
        if self._ones is None:
            return False
        np.exp(x, p)
        p.dot(self._ones, total)
        p.reshape(-1).take(place, None, picked, "clip")
        np.divide(total, picked, loss)
        np.divide(self._share, total, total)
        if not (_ordinary(picked) and _ordinary(loss) and _ordinary(total)):
            return False
        np.log(loss, loss)
        return True

    def _carefully(
        self, x: Array, p: Array, total: Array, picked: Array, place: Array, loss: Array
    ) -> None:
        """Do the same relative to each row's largest; total is the sum where all is exact."""
        column = total[:, None]
        np.maximum.reduce(x, 1, None, column, keepdims=True)
        np.subtract(x, column, p)
        p.reshape(-1).take(place, None, picked, "clip")
        np.exp(p, p)
        if self._ones is None:
            np.add.reduce(p, 1, None, column, keepdims=True)
        else:
            p.dot(self._ones, total)
        np.log(total, loss)
        np.subtract(loss, picked, loss)
        if self._ones is not None:
            np.divide(self._share, total, total)

    def _derive(self, p: Array, total: Array, picked: Array, place: Array) -> None:
        """Let p be the gradient."""
        column, flat, share = total[:, None], p.reshape(-1), self._share
        if self._ones is None:
            np.divide(p, column, p)
            share = self._one
        else:
            np.multiply(p, column, p)
        flat.take(place, None, picked, "clip")
        np.subtract(picked, share, picked)
        flat.put(place, picked)
        if self._ones is None and self._factor is not None:
            np.multiply(p, self._factor, p)


def _exponents(x: Array) -> Array:
    """Return a view of the bytes that hold the numbers' exponents.

    Of numbers that are not negative it is 0 for very small ones, 127 for very large ones and NaN,
    and 255 for a NaN with a sign; to look for these takes a fifth of what comparisons take.
    """
    top = x.itemsize - 1 if sys.byteorder == "little" else 0
    return x.view(np.uint8)[..., top :: x.itemsize]


def _ordinary(x: Array) -> bool:
    """Tell whether numbers are neither NaN nor near what a type can hold, whatever their signs."""
    found = (_exponents(x) & 127).tobytes()
    return not (0 in found or 127 in found)
