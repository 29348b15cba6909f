"""Dropout against its meaning: NumPy's own Philox, and the same bits in values and factors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, misaligned, read_only
from test_large import PAST, run_end, sparse

from tapegrad.kernels import random
from tapegrad.kernels.random import dropout

KEY, COUNTER = 2**65 + 1, 2**62
WORDS = np.array([KEY & (2**64 - 1), KEY >> 64], np.uint64)
DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16]
# Around the edges of what one counter gives (8), of a warp's and of a block's elements.
SIZES = [1, 7, 8, 9, 16, 255, 256, 257, 2047, 2048, 2049, 5003]


def values(size, dtype="f4"):
    return np.random.default_rng(0).normal(size=size).astype(dtype)


def meaning(x, rate):
    words = np.random.Philox(key=KEY, counter=COUNTER).random_raw(-(-x.size // 2))
    kept = words.view(np.uint32)[: x.size].astype(np.int64) < round((1 - rate) * 2**32)
    factors = kept.reshape(x.shape).astype(x.dtype) / x.dtype.type(1 - rate)
    return x * factors, factors


def run(x, rate):
    return dropout(np, x, *read_only(np.array(COUNTER), WORDS), rate=rate)


def check(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_equals_the_meaning(dtype):
    with kernels_on_cpu():
        for size in SIZES:
            (x,) = read_only(values(size, dtype))
            check(run(x, 0.3), meaning(x, 0.3))
        x = values((33, 7), dtype)
        check(run(x, 0.9), meaning(x, 0.9))


@pytest.mark.parametrize("rate", [1e-12, 0.5, 1 - 2**-33])
def test_rates_at_the_ends(rate):
    """1e-12 is a threshold of 2^32, which no 32 bits reach."""
    with kernels_on_cpu():
        x = values(2000)
        check(run(x, rate), meaning(x, rate))


def test_nan_and_infinity_are_multiplied():
    x = np.array([np.nan, np.inf, -np.inf] * 10, "f4")
    with kernels_on_cpu(), np.errstate(invalid="ignore"):
        check(run(x, 0.5), meaning(x, 0.5))


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        for x in (values(77), misaligned(values(77))):
            check(run(*read_only(x), 0.3), meaning(x, 0.3))


def test_more_elements_than_threads_in_a_launch(monkeypatch):
    monkeypatch.setattr(random, "grid", lambda items: (1,))
    with kernels_on_cpu():
        check(run(values(9001), 0.3), meaning(values(9001), 0.3))


@pytest.mark.parametrize("x", [values(8)[::2], values(8)[:0], np.arange(8)])
def test_declined(x):
    with kernels_on_cpu():
        assert run(x, 0.5) is None


def end_of_a_large_array():
    count = PAST + 8
    x, y, factors = (sparse(count) for _ in range(3))
    x[-8:] = 1
    grid = (-(-count // 8 // 256),)
    module = type("Module", (), {"_SOURCE": random._DROPOUT})
    sizes = np.int64(count), np.int64(2**31), np.float32(2)
    arrays = x, y, factors, np.array(5), np.array([1, 0], np.uint64)
    run_end(module, "tapegrad_dropout<float, 4>", grid, (256,), *arrays, *sizes)
    words = np.random.Philox(key=1, counter=5 + PAST // 8).random_raw(4)
    np.testing.assert_array_equal(y[-8:], 2.0 * (words.view(np.uint32) < 2**31))


def test_offsets_past_32_bits():
    with kernels_on_cpu():
        end_of_a_large_array()


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("asan", "left >= kElements", "left >= kElements - 1"),
        ("asan", "if (k < left)", "if (k <= left)"),
        ("fast", "k % 2 * 32", "32 - k % 2 * 32"),
        ("fast", "+ 1 + word(i)", "+ word(i)"),
        ("fast", "i * (kElements / N) + k", "unsigned(i * (kElements / N) + k) % (1u << 30)"),
    ],
)
def test_planted_faults_are_found(mode, was, now):
    def run_everything():
        check(run(values(15), 0.5), meaning(values(15), 0.5))
        end_of_a_large_array()

    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises((KernelError, AssertionError), match=r"AddressSanitizer|not equal"),
    ):
        run_everything()
