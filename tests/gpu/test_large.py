"""More than 2^32 elements on the device: what kernels do at the end is what they do to it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend
from tapegrad.kernels import linear_relu, optimizers, random, scatter_add, softmax_cross_entropy
from tapegrad.tensor import wrap

from .conftest import STAND_IN

COLUMNS, END = 1024, 3
ROWS = 2 * END if STAND_IN else 2**32 // COLUMNS + END
BYTES = 2 * ROWS * COLUMNS  # of an array; no case has more than five


@pytest.fixture(autouse=True)
def _room(cupy: ModuleType) -> Iterator[None]:
    if not STAND_IN:
        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        free, _ = cupy.cuda.Device().mem_info
        if free < 6 * BYTES:
            pytest.skip(f"needs {6 * BYTES >> 30} GiB of the device's memory")
    yield
    cupy.get_default_memory_pool().free_all_blocks()


def matrix(xp: ModuleType, seed: int) -> Any:
    """Return ones, but for other numbers in the last rows."""
    x = xp.full((ROWS, COLUMNS), 1, np.float16)
    x[-END:] = xp.asarray(np.random.default_rng(seed).normal(size=(END, COLUMNS)).astype("f2"))
    return x


def gradient_below(xp: ModuleType, y: Any, g: Any) -> Any:
    found = linear_relu.linear_relu_grad(xp, g, y)
    assert found is not None
    return found[0]


def cross_entropy(xp: ModuleType, x: Any, _: Any) -> Any:
    labels = xp.full(len(x), COLUMNS - 1, np.int64)
    options = {"label_smoothing": 0.1, "ignore_label": None}
    return softmax_cross_entropy.softmax_cross_entropy_with_grad(xp, x, labels, **options)


def sgd(xp: ModuleType, x: Any, g: Any) -> Any:
    flat, rate = [a.reshape(-1) for a in (x, g)], xp.asarray(np.array(0.5))
    assert optimizers.sgd(xp, *flat, rate) is True
    return x


def scattered(xp: ModuleType, x: Any, _: Any) -> Any:
    return scatter_add.scatter_add(xp, x, xp.arange(len(x)), len(x))


def dropout(xp: ModuleType, x: Any, _: Any) -> Any:
    before = (ROWS - len(x)) * COLUMNS // 8  # elements of a counter
    state = xp.asarray(np.array(5 + before)), xp.asarray(np.array([7, 1], np.uint64))
    return random.dropout(xp, x, *state, rate=0.3)


CASES: dict[str, Callable[..., Any]] = {
    "chain": lambda xp, x, _: tg.nn.gelu(wrap(x))._array,
    "linear_relu_grad": gradient_below,
    "cross_entropy": cross_entropy,
    "sgd": sgd,
    "scatter_add": scattered,
    "dropout": dropout,
}


@pytest.mark.parametrize("name", CASES)
def test_the_end_of_a_large_array(cupy: ModuleType, name: str) -> None:
    arrays = [matrix(cupy, seed) for seed in range(2)]
    ends = [a[-END:].copy() for a in arrays]
    results = []
    for given in (arrays, ends):
        found = CASES[name](cupy, *given)
        found = found if isinstance(found, tuple) else (found,)
        results.append([_backend.to_numpy(y[-END:]) for y in found])
        del found
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


def test_the_norm_of_a_large_array(cupy: ModuleType) -> None:
    factor = cupy.asarray(np.array(0.0))
    ones = cupy.full(ROWS * COLUMNS, 1, np.float16)
    limit, scale = (cupy.asarray(np.array(x)) for x in (1.0, 1.0))
    assert optimizers.gradient_factor(cupy, factor, limit, scale, ones) is True
    np.testing.assert_allclose(float(factor), (ROWS * COLUMNS) ** -0.5, rtol=1e-12)


def test_the_end_of_many_random_bits(cupy: ModuleType) -> None:
    count = ROWS * COLUMNS // 2 + 2
    key, counter = (cupy.asarray(a) for a in (np.array([7, 1], np.uint64), np.array(5)))
    bits = random.philox_bits(cupy, counter, key, count=count)
    assert bits is not None
    start = (count - 9) // 4
    want = np.random.Philox(key=2**64 + 7, counter=5 + start).random_raw(count - 4 * start)
    np.testing.assert_array_equal(_backend.to_numpy(bits[4 * start :]), want, strict=True)
