"""Gradients that a user decides on (rows K)."""

import weakref

import numpy as np
import pytest

import tapegrad as tg


def gradient(function, *xs, persistent=False, **options):
    """Return the gradients of `function(*xs)`: one for one, a list for several."""
    with tg.GradientTape(persistent) as tape:
        tape.watch(list(xs))
        y = function(*xs)
    answers = tape.gradient(y, list(xs), **options)
    return answers[0] if len(xs) == 1 else answers


def second(function, x):
    """Return the first and the second derivative at x."""
    with tg.GradientTape() as outer:
        outer.watch(x)
        with tg.GradientTape() as inner:
            inner.watch(x)
            y = function(x)
        first = inner.gradient(y, x)
    return first, outer.gradient(first, x)


# ---- custom_gradient


def test_K1_replaces_the_gradient_of_all_inside():
    @tg.custom_gradient
    def f(x):
        y = tg.exp(x) * x
        return y, lambda upstream: upstream * 1000.0

    x = tg.Variable(2.0)
    assert float(f(x)) == pytest.approx(2 * np.exp(2), rel=1e-6)
    assert float(gradient(lambda x: f(x) * 5.0, x)) == 5000.0


def test_K2_several_inputs_and_outputs():
    seen = []

    @tg.custom_gradient
    def f(x, w):
        def grad(d1, d2, d3):
            seen.append((d1, d2, d3))
            return d1 * 10.0, d2 * 100.0

        return (x * w, x + w, x * tg.ones(3)), grad

    x, w = tg.Variable(2.0), tg.Variable(3.0)

    def loss(x, w):
        product, total, _unused = f(x, w)
        return 5.0 * product + 7.0 * total

    assert gradient(loss, x, w) == [50.0, 700.0]
    ((d1, d2, d3),) = seen
    assert (float(d1), float(d2)) == (5.0, 7.0)
    np.testing.assert_array_equal(d3, [0.0, 0.0, 0.0])  # zeros of the unused output's shape


@pytest.mark.parametrize("kind", [tuple, list])
def test_K2_gradients_come_as_tuple_or_list(kind):
    @tg.custom_gradient
    def f(x, w):
        return x * w, lambda upstream: kind([upstream * 10.0, upstream * 100.0])

    assert gradient(f, tg.Variable(2.0), tg.Variable(3.0)) == [10.0, 100.0]


@pytest.mark.parametrize("count", [1, 3])
def test_K3_a_wrong_number_of_gradients(count):
    @tg.custom_gradient
    def wrongly_counted(x, w):
        return x * w, lambda upstream: [upstream] * count

    with pytest.raises(ValueError, match="custom_gradient function expected to return") as caught:
        gradient(wrongly_counted, tg.Variable(2.0), tg.Variable(3.0))
    assert str(caught.value) == (
        f"custom_gradient function expected to return 2 gradients, but returned {count} instead."
    )
    notes = "\n".join(caught.value.__notes__)
    assert "wrongly_counted" in notes
    line = wrongly_counted.__wrapped__.__code__.co_firstlineno
    assert f"{__file__}:{line}" in notes


def test_K4_none_leaves_an_input_unconnected():
    @tg.custom_gradient
    def f(x, w):
        return x * w, lambda upstream: (upstream * 10.0, None)

    dx, dw = gradient(f, tg.Variable(2.0), tg.Variable(3.0))
    assert (float(dx), dw) == (10.0, None)


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 2)])
def test_K5_a_gradient_of_the_wrong_shape(shape):
    @tg.custom_gradient
    def misshapen(x):
        return x * x, lambda upstream: tg.ones(shape)

    with pytest.raises(ValueError, match="misshapen") as caught:
        gradient(misshapen, tg.Variable([1.0, 2.0]))
    assert str(shape) in str(caught.value)
    assert "(2,)" in str(caught.value)


@pytest.mark.parametrize("answer", [7.0, 7, np.float64(7.0), np.array(7.0)])
def test_K6_a_gradient_that_is_no_tensor_is_converted(answer):
    @tg.custom_gradient
    def f(x):
        return x * x, lambda upstream: answer

    dx = gradient(f, tg.Variable(2.0))
    assert type(dx) is tg.Tensor
    assert (dx.dtype, float(dx)) == ("float32", 7.0)


