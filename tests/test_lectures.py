"""Every number of the lectures on tapes, optimisation and backpropagation, and their programs.

An id such as S1.3 names the lecture and the statement. Where a lecture errs, the right number is
tested, and the comment says what was printed.
"""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest

import tapegrad as tg


def printed(program: str) -> list[str]:
    """Run a lecture's program, with tapegrad for TensorFlow; return the lines that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {"tf": tg, "np": np})
    return out.getvalue().splitlines()


def gradient(function, *values):
    """Return the gradients of a function of scalars at float64 values."""
    xs = [tg.Variable(np.float64(value)) for value in values]
    with tg.GradientTape() as tape:
        y = function(*xs)
    return [float(g) for g in tape.gradient(y, xs)]


# ---- lecture 1: the tape


def test_S1_1_one_step_of_gradient_descent():
    x, y = tg.Variable(-75.0), tg.Variable(75.0)
    with tg.GradientTape() as tape:
        z = x**2 + y**2
    dz_dx, dz_dy = tape.gradient(z, [x, y])
    assert (float(z), float(dz_dx), float(dz_dy)) == (11250.0, -150.0, 150.0)
    x.assign_sub(0.2 * dz_dx)
    y.assign_sub(0.2 * dz_dy)
    assert (float(x), float(y)) == (-45.0, 45.0)


DESCENT = [  # k, x, y, z, dz/dx, lr * dz/dx, dz/dy, lr * dz/dy, as the slide prints them
    (0, -75.0, 75.0, 11250.0, -150.0, -30.0, 150.0, 30.0),
    (1, -45.0, 45.0, 4050.0, -90.0, -18.0, 90.0, 18.0),
    (2, -27.0, 27.0, 1458.0, -54.0, -10.8, 54.0, 10.8),
    (3, -16.2, 16.2, 524.9, -32.4, -6.5, 32.4, 6.5),
    (4, -9.7, 9.7, 189.0, -19.4, -3.9, 19.4, 3.9),
    (5, -5.8, 5.8, 68.0, -11.7, -2.3, 11.7, 2.3),
]
LATER = {  # k: x, z, dz/dx, lr * dz/dx
    6: (-3.4992, 24.48880128, -6.9984, -1.39968),
    7: (-2.09952, 8.81596846, -4.19904, -0.839808),
    8: (-1.259712, 3.17374865, -2.519424, -0.5038848),
    9: (-0.7558272, 1.14254951, -1.5116544, -0.30233088),
    10: (-0.45349632, 0.41131782, -0.90699264, -0.181398528),
    11: (-0.272097792, 0.14807442, -0.544195584, -0.108839117),
    12: (-0.163258675, 0.05330679, -0.32651735, -0.06530347),
    13: (-0.097955205, 0.01919044, -0.19591041, -0.039182082),
    14: (-0.058773123, 0.00690856, -0.117546246, -0.023509249),
    15: (-0.035263874, 0.00248708, -0.070527748, -0.01410555),
    16: (-0.021158324, 0.00089535, -0.042316649, -0.00846333),
    17: (-0.012694995, 0.00032233, -0.025389989, -0.005077998),
    18: (-0.007616997, 0.00011604, -0.015233994, -0.003046799),
    19: (-0.004570198, 4.17734e-05, -0.009140396, -0.001828079),
}


def descend(dtype, steps=20, rate=0.2):
    """Return the rows of the descent on x**2 + y**2, and the point after it."""
    x, y = tg.Variable(-75.0, dtype=dtype), tg.Variable(75.0, dtype=dtype)
    rows = []
    for k in range(steps):
        with tg.GradientTape() as tape:
            z = x**2 + y**2
        dx, dy = tape.gradient(z, [x, y])
        rows.append([k, *map(float, (x, y, z, dx, rate * dx, dy, rate * dy))])
        x.assign_sub(rate * dx)
        y.assign_sub(rate * dy)
    return rows, float(x), float(y)


def test_S1_2_gradient_descent_table():
    rows, x, y = descend("float64")
    np.testing.assert_allclose(rows[:6], DESCENT, atol=0.051)
    for k, (x_k, z_k, dx_k, step_k) in LATER.items():
        np.testing.assert_allclose(
            np.take(rows[k], [1, 3, 4, 5]), [x_k, z_k, dx_k, step_k], rtol=1e-6, atol=5e-9
        )
    exact = -75 * 0.6 ** np.arange(20)
    np.testing.assert_allclose([row[1] for row in rows], exact, rtol=1e-13)
    np.testing.assert_allclose([row[3] for row in rows], 11250 * 0.36 ** np.arange(20), rtol=1e-13)
    assert x == pytest.approx(-0.0027421188, rel=1e-7)
    assert y == pytest.approx(0.0027421188, rel=1e-7)
    assert x * x + y * y == pytest.approx(1.503843e-05, rel=1e-6)


def test_S1_2_in_float32():
    _, x, _ = descend("float32")
    assert x == pytest.approx(-0.0027421177, rel=1e-6)


CHAIN = """
x = tf.Variable(3.0)
y = tf.Variable(5.0)
with tf.GradientTape({persistent}) as tape:
    m = x**2 + y**2
    z = m**2
