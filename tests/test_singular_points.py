"""Derivatives where functions have kinks, poles and overflow.

The rule: where a function is differentiable, its derivative; else, if it is convex, the
sub-gradient of least norm; else what continuity gives, which may be infinite; else NaN. And a
zero upstream gradient gives zero, whatever the derivative.
"""

import math

import ml_dtypes
import numpy as np
import pytest

import tapegrad as tg
from tapegrad.primitive import primitives

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # forward warns as NumPy does


def value_and_gradients(function, *values):
    """Return function(*values) and its gradients, at float64, as arrays (None stays)."""
    xs = [tg.Variable(np.asarray(value, np.float64)) for value in values]
    with tg.GradientTape() as tape:
        y = function(*xs)
    gradients = tape.gradient(y, xs)
    return y.numpy(), [g if g is None else g.numpy() for g in gradients]


def hessian(function, value, **options):
    x = tg.Variable(np.asarray(value, np.float64))
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = function(x)
        slope = inner.gradient(y, x)
    return outer.jacobian(slope, x, unconnected_gradients="zero").numpy()


# ---- values and first derivatives at single points

SELU = 1.0507009873554805  # Klambauer et al. (2017), equation 14
POINTS = [  # name, function, x, value, derivative
    ("relu at 0", tg.nn.relu, 0.0, 0.0, 0.0),
    ("relu at -0", tg.nn.relu, -0.0, 0.0, 0.0),
    ("relu at NaN", tg.nn.relu, NAN, NAN, 0.0),
    ("relu at inf", tg.nn.relu, INF, INF, 1.0),
    ("relu at -inf", tg.nn.relu, -INF, 0.0, 0.0),
    ("relu6 at 0", tg.nn.relu6, 0.0, 0.0, 0.0),
    ("relu6 at 6", tg.nn.relu6, 6.0, 6.0, 0.0),
    ("relu6 between", tg.nn.relu6, 5.9, 5.9, 1.0),
    ("relu6 above", tg.nn.relu6, 7.0, 6.0, 0.0),
    ("relu6 at NaN", tg.nn.relu6, NAN, NAN, 0.0),
    ("leaky_relu at 0", lambda x: tg.nn.leaky_relu(x, 0.1), 0.0, 0.0, 0.1),
    ("elu at 0", tg.nn.elu, 0.0, 0.0, 1.0),
    ("elu far below", tg.nn.elu, -1000.0, -1.0, 0.0),
    ("elu far above", tg.nn.elu, 1000.0, 1000.0, 1.0),
    ("selu at 0", tg.nn.selu, 0.0, 0.0, SELU),
    ("selu far above", tg.nn.selu, 1000.0, 1000.0 * SELU, SELU),
    ("gelu at 0", tg.nn.gelu, 0.0, 0.0, 0.5),
    ("gelu far below", tg.nn.gelu, -1000.0, 0.0, 0.0),
    ("gelu far above", tg.nn.gelu, 1000.0, 1000.0, 1.0),
    ("softplus at 0", tg.nn.softplus, 0.0, math.log(2), 0.5),
    ("softplus far above", tg.nn.softplus, 1000.0, 1000.0, 1.0),
    ("softplus far below", tg.nn.softplus, -1000.0, 0.0, 0.0),
    ("sigmoid far above", tg.nn.sigmoid, 1000.0, 1.0, 0.0),
    ("sigmoid far below", tg.nn.sigmoid, -1000.0, 0.0, 0.0),
    ("log_sigmoid far above", tg.nn.log_sigmoid, 1000.0, 0.0, 0.0),
    ("log_sigmoid far below", tg.nn.log_sigmoid, -1000.0, -1000.0, 1.0),
    ("tanh far above", tg.tanh, 1000.0, 1.0, 0.0),
    ("abs at 0", tg.abs, 0.0, 0.0, 0.0),
    ("abs at -0", tg.abs, -0.0, 0.0, 0.0),
    ("sign at 0", tg.sign, 0.0, 0.0, 0.0),
    ("sign elsewhere", tg.sign, -2.0, -1.0, 0.0),
    ("sqrt at 0", tg.sqrt, 0.0, 0.0, INF),
    ("sqrt at 0, times 0", lambda x: tg.sqrt(x) * 0.0, 0.0, 0.0, 0.0),
    ("rsqrt at 0", tg.rsqrt, 0.0, INF, -INF),
    ("log at 0", tg.log, 0.0, -INF, INF),
    ("log2 at 0", tg.log2, 0.0, -INF, INF),
    ("log10 at 0", tg.log10, 0.0, -INF, INF),
    ("log1p at -1", tg.log1p, -1.0, -INF, INF),
    ("asin at 1", tg.asin, 1.0, math.pi / 2, INF),
    ("asin at -1", tg.asin, -1.0, -math.pi / 2, INF),
    ("acos at 1", tg.acos, 1.0, 0.0, -INF),
    ("acos at -1", tg.acos, -1.0, math.pi, -INF),
    ("acosh at 1", tg.acosh, 1.0, 0.0, INF),
    ("atanh at 1", tg.atanh, 1.0, INF, INF),
    ("reciprocal at 0", tg.reciprocal, 0.0, INF, -INF),
    ("1 / x at 0", lambda x: 1.0 / x, 0.0, INF, -INF),
    ("x ** 2 at 0", lambda x: x**2, 0.0, 0.0, 0.0),
    ("x ** 2.0 at 0", lambda x: x**2.0, 0.0, 0.0, 0.0),
    ("square at 0", tg.square, 0.0, 0.0, 0.0),
    ("x ** 3 at 0", lambda x: x**3, 0.0, 0.0, 0.0),
    ("x ** 1 at 0", lambda x: x**1, 0.0, 0.0, 1.0),
    ("x ** 0 at 0", lambda x: x**0, 0.0, 1.0, 0.0),
    ("x ** 0.0 at 0", lambda x: x**0.0, 0.0, 1.0, 0.0),
    ("x ** 0.5 at 0", lambda x: x**0.5, 0.0, 0.0, INF),
    ("x ** -1 at 0", lambda x: x**-1, 0.0, INF, -INF),
    ("x ** -1.0 at 0", lambda x: x**-1.0, 0.0, INF, -INF),
    ("x ** 3 below 0", lambda x: x**3, -2.0, -8.0, 12.0),
    ("0 ** x", lambda x: 0.0**x, 2.0, 0.0, 0.0),
    ("2 ** x", lambda x: 2.0**x, 3.0, 8.0, 8.0 * math.log(2)),
    ("xlogy(x, x) at 0", lambda x: tg.xlogy(x, x), 0.0, 0.0, 0.0),
    # Its value is 0 * -inf; the derivative log(x) + 1 is, by continuity, infinite.
    ("x * log(x) at 0", lambda x: x * tg.log(x), 0.0, NAN, -INF),
    ("exp overflow", tg.exp, 1000.0, INF, INF),
    ("x % 3", lambda x: x % 3.0, 7.5, 1.5, 1.0),
    ("7.5 % x", lambda x: 7.5 % x, 3.0, 1.5, -2.0),
    ("7.5 % x below 0", lambda x: 7.5 % x, -3.0, -1.5, 3.0),
    ("erf far out", tg.erf, 1000.0, 1.0, 0.0),
]


