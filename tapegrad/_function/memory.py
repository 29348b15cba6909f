"""Memory: which arrays of a program lie where in one arena, by when they are needed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tapegrad._function.lowering import Line, Place
from tapegrad._host_memory import ALIGNMENT, give_back_freed_memory

_LARGE = 1 << 24  # bytes of an arena for which it pays to look at the heap, some milliseconds


def place_in_arena(lines: list[Line], kept: Iterable[Place]) -> int:
    """Give every arena place an offset; return how many bytes the arena takes.

    Two places share memory only if the last line that names one comes before the first line that
    names the other. Large ones are placed first, each at the lowest offset where it fits: for
    interval graphs of this kind that is within a few per cent of the least.
    """
    first: dict[Place, int] = {}
    last: dict[Place, int] = {}
    for position, line in enumerate(lines):
        for operand in line.operands:
            if isinstance(operand, Place):
                _note(operand, position, first, last)
    for place in kept:
        _note(place, len(lines), first, last)
    placed: list[Place] = []
    total = 0
    for place in sorted(first, key=lambda p: (-p.nbytes, first[p])):
        size = _room_for(place)
        offset = 0
        busy = sorted(
            (other.offset, other.offset + _room_for(other))
            for other in placed
            if first[other] <= last[place] and first[place] <= last[other]
        )
        for begin, end in busy:
            if begin - offset >= size:
                break
            offset = max(offset, end)
        place.offset = offset
        placed.append(place)
        total = max(total, offset + size)
    return total


def _room_for(place: Place) -> int:
    return -(-max(place.nbytes, 1) // ALIGNMENT) * ALIGNMENT


def _note(place: Place, position: int, first: dict[Place, int], last: dict[Place, int]) -> None:
    """Note that a line names a place, and so what its array may show."""
    for root in place.holds:
        _note(root, position, first, last)
    root = place.root
    if root.kind == "arena":
        first.setdefault(root, position)
        last[root] = position


def allocate(lines: list[Line], size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Make the arena, and give every arena place its array in it."""
    if size >= _LARGE:
        give_back_freed_memory()
    memory = np.empty(size + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    arena = memory[skip : skip + size]
    for line in lines:
        for operand in line.operands:
            if isinstance(operand, Place) and operand.kind == "arena":
                root = operand.root
                if root.array is None:
                    part = arena[root.offset : root.offset + root.nbytes]
                    root.array = part.view(root.dtype).reshape(root.shape)
                operand.bind()
    return arena
