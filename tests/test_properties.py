"""Properties that hold for all arguments, tried on random ones; oracles are NumPy's."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tapegrad as tg

Array = np.ndarray[Any, Any]

tries = settings(
    max_examples=150,
    deadline=None,  # how fast the machine is, is no property
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
seeds = st.integers(0, 2**32 - 1)


def values(shape: tuple[int, ...], seed: int, low: float = -2.0, high: float = 2.0) -> Array:
    return np.asarray(np.random.default_rng(seed).uniform(low, high, shape))


def gradient(function: Callable[..., Any], *arrays: Array, weights: Any) -> list[Any]:
    """Return the gradients of sum(function(*arrays) * weights)."""
    xs = [tg.constant(a) for a in arrays]
    with tg.GradientTape() as tape:
        tape.watch(xs)
        y = function(*xs)
    return [g.numpy() for g in tape.gradient(y, xs, weights, unconnected_gradients="zero")]


def summed_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting, one axis after the other."""
    while g.ndim > len(shape):
        g = g.sum(axis=0)
    for axis, length in enumerate(shape):
        if length == 1:
            g = g.sum(axis=axis, keepdims=True)
    return g


def close(got: Any, want: Any, rtol: float = 1e-12) -> None:
    want = np.asarray(want)
    assert got.shape == want.shape
    largest = np.abs(want).max(initial=1.0)
    np.testing.assert_allclose(np.asarray(got), want, rtol=rtol, atol=rtol * largest)


# ---- broadcasting: function, NumPy's, the partial derivatives as NumPy functions

BINARY: list[tuple[Any, Any, Any, Any]] = [
    (tg.add, np.add, lambda a, b: a * 0 + 1 + b * 0, lambda a, b: 1 + a * 0 + b * 0),
    (tg.subtract, np.subtract, lambda a, b: 1 + 0 * (a + b), lambda a, b: 0 * (a + b) - 1),
    (tg.multiply, np.multiply, lambda a, b: b + 0 * a, lambda a, b: a + 0 * b),
    (tg.divide, np.divide, lambda a, b: 1 / b + 0 * a, lambda a, b: -a / b**2),
    (tg.power, np.power, lambda a, b: b * a ** (b - 1), lambda a, b: a**b * np.log(a)),
    (
        tg.hypot,
        np.hypot,
        lambda a, b: a / np.sqrt(a * a + b * b),
        lambda a, b: b / np.sqrt(a * a + b * b),
    ),
    (
        tg.maximum,
        np.maximum,
        lambda a, b: (a > b) + 0.5 * (a == b),
        lambda a, b: (a < b) + 0.5 * (a == b),
    ),
    (
        tg.logaddexp,
        np.logaddexp,
        lambda a, b: 1 / (1 + np.exp(b - a)),
        lambda a, b: 1 / (1 + np.exp(a - b)),
    ),
]


@pytest.mark.parametrize("row", BINARY, ids=[row[0].__name__ for row in BINARY])
@tries
@given(both=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), seed=seeds)
def test_gradients_of_broadcast_arguments_are_summed(row: Any, both: Any, seed: int) -> None:
    function, reference, slope_a, slope_b = row
    a, b = (values(shape, seed + i, 0.5, 2.0) for i, shape in enumerate(both.input_shapes))
    if function is tg.maximum:
        a, b = np.round(a, 1), np.round(b, 1)  # so that there are ties
    y = function(a, b)
    close(y, reference(a, b))
    assert y.shape == both.result_shape
    w = values(y.shape, seed + 2)
    got_a, got_b = gradient(function, a, b, weights=w)
    close(got_a, summed_to(w * slope_a(a, b), a.shape))
    close(got_b, summed_to(w * slope_b(a, b), b.shape))


@tries
@given(both=hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3), seed=seeds)
def test_where_gives_each_branch_its_part(both: Any, seed: int) -> None:
    c, a, b = (values(shape, seed + i) for i, shape in enumerate(both.input_shapes))
    c = c > 0
    w = values(both.result_shape, seed + 3)
    close(tg.where(c, a, b), np.where(c, a, b))
    got_a, got_b = gradient(lambda a, b: tg.where(c, a, b), a, b, weights=w)
    close(got_a, summed_to(np.where(c, w, 0.0), a.shape))
    close(got_b, summed_to(np.where(c, 0.0, w), b.shape))