@pytest.mark.parametrize(("function", "x", "value", "slope"), [p[1:] for p in POINTS],
                         ids=[p[0] for p in POINTS])  # fmt: skip
def test_points(function, x, value, slope):
    y, (dx,) = value_and_gradients(function, x)
    np.testing.assert_allclose(y, value, rtol=1e-15)
    np.testing.assert_allclose(dx, slope, rtol=1e-15)


@pytest.mark.parametrize(("function", "x", "value", "slope"), [p[1:] for p in POINTS],
                         ids=[p[0] for p in POINTS])  # fmt: skip
def test_points_among_others(function, x, value, slope):
    """In an array, in float32: another path than numbers take."""
    other = 1.75 if function is tg.acosh else 0.75
    v = tg.Variable(np.array([x, other, x], np.float32))
    with tg.GradientTape() as tape:
        y = function(v)
    dx = tape.gradient(y, v).numpy()
    np.testing.assert_allclose(y.numpy()[[0, 2]], [value] * 2, rtol=2e-6)
    np.testing.assert_allclose(dx[[0, 2]], [slope] * 2, rtol=2e-6)
    assert math.isfinite(dx[1])


SECOND = [  # name, function, x, second derivative
    ("x ** 2 at 0", lambda x: x**2, 0.0, 2.0),
    ("x ** 2.0 at 0", lambda x: x**2.0, 0.0, 2.0),
    ("square at 0", tg.square, 0.0, 2.0),
    ("x * x at 0", lambda x: x * x, 0.0, 2.0),
    ("x ** 1 at 0", lambda x: x**1, 0.0, 0.0),
    ("x ** 0 at 0", lambda x: x**0, 0.0, 0.0),
    ("x ** 3 at 0", lambda x: x**3, 0.0, 0.0),
    ("x ** 4 at 0", lambda x: x**4, 0.0, 0.0),
    ("abs at 0", tg.abs, 0.0, 0.0),
    ("relu at 0", tg.nn.relu, 0.0, 0.0),
    ("sigmoid far above", tg.nn.sigmoid, 1000.0, 0.0),
    ("softplus far below", tg.nn.softplus, -1000.0, 0.0),
    ("log_sigmoid far below", tg.nn.log_sigmoid, -1000.0, 0.0),
    ("elu above 0", tg.nn.elu, 1000.0, 0.0),
    ("gelu at 0", tg.nn.gelu, 0.0, math.sqrt(2 / math.pi)),  # 2 times the normal density
]


@pytest.mark.parametrize(("function", "x", "curvature"), [p[1:] for p in SECOND],
                         ids=[p[0] for p in SECOND])  # fmt: skip
def test_second_derivatives(function, x, curvature):
    np.testing.assert_allclose(hessian(function, x), curvature, rtol=1e-14, atol=1e-300)


# ---- several arguments

PAIRS = [  # name, function, x, y, value, d/dx, d/dy
    ("maximum, tie", tg.maximum, 2.0, 2.0, 2.0, 0.5, 0.5),
    ("minimum, tie", tg.minimum, 2.0, 2.0, 2.0, 0.5, 0.5),
    ("maximum of zeros", tg.maximum, 0.0, -0.0, 0.0, 0.5, 0.5),
    ("x ** y at (0, 2)", tg.power, 0.0, 2.0, 0.0, 0.0, 0.0),
    ("x ** y at (0, 1)", tg.power, 0.0, 1.0, 0.0, 1.0, 0.0),
    ("x ** y at (0, 0)", tg.power, 0.0, 0.0, 1.0, 0.0, 0.0),
    # Documented: the logarithm of a base that is not positive counts as 0.
    ("x ** y at (-2, 3)", tg.power, -2.0, 3.0, -8.0, 12.0, 0.0),
    ("atan2 at the origin", tg.atan2, 0.0, 0.0, 0.0, 0.0, 0.0),
    ("atan2 near the origin", tg.atan2, 3e-200, 4e-200, math.atan(0.75), 0.16e200, -0.12e200),
    ("atan2 far out", tg.atan2, 3e200, 4e200, math.atan(0.75), 0.16e-200, -0.12e-200),
    ("hypot at the origin", tg.hypot, 0.0, 0.0, 0.0, 0.0, 0.0),
    ("xlogy at (0, 0)", tg.xlogy, 0.0, 0.0, 0.0, 0.0, 0.0),
    ("xlogy at (0, 2)", tg.xlogy, 0.0, 2.0, 0.0, math.log(2), 0.0),
    ("x % y", lambda x, y: x % y, 7.5, 3.0, 1.5, 1.0, -2.0),
    ("x % y below 0", lambda x, y: x % y, -7.5, 3.0, 1.5, 1.0, 3.0),
    ("logaddexp far out", tg.logaddexp, 1000.0, -1000.0, 1000.0, 1.0, 0.0),
    ("logaddexp, tie", tg.logaddexp, 1000.0, 1000.0, 1000.0 + math.log(2), 0.5, 0.5),
    ("logaddexp of -inf", tg.logaddexp, -INF, 3.0, 3.0, 0.0, 1.0),
    ("logaddexp of -infs", tg.logaddexp, -INF, -INF, -INF, 0.0, 0.0),
    ("0 / y", lambda x, y: x / y, 0.0, 4.0, 0.0, 0.25, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "y", "value", "slope_x", "slope_y"),
                         [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])  # fmt: skip
def test_pairs(function, x, y, value, slope_x, slope_y):
    z, (dx, dy) = value_and_gradients(function, x, y)
    # 1e-12: at 1,000 a logarithm of sums has an error of 1e-13, which its derivative inherits.
    np.testing.assert_allclose([z, dx, dy], [value, slope_x, slope_y], rtol=1e-12)


