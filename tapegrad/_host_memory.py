"""Host memory: what one step frees is kept for the next, where the C library would give it back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad._backend import byte_bounds, owner_of

# mallopt's parameters and their numbers in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 1 << 30  # bytes that are free at the end of the heap
_LARGEST = 32 << 20  # bytes of one array, the most that glibc takes from the heap


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; return whether it does. Elsewhere nothing happens.

    A step frees all its activations at once. glibc then gives them back to the system, and the
    next step pays for a page fault every 4 KiB: 784-512-512-10 in batches of 128 took 1.6 times as
    long. `TAPEGRAD_KEEP_MEMORY=0` leaves glibc alone, and so do glibc's own settings.
    """
    if os.environ.get("TAPEGRAD_KEEP_MEMORY") == "0" or any(
        name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    ):
        return False
    library = _glibc()
    return library is not None and bool(
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
    )


def give_back_freed_memory() -> None:
    """Give what is kept back to the system: before much is taken that would not come from there.

    A compiled program's memory is one array. With the activations of the calls that were recorded
    still kept beside it, 60 layers of 512 took 1.19 GB where they take 0.69.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library if it is glibc, which has both functions; else None."""
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None


ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


def aligned(shape: int | tuple[int, ...], dtype: Any, value: float) -> Any:
    """Return an array that begins where a cache line does, with `value` everywhere.

    NumPy's own begin 16 bytes further: calls on arrays of some 1,000 numbers take 6 % longer there.
    """
    size = int(np.prod(shape, dtype=np.int64))
    return neighbours(size, dtype, [value])[0].reshape(shape)


def neighbours(size: int, dtype: Any, values: Sequence[float]) -> list[Any]:
    """Return an array for each value, each of `size` times it, that lie one behind the other.

    Views are known by the array that they are of, not by what lies beside it.
    """
    dtype = np.dtype(dtype)
    memory = np.empty(len(values) * size * dtype.itemsize + ALIGNMENT, np.uint8)
    start, shared = -memory.ctypes.data % ALIGNMENT, memory.data
    arrays = []
    for value in values:
        array = np.frombuffer(shared, dtype, size, start)
        array[...] = value
        arrays.append(array)
        start += array.nbytes
    return arrays


def spanning(first: Any, second: Any) -> Any:
    """Return the array that shows two 1-D ones, if the second begins where the first ends."""
    if not (first.ndim == second.ndim == 1 and first.dtype == second.dtype and first.size):
        return None
    shared, other = owner_of(first).base, owner_of(second).base
    if not (type(shared) is type(other) is memoryview and shared.obj is other.obj):
        return None
    (low, middle), (begin, _) = byte_bounds(first), byte_bounds(second)
    if middle != begin or not (first.flags.c_contiguous and second.flags.c_contiguous):
        return None
    start = low - np.frombuffer(shared, np.uint8).ctypes.data
    return np.frombuffer(shared, first.dtype, first.size + second.size, start)


def following(array: Any) -> Any:
    """Return the neighbour of the same size that lies behind an array, if there is one.

    Of a part of an array nothing follows but the rest of it.
    """
    whole = owner_of(array)
    shared = whole.base
    if type(shared) is not memoryview or whole.size != array.size:
        return None
    start = byte_bounds(whole)[1] - np.frombuffer(shared, np.uint8).ctypes.data
    if start + whole.nbytes > shared.nbytes:
        return None
    return np.frombuffer(shared, whole.dtype, whole.size, start)
