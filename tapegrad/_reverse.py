"""Reverse programs: a small tape's reverse pass as straight-line calls, once its form is known.

The reverse pass goes back through the tape and asks the rules, which call operations on Tensors.
For single numbers that takes thirty times as long as what it computes. But a training loop brings
the same tape again and again: the same operations on other values. The rules then make the same
calls, for they see shapes, types and settings only, and values never. So the calls are written down
while the reverse pass runs as usual, as a text of Python. Of the tape of x**2 * y it is:

    def replay(tape, targets, sources, weights):
        nodes, versions = tape._nodes, tape._versions
        p0, (x0_0, x0_1,), (y0_0,), _, m0, _ = nodes[0]
        if p0 is not power_0 or m0 != 1 or type(a0 := x0_0._array) is not float32_1 or ...
        p1, (x1_0, x1_1,), (y1_0,), _, m1, _ = nodes[1]
        if p1 is not multiply_3 or m1 != 3 or x1_0 is not y0_0 or ...: return None
        ...
        t5 = a0 * (2)
        t6 = a1 * t5
        ...
        return [g0, g1]

First it asks whether the tape is of the form that was recorded, and answers None if anything that
a rule can see is another. Then come the array module's calls: the meanings of the primitives that
the rules have called. The gradient of (x**2 + y**2)**2 takes a quarter of the time so, and is the
same to the last bit.

A text that has been written twice, with the same constants, is compiled. What cannot be written
down (a gradient of the user's own, what draws random numbers) is interpreted as ever; and so is a
tape on which a program raised, its operations being intact: the error then tells where it arose.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tapegrad._recording import alone
from tapegrad._reverse_text import Recording, Refused, can_be_replayed, same
from tapegrad.primitive import Primitive
from tapegrad.tensor import Operand, Tensor

on = True  # tests compare with what is interpreted

_MOST_NODES = 256  # compiling takes 0.1 ms a node, as long as interpreting it twenty times
# Programs for tapes of one length that end in one operation (batches of several sizes, targets of
# several losses), and how many tapes may be recorded to find them: forms that never come back
# would else cost a recording each, half as much again as the pass itself. After so many more
# misses old programs are forgotten and everything begins anew: an interactive session goes on.
_MOST_PROGRAMS = 8
_MOST_RECORDINGS = 4 * _MOST_PROGRAMS
_MOST_MISSES = 4096
_MOST_SHELVES = 64

Replay = Callable[[Any, Sequence[Operand], Sequence[Operand], Sequence["Tensor | None"]], Any]


class _Shelf:
    """What is known of the tapes of one length that end in one operation."""

    __slots__ = ("misses", "programs", "written")

    def __init__(self) -> None:
        self.programs: tuple[Replay, ...] = ()  # the latest used first
        self.written: list[tuple[str, dict[str, Any]]] = []  # texts and constants, written once
        self.misses = 0


_shelves: dict[tuple[int, Primitive], _Shelf] = {}
_lock = threading.Lock()


def gradients(
    tape: Any,
    targets: Sequence[Operand],
    sources: Sequence[Operand],
    weights: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return what `tape._interpreted` does, by a program if there is one for such a tape.

    For NumPy's arrays, where nobody records, and where all that is watched was so from the start.
    """
    nodes = tape._nodes
    if not nodes or not on:
        return tape._interpreted(targets, sources, weights)  # type: ignore[no-any-return]
    key = len(nodes), nodes[-1][0]
    shelf = _shelves.get(key)
    if shelf is None:
        if can_be_replayed(key[1]) and key[0] <= _MOST_NODES:
            if len(_shelves) >= _MOST_SHELVES:
                _shelves.clear()
            _shelves[key] = _Shelf()
        return tape._interpreted(targets, sources, weights)  # type: ignore[no-any-return]
    for program in shelf.programs:
        try:
            answers = program(tape, targets, sources, weights)
        except Exception:  # another form of tape, or what the reverse pass will explain
            continue
        if answers is not None:
            if program is not shelf.programs[0]:
                others = [other for other in shelf.programs if other is not program]
                shelf.programs = (program, *others)
            return answers  # type: ignore[no-any-return]
    return _recorded(shelf, tape, targets, sources, weights)


def _recorded(
    shelf: _Shelf,
    tape: Any,
    targets: Sequence[Operand],
    sources: Sequence[Operand],
    weights: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Interpret, and write down what happens if that may lead to a program."""
    shelf.misses += 1
    if shelf.misses > _MOST_MISSES:
        shelf.misses, shelf.programs, shelf.written = 1, (), []
    recording = None
    if shelf.misses <= _MOST_RECORDINGS and len(shelf.programs) < _MOST_PROGRAMS:
        with contextlib.suppress(Refused):
            recording = Recording(tape, targets, sources, weights)
    if recording is None:
        return tape._interpreted(targets, sources, weights)  # type: ignore[no-any-return]
    with alone(recording):
        answers: list[Tensor | None] = tape._interpreted(targets, sources, weights)
    found = recording.finished(answers)
    if found is not None:
        with _lock:
            _keep(shelf, *found)
    return answers


def _keep(shelf: _Shelf, text: str, space: dict[str, Any]) -> None:
    """Compile a text that was written before with the same constants; else note it."""
    for i, (other, constants) in enumerate(shelf.written):
        if other == text:
            if not same(constants, space):
                shelf.written[i] = text, space
            elif len(shelf.programs) < _MOST_PROGRAMS:
                del shelf.written[i]
                shelf.programs = (_compiled(text, space), *shelf.programs)
            return
    shelf.written = [*shelf.written[1 - _MOST_PROGRAMS :], (text, space)]


def _compiled(text: str, space: dict[str, Any]) -> Replay:
    exec(compile(text, "<reverse program>", "exec"), space)  # our own text alone
    # Taken out: a function whose own globals name it would be freed by the collector alone.
    replay: Replay = space.pop("replay")
    return replay
