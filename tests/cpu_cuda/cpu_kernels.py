"""Run the project's launchers on the CPU: with xp=numpy they launch the real sources."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cpu_cuda import RawModule, why_not

from tapegrad.kernels import _build


# Made once for each setting, so that a kernel built in one test is found again in the next.
@functools.cache
def _builder(mode: str, order: int, change: tuple[str, str] | None) -> Callable[..., Any]:
    def build(*, code: str, **arguments: Any) -> RawModule | _OneByOne:
        if change is None:
            return RawModule(code, mode=mode, order=order, **arguments)
        assert code.count(change[0]) == 1, f"{change[0]!r} is not once in the source"
        return _OneByOne(code.replace(*change), mode=mode, order=order)

    return build


class _OneByOne:
    """A module that builds a kernel when it is first launched: a fault is found by one or two."""

    def __init__(self, code: str, **options: Any) -> None:
        self._module = functools.cache(
            lambda name: RawModule(code, name_expressions=(name,), **options)
        )

    def get_function(self, name: str) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._module(name).get_function(name)(*arguments, **options)

        return launch


@contextmanager
def kernels_on_cpu(
    mode: str = "fast", order: int = 0, change: tuple[str, str] | None = None
) -> Iterator[None]:
    """Build kernels for the CPU inside this `with` block; skip the test where that cannot be.

    `mode` is "fast", "asan" or "tsan"; `order` 0 for threads in index order, 1 for the reverse,
    else the seed of a random order. `change` plants a fault: (a text that is once in the source,
    what to put in its place).
    """
    problem = why_not(mode)
    if problem:
        pytest.skip(problem)
    before = _build.raw_module
    _build.raw_module = _builder(mode, order, change)
    try:
        yield
    finally:
        _build.raw_module = before


def read_only(*arrays: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the arrays, marked so that a kernel that writes to one raises `KernelError`."""
    for array in arrays:
        array.flags.writeable = False
    return arrays


def misaligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a C-contiguous copy whose address is no multiple of 16: no kernel may load packs."""
    memory = np.empty(array.size + 1, array.dtype)
    copy = memory[1:].reshape(array.shape)
    copy[...] = array
    return copy
