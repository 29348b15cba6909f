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


NEW_ARRAYS = {
    "made inside": (lambda: tg.ones(2) * 2.0, ()),
    "drawn inside": (lambda: tg.random.uniform((2,)), ()),
    "an array": (lambda x: x * 2.0, (np.array([1.0, 2.0]),)),
    "an array beside a variable's": (lambda x: x + tg.ones(2), (np.array([1.0, 2.0]),)),
    "an array handed back": (lambda x: tg.asarray(x), (np.array([1.0, 2.0]),)),
    "an array by name": (lambda x, y=None: x + y["y"], (np.ones(2), {"y": np.ones(2)})),
    "a scalar": (lambda x: x * 2.0, (np.float32(3.0),)),
    "numbers": (lambda x: tg.asarray(x) * 2.0, ([1.0, 2.0],)),
}


@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
@pytest.mark.parametrize("first", ["numpy", "cupy"])
@pytest.mark.parametrize("name", NEW_ARRAYS)
def test_new_arrays_go_to_the_backend_of_each_call(cupy, name, first):
    function, arguments = NEW_ARRAYS[name]
    f = tg.function(function)
    second = "cupy" if first == "numpy" else "numpy"
    for backend in [first] * 5 + [second] * 5 + [first, second] * 2:
        with tg.backend(backend):
            assert f(*arguments).backend == backend
    assert len(f.programs) == 2


def test_a_training_step_on_arrays_of_numpy(cupy):
    x, y = np.ones((4, 3), "f4"), np.zeros((4, 2), "f4")
    with tg.backend("cupy"):
        w, copy = (tg.Variable(np.ones((3, 2), "f4")) for _ in range(2))

        def step(w, x, y):
            with tg.GradientTape() as tape:
                loss = tg.mean((x @ w - y) ** 2)
            w.assign_sub(0.1 * tape.gradient(loss, w))
            return loss

        f = tg.function(step)
        for k in range(6):
            got, want = f(w, x + k, y), step(copy, x + k, y)
            assert got.backend == "cupy"
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6)
        np.testing.assert_allclose(w.numpy(), copy.numpy(), rtol=1e-6)
