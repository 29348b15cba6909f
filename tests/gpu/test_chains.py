"""Compiled chains of elementwise operations on the device, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")

import tapegrad as tg
from tapegrad.kernels import chains
from tests.function.compiled import rewritten
from tests.kernels import test_chains as meanings


@pytest.fixture(autouse=True)
def chains_alone() -> Iterator[None]:
    """Without what puts fused layers in the place of some chains."""
    with rewritten({"chains"}):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[chains.Chain]:
    """The chains whose kernels ran."""
    found: list[chains.Chain] = []
    run = chains.run

    def noting(chain: chains.Chain, *arguments: Any) -> Any:
        answer = run(chain, *arguments)
        assert answer is not None, "the kernel declined"
        found.append(chain)
        return answer

    monkeypatch.setattr(chains, "run", noting)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (257, 33), (4096, 132)], ids=str)
@pytest.mark.parametrize("name", meanings.NAMES)
def test_activations(name: str, shape: tuple[int, int], launched: list[chains.Chain]) -> None:
    """Forward, backward and the bias's gradient; the last shape has several blocks a column."""
    step, arrays = meanings.layer(meanings.ELEMENTWISE[name]), meanings.arrays_of(*shape)
    got, names = meanings.compiled(step, *arrays)
    assert "chain" in names
    assert any(chain.sums for chain in launched)
    meanings.check(got, meanings.in_float64(step, *arrays), units=256)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
@pytest.mark.parametrize("name", meanings.NAMES)
def test_activations_outside_programs(name: str, dtype: str, launched: list[chains.Chain]) -> None:
    """One kernel forward and one back; relu and tanh have one of another kind each."""

    def both(x: Any, g: Any) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = meanings.ELEMENTWISE[name](x)
        return y, tape.gradient(y, x, output_gradients=g)

    for shape in [(3, 7), (257, 64)]:
        arrays = [meanings.normal(*shape, dtype=dtype, seed=i) for i in range(2)]
        before = len(launched)
        got = [y.numpy() for y in both(*map(tg.constant, arrays))]
        assert len(launched) - before == (1 if name in ("relu", "tanh") else 2)
        meanings.check(got, meanings.in_float64(both, *arrays), units=256)


@pytest.mark.parametrize("dtype", ["f8", "f2"])
def test_other_types(dtype: str, launched: list[chains.Chain]) -> None:
    f = lambda x, b: (tg.tanh(x + b) * 0.5 + tg.exp(-tg.square(x)),)
    arrays = [meanings.normal(*shape, dtype=dtype) for shape in ((33, 40), (40,))]
    got, names = meanings.compiled(f, *arrays)
    assert names == ["chain"]
    assert launched
    meanings.check(got, meanings.in_float64(f, *arrays))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_arithmetic_has_the_bits_of_its_steps(dtype: str, launched: list[chains.Chain]) -> None:
    """What is between two operations is rounded, in one kernel as in several."""
    f = lambda x, y: (x * x - y * y, tg.sqrt(x * x + 1.0) * y - x / y, tg.square(x) - x * x)
    x, y = (meanings.normal(33, 50, dtype=dtype, seed=i) for i in range(2))
    x[::2] = y[::2]
    got, names = meanings.compiled(f, x, y)
    assert names == ["chain"]
    assert launched
    for a, b in zip(got, f(tg.constant(x), tg.constant(y)), strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    assert not got[0][::2].any()
    assert not got[2].any()


def test_what_is_not_contiguous_runs_step_by_step() -> None:
    f = lambda x: (tg.exp(tg.transpose(x)) * 2.0 + 1.0,)
    x = meanings.normal(33, 50)
    got, names = meanings.compiled(f, x)
    assert names == ["permute", "chain"]
    meanings.check(got, [np.exp(x.T.astype("f8")) * 2 + 1])
