"""Compiled functions and arrays of CuPy, of a stand-in: a program is for one backend."""

from __future__ import annotations

import numpy as np
import pytest

import tapegrad as tg
from tests import test_backends

cupy = test_backends.cupy


@pytest.fixture(autouse=True)
def numpy_first(cupy):
    tg.set_backend("numpy")


def on(name, values):
    with tg.backend(name):
        return tg.constant(np.asarray(values))


def test_a_program_is_not_used_for_arrays_of_another_backend(cupy):
    f = tg.function(lambda x: tg.exp(x) * 2.0 + x)
    for name in ("numpy", "cupy", "numpy", "cupy"):
        for k in range(4):
            x = on(name, [1.0 + k, 2.0])
            y = f(x)
            assert y.backend == name
            np.testing.assert_allclose(y.numpy(), np.exp(x.numpy()) * 2.0 + x.numpy())


def test_variables_of_both_backends(cupy):
    for name in ("numpy", "cupy"):
        with tg.backend(name):
            v = tg.Variable(np.array([1.0, 2.0]))
        optimizer = tg.optimizers.SGD(0.1)

        def step(x, v=v, optimizer=optimizer):
            with tg.GradientTape() as tape:
                loss = tg.sum(tg.square(v * x))
            optimizer.apply([tape.gradient(loss, v)], [v])
            return loss

        f = tg.function(step)
        expected = np.array([1.0, 2.0])
        for _ in range(5):
            loss = f(on(name, [1.0, 2.0]))
            assert loss.backend == name
            expected = expected - 0.1 * 2 * expected * np.array([1.0, 4.0])
        np.testing.assert_allclose(v.numpy(), expected)


def test_a_mixture_is_an_error_in_every_call(cupy):
    v = tg.Variable(np.array([1.0, 2.0]))
    f = tg.function(lambda x: x * v)
    for _ in range(3):
        f(on("numpy", [1.0, 2.0]))
    for _ in range(3):
        with pytest.raises(TypeError, match="multiply"):
            f(on("cupy", [1.0, 2.0]))
    np.testing.assert_allclose(f(on("numpy", [1.0, 2.0])).numpy(), [1.0, 4.0])
