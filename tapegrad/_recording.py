"""Who listens while operations run: tapes, and the recorders of compiled functions."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, Protocol

import numpy as np

# Frames of these files are never "the user's line": ours, NumPy's (whose functions call ours), and
# the `with` machinery between.
_OWN_FILES = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(np.__file__)) + os.sep,
    contextlib.__file__,
)

Call = tuple[CodeType, int]  # the code that makes it, and at which instruction


class Recorder(Protocol):
    """What listens to primitives while it is active on a thread.

    lasting  whether it hears everything, `no_record` and the reverse pass included: a compiled
             function's recorder. A tape hears what it watches, and can be told to overlook things.
    since    versions of Variables with smaller ids are not what a reading gives while it listens.
    """

    lasting: bool
    since: int

    def record(
        self,
        primitive: Any,
        inputs: Sequence[Any],
        outputs: tuple[Any, ...],
        params: dict[str, Any],
        node: Any,
    ) -> Any:
        """Note one call; `node` is what another recorder made of the same call, or None."""

    def accessed(self, variable: Any, version: Any) -> None:
        """Note that `variable` was read and gave `version`."""

    def writing(self, variable: Any) -> None:
        """Note that `variable` is about to change."""

    def watches(self, x: Any) -> bool:
        """Tell whether what is computed from `x` now is recorded."""


class LastingRecorder(Recorder, Protocol):
    """What a recorder that hears everything is told beside."""

    def updated(self, update: Any, inputs: Sequence[Any], params: dict[str, Any]) -> None:
        """Note a write that has happened."""

    def leaving(self, x: Any, how: str) -> None:
        """Note that values of `x` go to where nothing of them can be recorded."""

    def copied(self, x: Any, copy: Any) -> None:
        """Note that `copy` was made a constant of x's values."""

    def created(self, variable: Any) -> None:
        """Note that a Variable was made."""


class _ThreadState(threading.local):
    """What is active on this thread; every thread starts with nothing."""

    def __init__(self) -> None:
        self.recorders: list[Any] = []


state = _ThreadState()


def lasting() -> list[Any]:
    """Return the recorders of this thread that hear everything."""
    return [recorder for recorder in state.recorders if recorder.lasting]


@contextlib.contextmanager
def only(recorders: Sequence[Any]) -> Iterator[None]:
    """Let these recorders listen in a `with` block, and those that hear everything."""
    outer = state.recorders
    heard = lasting()
    state.recorders = heard + [r for r in recorders if not r.lasting]
    try:
        yield
    finally:
        state.recorders = outer


@contextlib.contextmanager
def alone(recorder: Any) -> Iterator[None]:
    """Let nobody else listen in a `with` block, not even those that hear everything."""
    outer, state.recorders = state.recorders, [recorder]
    try:
        yield
    finally:
        state.recorders = outer


class PassRecorder:
    """What recorders of one reverse pass share: alone, they hear what its rules call."""

    lasting = True
    since = 0

    def watches(self, _: Any) -> bool:
        """Say no: what is only for tapes need not be done for a recording."""
        return False


class no_record(contextlib.ContextDecorator):
    """Hide what happens in a `with` block, on this thread, from every tape that is active.

    Also a decorator. A tape that is opened inside the block records as usual.

    >>> import tapegrad as tg
    >>> x = tg.Variable(3.0)
    >>> with tg.GradientTape() as tape:
    ...     with tg.no_record():
    ...         y = x * x
    >>> tape.gradient(y, x) is None
    True
    """

    __slots__ = ("_outer",)

    def _recreate_cm(self) -> no_record:
        return no_record()  # each call of a decorated function has a block of its own

    def __enter__(self) -> None:
        self._outer = state.recorders
        state.recorders = lasting() if state.recorders else []

    def __exit__(self, *exception: object) -> None:
        state.recorders = self._outer


def is_recording(*operands: Any) -> bool:
    """Tell whether a tape that is active on this thread watches one of the operands."""
    for recorder in state.recorders:  # any() of a generator takes twice as long
        for x in operands:
            if recorder.watches(x):
                return True
    return False


def tell_leaving(x: Any, how: str) -> None:
    """Tell those that hear everything that values of `x` become plain Python or NumPy values."""
    for recorder in state.recorders:
        if recorder.lasting:
            recorder.leaving(x, how)


def tell_copied(x: Any, copy: Any) -> None:
    """Tell those that hear everything that a tensor was copied, which is no operation on a tape."""
    for recorder in state.recorders:
        if recorder.lasting:
            recorder.copied(x, copy)


@functools.lru_cache(maxsize=1024)  # a notebook's cells are files too
def _is_own(file: str) -> bool:
    return file.startswith(_OWN_FILES)


def user_call() -> Call:
    """Return the innermost call that is not tapegrad's own, to be told by `told`."""
    frame = sys._getframe(1)
    code = frame.f_code
    while _is_own(code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
    return code, frame.f_lasti


def told(call: Call) -> str:
    """Return a call as `file:line`; finding the line takes 0.3 us, so it is done on demand."""
    code, instruction = call
    line = next(itertools.islice(code.co_positions(), instruction // 2, None))[0]
    return f"{code.co_filename}:{line or code.co_firstlineno}"


def user_location() -> str:
    """Return `file:line` of the innermost call that is not tapegrad's own."""
    return told(user_call())
