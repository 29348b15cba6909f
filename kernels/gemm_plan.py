"""Row-major products as cuBLASLt's column-major problems: arithmetic on shapes, no GPU needed.

y = x @ w in row-major memory is, read column by column, y' = w' x': so A is w, B is x, and no
epilogue has to know of rows (a bias, one value for each column of y, is one for each row of y').
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from . import cublaslt

Shape = tuple[int, ...]


class Type(NamedTuple):
    """How cuBLASLt computes with the elements of a dtype."""

    data: cublaslt.DataType
    compute: cublaslt.Compute
    scale: cublaslt.DataType  # of alpha and beta
    # cublasLtReductionScheme_t: in which types the parts of a split sum may lie. A sum of parts
    # that were rounded to 16 bits would not be one in float32.
    reductions: int


_ANY_TYPE, _COMPUTE_TYPE = 7, 2
TYPES = {
    "float32": Type(
        cublaslt.DataType.FLOAT32, cublaslt.Compute.FLOAT32, cublaslt.DataType.FLOAT32, _ANY_TYPE
    ),
    "float64": Type(
        cublaslt.DataType.FLOAT64, cublaslt.Compute.FLOAT64, cublaslt.DataType.FLOAT64, _ANY_TYPE
    ),
    "float16": Type(
        *(cublaslt.DataType.FLOAT16, cublaslt.Compute.FLOAT32, cublaslt.DataType.FLOAT32),
        _COMPUTE_TYPE,
    ),
    "bfloat16": Type(
        *(cublaslt.DataType.BFLOAT16, cublaslt.Compute.FLOAT32, cublaslt.DataType.FLOAT32),
        _COMPUTE_TYPE,
    ),
}
TF32 = TYPES["float32"]._replace(compute=cublaslt.Compute.TF32)
MAX_ALIGNMENT = 16  # bytes: the widest load of any algorithm
_MASK_BITS = 128


class Matrix(NamedTuple):
    """A column-major matrix, or a stack of them, all lengths in elements."""

    rows: int
    columns: int
    leading: int  # from one column to the next
    stride: int = 0  # from one matrix of the stack to the next; 0: all are the same


class Problem(NamedTuple):
    """D = op(A) op(B), for a stack of `batch`."""

    a: Matrix
    transpose_a: bool
    b: Matrix
    transpose_b: bool
    d: Matrix
    batch: int


def is_matrix(shape: Shape, strides: Shape, itemsize: int) -> bool:
    """Tell whether cuBLASLt can read the last two axes where they lie, else they must be copied."""
    if any(stride % itemsize for length, stride in zip(shape, strides, strict=True) if length > 1):
        return False
    return _matrix(shape[-2:], [stride // itemsize for stride in strides[-2:]]) is not None


def _matrix(shape: Shape, strides: list[int]) -> tuple[Matrix, bool] | None:
    """Return a row-major matrix's transpose, and whether cuBLASLt has to transpose to get it."""
    rows, columns = shape
    down, across = strides
    if (columns == 1 or across == 1) and (rows == 1 or down >= columns):
        return Matrix(columns, rows, columns if rows == 1 else down), False
    if (rows == 1 or down == 1) and across >= rows:
        return Matrix(rows, columns, across), True
    return None


def problem(
    x_shape: Shape, x_strides: Shape, w_shape: Shape, w_strides: Shape, itemsize: int
) -> Problem | None:
    """Return what x @ w into fresh C-contiguous memory is to cuBLASLt, or None.

    The last two axes are multiplied, those before them broadcast; strides in bytes, as arrays have
    them. None for shapes that do not fit, for empty arrays, for what `is_matrix` refuses and for
    stacks that are not evenly spaced.
    """
    if len(x_shape) < 2 or len(w_shape) < 2 or x_shape[-1] != w_shape[-2]:
        return None
    if 0 in x_shape or 0 in w_shape:
        return None
    if not is_matrix(x_shape, x_strides, itemsize) or not is_matrix(w_shape, w_strides, itemsize):
        return None
    try:
        stack = np.broadcast_shapes(x_shape[:-2], w_shape[:-2])
    except ValueError:
        return None
    rows, columns = x_shape[-2], w_shape[-1]
    x_steps, w_steps = ([s // itemsize for s in strides] for strides in (x_strides, w_strides))
    batch, x_stride, w_stride = math.prod(stack), 0, 0
    if batch > 1:
        spacing = _spacing(
            stack, _on(stack, x_shape[:-2], x_steps), _on(stack, w_shape[:-2], w_steps)
        )
        if spacing is None:
            return None
        x_stride, w_stride = spacing
        # One w, and x's rows go on evenly from one matrix of the stack to the next: a tall matrix.
        down = x_steps[-2] if rows > 1 else x_stride
        tall = (rows * batch, x_shape[-1]), [down, x_steps[-1]]
        if w_stride == 0 and x_stride == rows * down and _matrix(*tall) is not None:
            rows, batch, x_stride = rows * batch, 1, 0
            x_steps = tall[1]
    b = _matrix((rows, x_shape[-1]), x_steps[-2:])
    a = _matrix(w_shape[-2:], w_steps[-2:])
    if a is None or b is None:
        return None
    return Problem(
        *(a[0]._replace(stride=w_stride), a[1]),
        *(b[0]._replace(stride=x_stride), b[1]),
        Matrix(columns, rows, columns, rows * columns if batch > 1 else 0),
        batch,
    )


def _on(stack: Shape, shape: Shape, strides: list[int]) -> list[int]:
    """Return the strides of an operand along the axes of the broadcast stack."""
    lead = len(stack) - len(shape)
    return [0] * lead + [0 if length == 1 else s for length, s in zip(shape, strides, strict=False)]


def _spacing(stack: Shape, *operands: list[int]) -> tuple[int, ...] | None:
    """Return one stride for the whole stack for each operand, or None where one has no such."""
    found: tuple[int, ...] | None = None
    count = 1
    for axis in reversed(range(len(stack))):
        if stack[axis] == 1:
            continue
        here = tuple(strides[axis] for strides in operands)
        if any(stride < 0 for stride in here):
            return None
        if found is None:
            found = here
        elif here != tuple(count * stride for stride in found):
            return None
        count *= stack[axis]
    return found


def mask_shape(rows: int, columns: int) -> Shape:
    """Return the shape, in bytes, of a mask of one bit for each element of (rows, columns).

    cuBLASLt wants the bits of a row to be padded to a multiple of 128.
    """
    return rows, -(-columns // _MASK_BITS) * _MASK_BITS // 8


def alignment(pointer: int) -> int:
    """Return the largest power of two that divides an address, up to `MAX_ALIGNMENT`."""
    return min(pointer & -pointer, MAX_ALIGNMENT) if pointer else MAX_ALIGNMENT
