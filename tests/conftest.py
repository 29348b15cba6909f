"""What all tests share: the backend they run on, and a check that no test leaves a tape behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# The GPU tests set it to "cupy"; elsewhere an installed CuPy without a device must not be asked.
os.environ.setdefault("TAPEGRAD_BACKEND", "numpy")

from tapegrad._recording import state


@pytest.fixture(autouse=True)
def no_tape_is_left_recording() -> Iterator[None]:
    """The recorders of a thread are the only global state that tests share: it must stay empty."""
    yield
    left, state.recorders = state.recorders, []
    assert left == [], f"the test left recorders active: {left}"
