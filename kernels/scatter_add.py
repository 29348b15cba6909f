"""Launchers of scatter_add.cu and links.cu: rows added up by index, deterministically."""

from __future__ import annotations

import numpy as np

from ._build import (
    FLOATING,
    MAX_COLUMNS,
    THREADS,
    Array,
    Module,
    Source,
    column_tiles,
    cpp_type,
    grid,
    row_blocks,
)

_SOURCE = Source("scatter_add.cu", *((f"tapegrad_scatter_add<{t}>",) for t in FLOATING))
_LINKS = Source("links.cu", ("tapegrad_links", "tapegrad_sorted_links"))
# Up to so many entries every pair is looked at, 2^30 of them. CuPy's sort, which more entries need,
# waits for the device at its end: a graph that is captured cannot hold it.
_FEW = 1 << 15


def scatter_add(xp: Module, values: Array, index: Array, rows: int) -> Array | None:
    """Return an array (rows, columns) whose row r is the sum of the values[i] with index[i] == r.

    values is (n, columns), floating and C-contiguous; index (n,), int64, C-contiguous, each
    entry 0 <= index[i] < rows (not checked). Else the answer is None. The sum runs in the order
    of i, accumulated in float32 (float64 for float64).
    """
    if values.ndim != 2 or index.shape != values.shape[:1] or index.dtype != np.int64:
        return None
    t = cpp_type(values)
    count, columns = values.shape
    if t is None or rows == 0 or columns > MAX_COLUMNS or not index.flags.c_contiguous:
        return None
    out, link = xp.zeros((rows, columns), values.dtype), xp.empty(count, np.int64)
    if count <= _FEW:
        _LINKS.kernel("tapegrad_links")(
            (-(-count // THREADS),), (THREADS,), (index, link, np.int64(count))
        )
    else:
        order = xp.argsort(index, kind="stable")
        _LINKS.kernel("tapegrad_sorted_links")(
            grid(count), (THREADS,), (index, order, link, np.int64(count))
        )
    tiles, block = column_tiles(columns)
    _SOURCE.kernel(f"tapegrad_scatter_add<{t}>")(
        (tiles, row_blocks(count, tiles, block[1])),
        block,
        (values, index, link, out, np.int64(count), np.int32(columns)),
    )
    return out
