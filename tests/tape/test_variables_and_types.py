"""Variables, dtypes and indexing under a tape (rows V, D and I)."""

import operator

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._index import parse
from tapegrad.primitive import primitives


def gradient(function, *xs):
    """Return the gradients of `function(*xs)`: one for one, a list for several."""
    with tg.GradientTape() as tape:
        y = function(*xs)
    answers = tape.gradient(y, list(xs))
    return answers[0] if len(xs) == 1 else answers


# ---- variables


def test_V1_dtypes():
    assert tg.Variable(3.0).dtype == "float32"
    assert tg.Variable([3.0, 1]).dtype == "float32"
    assert tg.Variable(3).dtype == "int64"  # documented: NumPy's, where TensorFlow has int32
    assert tg.Variable(np.arange(1, 100, 0.1)).dtype == "float64"
    assert tg.Variable(np.float16(3.0)).dtype == "float16"
    assert tg.Variable(3, dtype="float64").dtype == "float64"


@pytest.mark.parametrize(
    "make", [tg.constant, tg.Variable, lambda x, dtype: tg.full(2, x, dtype=dtype)]
)
def test_V1_an_integer_type_takes_what_it_can_hold(make):
    """As NumPy's array: 300 as int8 would be 44."""
    for value, dtype in [(300, "int8"), (-1, "uint8"), (2**40, "int32")]:
        with pytest.raises(OverflowError, match=f"{value} out of bounds for {dtype}"):
            make(value, dtype=dtype)
    with pytest.raises(ValueError, match="cannot convert float NaN to integer"):
        make(np.nan, dtype="int32")
    with pytest.raises(OverflowError, match="300 out of bounds for int8"):
        tg.constant([[1, 2], [3, 300]], dtype="int8")


def test_V1_a_variable_of_a_variable_has_a_copy_of_its_value():
    for value in (3.0, [3.0, 4.0]):
        v = tg.Variable(value)
        w = tg.Variable(v)
        v.assign_add(np.ones(v.shape))
        np.testing.assert_array_equal(w, value)


def test_V1_trainable_cannot_be_set():
    v = tg.Variable(3.0, trainable=False)
    assert v.trainable is False
    with pytest.raises(AttributeError):
        v.trainable = True
    with pytest.raises(TypeError, match="trainable must be True or False"):
        tg.Variable(3.0, trainable="yes")


@pytest.mark.parametrize("make", [tg.constant, tg.Variable, tg.Tensor, tg.asarray])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_V2_data_are_copied_in(make, dtype):
    source = np.arange(5000).astype(dtype)
    x = make(source)
    source[...] = -1
    np.testing.assert_array_equal(x, np.arange(5000))


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
@pytest.mark.parametrize("value", [3.0, [3.0, 4.0]])
def test_V3_numpy_gives_an_array_of_the_callers_own(make, value):
    x = make(value)
    out = x.numpy()
    out[...] = 99.0
    np.testing.assert_array_equal(x, value)
    np.testing.assert_array_equal(x + 0.0, value)


@pytest.mark.parametrize("value", [3.0, [3.0, 4.0]])
def test_V4_an_assignment_after_the_block_does_not_count(value):
    x = tg.Variable(value)
    with tg.GradientTape(persistent=True) as tape:
        y = x * x
    x.assign(100.0 * np.ones(x.shape))
    expected = 2.0 * np.asarray(value)
    np.testing.assert_array_equal(tape.gradient(y, x), expected)
    np.testing.assert_array_equal(tape.jacobian(y, x), np.diag(expected) if x.ndim else expected)
    np.testing.assert_array_equal(y, np.square(value))


def test_V5_each_read_has_its_own_value():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        z = x * x
        x.assign(10.0)
        z = z + x * x
    assert float(z) == 109.0
    assert float(tape.gradient(z, x)) == 26.0


def test_V5_also_of_arrays_and_of_every_kind_of_assignment():
    x = tg.Variable([1.0, 2.0])
    with tg.GradientTape() as tape:
        z = x * x  # at 1, 2
        x.assign_add([2.0, 2.0])
        z = z + x * x  # at 3, 4
        x.assign_sub([1.0, 1.0])
        z = z + x * x  # at 2, 3
    np.testing.assert_array_equal(z, [14.0, 29.0])
    np.testing.assert_array_equal(tape.gradient(z, x), [12.0, 18.0])


