"""Algebra: small identities that rules and seeds of a tape leave behind in a program.

Only what is right for every input, NaN, infinities and zeros of both signs included, unless the
table says otherwise: x * 1 is x, but x + 0 is not where x is -0.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tapegrad._function.program import Program, Step, Value, replaced
from tapegrad._function.rewrites import Rewrite
from tapegrad.linear import add, permute
from tapegrad.ops.elementwise import _negative, _subtract
from tapegrad.ops.linear_algebra import _matmul as matmul
from tapegrad.tensor import wrap


class _Pass:
    """One walk through a program, from its first step to the last, and what a rule may ask.

    A rule answers None, or the value that a step's result is instead.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._outputs = set(program.output_values())
        self._uses = program.uses()
        self._made_by: dict[Value, Step] = {}
        self._steps: list[Step] = []
        self._step: Step  # whose place new ones take

    def run(self, rules: dict[str, Rule]) -> None:
        """Apply the rules, which are named by the primitive of the step that they look at."""
        instead: dict[Value, Value] = {}
        for step in self._program.steps:
            step.inputs = tuple(replaced(step.inputs, instead))
            self._step = step
            rule = rules.get(step.name)
            answer = None if rule is None else rule(self, step)
            # A caller gets a result of the program's own, not one of its arguments or constants.
            if answer is None or (step.outputs[0] in self._outputs and answer.kind != "result"):
                self._append(step)
            else:
                instead[step.outputs[0]] = answer
        self._program.steps = self._steps
        self._program.outputs = list(replaced(self._program.outputs, instead))

    def _append(self, step: Step) -> None:
        self._steps.append(step)
        self._made_by.update((y, step) for y in step.outputs)

    def input_of(self, x: Any, name: str, *, alone: bool = False) -> Value | None:
        """Return what the primitive of a name made x of; None if x is not its result.

        alone  whether x may have no other use.
        """
        step = self._made_by.get(x) if type(x) is Value else None
        if step is None or step.name != name or type(step.inputs[0]) is not Value:
            return None
        return None if alone and self._uses[x] > 1 else step.inputs[0]

    def inputs_of(self, x: Value) -> tuple[Any, ...]:
        """Return what the call that made x took."""
        return self._made_by[x].inputs

    def params_of(self, x: Value) -> dict[str, Any]:
        """Return the parameters of the call that made x."""
        return self._made_by[x].params

    def call(self, primitive: Any, like: Value, *inputs: Any, **params: Any) -> Value:
        """Add a step whose result has the shape and type of a value; return the result."""
        y = Value("result", like.shape, like.dtype)
        self._append(self._step.instead(primitive, inputs, (y,), params))
        return y


Rule = Callable[[_Pass, Step], Value | None]


def _same_as(x: Any, y: Value) -> Value | None:
    """Return x if it has all of y's shape and type."""
    return x if type(x) is Value and (x.shape, x.dtype) == (y.shape, y.dtype) else None


def _is(x: Any, number: float) -> bool:
    """Tell whether an input is a number, or a constant that holds it throughout."""
    if type(x) is not Value:
        return bool(x == number)
    return x.kind == "constant" and bool((x.source._array == number).all())


# ---- factors of one


def _product(_: _Pass, step: Step) -> Value | None:
    a, b = step.inputs
    y = step.outputs[0]
    return _same_as(a, y) if _is(b, 1) else _same_as(b, y) if _is(a, 1) else None


def _scaled(_: _Pass, step: Step) -> Value | None:
    a, b = step.inputs
    y = step.outputs[0]
    if _is(a, 1):
        return _same_as(b, y)
    # On a GPU a constant's product makes -0.0 to 0.0; a number's does not.
    return _same_as(a, y) if type(b) is not Value and b == 1 else None


def _quotient(_: _Pass, step: Step) -> Value | None:
    a, b = step.inputs
    return _same_as(a, step.outputs[0]) if _is(b, 1) else None


# ---- signs


def _negation(at: _Pass, step: Step) -> Value | None:
    return at.input_of(step.inputs[0], "negative")


def _negated(at: _Pass, x: Any, y: Value) -> Value | None:
    """Return what x is the negative of, if that is of y's type: -x of a uint8 is no -x of int64."""
    first = at.input_of(x, "negative", alone=True)
    return first if first is not None and first.dtype == y.dtype else None


def _sum_of_two(at: _Pass, step: Step) -> Value | None:
    a, b = step.inputs
    y = step.outputs[0]
    if (x := _negated(at, b, y)) is not None:
        return at.call(_subtract, y, a, x)
    if (x := _negated(at, a, y)) is not None:
        return at.call(_subtract, y, b, x)
    return None


def _difference(at: _Pass, step: Step) -> Value | None:
    a, b = step.inputs
    y = step.outputs[0]
    x = _negated(at, b, y)
    return None if x is None else at.call(add, y, a, x)