@tries
@given(data=st.data(), seed=seeds)
def test_broadcast_to_and_back(data: Any, seed: int) -> None:
    both = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=1, base_shape=(3, 2, 4)))
    shape = np.broadcast_shapes((3, 2, 4), both.input_shapes[0])
    x, w = values(both.input_shapes[0], seed), values(shape, seed + 1)
    close(tg.broadcast_to(x, shape), np.broadcast_to(x, shape))
    close(gradient(lambda x: tg.broadcast_to(x, shape), x, weights=w)[0], summed_to(w, x.shape))


# ---- indexing


@st.composite
def indices(draw: Any, shape: tuple[int, ...]) -> Any:
    """Draw an index of any kind that NumPy knows, arrays and masks mixed with slices too."""
    kind = draw(st.sampled_from(["basic", "integers", "mask", "mixed"]))
    if kind == "basic" or 0 in shape:
        return draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    if kind == "integers":
        result = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
        return draw(hnp.integer_array_indices(shape, result_shape=result))
    if kind == "mask":
        return draw(hnp.arrays(bool, shape[: draw(st.integers(1, len(shape)))]))
    length = draw(st.integers(1, 3))
    parts = []
    for n in shape[: draw(st.integers(1, len(shape)))]:
        elements = st.integers(-n, n - 1)
        parts.append(
            draw(
                st.one_of(
                    elements,
                    st.slices(n),
                    st.lists(elements, min_size=length, max_size=length),
                    hnp.arrays(np.int64, (2, length), elements=elements),
                )
            )
        )
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    return tuple(parts)


@settings(tries, max_examples=600)
@given(data=st.data(), seed=seeds)
def test_indexing_is_numpys_and_scatters_back(data: Any, seed: int) -> None:
    x = values(data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)), seed)
    index = data.draw(indices(x.shape))
    y = tg.constant(x)[index]
    np.testing.assert_array_equal(y, x[index], strict=False)
    assert y.shape == np.shape(x[index])
    w = values(y.shape, seed + 1)
    want = np.zeros_like(x)
    np.add.at(want, index, w)
    close(gradient(lambda x: x[index], x, weights=w)[0], want)
    close(gradient(lambda x: x[index] ** 2, x, weights=w)[0], 2 * x * want)


@tries
@given(data=st.data(), seed=seeds)
def test_second_derivative_through_an_index(data: Any, seed: int) -> None:
    x = values(data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4)), seed)
    index = data.draw(indices(x.shape))
    v = values(x.shape, seed + 1)
    count = np.zeros_like(x)
    np.add.at(count, index, 1.0)
    (product,) = tg.hvp(lambda x: tg.sum(x[index] ** 3), [x], [v])
    close(product, 6 * x * v * count)


