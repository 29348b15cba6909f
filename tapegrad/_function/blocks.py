"""Blocks: runs of elementwise calls on large arrays, done block by block in cache, over threads.

One call after the other would read and write every array from memory; block by block, what the
next call needs is still in cache, and what only the run itself needs never leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array
from tapegrad._blocks import BLOCK, LARGE, for_rows, lanes
from tapegrad._function.lowering import Fresh, Line, Lowering, Place
from tapegrad._function.own_calls import OWN_CALLS

# Blocks from which rows that all blocks share are written out for a whole one: a call on arrays of
# one shape takes two thirds of the time of one that spreads a row, which four blocks pay back.
_MANY = 8


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

    lines    the calls, and products with ones, by which rows are summed on the way.
    shape    of the arrays.
    scratch  numbers of the arrays that only the calls themselves need: of these, blocks are made.
    locals_  numbers of those that it is called with.
    lanes    over how many threads.
    spare    where scratch lies.
    """

    __name__ = "run"

    def __init__(
        self,
        lines: Sequence[Line],
        shape: tuple[int, ...],
        scratch: dict[Place, int],
        locals_: dict[Place, int],
        lanes: int,
        spare: _Spare,
    ) -> None:
        spare.begin()
        self._rows = shape[0]
        self._lanes = lanes
        self._block = min(self._rows, max(1, BLOCK * shape[0] // int(np.prod(shape))))
        sums = [line.operands for line in lines if line.sums_rows]
        # Where each sum goes: the number of a local, or an array.
        self._sums = [locals_[out] if out in locals_ else out.bind() for _, _, out in sums]
        # For each lane, the sum of one block, and of all of them.
        self._partial = [np.zeros((lanes, 2, *shape[1:]), ones.dtype) for ones, _, _ in sums]
        own = [
            [spare.take((self._block, *shape[1:]), place.dtype) for place in scratch]
            + [np.ones(self._block, ones.dtype) for ones, _, _ in sums]
            for _ in range(lanes)
        ]
        written = _Blocks(self._block, own, shape, scratch, locals_, spare)
        for line in lines:
            if not line.sums_rows:
                written.call(line)
        for i, ((_, x, _), partial) in enumerate(zip(sums, self._partial, strict=True)):
            written.sum(x, len(scratch) + i, partial)
        self._work = written.compile()
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
            partial[:, 1].sum(0, out=arrays[out] if isinstance(out, int) else out)


class _Blocks:
    """Writes a function that does the calls for one block, as lines of Python.

    Blocks of 1 << 16 numbers take 5 us a call; looking up which operand is what took 1 of them.

    own     scratch of each lane, for whole blocks.
    spare   where rows are spread to, if there are so many blocks that it pays.
    spread  these rows, and the blocks that they are copied to before each run.
    """

    def __init__(
        self,
        block: int,
        own: list[list[Array]],
        shape: tuple[int, ...],
        scratch: dict[Place, int],
        locals_: dict[Place, int],
        spare: _Spare,
    ) -> None:
        self._block, self._own, self._shape, self._spare = block, own, shape, spare
        self._scratch, self._locals = scratch, locals_
        self._spreads = len(shape) > 1 and shape[0] >= _MANY * block
        self._lines: list[str] = []
        self._names: dict[Any, str] = {}
        self._space: dict[str, Any] = {"own": own, "block": block, **OWN_CALLS}
        self._taken: list[str] = []
        self.spread: list[tuple[Array, Array]] = []

    def call(self, line: Line) -> None:
        name = line.text.partition("(")[0]
        self._space.setdefault(name, getattr(np, name, None))
        self._lines.append(line.text.format(*map(self._name, line.operands)))

    def sum(self, x: Place, ones: int, partial: Array) -> None:
        name = self._bind(partial)
        self._space["add"] = np.add
        self._lines.append(f"one, total = {name}[lane]")
        self._lines.append(f"k{ones}.dot({self._name(x)}, one)")
        self._lines.append("add(total, one, total)")

    def _bind(self, x: Any) -> str:
        name = f"c{len(self._space)}"
        self._space[name] = x
        return name

    def _name(self, place: Place) -> str:
        inside = place.root in self._scratch
        array = None if inside or place in self._locals else place.bind()
        key = place if array is None else id(array)  # places may show the same array
        if key not in self._names:
            self._names[key] = self._scratch_name(place) if inside else self._block_of(place, array)
        return self._names[key]

    def _scratch_name(self, place: Place) -> str:
        name = f"k{self._scratch[place.root]}"
        return name if place.bits is None else f"{name}.view({self._bind(place.bits)})"

    def _block_of(self, place: Place, array: Array) -> str:
        whole = f"x{self._locals[place]}" if array is None else self._bind(array)
        shape = place.shape
        if len(shape) == len(self._shape) and shape[0] == self._shape[0] > 1:
            name = f"b{len(self._taken)}"
            self._taken.append(f"{name} = {whole}[s]")
            return name
        if array is not None and self._spreads and shape == self._shape[1:]:
            return self._spread(array)
        return whole

    def _spread(self, row: Array) -> str:
        """Return the name of a whole block of copies of a row, one that all lanes read."""
        whole = self._spare.take((self._block, *row.shape), row.dtype)
        self.spread.append((row, whole))
        name = f"w{len(self.spread)}"
        self._taken.append(f"{name} = {self._bind(whole)}[:n]")
        return name

    def compile(self) -> Callable[..., Callable[[slice, int], None]]:
        """Return a function that takes the locals, and returns one of a block and a lane."""
        scratch = [f"k{i}" for i in range(len(self._own[0]))]
        lines = ["n = s.stop - s.start"]
        if scratch:
            lines.append(f"{', '.join(scratch)}, = own[lane]")
            cut = "; ".join(f"{name} = {name}[:n]" for name in scratch)
            lines.append(f"if n != block: {cut}")
        names = ", ".join(f"x{i}" for i in self._locals.values())
        text = f"def bind({names}):\n  def work(s, lane):\n"
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
        fits = matrix.shape == shape and _by_rows(matrix)
    else:
        fits = _shape(line) == shape
    calls = [call for call in before if not _makes_array(call)]
    written = {call.operands[-1].root for call in calls}
    sums = {call.operands[-1].root for call in calls if call.sums_rows}  # known at the end only
    return fits and not any(
        place.root in sums or (place.root in written and not _is_whole(place))
        for place in line.operands
    )


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
    """Tell whether rows of a place can be taken, unless a run writes what it is a view of.

    That a gradient in an optimiser's buffer can be: a block of its transpose needs all of it.
    """
    return place.kind == "static" or _is_whole(place)


def _is_whole(place: Place) -> bool:
    """Tell whether rows of a place are rows of what it shows: no view but that of its bits."""
    return place.root is place or place.bits is not None


def _run(
    lines: Sequence[Line],
    shape: tuple[int, ...],
    users: dict[Place, set[Line]],
    lowered: Lowering,
    spare: _Spare,
) -> Line:
    scratch: dict[Place, int] = {}
    locals_: dict[Place, int] = {}
    arrays: list[Place] = []
    for line in lines:
        for place in line.operands:
            root = place.root
            inside = users[root].issubset(lines)
            if root.kind == "arena" and inside and root.shape == shape and root not in lowered.kept:
                scratch.setdefault(root, len(scratch))
            elif place.kind == "local":
                locals_.setdefault(place, len(locals_))
            else:
                arrays.append(place)
    line = Line("{}(" + ", ".join(["{}"] * len(locals_)) + ")", (None, *locals_, *arrays))
    # Once the arena has its memory.
    line.make = lambda: Run(lines, shape, scratch, locals_, _lanes(shape, lowered), spare)
    return line
