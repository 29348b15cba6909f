"""Launchers of small_gemm.cu: products of small float32 matrices, with what follows them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._build import THREADS, Array, Module, Source, column_tiles, pack_width, row_blocks

_WIDTH = 4  # floats in 16 bytes
# The tiles' sides, and the values along each that a thread holds.
_TILES = {16: 4, 32: 4, 64: 8}
_LAYOUTS = ("true, false", "true, true", "false, false")  # x @ w, x @ v.T, v.T @ w
_SOURCE = Source(
    "small_gemm.cu",
    *(
        tuple(f"tapegrad_small_gemm<{side}, {each}, {layout}>" for layout in _LAYOUTS)
        for side, each in _TILES.items()
    ),
    tuple(f"tapegrad_small_gemm_sum<{width}>" for width in (1, _WIDTH)),
)
_PACKED_X, _PACKED_W, _PACKED_Y = 1, 2, 4
_STAGED = 2048  # floats of an operand in shared memory at once: so deep is a stage, times its side
_MOST_WORK = 1 << 29  # multiplications: 512 x 1024 x 1024; far below, a library has filled the GPU
_MAX_GRID = 65535  # down, the hardware's
_MAX_PARTS = 32


class Variant(NamedTuple):
    """A way to make a product: tiles of this side, the inner index cut into so many parts."""

    side: int
    parts: int

    @property
    def name(self) -> str:
        """Return it in a word, for the file of times."""
        return f"small {self.side}x{self.parts}"


def variants(x: Array, w: Array, multiprocessors: int) -> list[Variant]:
    """Return what to try for x @ w on a device; none for what `product` was not written for.

    x is (rows, inner), w (inner, columns), float32; each with dense rows or dense columns.
    """
    if x.dtype != np.float32 or x.ndim != 2 or w.ndim != 2 or _layout(x, w) is None:
        return []
    (rows, inner), columns = x.shape, w.shape[1]
    if not 0 < rows * inner * columns <= _MOST_WORK:
        return []
    found = []
    for side in _TILES:
        down = -(-(rows + 1) // side)
        if down > _MAX_GRID:
            continue
        found.append(Variant(side, 1))
        # As many parts as give each multiprocessor a block, but a stage of work to each at least.
        free = multiprocessors // (down * -(-columns // side))
        parts = min(free, -(-inner // (_STAGED // side)), _MAX_PARTS)
        if parts > 1:
            found.append(Variant(side, parts))
    return found


def _layout(x: Array, w: Array) -> tuple[str, Array, Array] | None:
    """Return how a pair lies, and both as C-contiguous arrays; None where there is no kernel."""
    x_along, w_across = bool(x.flags.c_contiguous), bool(w.flags.c_contiguous)
    if not (x_along or x.flags.f_contiguous) or not (w_across or w.flags.f_contiguous):
        return None
    layout = f"{x_along}, {not w_across}".lower()
    return (layout, x if x_along else x.T, w if w_across else w.T) if layout in _LAYOUTS else None


def product(
    xp: Module,
    variant: Variant,
    x: Array,
    w: Array,
    y: Array,
    *,
    bias: Array | None = None,
    relu: bool = False,
    gate: Array | None = None,
    sums: Array | None = None,
) -> Array:
    """Do y = x @ w, and what follows it; return y. x and w are such as `variants` has answered to.

    bias  (columns,): added to every row.
    relu  let y = max(y, 0) then, NaN kept.
    gate  (rows, columns): y is exactly 0 where this is not above 0.
    sums  (columns,): becomes the sum of w over its rows.
    """
    found = _layout(x, w)
    assert found is not None
    layout, x_memory, w_memory = found
    (rows, inner), columns = x.shape, w.shape[1]
    side, parts = variant
    depth = _STAGED // side
    chunk = -(-inner // parts // depth) * depth
    parts = -(-inner // chunk)
    height = rows + (sums is not None)
    partial = xp.empty((parts, height, columns), np.float32) if parts > 1 else None
    results = [a for a in (y, gate, sums, partial) if a is not None]
    width = pack_width(xp, "float", columns, *results)
    packed = (
        _PACKED_X * (pack_width(xp, "float", x_memory.shape[1], x_memory) == _WIDTH)
        + _PACKED_W * (pack_width(xp, "float", w_memory.shape[1], w_memory) == _WIDTH)
        + _PACKED_Y * (width == _WIDTH)
    )
    _SOURCE.kernel(f"tapegrad_small_gemm<{side}, {_TILES[side]}, {layout}>")(
        (-(-columns // side), -(-height // side), parts),
        (THREADS,),
        (
            *(x_memory, w_memory, y, bias, gate, sums, partial),
            *(np.int32(rows), np.int32(columns), np.int32(inner), np.int32(chunk)),
            *(np.int32(relu), np.int32(packed)),
        ),
    )
    if partial is not None:
        tiles, block = column_tiles(columns // width)
        _SOURCE.kernel(f"tapegrad_small_gemm_sum<{width}>")(
            (tiles, row_blocks(height, tiles, block[1])),
            block,
            (
                *(partial, y, bias, gate, sums),
                *(np.int32(parts), np.int32(rows), np.int32(columns), np.int32(relu)),
            ),
        )
    return y
