"""print: showing values while a program runs, in every call of a compiled function too."""

from __future__ import annotations

import builtins
from typing import Any

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad.primitive import Update
from tapegrad.tensor import Operand


def _show(xp: Module, *arrays: Array, parts: tuple[str | None, ...], sep: str, end: str) -> None:
    values = iter(arrays)
    texts = [str(_backend.to_numpy(next(values))) if p is None else p for p in parts]
    builtins.print(*texts, sep=sep, end=end)


_print = Update("print", _show, writes=0)


def print(*values: Any, sep: str = " ", end: str = "\n") -> None:
    """Print values on standard output as Python's `print` does: tensors, text and anything else.

    In a compiled function (`tapegrad.function`) Python's own `print` runs while it is recorded
    only; this one prints the tensors' values in every call.

    >>> x = tg.constant([1.0, 2.0])
    >>> tg.print("x is", x)
    x is [1. 2.]
    """
    parts = tuple(None if isinstance(value, Operand) else str(value) for value in values)
    tensors = [value._read() for value in values if isinstance(value, Operand)]
    _print(*tensors, parts=parts, sep=sep, end=end)
