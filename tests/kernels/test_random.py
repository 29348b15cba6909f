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


def expected(count, key, counter):
    return np.random.Philox(key=key, counter=counter).random_raw(count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 1023, 1024, 1025, 4099])
def test_equals_numpy(count):
    with kernels_on_cpu():
        bits = philox_bits(np, count, key=12345, counter=678)
    np.testing.assert_array_equal(bits, expected(count, 12345, 678), strict=True)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**128 - 1), st.integers(0, 2**256 - 1), st.integers(1, 40))
@example(0, 2**64 - 3, 20)  # the carry into the second word
@example(1, 2**128 - 2, 20)
@example(1, 2**192 - 1, 20)
@example(2**128 - 1, 2**256 - 2, 20)  # round to 0
@example(2**64, 2**256 - 1, 20)
def test_equals_numpy_for_any_key_and_counter(key, counter, count):
    with kernels_on_cpu():
        bits = philox_bits(np, count, key=key, counter=counter)
    np.testing.assert_array_equal(bits, expected(count, key, counter))


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        np.testing.assert_array_equal(philox_bits(np, 131, key=1, counter=2), expected(131, 1, 2))


def test_more_counters_than_threads_in_a_launch(monkeypatch):
    monkeypatch.setattr(random, "grid", lambda items: (1,))
    with kernels_on_cpu():
        np.testing.assert_array_equal(philox_bits(np, 3001, key=1, counter=2), expected(3001, 1, 2))


def test_nothing_is_declined():
    with kernels_on_cpu():
        assert philox_bits(np, 0, key=1, counter=2) is None


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("asan", "i * kWords + k < count", "i * kWords + k <= count"),
        ("fast", "bool carry = c[0] < word(i);", "bool carry = false;"),
        ("fast", "kRounds = 10", "kRounds = 9"),
    ],
)
def test_planted_faults_are_found(mode, was, now):
    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises((KernelError, AssertionError), match=r"AddressSanitizer|not equal"),
    ):
        np.testing.assert_array_equal(
            philox_bits(np, 9, key=1, counter=2**64 - 2), expected(9, 1, 2**64 - 2)
        )