def test_maximum_with_a_number_at_a_tie():
    for function in (lambda x: tg.maximum(x, 0), lambda x: tg.maximum(0, x),
                     lambda x: tg.minimum(x, 0.0), lambda x: tg.minimum(0.0, x)):  # fmt: skip
        np.testing.assert_array_equal(value_and_gradients(function, 0.0)[1], [0.5])


def test_power_at_0_to_minus_1():
    """Documented: infinite for the base; for the exponent inf * 0, NaN, as in TensorFlow."""
    y, (dx, dy) = value_and_gradients(tg.power, 0.0, -1.0)
    assert (y, dx) == (INF, -INF)
    assert math.isnan(dy)


def test_x_to_an_exponent_that_is_a_tensor():
    for exponent, slope, curvature in ((0, 0, 0), (1, 1, 0), (2, 0, 2), (3, 0, 0)):
        fixed = tg.constant(np.float64(exponent))
        assert value_and_gradients(lambda x, e=fixed: x**e, 0.0)[1] == [slope]
        assert hessian(lambda x, e=fixed: x**e, 0.0) == curvature


CLIPS = [  # x, low, high; d/dx, d/dlow, d/dhigh
    (1.0, 1.0, 3.0, 1.0, 0.0, 0.0),
    (3.0, 1.0, 3.0, 1.0, 0.0, 0.0),
    (2.0, 1.0, 3.0, 1.0, 0.0, 0.0),
    (0.0, 1.0, 3.0, 0.0, 1.0, 0.0),
    (4.0, 1.0, 3.0, 0.0, 0.0, 1.0),
]


@pytest.mark.parametrize(("x", "low", "high", "dx", "dlow", "dhigh"), CLIPS)
def test_clip_is_inclusive_and_its_bounds_get_the_rest(x, low, high, dx, dlow, dhigh):
    """Documented: 1 at the bounds, as in TensorFlow."""
    y, gradients = value_and_gradients(tg.clip, x, low, high)
    assert y == min(max(x, low), high)
    np.testing.assert_array_equal(gradients, [dx, dlow, dhigh])
    by_numbers = value_and_gradients(lambda x: tg.clip(x, low, high), x)[1]
    np.testing.assert_array_equal(by_numbers, [dx])


def test_clip_keeps_nan():
    y, (dx,) = value_and_gradients(lambda x: tg.clip(x, 0.0, 1.0), [NAN, 0.5])
    assert math.isnan(y[0])
    assert dx[1] == 1.0


@pytest.mark.parametrize("function", [tg.floor, tg.ceil, tg.round, tg.trunc, lambda x: x // 3.0,
                                      tg.argmax, lambda x: x > 1.0])  # fmt: skip
def test_piecewise_constant_functions_have_no_gradient(function):
    assert value_and_gradients(function, [0.5, 2.0])[1] == [None]


# ---- vectors

VECTORS = [  # name, function, x, value, gradient
    ("max, ties", tg.max, [2.0, 5.0, 5.0], 5.0, [0, 0.5, 0.5]),
    ("min, ties", tg.min, [2.0, 2.0, 5.0], 2.0, [0.5, 0.5, 0]),
    ("max, all ties", tg.max, [3.0, 3.0, 3.0, 3.0], 3.0, [0.25] * 4),
    ("max of -infs", tg.max, [-INF, -INF], -INF, [0.5, 0.5]),
    ("norm at the origin", tg.norm, [0.0, 0.0], 0.0, [0.0, 0.0]),
    ("norm of order 1", lambda x: tg.norm(x, ord=1), [0.0, -2.0], 2.0, [0.0, -1.0]),
    ("norm of order inf, tie", lambda x: tg.norm(x, ord=INF), [3.0, -3.0], 3.0, [0.5, -0.5]),
    ("norm of order inf at 0", lambda x: tg.norm(x, ord=INF), [0.0, 0.0], 0.0, [0.0, 0.0]),
    ("norm of order 3 at 0", lambda x: tg.norm(x, ord=3), [0.0, 0.0], 0.0, [0.0, 0.0]),
    ("norm of order 3 on an axis", lambda x: tg.norm(x, ord=3), [0.0, -2.0], 2.0, [0.0, -1.0]),
    ("norm of order 1.5", lambda x: tg.norm(x, ord=1.5), [0.0, 4.0], 4.0, [0.0, 1.0]),
    ("sqrt of a sum at the origin", lambda x: tg.sqrt(tg.sum(x * x)), [0.0, 0.0], 0.0, [NAN, NAN]),
    ("norm of order 0.5 with a 0", lambda x: tg.norm(x, ord=0.5), [0.0, 4.0, 9.0], 25.0,
     [0.0, 2.5, 5 / 3]),
    ("norm of order 0.5 at 0", lambda x: tg.norm(x, ord=0.5), [0.0, 0.0], 0.0, [0.0, 0.0]),
    ("std of equal values", tg.std, [2.0, 2.0, 2.0], 0.0, [0.0, 0.0, 0.0]),
    ("var of equal values", tg.var, [2.0, 2.0, 2.0], 0.0, [0.0, 0.0, 0.0]),
    ("prod, one zero", tg.prod, [0.0, 2.0, 3.0], 0.0, [6.0, 0.0, 0.0]),
    ("prod, two zeros", tg.prod, [0.0, 2.0, 0.0], 0.0, [0.0, 0.0, 0.0]),
    ("cumulative_prod, a zero", lambda x: tg.sum(tg.cumulative_prod(x)), [2.0, 0.0, 3.0], 2.0,
     [1.0, 8.0, 0.0]),
    ("cumulative_prod, zeros", lambda x: tg.sum(tg.cumulative_prod(x)), [0.0, 0.0, 3.0], 0.0,
     [1.0, 0.0, 0.0]),
    ("cumulative_prod, a zero last", lambda x: tg.sum(tg.cumulative_prod(x)), [2.0, 3.0, 0.0],
     8.0, [4.0, 2.0, 6.0]),
    ("logsumexp of -infs", tg.logsumexp, [-INF, -INF], -INF, [0.0, 0.0]),
    ("logsumexp with -inf", tg.logsumexp, [-INF, 0.0], 0.0, [0.0, 1.0]),
    ("logsumexp with inf", tg.logsumexp, [INF, 0.0], INF, [NAN, 0.0]),
    ("logsumexp far out", tg.logsumexp, [1000.0, 1000.0], 1000.0 + math.log(2), [0.5, 0.5]),
    ("sort", lambda x: tg.sum(tg.sort(x) * np.array([1.0, 10.0, 100.0])), [3.0, 1.0, 2.0], 321.0,
     [100.0, 1.0, 10.0]),
    ("top_k", lambda x: tg.sum(tg.top_k(x, 2).values * np.array([1.0, 10.0])), [3.0, 1.0, 2.0],
     23.0, [1.0, 0.0, 10.0]),
    ("sort, ties", lambda x: tg.sum(tg.sort(x) * np.array([1.0, 10.0])), [2.0, 2.0], 22.0,
     [1.0, 10.0]),
    ("mean", tg.mean, [1.0, 5.0], 3.0, [0.5, 0.5]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "value", "slopes"), [p[1:] for p in VECTORS],
                         ids=[p[0] for p in VECTORS])  # fmt: skip
