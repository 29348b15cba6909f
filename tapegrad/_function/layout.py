"""Layout: how the values of small networks are stored, so that few calls of NumPy do the work.

A call of NumPy costs 0.3 to 1 us whatever its size; below some ten thousand elements that is what a
program costs. Four choices save a third of the calls of a small network's step:

- A matrix of activations (rows, features) is stored feature by feature. A reduction over features
  then runs along contiguous rows, and a row of ones fits below it.
- The ones make the bias, which lies under its kernel in the optimiser's buffer, a row of the same
  product: `[w; b].T @ [x.T; 1]`, and the bias's gradient a row of the kernel's.
- Where only one element decides (a mask of relu) the bits are multiplied as integers, and what
  that cannot do right (NaN) is found by one look at the result of the whole program.
- A softmax cross-entropy takes the exponentials of the logits as they are, not relative to the
  largest: a reduction fewer. What overflows is found by the same look.

They change the order of sums, and so the last bits: `simplify.TABLE` has them as "layout".
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from tapegrad._backend import Array, byte_bounds, owner_of
from tapegrad._function.program import Program, Step, Value, makers_of
from tapegrad._function.rewrites import Rewrite

REWRITE = Rewrite(
    None,
    "the order of the terms in sums and products of matrices; the sign of a zero; a softmax "
    "cross-entropy's exponentials are those of the logits, not of their distances to the largest",
)

SMALL = 1 << 15  # elements: above, products and memory cost more than calls
# Up to here also if products are of two transposes, of a large matrix that came by rows and its
# kernel: OpenBLAS takes 1.2 times as long for those of (128, 784) and (784, 256). With ones beside
# them, rows are no longer one piece.
_MIDDLING = 1 << 13


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A NaN in an input of these is a NaN in the output, but for what `_spreading` says.
_SPREADS_NAN = _names(
    "add subtract multiply divide negative positive exp log sqrt square tanh linear "
    "linear_relu matmul sum mean reshape permute relu softmax log_softmax sigmoid softplus "
    "cast scale max label_cross_entropy label_cross_entropy_with_grad maximum minimum abs"
)
_ELEMENTWISE = _names(
    "add subtract multiply divide negative positive exp log sqrt square tanh relu relu_grad "
    "scale scale_both sigmoid softplus abs sign power maximum minimum linear_relu_grad "
    "reciprocal softmax log_softmax expm1 log1p where greater less"
)


class Pair(NamedTuple):
    """Gradients of a kernel and its bias that are one product."""

    activation: Value
    upstream: Value
    kernel: Value
    bias: Value


class Layout:
    """What a program's values are stored as.

    active         whether anything but the meanings' own operations may be done.
    feature_major  matrices that are stored transposed.
    with_ones      matrices that have ones beside them.
    stacks         lists of those of them that lie under each other: one call says where these
                   outputs of ReLUs are 0.
    pairs          of the steps that compute a kernel's gradient.
    pair_of_bias   of the gradients of biases that come with those of kernels.
    visible        values whose NaN is seen in one of `checked`.
    checked        0-d outputs whose NaN sends a call the careful way.
    """

    def __init__(self, program: Program | None, first_write: int = 0) -> None:
        self.active = program is not None
        self.feature_major: set[Value] = set()
        self.with_ones: set[Value] = set()
        self.stacks: list[list[Value]] = []
        self.pairs: dict[Step, Pair] = {}
        self.pair_of_bias: dict[Value, Pair] = {}
        self.visible: set[Value] = set()
        self.checked: list[Value] = []
        if program is not None:
            self._see(program, first_write)
            self._transpose(program)
            self._add_ones(program)
            self._stack(program)
            self._pair(program)

    def _transpose(self, program: Program) -> None:
        found = self.feature_major
        outputs = set(program.output_values())  # arrays of the caller's own, in the usual order
        by_rows: set[Value] = set()
        for step in program.steps:
            if step.name == "label_cross_entropy_with_grad":
                if step.outputs[1] in outputs:
                    continue
                if step.inputs[0] in found and self.loss_by_classes(step):
                    found.add(step.outputs[1])
                continue
            for y in step.outputs[:1]:
                if (
                    y in outputs
                    or len(y.shape) != 2
                    or not 0 < y.size <= SMALL
                    or y.dtype.kind != "f"
                ):
                    continue
                known = [x for x in step.values() if x in found]
                if step.name in ("linear", "linear_relu"):
                    x = step.inputs[0]
                    if y.size > _MIDDLING and (x.size > SMALL or x in by_rows):
                        by_rows.add(y)
                    else:
                        found.add(y)
                elif (step.name in _ELEMENTWISE and any(x.shape == y.shape for x in known)) or (
                    step.name == "matmul"
                    and step.inputs[0] in known
                    and not any(x.shape == y.shape for x in by_rows)
                ):
                    found.add(y)

    def _add_ones(self, program: Program) -> None:
        outputs = set(program.output_values())
        for step in program.steps:
            if step.name not in ("linear", "linear_relu"):
                continue
            x, w, b = step.inputs
            if (
                x.size <= (SMALL if x in self.feature_major else _MIDDLING)
                and x.kind in ("input", "result")
                and x not in outputs
                and x.dtype == w.dtype
                and joined(w, b) is not None
            ):
                self.with_ones.add(x)

    def _stack(self, program: Program) -> None:
        masked = {s.inputs[1] for s in program.steps if s.name in ("relu_grad", "linear_relu_grad")}
        found: dict[Any, list[Value]] = {}
        for step in program.steps:
            y = step.outputs[0] if step.name == "linear_relu" else None
            if y in masked and y in self.with_ones and y in self.feature_major & self.visible:
                found.setdefault((y.shape[0], y.dtype), []).append(y)
        self.stacks = [x for x in found.values() if len(x) > 1 and sum(y.size for y in x) <= SMALL]

    def _pair(self, program: Program) -> None:
        made_by = makers_of(program.steps)
        gathers = [step for step in program.steps if step.name == "gather_gradients"]
        times = Counter(x for gather in gathers for x in gather.inputs)
        for gather in gathers:
            places = gather.params["places"]
            for i in range(len(places) - 1):
                kernel, bias = gather.inputs[i : i + 2]
                if places[i + 1] != places[i] + kernel.size or times[kernel] + times[bias] > 2:
                    continue
                product, total = made_by.get(kernel), made_by.get(bias)
                if product is None or total is None or product.name != "matmul":
                    continue
                turned, g = product.inputs
                turning = made_by.get(turned)
                if turning is None or turning.name != "permute":
                    continue
                x = turning.inputs[0]
                same = (total.name == "linear_relu_grad" and total.outputs[0] is g) or (
                    total.name == "sum_to" and total.inputs[0] is g and bias.shape == g.shape[1:]
                )
                if same and x in self.with_ones:
                    pair = self.pairs[product] = Pair(x, g, kernel, bias)
                    self.pair_of_bias[bias] = pair

    def loss_by_classes(self, step: Step) -> bool:
        """Tell whether a softmax cross-entropy can be computed along rows of one class each."""
        few = step.inputs[0].shape[1] <= 64
        return few and is_of_plain_labels(step) and step.outputs[0] in self.visible

    def _see(self, program: Program, first_write: int) -> None:
        before = program.steps[:first_write]
        made = {y for step in before for y in step.outputs}
        results = list(program.output_values())
        results += [
            x for step in program.steps if step.name.startswith("assign") for x in step.values()
        ]
        self.checked = [
            x for x in dict.fromkeys(results) if x in made and not x.shape and x.dtype.kind == "f"
        ]
        self.visible = set(self.checked)
        for step in reversed(before):
            if step.outputs[0] in self.visible:
                self.visible.update(_spreading(step))


def _spreading(step: Step) -> list[Value]:
    """Return the inputs of which a NaN is always one in the step's first result."""
    if step.name not in _SPREADS_NAN or step.outputs[0].size == 0:
        return []
    if step.params.get("ignore_label") is not None:  # a row that is ignored has the loss 0
        return []
    if step.name == "scale":  # where the first is 0 the second may be NaN
        return [x for x in step.inputs[:1] if type(x) is Value]
    return list(step.values())


