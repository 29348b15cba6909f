"""Prefetching: what comes next is made on another thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tapegrad._blocks import on_another_thread

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
    iterator = iter(items)

    def take() -> _T | object:
        return next(iterator, _END)

    coming = on_another_thread(take)
    while (item := coming.result()) is not _END:
        coming = on_another_thread(take)
        yield item  # type: ignore[misc]