def test_vectors(function, x, value, slopes):
    y, (dx,) = value_and_gradients(function, x)
    np.testing.assert_allclose(y, value, rtol=1e-15)
    np.testing.assert_allclose(dx, slopes, rtol=1e-12)  # see test_pairs


@pytest.mark.parametrize("correction", [2, 3])
def test_var_and_std_with_no_degree_of_freedom_left(correction):
    """As NumPy: the divisor is 0 then, never negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        for function in (tg.var, tg.std):
            assert function([1.0, 2.0], correction=correction) == INF
            assert math.isnan(function([2.0, 2.0], correction=correction))


@pytest.mark.parametrize("keepdims", [False, True])
def test_float16_is_squared_and_summed_in_float32(keepdims):
    """300**2 is above its largest number, 65504, and so is the sum of 700 times 10**2."""
    far, many = np.float16([300.0, -400.0]), np.tile(np.float16([10.0, -10.0]), 350)
    for function, x, value, slopes in [
        (tg.norm, far, 500.0, [0.6, -0.8]),
        (tg.std, far, 350.0, [0.5, -0.5]),
        (tg.var, many, 100.0, many / np.float32(350)),
        (tg.std, many, 10.0, many / np.float32(7000)),
        (lambda x, **o: tg.norm(x, ord=3, **o), far, 91e6 ** (1 / 3),
         [9e4 / 91e6 ** (2 / 3), -16e4 / 91e6 ** (2 / 3)]),
    ]:  # fmt: skip
        v = tg.Variable(x)
        with tg.GradientTape() as tape:
            y = function(v, keepdims=keepdims)
        dx = tape.gradient(y, v)
        assert y.dtype == dx.dtype == tg.float16
        np.testing.assert_allclose(y, np.reshape(value, y.shape), rtol=1e-3)
        np.testing.assert_allclose(dx, slopes, rtol=1e-3)


def bias_gradient(x, layer=tg.add):
    bias = tg.zeros(x.shape[1:], dtype=x.dtype)
    with tg.GradientTape() as tape:
        tape.watch(bias)
        y = layer(x, bias)
    return tape.gradient(y, bias)


SUMS = {  # of 5000 rows of 1, where the last axis is no longer than 3
    "sum": (tg.sum, 15000.0),
    "sum over rows": (lambda x: tg.sum(x, axis=0), 5000.0),
    "sum in its own type": (lambda x: tg.sum(x, axis=0, dtype=x.dtype), 5000.0),
    "mean over rows": (lambda x: tg.mean(x, axis=0), 1.0),
    "bias": (bias_gradient, 5000.0),
    "bias of stacks": (lambda x: bias_gradient(x[:, None, :]), 5000.0),
    "spread": (lambda x: bias_gradient(x[None, :, :1])[:1], 1.0),
    "lookups": (lambda x: bias_gradient(x, lambda x, row: x * row[None][[0] * 5000]), 5000.0),
    "cumulative_sum": (lambda x: tg.cumulative_sum(x, axis=0)[-1], 5000.0),
    "softmax": (lambda x: tg.nn.softmax(x, axis=0), 1 / 5000),
    "log_softmax": (lambda x: tg.nn.log_softmax(x, axis=0), -math.log(5000)),
    "logsumexp": (lambda x: tg.logsumexp(x, axis=0), 1 + math.log(5000)),
    "cross-entropy": (lambda x: tg.nn.softmax_cross_entropy(x.T, [0, 1, 2]), math.log(5000)),
    "smoothed": (lambda x: tg.nn.softmax_cross_entropy(x.T, [0, 1, 2], label_smoothing=0.5),
                 math.log(5000)),
    "of targets": (lambda x: tg.nn.softmax_cross_entropy(x.T, x.T / 5000), math.log(5000)),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bits_are_summed_in_float32(dtype, name, compiled):
    """In float16 2048 + 1 is 2048, in bfloat16 256 + 1 is 256: where NumPy adds row by row."""
    function, value = SUMS[name]
    function = tg.function(function) if compiled else function
    x = tg.constant(np.ones((5000, 3), dtype))
    for _ in range(3 if compiled else 1):
        y = function(x).numpy()
    np.testing.assert_allclose(y.astype("f8"), value, rtol=2e-3 if dtype == "f2" else 1e-2)


ACTIVATIONS = [
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "sigmoid",
    "log_sigmoid",
    "silu",
    "tanh",
    "softplus",
    "softsign",
    "softmax",
    "log_softmax",
]


@pytest.mark.parametrize("dtype", ["u1", "i1", "i8", "?"])
@pytest.mark.parametrize(
    "function",
    [
        *[getattr(tg.nn, name) for name in ACTIVATIONS],
        lambda x: tg.nn.gelu(x, approximate=True),
        lambda x: tg.nn.sigmoid_cross_entropy(x, [0.25] * 3, reduction="none"),
        tg.logsumexp,
    ],
    ids=[*ACTIVATIONS, "gelu_tanh", "sigmoid_cross_entropy", "logsumexp"],
)
def test_integers_are_taken_as_floating(function, dtype):
    """The negative of 3 as uint8 is 253: its sigmoid would be 0."""
    x = np.array({"?": [0, 1, 1], "u1": [3, 200, 255]}.get(dtype, [3, -128, 127]), dtype)
    floating = "f8" if dtype == "i8" else "f4"
    y, z = function(x), function(x.astype(floating))
    assert y.dtype == z.dtype == floating
    np.testing.assert_array_equal(y, z)


def test_the_gradient_of_a_float16_layers_bias_too():
    def function(x):
        return bias_gradient(x, lambda x, b: tg.nn.linear_relu(x, tg.ones_like(x[:3]), b))

    compiled = tg.function(function)
    x = tg.constant(np.ones((5000, 3), "f2"))
    for call in (function, compiled, compiled, compiled):
        np.testing.assert_array_equal(call(x), [5000.0] * 3)


@pytest.mark.parametrize("function", [tg.max, tg.min])
def test_an_extreme_that_is_nan(function):
    """Documented: NaN wherever the elements are NaN; the others may be anything but finite lies."""
    y, (dx,) = value_and_gradients(function, [1.0, NAN, 2.0])
    assert math.isnan(y)
    assert math.isnan(dx[1])
    assert all(math.isnan(g) or g == 0.0 for g in dx)


def test_extremes_along_an_axis_share_among_ties():
    x = [[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]
    y, (dx,) = value_and_gradients(lambda x: tg.max(x, axis=1), x)
    np.testing.assert_array_equal(y, [3.0, 2.0])
    np.testing.assert_allclose(dx, [[0, 0.5, 0.5], [1 / 3] * 3], rtol=1e-15)


def test_products_with_zeros_in_second_order():
    # (a b c): the mixed second derivatives are the third factor, the pure ones 0
    for values in ([0.0, 2.0, 3.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]):
        a, b, c = values
        expected = [[0, c, b], [c, 0, a], [b, a, 0]]
        np.testing.assert_array_equal(hessian(tg.prod, values), expected)
        # a + a b + a b c
        expected = [[0, 1 + c, b], [1 + c, 0, a], [b, a, 0]]
        np.testing.assert_array_equal(
            hessian(lambda x: tg.sum(tg.cumulative_prod(x)), values), expected
        )


def test_norm_and_std_on_rows_where_only_one_is_zero():
    x = [[3.0, 4.0], [0.0, 0.0]]
    np.testing.assert_allclose(
        value_and_gradients(lambda x: tg.norm(x, axis=1), x)[1][0], [[0.6, 0.8], [0, 0]]
    )
    x = [[1.0, 3.0], [2.0, 2.0]]  # std is half the distance
    np.testing.assert_allclose(
        value_and_gradients(lambda x: tg.std(x, axis=1), x)[1][0], [[-0.5, 0.5], [0, 0]]
    )


# ---- softmax and the cross-entropies


def test_softmax_of_minus_infinities_only():
    """Documented: NaN; a mask over everything has no distribution."""
    y, _ = value_and_gradients(tg.nn.softmax, [-INF, -INF])
    assert np.isnan(y).all()


def test_softmax_with_a_mask():
    weights = np.array([1.0, 10.0, 100.0])
    y, (dx,) = value_and_gradients(lambda x: tg.nn.softmax(x) * weights, [0.0, -INF, 0.0])
    np.testing.assert_array_equal(y, [0.5, 0.0, 50.0])
    # p_i (w_i - sum p w) = 0.5 (1 - 50.5), 0, 0.5 (100 - 50.5)
    np.testing.assert_allclose(dx, [-24.75, 0.0, 24.75], rtol=1e-14)


def test_softmax_far_out():
    y, (dx,) = value_and_gradients(lambda x: tg.nn.softmax(x)[0], [1000.0, -1000.0])
    assert y == 1.0
    np.testing.assert_array_equal(dx, [0.0, 0.0])


@pytest.mark.parametrize(("logit", "target", "loss", "slope"), [
    (1000.0, 1.0, 0.0, 0.0),
    (1000.0, 0.0, 1000.0, 1.0),
    (-1000.0, 1.0, 1000.0, -1.0),
    (-1000.0, 0.0, 0.0, 0.0),
    (0.0, 0.5, math.log(2), 0.0),
])  # fmt: skip
def test_sigmoid_cross_entropy_far_out(logit, target, loss, slope):
    y, (dx,) = value_and_gradients(
        lambda x: tg.nn.sigmoid_cross_entropy(x, tg.constant([target])), [logit]
    )
    np.testing.assert_allclose(y, loss, rtol=1e-15)
    np.testing.assert_allclose(dx, [slope], rtol=1e-15)


@pytest.mark.parametrize("labels", [[0], [[1.0, 0.0, 0.0]]])
def test_softmax_cross_entropy_with_a_mask_where_the_label_is_0(labels):
    y, (dx,) = value_and_gradients(
        lambda x: tg.nn.softmax_cross_entropy(x, tg.constant(labels)), [[0.0, 0.0, -INF]]
    )
    np.testing.assert_allclose(y, math.log(2), rtol=1e-15)
    np.testing.assert_allclose(dx, [[-0.5, 0.5, 0.0]], rtol=1e-15)


@pytest.mark.parametrize("labels", [[0], [[1.0, 0.0]]])
@pytest.mark.parametrize(("logits", "loss", "slopes"), [
    ([[1000.0, -1000.0]], 0.0, [[0.0, 0.0]]),
    ([[-1000.0, 1000.0]], 2000.0, [[-1.0, 1.0]]),
])  # fmt: skip
def test_softmax_cross_entropy_far_out(logits, loss, slopes, labels):
    y, (dx,) = value_and_gradients(
        lambda x: tg.nn.softmax_cross_entropy(x, tg.constant(labels)), logits
    )
    np.testing.assert_array_equal(y, loss)
    np.testing.assert_array_equal(dx, slopes)


@pytest.mark.parametrize("labels", [[0], [[1.0, 0.0, 0.0]]])
def test_softmax_cross_entropy_with_a_mask_in_second_order(labels):
    """The Hessian is diag(p) - p p^T, with p = 1/2, 1/2, 0."""
    h = hessian(lambda x: tg.nn.softmax_cross_entropy(x, tg.constant(labels)), [[0.0, 0.0, -INF]])
    expected = [[0.25, -0.25, 0.0], [-0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(h[0, :, 0], expected, atol=1e-16)


@pytest.mark.parametrize("loss", [tg.losses.binary_crossentropy,
                                  tg.losses.categorical_crossentropy])  # fmt: skip
def test_cross_entropies_of_certain_probabilities_are_finite(loss):
    targets = tg.constant([[1.0, 0.0]])
    y, (dp,) = value_and_gradients(lambda p: loss(targets, p), [[1.0, 0.0]])
    np.testing.assert_allclose(y, [0.0], atol=1e-6)  # right and certain
    assert np.isfinite(dp).all()
    y, (dp,) = value_and_gradients(lambda p: loss(targets, p), [[0.0, 1.0]])
    assert np.isfinite(y).all()  # wrong and certain
    assert y > 10.0
    assert np.isfinite(dp).all()


# ---- zero upstream gives zero

BRANCHES = [  # name, function, a point where it or its slope is not finite, another, slope there
    ("sqrt at -1", tg.sqrt, -1.0, 4.0, 0.25),
    ("sqrt at 0", tg.sqrt, 0.0, 4.0, 0.25),
    ("rsqrt at 0", tg.rsqrt, 0.0, 4.0, -1 / 16),
    ("rsqrt at -1", tg.rsqrt, -1.0, 4.0, -1 / 16),
    ("log at 0", tg.log, 0.0, 4.0, 0.25),
    ("log at -1", tg.log, -1.0, 4.0, 0.25),
    ("log2 at 0", tg.log2, 0.0, 4.0, 0.25 / math.log(2)),
    ("log10 at 0", tg.log10, 0.0, 4.0, 0.25 / math.log(10)),
    ("log1p at -1", tg.log1p, -1.0, 1.0, 0.5),
    ("1 / x at 0", lambda x: 1.0 / x, 0.0, 2.0, -0.25),
    ("x / x at 0", lambda x: x / x, 0.0, 2.0, 0.0),
    ("x / 0", lambda x: x / np.array([0.0, 2.0]), 1.0, 1.0, 0.5),
    ("reciprocal at 0", tg.reciprocal, 0.0, 2.0, -0.25),
    ("x ** -1 at 0", lambda x: x**-1, 0.0, 2.0, -0.25),
    ("x ** 0.5 at -1", lambda x: x**0.5, -1.0, 4.0, 0.25),
    ("x ** 0.5 at 0", lambda x: x**0.5, 0.0, 4.0, 0.25),
    ("x ** x at -0.5", lambda x: x**x, -0.5, 1.0, 1.0),
    ("acos at 1", tg.acos, 1.0, 0.0, -1.0),
    ("asin at 1", tg.asin, 1.0, 0.0, 1.0),
    ("asin at 2", tg.asin, 2.0, 0.0, 1.0),
    ("acosh at 1", tg.acosh, 1.0, math.sqrt(2), 1.0),
    ("acosh at 0", tg.acosh, 0.0, math.sqrt(2), 1.0),
    ("atanh at 1", tg.atanh, 1.0, 0.0, 1.0),
    ("atanh at 2", tg.atanh, 2.0, 0.0, 1.0),
    ("exp overflow", tg.exp, 1000.0, 0.0, 1.0),
    ("expm1 overflow", tg.expm1, 1000.0, 0.0, 1.0),
    ("exp2 overflow", tg.exp2, 10000.0, 0.0, math.log(2)),
    ("sinh overflow", tg.sinh, 1000.0, 0.0, 1.0),
    ("cosh overflow", tg.cosh, 1000.0, 0.0, 0.0),
    ("x * x overflow", lambda x: x * x * x, 1e200, 2.0, 12.0),
    ("square overflow", lambda x: tg.square(tg.square(x)), 1e200, 2.0, 32.0),
    ("x * log(x) at 0", lambda x: x * tg.log(x), 0.0, 1.0, 1.0),
    ("xlogy(2, x) at 0", lambda x: tg.xlogy(2.0, x), 0.0, 4.0, 0.5),
    ("sin at inf", tg.sin, INF, 0.0, 1.0),
    ("x * inf", lambda x: x * np.array([INF, 2.0]), 1.0, 1.0, 2.0),
    ("x - x at inf", lambda x: x * 2.0 - x, INF, 1.0, 1.0),
    ("erf at NaN", tg.erf, NAN, 0.0, 2 / math.sqrt(math.pi)),
    ("tanh at NaN", tg.tanh, NAN, 0.0, 1.0),
    ("sigmoid at NaN", tg.nn.sigmoid, NAN, 0.0, 0.25),
    ("softplus at NaN", tg.nn.softplus, NAN, 0.0, 0.5),
    ("gelu at inf", tg.nn.gelu, -INF, 0.0, 0.5),
    ("abs at NaN", tg.abs, NAN, -2.0, -1.0),
    ("maximum with NaN", lambda x: tg.maximum(x, 0.0), NAN, 2.0, 1.0),
    ("hypot at inf", lambda x: tg.hypot(x, 4.0), INF, 3.0, 0.6),
    ("atan2 at inf", lambda x: tg.atan2(x, 1.0), INF, 0.0, 1.0),
    ("remainder by 0", lambda x: 7.0 % x, 0.0, 3.0, -2.0),
    ("nested: log(sqrt)", lambda x: tg.log(tg.sqrt(x)), 0.0, 1.0, 0.5),
    ("nested: sqrt(log)", lambda x: tg.sqrt(tg.log(x)), 1.0, math.e, 0.5 / math.e),
    ("nested: 1 / sqrt(x - 1)", lambda x: 1.0 / tg.sqrt(x - 1.0), 1.0, 5.0, -1 / 16),
    ("nested: exp(1 / x)", lambda x: tg.exp(1.0 / x), 0.0, 1.0, -math.e),
]  # fmt: skip


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("function", "bad", "good", "slope"), [b[1:] for b in BRANCHES],
                         ids=[b[0] for b in BRANCHES])  # fmt: skip
def test_the_branch_that_where_does_not_take_gets_zero(function, bad, good, slope, order):
    condition = np.array([False, True])

    def chosen(x):
        y = function(x)
        return tg.where(condition, y, 7.0) if order == 0 else tg.where(~condition, 7.0, y)

    y, (dx,) = value_and_gradients(chosen, [bad, good])
    assert y[0] == 7.0
    np.testing.assert_allclose(dx, [0.0, slope], rtol=1e-14)


@pytest.mark.parametrize(("function", "bad", "good"), [b[1:4] for b in BRANCHES],
                         ids=[b[0] for b in BRANCHES])  # fmt: skip
def test_also_in_the_second_derivative(function, bad, good):
    condition = np.array([False, True])
    h = hessian(lambda x: tg.sum(tg.where(condition, function(x), 7.0)), [bad, good])
    alone = hessian(lambda x: tg.sum(function(x)[1]), [good, good])  # a point that is no trouble
    np.testing.assert_array_equal(h[:, 0], [0.0, 0.0])
    np.testing.assert_array_equal(h[0], [0.0, 0.0])
    np.testing.assert_allclose(h[1, 1], alone[1, 1], rtol=1e-14)


ROWS = [  # name, function of rows to rows' numbers, a row that is trouble
    ("logsumexp", lambda x: tg.logsumexp(x, axis=1), [-INF, -INF]),
    ("logsumexp of inf", lambda x: tg.logsumexp(x, axis=1), [INF, INF]),
    ("softmax", lambda x: tg.nn.softmax(x)[:, 0], [-INF, -INF]),
    ("log_softmax", lambda x: tg.nn.log_softmax(x)[:, 0], [-INF, -INF]),
    ("norm", lambda x: tg.norm(x, axis=1), [INF, INF]),
    ("std", lambda x: tg.std(x, axis=1), [INF, INF]),
    ("var", lambda x: tg.var(x, axis=1), [INF, 0.0]),
    ("max", lambda x: tg.max(x, axis=1), [NAN, 0.0]),
    ("prod", lambda x: tg.prod(x, axis=1), [INF, 0.0]),
    ("cumulative_prod", lambda x: tg.cumulative_prod(x, axis=1)[:, 1], [0.0, INF]),
    ("mean of logs", lambda x: tg.mean(tg.log(x), axis=1), [0.0, -1.0]),
    ("cross-entropy", lambda x: tg.nn.softmax_cross_entropy(x, [0, 0], reduction="none"),
     [-INF, -INF]),
    ("cross-entropy of probabilities", lambda x: tg.nn.softmax_cross_entropy(
        x, np.array([[1.0, 0.0], [1.0, 0.0]]), reduction="none"), [NAN, NAN]),
    ("sum of 1 / x", lambda x: tg.sum(1.0 / x, axis=1), [0.0, 1.0]),
    ("euclidean of sqrt", lambda x: tg.norm(tg.sqrt(x), axis=1), [-1.0, 0.0]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "bad"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_rows_that_where_does_not_take_get_zero(function, bad):
    good = [0.5, 1.5]
    _, (dx,) = value_and_gradients(
        lambda x: tg.where(np.array([False, True]), function(x), 7.0), [bad, good]
    )
    _, (expected,) = value_and_gradients(lambda x: function(x)[1], [good, good])
    np.testing.assert_array_equal(dx[0], [0.0, 0.0])
    np.testing.assert_allclose(dx[1], expected[1], rtol=1e-14)


def test_double_where_works_too():
    x = [0.0, 4.0]

    def function(x):
        safe = tg.where(x > 0.0, x, 1.0)
        return tg.where(x > 0.0, tg.sqrt(safe), 0.0)

    y, (dx,) = value_and_gradients(function, x)
    np.testing.assert_array_equal(y, [0.0, 2.0])
    np.testing.assert_array_equal(dx, [0.0, 0.25])


def test_a_mask_multiplied_in_does_as_well():
    _, (dx,) = value_and_gradients(lambda x: tg.sum(tg.sqrt(x) * np.array([0.0, 1.0])), [0.0, 4.0])
    np.testing.assert_array_equal(dx, [0.0, 0.25])


@pytest.mark.parametrize("size", [1, 33, 30_000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_zero_gradient_stays_zero_in_arrays_of_any_size(size, dtype):
    for infinite in {0, size // 2, size - 1}:
        x = np.ones(size, dtype)
        x[infinite] = 0.0
        mask = np.ones(size, dtype)
        mask[infinite] = 0.0
        v = tg.Variable(x)
        with tg.GradientTape() as tape:
            y = tg.sqrt(v) * mask
        np.testing.assert_array_equal(tape.gradient(y, v), mask / 2)


@pytest.mark.parametrize("name", ["scale", "scale_both", "relu_grad"])
@pytest.mark.parametrize("size", [33, 30_000])
def test_a_zero_keeps_its_sign_whatever_other_elements_are(name, size):
    g = np.resize([0.0, -0.0, 2.0, -2.0], size)
    d = np.resize([1.0, 0.0, 3.0], size)
    plain = primitives[name].forward(np, g, d)
    g[0], d[0] = (INF, 0.0) if name == "relu_grad" else (0.0, INF)
    mended = primitives[name].forward(np, g, d)
    assert mended[0] == 0.0
    assert np.signbit(mended[1:]).any()
    np.testing.assert_array_equal(mended[1:].view(np.int64), plain[1:].view(np.int64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 3), (3, 1, 1), (3, 1, 2), (1, 3, 1), (3, 4, 1), (1, 4, 3)]
)
def test_products_of_matrices_keep_what_is_not_finite(shape, dtype):
    n, k, m = shape
    zero, one = np.zeros((n, k), dtype), np.ones((k, m), dtype)
    for bad in (NAN, INF):
        left = zero + np.array(bad, dtype)
        assert np.isnan((tg.constant(zero) @ (one * np.array(bad, dtype))).numpy()).all()
        assert np.isnan((tg.constant(left) @ (one * 0)).numpy()).all()


@pytest.mark.parametrize("other", [INF, -INF, NAN])
def test_where_chooses_between_numbers_that_are_not_finite(other):
    condition = np.array([True, False])
    for number in (2, 2.0):
        y, z = tg.where(condition, number, other), tg.where(condition, other, number)
        np.testing.assert_array_equal(y, [2.0, other])
        np.testing.assert_array_equal(z, [other, 2.0])
        assert y.dtype == z.dtype == tg.float32


def test_a_nan_that_matters_is_not_hidden():
    _, (dx,) = value_and_gradients(lambda x: tg.sqrt(x) * x, -1.0)
    assert math.isnan(dx)
    _, (dx,) = value_and_gradients(tg.log, NAN)
    assert math.isnan(dx)


# ---- a gradient that is zero by value is no constant: least squares at their optimum

OPTIMA = [  # name, function that is c at x, x, c, its derivatives (row), so that H = 2 d d^T
    ("log", tg.log, 1.0, 0.0, 1.0),
    ("sqrt", tg.sqrt, 1.0, 1.0, 0.5),
    ("rsqrt", tg.rsqrt, 1.0, 1.0, -0.5),
    ("reciprocal", tg.reciprocal, 1.0, 1.0, -1.0),
    ("divide", lambda x: 4.0 / x, 2.0, 2.0, -1.0),
    ("divide by", lambda x: x / 4.0, 2.0, 0.5, 0.25),
    ("multiply", lambda x: x * 3.0, 2.0, 6.0, 3.0),
    ("square", tg.square, 3.0, 9.0, 6.0),
    ("x ** 3", lambda x: x**3, 2.0, 8.0, 12.0),
    ("x ** 0.5", lambda x: x**0.5, 4.0, 2.0, 0.25),
    ("2 ** x", lambda x: 2.0**x, 1.0, 2.0, 2 * math.log(2)),
    ("exp", tg.exp, 0.0, 1.0, 1.0),
    ("exp2", tg.exp2, 0.0, 1.0, math.log(2)),
    ("expm1", tg.expm1, 0.0, 0.0, 1.0),
    ("log2", tg.log2, 1.0, 0.0, 1 / math.log(2)),
    ("log10", tg.log10, 1.0, 0.0, 1 / math.log(10)),
    ("log1p", tg.log1p, 0.0, 0.0, 1.0),
    ("logaddexp", lambda x: tg.logaddexp(x, 0.0), 0.0, math.log(2), 0.5),
    ("xlogy", lambda x: tg.xlogy(2.0, x), 1.0, 0.0, 2.0),
    ("sin", tg.sin, 0.0, 0.0, 1.0),
    ("cos", tg.cos, math.pi / 2, math.cos(math.pi / 2), -1.0),
    ("tan", tg.tan, 0.0, 0.0, 1.0),
    ("asin", tg.asin, 0.0, 0.0, 1.0),
    ("acos", tg.acos, 0.0, math.pi / 2, -1.0),
    ("atan", tg.atan, 0.0, 0.0, 1.0),
    ("atan2", lambda x: tg.atan2(x, 2.0), 0.0, 0.0, 0.5),
    ("sinh", tg.sinh, 0.0, 0.0, 1.0),
    ("tanh", tg.tanh, 0.0, 0.0, 1.0),
    ("asinh", tg.asinh, 0.0, 0.0, 1.0),
    ("acosh", tg.acosh, math.sqrt(2), math.acosh(math.sqrt(2)), 1.0),
    ("atanh", tg.atanh, 0.0, 0.0, 1.0),
    ("erf", tg.erf, 0.0, 0.0, 2 / math.sqrt(math.pi)),
    ("hypot", lambda x: tg.hypot(x, 4.0), 3.0, 5.0, 0.6),
    ("abs", tg.abs, -2.0, 2.0, -1.0),
    ("maximum", lambda x: tg.maximum(x, 0.0), 2.0, 2.0, 1.0),
    ("minimum", lambda x: tg.minimum(x, 5.0), 2.0, 2.0, 1.0),
    ("clip", lambda x: tg.clip(x, 0.0, 5.0), 2.0, 2.0, 1.0),
    ("where", lambda x: tg.where(x > 0, x, 0.0), 2.0, 2.0, 1.0),
    ("remainder", lambda x: x % 3.0, 7.5, 1.5, 1.0),
    ("relu", tg.nn.relu, 2.0, 2.0, 1.0),
    ("relu6", tg.nn.relu6, 2.0, 2.0, 1.0),
    ("leaky_relu", lambda x: tg.nn.leaky_relu(x, 0.5), -2.0, -1.0, 0.5),
    ("elu", tg.nn.elu, 2.0, 2.0, 1.0),
    ("selu", tg.nn.selu, 1.0, SELU, SELU),
    ("gelu", tg.nn.gelu, 0.0, 0.0, 0.5),
    ("sigmoid", tg.nn.sigmoid, 0.0, 0.5, 0.25),
    ("softplus", tg.nn.softplus, 0.0, math.log(2), 0.5),
    ("log_sigmoid", tg.nn.log_sigmoid, 0.0, -math.log(2), 0.5),
    ("norm", tg.norm, [3.0, 4.0], 5.0, [0.6, 0.8]),
    ("norm of order 3", lambda x: tg.norm(x, ord=3), [2.0, 0.0], 2.0, [1.0, 0.0]),
    ("std", tg.std, [1.0, 3.0], 1.0, [-0.5, 0.5]),
    ("var", tg.var, [1.0, 3.0], 1.0, [-1.0, 1.0]),
    ("mean", tg.mean, [1.0, 3.0], 2.0, [0.5, 0.5]),
    ("max", tg.max, [1.0, 3.0], 3.0, [0.0, 1.0]),
    ("prod", tg.prod, [2.0, 3.0], 6.0, [3.0, 2.0]),
    ("cumulative_prod", lambda x: tg.cumulative_prod(x)[1], [2.0, 3.0], 6.0, [3.0, 2.0]),
    ("logsumexp", tg.logsumexp, [0.0, 0.0], math.log(2), [0.5, 0.5]),
    ("softmax", lambda x: tg.nn.softmax(x)[0], [0.0, 0.0], 0.5, [0.25, -0.25]),
    ("log_softmax", lambda x: tg.nn.log_softmax(x)[0], [0.0, 0.0], -math.log(2), [0.5, -0.5]),
    ("matmul", lambda x: x @ x, [3.0, 4.0], 25.0, [6.0, 8.0]),
    ("linear_relu", lambda x: tg.nn.linear_relu(x[None], np.array([[1.0], [2.0]]), np.zeros(1)),
     [3.0, 4.0], 11.0, [1.0, 2.0]),
    ("power of both", lambda x: x[0] ** x[1], [2.0, 3.0], 8.0, [12.0, 8 * math.log(2)]),
    ("quotient of both", lambda x: x[0] / x[1], [2.0, 4.0], 0.5, [0.25, -0.125]),
    ("atan2 of both", lambda x: tg.atan2(x[0], x[1]), [1.0, 1.0], math.pi / 4, [0.5, -0.5]),
    ("einsum", lambda x: tg.einsum("i,i->", x, x), [3.0, 4.0], 25.0, [6.0, 8.0]),
    ("gather", lambda x: tg.sum(x[[0, 0, 1]]), [3.0, 4.0], 10.0, [2.0, 1.0]),
    ("softmax_cross_entropy", lambda x: tg.nn.softmax_cross_entropy(x[None], tg.constant([0])),
     [0.0, 0.0], math.log(2), [-0.5, 0.5]),
    ("softmax_cross_entropy of probabilities", lambda x: tg.nn.softmax_cross_entropy(
        x[None], np.array([[1.0, 0.0]])), [0.0, 0.0], math.log(2), [-0.5, 0.5]),
    ("sigmoid_cross_entropy", lambda x: tg.nn.sigmoid_cross_entropy(x, np.ones(1)), [0.0],
     math.log(2), [-0.5]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "at_x", "slopes"), [o[1:] for o in OPTIMA],
                         ids=[o[0] for o in OPTIMA])  # fmt: skip
def test_the_hessian_of_least_squares_at_the_optimum(function, x, at_x, slopes):
    """Where f(x) = c, the Hessian of (f(x) - c)^2 is 2 f' f'^T, though the gradient is zero."""
    y, _ = value_and_gradients(function, x)
    np.testing.assert_allclose(y, at_x, rtol=1e-14, atol=1e-15)
    h = hessian(lambda x: tg.sum(tg.square(function(x) - y)), x)
    expected = 2 * np.outer(slopes, slopes) if np.ndim(x) else 2 * slopes**2
    np.testing.assert_allclose(h, expected, rtol=1e-13, atol=1e-14)


def test_the_two_that_were_asked_for():
    assert hessian(lambda x: tg.log(x) ** 2, 1.0) == 2.0
    assert hessian(lambda x: (tg.sqrt(x) - 1.0) ** 2, 1.0) == 0.5
