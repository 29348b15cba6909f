"""Mini-batches of arrays, shuffled anew each epoch by one seed."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

from tapegrad._recording import no_record
from tapegrad._structure import flatten_with_paths, map_structure
from tapegrad.ops.arguments import as_tensor
from tapegrad.ops.creation import to_backend
from tapegrad.ops.indexing import getitem, rows_at
from tapegrad.random import Generator, default_generator
from tapegrad.tensor import Tensor


class Batches:
    """The rows of one or more arrays in mini-batches; each iteration is an epoch.

    arrays      a structure of arrays or Tensors with equally many rows; batches have its structure.
    batch_size  rows in a batch; the last may have fewer.
    shuffle     whether the rows come in a new random order in every epoch.
    seed        of that order; None draws it from the common stream (`tg.random.seed`).
    drop_last   whether a smaller last batch is left out.

    Raises `ValueError` for unequal numbers of rows and for batch_size < 1.

    >>> batches = tg.data.Batches(([1.0, 2.0, 3.0], [1, 2, 3]), batch_size=2)
    >>> [y.tolist() for x, y in batches]
    [[1, 2], [3]]
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.batch_size = operator.index(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        self._arrays = _tensors(arrays)
        rows = {path: _rows(path, x) for path, x in flatten_with_paths(self._arrays, "arrays")}
        if len(set(rows.values())) != 1:
            listed = ", ".join(f"{path} has {n}" for path, n in rows.items())
            raise ValueError(
                f"all arrays must have equally many rows: {listed or 'there are none'}"
            )
        self.rows = next(iter(rows.values()))
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._generator = Generator(seed) if seed is not None else default_generator()

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(self.rows, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of one epoch."""
        order = self._order()
        for i in range(len(self)):
            yield self._batch(order, i)

    def _order(self) -> Tensor | None:
        """Return the order of the rows in a new epoch, None for the one in which they lie."""
        return self._generator.permutation(self.rows) if self.shuffle else None

    def _batch(self, order: Tensor | None, i: int) -> Any:
        part = slice(i * self.batch_size, (i + 1) * self.batch_size)
        with no_record():  # the caller's tapes see what the caller does
            return map_structure(partial(_part, order, part), self._arrays)


def _tensors(arrays: Any) -> Any:
    """Make every array a Tensor; tuples and dicts hold arrays, a list is one."""
    if isinstance(arrays, tuple):
        parts = [_tensors(x) for x in arrays]
        return type(arrays)(*parts) if hasattr(arrays, "_fields") else tuple(parts)
    if isinstance(arrays, dict):
        return {key: _tensors(x) for key, x in arrays.items()}
    return as_tensor(arrays)


def _rows(path: str, x: Tensor) -> int:
    if x.ndim == 0:
        raise ValueError(f"{path} is a 0-d tensor and has no rows")
    return x.shape[0]


def _part(order: Tensor | None, part: slice, x: Tensor) -> Tensor:
    if order is None:
        return getitem(x, part)
    rows = getitem(order, part)
    return rows_at(x, rows if rows.backend == x.backend else to_backend(rows, x.backend))
