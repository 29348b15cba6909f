"""What is measured on the GPU itself: time, by events in its queue, and the memory of CuPy."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol


class DeviceClock(Protocol):
    """Marks two moments in the GPU's own queue; reading them waits for the second."""

    def start(self) -> None:
        """Mark the beginning."""

    def stop(self) -> None:
        """Mark the end."""

    def seconds(self) -> float:
        """Return the time between the marks."""


class _CuPyClock:
    def __init__(self) -> None:
        import cupy

        self._cuda = cupy.cuda
        self._first, self._last = cupy.cuda.Event(), cupy.cuda.Event()

    def start(self) -> None:
        self._first.record()

    def stop(self) -> None:
        self._last.record()

    def seconds(self) -> float:
        self._last.synchronize()
        return float(self._cuda.get_elapsed_time(self._first, self._last)) / 1e3


class _TorchClock:
    def __init__(self) -> None:
        import torch

        self._first: Any = torch.cuda.Event(enable_timing=True)
        self._last: Any = torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        self._first.record()

    def stop(self) -> None:
        self._last.record()

    def seconds(self) -> float:
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1e3


def device_clock(library: str | None) -> DeviceClock | None:
    """Return a clock that reads events through "cupy" or "torch"; None for None."""
    if library is None:
        return None
    return _CuPyClock() if library == "cupy" else _TorchClock()


def most_memory_of_cupy() -> Callable[[], int]:
    """Begin to note the bytes that CuPy's pools take; return what tells the most so far.

    All of them: a captured graph has one of its own, and the default one is emptied for it.
    """
    import cupy

    def taken() -> int:
        pools = [x for x in gc.get_objects() if type(x) is cupy.cuda.MemoryPool]
        return sum(pool.total_bytes() for pool in pools)

    class Noting(cupy.cuda.MemoryHook):
        name = "benchmarks"
        most = 0

        def alloc_postprocess(self, **_: Any) -> None:  # a pool has asked the device for more
            self.most = max(self.most, taken())

    hook = Noting()
    hook.__enter__()  # for as long as the process lives
    return lambda: max(hook.most, taken())
