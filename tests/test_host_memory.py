"""Freed memory stays with the process, so that the next step finds it without page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from tapegrad._host_memory import aligned, following, neighbours, spanning

STEPS = """
import resource
import numpy as np
{first}
def step():
    for _ in range(2):
        arrays = [np.ones(1 << 19, np.float32) for _ in range(12)]  # of 2 MiB
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) / 10)
"""


def faults(first: str, **environment: str) -> float:
    """Return how many pages a step has to ask the system for."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    answer = subprocess.run(
        [sys.executable, "-c", STEPS.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | environment,
    )
    return float(answer.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    if faults("") < 500:
        pytest.skip("this glibc keeps freed memory by itself")
    assert faults("import tapegrad") < 50
    assert faults("import tapegrad", TAPEGRAD_KEEP_MEMORY="0") > 500
    assert faults("import tapegrad", MALLOC_TRIM_THRESHOLD_="131072") > 500  # what the user says


ARENA = """
import numpy as np
import tapegrad as tg

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

vs = [tg.Variable(np.full((512, 512), 0.01, np.float32)) for _ in range(12)]

@tg.function
def step(x):
    with tg.GradientTape() as tape:
        h = x
        for v in vs:
            h = tg.tanh(tg.matmul(h, v)) * 0.5 + h  # arrays of 4 MiB
        loss = tg.sum(h * h)
    for v, g in zip(vs, tape.gradient(loss, vs)):
        v.assign_sub(g * 1e-6)
    return loss

x = tg.constant(np.ones((2048, 512), np.float32))
before = resident()
for _ in range(3):
    step(x)
print(resident() - before, step.programs[0].arena)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_is_kept_goes_back_before_a_program_takes_its_memory():
    answer = subprocess.run(
        [sys.executable, "-c", ARENA], capture_output=True, text=True, check=True
    )
    more, arena = map(int, answer.stdout.split())
    assert arena > 1 << 24
    assert more < 1.5 * arena


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("shape", [(), 0, 1, 5, (3, 4), (0, 2), 1000])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u1"])
def test_aligned_memory(shape, dtype):
    array = aligned(shape, dtype, 3)
    np.testing.assert_array_equal(array, np.full(shape, 3, dtype), strict=True)
    assert address(array) % 64 == 0
    assert array.flags.writeable


def test_neighbours_lie_one_behind_the_other():
    first, second, third = neighbours(5, "f4", [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(first, np.full(5, 1, "f4"), strict=True)
    np.testing.assert_array_equal(third, np.full(5, 3, "f4"), strict=True)
    both = spanning(first, second)
    np.testing.assert_array_equal(both, np.repeat(np.array([1, 2], "f4"), 5), strict=True)
    both += 1
    assert (first[4], second[0]) == (2, 3)
    assert address(following(second)) == address(third)
    assert address(following(first[:])) == address(second)


def test_what_spans_or_follows_nothing():
    first, second, third = neighbours(5, "f4", [1.0, 2.0, 3.0])
    (other,) = neighbours(5, "f4", [1.0])
    own = np.zeros(10, "f4")
    for pair in [
        (second, first),
        (first, third),
        (first[:4], second),
        (first[::2], second),
        (first, second[::-1]),
        (first.reshape(5, 1), second),
        (first, second.view("i4")),
        (other, first),
        (own[:5], own[5:]),
        (first[:0], first),
    ]:
        assert spanning(*pair) is None
    assert spanning(first[1:], second[:2]).size == 6
    for array in (first[:4], first[1:], own, own[:5]):
        assert following(array) is None
