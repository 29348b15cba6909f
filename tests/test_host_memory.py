"""Freed memory stays with the process, so that the next step finds it without page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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