def test_V6_assignment_is_not_differentiated():
    x0, x1 = tg.Variable(3.0), tg.Variable(0.0)
    with tg.GradientTape() as tape:
        x1.assign_add(x0)
        y = x1**2
    d0, d1 = tape.gradient(y, [x0, x1])
    assert d0 is None
    assert float(d1) == 6.0


@pytest.mark.parametrize("name", ["assign", "assign_add", "assign_sub"])
def test_V7_an_assignment_returns_the_variable(name):
    v = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        changed = getattr(v, name)(1.0)
        y = changed * 2.0
    assert changed is v
    assert float(tape.gradient(y, v)) == 2.0


@pytest.mark.parametrize("name", ["assign", "assign_add", "assign_sub"])
@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], 1.0, [[1.0, 2.0]], [1.0]])
def test_V8_another_shape_is_refused(name, value):
    v = tg.Variable([5.0, 6.0], name="weights")
    with pytest.raises(ValueError, match="weights") as caught:
        getattr(v, name)(value)
    assert "(2,)" in str(caught.value)
    assert str(np.shape(value)) in str(caught.value)
    np.testing.assert_array_equal(v, [5.0, 6.0])


@pytest.mark.parametrize(
    "value", [[1, 2], np.array([1, 2]), tg.constant([1, 2]), np.array([1.0, 2.0]), [True, 2]]
)
def test_V9_values_are_cast_where_that_is_safe(value):
    """Documented: integers, and floats of another width, become the variable's type."""
    v = tg.Variable([0.0, 0.0])
    v.assign(value)
    assert v.dtype == "float32"
    np.testing.assert_array_equal(v, [1.0, 2.0])


@pytest.mark.parametrize("value", [1.5, np.float32(1.5), tg.constant(1.5)])
def test_V9_a_float_for_an_integer_is_refused(value):
    v = tg.Variable(3)
    with pytest.raises(TypeError, match=r"int64.*astype"):
        v.assign(value)
    assert int(v) == 3


IN_PLACE = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_V10_in_place_operators_are_refused(name):
    v = tg.Variable(3.0)
    with pytest.raises(RuntimeError, match=r"variable\.assign_add\(value\).*out = variable \+"):
        getattr(operator, name)(v, 1.0)
    assert float(v) == 3.0


def test_V10_also_the_matrix_product():
    v = tg.Variable([[3.0]])
    with pytest.raises(RuntimeError, match="assign_add"):
        v @= tg.constant([[1.0]])


@pytest.mark.parametrize("name", ["iand", "ior", "ixor", "ilshift", "irshift"])
def test_V10_none_rebinds_silently(name):
    v = tg.Variable(3)
    with pytest.raises((RuntimeError, TypeError)):
        getattr(operator, name)(v, 1)


def test_V11_a_rebound_name_is_no_variable_any_more():
    x = tg.Variable(3.0)
    answers = []
    for _ in range(2):
        with tg.GradientTape() as tape:
            y = x + 1.0
        answers.append(tape.gradient(y, x))
        x = x + 1.0
    assert type(x) is tg.Tensor
    assert float(answers[0]) == 1.0
    assert answers[1] is None


def test_V12_comparison_is_elementwise_and_hashing_by_identity():
    """Documented: unlike TensorFlow's, tensors and variables are keys of dicts, by identity."""
    v, w = tg.Variable([1.0, 2.0]), tg.Variable([1.0, 3.0])
    np.testing.assert_array_equal(v == w, [True, False])
    np.testing.assert_array_equal(v != w, [False, True])
    twin = tg.Variable([1.0, 2.0])
    gradients = {v: "v", twin: "twin"}
    assert gradients[v] == "v"
    assert gradients[twin] == "twin"
    assert len({tg.constant(1.0), tg.constant(1.0)}) == 2


def test_V13_an_assignment_to_a_part():
    v = tg.Variable([1.0, 2.0, 3.0])
    with tg.GradientTape() as tape:
        z = tg.sum(v * v)
        assert v[1].assign(10.0) is v
        z = z + tg.sum(v * v)
    assert float(z) == 14.0 + 110.0
    np.testing.assert_array_equal(tape.gradient(z, v), [4.0, 24.0, 12.0])


