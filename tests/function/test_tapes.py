"""Tapes in and around compiled functions: nested, persistent, custom gradients, transforms."""

from __future__ import annotations

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.errors import FunctionError
from tests.function.compiled import assert_same, rewritten

X = tg.constant([0.5, 1.5])
OTHER = tg.constant([0.25, -2.0])


@pytest.fixture(autouse=True)
def bit_for_bit():
    with rewritten(False):
        yield


def same(function, *arguments):
    compiled = tg.function(function)
    for args in (arguments[0], arguments[0], *arguments):
        assert_same(compiled(*args), function(*args))
    assert len(compiled.programs) == 1


def gradient(function, x):
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return tape.gradient(y, x)


@tg.custom_gradient
def clipped_exp(x):
    y = tg.exp(x)
    return y, lambda upstream: upstream * tg.minimum(y, 1.5)


@tg.custom_gradient
def own_number(x):
    return x * 2.0, lambda upstream: upstream * 7.0


V = tg.Variable([2.0, 3.0])


@tg.custom_gradient
def with_variables(x):
    def grad(upstream, variables):
        return upstream * 2.0, [upstream * 5.0 for _ in variables]

    return x * V, grad


@tg.recompute_grad
def recomputed(x):
    return tg.tanh(x * V) * x


def persistent(x):
    with tg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tg.exp(x) * V
        z = tg.sum(y * y)
    return tape.gradient(z, x), tape.gradient(y, V), tape.gradient(z, [x, V])


def second_order(x):
    return gradient(lambda x: gradient(lambda x: tg.sin(x) * V * x, x), x)


def jacobians(x):
    with tg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tg.concat([x * V, tg.tanh(x)])
    return tape.jacobian(y, x), tape.jacobian(y, V, unconnected_gradients="zero")


def paused(x):
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
        with tape.stop_recording():
            z = tg.exp(y)
        y = y * z
    return tape.gradient(y, x)


def hidden(x):
    with tg.GradientTape() as tape:
        tape.watch(x)
        with tg.no_record():
            scale = tg.sum(x * V)
        y = x * scale
    return tape.gradient(y, x), scale


def not_connected(x):
    with tg.GradientTape() as tape:
        y = x * 2.0
    return [tape.gradient(y, V), x * 1.0]


def weights(x):
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = x**3
    return tape.gradient(y, x, output_gradients=tg.exp(x))


def copies(x):
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = x * tg.constant(x) + tg.stop_gradient(x) * x
    return tape.gradient(y, x)


def versions(x):
    with tg.GradientTape() as tape:
        y = V * V
        V.assign(V * 1.0)
        z = tg.sum(y * V)
    return tape.gradient(z, V) * x


