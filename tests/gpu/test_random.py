"""Random numbers are the same on both backends; normals to a few units in the last place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tapegrad as tg

DRAWS: dict[str, Callable[[tg.random.Generator], Any]] = {
    "uniform": lambda g: g.uniform((257, 3)),
    "uniform float64": lambda g: g.uniform((257, 3), dtype=tg.float64),
    "uniform float16": lambda g: g.uniform((257, 3), dtype=tg.float16),
    "uniform from to": lambda g: g.uniform((1001,), -3.0, 7.0),
    "integers": lambda g: g.uniform((1001,), -5, 1000, dtype=tg.int32),
    "integers of 53 bits": lambda g: g.uniform((101,), 0, 2**53, dtype=tg.int64),
    "mask": lambda g: g.mask((1001,), 0.3),
    "mask of all": lambda g: g.mask((11,), 1.0),
    "mask of none": lambda g: g.mask((11,), 0.0),
    "permutation": lambda g: g.permutation(1001),
    "permutation of nothing": lambda g: g.permutation(0),
    "shuffle": lambda g: g.shuffle(np.arange(60.0).reshape(20, 3)),
    "dropout": lambda g: tg.nn.dropout(np.ones((33, 7), "f4"), 0.4, generator=g),
    "several": lambda g: [g.uniform(3), g.mask(5, 0.5), g.permutation(7), g.uniform(2)],
}


def drawn(draw: Callable[[tg.random.Generator], Any], backend: str) -> list[Any]:
    with tg.backend(backend):
        parts = draw(tg.random.Generator(2**70 + 5))
        parts = parts if isinstance(parts, list) else [parts]
        assert {part.backend for part in parts} == {backend}
        return [part.numpy() for part in parts]


@pytest.mark.parametrize("name", DRAWS)
def test_equal(name: str) -> None:
    for got, want in zip(drawn(DRAWS[name], "cupy"), drawn(DRAWS[name], "numpy"), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


# log, sqrt, sin and cos are each a few units off; near a zero of the sine the error is absolute.
@pytest.mark.parametrize(("dtype", "units"), [("f4", 16), ("f8", 16), ("f2", 2)])
def test_normals(dtype: str, units: int) -> None:
    draw = lambda g: g.normal((10_001,), dtype=dtype)
    (got,), (want,) = drawn(draw, "cupy"), drawn(draw, "numpy")
    error = np.abs(got.astype("f8") - want.astype("f8"))
    assert (error <= units * np.finfo(dtype).eps * np.maximum(1, np.abs(want))).all()


def test_the_kernel_ran(ran: list[str]) -> None:
    tg.random.normal((5,))
    assert ran == ["random_bits"]


def test_one_stream_drawn_on_both_backends_goes_on() -> None:
    mixed, alone = tg.random.Generator(3), tg.random.Generator(3)
    parts = []
    for backend in ("cupy", "numpy", "cupy"):
        with tg.backend(backend):
            parts.append(mixed.uniform(5).numpy())
    with tg.backend("numpy"):
        want = [alone.uniform(5).numpy() for _ in range(3)]
    np.testing.assert_array_equal(parts, want)
