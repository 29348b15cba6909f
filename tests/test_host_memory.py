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
