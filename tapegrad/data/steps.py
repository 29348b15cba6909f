"""Steps: a step function on mini-batches of arrays, several steps a call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from tapegrad._function.device import DeviceReplay, Feed
from tapegrad._function.dispatch import Function, Method, function
from tapegrad._recording import no_record, state
from tapegrad._structure import flatten, leaves_where, map_structure, unflatten
from tapegrad.data.batches import Batches
from tapegrad.ops.creation import arange, to_backend
from tapegrad.ops.indexing import getitem
from tapegrad.ops.shape import reshape, stack
from tapegrad.tensor import Tensor


class Steps:
    """A step function that is run on mini-batches, several of them a call; one iteration an epoch.

    step      what is done with a batch: called as `step(*batch)` where batches are tuples, else as
              `step(batch)`. It is compiled (`tapegrad.function`), unless it is already.
    batches   the mini-batches, with their order and size.
    per_call  steps a call.

    Each iteration yields a call's results: the structure that the step returns, every tensor in it
    with a first axis that has one entry for each step, all else as the last step gave it. A call
    takes fewer steps at the end of an epoch, and a last batch that is smaller comes in a call of
    its own. On a GPU a call is one launch of a CUDA graph that gathers the batches from the arrays
    on the device, so that Python's work for a call is shared by its steps; elsewhere it is a loop,
    with the same results.

    Raises `TypeError` for other batches than `Batches`, `ValueError` for per_call < 1 and for
    results of a call that are not of one structure.

    >>> w = tg.Variable(0.0)
    >>> def step(x, y):
    ...     with tg.GradientTape() as tape:
    ...         loss = tg.mean((w * x - y) ** 2)
    ...     w.assign_sub(0.1 * tape.gradient(loss, w))
    ...     return loss
    >>> batches = tg.data.Batches(([1.0, 2.0, 1.0, 2.0], [3.0, 6.0, 3.0, 6.0]), 1)
    >>> for losses in tg.data.Steps(step, batches, per_call=2):
    ...     print(losses.shape)
    (2,)
    (2,)
    """

    def __init__(self, step: Callable[..., Any], batches: Batches, per_call: int = 16) -> None:
        if not isinstance(batches, Batches):
            raise TypeError(
                f"Steps needs a tapegrad.data.Batches, got a {type(batches).__name__}: "
                "Batches(arrays, batch_size)"
            )
        self.per_call = operator.index(per_call)
        if self.per_call < 1:
            raise ValueError(f"per_call must be at least 1, got {per_call!r}")
        self._step = step if isinstance(step, (Function, Method)) else function(step)
        self._compiled = self._step if isinstance(self._step, Function) else self._step._bound
        self._batches = batches
        self._feed: Feed | None = None
        self._like: tuple[Any, ...] | None = None  # a whole batch, of which all have the types

    def __len__(self) -> int:
        """Return the number of calls in an epoch."""
        full, rest = divmod(self._batches.rows, self._batches.batch_size)
        return -(-full // self.per_call) + (rest > 0 and not self._batches.drop_last)

    def __iter__(self) -> Iterator[Any]:
        """Take the steps of one epoch, and yield each call's results."""
        return (results for _, results in self.epoch())

    def epoch(self) -> Iterator[tuple[int, Any]]:
        """Take the steps of one epoch, and yield each call's number of steps and its results."""
        batches = self._batches
        order = batches._order()
        rows = functools.cache(functools.partial(self._rows, order))
        full = batches.rows // batches.batch_size
        for first in range(0, full, self.per_call):
            numbers = range(first, min(first + self.per_call, full))
            answer = None
            if len(numbers) == self.per_call > 1 and not state.recorders:
                answer = self._by_one_launch(order, rows, first)
            yield len(numbers), self._one_by_one(order, numbers) if answer is None else answer[0]
        for last in range(full, len(batches)):
            yield 1, self._one_by_one(order, range(last, last + 1))

    def _one_by_one(self, order: Tensor | None, numbers: range) -> Any:
        results = [self._take(self._arguments(order, i)) for i in numbers]
        last = results[-1]
        rows = [leaves_where(last, x, "a step's result", "that of one before") for x in results]
        leaves = [
            stack(column) if isinstance(column[-1], Tensor) else column[-1]
            for column in map(list, zip(*rows, strict=True))
        ]
        return unflatten(last, leaves)

    def _take(self, arguments: tuple[Any, ...]) -> Any:
        result = self._step(*arguments)
        if not self._compiled._leased:
            return result
        # The next step's results would lie where these do.
        return map_structure(lambda x: +x if isinstance(x, Tensor) else x, result)

    def _by_one_launch(
        self, order: Tensor | None, rows: Callable[[], Any], first: int
    ) -> list[Any] | None:
        """Return the results of a call, in a list, or None where it cannot be one launch."""
        if self._like is None:
            self._like = self._arguments(order, first)
        replay = self._compiled._replay_of(self._like, {})
        if not isinstance(replay, DeviceReplay):
            return None
        if self._feed is None:
            arrays = [x._array for x in flatten(self._batches._arrays)]
            self._feed = Feed(arrays, rows(), self.per_call)
        self._feed.order = rows()
        leaves = replay.run_many(self._feed, first)
        return None if leaves is None else [unflatten(replay.structure, leaves)]

    def _arguments(self, order: Tensor | None, i: int) -> tuple[Any, ...]:
        batch = self._batches._batch(order, i)
        return batch if type(batch) is tuple else (batch,)

    def _rows(self, order: Tensor | None) -> Any:
        """Return the rows of all batches that are whole, (batches, batch size), where they lie."""
        size = self._batches.batch_size
        with no_record():
            full = self._batches.rows // size * size
            rows = arange(full) if order is None else getitem(order, slice(0, full))
            like = flatten(self._batches._arrays)[0]
            return to_backend(reshape(rows, (-1, size)), like.backend)._array