"""


def test_S1_3_list_of_sources():
    assert printed(CHAIN.format(persistent="") + "print(tape.gradient(z, [x, y]))") == [
        "[<tg.Tensor: shape=(), dtype=float32, numpy=408.0>, "
        "<tg.Tensor: shape=(), dtype=float32, numpy=680.0>]"
    ]


def test_S1_4_dict_of_sources():
    assert printed(CHAIN.format(persistent="") + "print(tape.gradient(z, {'x': x, 'y': y}))") == [
        "{'x': <tg.Tensor: shape=(), dtype=float32, numpy=408.0>, "
        "'y': <tg.Tensor: shape=(), dtype=float32, numpy=680.0>}"
    ]


def test_S1_5_gradient_has_the_shape_of_its_source():
    x = tg.Variable([[1.0], [2.0], [3.0]])
    with tg.GradientTape() as tape:
        z = x**2
    np.testing.assert_array_equal(tape.gradient(z, x).numpy(), [[2.0], [4.0], [6.0]])


def test_S1_6_and_7_constants_must_be_watched():
    for watched, expected in ((False, None), (True, 6.0)):
        x = tg.constant(3.0)
        with tg.GradientTape() as tape:
            if watched:
                tape.watch(x)
            y = x**2
        answer = tape.gradient(y, x)
        assert (answer if answer is None else float(answer)) == expected


def test_S1_8_a_tape_answers_once():
    lines = printed(
        CHAIN.format(persistent="")
        + """
print(tape.gradient(z, x))
try:
    print(tape.gradient(z, y))
except RuntimeError as e:
    print(e)
"""
    )
    assert lines == [
        "tg.Tensor(408.0, shape=(), dtype=float32)",
        "A non-persistent GradientTape can only be used to compute one set of gradients "
        "(or jacobians)",
    ]


def test_S1_9_a_persistent_tape_answers_again():
    lines = printed(
        CHAIN.format(persistent="persistent=True")
        + "print(tape.gradient(z, x))\nprint(tape.gradient(z, y))\ndel tape"
    )
    assert lines == [
        "tg.Tensor(408.0, shape=(), dtype=float32)",
        "tg.Tensor(680.0, shape=(), dtype=float32)",
    ]


def test_S1_10_several_targets_are_summed():
    lines = printed(
        CHAIN.format(persistent="persistent=True")
        + "for t in ([m, z], m, z): print(float(tape.gradient(t, x)))"
    )
    assert lines == ["414.0", "6.0", "408.0"]


def test_S1_11_a_target_that_is_no_scalar():
    lines = printed("""
x = tf.Variable(3.0)
c = tf.constant([1.0, 4.0, 6.0])
with tf.GradientTape() as tape:
    z = tf.square(x) * c
print(z.numpy())
print(tape.gradient(z, x).numpy())
""")
    assert lines == ["[ 9. 36. 54.]", "66.0"]


def test_S1_12_elementwise_gradients():
    lines = printed("""
