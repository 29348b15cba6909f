"""NumPy's functions on Tensors: `np.square(x)` is `tapegrad.square(x)`, recorded and all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._recording import is_recording
from tapegrad._structure import flatten, map_structure
from tapegrad.ops import creation, indexing, linear_algebra, logic, reductions, scans, shape
from tapegrad.ops import elementwise as ew
from tapegrad.tensor import Operand

_UFUNCS: dict[np.ufunc, Callable[..., Any]] = {
    np.add: ew.add,
    np.subtract: ew.subtract,
    np.multiply: ew.multiply,
    np.divide: ew.divide,
    np.floor_divide: ew.floor_divide,
    np.remainder: ew.remainder,
    np.negative: ew.negative,
    np.positive: ew.positive,
    np.conjugate: ew.positive,
    np.power: ew.power,
    np.square: ew.square,
    np.sqrt: ew.sqrt,
    np.reciprocal: ew.reciprocal,
    np.hypot: ew.hypot,
    np.exp: ew.exp,
    np.exp2: ew.exp2,
    np.expm1: ew.expm1,
    np.log: ew.log,
    np.log2: ew.log2,
    np.log10: ew.log10,
    np.log1p: ew.log1p,
    np.logaddexp: ew.logaddexp,
    np.sin: ew.sin,
    np.cos: ew.cos,
    np.tan: ew.tan,
    np.arcsin: ew.asin,
    np.arccos: ew.acos,
    np.arctan: ew.atan,
    np.arctan2: ew.atan2,
    np.sinh: ew.sinh,
    np.cosh: ew.cosh,
    np.tanh: ew.tanh,
    np.arcsinh: ew.asinh,
    np.arccosh: ew.acosh,
    np.arctanh: ew.atanh,
    np.absolute: ew.abs,
    np.fabs: ew.abs,
    np.sign: ew.sign,
    np.maximum: ew.maximum,
    np.minimum: ew.minimum,
    np.floor: ew.floor,
    np.ceil: ew.ceil,
    np.rint: ew.round,
    np.trunc: ew.trunc,
    np.equal: logic.equal,
    np.not_equal: logic.not_equal,
    np.less: logic.less,
    np.less_equal: logic.less_equal,
    np.greater: logic.greater,
    np.greater_equal: logic.greater_equal,
    np.logical_and: logic.logical_and,
    np.logical_or: logic.logical_or,
    np.logical_xor: logic.logical_xor,
    np.logical_not: logic.logical_not,
    np.bitwise_and: logic.bitwise_and,
    np.bitwise_or: logic.bitwise_or,
    np.bitwise_xor: logic.bitwise_xor,
    np.invert: logic.bitwise_invert,
    np.isfinite: logic.isfinite,
    np.isinf: logic.isinf,
    np.isnan: logic.isnan,
    np.matmul: linear_algebra.matmul,
}
_REDUCTIONS: dict[np.ufunc, Callable[..., Any]] = {
    np.add: reductions.sum,
    np.multiply: scans.prod,
    np.maximum: reductions.max,
    np.minimum: reductions.min,
    np.logical_and: reductions.all,
    np.logical_or: reductions.any,
}


def _over_flat(function: Callable[..., Any], default: int | None) -> Callable[..., Any]:
    """Let axis=None mean, as with NumPy, the elements in row order."""

    def over(x: Any, *others: Any, axis: int | None = default) -> Any:
        if axis is None:
            return function(shape.reshape(x, -1), *others, axis=0)
        return function(x, *others, axis=axis)

    return over


def _norm(x: Operand, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """Take the norm of vectors or, by its elements, of a matrix: its others need an SVD or sums."""
    over = x.ndim if axis is None else len(axis) if isinstance(axis, tuple) else 1
    if ord is None or (over == 2 and ord == "fro"):
        return reductions.norm(x, axis=axis, keepdims=keepdims)
    if over != 1 or isinstance(ord, str):
        return NotImplemented
    return reductions.norm(x, ord=ord, axis=axis, keepdims=keepdims)


def _pad(x: Operand, pad_width: Any, mode: Any = "constant", constant_values: Any = 0) -> Any:
    if np.ndim(constant_values):
        return NotImplemented
    return shape.pad(x, pad_width, mode=mode, value=constant_values)


def _diagonal(x: Operand, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    return linear_algebra.diagonal(x, offset=offset, axis1=axis1, axis2=axis2)


def _trace(x: Operand, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    return reductions.sum(_diagonal(x, offset, axis1, axis2), axis=-1)


# NumPy's function: (tapegrad's, how many leading arguments go by position, other names). Where ours
# answers NotImplemented it is a call that has no rule.
_Row = tuple[Callable[..., Any], int, dict[str, str]]
_FUNCTIONS: dict[Callable[..., Any], _Row] = {
    np.sum: (reductions.sum, 1, {}),
    np.mean: (reductions.mean, 1, {}),
    np.var: (reductions.var, 1, {"ddof": "correction"}),
    np.std: (reductions.std, 1, {"ddof": "correction"}),
    np.prod: (scans.prod, 1, {}),
    np.max: (reductions.max, 1, {}),
    np.min: (reductions.min, 1, {}),
    np.amax: (reductions.max, 1, {}),
    np.amin: (reductions.min, 1, {}),
    np.all: (reductions.all, 1, {}),
    np.any: (reductions.any, 1, {}),
    np.argmax: (reductions.argmax, 1, {}),
    np.argmin: (reductions.argmin, 1, {}),
    np.linalg.norm: (_norm, 1, {}),
    np.cumsum: (lambda x, axis=None: x.cumsum(axis), 1, {}),
    np.cumprod: (lambda x, axis=None: x.cumprod(axis), 1, {}),
    np.dot: (linear_algebra.dot, 2, {}),
    np.outer: (linear_algebra.outer, 2, {}),
    np.tensordot: (linear_algebra.tensordot, 2, {}),
    np.diagonal: (_diagonal, 1, {}),
    np.trace: (_trace, 1, {}),
    np.tril: (linear_algebra.tril, 1, {}),
    np.triu: (linear_algebra.triu, 1, {}),
    np.where: (lambda c, *xs: ew.where(c, *xs) if xs else NotImplemented, 3, {}),
    np.clip: (ew.clip, 1, {"a_min": "min", "a_max": "max"}),
    np.reshape: (shape.reshape, 2, {}),
    np.ravel: (lambda x: shape.reshape(x, -1), 1, {}),
    np.transpose: (shape.transpose, 1, {}),
    np.moveaxis: (shape.moveaxis, 3, {}),
    np.expand_dims: (shape.expand_dims, 2, {}),
    np.squeeze: (shape.squeeze, 1, {}),
    np.broadcast_to: (shape.broadcast_to, 2, {}),
    np.concatenate: (shape.concat, 1, {}),
    np.stack: (shape.stack, 1, {}),
    np.split: (shape.split, 2, {}),
    np.flip: (shape.flip, 1, {}),
    np.roll: (shape.roll, 2, {}),
    np.repeat: (shape.repeat, 2, {}),
    np.tile: (shape.tile, 2, {}),
    np.pad: (_pad, 2, {}),
    np.take: (_over_flat(indexing.take, None), 2, {}),
    np.take_along_axis: (_over_flat(indexing.take_along_axis, -1), 2, {}),
    np.sort: (_over_flat(indexing.sort, -1), 1, {}),
    np.argsort: (_over_flat(indexing.argsort, -1), 1, {}),
    np.zeros_like: (creation.zeros_like, 1, {}),
    np.ones_like: (creation.ones_like, 1, {}),
    np.full_like: (creation.full_like, 2, {}),
    np.copy: (ew.positive, 1, {}),
}
# Functions that tell something of the values, and have no gradient to lose.
_FACTS = frozenset(
    (
        np.shape,
        np.ndim,
        np.size,
        np.allclose,
        np.isclose,
        np.array_equal,
        np.array_repr,
        np.array_str,
        np.array2string,
        np.result_type,
        np.can_cast,
        np.iscomplexobj,
        np.isrealobj,
        np.may_share_memory,
        np.shares_memory,
        np.count_nonzero,
        np.nonzero,
        np.argwhere,
    )
)


def _array_ufunc(
    self: Operand, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
) -> Any:
    if out is None:
        if method == "__call__" and not options and ufunc in _UFUNCS:
            return _UFUNCS[ufunc](*inputs)
        if method == "reduce" and ufunc in _REDUCTIONS:
            wanted = {"axis": 0, **options}
            if not wanted.keys() - {"axis", "keepdims"}:
                return _REDUCTIONS[ufunc](*inputs, **wanted)
    elif any(isinstance(x, Operand) for x in out):
        raise TypeError("a tensor cannot be written to: leave out `out=`")
    else:
        options["out"] = out
    _refuse_if_recorded(
        inputs, f"np.{ufunc.__name__}" + ("" if method == "__call__" else "." + method)
    )
    return getattr(ufunc, method)(*[_raw(x) for x in inputs], **options)


def _array_function(
    self: Operand, function: Callable[..., Any], types: Any, args: Any, kwargs: Any
) -> Any:
    if function is np.einsum and isinstance(args[0], str) and not kwargs:
        return linear_algebra.einsum(*args)
    row = _FUNCTIONS.get(function)
    if row is not None:
        ours, by_position, names = row
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        values = list(given.items())
        options = {names.get(name, name): value for name, value in values[by_position:]}
        if not options.keys() - inspect.signature(ours).parameters.keys():
            answer = ours(*[value for _, value in values[:by_position]], **options)
            if answer is not NotImplemented:
                return answer
    if function not in _FACTS:
        _refuse_if_recorded((args, kwargs), f"np.{function.__name__}")
    return function(*map_structure(_raw, args), **map_structure(_raw, kwargs))


def _refuse_if_recorded(arguments: Any, name: str) -> None:
    """Raise where NumPy's result would silently have no gradient."""
    operands = [x for x in flatten(arguments) if isinstance(x, Operand)]
    if is_recording(*operands):
        raise TypeError(
            f"{name}, called like this, has no gradient rule, and a tape watches an argument: "
            "use tapegrad's own function, or x.numpy() to leave the tape on purpose"
        )


def _raw(x: Any) -> Any:
    return x.array if isinstance(x, Operand) else x


setattr(Operand, "__array_ufunc__", _array_ufunc)
setattr(Operand, "__array_function__", _array_function)
