"""Shorthands: primitives that save calls or launches, and in programs are what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Module
from tapegrad._function.program import Step, Value
from tapegrad.formulas import Formula, Ref, formulas
from tapegrad.kernels.chains import OPERATIONS
from tapegrad.primitive import primitives
from tapegrad.tensor import wrap


def written_out(xp: Module, steps: Sequence[Step]) -> list[Step]:
    """Return the steps with every shorthand replaced by what it stands for.

    So rewrites and lowerings meet each thing in one form only.
    """
    found: list[Step] = []
    for step in steps:
        write_out = _SHORTHANDS.get(step.name)
        if write_out is None and xp is np:
            write_out = _ON_HOST.get(step.name)
        if write_out is not None:
            write_out(_Writer(xp, step, found))
        elif step.name in formulas and _is_elementwise(step):
            _formula(_Writer(xp, step, found), formulas[step.name])
        else:
            found.append(step)
    return found


class _Writer:
    """Adds steps in place of one."""

    def __init__(self, xp: Module, step: Step, found: list[Step]) -> None:
        self._xp = xp
        self.step = step
        self._found = found

    def new(self, *shape: int) -> Value:
        """Return a value of the step's type that a step will give."""
        return Value("result", shape, self.step.outputs[0].dtype)

    def add(self, name: str, inputs: Sequence[Any], *outputs: Value, **params: Any) -> None:
        """Add a step."""
        self._found.append(self.step.instead(primitives[name], inputs, outputs, params))

    def filled(self, value: float, *shape: int) -> Value:
        """Return a constant of the step's type."""
        xp, dtype = self._xp, self.step.outputs[0].dtype
        array = xp.broadcast_to(xp.full((), value, dtype), shape)
        return Value("constant", shape, dtype, wrap(array))

    def transposed(self, x: Value) -> Value:
        """Return a matrix, or a stack of them, with its last two axes exchanged."""
        if x.kind == "constant":
            array = x.source._array.swapaxes(-1, -2)
            return Value("constant", array.shape, x.dtype, wrap(array))
        *lead, rows, columns = x.shape
        y = Value("result", (*lead, columns, rows), x.dtype)
        self.add("permute", (x,), y, axes=(*range(len(lead)), len(lead) + 1, len(lead)))
        return y


def _matmul_nt(w: _Writer) -> None:
    x1, x2 = w.step.inputs
    w.add("matmul", (x1, w.transposed(x2)), w.step.outputs[0])


def _matmul_tn(w: _Writer) -> None:
    x1, x2 = w.step.inputs
    w.add("matmul", (w.transposed(x1), x2), w.step.outputs[0])


def _mean_label_cross_entropy_with_grad(w: _Writer) -> None:
    logits, labels = w.step.inputs
    mean, gradient = w.step.outputs
    n, classes = logits.shape
    losses, total, unscaled = w.new(n), w.new(), w.new(n, classes)
    w.add("label_cross_entropy_with_grad", (logits, labels), losses, unscaled, **w.step.params)
    w.add("sum", (losses,), total, axis=(0,), keepdims=False, dtype=None)
    w.add("divide", (total, n), mean)
    share = w.filled(mean.dtype.type(1) / n, n, 1)
    w.add("scale", (share, unscaled), gradient)


def _dropout(w: _Writer) -> None:
    x, counter, key = w.step.inputs
    y, factors = w.step.outputs
    kept = 1.0 - w.step.params["rate"]
    count = -(-x.size // 2)
    bits = Value("result", (count,), np.dtype(np.uint64))
    mask = Value("result", x.shape, np.dtype(np.bool_))
    floating = w.new(*x.shape)
    w.add("random_bits", (counter, key), bits, count=count)
    w.add("random_mask", (bits,), mask, shape=x.shape, threshold=round(kept * 2**32))
    w.add("cast", (mask,), floating, dtype=x.dtype)
    w.add("divide", (floating, kept), factors)
    w.add("multiply", (x, factors), y)


def _is_elementwise(step: Step) -> bool:
    """Tell whether all that a step reads is of the shape and the type of what it gives."""
    y = step.outputs[0]
    same = [type(x) is Value and (x.shape, x.dtype) == (y.shape, y.dtype) for x in step.inputs]
    return all(same)


def _formula(w: _Writer, formula: Formula) -> None:
    steps, results = formula.steps(w.step.params)
    values = [*w.step.inputs]
    outputs = dict(zip(results, w.step.outputs, strict=True))
    (like, *_) = w.step.outputs
    for k, (name, operands) in enumerate(steps, len(values)):
        is_boolean = OPERATIONS[name][0][-1] == "b"
        dtype = np.dtype(np.bool_) if is_boolean else like.dtype
        y = outputs.get(k) or Value("result", like.shape, dtype)
        w.add(name, [values[x.number] if isinstance(x, Ref) else x for x in operands], y)
        values.append(y)


_SHORTHANDS: dict[str, Callable[[_Writer], None]] = {
    "matmul_nt": _matmul_nt,
    "matmul_tn": _matmul_tn,
    "mean_label_cross_entropy_with_grad": _mean_label_cross_entropy_with_grad,
}
# On a GPU one kernel does it; a CPU does its parts block by block, in planned memory.
_ON_HOST: dict[str, Callable[[_Writer], None]] = {"dropout": _dropout}
