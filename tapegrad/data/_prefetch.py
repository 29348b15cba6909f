"""Prefetching: what comes next is made on another thread."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")
_END = object()


def prefetch(items: Iterable[_T]) -> Iterator[_T]:
    """Yield the items of an iterable, the next one made on another thread while one is in use.

    items  batches, say: any iterable whose making of the next item does not depend on what is done
           with the last one.

    It pays where making an item takes long and leaves Python alone meanwhile, as NumPy, reading
    files and waiting do: gathering batches of 400 KB takes some 8 % of a small net's epoch. A
    shuffled `Batches` of such arrays does it by itself. No tape hears of what is done there, and
    random numbers of the common stream may be drawn before the caller's own or after them: give
    the iterable a `tg.random.Generator`. What making an item raises is raised in its place.

    >>> [batch.tolist() for batch in tg.data.prefetch(tg.data.Batches([1, 2, 3], 2))]
    [[1, 2], [3]]
    """
    from concurrent.futures import ThreadPoolExecutor  # takes 5 ms to import

    iterator = iter(items)

    def take() -> _T | object:
        return next(iterator, _END)

    # A thread of its own: one that waits for another iterable's, or for blocks, keeps nobody up.
    with ThreadPoolExecutor(1, thread_name_prefix="tapegrad-prefetch") as thread:
        coming = thread.submit(contextvars.copy_context().run, take)
        while (item := coming.result()) is not _END:
            coming = thread.submit(contextvars.copy_context().run, take)
            yield item  # type: ignore[misc]
