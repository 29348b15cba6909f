"""Where an optimiser's parameters lie: one after the other in one buffer, with their slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array
from tapegrad._blocks import BLOCK
from tapegrad._host_memory import neighbours
from tapegrad._storage import Buffer
from tapegrad.variable import Variable, over_memory

# Elements from which copying gradients to one place costs more than a call for each.
_APART = 1 << 16

# Each variable begins at a multiple of so many bytes: what GPU loads and GEMMs want.
_ALIGNMENT = 256


class Run(NamedTuple):
    """Neighbours that all have a gradient: one call of the update."""

    parameters: Variable
    slots: tuple[Variable, ...]
    gradients: Variable
    places: tuple[int, ...]  # of each gradient, from the beginning of the run
    views: tuple[Array, ...]  # of where they go, in their shapes
    # A run for each of them, where that costs less than to gather the gradients: on NumPy, and
    # not in a program, which computes them where they are gathered.
    parts: tuple[Run, ...]
    units: dict[str, float]  # of the slots, by the names under which the update takes them


class Group:
    """Variables that lie in one buffer, one after the other, with slots of the same layout.

    units  what each slot is kept in: in the buffer lie its values divided by it.
    """

    def __init__(
        self, members: list[Variable], slots: Sequence[float], units: dict[str, float]
    ) -> None:
        self._xp = xp = _backend.module_of((members[0]._array,))
        if xp is not np:  # matrices first: what their products do not update is then in one piece
            members = sorted(members, key=lambda v: v.ndim != 2)
        self.members = members
        first = members[0]
        self.dtype = first.dtype
        # A kernel saves nothing by it, and 16 bits have no room for it.
        plain = xp is np and not _backend.runs_kernels(xp)
        self.units = units if plain and self.dtype.itemsize >= 4 else {}
        if len(members) == 1 and first._buffer.shared:  # packed by another optimiser: it stays
            self._places = [0]
            self._flat = first._array.reshape(-1)
            self._buffer = first._buffer
        else:
            self._places, end = self._layout(members)
            (self._flat,) = self._memory(end, [0.0])
            self._buffer = Buffer(self._flat)
            self._buffer.shared = True
            for i, variable in enumerate(members):
                view = self._part(self._flat, i)
                view[...] = variable._array
                variable._place(self._buffer, view)
        self._slots = self._memory(self._flat.size, slots)
        self._slot_buffers = [Buffer(slot) for slot in self._slots]
        # A program updates small slots at once, from the gradients and the scratch behind them.
        small = self._xp is np and self._flat.size <= BLOCK
        self._gradients, *_ = self._memory(self._flat.size, [0.0, 0.0] if small else [0.0])
        self._gradient_buffer = Buffer(self._gradients)
        self._runs: dict[tuple[bool, ...], list[tuple[Run, list[int]]]] = {}

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer that has taken a step cannot be copied or pickled, nor a model that has "
            "one: keep model.get_weights(), or copy the model before it is trained"
        )

    def _memory(self, size: int, values: Sequence[float]) -> list[Array]:
        if self._xp is np:
            return neighbours(size, self.dtype, values)
        return [self._xp.full(size, value, self.dtype) for value in values]

    def _layout(self, members: list[Variable]) -> tuple[list[int], int]:
        """Return where each variable begins, and where the last one ends.

        On NumPy a bias lies directly under its kernel: then a compiled program takes both for one
        matrix. On a GPU all loads are aligned instead.
        """
        unit = max(1, _ALIGNMENT // self.dtype.itemsize)
        places: list[int] = []
        end = 0
        above: tuple[int, ...] = ()
        for variable in members:
            if not (self._xp is np and len(above) == 2 and variable.shape == above[1:]):
                end = -(-end // unit) * unit
            places.append(end)
            end += variable.size
            above = variable.shape
        return places, -(-end // unit) * unit

    def runs(self, present: tuple[bool, ...]) -> list[tuple[Run, list[int]]]:
        """Return the maximal runs of members that have a gradient, each with its members."""
        known = self._runs.get(present)
        if known is None:
            stretches: list[list[int]] = []
            for i, here in enumerate(present):
                if here and i and present[i - 1]:
                    stretches[-1].append(i)
                elif here:
                    stretches.append([i])
            known = self._runs[present] = [(self._run(s), s) for s in stretches]
        return known

    def _run(self, stretch: list[int], padded: bool = True) -> Run:
        start, last = self._places[stretch[0]], stretch[-1]
        end = self._places[last] + self.members[last].size
        if padded and last + 1 == len(self.members):
            end = self._flat.size  # then a write is one of the whole buffer, which is told faster
        part = slice(start, end)
        apart = self._xp is np and end - start >= _APART and len(stretch) > 1
        return Run(
            over_memory(self._buffer, self._flat[part]),
            tuple(
                over_memory(buffer, slot[part])
                for buffer, slot in zip(self._slot_buffers, self._slots, strict=True)
            ),
            over_memory(self._gradient_buffer, self._gradients[part]),
            tuple(self._places[i] - start for i in stretch),
            tuple(self._part(self._gradients, i) for i in stretch),
            tuple(self._run([i], padded=False) for i in stretch) if apart else (),
            {f"unit_of_{name}": unit for name, unit in self.units.items()},
        )

    def _part(self, flat: Array, i: int) -> Array:
        """Return a member's part of a flat array, in its shape."""
        place, member = self._places[i], self.members[i]
        return flat[place : place + member.size].reshape(member.shape)

    def slot_of(self, variable: Variable, name: str, slot: int) -> Array:
        """Return the values of a variable's part of a slot, in its shape."""
        i = next(k for k, member in enumerate(self.members) if member is variable)
        part = self._part(self._slots[slot], i)
        return part * self.units[name] if name in self.units else part


def put_in_a_row(variables: list[Variable]) -> None:
    """Let 0-d Variables lie side by side: one look tells a program whether any has changed."""
    if variables and variables[0].backend == "numpy":
        row = np.array([v._array for v in variables])
        buffer = Buffer(row)
        for i, v in enumerate(variables):
            v._place(buffer, row[i, ...])
