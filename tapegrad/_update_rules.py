"""What each optimiser does to its parameters: rules on blocks of flat arrays, and their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._blocks import BLOCK
from tapegrad._flat_update import FlatUpdate
from tapegrad.kernels import optimizers as kernels
from tapegrad.primitive import Update

# An update is a rule on blocks of flat arrays, in place: `rule(xp, *arrays, spare, *numbers)`, with
# scratch of a block's size and numbers of the arrays' type (a wider type would promote). Its
# numbers come from the hyper-parameters, 0-d float64 arrays, and `step`, a 0-d int64 array: a
# compiled program looks in every call whether they are what they were.
#
# A moving average `a = keep * a + (1 - keep) * x` may be kept as a / unit, where the unit is what
# 1 - keep was at first: then x is added as it is, and a pass over memory is saved for each average.


def _sgd_numbers(learning_rate: float) -> tuple[float, ...]:
    return (learning_rate,)


def _times(xp: Module, x: Array, number: Any, spare: Array) -> Array:
    """Return x * number, in spare; x itself where a CPU's number is 1."""
    if xp is np and number.item() == 1:  # a device would be waited for
        return x
    return xp.multiply(x, number, spare)


def _sgd_rule(xp: Module, p: Array, g: Array, spare: Array, rate: Any) -> None:
    xp.subtract(p, _times(xp, g, rate, spare), p)


def _momentum_numbers(learning_rate: float, momentum: float) -> tuple[float, ...]:
    return learning_rate, momentum


def _momentum_rule(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    spare: Array,
    rate: Any,
    mu: Any,
    *,
    nesterov: bool,
) -> None:
    step = _times(xp, g, rate, spare)
    xp.multiply(v, mu, v)
    xp.subtract(v, step, v)
    if nesterov:
        xp.subtract(p, step, p)
        xp.multiply(v, mu, spare)
        xp.add(p, spare, p)
    else:
        xp.add(p, v, p)


def _divide_by_root(xp: Module, g: Array, square: Array, spare: Array, rate: Any, eps: Any) -> None:
    """Let spare = rate * g / (sqrt(square) + eps).

    With an epsilon of 0 a parameter that never had a gradient (padding, say) would be 0 / 0: it
    does not move.
    """
    xp.sqrt(square, spare)
    xp.add(spare, eps, spare)
    if xp is not np or not eps.item():  # a device would be waited for
        spare[...] = xp.where(spare == 0, spare.dtype.type(math.inf), spare)
    xp.divide(g, spare, spare)
    xp.multiply(spare, rate, spare)


def _adagrad_numbers(learning_rate: float, epsilon: float) -> tuple[float, ...]:
    return learning_rate, epsilon


def _adagrad_rule(
    xp: Module, p: Array, a: Array, g: Array, spare: Array, rate: Any, eps: Any
) -> None:
    xp.multiply(g, g, spare)
    xp.add(a, spare, a)
    _divide_by_root(xp, g, a, spare, rate, eps)
    xp.subtract(p, spare, p)


def _average(xp: Module, a: Array, x: Array, spare: Array, keep: Any, take: Any) -> None:
    """Let a = keep * a + take * x; x may be spare."""
    taken = _times(xp, x, take, spare)
    xp.multiply(a, keep, a)
    xp.add(a, taken, a)


def _rmsprop_numbers(
    learning_rate: float, rho: float, epsilon: float, *, unit_of_mean_square: float = 1.0
) -> tuple[float, ...]:
    root = math.sqrt(unit_of_mean_square)
    return learning_rate / root, rho, (1 - rho) / unit_of_mean_square, epsilon / root


def _rmsprop_rule(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    spare: Array,
    rate: Any,
    keep: Any,
    take: Any,
    eps: Any,
) -> None:
    xp.multiply(g, g, spare)
    _average(xp, v, spare, spare, keep, take)
    _divide_by_root(xp, g, v, spare, rate, eps)
    xp.subtract(p, spare, p)