@pytest.mark.parametrize("answer", [lambda y: y, lambda y: (y, y), lambda y: (y,), lambda y: None])
def test_K7_no_grad_function(answer):
    @tg.custom_gradient
    def gradless(x):
        return answer(x * x)

    with pytest.raises(TypeError, match=r"must return \(result, grad_fn\).*gradless"):
        gradient(gradless, tg.Variable(2.0))


def test_K8_numbers_among_the_inputs_have_a_slot():
    @tg.custom_gradient
    def f(x, number, flag):
        assert flag is True  # a bool is a choice, not a number
        return x * number, lambda upstream: (upstream * number, upstream * x)

    x = tg.Variable(3.0)
    assert float(gradient(lambda x: f(x, 5.0, True), x)) == 5.0
    assert float(gradient(lambda x: f(x, 5, True), x)) == 5.0


def test_K9_keywords_work():
    @tg.custom_gradient
    def f(x, w=2.0, *, scale="none"):
        assert scale in ("none", "big")
        return x * w, lambda upstream: (upstream * 1000.0, upstream * 10.0)

    x, w = tg.Variable(2.0), tg.Variable(3.0)
    assert gradient(lambda x, w: f(x=x, w=w), x, w) == [1000.0, 10.0]
    assert gradient(lambda x, w: f(w=w, x=x), x, w) == [1000.0, 10.0]
    assert gradient(lambda x, w: f(x, w=w, scale="big"), x, w) == [1000.0, 10.0]


def test_K9_all_by_keyword_is_not_ignored():
    @tg.custom_gradient
    def f(x):
        return x * x, lambda upstream: upstream * 4000.0

    assert float(gradient(lambda x: f(x=x), tg.Variable(2.0))) == 4000.0


def test_K9_a_keyword_only_tensor():
    @tg.custom_gradient
    def f(x, *, w):
        return x * w, lambda upstream: (upstream * 1000.0, upstream * 10.0)

    with pytest.raises(TypeError, match="keyword-only"):
        f(tg.constant(2.0), w=tg.constant(3.0))


def with_variables(grad_variables):
    """Return x -> x v whose grad_fn answers `grad_variables(upstream, x, variables)`, and v."""
    v = tg.Variable(3.0, name="captured")

    @tg.custom_gradient
    def times_v(x):
        def grad(upstream, variables):
            assert variables == [v]
            return upstream * 1000.0, grad_variables(upstream, x, variables)

        return x * v, grad

    return times_v, v


def test_K10_captured_variables_by_the_protocol():
    f, v = with_variables(lambda upstream, x, variables: [upstream * 10.0])
    x = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = f(x)
    assert tape.gradient(y, [x, v]) == [1000.0, 10.0]
    assert v in tape.watched_variables()


def test_K10_a_wrong_number_for_the_variables():
    f, _ = with_variables(lambda upstream, x, variables: [])
    with pytest.raises(ValueError, match="Must return gradient for each variable from"):
        gradient(f, tg.Variable(2.0))


def test_K10_grad_functions_that_do_not_take_them():
    v = tg.Variable(3.0, name="captured")

    @tg.custom_gradient
    def f(x):
        return x * v, lambda upstream: upstream

    with pytest.raises(TypeError, match=r"must accept keyword argument 'variables'.*captured"):
        gradient(f, tg.Variable(2.0))
    assert float(f(tg.constant(2.0))) == 6.0  # without a tape there is nothing to lose


def test_K10_keywords_of_any_name_take_them():
    v = tg.Variable(3.0)

    @tg.custom_gradient
    def f(x):
        return x * v, lambda upstream, **options: (upstream, [upstream * len(options)])

    x = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = f(x)
    assert tape.gradient(y, [x, v]) == [1.0, 1.0]


def test_K11_a_variable_as_argument_is_an_ordinary_input():
    @tg.custom_gradient
    def f(x):
        return x * x, lambda upstream: upstream * 1000.0

    v = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = f(v)
    assert float(tape.gradient(y, v)) == 1000.0


def test_K11_also_when_the_function_reads_it_again():
    v = tg.Variable(2.0)

    @tg.custom_gradient
    def f(x):
        return x * v, lambda upstream: upstream * 1000.0

    with tg.GradientTape() as tape:
        y = f(v)
    assert float(tape.gradient(y, v)) == 1000.0


