"""Lookups: indices that a program on a GPU computes, kept in range where nobody can look at them.

An operation outside a program looks at its indices first, which waits for the device; a captured
graph cannot. So there every index array goes through a step of its own, before whatever reads or
writes with it: an index out of range is moved into it, what it takes is NaN if it is floating, and
a counter in the device's memory tells. The counters are copied to the host behind each launch, and
looked at when the host has waited for something, or at the next call: then `IndexError` is raised.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad._function.program import Program, Step, Value
from tapegrad._index import SLOT, Index, slot_axes
from tapegrad.primitive import MultiPrimitive, Primitive
from tapegrad.tensor import wrap

_Shape = tuple[int, ...]


class _Uses(NamedTuple):
    """What a step does with index arrays: x[index], with arrays from its input `first` on."""

    shape: _Shape
    template: Index
    first: int


class _Check(NamedTuple):
    """One index array that is looked at: who is told of what."""

    text: str
    where: str


class _Copied(NamedTuple):
    """The counters as they were after a launch, on their way to the host."""

    counts: np.ndarray[Any, Any]
    done: Any  # event
    source: Array  # kept until the copy is done


class Lookups:
    """The index arrays of one program that are looked at on the device.

    at_once  whether each is looked at by the host before it is used, which waits for the device:
             where launches are not captured.
    told     what tells of it on the device, if there is anything to look at: how often each array
             was out of range.
    """

    def __init__(self, program: Program, name: str, xp: Module) -> None:
        """Put the steps that look at indices into the program."""
        self.at_once = True
        self._name = name
        self._xp = xp
        self._checks: list[_Check] = []
        self._safe: dict[tuple[Value, int], tuple[Value, Value]] = {}
        steps: list[Step] = []
        for step in program.steps:
            steps += self._guarded(step)
        program.steps = steps
        self._safe.clear()
        self.told: list[Array] = []
        if self._checks:
            self.told = [xp.zeros(len(self._checks), np.int64)]
        self._known = np.zeros(len(self._checks), np.int64)
        self._copied: list[_Copied] = []
        self._lock = threading.Lock()

    # ---- the steps

    def _guarded(self, step: Step) -> list[Step]:
        """Return the steps that do what a step does, its indices in range."""
        uses = _uses(step)
        if uses is None:
            return [step]
        if any(map(_is_known_mask, step.inputs[uses.first :])):
            uses = self._without_masks(step, uses)
        arrays = step.inputs[uses.first :]
        known = [x.kind == "constant" or x.size == 0 for x in arrays]  # fine when it was recorded
        if not all(known) and not _can_be_looked_at(uses, arrays):
            return [step]
        axes = slot_axes(
            len(uses.shape), uses.template, [len(x.shape) if _is_mask(x) else 1 for x in arrays]
        )
        before: list[Step] = []
        safe, wrong = list(arrays), []
        for i, (x, axis) in enumerate(zip(arrays, axes, strict=True)):
            if known[i]:
                continue
            key = x, uses.shape[axis]
            if key not in self._safe:
                look = self._look(step, x, axis, uses.shape[axis])
                before.append(look)
                self._safe[key] = look.outputs[0], look.outputs[1]
            safe[i], outside = self._safe[key]
            wrong.append(outside)
        step.inputs = (*step.inputs[: uses.first], *safe)
        if step.name != "getitem":
            return [*before, step]
        step.params = {**step.params, "in_range": True}
        (y,) = step.outputs
        if not wrong or y.dtype.kind in "iub":
            return [*before, step]
        taken = Value("result", y.shape, y.dtype)
        step.outputs = (taken,)
        params = {"behind": _axes_behind(len(uses.shape), uses.template)}
        return [*before, step, step.instead(_mark, (taken, *wrong), (y,), params)]

    def _without_masks(self, step: Step, uses: _Uses) -> _Uses:
        """Let a step take the places of boolean constants: else each call looks for them."""
        arrays: list[Value] = []
        template: list[Any] = []
        rest = iter(step.inputs[uses.first :])
        for part in uses.template:
            found = [next(rest)] if part is SLOT else []
            if found and _is_known_mask(found[0]):
                places = _backend.to_numpy(found[0].source._array).nonzero()
                found = [
                    Value("constant", x.shape, x.dtype, wrap(self._xp.asarray(x))) for x in places
                ]
            arrays += found
            template += [SLOT] * len(found) if part is SLOT else [part]
        step.inputs = (*step.inputs[: uses.first], *arrays)
        step.params = {**step.params, "index": tuple(template)}
        return uses._replace(template=tuple(template))

    def _look(self, step: Step, x: Value, axis: int, length: int) -> Step:
        """Return the step that gives an index array in range, and where it was not."""
        text = f"index out of bounds for axis {axis} with size {length}"
        look = functools.partial(self._in_range, len(self._checks), length, text)
        self._checks.append(_Check(f"[{step.name}] {text}", step.where))
        results = [Value("result", x.shape, x.dtype), Value("result", x.shape, np.dtype(bool))]
        return step.instead(MultiPrimitive(step.name, look), (x,), results)

    def _in_range(
        self, number: int, length: int, text: str, xp: Module, index: Array
    ) -> tuple[Array, Array]:
        least, most = -length, length - 1
        at_once = self.at_once or xp is np
        if at_once and (int(index.min()) < least or int(index.max()) > most):
            raise IndexError(text)
        kind = np.iinfo(index.dtype)  # numbers beyond it are no numbers of this type
        safe = xp.clip(index, max(least, int(kind.min)), min(most, int(kind.max)))
        wrong = safe != index
        if at_once:  # there is none
            return safe, wrong
        count = self.told[0][number : number + 1]
        xp.add(count, wrong.any(), out=count)
        return safe, wrong

    # ---- telling

    def follow(self, counts: Array) -> None:
        """Look at the counters, as a launch has left them, once the device has come so far.

        counts  a copy that nobody writes to.
        """
        cuda = self._xp.cuda
        memory = cuda.alloc_pinned_memory(counts.nbytes)  # else the copy would be waited for
        host = np.frombuffer(memory, counts.dtype, counts.size)
        stream = cuda.get_current_stream()
        counts.get(stream=stream, out=host, blocking=False)
        done = stream.record(cuda.Event(disable_timing=True))
        with self._lock:
            if not self._copied:
                _backend.after_waiting.append(self.look)
            self._copied.append(_Copied(host, done, counts))

    def look(self) -> None:
        """Raise `IndexError` where the counters that have arrived tell of an index out of range."""
        with self._lock:
            arrived = [x.counts for x in self._copied if x.done.done]
            if not arrived:
                return
            self._copied = [x for x in self._copied if not x.done.done]
            if not self._copied:
                _backend.after_waiting.remove(self.look)
            counts = np.max(arrived, axis=0)
            new = np.flatnonzero(counts > self._known)
            self._known = np.maximum(counts, self._known)
        if new.size:
            check = self._checks[new[0]]
            raise IndexError(
                f"{check.text}, at {check.where}, in a call of {self._name} before. A CUDA graph "
                "does not stop for it: floating values that were taken so are NaN, others any, and "
                "Variables may have been written with them. With tg.config.debug = True the call "
                "itself raises, before anything is written"
            )


def _uses(step: Step) -> _Uses | None:
    """Return what index arrays a step reads or writes with, or None where they are known."""
    name, params = step.name, step.params
    if name == "getitem" and not params.get("in_range") and len(step.inputs) > 1:
        return _Uses(step.inputs[0].shape, params["index"], 1)
    if name == "row_numbers":
        return _Uses((params["rows"],), (SLOT,), 0)
    if name == "places":
        return _Uses(params["shape"], params["index"], 0)
    if name in ("assign", "assign_add", "assign_sub") and len(step.inputs) > 1:
        return _Uses(step.writes[0].shape, params["index"], 1)
    return None


def _can_be_looked_at(uses: _Uses, arrays: Sequence[Value]) -> bool:
    """Tell whether there are steps for it.

    A boolean array's places are looked for on the host; an empty axis has none that is in range;
    and where a number stands apart from the arrays, NumPy and CuPy order the axes differently.
    """
    numbers = any(isinstance(part, int) for part in uses.template)
    _, apart = _advanced(uses.template)
    return not (any(map(_is_mask, arrays)) or 0 in uses.shape or (numbers and apart))


def _is_known_mask(x: Value) -> bool:
    return _is_mask(x) and x.kind == "constant" and x.shape != ()


def _is_mask(x: Value) -> bool:
    return x.dtype.kind == "b"


def _advanced(index: Index) -> tuple[int, bool]:
    """Return the place of an index's last array or number, and whether others lie between them."""
    places = [i for i, part in enumerate(index) if part is SLOT or isinstance(part, int)]
    return places[-1], places[-1] - places[0] + 1 != len(places)


def _axes_behind(rank: int, index: Index) -> int:
    """Return how many axes of x[index] come after those of the index arrays."""
    last, apart = _advanced(index)
    rest = rank - sum(part is not None and part is not Ellipsis for part in index)
    parts = index if any(part is Ellipsis for part in index) else (*index, Ellipsis)
    others = parts if apart else parts[last + 1 :]  # apart: then the arrays' axes come first
    return sum(
        rest if part is Ellipsis else part is None or isinstance(part, slice) for part in others
    )


def _nan_where(xp: Module, y: Array, *wrong: Array, behind: int) -> Array:
    mask = functools.reduce(xp.logical_or, wrong)
    return xp.where(mask.reshape(mask.shape + (1,) * behind), y.dtype.type(math.nan), y)


_mark = Primitive("nan_where", _nan_where)
