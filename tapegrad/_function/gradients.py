"""Gradients: where an optimiser gathers them, and for which update."""

from __future__ import annotations

from tapegrad._backend import Array
from tapegrad._function.program import Program, Step, Value
from tapegrad._function.rewrites import overlap


def gathered(program: Program) -> dict[Value, Array]:
    """Return the part of an optimiser's flat buffer that each gradient is gathered into.

    Of what is gathered twice it is one place, and the other gets a copy. Where two steps of one
    program share a buffer, the first's gradients may be needed when it holds the second's: those of
    neither are given.
    """
    gathers = [step for step in program.steps if step.name == "gather_gradients"]
    found: dict[Value, Array] = {}
    for step in gathers:
        (target,) = step.writes
        if any(other is not step and overlap(other.writes[0], target) for other in gathers):
            continue
        for x, start in zip(step.inputs, step.params["places"], strict=True):
            if x.kind == "result" and x.shape:
                found[x] = target._array[start : start + x.size].reshape(x.shape)
    return found


def gathering_for(program: Program, update: Step) -> Step | None:
    """Return the step that gathers what an update takes, if that is all that reads it.

    What scales gradients before, or clips them, reads them too.
    """
    flat = update.inputs[0].source
    found = None
    for step in program.steps:
        for x in step.values():
            if step is not update and x.kind == "read" and overlap(x.source, flat):
                return None
        if any(overlap(v, flat) for v in step.writes):
            if found is not None or step.name != "gather_gradients" or step.writes[0] is not flat:
                return None
            found = step
    return found
