"""Blocks: runs of elementwise calls on large arrays, done block by block in cache, over threads.

One call after the other would read and write every array from memory; block by block, what the
next call needs is still in cache, and what only the run itself needs never leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapegrad._backend import Array
from tapegrad._blocks import BLOCK, LARGE, for_rows, lanes
from tapegrad._function.lowering import Fresh, Line, Lowering, Place
from tapegrad._function.own_calls import OWN_CALLS


class _Operand(NamedTuple):
    """An operand of a call: an array, a local's position, or scratch; whether blocks take rows."""

    array: Array
    local: int
    scratch: int
    rows: bool


# Blocks from which rows that all blocks share are written out for a whole one: a call on arrays of
# one shape takes two thirds of the time of one that spreads a row.
_MANY = 32


class _Spare:
    """Memory for blocks that the runs of a program use in turn.

    With some of its own for each, a net of 60 layers took 60 MB more than without compiling.
    """

    def __init__(self) -> None:
        self._buffers: list[Array] = []
        self._taken = 0

    def begin(self) -> None:
        """Let the next run have it."""
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return memory that this run has not taken yet."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffers, i = self._buffers, self._taken
        self._taken += 1
        if i == len(buffers):
            buffers.append(np.empty(size, np.uint8))
        elif buffers[i].size < size:  # who has the smaller one keeps it
            buffers[i] = np.empty(size, np.uint8)
        return buffers[i][:size].view(dtype).reshape(shape)


