"""CUDA graphs: where a program's launches are captured, and from then on replayed by one launch.

What a graph holds are addresses, so whatever lies at them must stay: the graph's memory comes from
a pool of its own, from which nothing else is ever taken, and the arrays that the program reads from
outside are kept. The rules of capturing are kept here and nowhere else:

- a stream of its own, and one for the second branch, which rejoins it before the end;
- no garbage collection, which may free an event or a stream in the middle;
- one capture at a time in the process: collection is switched for all threads;
- a capture that fails is ended, or its stream could never be used again.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tapegrad._backend import Array, Module
from tapegrad._function.replay import Writes

# Launches a program on the workplace's streams, for these inputs; returns the result arrays.
Issue = Callable[[Sequence[Array]], list[Array]]

_capturing = threading.Lock()


class Workplace:
    """The streams and the memory in which a program is launched, and then captured.

    What was launched on these streams once has left behind what a capture must not make: compiled
    kernels, loaded modules, library handles, free memory of the right sizes.
    """

    def __init__(self, xp: Module) -> None:
        self.xp = xp
        self.pool = xp.cuda.MemoryPool()
        self.streams = [xp.cuda.Stream(non_blocking=True) for _ in range(2)]
        self._finished = xp.cuda.Event(disable_timing=True)
        self._begun = xp.cuda.Event(disable_timing=True)
        self._recorded: list[Any] = []

    def record(self, branch: int) -> Any:
        """Return an event that is done when all is that a branch was given so far."""
        event = self.streams[branch].record(self.xp.cuda.Event(disable_timing=True))
        self._recorded.append(event)
        return event

    def forget(self) -> None:
        """Let go of the events: a capture must not see one freed before its end."""
        self._recorded.clear()

    def allocator(self) -> Any:
        """Let new arrays of a `with` block lie in this workplace's memory."""
        return self.xp.cuda.using_allocator(self.pool.malloc)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Any]:
        """Give the caller's stream, on which all of the call before is done: it had another."""
        caller = self.xp.cuda.get_current_stream()
        caller.wait_event(self._finished)
        try:
            yield caller
        finally:
            caller.record(self._finished)

    def launch(self, issue: Callable[[], list[Array]]) -> list[Array]:
        """Launch a program on the streams that will capture it, within a `turn`.

        Returns copies of the results, made on the caller's stream.
        """
        caller, main = self.xp.cuda.get_current_stream(), self.streams[0]
        main.wait_event(caller.record(self._begun))
        try:
            with self.allocator(), main:
                results = issue()
        finally:
            for branch in range(len(self.streams)):  # both: an error leaves them apart
                caller.wait_event(self.record(branch))
            self.forget()
        return [array.copy() for array in results]


class Graph:
    """Launches that were captured, the memory that they work in, and what they read.

    workplace  in which the program has run; the graph takes it over.
    inputs     arrays like those that calls will give; None for one that the program does not use.
    kept       other arrays that the program reads.
    """

    def __init__(
        self,
        workplace: Workplace,
        issue: Issue,
        inputs: Sequence[Array | None],
        kept: Sequence[Array] = (),
    ) -> None:
        self._kept = list(kept)
        self._workplace = workplace
        xp = workplace.xp
        with _without_collection():
            with workplace.allocator():
                self._inputs = [None if x is None else xp.empty(x.shape, x.dtype) for x in inputs]
            self._graph, self._results = _capture(workplace, issue, self._inputs)
            workplace.forget()

    @property
    def nbytes(self) -> int:
        """The memory that the graph has of its own."""
        return int(self._workplace.pool.total_bytes())

    def launch(self, arrays: Sequence[Array | int | None], around: Writes) -> list[Array]:
        """Replay the launches on the caller's stream; return copies of the results.

        arrays  the inputs; a Python number fills one, and None leaves it as it was.
        around  what surrounds a write to Variables: the launch is one.
        """
        with self._workplace.turn() as stream:
            for mine, given in zip(self._inputs, arrays, strict=True):
                if mine is not None and given is not None:
                    mine[...] = given
            around.begin()
            try:
                self._graph.launch(stream)
            except BaseException as error:
                around.failed(error)
                raise
            finally:
                around.end()
            return [array.copy() for array in self._results]


def _capture(
    workplace: Workplace, issue: Issue, inputs: Sequence[Array | None]
) -> tuple[Any, list[Array]]:
    main = workplace.streams[0]
    with workplace.allocator(), main:
        main.begin_capture()
        try:
            results = issue(inputs)
        except BaseException:
            with contextlib.suppress(Exception):  # it says again what has gone wrong
                main.end_capture()
            raise
        return main.end_capture(), results


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    with _capturing:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()