x = tf.Variable(np.arange(1, 100, 0.1))
with tf.GradientTape() as tape:
    z = tf.square(x)
dz_dx = tape.gradient(z, x)
print(dz_dx[:20].numpy())
print(z[:20].numpy())
print(x.shape, z.dtype, dz_dx.dtype, dz_dx[:20].shape)
""")
    assert lines == [
        "[2.  2.2 2.4 2.6 2.8 3.  3.2 3.4 3.6 3.8 4.  4.2 4.4 4.6 4.8 5.  5.2 5.4",
        " 5.6 5.8]",
        "[1.   1.21 1.44 1.69 1.96 2.25 2.56 2.89 3.24 3.61 4.   4.41 4.84 5.29",
        " 5.76 6.25 6.76 7.29 7.84 8.41]",
        "(990,) float64 float64 (20,)",
    ]


def test_S1_13_partial_derivative():
    assert gradient(lambda x1, x2: x1**2 + x2, 1.0, 5.0) == [2.0, 1.0]


def test_S1_14_control_flow():
    for flag, expected in ((1.0, [2.0, None]), (-1.0, [None, 6.0])):
        a, b = tg.Variable(1.0), tg.Variable(3.0)
        condition = tg.Variable(flag)
        with tg.GradientTape() as tape:
            y = a**2 if condition > 0 else b**2
        answers = tape.gradient(y, [a, b, condition])
        assert [g if g is None else float(g) for g in answers] == [*expected, None]


@pytest.mark.parametrize("inside", ["inner", "outer", "outer gradient inside"])
def test_S1_15_nested_tapes(inside):
    x = tg.Variable(3.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = tg.square(x)
            if inside == "inner":
                first = inner.gradient(y, x)
        if inside != "inner":
            first = inner.gradient(y, x)
        if inside == "outer gradient inside":
            second = outer.gradient(first, x)
    if inside != "outer gradient inside":
        second = outer.gradient(first, x)
    assert (float(first), float(second)) == (6.0, 2.0)


def test_S1_15_a_first_derivative_taken_outside_is_not_recorded():
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as outer, tg.GradientTape(persistent=True) as inner:
        y = tg.square(x)
    first = inner.gradient(y, x)
    assert float(first) == 6.0
    assert outer.gradient(first, x) is None


def test_S1_16_two_tapes_in_one_with():
    x, y = tg.Variable(3.0), tg.Variable(4.0)
    with tg.GradientTape() as first, tg.GradientTape() as second:
        z = x**3 + y**2
    dz_dx = first.gradient(z, x)
    assert (float(dz_dx), float(second.gradient(z, y))) == (27.0, 8.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            z = x**3 + y**2
        dz_dx = inner.gradient(z, x)
    assert float(outer.gradient(dz_dx, x)) == 18.0


def test_S1_17_a_tensor_replaces_the_variable():
    lines = printed("""
x = tf.Variable(3.0)
test = tf.Variable(3.0)
print(test)
print(repr(test))
original = x
z = 0
with tf.GradientTape(persistent=True) as tape:
    for _ in range(3):
        z += x**2
        x = x + 1
