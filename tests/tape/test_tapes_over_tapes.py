"""Tapes over tapes, and control flow (rows H and P)."""

import math
import pathlib

import numpy as np
import pytest

import tapegrad as tg

RECORDS_ITSELF = "ignore:calling gradient on a persistent tape:tapegrad.TapeWarning"
COLUMN = np.array([[1.0], [3.0], [5.0]])


# ---- tapes over tapes


def test_H1_the_inner_gradient_in_the_outer_block():
    x = tg.Variable(3.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = x * x
        first = inner.gradient(y, x)
    assert (float(first), float(outer.gradient(first, x))) == (6.0, 2.0)


def test_H2_the_inner_gradient_in_the_inner_block():
    x = tg.Variable(3.0)
    with tg.GradientTape() as outer, tg.GradientTape() as inner:
        y = x * x
        first = inner.gradient(y, x)
    assert (float(first), float(outer.gradient(first, x))) == (6.0, 2.0)


def test_H3_the_outer_gradient_in_either_block():
    x = tg.Variable(3.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = x * x
        first = inner.gradient(y, x)
        assert float(outer.gradient(first, x)) == 2.0
    with tg.GradientTape() as outer, tg.GradientTape() as inner:
        y = x * x
        first = inner.gradient(y, x)
        assert float(outer.gradient(first, x)) == 2.0


@pytest.mark.parametrize("persistent", [False, True])
def test_H4_the_inner_gradient_after_the_outer_block(persistent):
    x = tg.Variable(3.0)
    with tg.GradientTape() as outer, tg.GradientTape(persistent) as inner:
        y = x * x
    first = inner.gradient(y, x)
    assert float(first) == 6.0
    assert outer.gradient(first, x) is None


@pytest.mark.parametrize("inner_is_first", [False, True])
def test_H5_either_of_two_may_be_the_inner_one(inner_is_first):
    x = tg.Variable(3.0)
    with tg.GradientTape() as a, tg.GradientTape() as b:
        inner, outer = (a, b) if inner_is_first else (b, a)
        y = x * x * x
        first = inner.gradient(y, x)
    assert (float(first), float(outer.gradient(first, x))) == (27.0, 18.0)


def test_H6_independent_tapes():
    x0, x1 = tg.constant(0.0), tg.constant(0.0)
    with tg.GradientTape() as tape0, tg.GradientTape() as tape1:
        tape0.watch(x0)
        tape1.watch(x1)
        y = tg.sin(x0) + 1.0 / (1.0 + tg.exp(-x1))
    assert float(tape0.gradient(y, x0)) == 1.0  # cos 0
    assert float(tape1.gradient(y, x1)) == 0.25  # s (1 - s) at s = 1/2


def test_H6_one_operation_on_tapes_that_watch_different_inputs():
    """A node may lie on several tapes: each must find in it the values that its own rules read."""
    for first, second, third in [("a", "b", "ab"), ("b", "ab", "a"), ("ab", "a", "b")]:
        sources = {"a": tg.constant([2.0, 3.0]), "b": tg.constant([5.0, 7.0])}
        tapes = [tg.GradientTape() for _ in range(3)]
        with tapes[0], tapes[1], tapes[2]:
            for tape, names in zip(tapes, (first, second, third), strict=True):
                tape.watch([sources[name] for name in names])
            y = sources["a"] * sources["b"]
        for tape, names in zip(tapes, (first, second, third), strict=True):
            da, db = tape.gradient(y, [sources["a"], sources["b"]])
            for name, d, expected in (("a", da, [5.0, 7.0]), ("b", db, [2.0, 3.0])):
                if name in names:
                    np.testing.assert_array_equal(d, expected)
                else:
                    assert d is None


def test_H7_the_outer_tape_watches_for_itself():
    x = tg.constant(3.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            inner.watch(x)
            y = x * x
        first = inner.gradient(y, x)
    assert outer.gradient(first, x) is None
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            inner.watch(x)
            y = x * x
        first = inner.gradient(y, x)
        outer.watch(x)
    with pytest.warns(tg.TapeWarning, match="before it was watched"):
        assert outer.gradient(first, x) is None


def test_H8_the_inner_tape_does_not_watch_the_outers_intermediates():
    x = tg.constant(3.0)
    for watched in (False, True):
        with tg.GradientTape() as outer:
            outer.watch(x)
            y = x * x
            with tg.GradientTape() as inner:
                if watched:
                    inner.watch(y)
                z = y * y
            dy = inner.gradient(z, y)
        if watched:
            assert float(dy) == 18.0
            assert float(outer.gradient(dy, x)) == 12.0  # d(2 x^2)/dx
        else:
            assert dy is None


def test_H9_third_order():
    x = tg.Variable(2.0)
    with tg.GradientTape() as t3:
        with tg.GradientTape() as t2:
            with tg.GradientTape() as t1:
                y = x * x * x * x
            first = t1.gradient(y, x)
        second = t2.gradient(first, x)
    third = t3.gradient(second, x)
    assert [float(g) for g in (first, second, third)] == [32.0, 48.0, 48.0]


@pytest.mark.filterwarnings(RECORDS_ITSELF)
def test_H9_mixed_partials():
    x, y = tg.Variable(2.0), tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as outer:
        with tg.GradientTape() as inner:
            z = x**2 * y**3
        dx, dy = inner.gradient(z, [x, y])
    second = [outer.gradient(d, s) for d in (dx, dy) for s in (x, y)]
    # 2 y^3, 6 x y^2 twice, 6 x^2 y
    assert [float(g) for g in second] == [54.0, 108.0, 108.0, 72.0]


def test_H9_second_order_through_broadcasting():
    x, w = tg.Variable([1.0, 2.0]), tg.Variable([[3.0, 4.0], [5.0, 6.0]])
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = tg.sum((x * w) ** 2)
        slope = inner.gradient(y, x)  # 2 x_j times the sum of w_ij^2
    dx, dw = outer.gradient(slope, [x, w])
    np.testing.assert_array_equal(slope, [68.0, 208.0])
    np.testing.assert_array_equal(dx, [68.0, 104.0])
    np.testing.assert_array_equal(dw, [[12.0, 32.0], [20.0, 48.0]])  # 4 x_j w_ij


def test_H9_gradient_penalty():
    x = tg.Variable([3.0, 4.0])
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = tg.sum(x * x)
        slope = inner.gradient(y, x)
        penalty = tg.sum(slope * slope)  # 4 |x|^2
    np.testing.assert_array_equal(outer.gradient(penalty, x), [24.0, 32.0])


def test_H9_hessian_vector_product_by_output_gradients():
    x, y = tg.Variable(1.0), tg.Variable(1.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            z = x * x * y
        slopes = inner.gradient(z, [x, y])
    product = outer.gradient(slopes, [x, y], output_gradients=[1.0, 1.0])
    assert [float(g) for g in product] == [4.0, 2.0]  # [[2 y, 2 x], [2 x, 0]] (1, 1)


def test_H10_a_hessian_of_a_list_of_sources():
    x, y = tg.Variable(3.0), tg.Variable(5.0)
    with tg.GradientTape(persistent=True) as outer:
        with tg.GradientTape() as inner:
            z = x * x * y
        slopes = inner.gradient(z, [x, y])
    rows = [outer.gradient(slope, [x, y]) for slope in slopes]
    assert [[g if g is None else float(g) for g in row] for row in rows] == [
        [10.0, 6.0],
        [6.0, None],
    ]


def softmax(z):
    shares = np.exp(z - np.max(z))
    return shares / shares.sum()


LOGITS = np.array([0.5, -1.0, 2.0])
SHARES = softmax(LOGITS)
SIGMOID = 1.0 / (1.0 + np.exp(-LOGITS))
SECOND = {  # function of a vector to a scalar, and its Hessian at LOGITS
    "softmax_cross_entropy": (
        lambda x: tg.sum(tg.nn.softmax_cross_entropy(x[None], tg.constant([2]))),
        np.diag(SHARES) - np.outer(SHARES, SHARES),
    ),
    "sigmoid_cross_entropy": (
        lambda x: tg.sum(tg.nn.sigmoid_cross_entropy(x, tg.ones(3), reduction="none")),
        np.diag(SIGMOID * (1 - SIGMOID)),
    ),
    "log_softmax": (
        lambda x: -tg.nn.log_softmax(x)[0],
        np.diag(SHARES) - np.outer(SHARES, SHARES),
    ),
    "softplus": (lambda x: tg.sum(tg.nn.softplus(x)), np.diag(SIGMOID * (1 - SIGMOID))),
    "sigmoid": (
        lambda x: tg.sum(tg.nn.sigmoid(x)),
        np.diag(SIGMOID * (1 - SIGMOID) * (1 - 2 * SIGMOID)),
    ),
    "relu squared": (lambda x: tg.sum(tg.nn.relu(x) ** 2), np.diag([2.0, 0.0, 2.0])),
    "logsumexp": (tg.logsumexp, np.diag(SHARES) - np.outer(SHARES, SHARES)),
    "norm": (
        tg.norm,
        np.eye(3) / np.linalg.norm(LOGITS) - np.outer(LOGITS, LOGITS) / np.linalg.norm(LOGITS) ** 3,
    ),
    "matmul": (lambda x: tg.sum(tg.matmul(COLUMN, x[None]) ** 2), 70.0 * np.eye(3)),
}


@pytest.mark.parametrize("name", SECOND)
def test_H11_operations_with_shared_or_fused_rules_have_a_second_derivative(name):
    function, expected = SECOND[name]
    x = tg.Variable(LOGITS)
    answer = tg.hessian(function)(x)
    np.testing.assert_allclose(answer, expected, rtol=1e-12, atol=1e-14)


def test_H12_second_order_through_a_custom_gradient():
    @tg.custom_gradient
    def cube(x):
        return x * x * x, lambda upstream: upstream * 3.0 * x * x

    x = tg.Variable(2.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = cube(x)
        first = inner.gradient(y, x)
    assert (float(first), float(outer.gradient(first, x))) == (12.0, 12.0)


def test_H13_functions_of_functions():
    value, slope = tg.jvp(lambda x: x**3, [3.0], [1.0])
    assert (float(value), float(slope)) == (27.0, 27.0)
    product = tg.hvp(lambda x, y: x * x * y, [1.0, 1.0], [1.0, 1.0])
    assert [float(g) for g in product] == [4.0, 2.0]
    assert float(tg.grad(lambda x: x**3)(3.0)) == 27.0
    value, slopes = tg.value_and_grad(lambda x, y: x * x * y, argnums=(0, 1))(3.0, 5.0)
    assert (float(value), [float(g) for g in slopes]) == (45.0, [30.0, 9.0])
    value, pull_back = tg.vjp(lambda x: x * x, [1.0, 2.0])
    np.testing.assert_array_equal(pull_back([10.0, 100.0])[0], [20.0, 400.0])
    np.testing.assert_array_equal(
        tg.hessian(lambda x: x[0] ** 2 * x[1])([3.0, 5.0]), [[10.0, 6.0], [6.0, 0.0]]
    )


def test_H13_an_argument_is_not_what_the_function_captures():
    v = tg.Variable(3.0)
    assert float(tg.grad(lambda x: x * v)(v)) == 3.0
    with tg.GradientTape() as tape:
        slope = tg.grad(lambda x: x * x * v)(v)  # 2 x v at x = v, which is 2 v^2
    assert float(slope) == 18.0
    assert float(tape.gradient(slope, v)) == 12.0


@pytest.mark.parametrize("function", [tg.jvp, tg.hvp])
def test_H13_tangents_are_checked(function):
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        function(lambda x: tg.sum(x * x), [[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(TypeError, match="int64"):
        function(lambda x: x * x, [3], [1.0])


# ---- control flow


def test_P1_control_flow_on_values():
    x = tg.Variable(100.0)
    with tg.GradientTape() as tape:
        y = x
        while abs(y) > 5.0:
            y = y / 2.0
    assert (float(y), float(tape.gradient(y, x))) == (3.125, 1 / 32)


def test_P2_the_branch_not_taken_and_the_condition():
    condition, taken, other = tg.Variable(1.0), tg.Variable(3.0), tg.Variable(5.0)
    with tg.GradientTape() as tape:
        y = taken * taken if condition > 0.0 else other * other
    dcondition, dtaken, dother = tape.gradient(y, [condition, taken, other])
    assert (dcondition, float(dtaken), dother) == (None, 6.0, None)


def test_P3_builtins():
    variables = [tg.Variable(1.0), tg.Variable(5.0), tg.Variable(3.0)]
    with tg.GradientTape(persistent=True) as tape:
        largest = max(variables) * 2.0
        total = sum(v * v for v in variables)
    chosen = tape.gradient(largest, variables)
    assert (chosen[0], float(chosen[1]), chosen[2]) == (None, 2.0, None)
    assert tape.gradient(total, variables) == [2.0, 10.0, 6.0]


def test_P4_a_chain_of_20000_operations():
    x = tg.Variable(1.0)
    with tg.GradientTape() as tape:
        y = x
        for _ in range(20_000):
            y = y + 1.0
        y = y * x
    assert float(tape.gradient(y, x)) == 20_002.0  # (x + n) x


def test_P4_a_diamond_of_2_to_the_60_paths():
    x = tg.Variable(np.float64(1.0))
    with tg.GradientTape() as tape:
        y = x
        for _ in range(60):
            y = y + y
    assert float(tape.gradient(y, x)) == 2.0**60


def test_P5_printing_has_no_effect(capsys):
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        print(y, x, tape, repr(y), f"{y:.2f}")
        z = y * x
    assert "9.0" in capsys.readouterr().out
    assert float(tape.gradient(z, x)) == 27.0


def test_P6_random_numbers_are_constants():
    x = tg.Variable([1.0, 2.0])
    with tg.GradientTape() as tape:
        noise = tg.random.normal((2,))
        y = x * noise
    np.testing.assert_array_equal(tape.gradient(y, x), noise)


def test_P7_the_readme_says_what_is_out_of_scope():
    readme = pathlib.Path(__file__).parents[2] / "README.md"
    if not readme.exists():
        pytest.skip("there is no README yet")
    text = readme.read_text().lower()
    for words in (("tf.function",), ("ragged",), ("sparse",), ("distribut", "several gpus")):
        assert any(word in text for word in words)


def test_the_gradient_runs_in_reverse_topological_order():
    """Breadth-first search from the target would deliver the short path before the long one."""
    x = tg.Variable(np.float64(0.5))
    with tg.GradientTape() as tape:
        a = tg.exp(x)
        long = tg.sin(tg.sin(tg.sin(a)))
        y = a * long + a
    s1, s2 = math.sin(math.exp(0.5)), math.sin(math.sin(math.exp(0.5)))
    slope = math.cos(math.exp(0.5)) * math.cos(s1) * math.cos(s2)
    e = math.exp(0.5)
    expected = e * (math.sin(s2) + e * slope + 1.0)
    assert float(tape.gradient(y, x)) == pytest.approx(expected, rel=1e-14)