def test_K12_a_captured_variable_that_is_not_trainable():
    v = tg.Variable(3.0, trainable=False)

    @tg.custom_gradient
    def f(x):
        return x * v, lambda upstream: upstream * 1000.0

    x = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = f(x)
    dx, dv = tape.gradient(y, [x, v])
    assert (float(dx), dv) == (1000.0, None)


def test_K13_a_captured_watched_constant_warns():
    c, x = tg.constant(3.0), tg.Variable(2.0)

    @tg.custom_gradient
    def capturing(x):
        return x * c, lambda upstream: upstream * 1000.0

    with tg.GradientTape() as tape:
        tape.watch(c)
        with pytest.warns(tg.TapeWarning, match="capturing.*pass it as an argument") as caught:
            y = capturing(x)
    assert caught[0].filename == __file__
    dx, dc = tape.gradient(y, [x, c])
    assert (float(dx), dc) == (1000.0, None)


def test_K13_an_unwatched_constant_does_not():
    c, x = tg.constant(3.0), tg.Variable(2.0)

    @tg.custom_gradient
    def f(x):
        return x * c, lambda upstream: upstream * 1000.0

    assert float(gradient(f, x)) == 1000.0


def test_K14_second_order_goes_through_the_operations_of_grad():
    @tg.custom_gradient
    def cube(x):
        return x * x * x, lambda upstream: upstream * 3.0 * x * x

    assert [float(g) for g in second(cube, tg.Variable(2.0))] == [12.0, 12.0]
    assert [float(g) for g in second(cube, tg.constant(2.0))] == [12.0, 12.0]


def test_K14_and_through_the_forwards_output():
    @tg.custom_gradient
    def exp(x):
        y = tg.exp(x)
        return y, lambda upstream: upstream * y

    first, twice = second(exp, tg.Variable(np.float64(0.5)))
    assert float(first) == pytest.approx(np.exp(0.5), rel=1e-15)
    assert float(twice) == pytest.approx(np.exp(0.5), rel=1e-15)


def test_K14_and_through_its_intermediates():
    @tg.custom_gradient
    def square_of_square(x):
        m = x * x
        return m * m, lambda upstream: upstream * 4.0 * x * m

    assert [float(g) for g in second(square_of_square, tg.Variable(2.0))] == [32.0, 48.0]


def test_K14_on_one_persistent_tape():
    @tg.custom_gradient
    def exp(x):
        y = tg.exp(x)
        return y, lambda upstream: upstream * y

    x = tg.Variable(np.float64(0.5))
    with tg.GradientTape(persistent=True) as tape:
        y = exp(x) * x
        with tape.stop_recording():
            first = tape.gradient(y, x)
    assert float(first) == pytest.approx(1.5 * np.exp(0.5), rel=1e-15)
    assert float(tape.gradient(y, x)) == pytest.approx(1.5 * np.exp(0.5), rel=1e-15)


