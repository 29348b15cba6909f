"""The memory that Variables lie in, and who still reads it: so that a write never changes a value.

A Tensor is a value and never changes; a Variable is state and changes in place. Reading a
Variable gives a Tensor that shares its memory. So before memory is written, every Tensor that
still shows it (the read, or any view made from it) is given a copy of its own. In a training loop
nothing holds such a Tensor any more, and nothing is copied.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from tapegrad._backend import Array, byte_bounds, owner_of


class _HoldsArray(Protocol):
    _array: Array


class _Member(Protocol):
    _array: Array
    _tensor: Any


# Buffers by the id of the array that owns their memory. A Buffer holds that array, so the id stays
# its own for as long as the entry lives.
_buffers: dict[int, weakref.ref[Buffer]] = {}

# How often a Variable was given a place in memory: compiled programs hold places.
placements = 0


class Buffer:
    """One allocation that holds the values of one or more Variables.

    shared  whether an optimiser has put its variables here, one after the other.
    shown   whether a Tensor may show what lies here: then a write must be announced.
    """

    __slots__ = ("__weakref__", "_members", "_prune_at", "_tensors", "array", "shared", "shown")

    def __init__(self, array: Array) -> None:
        self.array = array
        self.shared = False
        self.shown = False
        self._members: list[weakref.ref[_Member]] = []
        self._tensors: list[weakref.ref[_HoldsArray]] = []
        self._prune_at = 32
        key = id(owner_of(array))
        _buffers[key] = weakref.ref(self, lambda _: _buffers.pop(key, None))

    def add_member(self, variable: _Member) -> None:
        """Note that `variable` lies here, so that a write ends its current version."""
        self._members = [ref for ref in self._members if ref() is not None]
        self._members.append(weakref.ref(variable))

    def register(self, tensor: _HoldsArray) -> None:
        """Note that `tensor` shows memory of this buffer."""
        self.shown = True
        tensors = self._tensors
        if len(tensors) >= self._prune_at:  # a program that reads for ever and never writes
            self._tensors = tensors = [ref for ref in tensors if ref() is not None]
            self._prune_at = max(32, 2 * len(tensors))
        tensors.append(weakref.ref(tensor))

    def before_write(self, target: Array) -> None:
        """End the versions that `target` shows, and move the Tensors that still read them."""
        # With one member the target is all there is to overlap: the bounds (2 us) need no asking.
        if len(self._members) <= 1 or target.size == self.array.size:
            for member_ref in self._members:
                if (member := member_ref()) is not None:
                    member._tensor = None
            for ref in self._tensors:
                if (tensor := ref()) is not None:
                    tensor._array = tensor._array.copy()
            self._tensors = []
            self.shown = False
            return
        low, high = byte_bounds(target)
        for member_ref in self._members:
            member = member_ref()
            if member is not None and _overlaps(member._array, low, high):
                member._tensor = None
        kept = []
        for ref in self._tensors:
            tensor = ref()
            if tensor is None:
                continue
            if _overlaps(tensor._array, low, high):
                tensor._array = tensor._array.copy()
            else:
                kept.append(ref)
        self._tensors = kept

    def revoke(self, instead: Any) -> None:
        """Let all Tensors that show this memory have something else instead of their arrays."""
        for ref in self._tensors:
            tensor = ref()
            if tensor is not None:
                tensor._array = instead
        self._tensors.clear()
        self.shown = False


def _overlaps(array: Array, low: int, high: int) -> bool:
    first, end = byte_bounds(array)
    return first < high and low < end


def register_view(tensor: _HoldsArray) -> None:
    """Register a Tensor whose array is a view, if what it is a view of is a Variable's memory."""
    ref = _buffers.get(id(owner_of(tensor._array)))
    if ref is not None:
        buffer = ref()
        if buffer is not None:
            buffer.register(tensor)


def lies_in_buffer(array: Array) -> bool:
    """Tell whether an array shows a Variable's memory, which a later write may change."""
    return id(owner_of(array)) in _buffers
