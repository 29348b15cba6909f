"""Launchers of optimizers.cu and gradient_norm.cu: updates of flat buffers, one launch each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._build import FLOATING, ITEM_BYTES, THREADS, Array, Module, Source, cpp_type, grid, pack_width

_SOURCE = Source(
    "optimizers.cu",
    *(
        tuple(
            f"tapegrad_{rule}<{t}, {width}>"
            for rule in ("sgd", "momentum", "adagrad", "rmsprop", "adam")
            for width in (1, 16 // ITEM_BYTES[t])
        )
        for t in FLOATING
    ),
)
_NORM = Source(
    "gradient_norm.cu",
    (
        *(f"tapegrad_sum_of_squares<{t}, {n}>" for t in FLOATING for n in (1, 16 // ITEM_BYTES[t])),
        "tapegrad_gradient_factor",
    ),
)
_NORM_BLOCKS = 512  # of each array: partial sums that one block then adds up


def sgd(
    xp: Module, p: Array, g: Array, learning_rate: Array, factor: Array | None = None
) -> bool | None:
    """Update p -= learning_rate * g.

    Here and below: the buffers are 1-D, C-contiguous, of one size and one floating type; float16
    and bfloat16 are computed with in float32 and rounded once. The hyper-parameters are 0-d float64
    arrays on the device, read when the kernel runs; `factor`, one more of them, multiplies the
    gradient first. The answer is True when it is done, None for arrays the kernel was not written
    for.
    """
    return _update(xp, "sgd", (p, g), (learning_rate,), factor)


def momentum(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    learning_rate: Array,
    momentum: Array,
    factor: Array | None = None,
    *,
    nesterov: bool,
) -> bool | None:
    """Update v = momentum * v - learning_rate * g, then p += v, or with `nesterov`
    p += momentum * v - learning_rate * g.
    """
    flags = (np.int32(nesterov),)
    return _update(xp, "momentum", (p, v, g), (learning_rate, momentum), factor, flags=flags)


def adagrad(
    xp: Module,
    p: Array,
    a: Array,
    g: Array,
    learning_rate: Array,
    epsilon: Array,
    factor: Array | None = None,
) -> bool | None:
    """Update a += g^2, then p -= learning_rate * g / (sqrt(a) + epsilon)."""
    return _update(xp, "adagrad", (p, a, g), (learning_rate, epsilon), factor)


def rmsprop(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    learning_rate: Array,
    rho: Array,
    epsilon: Array,
    factor: Array | None = None,
) -> bool | None:
    """Update v = rho v + (1 - rho) g^2, then p -= learning_rate * g / (sqrt(v) + epsilon)."""
    return _update(xp, "rmsprop", (p, v, g), (learning_rate, rho, epsilon), factor)


def adam(
    xp: Module,
    p: Array,
    m: Array,
    v: Array,
    g: Array,
    step: Array,
    learning_rate: Array,
    beta_1: Array,
    beta_2: Array,
    epsilon: Array,
    weight_decay: Array,
    factor: Array | None = None,
) -> bool | None:
    """Update m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2, then
    p -= learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + weight_decay * p).

    t is `step`, a 0-d int64 array on the device, 1 at the first update.
    """
    if not _is_device_scalar(xp, step, np.int64):
        return None
    hyper = (learning_rate, beta_1, beta_2, epsilon, weight_decay)
    return _update(xp, "adam", (p, m, v, g), hyper, factor, counters=(step,))


def _update(
    xp: Module,
    rule: str,
    buffers: tuple[Array, ...],
    hyper: tuple[Array, ...],
    factor: Array | None,
    *,
    counters: tuple[Array, ...] = (),
    flags: tuple[Any, ...] = (),
) -> bool | None:
    shape = buffers[0].shape
    if len(shape) != 1 or any(buffer.shape != shape for buffer in buffers):
        return None
    t = cpp_type(*buffers)
    scalars = hyper if factor is None else (*hyper, factor)
    if t is None or not all(_is_device_scalar(xp, h, np.float64) for h in scalars):
        return None
    width = pack_width(xp, t, 0, *buffers)
    _SOURCE.kernel(f"tapegrad_{rule}<{t}, {width}>")(
        grid(-(-shape[0] // width)),
        (THREADS,),
        (*buffers, factor, np.int64(shape[0]), *counters, *hyper, *flags),
    )
    return True


def gradient_factor(
    xp: Module, factor: Array, limit: Any, scale: Any, *gradients: Array
) -> bool | None:
    """Let factor = min(1, limit / norm) / scale, where norm is that of all gradients / scale.

    factor, limit and scale are 0-d float64 arrays on the device; instead of the latter two the
    numbers infinity and 1 may stand. The gradients are floating and C-contiguous.
    """
    given = [None if type(x) is float else x for x in (limit, scale)]
    if any(type(x) is float and x != none for x, none in ((limit, np.inf), (scale, 1.0))):
        return None
    scalars = [factor, *(x for x in given if x is not None)]
    if not all(_is_device_scalar(xp, x, np.float64) for x in scalars):
        return None
    types = [cpp_type(g) for g in gradients]
    if None in types:
        return None
    blocks = []
    for t, g in zip(types, gradients, strict=True):
        width = pack_width(xp, str(t), 0, g)
        blocks.append((width, min(grid(-(-g.size // width))[0], _NORM_BLOCKS)))
    partial = xp.empty(sum(count for _, count in blocks), np.float64)
    start = 0
    for t, g, (width, count) in zip(types, gradients, blocks, strict=True):
        if given[0] is None:
            break
        _NORM.kernel(f"tapegrad_sum_of_squares<{t}, {width}>")(
            (count,), (THREADS,), (g, partial[start : start + count], np.int64(g.size))
        )
        start += count
    _NORM.kernel("tapegrad_gradient_factor")(
        (1,), (THREADS,), (factor, partial, np.int32(start), *given)
    )
    return True


def _is_device_scalar(xp: Module, value: Any, dtype: type) -> bool:
    """Tell whether `value` is a 0-d array of `xp`: CuPy would take a NumPy one too, by value, and
    the kernel would read an address made of its bits.
    """
    return isinstance(value, xp.ndarray) and value.shape == () and value.dtype == dtype
