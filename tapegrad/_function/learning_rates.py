"""Learning rates: on a CPU, multiplied into what all of an update's gradients are made of.

Plain SGD and momentum take rate * g, a pass over as many numbers as there are parameters. All that
comes before is linear in the gradient of the last layer's outputs, a small matrix: multiplied
there, the rate is in every gradient. It is done where nobody else sees one of these gradients.
"""

from __future__ import annotations

import numpy as np

from tapegrad._function.gradients import gathering_for
from tapegrad._function.program import Program, Step, Value, replaced
from tapegrad._function.rewrites import Rewrite, overlap
from tapegrad.linear import cast
from tapegrad.ops.elementwise import _multiply
from tapegrad.tensor import wrap

# Parameters from which the pass over them costs more than the two calls that replace it.
_WORTH = 1 << 15

# Primitives that are linear in their first input, in each if the others stay, in all together.
_LINEAR_IN_FIRST = frozenset((
    "broadcast_to", "cast", "divide", "linear_relu_grad", "negative", "permute", "positive",
    "relu_grad", "reshape", "sum", "sum_to",
))  # fmt: skip
_LINEAR_IN_EACH = frozenset(("matmul", "multiply", "scale"))
_LINEAR_IN_ALL = frozenset(("add", "subtract"))


def _multiply_early(program: Program) -> None:
    """Let updates by the learning rate times a gradient find the rate in the gradient."""
    if not program.on_host:
        return
    for update in [step for step in program.steps if step.name in ("sgd", "momentum")]:
        gradients, rate, *rest = update.inputs
        gather = gathering_for(program, update)
        if gather is None or gradients.size < _WORTH or not _lasts(program, rate):
            continue
        origin = _origin(program, gather, gradients)
        if origin is not None:
            _multiply_after(program, *origin, rate)
            update.inputs = (gradients, _ONE, *rest)


# One of a row, as the hyper-parameters are: a look at a row costs less than at several numbers.
_ONE = Value("constant", (), np.dtype(np.float64), wrap(np.ones(1).reshape(())))


def _lasts(program: Program, number: Value) -> bool:
    """Tell whether a hyper-parameter is the same throughout the program."""
    if number.kind == "read":
        return not any(overlap(number.source, v) for step in program.steps for v in step.writes)
    return number.kind == "constant"


def _origin(program: Program, gather: Step, gradients: Value) -> tuple[Step, Value] | None:
    """Return the last small value that all gradients are linear in, and the step that gives it."""
    for i in range(program.steps.index(gather) - 1, -1, -1):
        step = program.steps[i]
        for x in step.outputs:
            fits = x.dtype == gradients.dtype and 2 * x.size <= gradients.size
            if fits and _makes_all(program, i, x, gather):
                return step, x
    return None


def _makes_all(program: Program, position: int, x: Value, gather: Step) -> bool:
    """Tell whether x makes all that is gathered, linearly and in its type, and nothing else."""
    made = {x}
    for step in program.steps[position + 1 :]:
        of_it = [i for i, y in enumerate(step.inputs) if y in made]
        if step is gather:
            if len(of_it) < len(step.inputs):
                return False
        elif of_it:
            if any(y.dtype != x.dtype for y in step.outputs) or not _is_linear(step, of_it):
                return False
            made.update(step.outputs)
    return made.isdisjoint(program.output_values())


def _is_linear(step: Step, of: list[int]) -> bool:
    if step.name in _LINEAR_IN_ALL:
        return len(of) == len(step.inputs)
    if step.name in _LINEAR_IN_EACH:
        return len(of) == 1
    return step.name in _LINEAR_IN_FIRST and of == [0]


def _multiply_after(program: Program, step: Step, x: Value, rate: Value) -> None:
    """Let all that takes x take x times the rate."""
    at = program.steps.index(step) + 1
    narrow, scaled = Value("result", (), x.dtype), Value("result", x.shape, x.dtype)
    for later in program.steps[at:]:
        later.inputs = tuple(replaced(later.inputs, {x: scaled}))
    program.steps[at:at] = [
        step.instead(cast, (rate,), (narrow,), {"dtype": x.dtype}),
        step.instead(_multiply, (x, narrow), (scaled,)),
    ]


REWRITES = {
    "learning rates": Rewrite(
        _multiply_early, "the rounding of a product with the learning rate, which is finite"
    )
}
