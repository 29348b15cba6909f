"""New tensors: filled, counted, spaced; made on the backend of the moment, or like another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Module
from tapegrad.ops.arguments import as_tensor, normalize_shape
from tapegrad.ops.elementwise import astype
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import DEFAULT_FLOAT, ArrayLike, Operand, Tensor, as_array, wrap

Shape = int | Sequence[int]


def asarray(x: ArrayLike, /, *, dtype: Any = None, copy: bool | None = None) -> Tensor:
    """Return x as a Tensor: itself if it is one of that type (a Variable: its value), else a copy.

    Raises as `constant` does; `ValueError` where `copy=False` cannot be had.

    >>> print(tg.asarray([1, 2]))
    tg.Tensor([1 2], shape=(2,), dtype=int64)
    """
    if isinstance(x, Operand) and not copy and dtype in (None, x.dtype):
        return x._read()
    if copy is False:
        raise ValueError("[asarray] copy=False: only a Tensor of that dtype can do without a copy")
    if isinstance(x, Operand):
        return astype(x, x.dtype if dtype is None else dtype)
    return Tensor(x, dtype)


def zeros(shape: Shape, *, dtype: Any = DEFAULT_FLOAT) -> Tensor:
    """Return a tensor of zeros.

    >>> print(tg.zeros(2))
    tg.Tensor([0. 0.], shape=(2,), dtype=float32)
    """
    return full(shape, 0, dtype=dtype)


def ones(shape: Shape, *, dtype: Any = DEFAULT_FLOAT) -> Tensor:
    """Return a tensor of ones.

    >>> print(tg.ones(2))
    tg.Tensor([1. 1.], shape=(2,), dtype=float32)
    """
    return full(shape, 1, dtype=dtype)


def full(shape: Shape, value: float, *, dtype: Any = None) -> Tensor:
    """Return a tensor with `value` everywhere; the type is the number's own for None.

    >>> print(tg.full((2,), 7.0))
    tg.Tensor([7. 7.], shape=(2,), dtype=float32)
    """
    if isinstance(value, Operand):
        value._leave("tg.full(shape, tensor)")
    filling = as_array(value, dtype, np)
    if filling.ndim:
        raise ValueError(f"[full] value must be one number, got shape {filling.shape}")
    lengths = normalize_shape("full", shape)
    return _filled(_backend.default_module(), lengths, filling[()], filling.dtype)


def _filled(xp: Module, shape: tuple[int, ...], value: Any, dtype: Any) -> Tensor:
    try:
        return wrap(xp.full(shape, value, dtype))
    except MemoryError as error:
        raise _backend.out_of_memory(error, "full") from None


def _like(x: ArrayLike, value: float, dtype: Any) -> Tensor:
    x = as_tensor(x)
    xp = _backend.module_of((x._array,))
    return _filled(xp, x.shape, value, x.dtype if dtype is None else dtype)


def zeros_like(x: ArrayLike, /, *, dtype: Any = None) -> Tensor:
    """Return zeros with the shape, the backend and, unless given, the dtype of x.

    >>> print(tg.zeros_like([1.0, 2.0]))
    tg.Tensor([0. 0.], shape=(2,), dtype=float32)
    """
    return _like(x, 0, dtype)


def ones_like(x: ArrayLike, /, *, dtype: Any = None) -> Tensor:
    """Return ones with the shape, the backend and, unless given, the dtype of x.

    >>> print(tg.ones_like([1.0, 2.0]))
    tg.Tensor([1. 1.], shape=(2,), dtype=float32)
    """
    return _like(x, 1, dtype)


def full_like(x: ArrayLike, /, value: float, *, dtype: Any = None) -> Tensor:
    """Return `value` everywhere with the shape, the backend and, unless given, the dtype of x.

    >>> print(tg.full_like([1.0, 2.0], 7.0))
    tg.Tensor([7. 7.], shape=(2,), dtype=float32)
    """
    return _like(x, value, dtype)


def eye(
    rows: int, columns: int | None = None, /, *, k: int = 0, dtype: Any = DEFAULT_FLOAT
) -> Tensor:
    """Return ones on the k-th diagonal and zeros elsewhere; square unless `columns` is given.

    >>> print(tg.eye(2))
    tg.Tensor(
    [[1. 0.]
     [0. 1.]], shape=(2, 2), dtype=float32)
    """
    return wrap(_backend.default_module().eye(rows, columns, k, dtype=dtype))


def arange(
    start: float, /, stop: float | None = None, step: float = 1, *, dtype: Any = None
) -> Tensor:
    """Return evenly spaced numbers from start up to but not including stop; one number is the stop.

    Python floats make float32, ints int64. Raises `ValueError` for a step of 0.

    >>> print(tg.arange(3))
    tg.Tensor([0 1 2], shape=(3,), dtype=int64)
    """
    if step == 0:
        raise ValueError("[arange] step must not be 0")
    if stop is None:
        start, stop = 0, start
    if dtype is None:
        dtype = as_array(start + stop + step, xp=np).dtype
    # Counted in float64: at 1e7 and step 0.1 a float32 count would be off by whole steps.
    return wrap(_backend.default_module().arange(start, stop, step).astype(dtype))


def linspace(
    start: float, stop: float, /, num: int, *, dtype: Any = DEFAULT_FLOAT, endpoint: bool = True
) -> Tensor:
    """Return `num` evenly spaced numbers from start to stop, with stop itself unless told not to.

    An integer type gets their floors, as with NumPy.

    >>> print(tg.linspace(0.0, 1.0, 3))
    tg.Tensor([0.  0.5 1. ], shape=(3,), dtype=float32)
    """
    xp = _backend.default_module()
    return wrap(xp.linspace(start, stop, num, endpoint=endpoint, dtype=dtype))


_transfer: Primitive = primitive(
    "transfer",
    lambda xp, x, *, origin, to: _backend.to_module(x, _backend.module_named(to)),
    lambda g, _y, _x, *, origin, to: _transfer(g, origin=to, to=origin),
)


def to_backend(x: ArrayLike, name: str, /) -> Tensor:
    """Return the values on another backend, `"numpy"` or `"cupy"`; the gradient goes back to x's.

    Raises `RuntimeError` when that backend cannot be used.

    >>> tg.to_backend([1.0], "numpy").backend
    'numpy'
    """
    x = as_tensor(x)
    return _transfer(x, origin=x.backend, to=name)