print(tape.gradient(z, x))
print(z, tape.gradient(z, original))
print(test + 1)
""")
    assert lines == [
        "<tg.Variable 'Variable:0' shape=() dtype=float32, numpy=3.0>",
        "<tg.Variable 'Variable:0' shape=() dtype=float32, numpy=3.0>",
        "None",
        "tg.Tensor(50.0, shape=(), dtype=float32) tg.Tensor(24.0, shape=(), dtype=float32)",
        "tg.Tensor(4.0, shape=(), dtype=float32)",
    ]


def test_S1_18_the_remedy_is_assign_add():
    x = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        z = 0
        for _ in range(3):
            x.assign_add(1.0)
            z += x**2
    assert (float(z), float(tape.gradient(z, x))) == (50.0, 24.0)


def test_S1_19_integers_and_state_have_no_gradient():
    x = tg.Variable(10)
    with tg.GradientTape() as tape:
        y = x * x
    assert tape.gradient(y, x) is None
    x0, x1 = tg.Variable(3.0), tg.Variable(0.0)
    with tg.GradientTape() as tape:
        x1.assign_add(x0)
        y = x1**2
    assert tape.gradient(y, x0) is None


def test_S1_20_numpy_functions_are_recorded_and_numpy_values_are_not():
    x = tg.Variable([3.0, 4.0])
    with tg.GradientTape() as tape:
        z = tg.reduce_sum(np.square(x))
    np.testing.assert_array_equal(tape.gradient(z, x).numpy(), [6.0, 8.0])
    with tg.GradientTape() as tape:
        z = tg.reduce_sum(np.square(x.numpy()))
    assert tape.gradient(z, x) is None


# ---- lecture 2: gradient-based optimisation


def test_S2_1_a_layer():
    k, d = 3, 2
    w, x, b = tg.ones((k, d)), tg.ones((d,)), tg.constant([-2.0, -3.0, 1.0])
    output = tg.nn.relu(w @ x + b)
    assert output.shape == (k,)
    np.testing.assert_array_equal(output.numpy(), [0.0, 0.0, 3.0])


def test_S2_2_first_order_approximation():
    (slope,) = gradient(lambda x: tg.sin(x), 0.7)
    for epsilon in (1e-3, 1e-4):
        error = math.sin(0.7 + epsilon) - (math.sin(0.7) + slope * epsilon)
        assert abs(error) < epsilon**2


def test_S2_3_update_rule():
    w = tg.Variable([1.0, 2.0])
    w.assign_sub(0.5 * tg.constant([2.0, 4.0]))
    np.testing.assert_array_equal(w.numpy(), [0.0, 0.0])


def momentum_of_the_slide(slope, w, rate, momentum, steps, sign):
    """Return w after each step of `velocity = past * momentum + sign * rate * gradient`."""
    velocity, path = 0.0, []
    for _ in range(steps):
        g = slope(w)
        velocity = velocity * momentum + sign * rate * g
        w = w + momentum * velocity - rate * g
        path.append(w)
    return path


def slope_of_square(w):
    return gradient(lambda x: x**2, w)[0]


def test_S2_4_and_5_momentum_with_the_right_sign():
    # printed with +learning_rate * gradient in the velocity: that brakes instead of speeding up
    wrong = momentum_of_the_slide(slope_of_square, 1.0, 0.1, 0.1, 5, +1)
    right = momentum_of_the_slide(slope_of_square, 1.0, 0.1, 0.1, 5, -1)
    np.testing.assert_allclose(wrong, [0.82, 0.6744, 0.554848, 0.45650816, 0.3755996672])
    np.testing.assert_allclose(right, [0.78, 0.6064, 0.471232, 0.36617216, 0.2845329408])


@pytest.mark.parametrize(
    ("momentum", "wrong", "right"), [(0.1, 12, 10), (0.5, None, 5), (0.9, None, 9)]
)
def test_S2_5_steps_until_the_loss_is_small(momentum, wrong, right):
    def steps(sign):
        path = momentum_of_the_slide(lambda w: 2 * w, 1.0, 0.1, momentum, 200, sign)
        return next((i for i, w in enumerate(path, 1) if w * w <= 0.01), None)

    assert (steps(+1), steps(-1)) == (wrong, right)


def test_S2_5_plain_descent_takes_eleven_steps():
    w = tg.Variable(np.float64(1.0))
    for step in range(1, 100):  # noqa: B007
        with tg.GradientTape() as tape:
            loss = w**2
        w.assign_sub(0.1 * tape.gradient(loss, w))
        if float(w) ** 2 <= 0.01:
            break
    assert step == 11


@pytest.mark.parametrize(
    ("momentum", "wrong", "right"),
    [(0.1, -4.4457, -5.5543), (0.5, -0.1, -9.9), (0.9, 31.94, -41.94)],
)
def test_S2_5_constant_gradient(momentum, wrong, right):
    for sign, expected in ((+1, wrong), (-1, right)):
        path = momentum_of_the_slide(lambda w: 1.0, 0.0, 0.1, momentum, 50, sign)
        assert path[-1] == pytest.approx(expected, abs=5e-3)


def test_S2_6_chain_rule():
    (slope,) = gradient(lambda x: tg.sin(tg.exp(x)), 0.3)
    assert slope == pytest.approx(math.cos(math.exp(0.3)) * math.exp(0.3), rel=1e-14)


def test_S2_7_two_layer_network():
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(4, 3)), np.eye(2)[[0, 1, 1, 0]]
    start = [rng.normal(size=s) for s in ((3, 5), (5,), (5, 2), (2,))]
    parameters = [tg.Variable(a) for a in start]

    def network(w1, b1, w2, b2, xp):
        hidden = xp.maximum(inputs @ w1 + b1, 0)
        exponentials = xp.exp(hidden @ w2 + b2)
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return -(labels * xp.log(probabilities)).sum() / 4

    with tg.GradientTape() as tape:
        w1, b1, w2, b2 = parameters
        predicted = tg.nn.softmax(tg.nn.relu(inputs @ w1 + b1) @ w2 + b2)
        loss = -tg.sum(labels * tg.log(predicted)) / 4
    assert float(loss) == pytest.approx(network(*start, np), rel=1e-14)
    for i, slope in enumerate(tape.gradient(loss, parameters)):
        for place in np.ndindex(start[i].shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in start]
                moved[i][place] += step
                ends.append(network(*moved, np))
            assert slope.numpy()[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


def test_S2_8_to_11_the_worked_graph():
    x, w, b, y_true = (tg.Variable(v) for v in (2.0, 3.0, 1.0, 4.0))
    with tg.GradientTape(persistent=True) as tape:
        x1 = x * w
        x2 = x1 + b
        loss = tg.abs(x2 - y_true)
    assert (float(x1), float(x2), float(loss)) == (6.0, 7.0, 3.0)
    assert float(tape.gradient(loss, x2)) == 1.0
    assert float(tape.gradient(x2, x1)) == 1.0
    assert float(tape.gradient(x2, b)) == 1.0
    assert float(tape.gradient(x1, w)) == 2.0
    assert float(tape.gradient(loss, w)) == 2.0
    assert float(tape.gradient(loss, b)) == 1.0  # printed: 2


def test_S2_12_paths_are_summed():
    assert gradient(lambda x: x * x + tg.sin(x) * x, 2.0)[0] == pytest.approx(
        4 + math.cos(2) * 2 + math.sin(2), rel=1e-14
    )


def test_S2_13_the_gradient_is_the_slope_the_hessian_the_curvature():
    # printed: "the gradient represents the curvature"
    x = tg.constant(3.0)
    assert float(tg.grad(lambda x: x**2)(x)) == 6.0
    assert float(tg.hessian(lambda x: x**2)(x)) == 2.0


# ---- lecture 3: backpropagation in a multi-layer perceptron


def test_S3_1_a_line():
    assert gradient(lambda w, x, b: w * x + b, 3.0, 2.0, 1.0) == [2.0, 3.0, 1.0]


def test_S3_2_jacobian_of_m_functions_of_n_inputs():
    x = tg.Variable([1.0, 2.0, 3.0])
    with tg.GradientTape() as tape:
        y = tg.stack([tg.sum(x), tg.prod(x)])
    jacobian = tape.jacobian(y, x)
    assert jacobian.shape == (2, 3)
    np.testing.assert_array_equal(jacobian.numpy(), [[1, 1, 1], [6, 3, 2]])


def test_S3_3_forward_differences_are_inaccurate_central_ones_less():
    exact = math.cos(1.0)
    step = 1e-4
    forward = (math.sin(1 + step) - math.sin(1)) / step
    central = (math.sin(1 + step) - math.sin(1 - step)) / (2 * step)
    assert abs(central - exact) < 1e-3 * abs(forward - exact)
    assert gradient(tg.sin, 1.0)[0] == pytest.approx(exact, rel=1e-15)


def test_S3_4_simplification_does_not_change_the_derivative():
    assert gradient(lambda x: 2 * x + 3 * x**2 + x * (6 - 2), 3.0) == [24.0]
    assert gradient(lambda x: 6 * x + 3 * x**2, 3.0) == [24.0]


def test_S3_5_a_loop():
    def halve(x):
        while abs(x) > 5:
            x = x / 2
        return x

    assert float(halve(tg.constant(100.0))) == 3.125
    assert gradient(halve, 100.0) == [0.03125]


def test_S3_6_a_graph_with_two_paths():
    a, b = tg.Variable(2.0), tg.Variable(1.0)
    with tg.GradientTape() as tape:
        c, d = a + b, b + 1
        e = c * d
    assert [float(e), *map(float, tape.gradient(e, [a, b, c, d]))] == [6.0, 2.0, 5.0, 2.0, 3.0]


def test_S3_7_breadth_first_order_would_be_wrong():
    # e = exp(a) a**2 + a with a = x**2: paths of unlike length
    def e(x):
        a = x**2
        return tg.exp(a) * a**2 + a

    a = 1.5**2
    slope = (math.exp(a) * (a**2 + 2 * a) + 1) * 3.0
    assert gradient(e, 1.5)[0] == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize(("x", "slope"), [(1.0, 24.0), (2.0, 144.0), (-1.0, -24.0)])
def test_S3_8_composition(x, slope):
    assert gradient(lambda x: (2 * x**2 + 1) ** 2, x) == [slope]
    assert gradient(lambda x: 4 * x**4 + 4 * x**2 + 1, x) == [slope]


@pytest.fixture
def worked_network():
    """The network of S3.14: x, W1, b1, W2, b2 and the target 7."""
    arrays = (
        [[1.0, 2.0, 3.0, 4.0]],
        [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.5, 0.0]],
        [1.0, 0.0],
        [[2.0], [3.0]],
        [2.0],
    )
    return [tg.Variable(np.array(a)) for a in arrays]


def test_S3_9_to_17_the_worked_network(worked_network):
    x, w1, b1, w2, b2 = worked_network
    with tg.GradientTape(persistent=True) as tape:
        z1 = x @ w1 + b1  # b has the shape (out,); printed: "out x 1", which does not fit
        a1 = tg.nn.relu(z1)
        z2 = a1 @ w2 + b2
        loss = (z2 - 7.0) ** 2
    values = {"z1": [[4, -1]], "a1": [[4, 0]], "z2": [[10]], "loss": [[9]]}
    for name, expected in values.items():
        np.testing.assert_array_equal(locals()[name].numpy(), expected)
    expected = {
        "z2": [[6]],
        "b2": [6],
        "w2": [[24], [0]],
        "a1": [[12, 18]],
        "z1": [[12, 0]],
        "b1": [12, 0],
        "w1": [[12, 0], [24, 0], [36, 0], [48, 0]],
        "x": [[12, 0, 0, 6]],
    }
    for name, values in expected.items():
        got = tape.gradient(loss, locals()[name]).numpy()
        np.testing.assert_array_equal(got, values)
        assert got.shape == locals()[name].shape
    # the matrix form of S3.17
    dz1 = 2 * (z2.numpy() - 7) @ w2.numpy().T * (z1.numpy() > 0)
    np.testing.assert_array_equal(tape.gradient(loss, w1).numpy(), x.numpy().T @ dz1)


def test_S3_15_relu_has_the_derivative_0_at_0():
    # printed: "0 if z < 0, 1 otherwise"; TensorFlow, PyTorch and JAX say 0
    assert gradient(tg.nn.relu, 0.0) == [0.0]


def test_S3_18_a_jacobian_has_the_shape_target_plus_source():
    w = tg.Variable(np.ones((2, 3)))
    with tg.GradientTape(persistent=True) as tape:
        y = tg.constant(np.ones((4, 2))) @ w
        loss = tg.sum(y)
    assert tape.jacobian(y, w).shape == (4, 3, 2, 3)
    assert tape.gradient(loss, w).shape == (2, 3)


def test_S3_19_a_batch_sums_over_examples():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 1))
    w1, w2 = rng.normal(size=(4, 3)), rng.normal(size=(3, 1))
    b1, b2 = rng.normal(size=3), rng.normal(size=1)
    parameters = [tg.Variable(a) for a in (w1, b1, w2, b2)]
    with tg.GradientTape() as tape:
        v1, c1, v2, c2 = parameters
        z2 = tg.nn.relu(x @ v1 + c1) @ v2 + c2
        loss = tg.mean((z2 - y) ** 2)
    a1 = np.maximum(x @ w1 + b1, 0)
    dz2 = 2 * (a1 @ w2 + b2 - y) / 5
    dz1 = dz2 @ w2.T * (x @ w1 + b1 > 0)
    expected = (x.T @ dz1, dz1.sum(0), a1.T @ dz2, dz2.sum(0))
    for got, want in zip(tape.gradient(loss, parameters), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-13, atol=1e-15)


def test_S3_20_a_running_loss():
    lines = printed("""
