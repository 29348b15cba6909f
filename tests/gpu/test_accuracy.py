"""Accuracy in float32 on the device: functions within CUDA's bounds, sums within ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tapegrad as tg

from .conftest import STAND_IN

TINY, HUGE = 2.0**-126, 2.0**126
# name: (function, the same in float64, largest error in units in the last place, domains)
#
# The bounds are those of the CUDA C++ Programming Guide, "Mathematical Functions", single precision
# standard functions, the largest of its editions for CUDA 12 and 13: units by which a result may
# differ from the correctly rounded one. What follows the first blank line is composed, by CuPy or
# here, and has a bound made of those of its parts.
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int, tuple[Any, ...]]] = {
    "add": (tg.add, np.add, 0, ((-9, 9), (-9, 9))),
    "multiply": (tg.multiply, np.multiply, 0, ((-9, 9), (0.1, 9))),
    "divide": (tg.divide, np.divide, 0, ((-9, 9), (0.1, 9))),
    "sqrt": (tg.sqrt, np.sqrt, 0, ((TINY, HUGE),)),
    "reciprocal": (tg.reciprocal, np.reciprocal, 0, ((TINY, HUGE),)),
    "exp": (tg.exp, np.exp, 2, ((-87, 88),)),
    "exp2": (tg.exp2, np.exp2, 2, ((-126, 127),)),
    "expm1": (tg.expm1, np.expm1, 1, ((-80, 88),)),
    "log": (tg.log, np.log, 1, ((TINY, HUGE),)),
    "log2": (tg.log2, np.log2, 1, ((TINY, HUGE),)),
    "log10": (tg.log10, np.log10, 2, ((TINY, HUGE),)),
    "log1p": (tg.log1p, np.log1p, 1, ((-0.999, 100),)),
    "sin": (tg.sin, np.sin, 2, ((-1000, 1000),)),
    "cos": (tg.cos, np.cos, 2, ((-1000, 1000),)),
    "tan": (tg.tan, np.tan, 4, ((-1000, 1000),)),
    "asin": (tg.asin, np.arcsin, 4, ((-1, 1),)),
    "acos": (tg.acos, np.arccos, 3, ((-1, 1),)),
    "atan": (tg.atan, np.arctan, 2, ((-100, 100),)),
    "atan2": (tg.atan2, np.arctan2, 3, ((-9, 9), (-9, 9))),
    "sinh": (tg.sinh, np.sinh, 3, ((-88, 88),)),
    "cosh": (tg.cosh, np.cosh, 2, ((-88, 88),)),
    "tanh": (tg.tanh, np.tanh, 2, ((-20, 20),)),
    "asinh": (tg.asinh, np.arcsinh, 3, ((-1e6, 1e6),)),
    "acosh": (tg.acosh, np.arccosh, 4, ((1, 1e6),)),
    "atanh": (tg.atanh, np.arctanh, 3, ((-0.999, 0.999),)),
    "hypot": (tg.hypot, np.hypot, 3, ((-9, 9), (-9, 9))),
    "power": (tg.power, np.power, 9, ((0.01, 20), (-20, 20))),
    "floor": (tg.floor, np.floor, 0, ((-1e6, 1e6),)),
    "ceil": (tg.ceil, np.ceil, 0, ((-1e6, 1e6),)),
    "round": (tg.round, np.rint, 0, ((-1e6, 1e6),)),
    "trunc": (tg.trunc, np.trunc, 0, ((-1e6, 1e6),)),
    "abs": (tg.abs, np.abs, 0, ((-9, 9),)),
    "remainder": (tg.remainder, np.remainder, 1, ((-1e6, 1e6), (0.1, 9))),
    "floor_divide": (tg.floor_divide, np.floor_divide, 0, ((-1e3, 1e3), (0.1, 9))),
    #
    "square": (tg.square, np.square, 0, ((-9, 9),)),
    "rsqrt": (tg.rsqrt, lambda x: 1 / np.sqrt(x), 2, ((TINY, HUGE),)),
    "logaddexp": (tg.logaddexp, np.logaddexp, 4, ((1, 50), (1, 50))),
    "sigmoid": (tg.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 4, ((-80, 80),)),
    "softplus": (tg.nn.softplus, lambda x: np.logaddexp(x, 0), 4, ((-80, 80),)),
}  # fmt: skip


def drawn(low: float, high: float, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw float32 numbers: evenly, or where the bounds are powers apart, over all exponents."""
    if low > 0 and high / low > 1e6:
        return np.exp2(rng.uniform(np.log2(low), np.log2(high), 20_000)).astype(np.float32)
    return rng.uniform(low, high, 20_000).astype(np.float32)


def units_apart(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return how many float32 numbers lie between each pair."""
    bits = [a.view(np.int32).astype(np.int64) for a in (got, want)]
    ordered = [np.where(b < 0, -(b & 0x7FFFFFFF), b) for b in bits]
    return np.asarray(np.abs(ordered[0] - ordered[1]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise(name: str) -> None:
    function, exact, bound, domains = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    xs = [drawn(low, high, rng) for low, high in domains]
    got = function(*map(tg.constant, xs))
    assert (got.backend, got.dtype) == ("cupy", np.float32)
    with np.errstate(all="ignore"):
        exactly = exact(*[x.astype(np.float64) for x in xs])
        want = exactly.astype(np.float32)
    normal = (np.abs(exactly) >= TINY) & np.isfinite(want)
    assert normal.mean() > 0.4
    worst = units_apart(got.numpy()[normal], want[normal]).max()
    assert worst <= (max(bound, 4) if STAND_IN else bound), f"{worst} units in the last place"


# W. J. Cody's approximations in float32: the rounding of each step adds up.
def test_erf() -> None:
    x = np.linspace(-6, 6, 20_001, dtype=np.float32)
    want = np.array([math.erf(v) for v in x.astype(np.float64)])
    np.testing.assert_allclose(tg.erf(tg.constant(x)).numpy(), want, rtol=1e-6, atol=1e-7)


# A sum of n float32 is off by at most (levels of additions) * 2**-24 * sum|x|; CuPy adds in a tree
# under which a thread's own run is n / 512 long or more, so the levels are bounded by what follows.
@pytest.mark.parametrize(
    "shape", [(1,), (1000,), (1_000_003,), (512, 1025), (3, 70_001), (70_001, 3)]
)
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_sums(shape: tuple[int, ...], axis: int | None) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    want = x.astype(np.float64).sum(axis)
    n = x.size if axis is None else x.shape[axis]
    scale = np.abs(x.astype(np.float64)).sum(axis)
    levels = 32 + n / 512
    got = tg.sum(tg.constant(x), axis=axis).numpy()
    assert (np.abs(got - want) <= levels * 2.0**-24 * scale).all()
    mean = tg.mean(tg.constant(x), axis=axis).numpy()
    assert (np.abs(mean - want / n) <= (levels + 1) * 2.0**-24 * scale / n).all()
    top = tg.max(tg.constant(x), axis=axis).numpy()
    np.testing.assert_array_equal(top, x.max(axis))


@pytest.mark.parametrize(
    ("n", "inner", "m"), [(1, 1, 1), (33, 257, 31), (128, 784, 512), (5, 0, 3)]
)
def test_products(n: int, inner: int, m: int) -> None:
    """TensorFloat-32, which CuPy uses only when told to, would be off a thousand times more."""
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((n, inner), (inner, m)))
    want = a.astype(np.float64) @ b.astype(np.float64)
    scale = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    got = tg.matmul(tg.constant(a), tg.constant(b)).numpy()
    assert (np.abs(got - want) <= (inner + 2) * 2.0**-24 * scale).all()
