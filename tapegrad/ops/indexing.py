"""Indexing of every NumPy kind, gathering, sorting; repeated indices add up in the gradient."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad._index import FULL, SLOT, Index, filled, index_array, parse, slot_axes
from tapegrad.kernels import scatter_add as kernels
from tapegrad.linear import permute as _permute
from tapegrad.linear import reshape as _reshape
from tapegrad.ops.arguments import as_tensor, normalize_axis
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Tensor, wrap


def _getitem_forward(
    xp: Module, x: Array, *arrays: Array, index: Index, in_range: bool = False
) -> Array:
    if xp is not np and arrays and not in_range:  # which waits for the device
        _check_bounds(x.shape, arrays, index)
    return x[filled(index, arrays)]


def _check_bounds(shape: tuple[int, ...], arrays: tuple[Array, ...], index: Index) -> None:
    """Raise `IndexError` where NumPy would: CuPy wraps an index that is out of range, silently."""
    masks = [array.dtype.kind == "b" for array in arrays]
    taken = [array.ndim if mask else 1 for array, mask in zip(arrays, masks, strict=True)]
    for array, mask, axis in zip(arrays, masks, slot_axes(len(shape), index, taken), strict=True):
        if mask and array.shape != shape[axis : axis + array.ndim]:  # CuPy lets (0,) pass
            raise IndexError(f"a boolean index of shape {array.shape} does not fit {shape}")
        if not mask and array.size:
            length = shape[axis]
            if int(array.min()) < -length or int(array.max()) >= length:
                raise IndexError(f"index out of bounds for axis {axis} with size {length}")


def _getitem_vjp(
    needs: tuple[bool, ...],
    g: Tensor,
    _y: Any,
    _x: Any,
    *arrays: Tensor,
    index: Index,
    in_range: bool = False,
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(arrays)
    if not arrays:
        return (_place(g, shape=_x.shape, index=index),)
    rows = _x.shape[0] if _x.ndim else 1
    if index[0] is SLOT and arrays[0].dtype.kind != "b" and all(p == FULL for p in index[1:]):
        columns = math.prod(_x.shape[1:])  # whole rows: moved as such
        places = _row_numbers(arrays[0], rows=rows)
    else:
        rows, columns = _x.size, 1
        places = _places(*arrays, shape=_x.shape, index=index)
    values = _reshape(g, shape=(places.size, columns))
    return (_reshape(_scatter_add(values, places, rows=rows), shape=_x.shape), *nothing)


_getitem: Primitive = primitive("getitem", _getitem_forward, joint_vjp=_getitem_vjp)


def _place_forward(xp: Module, x: Array, *, shape: tuple[int, ...], index: Index) -> Array:
    y = xp.zeros(shape, x.dtype)
    y[index] = x
    return y


# Put x among zeros, where a basic index takes it from: the derivative of taking it.
_place: Primitive = primitive(
    "place",
    _place_forward,
    lambda g, _y, _x, *, shape, index: _getitem(g, index=index),
)


# The rows that an index of rows means, and the places in row order that any index means.
_row_numbers: Primitive = primitive(
    "row_numbers",
    lambda xp, index, *, rows: xp.where(
        index < 0, index.astype(np.int64) + rows, index.astype(np.int64)
    ).reshape(-1),
    None,
)


def _places_forward(xp: Module, *arrays: Array, shape: tuple[int, ...], index: Index) -> Array:
    return xp.arange(math.prod(shape)).reshape(shape)[filled(index, arrays)].reshape(-1)


_places: Primitive = primitive("places", _places_forward, None)

# Row index[i] of the result is the sum of the values[i].
_scatter_add: Primitive = primitive(
    "scatter_add",
    lambda xp, values, index, *, rows: _backend.scatter_add(xp, values, index, rows),
    lambda g, _y, _values, index, *, rows: _getitem(g, index, index=(SLOT,), in_range=True),
    None,
    kernel=kernels.scatter_add,
)


def getitem(x: ArrayLike, index: Any, /) -> Tensor:
    """Return x[index] for every index that NumPy knows; repeated indices add up in the gradient.

    Raises `IndexError` for an index out of range, on both backends.

    >>> print(tg.constant([1.0, 2.0, 3.0])[[0, 0, 2]])
    tg.Tensor([1. 1. 3.], shape=(3,), dtype=float32)
    """
    x = as_tensor(x)
    template, arrays = parse(index, _backend.module_of((x._array,)))
    return _getitem(x, *arrays, index=template)


def take(x: ArrayLike, indices: ArrayLike, /, axis: int | None = None) -> Tensor:
    """Return the slices of x along an axis that `indices` name; it may be left out for a 1-d x.

    indices  integers of any shape, which takes the place of the axis in the result. Negative ones
             count from the end. Repeated ones add up in the gradient.

    Raises `IndexError` for an index out of range, `ValueError` for an axis that x does not have.

    >>> print(tg.take([1.0, 2.0, 3.0], [2, 0]))
    tg.Tensor([3. 1.], shape=(2,), dtype=float32)
    """
    x = as_tensor(x)
    if axis is None and x.ndim != 1:
        raise ValueError(f"[take] axis must be given for x of shape {x.shape}")
    place = normalize_axis("take", 0 if axis is None else axis, x.ndim)
    array = index_array(indices, _backend.module_of((x._array,)))
    if array.dtype.kind == "b":
        raise IndexError("[take] indices must be integers, got bool: write x[mask]")
    return _getitem(x, array, index=(FULL,) * place + (SLOT,))


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x at places that are known to be in range."""
    return _getitem(x, places, index=(SLOT,), in_range=True)