class Run:
    """Elementwise calls on arrays of the same rows, made for one block of rows after the other.

    calls    texts of calls, with braces for their operands, of which the last is written.
    sums     matrices whose rows are summed on the way, where the sums go, and their types.
    scratch  shapes of rows, and types, of what only the calls themselves need.
    lanes    over how many threads.
    spare    where that lies.
    """

    __name__ = "run"

    def __init__(
        self,
        calls: Sequence[tuple[str, list[_Operand]]],
        sums: Sequence[tuple[_Operand, _Operand, Any]],
        shape: tuple[int, ...],
        scratch: Sequence[tuple[tuple[int, ...], Any]],
        locals_: int,
        lanes: int,
        spare: _Spare,
    ) -> None:
        spare.begin()
        self._rows = shape[0]
        self._lanes = lanes
        self._block = min(self._rows, max(1, BLOCK * shape[0] // int(np.prod(shape))))
        self._sums = [out for _, out, _ in sums]
        # For each lane, the sum of one block, and of all of them.
        self._partial = [np.zeros((lanes, 2, *shape[1:]), dtype) for _, _, dtype in sums]
        own = [
            [spare.take((self._block, *tail), dtype) for tail, dtype in scratch]
            + [np.ones(self._block, dtype) for _, _, dtype in sums]
            for _ in range(lanes)
        ]
        written = _Blocks(
            self._block,
            own,
            shape if len(shape) > 1 and self._rows >= _MANY * self._block else None,
            spare,
        )
        for text, operands in calls:
            written.call(text, operands)
        for i, ((x, _, _), partial) in enumerate(zip(sums, self._partial, strict=True)):
            written.sum(x, len(scratch) + i, partial)
        self._work = written.compile(locals_)
        self._spread = written.spread

    def __call__(self, *arrays: Array) -> None:
        """Do the calls, with these arrays as the locals."""
        for partial in self._partial:
            partial[:, 1] = 0
        for row, whole in self._spread:
            whole[...] = row
        work = self._work(*arrays)
        for_rows(self._rows, self._block, self._lanes, work, fixed=bool(self._sums))
        for out, partial in zip(self._sums, self._partial, strict=True):
            partial[:, 1].sum(0, out=arrays[out.local] if out.local >= 0 else out.array)


class _Blocks:
    """Writes a function that does the calls for one block, as lines of Python.

    Blocks of 1 << 16 numbers take 5 us a call; looking up which operand is what took 1 of them.

    own     scratch of each lane, for whole blocks.
    shape   of the arrays, if there are so many blocks that rows are better spread.
    spare   where they are spread to.
    spread  rows, and the blocks that they are copied to before each run.
    """

    def __init__(
        self, block: int, own: list[list[Array]], shape: tuple[int, ...] | None, spare: _Spare
    ) -> None:
        self._block, self._own, self._shape, self._spare = block, own, shape, spare
        self._lines: list[str] = []
        self._names: dict[Any, str] = {}
        self._space: dict[str, Any] = {"own": own, "block": block, **OWN_CALLS}
        self._taken: list[str] = []
        self.spread: list[tuple[Array, Array]] = []

    def call(self, text: str, operands: Sequence[_Operand]) -> None:
        name = text.partition("(")[0]
        self._space.setdefault(name, getattr(np, name, None))
        self._lines.append(text.format(*map(self._name, operands)))

    def sum(self, x: _Operand, ones: int, partial: Array) -> None:
        name = self._bind(partial)
        self._space["add"] = np.add
        self._lines.append(f"one, total = {name}[lane]")
        self._lines.append(f"k{ones}.dot({self._name(x)}, one)")
        self._lines.append("add(total, one, total)")

    def _bind(self, x: Any) -> str:
        name = f"c{len(self._space)}"
        self._space[name] = x
        return name

    def _name(self, operand: _Operand) -> str:
        array, local, spare, rows = operand
        key = local, spare, rows, id(array) if spare < 0 else array
        known = self._names.get(key)
        if known is not None:
            return known
        if spare >= 0:
            name = f"k{spare}" if array is None else f"k{spare}.view({self._bind(array)})"
        else:
            whole = f"x{local}" if local >= 0 else self._bind(array)
            if rows:
                name = f"b{len(self._taken)}"
                self._taken.append(f"{name} = {whole}[s]")
            elif array is not None and self._shape is not None and array.shape == self._shape[1:]:
                name = self._spread(array)
            else:
                name = whole
        self._names[key] = name
        return name

    def _spread(self, row: Array) -> str:
        """Return the name of a whole block of copies of a row, one that all lanes read."""
        whole = self._spare.take((self._block, *row.shape), row.dtype)
        self.spread.append((row, whole))
        name = f"w{len(self.spread)}"
        self._taken.append(f"{name} = {self._bind(whole)}[:n]")
        return name

    def compile(self, locals_: int) -> Callable[..., Callable[[slice, int], None]]:
        """Return a function that takes the locals, and returns one of a block and a lane."""
        scratch = [f"k{i}" for i in range(len(self._own[0]))]
        lines = ["n = s.stop - s.start"]
        if scratch:
            lines.append(f"{', '.join(scratch)}, = own[lane]")
            cut = "; ".join(f"{name} = {name}[:n]" for name in scratch)
            lines.append(f"if n != block: {cut}")
        text = f"def bind({', '.join(f'x{i}' for i in range(locals_))}):\n  def work(s, lane):\n"
        text += "".join(f"    {line}\n" for line in [*lines, *self._taken, *self._lines])
        exec(compile(text + "  return work\n", "<blocks>", "exec"), self._space)  # our own text
        return self._space.pop("bind")  # type: ignore[no-any-return]


def in_blocks(lowered: Lowering) -> None:
    """Replace runs of elementwise calls on large arrays of one shape by `Run`s."""
    users: dict[Place, set[Line]] = {}
    for line in (*lowered.early, *lowered.late):
        for operand in line.operands:
            if isinstance(operand, Place):
                users.setdefault(operand.root, set()).add(line)
    spare = _Spare()
    for lines in (lowered.early, lowered.late):
        lines[:] = _with_runs(lines, users, lowered, spare)


def _with_runs(
    lines: Sequence[Line], users: dict[Place, set[Line]], lowered: Lowering, spare: _Spare
) -> list[Line]:
    kept: list[Line] = []
    start = 0
    while start < len(lines):
        end = start + 1
        shape = _shape(lines[start])
        while shape and end < len(lines) and _joins(lines[end], lines[start:end], shape):
            end += 1
        part = lines[start:end]
        if shape and (len(part) > 1 or _lanes(shape, lowered) > 1):
            kept += [line for line in part if _makes_array(line)]
            calls = [line for line in part if not _makes_array(line)]
            kept.append(_run(calls, shape, users, lowered, spare))
        else:
            kept += part
        start = end
    return kept


def _lanes(shape: tuple[int, ...], lowered: Lowering) -> int:
    return lanes(int(np.prod(shape)), beside_products=lowered.multiplies)


def _joins(line: Line, before: Sequence[Line], shape: tuple[int, ...]) -> bool:
    """Tell whether a line can be part of the run of the lines before it, of arrays of a shape."""
    if _makes_array(line):
        return True
    if line.sums_rows:
        matrix = line.operands[1]
        return matrix.shape == shape and _by_rows(matrix)
    if _shape(line) != shape:
        return False
    sums = {call.operands[-1].root for call in before if call.sums_rows}  # known at the end only
    return not any(place.root in sums for place in line.operands)


def _makes_array(line: Line) -> bool:
    """Tell whether a line makes a new array for a result: that can be done before a run."""
    return isinstance(line.operands[-1] if line.operands else None, Fresh)


def _shape(line: Line) -> tuple[int, ...] | None:
    """Return the shape of an elementwise call's result, if blocks of its rows may be computed."""
    if not line.elementwise:
        return None
    *inputs, out = line.operands
    shape: tuple[int, ...] = out.shape
    if len(shape) < 1 or int(np.prod(shape)) < LARGE or not _by_rows(out):
        return None
    for x in inputs:
        if not isinstance(x, Place) or not _by_rows(x):
            return None
        if len(x.shape) > len(shape) or any(
            n not in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False)
        ):
            return None
    return shape


def _by_rows(place: Place) -> bool:
    """Tell whether rows of a place are rows of what it shows: no view but that of its bits."""
    return place.kind == "static" or place.root is place or place.bits is not None


def _run(
    lines: Sequence[Line],
    shape: tuple[int, ...],
    users: dict[Place, set[Line]],
    lowered: Lowering,
    spare: _Spare,
) -> Line:
    scratch: list[tuple[tuple[int, ...], Any]] = []
    number: dict[Place, int] = {}
    locals_: list[Place] = []
    arrays: list[Place] = []
    calls: list[tuple[Line, list[tuple[Place, bool]]]] = []
    for line in lines:
        operands = []
        for place in line.operands:
            root = place.root
            rows = len(place.shape) == len(shape) and place.shape[0] == shape[0] > 1
            inside = users[root].issubset(lines)
            if root.kind == "arena" and inside and root.shape == shape and root not in lowered.kept:
                if root not in number:
                    number[root] = len(scratch)
                    scratch.append((shape[1:], root.dtype))
            elif place.kind == "local":
                if place not in locals_:
                    locals_.append(place)
            else:
                arrays.append(place)
            operands.append((place, rows))
        calls.append((line, operands[1:] if line.sums_rows else operands))

    def make() -> Run:
        """Build the run once the arena has its memory."""
        bound: list[tuple[str, list[_Operand]]] = []
        sums: list[tuple[_Operand, _Operand, Any]] = []
        for line, operands in calls:
            given = []
            for place, rows in operands:
                if place.root in number:
                    given.append(_Operand(place.bits, -1, number[place.root], rows))
                elif place.kind == "local":
                    given.append(_Operand(None, locals_.index(place), -1, rows))
                else:
                    given.append(_Operand(place.bind(), -1, -1, rows))
            if line.sums_rows:
                sums.append((given[0], given[1], operands[0][0].dtype))
            else:
                bound.append((line.text, given))
        return Run(bound, sums, shape, scratch, len(locals_), _lanes(shape, lowered), spare)

    line = Line("{}(" + ", ".join(["{}"] * len(locals_)) + ")", (None, *locals_, *arrays))
    line.make = make
    return line
