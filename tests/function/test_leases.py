"""Leased results: right until the next call, an error after it, whatever was made of them."""

from __future__ import annotations

import tracemalloc
import weakref

import numpy as np
import pytest

import tapegrad as tg
from tests import test_backends
from tests.function.compiled import assert_same

X = np.arange(6.0).reshape(2, 3)


def leased(function, *args):
    """Return a compiled function that leases its results, ready to be replayed."""
    f = tg.function(function, lease_results=True)
    for _ in range(2):
        f(*args)
    return f


def several(x):
    return {
        "exp": tg.exp(x),
        "sum": tg.sum(x),
        "row": x[1],
        "turned": tg.transpose(x * 2.0),
        "x": x,
    }


def test_results_are_those_of_an_eager_call():
    f = leased(several, tg.constant(X))
    for k in range(5):
        assert_same(f(tg.constant(X + k)), several(tg.constant(X + k)))


READINGS = {
    "shape": lambda y: y.shape,
    "numpy": lambda y: y.numpy(),
    "asarray": np.asarray,
    "float": lambda y: float(y[0, 0]),
    "list": lambda y: y.tolist(),
    "iteration": list,
    "length": len,
    "text": str,
    "plus": lambda y: y + 1,
    "number plus": lambda y: 1.0 - y,
    "array plus": lambda y: np.ones((2, 3)) * y,
    "itself": lambda y: y * y,
    "comparison": lambda y: y == 1,
    "minus": lambda y: -y,
    "product": lambda y: y @ tg.ones((3, 1), dtype="f8"),
    "element": lambda y: y[0],
    "exp": tg.exp,
    "NumPy's exp": np.exp,
    "sum": tg.sum,
    "concat": lambda y: tg.concat([y, y], 0),
    "where": lambda y: tg.where(tg.ones((2, 3)) > 0, y, y),
    "stack": lambda y: tg.stack([y, y]),
    "constant": tg.constant,
    "copy": lambda y: +y,
    "variable": tg.Variable,
    "assignment": lambda y: tg.Variable(X).assign(y),
    "dlpack": np.from_dlpack,
}


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("view", [False, True])
def test_a_result_that_has_expired_is_an_error(name, view):
    f = leased(lambda x: tg.exp(x), tg.constant(X))
    y = f(tg.constant(X))
    y = tg.reshape(y, (3, 2)).T if view else y  # a view of a view
    READINGS[name](y)
    f(tg.constant(X))
    with pytest.raises(RuntimeError, match=r"leased.*called again.*y\.numpy"):
        READINGS[name](y)


def test_numbers_expire_too():
    """On a GPU they lie in memory as well: the rule is one."""
    f = leased(lambda x: tg.sum(x), tg.constant(X))
    total = f(tg.constant(X))
    assert float(total) == 15.0
    f(tg.constant(X))
    with pytest.raises(RuntimeError, match="leased"):
        float(total)


def test_copies_last():
    f = leased(lambda x: tg.exp(x), tg.constant(X))
    y = f(tg.constant(X))
    copies = [+y, y.numpy(), np.asarray(y), tg.constant(y), y[:1] + 0.0, tg.Variable(y)]
    f(tg.constant(X + 1))
    f(tg.constant(X + 2))
    for copy, rows in zip(copies, (2, 2, 2, 2, 1, 2), strict=True):
        np.testing.assert_array_equal(np.asarray(copy), np.exp(X)[:rows])


def test_results_may_be_arguments_of_the_next_call():
    """A state that goes round is read before its memory is written."""

    def step(state, x):
        return tg.tanh(state[::-1] * 0.5 + x), tg.sum(state)

    x = tg.constant(X)
    f = leased(step, x, x)
    state, want = f(x, x)[0], step(x, x)[0]
    for _ in range(5):
        (state, total), (want, total_of_want) = f(state, x), step(want, x)
        assert_same((state, total), (want, total_of_want))
    view = state.T.T[::1]
    assert_same(f(view, x), step(want, x))
    with pytest.raises(RuntimeError, match="leased"):
        f(state, x)


def test_each_signature_has_a_lease_of_its_own():
    f = tg.function(lambda x: x * 2.0, lease_results=True)
    for _ in range(3):
        small, large = f(tg.ones(2)), f(tg.ones(3))
    f(tg.ones(2))
    assert large.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="leased"):
        small.tolist()


