"""Rewrites of a program that keep its values: nothing twice, nothing in vain, writes last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tapegrad._backend import byte_bounds
from tapegrad._function.program import Program, Step, Value, replaced
from tapegrad.primitive import Update
from tapegrad.variable import Variable


class Rewrite(NamedTuple):
    """An entry of the table of those that can be switched off: `simplify.TABLE`.

    run    rewrites a program; None for the layout, which the lowering sees to.
    bound  how far values may move; empty where every bit stays as it is (with NumPy).
    """

    run: Callable[[Program], None] | None
    bound: str = ""


def without_dead_steps(program: Program) -> None:
    """Drop the steps whose results nobody needs."""
    needed = set(program.output_values())
    kept = []
    for step in reversed(program.steps):
        if isinstance(step.primitive, Update) or any(y in needed for y in step.outputs):
            needed.update(step.values())
            kept.append(step)
    program.steps = kept[::-1]


def without_repeated_steps(program: Program) -> None:
    """Let a step that computes what another has computed take its results.

    Reading a Variable gives a value for each version, so equal inputs are equal values.
    """
    seen: dict[Any, Step] = {}
    instead: dict[Value, Value] = {}
    kept = []
    for step in program.steps:
        step.inputs = tuple(replaced(step.inputs, instead))
        key = _key(step)
        earlier = None if key is None else seen.setdefault(key, step)
        if earlier is None or earlier is step:
            kept.append(step)
        else:
            instead.update(zip(step.outputs, earlier.outputs, strict=True))
    program.steps = kept
    program.outputs = list(replaced(program.outputs, instead))


def _key(step: Step) -> Any:
    if isinstance(step.primitive, Update):
        return None
    inputs = tuple(x if type(x) is Value else (type(x), repr(x)) for x in step.inputs)
    try:
        params = tuple(sorted((k, v, repr(v)) for k, v in step.params.items()))
        key = (step.primitive, inputs, params)
        hash(key)
    except TypeError:  # a parameter that is no plain value
        return None
    return key


def writes_last(program: Program) -> int:
    """Put what does not depend on writes before them; return the position of the first write.

    So an error in the computation leaves the state as it was, and values read before a write are
    used before it.
    """
    updates = [step for step in program.steps if isinstance(step.primitive, Update)]
    late_values: set[Value] = set()
    early: list[Step] = []
    late: list[Step] = []
    for step in program.steps:
        if isinstance(step.primitive, Update) or any(
            x in late_values or (x.kind == "read" and _after(x, updates)) for x in step.values()
        ):
            late.append(step)
            late_values.update(step.outputs)
        else:
            early.append(step)
    program.steps = early + late
    return len(early)


def _after(read: Value, updates: list[Step]) -> bool:
    """Tell whether a read is of a version that one of the updates has made."""
    return any(
        update.order < read.since and overlap(read.source, variable)
        for update in updates
        for variable in update.writes
    )


def overlap(a: Variable, b: Variable) -> bool:
    """Tell whether two Variables show the same memory."""
    if a is b:
        return True
    if a._buffer is not b._buffer:
        return False
    (low, high), (first, end) = byte_bounds(a._array), byte_bounds(b._array)
    return low < end and first < high


def ends(update: Step, read: Value) -> bool:
    """Tell whether an update ends the version that a read gave."""
    return update.order >= read.since and any(overlap(read.source, v) for v in update.writes)