w = tf.Variable(1.0)
running_loss = 0.0
for epoch in range(100):
    with tf.GradientTape() as tape:
        loss = (w - 3.0)**2
    w.assign_sub(0.1 * tape.gradient(loss, w))
    running_loss += loss
    if (epoch + 1) % 10 == 0:
        print(f'Loss: {running_loss/10}')
        running_loss = 0.0
""")
    assert len(lines) == 10
    assert lines[0].startswith("Loss: tg.Tensor(1.09")


def test_S3_21_trainable_parameters_are_trainable_variables():
    model = tg.Sequential([tg.layers.Dense(2)])
    model(tg.ones((1, 3)))
    assert model.trainable_parameters == model.trainable_variables
    assert len(model.trainable_variables) == 2


def test_S3_22_the_mean_over_batches_is_the_full_gradient():
    rng = np.random.default_rng(2)
    x, y, w = rng.normal(size=(12, 3)), rng.normal(size=12), tg.Variable(rng.normal(size=3))

    def slope(rows):
        with tg.GradientTape() as tape:
            loss = tg.mean((x[rows] @ w - y[rows]) ** 2)
        return tape.gradient(loss, w).numpy()

    batches = np.split(rng.permutation(12), 4)
    np.testing.assert_allclose(
        np.mean([slope(rows) for rows in batches], axis=0), slope(slice(None)), rtol=1e-13
    )


def optimise_square(optimizer, steps=5):
    w = tg.Variable(np.float64(1.0))
    path = []
    for _ in range(steps):
        with tg.GradientTape() as tape:
            loss = w**2
        optimizer.apply_gradients([(tape.gradient(loss, w), w)])
        path.append(float(w))
    return path


def test_S3_23_momentum():
    path = optimise_square(tg.optimizers.SGD(learning_rate=0.1, momentum=0.9))
    np.testing.assert_allclose(path, [0.8, 0.46, 0.062, -0.3086, -0.58042], rtol=1e-12)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.1, [0.9000000005, 0.8004122287, 0.7015862729, 0.6039390606, 0.5079636593]),
        (
            0.001,
            [0.999000000005, 0.9980000262138, 0.9970000960652, 0.9960002269258, 0.9950004360524],
        ),
    ],
)
def test_S3_24_adam_with_epsilon_outside_the_root(rate, expected):
    path = optimise_square(tg.optimizers.Adam(learning_rate=rate, epsilon=1e-8))
    np.testing.assert_allclose(path, expected, rtol=1e-10)


def test_S3_25_a_learning_rate_may_be_any_number():
    assert optimise_square(tg.optimizers.SGD(learning_rate=2.0), steps=1) == [-3.0]


def test_S3_26_accuracy_has_no_useful_gradient():
    logits = tg.Variable([[1.0, 2.0], [3.0, 1.0]])
    labels = tg.constant([1, 1])
    with tg.GradientTape(persistent=True) as tape:
        hits = tg.astype(tg.argmax(logits, axis=1) == labels, tg.float32)
        loss = 1 - tg.mean(hits)
    assert float(loss) == 0.5
    assert tape.gradient(loss, logits) is None
    zeros = tape.gradient(loss, logits, unconnected_gradients="zero")
    np.testing.assert_array_equal(zeros.numpy(), np.zeros((2, 2)))


def test_S3_27_sign_has_the_derivative_0():
    assert [gradient(tg.sign, x)[0] for x in (-2.0, 0.0, 3.0)] == [0.0, 0.0, 0.0]


def test_S3_28_softsign():
    slopes = [gradient(tg.nn.softsign, x)[0] for x in (-1.0, 0.0, 2.0)]
    np.testing.assert_allclose(slopes, [0.25, 1.0, 1 / 9], rtol=1e-14)


def test_S3_29_and_30_divergence_and_cross_entropy():
    p, q = np.array([0.5, 0.25, 0.25]), tg.Variable(np.array([0.25, 0.25, 0.5]))
    with tg.GradientTape() as tape:
        divergence = tg.sum(tg.xlogy(p, p) - tg.xlogy(p, q))
    cross_entropy = -tg.sum(tg.xlogy(p, q))
    entropy = -tg.sum(tg.xlogy(p, p))
    assert float(divergence) == pytest.approx(0.17328679514, abs=1e-11)
    assert float(cross_entropy) == pytest.approx(1.21300756598, abs=1e-11)
    assert float(entropy) == pytest.approx(1.03972077084, abs=1e-11)
    np.testing.assert_allclose(tape.gradient(divergence, q).numpy(), [-2, -1, -0.5], rtol=1e-14)
    one_hot = np.array([0.0, 1.0, 0.0])
    losses = (tg.losses.kl_divergence, tg.losses.categorical_crossentropy)
    both = [float(loss(one_hot, tg.constant([0.2, 0.5, 0.3], dtype="float64"))) for loss in losses]
    assert both[0] == pytest.approx(both[1], rel=1e-12)
    assert both[0] == pytest.approx(-math.log(0.5), rel=1e-6)


def test_S3_31_the_slope_of_the_cross_entropy():
    # printed with one minus too many: it is -1/p at the true label and 0 elsewhere
    q = tg.Variable(np.array([0.2, 0.5, 0.3]))
    with tg.GradientTape() as tape:
        loss = -tg.sum(tg.xlogy(np.array([0.0, 1.0, 0.0]), q))
    np.testing.assert_allclose(tape.gradient(loss, q).numpy(), [0.0, -2.0, 0.0], rtol=1e-14)


@pytest.mark.parametrize(
    ("values", "normalised", "softmax"),
    [
        ([1.0, 2.0], [1 / 3, 2 / 3], [0.2689414214, 0.7310585786]),  # printed 0.26, 0.73
        ([10.0, 20.0], [1 / 3, 2 / 3], [4.5397868702e-05, 0.9999546021]),
        ([11.0, 12.0], [0.4782608696, 0.5217391304], [0.2689414214, 0.7310585786]),  # 0.47, 0.53
        ([20.0, 30.0], [0.4, 0.6], [4.5397868702e-05, 0.9999546021]),
    ],
)
def test_S3_32_to_37_softmax_and_normalisation(values, normalised, softmax):
    x = tg.constant(np.array(values))
    np.testing.assert_allclose((x / tg.sum(x)).numpy(), normalised, rtol=1e-9)
    np.testing.assert_allclose(tg.nn.softmax(x).numpy(), softmax, rtol=1e-9)


def test_S3_37_softmax_of_shifted_values_is_the_same_to_the_last_bit():
    for a, b in (([1.0, 2.0], [11.0, 12.0]), ([10.0, 20.0], [20.0, 30.0])):
        np.testing.assert_array_equal(tg.nn.softmax(a).numpy(), tg.nn.softmax(b).numpy())


def test_S3_39_no_overflow_in_log_softmax():
    x = tg.Variable([1000.0, 0.0])
    with tg.GradientTape() as tape:
        y = tg.nn.log_softmax(x)
    np.testing.assert_array_equal(y.numpy(), [0.0, -1000.0])
    assert np.isfinite(tape.gradient(y, x).numpy()).all()
    with np.errstate(over="ignore"):
        assert np.isfinite(tg.exp(tg.constant(88.7)).numpy())
        assert np.isinf(tg.exp(tg.constant(88.73)).numpy())