def gather(params: ArrayLike, indices: ArrayLike, /, axis: int = 0) -> Tensor:
    """Return the slices of `params` along an axis that `indices` name: TensorFlow's name of `take`.

    >>> print(tg.gather([[1.0, 2.0], [3.0, 4.0]], [1, 1]))
    tg.Tensor(
    [[3. 4.]
     [3. 4.]], shape=(2, 2), dtype=float32)
    """
    return take(params, indices, axis=axis)


def take_along_axis(x: ArrayLike, indices: ArrayLike, /, axis: int = -1) -> Tensor:
    """Return, for each place of `indices`, the element of x at that index along an axis.

    indices  integers of the rank of x, that broadcast with it in the other axes.

    Raises `IndexError` for an index out of range, `ValueError` for another rank.

    >>> print(tg.take_along_axis([[1.0, 2.0], [3.0, 4.0]], [[1], [0]]))
    tg.Tensor(
    [[2.]
     [3.]], shape=(2, 1), dtype=float32)
    """
    return _take_along_axis(x, indices, axis, in_range=False)


def _take_along_axis(x: ArrayLike, indices: ArrayLike, axis: int, *, in_range: bool) -> Tensor:
    x = as_tensor(x)
    xp = _backend.module_of((x._array,))
    array = index_array(indices, xp)
    if array.ndim != x.ndim:
        raise ValueError(
            f"[take_along_axis] indices must have the rank of x, {x.ndim}, got {array.shape}"
        )
    place = normalize_axis("take_along_axis", axis, x.ndim)
    others = [
        wrap(xp.arange(length).reshape((-1,) + (1,) * (x.ndim - 1 - i)))
        for i, length in enumerate(x.shape)
    ]
    others[place] = array
    return _getitem(x, *others, index=(SLOT,) * x.ndim, in_range=in_range)


_one_hot: Primitive = primitive(
    "one_hot",
    lambda xp, x, *, depth, dtype: (x[..., None] == xp.arange(depth)).astype(dtype),
    None,
)


def one_hot(
    indices: ArrayLike, depth: int, /, *, dtype: Any = np.float32, axis: int = -1
) -> Tensor:
    """Return 1 at each index and 0 elsewhere along a new axis of length `depth`.

    An index out of range gives zeros only, as in TensorFlow. Raises `TypeError` for indices that
    are not integers.

    >>> print(tg.one_hot([1, 0], 2))
    tg.Tensor(
    [[0. 1.]
     [1. 0.]], shape=(2, 2), dtype=float32)
    """
    x = as_tensor(indices)
    if x.dtype.kind not in "iu":
        raise TypeError(f"[one_hot] indices must be integers, got {x.dtype}")
    y = _one_hot(x, depth=operator.index(depth), dtype=np.dtype(dtype))
    place = normalize_axis("one_hot", axis, y.ndim)
    order = (*range(place), y.ndim - 1, *range(place, y.ndim - 1))
    return y if place == y.ndim - 1 else _permute(y, axes=order)


# ---- sorting


def _argsort_forward(xp: Module, x: Array, *, axis: int, descending: bool) -> Array:
    if not descending:
        return xp.argsort(x, axis=axis, kind="stable")
    # Equal elements keep their order: sort the mirror image, and mirror the answer.
    mirrored = xp.argsort(xp.flip(x, axis), axis=axis, kind="stable")
    return xp.flip(x.shape[axis] - 1 - mirrored, axis)


_argsort: Primitive = primitive("argsort", _argsort_forward, None)


def argsort(x: ArrayLike, /, axis: int = -1, *, descending: bool = False) -> Tensor:
    """Return the indices that sort x along an axis; equal elements keep their order; no gradient.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.argsort([3.0, 1.0, 2.0]))
    tg.Tensor([1 2 0], shape=(3,), dtype=int64)
    """
    x = as_tensor(x)
    return _argsort(x, axis=normalize_axis("argsort", axis, x.ndim), descending=descending)


def sort(x: ArrayLike, /, axis: int = -1, *, descending: bool = False) -> Tensor:
    """Return x sorted along an axis; the gradient goes back to where each element came from.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.sort([3.0, 1.0, 2.0]))
    tg.Tensor([1. 2. 3.], shape=(3,), dtype=float32)
    """
    x = as_tensor(x)
    order = argsort(x, axis=axis, descending=descending)
    return _take_along_axis(x, order, axis, in_range=True)


class TopK(NamedTuple):
    """The largest elements along the last axis, and where they stand."""

    values: Tensor
    indices: Tensor


def top_k(x: ArrayLike, k: int, /) -> TopK:
    """Return the k largest elements along the last axis, largest first, and their indices.

    Raises `ValueError` when there are fewer than k.

    >>> values, indices = tg.top_k([3.0, 1.0, 2.0], 2)
    >>> print(values)
    tg.Tensor([3. 2.], shape=(2,), dtype=float32)
    """
    x = as_tensor(x)
    if x.ndim == 0:
        raise ValueError("[top_k] a 0-d tensor has no last axis")
    length = x.shape[-1]
    if not 0 <= operator.index(k) <= length:
        raise ValueError(f"[top_k] k must be from 0 to {length}, the last axis' length, got {k}")
    indices = getitem(argsort(x, descending=True), (..., slice(0, k)))
    return TopK(_take_along_axis(x, indices, -1, in_range=True), indices)