@tries
@given(data=st.data(), seed=seeds)
def test_take_along_axis_scatters_back(data: Any, seed: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    wanted = list(shape)
    wanted[axis] = data.draw(st.integers(0, 5))
    elements = st.integers(-shape[axis], shape[axis] - 1)
    index = data.draw(hnp.arrays(np.int64, tuple(wanted), elements=elements))
    x, w = values(shape, seed), values(tuple(wanted), seed + 1)
    close(tg.take_along_axis(x, index, axis=axis), np.take_along_axis(x, index, axis))
    want = np.zeros_like(x)
    for place in np.ndindex(*wanted):
        source = list(place)
        source[axis] = index[place]
        want[tuple(source)] += w[place]
    got = gradient(lambda x: tg.take_along_axis(x, index, axis=axis), x, weights=w)
    close(got[0], want)


# ---- reductions


@st.composite
def axes_of(draw: Any, ndim: int) -> Any:
    """Draw None, an axis, or any tuple of them, the negative ones included."""
    chosen = draw(st.lists(st.integers(0, ndim - 1), unique=True)) if ndim else []
    chosen = [axis - ndim * draw(st.integers(0, 1)) for axis in chosen]
    options = [None, tuple(chosen), *chosen[:1]]
    return draw(st.sampled_from(options))


def normalized(axis: Any, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


@pytest.mark.parametrize("name", ["sum", "mean", "prod", "var", "max", "min", "any", "all"])
@tries
@given(data=st.data(), shape=shapes, keepdims=st.booleans(), seed=seeds)
def test_reductions(name: str, data: Any, shape: Any, keepdims: bool, seed: int) -> None:
    axis = data.draw(axes_of(len(shape)))
    count = math.prod(shape[i] for i in normalized(axis, len(shape)))
    assume(count or name in ("sum", "prod", "any", "all"))
    order = np.random.default_rng(seed).permutation(math.prod(shape)).reshape(shape)
    x = np.asarray(order * 0.1 - 1.0)  # without ties
    want = getattr(np, name)(x, axis=axis, keepdims=keepdims)
    y = getattr(tg, name)(x, axis=axis, keepdims=keepdims)
    close(y, want)
    if name in ("any", "all"):
        return
    w = values(np.shape(want), seed)
    spread = np.expand_dims(w, normalized(axis, len(shape))) if not keepdims else w
    reduced = np.asarray(getattr(np, name)(x, axis=axis, keepdims=True))
    if name in ("max", "min"):
        slope = (x == reduced) * 1.0
    elif name == "prod":  # by each element left out in turn
        slope = np.empty_like(x)
        for place in np.ndindex(*shape):
            others = x.copy()
            others[place] = 1.0
            kept = [
                slice(None) if i in normalized(axis, len(shape)) else slice(p, p + 1)
                for i, p in enumerate(place)
            ]
            slope[place] = np.prod(others[tuple(kept)])
    else:
        deviation = x - np.mean(x, axis=axis, keepdims=True) if name == "var" else 0.0
        slope = {"sum": 1.0, "mean": 1 / max(count, 1), "var": 2 * deviation / max(count, 1)}[name]
    got = gradient(lambda x: getattr(tg, name)(x, axis=axis, keepdims=keepdims), x, weights=w)
    close(got[0], np.broadcast_to(spread, shape) * slope)


@tries
@given(data=st.data(), shape=shapes, seed=seeds)
def test_logsumexp_lies_just_above_the_largest(data: Any, shape: Any, seed: int) -> None:
    axis = data.draw(axes_of(len(shape)))
    count = math.prod(shape[i] for i in normalized(axis, len(shape)))
    assume(count)
    x = values(shape, seed, -500.0, 500.0)
    y = tg.logsumexp(x, axis=axis).numpy()
    largest = np.max(x, axis=axis)
    assert (y >= largest).all()
    assert (y <= largest + np.log(count) + 1e-12 * np.abs(largest)).all()
    close(tg.logsumexp(x + 1000.0, axis=axis), y + 1000.0)


# ---- softmax


@tries
@given(shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=1), seed=seeds, data=st.data())
def test_softmax_does_not_notice_a_shift(shape: Any, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = values(shape, seed, -20.0, 20.0)
    shift = data.draw(st.floats(-500, 500))
    p = tg.nn.softmax(x, axis=axis)
    close(tg.nn.softmax(x + shift, axis=axis), p, 1e-10)
    close(tg.sum(p, axis=axis), np.ones(np.sum(x, axis=axis).shape))
    close(tg.exp(tg.nn.log_softmax(x, axis=axis)), p)
    w = values(shape, seed + 1)
    for function in (tg.nn.softmax, tg.nn.log_softmax):
        g = gradient(lambda x, function=function: function(x, axis=axis), x, weights=w)[0]
        close(g.sum(axis=axis), np.zeros(np.sum(x, axis=axis).shape))  # a shift has no effect


# ---- moving elements about


@tries
@given(shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0), seed=seeds, data=st.data())
def test_permuting_and_back(shape: Any, seed: int, data: Any) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    x = values(shape, seed)
    y = tg.permute_dims(x, order)
    np.testing.assert_array_equal(y, np.transpose(x, order))
    back = tuple(order.index(i) for i in range(len(shape)))
    np.testing.assert_array_equal(tg.permute_dims(y, back), x)
    w = values(y.shape, seed + 1)
    got = gradient(lambda x: tg.permute_dims(x, order), x, weights=w)
    np.testing.assert_array_equal(got[0], np.transpose(w, back))
    np.testing.assert_array_equal(
        tg.moveaxis(x, order, [*range(len(shape))]), np.transpose(x, order)
    )


@tries
@given(shape=shapes, seed=seeds, data=st.data())
def test_reshaping_and_back(shape: Any, seed: int, data: Any) -> None:
    x = values(shape, seed)
    rest, lengths = x.size, []
    while rest > 1:
        divisors = [d for d in range(1, rest + 1) if rest % d == 0]
        lengths.append(data.draw(st.sampled_from(divisors)))
        rest //= lengths[-1]
        assume(len(lengths) < 8)
    new = tuple(lengths) if x.size else (0, 3)
    y = tg.reshape(x, new)
    np.testing.assert_array_equal(y, x.reshape(new))
    np.testing.assert_array_equal(tg.reshape(y, x.shape), x)
    w = values(y.shape, seed + 1)
    np.testing.assert_array_equal(
        gradient(lambda x: tg.reshape(x, new), x, weights=w)[0], w.reshape(x.shape)
    )


@tries
@given(shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=1), seed=seeds, data=st.data())
def test_splitting_and_joining(shape: Any, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    x, w = values(shape, seed), values(shape, seed + 1)
    pieces = tg.split(x, cuts, axis=axis)
    for piece, want in zip(pieces, np.split(x, cuts, axis), strict=True):
        np.testing.assert_array_equal(piece, want)
    np.testing.assert_array_equal(tg.concat(pieces, axis=axis), x)
    parts = np.split(w, cuts, axis)
    got = gradient(lambda *xs: tg.concat(xs, axis=axis), *np.split(x, cuts, axis), weights=w)
    for g, want in zip(got, parts, strict=True):
        np.testing.assert_array_equal(g, want)
    np.testing.assert_array_equal(
        gradient(lambda x: tg.split(x, cuts, axis=axis), x, weights=parts)[0], w
    )
    rows = tg.unstack(x, axis=axis)
    np.testing.assert_array_equal(tg.stack(rows, axis=axis), x)


@tries
@given(shape=hnp.array_shapes(min_dims=1, max_dims=3), seed=seeds, data=st.data())
def test_sorting_is_a_permutation(shape: Any, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x, w = values(shape, seed), values(shape, seed + 1)
    np.testing.assert_array_equal(tg.sort(x, axis=axis), np.sort(x, axis))
    np.testing.assert_array_equal(tg.sort(x, axis=axis, descending=True), -np.sort(-x, axis))
    back = np.argsort(np.argsort(x, axis), axis)
    got = gradient(lambda x: tg.sort(x, axis=axis), x, weights=w)
    np.testing.assert_array_equal(got[0], np.take_along_axis(w, back, axis))


@tries
@given(shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0), seed=seeds, data=st.data())
def test_scans_are_undone_by_differences(shape: Any, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    x, w = values(shape, seed), values(shape, seed + 1)
    y = tg.cumulative_sum(x, axis=axis)
    close(y, np.cumsum(x, axis))
    close(tg.cumulative_prod(x, axis=axis), np.cumprod(x, axis))
    got = gradient(lambda x: tg.cumulative_sum(x, axis=axis), x, weights=w)
    close(got[0], np.flip(np.cumsum(np.flip(w, axis), axis), axis))


# ---- einsum


@settings(tries, max_examples=300)
@given(data=st.data(), seed=seeds)
def test_einsum_is_numpys(data: Any, seed: int) -> None:
    letters = string.ascii_lowercase[:5]
    length = {letter: data.draw(st.integers(1, 3)) for letter in letters}
    terms = data.draw(st.lists(st.text(letters, max_size=3), min_size=1, max_size=3))
    every = sorted(set("".join(terms)))
    output = "".join(data.draw(st.permutations(every))[: data.draw(st.integers(0, len(every)))])
    text = ",".join(terms) + data.draw(st.sampled_from(["->" + output, ""]))
    xs = [values(tuple(length[c] for c in t), seed + i) for i, t in enumerate(terms)]
    y = tg.einsum(text, *xs)
    close(y, np.einsum(text, *xs))
    w = values(y.shape, seed + 9)
    got = gradient(lambda *xs: tg.einsum(text, *xs), *xs, weights=w)
    for i, (x, g) in enumerate(zip(xs, got, strict=True)):  # linear in each: try the unit arrays
        want = np.empty(x.shape)
        for place in np.ndindex(*x.shape):
            unit = np.zeros(x.shape)
            unit[place] = 1.0
            want[place] = np.sum(w * np.einsum(text, *xs[:i], unit, *xs[i + 1 :]))
        close(g, want)


@tries
@given(data=st.data(), seed=seeds)
def test_matmul_broadcasts_as_numpys(data: Any, seed: int) -> None:
    both = data.draw(hnp.mutually_broadcastable_shapes(signature="(n?,k),(k,m?)->(n?,m?)"))
    a, b = (values(shape, seed + i) for i, shape in enumerate(both.input_shapes))
    y = tg.matmul(a, b)
    close(y, np.matmul(a, b))
    w = values(y.shape, seed + 2)
    got_a, got_b = gradient(tg.matmul, a, b, weights=w)
    # As products of stacks of matrices, a vector being one row or one column.
    left = a if a.ndim > 1 else a[None]
    right = b if b.ndim > 1 else b[:, None]
    g = np.expand_dims(w, tuple(i for i, x in ((-1, b), (-2, a)) if x.ndim == 1))
    want_a = np.matmul(g, np.swapaxes(right, -1, -2))
    want_b = np.matmul(np.swapaxes(left, -1, -2), g)
    close(got_a, unstacked(want_a, left.shape).reshape(a.shape))
    close(got_b, unstacked(want_b, right.shape).reshape(b.shape))


def unstacked(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the leading axes that were broadcast."""
    return summed_to(g, (*shape[:-2], *g.shape[-2:]))


# ---- random programs, against the derivative by a complex step
#
# J. N. Lyness and C. B. Moler (1967): for an analytic f the imaginary part of f(x + ih) is
# h * f'(x) to rounding, since nothing cancels. Each step of a program is written twice: for
# tapegrad, and in NumPy's own functions, which know complex numbers.

Step = tuple[str, Callable[..., Any], Callable[..., Any]]
MATRIX = values((3, 3), 1)
UNARY_STEPS: list[Step] = [
    ("sin", tg.sin, np.sin),
    ("exp(x / 4)", lambda x: tg.exp(x / 4), lambda x: np.exp(x / 4)),
    ("tanh", tg.tanh, np.tanh),
    ("x**3", lambda x: x**3, lambda x: x * x * x),
    ("log(x**2 + 1)", lambda x: tg.log(tg.square(x) + 1), lambda x: np.log(x * x + 1)),
    ("sqrt(x**2 + 2)", lambda x: tg.sqrt(x * x + 2.0), lambda x: np.sqrt(x * x + 2)),
    ("1 / (x**2 + 1)", lambda x: tg.reciprocal(x * x + 1), lambda x: 1 / (x * x + 1)),
    ("atan", tg.atan, np.arctan),
    ("x.T", lambda x: x.T, np.transpose),
    ("x - mean", lambda x: x - tg.mean(x, axis=0), lambda x: x - x.sum(axis=0) / 3),
    ("sums", lambda x: MATRIX * tg.sum(x, axis=1), lambda x: MATRIX * x.sum(axis=1)),
    ("x[[2, 0, 2]]", lambda x: x[[2, 0, 2]], lambda x: x[[2, 0, 2]]),
    ("flip", lambda x: tg.flip(x, axis=0), lambda x: x[::-1]),
    ("m @ x", lambda x: tg.matmul(MATRIX, x) / 2, lambda x: MATRIX @ x / 2),
    ("cumulative sum", lambda x: tg.cumulative_sum(x, axis=0) / 2, lambda x: x.cumsum(0) / 2),
    ("softmax", lambda x: tg.nn.softmax(x, axis=0), lambda x: np.exp(x) / np.exp(x).sum(0)),
    ("sigmoid", tg.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    ("joined", lambda x: tg.concat([x[1:], -x[:1]]), lambda x: np.concatenate([x[1:], -x[:1]])),
]
BINARY_STEPS: list[Step] = [
    ("+", tg.add, np.add),
    ("-", tg.subtract, np.subtract),
    ("*", tg.multiply, np.multiply),
    ("/", lambda x, y: x / (y * y + 1.5), lambda x, y: x / (y * y + 1.5)),
    ("@", lambda x, y: tg.matmul(x, y + MATRIX) / 3, lambda x, y: x @ (y + MATRIX) / 3),
    ("einsum", lambda x, y: tg.einsum("ij,ij->i", x, y + MATRIX)[:, None] * MATRIX,
     lambda x, y: (x * (y + MATRIX)).sum(1)[:, None] * MATRIX),
]  # fmt: skip


@st.composite
def programs(draw: Any) -> list[tuple[Step, tuple[int, ...]]]:
    """Draw steps and which earlier values they take; the arguments count as 0 and 1."""
    steps: list[tuple[Step, tuple[int, ...]]] = []
    for known in range(2, 2 + draw(st.integers(1, 8))):
        earlier = st.integers(max(0, known - 4), known - 1)
        if draw(st.booleans()):
            steps.append((draw(st.sampled_from(UNARY_STEPS)), (draw(earlier),)))
        else:
            steps.append((draw(st.sampled_from(BINARY_STEPS)), (draw(earlier), draw(earlier))))
    return steps


def run(steps: list[tuple[Step, tuple[int, ...]]], side: int, *arguments: Any) -> Any:
    x, row = arguments
    known = [x, row * MATRIX]  # all values are 3 x 3
    for step, places in steps:
        known.append(step[side](*[known[i] for i in places]))
    return known[-1]


H = 1e-30


@settings(tries, max_examples=1000)
@given(steps=programs(), seed=seeds)
def test_random_programs(steps: Any, seed: int) -> None:
    x, y = values((3, 3), seed), values((1, 3), seed + 1)
    got = run(steps, 1, tg.constant(x), tg.constant(y))
    want = np.asarray(run(steps, 2, x, y))
    assume(np.abs(want).max() < 1e6)
    close(got, want, 1e-10)
    w = values(want.shape, seed + 2)
    gradients = gradient(lambda x, y: run(steps, 1, x, y), x, y, weights=w)
    for i, (a, g) in enumerate(zip((x, y), gradients, strict=True)):
        slopes = np.empty(a.shape)
        for place in np.ndindex(*a.shape):
            moved = [x.astype(complex), y.astype(complex)]
            moved[i][place] += 1j * H
            slopes[place] = np.sum(w * np.imag(run(steps, 2, *moved))) / H
        close(g, slopes, 1e-9)


@settings(tries, max_examples=400)
@given(steps=programs(), seed=seeds)
def test_second_derivatives_of_random_programs(steps: Any, seed: int) -> None:
    x, y = values((3, 3), seed), values((1, 3), seed + 1)
    directions = values((3, 3), seed + 2), values((1, 3), seed + 3)

    def slope(distance: float, along: tuple[Array, Array]) -> float:
        """Return the slope in the second pair of directions, moved in the first."""
        a, b = (p + distance * d for p, d in zip((x, y), directions, strict=True))
        moved = (a + 1j * H * along[0], b + 1j * H * along[1])
        return float(np.sum(np.imag(run(steps, 2, *moved))) / H)

    assume(np.abs(run(steps, 2, x, y)).max() < 1e3)
    other = values((3, 3), seed + 4), values((1, 3), seed + 5)
    step = 1e-3
    coarse = (slope(step, other) - slope(-step, other)) / (2 * step)
    fine = (slope(step / 2, other) - slope(-step / 2, other)) / step
    want = (4 * fine - coarse) / 3
    assume(abs(coarse - fine) < 1e-3 * (1 + abs(want)))  # steep programs are beyond differences
    products = tg.hvp(lambda x, y: tg.sum(run(steps, 1, x, y)), [x, y], list(directions))
    got = sum(float(np.sum(p.numpy() * o)) for p, o in zip(products, other, strict=True))
    assert abs(got - want) <= 1e-5 * (1 + abs(want))
