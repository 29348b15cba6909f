"""Launchers of optimizers.cu: in-place updates of flat buffers, one launch each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._build import ITEM_BYTES, THREADS, Array, Module, Source, cpp_type, grid, pack_width

_TYPES = ("float", "double")
_SOURCE = Source(
    "optimizers.cu",
    *(
        tuple(
            f"tapegrad_{rule}<{t}, {width}>"
            for rule in ("sgd", "momentum", "adagrad", "rmsprop", "adam")
            for width in (1, 16 // ITEM_BYTES[t])
        )
        for t in _TYPES
    ),
)


def sgd(xp: Module, p: Array, g: Array, learning_rate: Array) -> bool | None:
    """Update p -= learning_rate * g.

    Here and below: the buffers are 1-D, C-contiguous, of one size, float32 or float64; the
    hyper-parameters 0-d float64 arrays on the device, read when the kernel runs. The answer is
    True when it is done, None for arrays the kernel was not written for.
    """
    return _update(xp, "sgd", (p, g), (learning_rate,))


def momentum(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    learning_rate: Array,
    momentum: Array,
    *,
    nesterov: bool,
) -> bool | None:
    """Update v = momentum * v - learning_rate * g, then p += v, or with `nesterov`
    p += momentum * v - learning_rate * g.
    """
    flags = (np.int32(nesterov),)
    return _update(xp, "momentum", (p, v, g), (learning_rate, momentum), flags=flags)


def adagrad(
    xp: Module, p: Array, a: Array, g: Array, learning_rate: Array, epsilon: Array
) -> bool | None:
    """Update a += g^2, then p -= learning_rate * g / (sqrt(a) + epsilon)."""
    return _update(xp, "adagrad", (p, a, g), (learning_rate, epsilon))


def rmsprop(
    xp: Module, p: Array, v: Array, g: Array, learning_rate: Array, rho: Array, epsilon: Array
) -> bool | None:
    """Update v = rho v + (1 - rho) g^2, then p -= learning_rate * g / (sqrt(v) + epsilon)."""
    return _update(xp, "rmsprop", (p, v, g), (learning_rate, rho, epsilon))


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
) -> bool | None:
    """Update m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2, then
    p -= learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + weight_decay * p).

    t is `step`, a 0-d int64 array on the device, 1 at the first update.
    """
    if not _is_device_scalar(xp, step, np.int64):
        return None
    hyper = (learning_rate, beta_1, beta_2, epsilon, weight_decay)
    return _update(xp, "adam", (p, m, v, g), hyper, counters=(step,))


def _update(
    xp: Module,
    rule: str,
    buffers: tuple[Array, ...],
    hyper: tuple[Array, ...],
    *,
    counters: tuple[Array, ...] = (),
    flags: tuple[Any, ...] = (),
) -> bool | None:
    shape = buffers[0].shape
    if len(shape) != 1 or any(buffer.shape != shape for buffer in buffers):
        return None
    t = cpp_type(*buffers)
    if t not in _TYPES or not all(_is_device_scalar(xp, h, np.float64) for h in hyper):
        return None
    width = pack_width(xp, t, 0, *buffers)
    _SOURCE.kernel(f"tapegrad_{rule}<{t}, {width}>")(
        grid(-(-shape[0] // width)),
        (THREADS,),
        (*buffers, np.int64(shape[0]), *counters, *hyper, *flags),
    )
    return True


def _is_device_scalar(xp: Module, value: Any, dtype: type) -> bool:
    """Tell whether `value` is a 0-d array of `xp`: CuPy would take a NumPy one too, by value, and
    the kernel would read an address made of its bits.
    """
    return isinstance(value, xp.ndarray) and value.shape == () and value.dtype == dtype
