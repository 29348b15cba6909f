"""Operations that move elements: reshaping, permuting, joining, splitting, repeating, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tapegrad._backend import Array, Module, concatenated
from tapegrad.linear import broadcast_to as _broadcast_to
from tapegrad.linear import permute as _permute
from tapegrad.linear import reshape as _reshape
from tapegrad.linear import row as _row
from tapegrad.linear import stack as _stack
from tapegrad.ops.arguments import as_tensor, normalize_axes, normalize_axis, normalize_shape
from tapegrad.ops.indexing import getitem
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Tensor


def reshape(x: ArrayLike, /, shape: int | Sequence[int]) -> Tensor:
    """Return the elements in row order in another shape; one length may be -1, for the rest.

    Raises `ValueError` when the shape does not hold as many elements.

    >>> tg.reshape([1, 2, 3, 4], (2, -1)).shape
    (2, 2)
    """
    x = as_tensor(x)
    new = normalize_shape("reshape", shape)
    if -1 in new:
        rest = math.prod(length for length in new if length != -1)
        if new.count(-1) > 1 or rest == 0 or x.size % rest:
            raise ValueError(f"[reshape] {x.size} elements of {x.shape} cannot take shape {new}")
        new = tuple(x.size // rest if length == -1 else length for length in new)
    if math.prod(new) != x.size or min(new, default=0) < 0:
        raise ValueError(f"[reshape] {x.size} elements of {x.shape} cannot take shape {new}")
    return _reshape(x, shape=new)


def permute_dims(x: ArrayLike, /, axes: Sequence[int]) -> Tensor:
    """Return x with its axes in another order: axis i of the result is axes[i] of x.

    Raises `ValueError` unless `axes` names each axis once.

    >>> tg.permute_dims(tg.zeros((2, 3, 4)), (2, 0, 1)).shape
    (4, 2, 3)
    """
    x = as_tensor(x)
    order = normalize_axes("permute_dims", tuple(axes), x.ndim)
    if len(order) != x.ndim:
        raise ValueError(f"[permute_dims] axes must name all {x.ndim} axes, got {tuple(axes)}")
    return _permute(x, axes=order)


def transpose(x: ArrayLike, /, axes: Sequence[int] | None = None) -> Tensor:
    """Return x with its axes reversed, or in the order `axes` (see `permute_dims`).

    >>> tg.transpose(tg.zeros((2, 3))).shape
    (3, 2)
    """
    x = as_tensor(x)
    return permute_dims(x, tuple(reversed(range(x.ndim))) if axes is None else axes)


def matrix_transpose(x: ArrayLike, /) -> Tensor:
    """Return x with its last two axes exchanged; raises `ValueError` for less than two axes.

    >>> tg.matrix_transpose(tg.zeros((5, 2, 3))).shape
    (5, 3, 2)
    """
    x = as_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"[matrix_transpose] x must have at least two axes, got shape {x.shape}")
    return _permute(x, axes=(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def moveaxis(
    x: ArrayLike, source: int | Sequence[int], destination: int | Sequence[int], /
) -> Tensor:
    """Return x with some axes moved to other places, the rest in their old order.

    Raises `ValueError` for axes that x does not have, and for unequal numbers of them.

    >>> tg.moveaxis(tg.zeros((2, 3, 4)), 0, -1).shape
    (3, 4, 2)
    """
    x = as_tensor(x)
    here = normalize_axes("moveaxis", source, x.ndim)
    there = normalize_axes("moveaxis", destination, x.ndim)
    if len(here) != len(there):
        raise ValueError(f"[moveaxis] {len(here)} source axes, {len(there)} destinations")
    order = [i for i in range(x.ndim) if i not in here]
    for to, origin in sorted(zip(there, here, strict=True)):
        order.insert(to, origin)
    return _permute(x, axes=tuple(order))


def expand_dims(x: ArrayLike, /, axis: int | Sequence[int] = 0) -> Tensor:
    """Return x with an axis of length 1 put in at `axis` of the result.

    Raises `ValueError` for a place that the result does not have.

    >>> tg.expand_dims(tg.zeros((2, 3)), axis=1).shape
    (2, 1, 3)
    """
    x = as_tensor(x)
    added = len(axis) if isinstance(axis, Sequence) else 1
    places = normalize_axes("expand_dims", axis, x.ndim + added)
    lengths = iter(x.shape)
    shape = tuple(1 if i in places else next(lengths) for i in range(x.ndim + added))
    return _reshape(x, shape=shape)


def squeeze(x: ArrayLike, /, axis: int | Sequence[int] | None = None) -> Tensor:
    """Return x without the given axes, which must have length 1; without all such for None.

    Raises `ValueError` for an axis of another length.

    >>> tg.squeeze(tg.zeros((2, 1, 3)), axis=1).shape
    (2, 3)
    """
    x = as_tensor(x)
    if axis is None:
        axis = tuple(i for i, length in enumerate(x.shape) if length == 1)
    gone = normalize_axes("squeeze", axis, x.ndim)
    for i in gone:
        if x.shape[i] != 1:
            raise ValueError(f"[squeeze] axis {i} of shape {x.shape} has not length 1")
    return _reshape(x, shape=tuple(n for i, n in enumerate(x.shape) if i not in gone))


def broadcast_to(x: ArrayLike, /, shape: int | Sequence[int]) -> Tensor:
    """Return x spread to a shape by NumPy's rules; the gradient is summed back.

    Raises `ValueError` when x does not broadcast to it.

    >>> print(tg.broadcast_to([1.0, 2.0], (2, 2)))
    tg.Tensor(
    [[1. 2.]
     [1. 2.]], shape=(2, 2), dtype=float32)
    """
    return _broadcast_to(x, shape=normalize_shape("broadcast_to", shape))


# ---- joining and splitting


def _concat_vjp(
    needs: tuple[bool, ...], g: Tensor, _y: Any, *_xs: Any, axis: int
) -> tuple[Tensor | None, ...]:
    lead = (slice(None),) * axis
    answers: list[Tensor | None] = []
    start = 0
    for needed, x in zip(needs, _xs, strict=True):
        end = start + x.shape[axis]
        answers.append(getitem(g, (*lead, slice(start, end))) if needed else None)
        start = end
    return tuple(answers)


_concat: Primitive = primitive(
    "concat", lambda xp, *xs, axis: concatenated(xp, xs, axis), joint_vjp=_concat_vjp
)


def concat(xs: Sequence[ArrayLike], /, axis: int | None = 0) -> Tensor:
    """Return the tensors joined along an axis that they have; flattened first for None.

    Raises `ValueError` for no tensors, and for shapes that differ in another axis.

    >>> print(tg.concat([[1.0, 2.0], [3.0]]))
    tg.Tensor([1. 2. 3.], shape=(3,), dtype=float32)
    """
    parts = _sequence("concat", xs)
    if axis is None:
        return _concat(*[reshape(x, -1) for x in parts], axis=0)
    return _concat(*parts, axis=normalize_axis("concat", axis, parts[0].ndim))


def stack(xs: Sequence[ArrayLike], /, axis: int = 0) -> Tensor:
    """Return tensors of one shape joined along a new axis.

    Raises `ValueError` for no tensors, for unequal shapes, for a place that the result lacks.

    >>> tg.stack([[1.0, 2.0], [3.0, 4.0]], axis=1).shape
    (2, 2)
    """
    parts = _sequence("stack", xs)
    place = normalize_axis("stack", axis, parts[0].ndim + 1)
    y = _stack(*parts)
    return y if place == 0 else moveaxis(y, 0, place)


def _sequence(name: str, xs: Any) -> list[Tensor]:
    parts = [as_tensor(x) for x in xs]
    if not parts:
        raise ValueError(f"[{name}] needs at least one tensor, got none")
    return parts


def unstack(x: ArrayLike, /, axis: int = 0) -> tuple[Tensor, ...]:
    """Return the slices of x along an axis, each without it.

    Raises `ValueError` for an axis that x does not have.

    >>> [float(part) for part in tg.unstack([1.0, 2.0])]
    [1.0, 2.0]
    """
    x = as_tensor(x)
    place = normalize_axis("unstack", axis, x.ndim)
    rows = x if place == 0 else moveaxis(x, place, 0)
    return tuple(_row(rows, index=i) for i in range(rows.shape[0]))


def split(x: ArrayLike, parts: int | Sequence[int], /, axis: int = 0) -> list[Tensor]:
    """Return consecutive pieces of x along an axis, as NumPy's `split` does.

    parts  a number of equal pieces, or the indices before which to cut.

    Raises `ValueError` when the axis does not divide into equal pieces.

    >>> [piece.shape for piece in tg.split(tg.zeros(6), [1, 3])]
    [(1,), (2,), (3,)]
    """
    x = as_tensor(x)
    place = normalize_axis("split", axis, x.ndim)
    length = x.shape[place]
    if isinstance(parts, (int, np.integer)):
        if parts < 1 or length % parts:
            raise ValueError(f"[split] an axis of {length} does not divide into {parts} pieces")
        cuts = [int(i) for i in range(0, length + 1, max(length // int(parts), 1))]
        if length == 0:
            cuts = [0] * (int(parts) + 1)
    else:
        cuts = [0, *normalize_shape("split", parts), length]
    lead = (slice(None),) * place
    return [getitem(x, (*lead, slice(start, end))) for start, end in itertools.pairwise(cuts)]


# ---- flips, rolls, repetition, padding

_flip: Primitive = primitive(
    "flip",
    lambda xp, x, *, axis: xp.flip(x, axis),
    lambda g, _y, _x, *, axis: _flip(g, axis=axis),
)
_roll: Primitive = primitive(
    "roll",
    lambda xp, x, *, shift, axis: xp.roll(x, shift, axis),
    lambda g, _y, _x, *, shift, axis: _roll(g, shift=tuple(-s for s in shift), axis=axis),
)


def flip(x: ArrayLike, /, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Return x with the elements reversed along the given axes, along all of them for None.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.flip([1.0, 2.0, 3.0]))
    tg.Tensor([3. 2. 1.], shape=(3,), dtype=float32)
    """
    x = as_tensor(x)
    return _flip(x, axis=normalize_axes("flip", axis, x.ndim))