def test_arguments_and_constants_that_are_returned_are_not_leased():
    c = tg.constant(X)
    f = leased(lambda x: (x, c, x * 1.0), tg.constant(X))
    x = tg.constant(X)
    same, constant, _ = f(x)
    f(x)
    assert same is x
    assert_same(constant, c)


def test_methods_and_decorators():
    class Model:
        def __init__(self):
            self.w = tg.Variable(2.0)

        @tg.function(lease_results=True)
        def double(self, x):
            return self.w * x

    model = Model()
    for _ in range(3):
        y = model.double(tg.constant(X))
    model.double(tg.constant(X))
    with pytest.raises(RuntimeError, match="double"):
        y.numpy()


def training():
    w, b = tg.Variable(np.full((3, 4), 0.1)), tg.Variable(np.zeros(4))
    optimizer = tg.optimizers.Adam(0.1)

    def step(x, k):
        with tg.GradientTape() as tape:
            z = x @ w + b
            loss = tg.nn.softmax_cross_entropy(z, k)
        gradients = tape.gradient(loss, [w, b])
        optimizer.apply(gradients, [w, b])
        return loss, z, gradients, w

    return step


def test_a_training_step():
    """Gradients, activations and weights, with an optimiser that moves its variables."""
    eager, other = training(), tg.function(training(), lease_results=True)
    x, k = tg.constant(X), tg.constant([1, 3])
    for _ in range(6):
        want = [y.numpy() for y in tg._structure.flatten(eager(x, k))]
        got = [y.numpy() for y in tg._structure.flatten(other(x, k))]
        assert_same(got, want, 1e-13)


def test_nothing_is_allocated_for_results():
    """Not for arrays: a Tensor, some hundred bytes, is made anew."""
    x = tg.constant(np.ones((100, 100)))
    f = leased(lambda x: (tg.exp(x), tg.transpose(x + 1.0)), x)
    result = f(x)
    tracemalloc.start()
    for _ in range(3):
        result = f(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result[0].shape == (100, 100)
    assert peak < 10_000


def test_memory_goes_with_function_and_results():
    f = leased(lambda x: tg.exp(x), tg.constant(X))
    y = f(tg.constant(X))
    program = weakref.ref(f.programs[0])
    del f
    assert program() is None
    np.testing.assert_array_equal(y.numpy(), np.exp(X))


def test_a_call_that_fails_and_one_with_nan():
    v = tg.Variable(np.zeros(4))

    def step(x, k):
        with tg.GradientTape() as tape:
            z = tg.nn.linear_relu(x, tg.ones((3, 4), dtype="f8"), v)
            loss = tg.nn.softmax_cross_entropy(z, k)
        v.assign_sub(tape.gradient(loss, v))
        return loss, z

    x, k = tg.constant(X), tg.constant([1, 3])
    f = leased(step, x, k)
    loss, z = f(x, k)
    with pytest.raises(ValueError, match="labels"):
        f(x, tg.constant([1, 7]))
    with pytest.raises(RuntimeError, match="leased"):
        z.numpy()
    loss, z = f(tg.constant(np.full((2, 3), np.nan)), k)
    assert np.isnan(loss.numpy())
    assert np.isnan(z.numpy()).all()
    f(x, k)
    with pytest.raises(RuntimeError, match="leased"):
        z.numpy()


def test_a_tape_that_kept_a_result():
    f = leased(lambda x: tg.exp(x), tg.constant(X))
    y = f(tg.constant(X))
    with tg.GradientTape() as tape:
        tape.watch(y)
        z = tg.sum(y * y)
    f(tg.constant(X))
    with pytest.raises(RuntimeError, match="leased"):
        tape.gradient(z, y)


def test_check_compares_leased_results():
    f = leased(several, tg.constant(X))
    f.check(tg.constant(X))


cupy = test_backends.cupy


def test_on_the_other_backend(cupy):
    """There results have memory of their own, which nothing overwrites."""
    with tg.backend("cupy"):
        x = tg.constant(X)
        f = leased(lambda x: tg.exp(x) * 2.0, x)
        y = f(x)
        np.testing.assert_allclose(y.numpy(), np.exp(X) * 2.0)
        f(y)
        np.testing.assert_allclose(y.numpy(), np.exp(X) * 2.0)
    tg.set_backend("numpy")
