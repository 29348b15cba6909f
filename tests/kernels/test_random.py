"""Philox bits against numpy.random.Philox, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapegrad.kernels import random
from tapegrad.kernels.random import philox_bits


def bits_of(count, key, counter):
    words = np.array([key & (2**64 - 1), key >> 64], np.uint64)
    return philox_bits(np, np.int64(counter), words, count=count)


def expected(count, key, counter):
    return np.random.Philox(key=key, counter=counter).random_raw(count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 1023, 1024, 1025, 4099])
def test_equals_numpy(count):
    with kernels_on_cpu():
        bits = bits_of(count, 12345, 678)
    np.testing.assert_array_equal(bits, expected(count, 12345, 678), strict=True)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**128 - 1), st.integers(0, 2**62), st.integers(1, 40))
@example(2**128 - 1, 2**62, 20)
@example(2**64, 0, 20)
def test_equals_numpy_for_any_key_and_counter(key, counter, count):
    with kernels_on_cpu():
        bits = bits_of(count, key, counter)
    np.testing.assert_array_equal(bits, expected(count, key, counter))


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        np.testing.assert_array_equal(bits_of(131, 1, 2), expected(131, 1, 2))


def test_more_counters_than_threads_in_a_launch(monkeypatch):
    monkeypatch.setattr(random, "grid", lambda items: (1,))
    with kernels_on_cpu():
        np.testing.assert_array_equal(bits_of(3001, 1, 2), expected(3001, 1, 2))


def test_nothing_is_declined():
    with kernels_on_cpu():
        assert bits_of(0, 1, 2) is None


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("asan", "i * kWords + k < count", "i * kWords + k <= count"),
        ("fast", "k1 = key[1]", "k1 = key[0]"),
        ("fast", "kRounds = 10", "kRounds = 9"),
    ],
)
def test_planted_faults_are_found(mode, was, now):
    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises((KernelError, AssertionError), match=r"AddressSanitizer|not equal"),
    ):
        np.testing.assert_array_equal(bits_of(9, 2**65 + 1, 2**62), expected(9, 2**65 + 1, 2**62))