def is_of_plain_labels(step: Step) -> bool:
    """Tell whether a softmax cross-entropy is of labels alone, as the calls of NumPy for it are."""
    logits, labels = step.inputs
    return (
        not step.params["label_smoothing"]
        and step.params["ignore_label"] is None
        and logits.dtype.char in "fd"
        and labels.dtype == np.int64
    )


def joined(w: Any, b: Any) -> Array | None:
    """Return the matrix of a kernel with its bias as its last row, if they lie so in memory."""
    if any(type(x) is not Value or x.kind != "read" for x in (w, b)):
        return None
    return joined_arrays(w.source._array, b.source._array)


def joined_arrays(w: Array, b: Array) -> Array | None:
    """Return what `joined` does, of arrays."""
    flat = owner_of(w)
    if flat is not owner_of(b) or flat.ndim != 1 or not flat.dtype == w.dtype == b.dtype:
        return None
    start, end = byte_bounds(w)
    if w.ndim != 2 or b.shape != w.shape[1:] or byte_bounds(b)[0] != end:
        return None
    if not w.flags.c_contiguous:
        return None
    first = (start - byte_bounds(flat)[0]) // w.itemsize
    rows, columns = w.shape
    part: Array = flat[first : first + (rows + 1) * columns].reshape(rows + 1, columns)
    return part