def roll(
    x: ArrayLike,
    /,
    shift: int | tuple[int, ...],
    axis: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Return x with the elements moved along axes, those that fall out coming in at the start.

    shift  by how many places, for each of the axes. axis None rolls the elements in row order.

    Raises `ValueError` for an axis that x does not have, and for unequal numbers of them.

    >>> print(tg.roll([1.0, 2.0, 3.0], 1))
    tg.Tensor([3. 1. 2.], shape=(3,), dtype=float32)
    """
    x = as_tensor(x)
    if axis is None:
        return reshape(roll(reshape(x, -1), shift, axis=0), x.shape)
    axes = normalize_axes("roll", axis, x.ndim)
    shifts = normalize_shape("roll", shift)
    if len(shifts) == 1:
        shifts *= len(axes)
    if len(shifts) != len(axes):
        raise ValueError(f"[roll] {len(shifts)} shifts for {len(axes)} axes")
    return _roll(x, shift=shifts, axis=axes)


def repeat(x: ArrayLike, repeats: int | Sequence[int], /, axis: int | None = None) -> Tensor:
    """Return x with each element along an axis repeated; the gradient is summed back.

    repeats  how often: one number, or one for each element.
    axis     None repeats the elements in row order.

    Raises `ValueError` for negative numbers, and for as many numbers as there are not elements.

    >>> print(tg.repeat([1.0, 2.0], 2))
    tg.Tensor([1. 1. 2. 2.], shape=(4,), dtype=float32)
    """
    x = as_tensor(x)
    if axis is None:
        return repeat(reshape(x, -1), repeats, axis=0)
    place = normalize_axis("repeat", axis, x.ndim)
    times = normalize_shape("repeat", repeats)
    length = x.shape[place]
    if min(times, default=0) < 0 or len(times) not in (1, length):
        raise ValueError(
            f"[repeat] repeats must be one number or {length} numbers >= 0, got {repeats!r}"
        )
    if len(times) == 1:  # no indices needed: spread along a new axis and join the two
        before, after = x.shape[: place + 1], x.shape[place + 1 :]
        spread = _broadcast_to(
            _reshape(x, shape=(*before, 1, *after)), shape=(*before, times[0], *after)
        )
        return _reshape(spread, shape=(*x.shape[:place], length * times[0], *after))
    index = np.repeat(np.arange(length), times)
    return getitem(x, (*(slice(None),) * place, index))


def tile(x: ArrayLike, repetitions: int | Sequence[int], /) -> Tensor:
    """Return x put side by side, so many times along each axis; the gradient is summed back.

    Raises `ValueError` for negative numbers.

    >>> print(tg.tile([1.0, 2.0], 2))
    tg.Tensor([1. 2. 1. 2.], shape=(4,), dtype=float32)
    """
    x = as_tensor(x)
    times = normalize_shape("tile", repetitions)
    if min(times, default=0) < 0:
        raise ValueError(f"[tile] repetitions must be >= 0, got {repetitions!r}")
    ndim = max(x.ndim, len(times))
    times = (1,) * (ndim - len(times)) + times
    lengths = (1,) * (ndim - x.ndim) + x.shape
    single = tuple(n for length in lengths for n in (1, length))
    spread = tuple(n for pair in zip(times, lengths, strict=True) for n in pair)
    y = _broadcast_to(_reshape(x, shape=single), shape=spread)
    return _reshape(y, shape=tuple(t * n for t, n in zip(times, lengths, strict=True)))


def _pad_forward(
    xp: Module, x: Array, *, widths: tuple[tuple[int, int], ...], value: float
) -> Array:
    shape = tuple(n + before + after for n, (before, after) in zip(x.shape, widths, strict=True))
    y = xp.full(shape, value, x.dtype)
    y[_inside(x.shape, widths)] = x
    return y


def _inside(shape: tuple[int, ...], widths: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(b, b + n) for n, (b, _) in zip(shape, widths, strict=True))


_pad: Primitive = primitive(
    "pad",
    _pad_forward,
    lambda g, _y, _x, *, widths, value: getitem(g, _inside(_x.shape, widths)),
)


def pad(
    x: ArrayLike,
    widths: int | Sequence[Any],
    /,
    *,
    mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant",
    value: float = 0.0,
) -> Tensor:
    """Return x with elements added at both ends of each axis, as NumPy's `pad` does.

    widths  how many: one number, a pair (before, after), or a pair for each axis.
    mode    `"constant"`: `value`; `"edge"`: the end's own; `"reflect"`: mirrored at the end
            element; `"symmetric"`: mirrored beside it.

    Raises `ValueError` for an unknown mode and for widths that do not fit, `TypeError` for a value
    that is no number.

    >>> print(tg.pad([1.0, 2.0], 1))
    tg.Tensor([0. 1. 2. 0.], shape=(4,), dtype=float32)
    """
    x = as_tensor(x)
    modes = ("constant", "edge", "reflect", "symmetric")
    if mode not in modes:
        raise ValueError(f"[pad] mode must be one of {', '.join(modes)}, got {mode!r}")
    if not isinstance(value, (int, float, np.generic)):
        raise TypeError(f"[pad] value must be a number, got {value!r}")
    try:
        pairs = np.broadcast_to(np.asarray(widths), (x.ndim, 2))
    except ValueError:
        raise ValueError(
            f"[pad] widths must be a number, a pair or {x.ndim} pairs, got {widths!r}"
        ) from None
    if pairs.size and (pairs.dtype.kind not in "iu" or pairs.min() < 0):
        raise ValueError(f"[pad] widths must be integers >= 0, got {widths!r}")
    if mode == "constant":
        return _pad(x, widths=tuple((int(b), int(a)) for b, a in pairs), value=value)
    for i, (before, after) in enumerate(pairs):
        if before or after:
            if x.shape[i] == 0:
                raise ValueError(f"[pad] axis {i} is empty: {mode!r} has nothing to repeat")
            index = np.pad(np.arange(x.shape[i]), (int(before), int(after)), mode=mode)
            x = getitem(x, (*(slice(None),) * i, index))
    return x
