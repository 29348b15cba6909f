"""Where CuPy's functions differ from NumPy's: tapegrad answers as NumPy does on both backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tapegrad as tg

NAN, INF = np.nan, np.inf
SPECIAL = np.array([0.0, -0.0, 1, -1, 0.1, -0.1, 3, -3, 7.5, 1e4, -1e4, INF, -INF, NAN, 2])
FIRST, SECOND = (a.ravel() for a in np.meshgrid(SPECIAL, SPECIAL))


def index_gradient(kind: str) -> Callable[[], Any]:
    def gradient() -> Any:
        v = tg.Variable(np.zeros((300, 2), "f4"))
        with tg.GradientTape() as tape:
            y = tg.take(v, np.array([1, -1, 1], kind), axis=0)
        return tape.gradient(y, v)

    return gradient


def slope_of_cube() -> Any:
    """The rule multiplies by the exponent, a Python number, which CuPy's where cannot test."""
    x = tg.constant([0.0, 1.0, NAN])
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = x**3 + x**0
    return tape.gradient(y, x)


ALIKE: dict[str, Callable[[], Any]] = {
    "remainder by infinity": lambda: tg.constant([1.0, -1.0]) % np.float32(INF),
    "quotient of 1 and 0.1": lambda: tg.constant(np.ones(2)) // 0.1,
    "remainder of integers": lambda: tg.constant([7, -7, 5]) % tg.constant([3, 3, -2]),
    "quotient of integers": lambda: tg.constant([7, -7, 5]) // tg.constant([3, 3, -2]),
    "remainder of a number": lambda: 5.0 % tg.constant([3.0, -3.0]),
    "sign of NaN": lambda: tg.sign(tg.constant([NAN, -0.0, 2.0])),
    "maximum with NaN": lambda: tg.maximum(tg.constant([NAN, 1.0]), tg.constant([1.0, NAN])),
    "extremes of NaN": lambda: tg.max(tg.constant([1.0, NAN, 3.0])),
    "place of NaN": lambda: tg.argmax(tg.constant([1.0, NAN, 3.0])),
    "order of NaN": lambda: tg.argsort(tg.constant([1.0, NAN, 0.0, NAN])),
    "sum of infinite exponents": lambda: tg.logaddexp([-INF, INF, -INF], [-INF, INF, 0.0]),
    "rounded integers": lambda: [tg.floor([1, 2]), tg.ceil([1, 2]), tg.trunc([1, 2])],
    "logarithm of a number": lambda: tg.xlogy([0.0, 1.0], 2.0),
    "number as a condition": lambda: [tg.where(1, [1.0, 2.0], 0.0), tg.where(0, [1.0], 5.0)],
    "number out of range": lambda: tg.constant(np.array([1, 2], "u1")) < 300,
    "extreme of empty rows": lambda: tg.max(np.zeros((0, 3)), axis=1),
    "slope of a cube": slope_of_cube,
    **{f"gradient for {kind} rows": index_gradient(kind) for kind in ("i1", "i2", "i8")},
}
REFUSED: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "index out of range": (IndexError, lambda: tg.constant([1.0, 2.0])[[2]]),
    "index out of range, written": (IndexError, lambda: tg.Variable([1.0])[[1]].assign(0.0)),
    "mask of no elements": (IndexError, lambda: tg.constant([1.0])[np.zeros(0, bool)]),
    "negative power of integers": (ValueError, lambda: tg.constant([2, 3]) ** -1),
    "negative powers of integers": (ValueError, lambda: tg.power([2, 3], [1, -1])),
    "largest of nothing": (ValueError, lambda: tg.max(np.zeros((0, 3)))),
}


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
@pytest.mark.parametrize("function", [tg.remainder, tg.floor_divide])
def test_division_is_numpys_to_the_bit(function: Callable[..., Any], dtype: str) -> None:
    rng = np.random.default_rng(0)
    a = np.concatenate([FIRST, rng.normal(size=2000) * 100]).astype(dtype)
    b = np.concatenate([SECOND, rng.normal(size=2000)]).astype(dtype)
    with np.errstate(all="ignore"):
        got = function(tg.constant(a), tg.constant(b)).numpy()
        want = getattr(np, function.__name__)(a, b)
    np.testing.assert_array_equal(got, want, strict=True)
    known = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]))


@pytest.mark.parametrize("name", ALIKE)
def test_alike(name: str) -> None:
    with np.errstate(all="ignore"):
        got = ALIKE[name]()
        with tg.backend("numpy"):
            want = ALIKE[name]()
    pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
    for y, w in pairs:
        assert y.backend == "cupy"
        np.testing.assert_allclose(y.numpy(), w.numpy(), rtol=1e-6, strict=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    exception, call = REFUSED[name]
    with pytest.raises(exception):
        call()