def test_K14_with_respect_to_the_upstream():
    @tg.custom_gradient
    def cube(x):
        return x * x * x, lambda upstream: upstream * 3.0 * x * x

    x, w = tg.Variable(2.0), tg.Variable(5.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = cube(x) * w
        first = inner.gradient(y, x)  # 3 w x^2
    assert outer.gradient(first, [x, w]) == [60.0, 12.0]


def test_K15_a_custom_gradient_on_grad_defines_its_transpose():
    """Documented by this test: as in TensorFlow, second order needs an inner function of x."""

    @tg.custom_gradient
    def f(x):
        @tg.custom_gradient
        def slope(upstream, x):
            return upstream * 3.0 * x * x, lambda g: (g * 3.0 * x * x, g * upstream * 1000.0)

        return x * x * x, lambda upstream: slope(upstream, x)

    assert [float(g) for g in second(f, tg.Variable(2.0))] == [12.0, 1000.0]


def test_K16_methods_and_names_are_kept():
    class Layer:
        def __init__(self):
            self.factor = 5.0

        @tg.custom_gradient
        def call(self, x):
            """Multiply."""
            return x * self.factor, lambda upstream: upstream * 1000.0

    assert Layer.call.__name__ == "call"
    assert Layer.call.__doc__ == "Multiply."
    assert Layer.call.__wrapped__ is not Layer.call
    x = tg.Variable(2.0)
    assert float(Layer().call(x)) == 10.0
    assert float(gradient(Layer().call, x)) == 1000.0


def test_K17_an_exception_in_grad_propagates_with_a_note():
    class MyError(Exception):
        pass

    error = MyError("mine")

    @tg.custom_gradient
    def failing(x):
        def grad(upstream):
            raise error

        return x * x, grad

    with pytest.raises(MyError) as caught:
        gradient(failing, tg.Variable(2.0))
    assert caught.value is error
    assert str(error) == "mine"
    assert "failing" in "\n".join(error.__notes__)


def test_K1_structures_of_inputs_and_outputs():
    @tg.custom_gradient
    def f(layer, x):
        y = {"out": x * layer["w"], "norm": layer["w"] * layer["w"]}
        return y, lambda dout, dnorm: (dout * 10.0 + dnorm, dout * 100.0)

    w, x = tg.Variable(2.0), tg.Variable(3.0)

    def loss(w, x):
        y = f({"w": w}, x)
        return y["out"] * 2.0 + y["norm"] * 7.0

    assert gradient(loss, w, x) == [27.0, 200.0]


def test_K1_an_input_handed_back_as_result():
    @tg.custom_gradient
    def reverse_gradient(x):
        return x, lambda upstream: -upstream

    x = tg.Variable(3.0)
    assert float(gradient(lambda x: reverse_gradient(x * 2.0) * 5.0, x)) == -10.0
    assert float(gradient(reverse_gradient, x)) == -1.0


# ---- stop_gradient


def test_K18_stop_gradient():
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        stopped = tg.stop_gradient(x)
        y = stopped * stopped
        z = x * stopped
    assert float(stopped) == 3.0
    assert tape.gradient(y, x) is None
    assert float(tape.gradient(y, x, unconnected_gradients="zero")) == 0.0
    assert float(tape.gradient(z, x)) == 3.0


def test_K18_of_a_structure():
    x = tg.Variable([3.0, 4.0])
    with tg.GradientTape() as tape:
        stopped = tg.stop_gradient({"a": x, "b": [x * 2.0]})
        y = stopped["a"] * stopped["b"][0]
    assert list(stopped) == ["a", "b"]
    np.testing.assert_array_equal(stopped["b"][0], [6.0, 8.0])
    assert tape.gradient(y, x) is None


def test_K18_the_value_stays_when_the_variable_changes():
    x = tg.Variable([3.0, 4.0])
    stopped = tg.stop_gradient(x)
    x.assign([9.0, 9.0])
    np.testing.assert_array_equal(stopped, [3.0, 4.0])


def test_K19_a_source_made_by_stop_gradient():
    x = tg.Variable(3.0)
    for watched in (False, True):
        with tg.GradientTape() as tape:
            stopped = tg.stop_gradient(x)
            if watched:
                tape.watch(stopped)
            z = stopped * x
        answer = tape.gradient(z, stopped)
        assert (None if answer is None else float(answer)) == (3.0 if watched else None)


# ---- recompute_grad


def test_K20_the_function_runs_again_in_the_reverse_pass():
    calls = []

    def block(x, w=None):
        calls.append(1)
        return tg.tanh(x * w) * x

    x, w = tg.Variable(np.float64(0.5)), tg.Variable(np.float64(2.0))
    plain = gradient(lambda x, w: block(x, w=w) + block(x, w), x, w)
    assert len(calls) == 2
    again = tg.recompute_grad(block)
    recomputed = gradient(lambda x, w: again(x, w=w) + again(x, w), x, w)
    assert len(calls) == 2 + 4
    assert [float(g) for g in recomputed] == [float(g) for g in plain]
    # t = tanh(x w): dx = t + x w (1 - t^2), dw = x^2 (1 - t^2), twice each
    t = np.tanh(1.0)
    expected = [2 * (t + 1 - t * t), 2 * 0.25 * (1 - t * t)]
    np.testing.assert_allclose([float(g) for g in recomputed], expected, rtol=1e-14)


def test_K20_captured_variables_and_tensors():
    v, c, x = tg.Variable(3.0), tg.constant(5.0), tg.Variable(2.0)
    block = tg.recompute_grad(lambda x: x * x * v * c)
    with tg.GradientTape() as tape:
        tape.watch(c)
        y = block(x)
    # 2 x v c, x^2 c, x^2 v
    assert tape.gradient(y, [x, v, c]) == [60.0, 20.0, 12.0]
    assert v in tape.watched_variables()


def test_K20_variables_have_their_old_values_when_it_runs_again():
    v, x = tg.Variable([3.0]), tg.Variable([2.0])
    block = tg.recompute_grad(lambda x: x * v * v)
    with tg.GradientTape() as tape:
        y = block(x)
        v.assign([100.0])
    x.assign([100.0])
    dx, dv = tape.gradient(y, [x, v])
    assert (float(dx), float(dv)) == (9.0, 12.0)
    assert (float(v), float(x)) == (100.0, 100.0)


def test_K20_state_is_changed_once():
    counter, x = tg.Variable(0, trainable=False), tg.Variable(2.0)

    def block(x):
        counter.assign_add(1)
        return x * x

    with tg.GradientTape() as tape:
        y = tg.recompute_grad(block)(x)
    assert float(tape.gradient(y, x)) == 4.0
    assert int(counter) == 1


def test_K20_nothing_inside_is_kept():
    inside = []

    def block(x):
        m = tg.exp(x)
        inside.append(weakref.ref(m))
        return m * m

    x = tg.Variable([1.0, 2.0])
    with tg.GradientTape(persistent=True) as tape:
        y = tg.recompute_grad(block)(x)
    assert inside[0]() is None
    np.testing.assert_allclose(tape.gradient(y, x), 2 * np.exp([2.0, 4.0]), rtol=1e-6)
    assert inside[1]() is None


def test_K21_second_order():
    block = tg.recompute_grad(lambda x: x * x * x)
    assert [float(g) for g in second(block, tg.Variable(2.0))] == [12.0, 12.0]
    third = tg.grad(tg.grad(tg.grad(lambda x: block(x) * x)))
    assert float(third(2.0)) == 48.0  # x^4


def test_K21_nested():
    inner = tg.recompute_grad(lambda x: x * x)
    outer = tg.recompute_grad(lambda x: inner(x) * x)
    assert [float(g) for g in second(outer, tg.Variable(2.0))] == [12.0, 12.0]


def test_K22_randomness_is_replayed():
    masks = []

    def block(x):
        mask = tg.random.uniform((1000,))
        masks.append(mask.numpy())
        return x * mask

    x = tg.Variable(np.ones(1000, np.float32))
    with tg.GradientTape() as tape:
        y = tg.recompute_grad(block)(x)
    after = tg.random.uniform((1000,)).numpy()
    dx = tape.gradient(y, x)
    assert len(masks) == 2
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(dx, masks[0])
    later = tg.random.uniform((1000,)).numpy()
    for other in (after, later):  # the stream goes on where it was
        assert not np.array_equal(other, masks[0])
    assert not np.array_equal(after, later)


# ---- grad_pass_through


def test_K23_straight_through():
    x = tg.Variable(3.3)
    with tg.GradientTape() as tape:
        y = tg.grad_pass_through(tg.round)(x) * 2.0
    assert (float(y), float(tape.gradient(y, x))) == (6.0, 2.0)


def test_K23_variables_inside_get_none():
    x, v = tg.Variable(3.3), tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = tg.grad_pass_through(lambda x: tg.round(x) * v)(x)
    dx, dv = tape.gradient(y, [x, v])
    assert (float(y), float(dx), dv) == (6.0, 1.0, None)


@pytest.mark.parametrize("more", [False, True])
def test_gradients_of_a_mapping_go_by_its_keys(more):
    # By their order each was the other's.
    @tg.custom_gradient
    def weighted(d, *rest):
        y = 2.0 * d["a"] + 3.0 * d["b"] + sum(rest)

        def grad(g):
            found = {"b": 3.0 * g, "a": 2.0 * g}
            return (found, g) if rest else found

        return y, grad

    a, b, c = tg.Variable(1.0), tg.Variable(1.0), tg.Variable(1.0)
    with tg.GradientTape() as tape:
        y = weighted({"a": a, "b": b}, *([c] if more else []))
    found = tape.gradient(y, [a, b, c])
    assert [None if g is None else float(g) for g in found] == [2.0, 3.0, 1.0 if more else None]
