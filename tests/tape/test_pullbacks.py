"""Rows of Jacobians that are computed together are those that are computed one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _pullback, tape
from tapegrad._structure import flatten
from tests.cases import Array, Case
from tests.test_ops import cases, curved, floating

ONE_BY_ONE = {"chunk_size": 1}
TOGETHER = ({}, {"chunk_size": 2})


def assert_close(got: Any, want: Any) -> None:
    """Compare results leaf by leaf, to the rounding of sums in another order.

    Relative to 1 at least: all of a derivative that is 0 may be rounding.
    """
    pairs = list(zip(flatten(got), flatten(want), strict=True))
    for a, b in pairs:
        if b is None:
            assert a is None
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = a.numpy(), b.numpy()
        scale = np.abs(b[np.isfinite(b)]).max(initial=1.0)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * scale)


def of_two_shapes(case: Case) -> Iterator[tuple[Array, ...]]:
    """Yield small samples of a row, one of each of its shapes."""
    seen = set()
    for arrays in case.samples(smooth=True):
        shapes = tuple(a.shape for a in arrays)
        if shapes not in seen and sum(a.size for a in arrays) <= 40:
            seen.add(shapes)
            yield arrays


def parts(case: Case, xs: list[Any]) -> list[Any]:
    """Return the floating results of a row, bent so that each derivative depends on the rest."""
    tg.random.seed(3)
    return list(curved(case.call)(*xs))


@cases(gradients=True)
def test_every_operation(case: Case) -> None:
    for arrays in of_two_shapes(case):
        xs = [tg.constant(a) for a in arrays]
        wanted = [x for x in xs if floating(x)]
        with tg.GradientTape(persistent=True) as outer:
            outer.watch(wanted)
            with tg.GradientTape(persistent=True) as inner:
                inner.watch(wanted)
                y = parts(case, xs)
            gradients = [g for g in inner.gradient(y, wanted) if g is not None]
        for options in TOGETHER:
            assert_close(
                inner.jacobian(y, wanted, **options), inner.jacobian(y, wanted, **ONE_BY_ONE)
            )
            if case.order > 1 and gradients:
                assert_close(
                    outer.jacobian(gradients, wanted, **options),
                    outer.jacobian(gradients, wanted, **ONE_BY_ONE),
                )


@cases(gradients=True)
def test_outer_tapes_hear_all_rows(case: Case) -> None:
    def slopes(arrays: tuple[Array, ...], **options: Any) -> Any:
        xs = [tg.constant(a) for a in arrays]
        wanted = [x for x in xs if floating(x)]
        with tg.GradientTape() as outer:
            outer.watch(wanted)
            with tg.GradientTape() as inner:
                inner.watch(wanted)
                y = parts(case, xs)
            rows = [j for j in flatten(inner.jacobian(y, wanted, **options)) if j is not None]
            total = tg.zeros(())
            for k, j in enumerate(rows):
                total += tg.sum(j * np.cos(k + np.arange(j.size)).reshape(j.shape))
        return outer.gradient(total, wanted)

    if case.order > 1:
        for arrays in of_two_shapes(case):
            assert_close(slopes(arrays), slopes(arrays, **ONE_BY_ONE))


# ---- networks

RNG = np.random.default_rng(0)
X, W, B, U = (RNG.normal(size=shape) for shape in ((4, 5), (5, 6), (6,), (6, 3)))
LABELS = RNG.integers(0, 3, 4)


def hidden(x: Any, w: Any, b: Any) -> Any:
    return tg.nn.linear_relu(x, w, b)


NETWORKS: dict[str, Callable[..., Any]] = {
    "layers": lambda x, w, b, u: hidden(x, w, b) @ u,
    "softmax": lambda x, w, b, u: tg.nn.softmax(tg.tanh(x @ w + b) @ u),
    "losses": lambda x, w, b, u: tg.nn.softmax_cross_entropy(
        hidden(x, w, b) @ u, LABELS, reduction="none"
    ),
    "normalised": lambda x, w, b, u: tg.nn.log_softmax(
        (lambda h: (h - tg.mean(h, axis=0)) / tg.sqrt(tg.var(h, axis=0) + 1e-3))(x @ w + b) @ u
    ),
    "steps": lambda x, w, b, u: tg.stack([hidden(row[None], w, b) @ u for row in tg.unstack(x)]),
    "parts": lambda x, w, b, u: tg.concat([x[1:, ::2] @ w[::2], (x @ w)[[0, 0, 2]]]) * b,
}


@pytest.fixture
def no_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Any, *_: Any) -> Any:
        raise AssertionError(f"{call.primitive.name} has no rule")

    monkeypatch.setattr(_pullback, "_row_by_row", refuse)


@pytest.mark.parametrize("network", NETWORKS)
def test_what_networks_are_made_of_has_rules(network: str, no_row_by_row: None) -> None:
    variables = [tg.Variable(a) for a in (X, W, B, U)]
    with tg.GradientTape(persistent=True) as outer:
        with tg.GradientTape(persistent=True) as inner:
            y = NETWORKS[network](*variables)
        weights = tg.constant(np.cos(np.arange(y.size).reshape(y.shape)))
        gradients = [g for g in inner.gradient(y, variables, weights) if g is not None]
    for of, target in ((inner, y), (outer, gradients)):
        assert_close(of.jacobian(target, variables), of.jacobian(target, variables, chunk_size=1))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_primitive_without_a_rule(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = [tg.Variable(a) for a in (X, W, B, U)]
    with tg.GradientTape(persistent=True) as recorded:
        y = NETWORKS[network](*variables)
    want = recorded.jacobian(y, variables, chunk_size=1)
    monkeypatch.setattr(_pullback, "_RULES", {})
    assert_close(recorded.jacobian(y, variables), want)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name not in ("steps", "parts")])
def test_batches(network: str) -> None:
    x = tg.Variable(X)
    with tg.GradientTape(persistent=True) as recorded:
        y = tg.reshape(NETWORKS[network](x, W, B, U), (4, -1))
    want = recorded.batch_jacobian(y, x, chunk_size=1)
    assert_close(recorded.batch_jacobian(y, x), want)
    if network != "normalised":
        whole = recorded.jacobian(y, x).numpy()
        np.testing.assert_allclose(want, [whole[i, :, i] for i in range(4)], rtol=1e-12)


# ---- any function of a seed


def products(g: Any, name: str, m: int, k: int, n: int, first: bool) -> Any:
    """Return a product of matrices of which one is made of a seed of 24 elements."""
    left = (k, m) if name == "matmul_tn" else (m, k)
    right = (n, k) if name == "matmul_nt" else (k, n)
    mine, other = (left, right) if first else (right, left)
    part = tg.reshape(g, (-1,))[: mine[0] * mine[1]]
    x, y = tg.reshape(part, mine), tg.constant(np.sin(np.arange(other[0] * other[1])))
    y = tg.reshape(y, other)
    return _pullback.primitives[name](*((x, y) if first else (y, x)))


CUBE, PLACES = np.cos(np.arange(24.0)).reshape(2, 3, 4), np.array([1, 0, 1])
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda g: g,
    "nothing of it": lambda g: tg.constant(CUBE) * 2.0,
    "of two": lambda g: g * tg.sin(tg.constant(CUBE)) + tg.sum(g),
    "no rule": lambda g: tg.nn.softmax(g) * tg.exp(g),
    "arrays apart": lambda g: g[PLACES, :, PLACES],
    "an integer and an array": lambda g: g[1, :, PLACES],
    "an array": lambda g: g[:, PLACES],
    "a new axis": lambda g: g[..., None, 1:3],
    "rows": lambda g: tg.stack([g[1], g[0], tg.constant(CUBE[0])]),
    "a mean": lambda g: g - tg.mean(g, axis=(0, 2), keepdims=True),
    **{
        f"{name} of {m} x {k} and {k} x {n}, {'first' if first else 'second'}": (
            lambda g, name=name, m=m, k=k, n=n, first=first: products(g, name, m, k, n, first)
        )
        for name in ("matmul", "matmul_nt", "matmul_tn")
        for m, k, n in ((4, 6, 1), (1, 6, 4), (4, 3, 2), (1, 24, 1))
        for first in (True, False)
    },
    "another type": lambda g: tg.astype(g, "f4"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_seed(name: str) -> None:
    function = FUNCTIONS[name]
    pullback = _pullback.Pullback(tg.constant(CUBE), lambda g: [function(g), None])
    for rows in (1, 5):
        seeds = np.sin(np.arange(rows * CUBE.size)).reshape(rows, *CUBE.shape)
        together, nothing = pullback(tg.constant(seeds))
        assert nothing is None
        assert_close(together, tg.stack([function(tg.constant(seed)) for seed in seeds]))


# ---- how many at a time


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[tuple[int, ...]]:
    """Return the shapes for which a Jacobian of 10 rows calls the gradient of tanh."""
    x = tg.Variable(np.arange(10.0))
    shapes: list[tuple[int, ...]] = []
    with tg.GradientTape() as recorded:
        y = tg.tanh(x)
    made = _pullback.primitives[name]
    forward = made.forward
    monkeypatch.setattr(
        made, "forward", lambda xp, g, y: shapes.append(g.shape) or forward(xp, g, y)
    )
    answer = recorded.jacobian(y, x, **options)
    monkeypatch.setattr(made, "forward", forward)
    np.testing.assert_allclose(answer, np.diag(1 - np.tanh(np.arange(10.0)) ** 2), rtol=1e-12)
    return shapes


def test_how_many_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first = (10,)  # which is written down
    calls = lambda **options: calls_of("tanh_grad", monkeypatch, **options)
    assert calls() == [first, (10, 10)]
    assert calls(chunk_size=4) == [first, (4, 10), (4, 10), (2, 10)]
    assert calls(parallel_iterations=5) == [first, (5, 10), (5, 10)]
    assert calls(chunk_size=1) == [first] * 10
    assert calls(experimental_use_pfor=False) == [first] * 10
    monkeypatch.setattr(tape, "_ROW_BYTES", 3 * 10 * 8 + 5)
    assert calls() == [first, (3, 10), (3, 10), (3, 10), (1, 10)]
    monkeypatch.setattr(tape, "_ROW_BYTES", 1)
    assert calls() == [first] + [(1, 10)] * 10


@pytest.mark.parametrize("nested", [False, True])
def test_what_rows_do_not_share_is_computed_once(
    nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tg.Variable(np.arange(1.0, 7.0))
    cosine, calls = _pullback.primitives["cos"], []
    forward = cosine.forward
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = tg.sin(x)
        with monkeypatch.context() as patch, contextlib.nullcontext() if nested else tg.no_record():
            patch.setattr(cosine, "forward", lambda xp, x: calls.append(1) or forward(xp, x))
            rows = inner.jacobian(y, x, chunk_size=2)
    np.testing.assert_allclose(rows, np.diag(np.cos(x.numpy())), rtol=1e-12)
    assert len(calls) == 1 + nested  # the outer tape must hear it too
    if nested:
        np.testing.assert_allclose(outer.gradient(rows, x), -np.sin(x.numpy()), rtol=1e-12)


# ---- what cannot be done together


def jacobian_of_custom(rule: Callable[[Any], Any]) -> Any:
    @tg.custom_gradient
    def doubled(x: Any) -> Any:
        return x * 2.0, rule

    x = tg.Variable([1.0, 2.0, 3.0])
    with tg.GradientTape() as recorded:
        y = doubled(tg.positive(x)) * 1.0
    return recorded.jacobian(y, x).numpy().tolist()


def test_gradients_that_look_at_values() -> None:
    first = lambda g: g * (5.0 if float(g[0]) else 7.0)
    assert jacobian_of_custom(first) == [[5.0, 0.0, 0.0], [0.0, 7.0, 0.0], [0.0, 0.0, 7.0]]
    by_numpy = lambda g: tg.constant(g.numpy() ** 2 * 3.0)
    assert jacobian_of_custom(by_numpy) == np.diag([3.0, 3.0, 3.0]).tolist()


def test_gradients_with_state() -> None:
    calls = tg.Variable(0.0)
    counted = lambda g: g * calls.assign_add(1.0)
    assert jacobian_of_custom(counted) == np.diag([1.0, 2.0, 3.0]).tolist()


def test_a_gradient_that_is_there_for_some_rows() -> None:
    """None from a user's rule counts as zeros in a row, if another row has a gradient."""
    some = lambda g: g if float(g[1]) else None
    assert jacobian_of_custom(some) == [[0.0] * 3, [0.0, 1.0, 0.0], [0.0] * 3]


def test_what_does_not_depend_on_the_seed() -> None:
    x = tg.Variable([1.5, 2.5])
    with tg.GradientTape(persistent=True) as recorded:
        y = tg.sign(x)
        z = x[:1] * tg.constant([1.0, 2.0, 3.0])
    assert recorded.jacobian(y, x).numpy().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert recorded.jacobian(x, x).numpy().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert recorded.jacobian(z, x).numpy().tolist() == [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]


def test_in_a_program() -> None:
    x, w = tg.Variable(X), tg.Variable(W)

    def rows(b: Any) -> Any:
        with tg.GradientTape() as outer:
            with tg.GradientTape() as inner:
                y = tg.tanh(x @ w + b)
            j = inner.jacobian(y, w)
            total = tg.sum(j**2)
        return j, outer.gradient(total, [x, w])

    compiled = tg.function(rows)
    for k in range(4):
        assert_close(compiled(tg.constant(B + k)), rows(tg.constant(B + k)))
    assert len(compiled.programs) == 1