def _negated_later(at: _Pass, step: Step) -> Value | None:
    """Change the sign of a result instead of all that it is made of."""
    y = step.outputs[0]
    inputs, negative = list(step.inputs), False
    for i, x in enumerate(step.inputs):
        while (first := _negated(at, x, y)) is not None and first.size >= y.size:
            inputs[i] = x = first
            negative = not negative
    if inputs == list(step.inputs):
        return None
    inner = at.call(step.primitive, y, *inputs, **step.params)
    return at.call(_negative, y, inner) if negative else inner


# ---- factors that are powers of two, which round nothing


def _doubled(at: _Pass, step: Step) -> Value | None:
    """Multiply by one constant, 2c, instead of by 2 and by c: what a squared error leaves."""
    c, d = step.inputs
    y = step.outputs[0]
    x = at.input_of(d, "multiply", alone=True)
    if x is None or type(c) is not Value or c.kind != "constant":
        return None
    factor = at.inputs_of(d)[1]
    if type(factor) not in (int, float) or factor < 1 or math.frexp(factor)[0] != 0.5:
        return None
    array = c.source._array * factor
    if x.dtype != y.dtype or not bool((abs(array) < math.inf).all()):
        return None
    return at.call(step.primitive, y, Value("constant", c.shape, c.dtype, wrap(array)), x)


# ---- views of views


def _copy_or_view(_: _Pass, step: Step) -> Value | None:
    return _same_as(step.inputs[0], step.outputs[0])


def _permuted(at: _Pass, step: Step) -> Value | None:
    x, axes = step.inputs[0], step.params["axes"]
    if axes == tuple(range(len(axes))):
        return _same_as(x, step.outputs[0])
    first = at.input_of(x, "permute")
    if first is None:
        return None
    both = tuple(at.params_of(x)["axes"][axis] for axis in axes)
    if both == tuple(range(len(both))):
        return first
    return at.call(permute, step.outputs[0], first, axes=both)


def _view_of_view(at: _Pass, step: Step) -> Value | None:
    x, y = step.inputs[0], step.outputs[0]
    first = at.input_of(x, step.name)
    if _same_as(x, y) or first is None:
        return _same_as(x, y)
    return _same_as(first, y) or at.call(step.primitive, y, first, **step.params)


def _flattened(at: _Pass, step: Step) -> Value | None:
    first = at.input_of(step.inputs[0], "reshape")
    return None if first is None else at.call(step.primitive, step.outputs[0], first, **step.params)


def _row(at: _Pass, step: Step) -> Value | None:
    if at.input_of(step.inputs[0], "stack") is None:
        return None
    return _same_as(at.inputs_of(step.inputs[0])[step.params["index"]], step.outputs[0])


def _transposed_product(at: _Pass, step: Step) -> Value | None:
    """Multiply the transposes, which are views, instead of transposing the product.

    The gradient of w in x @ w.T is one: so it is computed where it is to lie.
    """
    x, y = step.inputs[0], step.outputs[0]
    if at.input_of(x, "matmul", alone=True) is None or step.params["axes"] != (1, 0):
        return None
    turned = []
    for factor in at.inputs_of(x)[::-1]:
        if type(factor) is not Value or len(factor.shape) != 2:
            return None
        like = Value("result", factor.shape[::-1], factor.dtype)
        turned.append(at.call(permute, like, factor, axes=(1, 0)))
    return at.call(matmul, y, *turned)


def _total(at: _Pass, step: Step) -> Value | None:
    """Sum over all elements of an array without giving it another shape before."""
    x, y = step.inputs[0], step.outputs[0]
    first = at.input_of(x, "reshape", alone=True)
    if first is None or y.shape:
        return None
    params = {**step.params, "axis": tuple(range(len(first.shape)))}
    return at.call(step.primitive, y, first, **params)


def _rewrite(rules: dict[str, Rule], bound: str = "") -> Rewrite:
    return Rewrite(lambda program: _Pass(program).run(rules), bound)


_ZERO = "the sign of a zero"
_ORDER = "the order of the terms in a sum"

# What follows what: signs that have moved may meet others, and transposes too.
REWRITES: dict[str, Rewrite] = {
    "factors of one": _rewrite({"multiply": _product, "scale": _scaled, "divide": _quotient}),
    "signs later": _rewrite(
        dict.fromkeys(("sum", "sum_to", "multiply", "scale", "divide", "reshape"), _negated_later),
        _ZERO,
    ),
    "double signs": _rewrite({"negative": _negation, "add": _sum_of_two, "subtract": _difference}),
    "transposed products": _rewrite({"permute": _transposed_product}, _ORDER),
    "views of views": _rewrite(
        {
            "permute": _permuted,
            "reshape": _view_of_view,
            "broadcast_to": _view_of_view,
            "row": _row,
            "row_numbers": _flattened,
            **dict.fromkeys(
                ("cast", "cast_to_discrete", "sum_to", "positive", "stop_gradient"), _copy_or_view
            ),
        }
    ),
    "sums of reshaped": _rewrite({"sum": _total}, _ORDER),
    "powers of two": _rewrite({"scale": _doubled}, "finite where a double overflows"),
}
