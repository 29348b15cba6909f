"""Launchers of linear_relu.cu: a dense layer with ReLU, and its gradient up to the GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._build import (
    FLOATING,
    ITEM_BYTES,
    MAX_COLUMNS,
    Array,
    Module,
    Source,
    column_tiles,
    cpp_type,
    pack_width,
    result,
    row_blocks,
    row_chunks,
)
from .cublaslt import Epilogue
from .gemm import Operation, product

_SOURCE = Source(
    "linear_relu.cu",
    *(
        (
            *(
                f"tapegrad_{name}<{t}, {width}>"
                for name in ("bias_relu", "linear_relu_grad")
                for width in (1, 16 // ITEM_BYTES[t])
            ),
            f"tapegrad_sum_partials<{t}>",
        )
        for t in FLOATING
    ),
)


def linear_relu(xp: Module, x: Array, w: Array, b: Array) -> Array | None:
    """Return relu(x @ w + b), shape (n, o), or None for arrays the kernel was not written for.

    x is (n, i), w (i, o), b (o,), of one floating dtype; x and w in any layout. relu(NaN) is NaN.
    """
    if x.ndim != 2 or w.ndim != 2 or b.ndim != 1 or not x.dtype == w.dtype == b.dtype:
        return None
    if x.shape[1] != w.shape[0] or w.shape[1:] != b.shape or 0 in (*x.shape, *w.shape):
        return None
    rows, columns = x.shape[0], w.shape[1]
    if cpp_type(b) is None or columns > MAX_COLUMNS:
        return None
    y = product(LINEAR_RELU, xp, x, w, b)
    if y is None:
        y = _bias_relu(xp, xp.matmul(x, w, out=xp.empty((rows, columns), x.dtype)), b)
    return y


def _bias_relu(xp: Module, y: Array, b: Array) -> Array:
    """Do y = relu(y + b) in place."""
    t = cpp_type(b)
    rows, columns = y.shape
    width = pack_width(xp, str(t), columns, y, b)
    tiles, block = column_tiles(columns // width)
    _SOURCE.kernel(f"tapegrad_bias_relu<{t}, {width}>")(
        (tiles, row_blocks(rows, tiles, block[1])),
        block,
        (y, b, np.int64(rows), np.int32(columns)),
    )
    return y


LINEAR_RELU = Operation("linear_relu", Epilogue.RELU_BIAS, _bias_relu)


def linear_relu_grad(
    xp: Module, g: Array, y: Array, out: Sequence[Array | None] = (None, None)
) -> tuple[Array, Array] | None:
    """Return (gz, gb): g where y > 0 and exactly 0 elsewhere, and its sum over the rows.

    g and y are (n, o), of one floating dtype, C-contiguous. Where y is NaN, gz is 0. The sum is
    accumulated in float32 (float64 for float64), always in the same order. `out` is memory for
    them, used where it is aligned and C-contiguous.
    """
    if g.ndim != 2 or g.shape != y.shape:
        return None
    t = cpp_type(g, y)
    rows, columns = g.shape
    if t is None or columns > MAX_COLUMNS:
        return None
    gz, gb = (
        result(xp, shape, g.dtype, to) for shape, to in zip((g.shape, (columns,)), out, strict=True)
    )
    width = pack_width(xp, t, columns, g, y, gz)
    tiles, block = column_tiles(columns // width)
    chunk, chunks = row_chunks(rows, block[1])
    accumulator = xp.float64 if t == "double" else xp.float32
    partial = xp.empty((chunks, columns), accumulator) if chunks > 1 else None
    _SOURCE.kernel(f"tapegrad_linear_relu_grad<{t}, {width}>")(
        (tiles, chunks),
        block,
        (g, y, gz, gb, partial, np.int64(rows), np.int32(columns), np.int64(chunk)),
    )
    if partial is not None:
        tiles, block = column_tiles(columns)
        _SOURCE.kernel(f"tapegrad_sum_partials<{t}>")(
            (tiles,), block, (partial, gb, np.int32(chunks), np.int32(columns))
        )
    return gz, gb