FUNCTIONS = {
    "gradient": lambda x: gradient(lambda x: tg.sum(tg.sin(x) / (x * x + 1.0)), x),
    "custom gradient": lambda x: gradient(clipped_exp, x),
    "a number as gradient": lambda x: gradient(own_number, x),
    "custom gradient with variables": lambda x: gradient(with_variables, x),
    "second order of a custom gradient": lambda x: gradient(
        lambda x: gradient(clipped_exp, x) * x, x
    ),
    "straight through": lambda x: gradient(
        lambda x: tg.grad_pass_through(tg.round)(x) * tg.sin(x), x
    ),
    "recompute": lambda x: gradient(recomputed, x),
    "second order of recompute": lambda x: gradient(lambda x: gradient(recomputed, x) ** 2, x),
    "persistent": persistent,
    "second order": second_order,
    "jacobians": jacobians,
    "paused": paused,
    "hidden": hidden,
    "not connected": not_connected,
    "upstream": weights,
    "copies are constants": copies,
    "versions": versions,
    "grad": lambda x: tg.grad(lambda x: tg.sum(x**3 * V))(x),
    "value_and_grad": lambda x: tg.value_and_grad(lambda x: tg.sum(tg.tanh(x) * V))(x),
    "hessian": lambda x: tg.hessian(lambda x: tg.sum(x**3 * tg.sin(x)))(x),
    "hvp": lambda x: tg.hvp(lambda x: tg.sum(x**3), (x,), (tg.cos(x),)),
    "jvp": lambda x: tg.jvp(lambda x: x**2 * V, (x,), (tg.cos(x),)),
    "vjp": lambda x: tg.vjp(lambda x: x**2 * V, x)[1](tg.cos(x)),
    "singular": lambda x: gradient(lambda x: tg.sqrt(x * 0.0) + tg.log(x * 0.0 + 1.0), x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside(name):
    same(FUNCTIONS[name], (X,), (OTHER,), (X,))


def test_none_stays_none():
    f = tg.function(not_connected)
    for _ in range(4):
        assert f(X)[0] is None


# ---- a tape around


def test_an_outer_tape_gets_right_gradients():
    f = tg.function(lambda x: tg.sum(tg.exp(x) * V))
    for _ in range(3):
        f(X)
    for x in (X, OTHER):
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = f(x) * 2.0
        gx, gv = tape.gradient(y, [x, V])
        np.testing.assert_allclose(gx, 2.0 * np.exp(x.numpy()) * V.numpy(), rtol=1e-6)
        np.testing.assert_allclose(gv, 2.0 * np.exp(x.numpy()), rtol=1e-6)
    assert len(f.programs) == 1
    assert_same(f(OTHER), tg.sum(tg.exp(OTHER) * V))


def test_a_whole_step_under_an_outer_tape():
    v = tg.Variable(2.0)

    def step(x):
        with tg.GradientTape() as tape:
            y = x * v * v
        g = tape.gradient(y, v)
        v.assign_sub(g * 0.1)
        return g

    f = tg.function(step)
    for _ in range(3):
        f(tg.constant(1.0))
    before = float(v)
    with tg.GradientTape() as outer:
        g = f(tg.constant(3.0))
    np.testing.assert_allclose(outer.gradient(g, v), 6.0, rtol=1e-6)
    np.testing.assert_allclose(float(v), before - 0.6 * before, rtol=1e-6)


def test_a_tape_that_is_paused_around():
    f = tg.function(lambda x: x * V)
    for _ in range(3):
        f(X)
    with tg.GradientTape() as tape:
        tape.watch(X)
        with tape.stop_recording():
            hidden_result = f(X)
        with tg.no_record():
            f(X)
        y = f(X) * hidden_result
    np.testing.assert_allclose(tape.gradient(y, X), V.numpy() * hidden_result.numpy())


def test_a_tape_that_is_made_outside_and_entered_inside():
    tape = tg.GradientTape(persistent=True)

    def f(x):
        tape.reset()
        with tape:
            tape.watch(x)
            y = tg.sin(x) * V
        return tape.gradient(y, x)

    same(f, (X,), (OTHER,))


def test_gradients_of_a_compiled_function_by_transforms():
    f = tg.function(lambda x: tg.sum(x**3))
    for _ in range(3):
        f(X)
    np.testing.assert_allclose(tg.grad(f)(X), 3 * X.numpy() ** 2, rtol=1e-6)
    np.testing.assert_allclose(tg.hessian(f)(X), np.diag(6 * X.numpy()), rtol=1e-6)


# ---- functions in functions


def test_functions_in_functions():
    inner = tg.function(lambda x: tg.exp(x) * V)
    outer = lambda x: gradient(lambda x: tg.sum(inner(x) * x), x)
    same(outer, (X,), (OTHER,))
    for _ in range(3):
        inner(X)
    same(outer, (X,), (OTHER,))
    assert len(inner.programs) == 1


def test_what_an_inner_function_hands_out_is_refused_outside_too():
    inner = tg.function(lambda x: x * float(x[0]), strict=False)
    outer = tg.function(lambda x: inner(x) * 2.0)
    with pytest.raises(FunctionError):
        outer(X)


def test_captured_tensors():
    v = tg.Variable([1.0, 2.0])
    captured = v[:], tg.asarray(v), v._read()  # show the Variable's memory
    c = tg.constant([3.0, 4.0])
    f = tg.function(lambda x: [v * x, *[x * y + c for y in captured]])
    for k in range(6):
        if k > 2:
            v.assign_add([1.0 + k, 1.0])
        inside, *outside = f(X)
        for y in outside:
            np.testing.assert_array_equal(y, X.numpy() * [1.0, 2.0] + [3.0, 4.0])
        np.testing.assert_array_equal(inside, v.numpy() * X.numpy())
