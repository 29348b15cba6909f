"""Work on long flat arrays in blocks that stay in cache, over a few threads when it pays."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# Elements. Smaller blocks stay nearer to the cores, but between all calls a thread takes Python's
# lock, and is woken some microseconds late where another holds it: at 1 << 16 two threads over bias
# and ReLU (4096, 4096) take 1.2 times as long, and at 1 << 18 over a chain of five arrays too. From
# 460,800 on OpenBLAS spreads sums of rows over threads of its own, which wait for each other.
BLOCK = 1 << 17
LARGE = 1 << 18  # elements: below, all arrays of some work lie in a second-level cache anyway
# From here on two threads beat one; below, handing work over costs more than it saves.
_THREADS_FROM = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            from concurrent.futures import ThreadPoolExecutor

            _pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tapegrad")
        return _pool


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked child
    os.register_at_fork(after_in_child=_forget_pool)


def lanes(size: int, *, beside_products: bool = False) -> int:
    """Return how many threads pay for so many elements.

    beside_products  whether matrices are multiplied shortly before. OpenBLAS's threads stay busy
                     for some 26 ms after a product, in case there comes another, and ours would
                     share their cores: nets take 2 % longer with two threads than with one. Where
                     its threads are told to sleep at once (OPENBLAS_THREAD_TIMEOUT=18), two save
                     1 % of a large net's step, but to wake its own costs a middling one 5 %.
    """
    return 1 if beside_products or size < _THREADS_FROM else _THREADS


def loss_rows(classes: int) -> int:
    """Return how many rows of a cross-entropy are a block: of two arrays, where a run has many."""
    return max(1, 2 * BLOCK // classes)


def for_rows(
    rows: int, block: int, count: int, work: Callable[[slice, int], None], *, fixed: bool = False
) -> None:
    """Call `work(slice, lane)` on slices of `block` rows that cover all, in any order.

    One lane's calls come one after the other: what they use for scratch can be shared by lane.

    count  of lanes, each a thread.
    fixed  whether the same lane gets the same blocks each time: for sums that must not depend on
           which thread was faster. Else each lane takes the next block that is left.
    """
    starts = range(0, rows, block)
    if count == 1:
        _lane(work, block, rows, 0, iter(starts))
        return
    share = -(-len(starts) // count)
    left = iter(starts)  # shared: Python's lock makes taking the next one a single step
    taken = [
        iter(starts[first : first + share]) if fixed else left
        for first in range(0, len(starts), share)
    ]
    # Each lane but this thread's own in a copy of its context: NumPy keeps there what it warns of.
    others = [
        _threads().submit(contextvars.copy_context().run, _lane, work, block, rows, i, each)
        for i, each in enumerate(taken)
        if i
    ]
    problem: BaseException | None = None
    try:
        _lane(work, block, rows, 0, taken[0])
    except BaseException as error:
        problem = error
    _wait(others, problem)


def _wait(lanes: list[Future[None]], problem: BaseException | None) -> None:
    """Wait for all lanes, Ctrl-C or not: they write to memory that is used again; then raise."""
    for lane in lanes:
        while not lane.done():
            try:
                lane.exception()
            except BaseException as interrupt:  # of this thread, not of the lane
                problem = problem or interrupt
    for lane in lanes:
        problem = problem or lane.exception()
    if problem is not None:
        raise problem


def _lane(
    work: Callable[[slice, int], None], block: int, rows: int, lane: int, starts: Iterator[int]
) -> None:
    for first in starts:
        work(slice(first, min(first + block, rows)), lane)
