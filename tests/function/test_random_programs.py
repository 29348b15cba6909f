"""Hundreds of random training programs, eager and compiled: the same, bit for bit."""

from __future__ import annotations

import pytest

import tapegrad as tg
from tests.function.compiled import assert_same, rewritten
from tests.function.programs import Training


def compare(seed: int, steps: int, rtol: float | None, dtype: str | None = None) -> None:
    eager, other = Training(seed, dtype), Training(seed, dtype)
    compiled = tg.function(other.step)
    wanted = eager.run(eager.step, steps)
    about = f"seed {seed}, {eager.describe()}"
    try:
        got = other.run(compiled, steps)
        assert len(compiled.programs) == 1
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b, rtol)
        assert_same(other.state(), eager.state(), rtol)
    except Exception as error:
        error.add_note(about)
        raise


@pytest.mark.parametrize("seed", range(150))
def test_bit_for_bit_over_a_hundred_steps(seed):
    with rewritten(False):
        compare(seed, 100 if seed % 4 == 0 else 12, None)


@pytest.mark.parametrize("seed", range(200, 300))
def test_rewritten_in_double_precision(seed):
    compare(seed, 20, 1e-9, "f8")


@pytest.mark.parametrize("seed", range(350, 420))
def test_rewritten_in_single_precision(seed):
    compare(seed, 5, 1e-4, "f4")
