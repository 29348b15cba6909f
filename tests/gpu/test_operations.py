"""Every row of the operation table on the device: values, types, first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpmath", reason="the references of the operation table need mpmath")

import tapegrad as tg
from tapegrad.tensor import wrap
from tests.cases import CASES, REFUSALS, Case, Refusal
from tests.test_ops import FLOATS, assert_close, floating, has_floats, leaves, tolerance

from .conftest import on_device

# What the rows say of NumPy's backend by name.
HOST_ONLY = {"to_backend", "from_dlpack"}
SAMPLES = 11  # of each row's 25: they have every kind of shape and layout
DIFFERENTIABLE = [c for c in CASES if c.differentiable and has_floats(c)]


def rows(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c.name) for c in cases if c.name not in HOST_ONLY]
    )


@pytest.mark.parametrize("dtype", FLOATS)
@rows(CASES)
def test_values(case: Case, dtype: Any) -> None:
    if dtype != np.float64 and not has_floats(case):
        return
    for arrays in list(case.samples(dtype))[:SAMPLES]:
        got = leaves(case.call(*[wrap(on_device(a)) for a in arrays]))
        exact = [a.astype(np.float64) if floating(a) else a for a in arrays]
        want = [np.asarray(w) for w in leaves(case.reference(*exact))]
        inputs = [a for a in arrays if floating(a)]
        assert len(got) == len(want)
        for y, w in zip(got, want, strict=True):
            assert y.backend == "cupy"
            assert y.shape == w.shape
            promoted = np.result_type(*inputs) if inputs and floating(w) else w.dtype
            assert y.dtype == (case.dtype or promoted)
            if floating(w):
                assert_close(y.numpy(), w, tolerance(case, y, *inputs), *filter(floating, exact))
            else:
                np.testing.assert_array_equal(y.numpy(), w)


def derivatives(call: Callable[..., Any], arrays: Sequence[Any]) -> list[tg.Tensor]:
    """Return gradients of a weighted sum of the results, and gradients of those, for the floats."""

    def weighted(parts: Sequence[Any], shift: int) -> Any:
        total: Any = 0.0
        for i, y in enumerate(parts, shift):
            if floating(y):
                weights = np.cos(i + np.arange(y.size)).reshape(y.shape).astype(y.dtype)
                total = total + tg.sum(y * (y + 1) * tg.constant(weights))
        return tg.asarray(total)

    tensors = [wrap(a) for a in arrays]
    wanted = [x for x in tensors if floating(x)]
    with tg.GradientTape() as outer:
        outer.watch(wanted)
        with tg.GradientTape() as inner:
            inner.watch(wanted)
            total = weighted(leaves(call(*tensors)), 0)
        first = inner.gradient(total, wanted, unconnected_gradients="zero")
        again = weighted(first, 1)
    return [*first, *outer.gradient(again, wanted, unconnected_gradients="zero")]


@rows(DIFFERENTIABLE)
def test_first_and_second_derivatives_are_those_of_the_numpy_backend(case: Case) -> None:
    for arrays in list(case.samples(smooth=True))[:SAMPLES]:
        with tg.backend("numpy"):
            want = [g.numpy() for g in derivatives(case.call, arrays)]
        got = derivatives(case.call, [on_device(a) for a in arrays])
        for g, w in zip(got, want, strict=True):
            assert (g.backend, g.shape, g.dtype) == ("cupy", w.shape, w.dtype)
            assert_close(g.numpy(), w, 1e-10 * case.factor, *filter(floating, arrays))


# A wrong label is seen on the device only, where the row's loss becomes NaN.
SEEN_ON_THE_HOST = [
    r for r in REFUSALS if "labels must be from" not in r.match and r.match != "got 9"
]


@pytest.mark.parametrize(
    "refusal",
    [pytest.param(r, id=f"{i}-{r.function.__name__}") for i, r in enumerate(SEEN_ON_THE_HOST)],
)
def test_refusals(refusal: Refusal) -> None:
    """The exception is the same; its words may be CuPy's."""
    with pytest.raises(refusal.exception):
        refusal.call()
