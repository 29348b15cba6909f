"""What stands between the brackets of x[...]: a template, and the arrays in it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._recording import state, tell_leaving
from tapegrad.tensor import Operand, Tensor, as_array, wrap


class _Slot:
    """Stands in an index for an array, which is an input of the operation."""

    def __repr__(self) -> str:
        return "array"


SLOT: Final = _Slot()
FULL = slice(None)

Index = tuple[Any, ...]


def filled(index: Index, arrays: tuple[Array, ...]) -> Index:
    rest = iter(arrays)
    return tuple(next(rest) if part is SLOT else part for part in index)


def slot_axes(rank: int, index: Index, taken: Sequence[int]) -> list[int]:
    """Return the axis at which each slot of an index of a tensor of this rank begins.

    taken  how many axes each slot's array takes: 1, or a boolean array's own number.
    """
    rest = iter(taken)
    counts = [
        next(rest) if part is SLOT else 0 if part is None or part is Ellipsis else 1
        for part in index
    ]
    axes: list[int] = []
    axis = 0
    for part, count in zip(index, counts, strict=True):
        if part is SLOT:
            axes.append(axis)
        axis += rank - sum(counts) if part is Ellipsis else count
    return axes


def parse(index: Any, xp: Module) -> tuple[Index, list[Tensor]]:
    """Split what stands between the brackets into a template and the arrays of its slots."""
    kind = type(index)
    if kind is int or kind is slice:
        return (index,), []
    parts: list[Any] = []
    arrays: list[Tensor] = []
    for part in index if isinstance(index, tuple) else (index,):
        if part is None or part is Ellipsis:
            parts.append(part)
        elif isinstance(part, slice):
            parts.append(slice(*map(_bound, (part.start, part.stop, part.step))))
        elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
            parts.append(int(part))
        else:
            parts.append(SLOT)
            arrays.append(index_array(part, xp))
    return tuple(parts), arrays


def _bound(value: Any) -> int | None:
    return None if value is None else operator.index(value)


def index_array(part: Any, xp: Module) -> Tensor:
    if isinstance(part, Operand):
        array = part._read()
    elif isinstance(part, list) and not part:
        array = wrap(xp.zeros(0, np.int64))
    else:
        try:
            array = wrap(as_array(part, xp=xp))
        except (TypeError, ValueError) as error:
            raise IndexError(f"[getitem] {error}") from None
    if array.dtype.kind not in "iub":
        raise IndexError(
            "[getitem] an index is an integer, a slice, None, ..., or an array of integers or "
            f"booleans, got {array.dtype}"
        )
    if state.recorders and array.dtype.kind == "b":
        tell_leaving(array, "choosing by a boolean index, whose number of results varies,")
    return array