def _adam_numbers(
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    *,
    unit_of_m: float = 1.0,
    unit_of_v: float = 1.0,
) -> tuple[Any, ...]:
    # m / (1 - beta_1**t) / (sqrt(v / (1 - beta_2**t)) + epsilon), with the constants drawn out of
    # the root: two passes over memory fewer.
    square_root = _square_root_for(beta_2)

    def at(step: int) -> tuple[float, ...]:
        root = square_root((1 - beta_2**step) / unit_of_v)
        return learning_rate * root * (unit_of_m / (1 - beta_1**step)), epsilon * root

    take_m, take_v = (1 - beta_1) / unit_of_m, (1 - beta_2) / unit_of_v
    return beta_1, take_m, beta_2, take_v, 1 - learning_rate * weight_decay, at


def _square_root_for(x: Any) -> Callable[[Any], Any]:
    """Return what takes the root of a Python number, or of a device's array where it is."""
    return math.sqrt if type(x) is float else np.sqrt


def _adam_rule(
    xp: Module,
    p: Array,
    m: Array,
    v: Array,
    g: Array,
    spare: Array,
    keep_m: Any,
    take_m: Any,
    keep_v: Any,
    take_v: Any,
    shrink: Any,
    rate: Any,
    eps: Any,
) -> None:
    _average(xp, m, g, spare, keep_m, take_m)
    xp.multiply(g, g, spare)
    _average(xp, v, spare, spare, keep_v, take_v)
    _divide_by_root(xp, m, v, spare, rate, eps)
    if xp is not np or shrink.item() != 1:
        xp.multiply(p, shrink, p)
    xp.subtract(p, spare, p)


sgd_update = FlatUpdate("sgd", _sgd_rule, _sgd_numbers, writes=1, kernel=kernels.sgd)
momentum_update = FlatUpdate(
    "momentum", _momentum_rule, _momentum_numbers, writes=2, kernel=kernels.momentum
)
adagrad_update = FlatUpdate(
    "adagrad", _adagrad_rule, _adagrad_numbers, writes=2, kernel=kernels.adagrad
)
rmsprop_update = FlatUpdate(
    "rmsprop", _rmsprop_rule, _rmsprop_numbers, writes=2, kernel=kernels.rmsprop
)
adam_update = FlatUpdate(
    "adam", _adam_rule, _adam_numbers, counts=True, writes=3, kernel=kernels.adam
)


def _gather(xp: Module, flat: Array, *gradients: Array, places: tuple[int, ...]) -> None:
    for place, g in zip(places, gradients, strict=True):
        part = flat[place : place + g.size]
        # A compiled program on a GPU may have computed it there.
        if xp is np or g.data.ptr != part.data.ptr:
            part[...] = g.reshape(-1)


# Copy gradients to where their parameters stand in the flat buffer.
gather_gradients = Update("gather_gradients", _gather, writes=1)


def _sum_of_squares(xp: Module, g: Array) -> Any:
    if xp is not np:
        return xp.sum(xp.square(g.astype(np.float64)))
    blocks = (g[i : i + BLOCK].astype(np.float64) for i in range(0, g.size, BLOCK))
    return sum(np.dot(block, block) for block in blocks)


def _gradient_factor(xp: Module, factor: Array, limit: Any, scale: Any, *gradients: Array) -> None:
    by = 1 / scale
    norm = by * xp.sqrt(sum(_sum_of_squares(xp, g) for g in gradients))
    shortened = xp.where(norm <= limit, 1.0, limit / xp.maximum(norm, np.finfo(np.float64).tiny))
    # Of an infinite norm limit / norm would be 0: nothing would move, and nobody would know.
    factor[...] = by * xp.where(xp.isfinite(norm), shortened, math.nan)


# What all gradients are multiplied by: 1 / scale, and less where their norm is above the limit.
gradient_factor = Update(
    "gradient_factor", _gradient_factor, writes=1, kernel=kernels.gradient_factor
)