def test_V13_every_way_to_write_it():
    v = tg.Variable(np.zeros((2, 3), np.float32))
    v[0].assign([1.0, 2.0, 3.0])
    v[:, 1].assign_add([10.0, 20.0])
    v[1, 2].assign_sub(5.0)
    v[0, ::2] = 7.0
    np.testing.assert_array_equal(v, [[7.0, 12.0, 7.0], [0.0, 20.0, -5.0]])
    v[[0, 0, 1]].assign_add(1.0)  # repeated rows add up
    np.testing.assert_array_equal(v, [[9.0, 14.0, 9.0], [1.0, 21.0, -4.0]])


def test_V13_a_part_is_a_tensor_like_others():
    v, c = tg.Variable([1.0, 2.0, 3.0]), tg.constant(5.0)
    with tg.GradientTape(persistent=True) as tape:
        part = v[1]
        z = part * part * c
    assert isinstance(part, tg.Tensor)
    assert float(tape.gradient(z, part)) == 20.0
    np.testing.assert_array_equal(tape.gradient(z, v), [0.0, 20.0, 0.0])
    np.testing.assert_array_equal(tape.gradient(part, v), [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(tape.gradient([part, z], [v])[0], [0.0, 21.0, 0.0])
    np.testing.assert_array_equal(tape.jacobian(part, v), [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(tape.gradient(v, v, v[:]), [1.0, 2.0, 3.0])
    with tg.GradientTape() as tape:
        tape.watch(part)  # made outside: a constant here
        z = part * part
    assert float(tape.gradient(z, part)) == 4.0


def test_V13_a_part_keeps_the_value_that_it_was_read_with():
    v = tg.Variable([1.0, 2.0, 3.0])
    with tg.GradientTape() as tape:
        part = v[1:]
        part.assign(10.0)
        z = part * part
    np.testing.assert_array_equal(part, [2.0, 3.0])
    np.testing.assert_array_equal(v, [1.0, 10.0, 10.0])
    np.testing.assert_array_equal(tape.gradient(z, v), [0.0, 4.0, 6.0])


def test_V14_a_variable_made_from_a_tensor_is_a_leaf():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        w = tg.Variable(x * 2.0)
        y = w * w
    dx, dw = tape.gradient(y, [x, w])
    assert dx is None
    assert float(dw) == 12.0


def test_V15_tensors_cannot_be_changed():
    t = tg.constant([1.0, 2.0])
    with pytest.raises(TypeError, match=r"tg\.where"):
        t[0] = 5.0
    np.testing.assert_array_equal(t, [1.0, 2.0])


def test_V16_names_are_optional_and_appear_in_messages():
    assert tg.Variable(1.0).name == "Variable"
    w = tg.Variable(1.0, name="w")
    assert w.name == "w"
    assert "'w:0'" in repr(w)
    with pytest.raises(ValueError, match="'w'"):
        w.assign([1.0])


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
def test_V17_the_truth_of_several_elements_is_ambiguous(make):
    with pytest.raises(ValueError, match=r"ambiguous.*tg\.any.*tg\.all"):
        bool(make([1.0, 2.0]))
    assert bool(make([2.0])) is True
    assert bool(make(0.0)) is False


def test_V18_python_functions_on_variables():
    v = tg.Variable([3.0, -4.0])
    assert len(v) == 2
    assert [float(x) for x in v] == [3.0, -4.0]
    np.testing.assert_array_equal(gradient(lambda v: sum(x * x for x in v), v), [6.0, -8.0])
    np.testing.assert_array_equal(gradient(max, v), [1.0, 0.0])
    np.testing.assert_array_equal(gradient(min, v), [0.0, 1.0])
    np.testing.assert_array_equal(gradient(abs, v), [1.0, -1.0])
    first, second = v  # unpacks
    assert (float(first), float(second)) == (3.0, -4.0)
    scalar = tg.Variable(2.6)
    assert float(scalar) == np.float32(2.6)
    assert int(scalar) == 2
    assert round(scalar) == 3
    assert list(range(5))[tg.constant(3)] == 3
    assert -4.0 in v
    assert 4.0 not in v


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
def test_V18_scalars_have_no_elements(make):
    x = make(3.0)
    with pytest.raises(TypeError, match=r"Cannot iterate over a scalar tensor\."):
        iter(x)
    with pytest.raises(TypeError):
        len(x)
    with pytest.raises(TypeError, match="one element"):
        float(make([1.0, 2.0]))


# ---- dtypes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("number", [2.0, 2, True])
def test_D1_python_numbers_are_weak(dtype, number):
    x = tg.Variable(np.ones(2), dtype=dtype)
    for y in (x * number, number * x, x + number, number - x, x / number, number / x, x**number):
        assert y.dtype == dtype
    assert gradient(lambda x: x * number, x).dtype == dtype


@pytest.mark.parametrize(
    "other", [tg.constant(np.float64(2.0)), tg.constant(2), np.array([2.0, 2.0]), np.float64(2.0)]
)
def test_D2_and_D3_promotion_is_numpys_and_undone_in_the_gradient(other):
    """Documented: float64 and int64 operands widen a float32 variable's product, as in NumPy."""
    x = tg.Variable([1.0, 3.0])
    with tg.GradientTape() as tape:
        y = x * other
    dx = tape.gradient(y, x)
    assert y.dtype == "float64"
    assert dx.dtype == "float32"
    np.testing.assert_array_equal(dx, [2.0, 2.0])


@pytest.mark.parametrize("left", [np.array([2.0, 5.0]), np.float64(2.0), np.arange(1, 3)])
def test_D4_an_array_on_the_left(left):
    x = tg.Variable([1.0, 3.0])
    with tg.GradientTape() as tape:
        y = left * x
    assert type(y) is tg.Tensor
    np.testing.assert_array_equal(tape.gradient(y, x), np.broadcast_to(left, 2))


def test_D5_numpys_functions_are_recorded():
    x = tg.Variable([3.0, 4.0])
    y = gradient(np.square, x)
    assert type(y) is tg.Tensor
    np.testing.assert_array_equal(y, [6.0, 8.0])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool"])
def test_D6_a_cast_to_integers_cuts_the_path(dtype):
    x = tg.Variable(3.7)
    with tg.GradientTape(persistent=True) as tape:
        back = tg.astype(tg.astype(x, dtype), "float32")
        y = back * x
    assert tape.gradient(back, x) is None
    assert float(tape.gradient(y, x)) == float(back)


def test_D6_the_integer_part_is_a_constant():
    assert float(gradient(lambda x: tg.astype(x, "int32") * x, tg.Variable(3.7))) == 3.0


@pytest.mark.parametrize("through", ["float64", "float16"])
def test_D7_casts_between_floats(through):
    x = tg.Variable([3.0, 4.0])
    dx = gradient(lambda x: tg.astype(tg.astype(x, through) ** 2, "float32"), x)
    assert dx.dtype == "float32"
    np.testing.assert_array_equal(dx, [6.0, 8.0])


def test_D8_division_of_integers():
    y = tg.constant(3) / tg.constant(2)
    assert (y.dtype, float(y)) == ("float64", 1.5)


@pytest.mark.parametrize(
    "make", [tg.constant, tg.Variable, tg.square, lambda z: tg.constant(1.0) * z]
)
@pytest.mark.parametrize("value", [1 + 2j, np.array([1 + 2j])])
def test_D9_complex_numbers_are_refused(make, value):
    with pytest.raises(TypeError, match="complex"):
        make(value)


def test_D10_float16():
    x = tg.Variable(np.float16([3.0, 4.0]))
    dx = gradient(lambda x: x * x * 2.0, x)
    assert dx.dtype == "float16"
    np.testing.assert_array_equal(dx, [12.0, 16.0])


def test_D10_bfloat16():
    """Documented: with ml_dtypes installed, bfloat16 is a floating type like the others."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = tg.Variable(np.array([3.0, 4.0], bfloat16))
    dx = gradient(lambda x: x * x * 2.0, x)
    assert dx.dtype == bfloat16
    np.testing.assert_array_equal(dx.numpy().astype("float32"), [12.0, 16.0])


@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3)])
def test_D10_products_of_bfloat16(shape):
    """Their sums are float32's, rounded once; NumPy itself would answer float32."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=shape).astype(bfloat16), rng.normal(size=(3, 5)).astype(bfloat16)
    y = tg.matmul(a, b)
    assert y.dtype == bfloat16
    exact = a.astype("float64") @ b.astype("float64")
    np.testing.assert_allclose(y.numpy().astype("float64"), exact, rtol=2**-8, atol=1e-6)
    da = gradient(lambda a: a @ tg.constant(b), tg.Variable(a))
    assert da.dtype == bfloat16
    assert tg.matmul(a, b.astype("float32")).dtype == "float32"


# ---- indexing, gathering


@pytest.mark.parametrize(
    ("index", "weights", "expected"),
    [
        (2, 7.0, [0, 0, 7, 0, 0]),
        (-1, 7.0, [0, 0, 0, 0, 7]),
        (slice(1, 3), [1, 10], [0, 1, 10, 0, 0]),
        (slice(-1, None, -2), [1, 10, 100], [100, 0, 10, 0, 1]),
        (Ellipsis, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ((None, slice(0, 2)), [[3, 4]], [3, 4, 0, 0, 0]),
        ((Ellipsis, None), [[1], [2], [3], [4], [5]], [1, 2, 3, 4, 5]),
        ((), [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (slice(3, 1), [], [0, 0, 0, 0, 0]),
        (np.int64(2), 7.0, [0, 0, 7, 0, 0]),
        (tg.constant(2), 7.0, [0, 0, 7, 0, 0]),
    ],
)
def test_I1_basic_indices_scatter_back(index, weights, expected):
    x = tg.Variable(np.arange(5.0))
    dx = gradient(lambda x: x[index] * np.asarray(weights, float), x)
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("kind", [list, np.array, tg.constant, lambda i: (i,)])
def test_I2_repeated_indices_add_up(kind):
    x = tg.Variable([5.0, 6.0, 7.0])
    y = x[kind([0, 0, 2])]
    np.testing.assert_array_equal(y, [5.0, 5.0, 7.0])
    np.testing.assert_array_equal(gradient(lambda x: x[kind([0, 0, 2])], x), [2.0, 0.0, 1.0])


def test_I2_in_several_dimensions_and_with_negative_indices():
    x = tg.Variable(np.arange(6.0).reshape(2, 3))
    weights = np.array([1.0, 10.0, 100.0])
    dx = gradient(lambda x: x[[0, -1, 1], [2, 0, -3]] * weights, x)
    np.testing.assert_array_equal(dx, [[0, 0, 1], [110, 0, 0]])
    dx = gradient(lambda x: x[1:, [1, 1]] * weights[:2], x)
    np.testing.assert_array_equal(dx, [[0, 0, 0], [0, 11, 0]])


@pytest.mark.parametrize("kind", [list, np.array, tg.constant])
def test_I3_a_boolean_mask(kind):
    x = tg.Variable([5.0, 6.0, 7.0])
    mask = kind([True, False, True])
    dx = gradient(lambda x: x[mask] * np.array([1.0, 10.0]), x)
    np.testing.assert_array_equal(dx, [1.0, 0.0, 10.0])


def test_I3_a_mask_made_of_the_tensor_itself():
    x = tg.Variable([[5.0, -6.0], [-7.0, 8.0]])
    np.testing.assert_array_equal(gradient(lambda x: x[x > 0] * x[x > 0], x), [[10, 0], [0, 16]])


@pytest.mark.parametrize("make", [tg.Variable, tg.constant])
def test_I4_gathered_rows_are_summed_densely(make):
    x = make([5.0, 6.0, 7.0])
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = tg.gather(x, [0, 0, 2])
    np.testing.assert_array_equal(tape.gradient(y, x), [2.0, 0.0, 1.0])


def test_I5_gathered_and_used_as_a_whole():
    x = tg.Variable([5.0, 6.0, 7.0])
    dx = gradient(lambda x: tg.sum(x) + tg.sum(tg.gather(x, [0, 0, 2])), x)
    np.testing.assert_array_equal(dx, [3.0, 1.0, 2.0])


def test_I6_gathered_twice():
    x = tg.Variable([5.0, 6.0, 7.0])
    dx = gradient(lambda x: tg.sum(tg.gather(x, [0, 0])) + tg.sum(tg.gather(x, [0, 1])), x)
    np.testing.assert_array_equal(dx, [3.0, 1.0, 0.0])


def test_I7_gathered_along_another_axis_and_from_an_intermediate():
    x = tg.Variable([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    dx = gradient(lambda x: tg.gather(x, [1, 1, 0], axis=1), x)
    np.testing.assert_array_equal(dx, [[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    dx = gradient(lambda x: tg.gather(x * x, [1, 1], axis=0), x)
    np.testing.assert_array_equal(dx, [[0.0, 0.0, 0.0], [16.0, 20.0, 24.0]])
    dx = gradient(lambda x: tg.take_along_axis(x, [[0, 0], [2, 1]], axis=1), x)
    np.testing.assert_array_equal(dx, [[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


@pytest.mark.parametrize("take", [lambda x: x[[0, 0]], lambda x: tg.gather(x, [0, 0])])
def test_I8_second_order_through_gather(take):
    x = tg.Variable([3.0, 5.0])
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = tg.sum(take(x) ** 2)  # 2 x0^2
        slope = inner.gradient(y, x)
    np.testing.assert_array_equal(slope, [12.0, 0.0])
    np.testing.assert_array_equal(outer.jacobian(slope, x), [[4.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("index", [5, -4, [1, 5], [-4], (slice(None), 0)])
def test_I9_an_index_out_of_range(index):
    x = tg.Variable([5.0, 6.0, 7.0])
    with pytest.raises(IndexError):
        x[index]


def test_I9_gather_out_of_range():
    with pytest.raises(IndexError):
        tg.gather([1.0, 2.0], [5])


class Wrapping(np.ndarray):
    """An array that takes indices out of range modulo the length, as CuPy's do."""

    def __getitem__(self, index):
        return np.take(np.asarray(self), index[0], mode="wrap")


@pytest.mark.parametrize("index", [[1, 3], [-4]])
def test_I9_nor_where_the_array_module_would_wrap_it(index):
    x = np.arange(3.0).view(Wrapping)
    template, _ = parse([0], np)
    forward = primitives["getitem"].forward
    not_numpy = object()
    np.testing.assert_array_equal(forward(not_numpy, x, np.array([2, -3]), index=template), [2, 0])
    with pytest.raises(IndexError, match="out of bounds for axis 0 with size 3"):
        forward(not_numpy, x, np.array(index), index=template)


def test_I10_only_one_part_is_used():
    x = tg.Variable(np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(
        gradient(lambda x: tg.split(x, 3)[1] * 5.0, x), [[0, 0], [5, 5], [0, 0]]
    )
    np.testing.assert_array_equal(
        gradient(lambda x: tg.unstack(x, axis=1)[0] * 5.0, x), [[5, 0], [5, 0], [5, 0]]
    )


def test_I11_assigned_parts_take_the_gradient_of_the_update():
    """There is no scatter_nd_update; `where` is what the messages recommend, and splits so."""
    x, update = tg.Variable([1.0, 2.0, 3.0]), tg.Variable([7.0, 8.0, 9.0])
    with tg.GradientTape() as tape:
        y = tg.where([False, True, False], update, x) * np.array([1.0, 10.0, 100.0])
    dx, dupdate = tape.gradient(y, [x, update])
    np.testing.assert_array_equal(dx, [1.0, 0.0, 100.0])
    np.testing.assert_array_equal(dupdate, [0.0, 10.0, 0.0])


def test_I12_scatter_adding_is_deterministic():
    random = np.random.default_rng(0)
    index = random.integers(0, 7, 10_000)
    weights = random.normal(size=10_000).astype(np.float32)
    answers = []
    for _ in range(2):
        x = tg.Variable(np.zeros(7, np.float32))
        answers.append(gradient(lambda x: x[index] * weights, x).numpy())
    assert answers[0].tobytes() == answers[1].tobytes()
    exact = np.bincount(index, weights.astype(np.float64), 7)
    np.testing.assert_allclose(answers[0], exact, atol=1e-3)
