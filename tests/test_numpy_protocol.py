"""NumPy's functions and operators on tensors, and the ways in and out: DLPack, pickle, CuPy."""

import copy
import operator
import pickle

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.tensor import Operand

A = np.array([[0.31, 0.83, 0.17], [0.61, 0.23, 0.91]])  # no two have a whole quotient
B = np.array([[0.5, 1.5], [2.5, 0.25], [0.75, 1.25]])


def taped(function, *xs):
    """Return function(*xs) and the gradients of its sum."""
    with tg.GradientTape() as tape:
        y = function(*xs)
    return y, tape.gradient(y, list(xs))


def call(text, x):
    """Evaluate NumPy's expression of x."""
    return eval(text, {"np": np, "x": x, "A": A, "B": B})


def differences(function, x):
    """Return the gradient of the sum of an array function by central differences."""
    slopes = np.empty_like(x)
    for i in np.ndindex(x.shape):
        h = np.zeros_like(x)
        h[i] = 1e-6
        slopes[i] = (np.sum(function(x + h)) - np.sum(function(x - h))) / 2e-6
    return slopes


# ---- functions are recorded

UNARY = [
    "negative", "positive", "square", "sqrt", "reciprocal", "exp", "exp2", "expm1", "log", "log2",
    "log10", "log1p", "sin", "cos", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
    "arcsinh", "arctanh", "absolute", "fabs", "conjugate", "abs",
]  # fmt: skip
BINARY = [
    "add", "subtract", "multiply", "divide", "true_divide", "power", "hypot", "logaddexp",
    "arctan2", "maximum", "minimum", "remainder", "mod",
]  # fmt: skip


@pytest.mark.parametrize("make", [tg.Variable, tg.constant])
@pytest.mark.parametrize("name", UNARY)
def test_ufuncs_of_one_argument_are_recorded(name, make):
    ufunc, x = getattr(np, name), make(A)
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = ufunc(x)
    assert type(y) is tg.Tensor
    np.testing.assert_allclose(y, ufunc(A), rtol=1e-15)
    np.testing.assert_allclose(tape.gradient(y, x), differences(ufunc, A), rtol=1e-7)


@pytest.mark.parametrize("array_first", [False, True])
@pytest.mark.parametrize("name", BINARY)
def test_ufuncs_of_two_arguments_are_recorded(name, array_first):
    ufunc, other = getattr(np, name), np.array([0.7, 0.45, 0.35])

    def function(x):
        return ufunc(other, x) if array_first else ufunc(x, other)

    y, (dx,) = taped(function, tg.Variable(A))
    assert type(y) is tg.Tensor
    np.testing.assert_allclose(y, function(A), rtol=1e-15)
    np.testing.assert_allclose(dx, differences(function, A), rtol=1e-7, atol=1e-9)


DISCRETE = [
    "np.floor(x)",
    "np.ceil(x)",
    "np.rint(x)",
    "np.trunc(x)",
    "np.sign(x)",
    "x // 0.4",
    "np.floor_divide(x, 0.4)",
    "np.isfinite(x)",
    "np.isnan(x)",
    "np.isinf(x)",
    "np.greater(x, 0.5)",
    "np.less_equal(0.5, x)",
    "np.equal(x, 0.61)",
    "np.not_equal(x, A)",
    "np.logical_and(x > 0.2, x < 0.8)",
    "np.logical_not(x)",
    "np.logical_or(x, 0.0)",
    "np.logical_xor(x, 1.0)",
    "np.bitwise_and(x > 0.2, x < 0.8)",
    "np.invert(x > 0.5)",
    "np.argmax(x, axis=1)",
    "np.argmin(x)",
    "np.argsort(x, axis=1)",
    "np.any(x > 0.5, axis=0)",
    "np.all(x > 0.1)",
    "np.zeros_like(x)",
    "np.ones_like(x)",
    "np.full_like(x, 7.0)",
]


@pytest.mark.parametrize("text", DISCRETE)
def test_functions_without_slope_give_tensors_too(text):
    y = call(text, tg.Variable(A))
    assert type(y) is tg.Tensor
    expected = call(text, A)
    np.testing.assert_array_equal(y, expected)
    assert y.dtype == expected.dtype


FUNCTIONS = [
    "np.sum(x)",
    "np.sum(x, axis=0)",
    "np.sum(x, 1)",
    "np.sum(x, axis=(0, 1), keepdims=True)",
    "np.mean(x, axis=-1)",
    "np.var(x)",
    "np.var(x, axis=1, ddof=1)",
    "np.std(x, axis=0)",
    "np.std(x, ddof=1)",
    "np.prod(x, axis=1)",
    "np.max(x)",
    "np.max(x, axis=0)",
    "np.min(x, axis=1)",
    "np.linalg.norm(x)",
    "np.linalg.norm(x, None)",
    "np.linalg.norm(x, 'fro')",
    "np.linalg.norm(x[None], axis=(1, 2), keepdims=True)",
    "np.linalg.norm(x, 1, axis=0)",
    "np.linalg.norm(x[0], np.inf)",
    "np.linalg.norm(x, axis=1, ord=3)",
    "np.cumsum(x)",
    "np.cumsum(x, axis=1) ** 2",
    "np.cumprod(x)",
    "np.cumprod(x, axis=0)",
    "np.dot(x, B)",
    "np.dot(x, 2.0) ** 2",
    "np.dot(A[0, 0], x) ** 2",
    "np.dot(x, np.stack([B, B])) ** 2",
    "np.dot(np.stack([B, B]), x) ** 2",
    "x.dot(np.stack([B, B])) ** 2",
    "np.matmul(x, B)",
    "np.matmul(B, x)",
    "np.outer(x[0], x[1]) ** 2",
    "np.tensordot(x, B, axes=1) ** 2",
    "np.tensordot(x, B, axes=([1], [0]))",
    "np.einsum('ij,jk->ik', x, B) ** 2",
    "np.diagonal(x) ** 2",
    "np.trace(x) ** 2",
    "np.trace(np.stack([x, A])) ** 2",
    "np.trace(np.stack([x, A]), 1, 2, 1) ** 2",
    "np.tril(x) ** 2",
    "np.triu(x, 1) ** 2",
    "np.where(A > 0.5, x, 0.0) ** 2",
    "np.where(A > 0.5, 0.0, x) ** 2",
    "np.clip(x, 0.25, 0.7) ** 2",
    "np.clip(x, a_min=0.25, a_max=0.7) ** 2",
    "np.clip(x, 0.25, None) ** 2",
    "np.reshape(x, (3, 2)) * B",
    "np.reshape(x, -1) ** 2",
    "np.ravel(x) ** 2",
    "np.transpose(x) * B",
    "np.transpose(x, (1, 0)) * B",
    "np.moveaxis(x, 0, 1) * B",
    "np.expand_dims(x, 1) ** 2",
    "np.squeeze(x[None]) ** 2",
    "np.broadcast_to(x, (4, 2, 3)) ** 2",
    "np.concatenate([x, A]) ** 2",
    "np.concatenate([A, x, x], axis=1) ** 2",
    "np.stack([x, A], axis=1) ** 2",
    "np.split(x, 3, axis=1)[1] ** 2",
    "np.flip(x, 0) * A",
    "np.roll(x, 1, axis=1) * A",
    "np.repeat(x, 2, axis=0) ** 2",
    "np.tile(x, (2, 1)) ** 2",
    "np.pad(x, 1) ** 2",
    "np.pad(x, ((1, 0), (0, 2)), constant_values=3.0) ** 2",
    "np.take(x, [0, 0, 2], axis=1) ** 2",
    "np.take_along_axis(x, np.array([[0], [2]]), axis=1) ** 2",
    "np.sort(x, axis=1) * A",
    "np.copy(x) ** 2",
]


@pytest.mark.parametrize("text", FUNCTIONS)
def test_functions_are_recorded(text):
    y, (dx,) = taped(lambda x: call(text, x), tg.Variable(A))
    assert type(y) is tg.Tensor
    expected = call(text, A)
    assert y.shape == np.shape(expected)
    np.testing.assert_allclose(y, expected, rtol=1e-14)
    slopes = differences(lambda a: call(text, a), A)
    np.testing.assert_allclose(dx, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("text", FUNCTIONS)
def test_and_give_tensors_without_a_tape(text):
    y = call(text, tg.constant(A))
    assert type(y) is tg.Tensor
    np.testing.assert_allclose(y, call(text, A), rtol=1e-14)


DEFAULTS = {
    "take": lambda x: np.take(x, [0, 4]),
    "repeat": lambda x: np.repeat(x, 2),
    "roll": lambda x: np.roll(x, 1),
    "flip": np.flip,
    "sort": np.sort,
    "argsort": np.argsort,
    "flat sort": lambda x: np.sort(x, axis=None),
    "diagonal": lambda x: np.diagonal(np.stack([x, x])),
    "cumsum": np.cumsum,
    "take_along_axis": lambda x: np.take_along_axis(x, np.array([0, 4]), axis=None),
    "expand_dims": lambda x: np.expand_dims(x, -1),
    "concatenate": lambda x: np.concatenate([x, x], axis=None),
    "std of integers": lambda x: np.std((x * 10) // 1),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_numpys(name):
    """Where no axis is given, for one, `np.take` goes over the flattened array."""
    np.testing.assert_allclose(DEFAULTS[name](tg.constant(A)), DEFAULTS[name](A), rtol=1e-14)


def test_second_derivatives_through_numpys_functions():
    x = tg.Variable(A)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = np.sum(np.exp(x) * np.square(x))
        slope = inner.gradient(y, x)
    np.testing.assert_allclose(slope, np.exp(A) * (A * A + 2 * A), rtol=1e-14)
    expected = np.exp(A) * (A * A + 4 * A + 2)
    np.testing.assert_allclose(outer.gradient(slope, x), expected, rtol=1e-14)


def test_a_numpy_function_counts_as_a_read():
    v = tg.Variable(A)
    with tg.GradientTape() as tape:
        np.exp(v)
    assert tape.watched_variables() == (v,)


# ---- functions without a rule

SQUARE = np.array([[2.0, 1.0], [1.0, 3.0]])
WITHOUT_RULE = {
    "cbrt": np.cbrt,
    "heaviside": lambda x: np.heaviside(x, 0.5),
    "modf": lambda x: np.modf(x)[0],
    "divmod": lambda x: np.divmod(x, 0.4)[1],
    "add.accumulate": np.add.accumulate,
    "multiply.outer": lambda x: np.multiply.outer(x, x),
    "add.reduceat": lambda x: np.add.reduceat(x, [0, 1]),
    "subtract.reduce": np.subtract.reduce,
    "exp with dtype": lambda x: np.exp(x, dtype=np.float64),
    "norm of a matrix": lambda x: np.linalg.norm(x, 2),
    "norm of matrices": lambda x: np.linalg.norm(x, 1, axis=(0, 1)),
    "norm by singular values": lambda x: np.linalg.norm(x, "nuc"),
    "pad with several values": lambda x: np.pad(x, ((1, 1), (0, 0)), constant_values=(5.0, 6.0)),
    "einsum with lists": lambda x: np.einsum(x, [0, 1], [1]),
    "sum with where": lambda x: np.sum(x, where=SQUARE > 1.5),
    "sum with initial": lambda x: np.sum(x, initial=5.0),
    "add.reduce with initial": lambda x: np.add.reduce(x, initial=5.0),
    "median": np.median,
    "inv": np.linalg.inv,
    "det": np.linalg.det,
    "fft": np.fft.fft,
    "cross": lambda x: np.cross(np.ones(3), x[0, [0, 1, 1]]),
    "interp": lambda x: np.interp(x, [0.0, 5.0], [1.0, 2.0]),
    "cov": np.cov,
    "kron": lambda x: np.kron(x, SQUARE),
    "unique": np.unique,
    "nansum": np.nansum,
    "vander in keywords": lambda x: np.vander(x=x[0]),
    "in a list": lambda x: np.block([[x, x]]),
}


@pytest.mark.parametrize("watched", ["read", "watched"])
@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_raise_where_a_tape_watches(name, watched):
    x = tg.Variable(SQUARE) if watched == "read" else tg.constant(SQUARE)
    with tg.GradientTape() as tape:
        tape.watch(x)
        with pytest.raises(TypeError, match=r"np\..*no gradient rule.*\.numpy\(\)"):
            WITHOUT_RULE[name](x)


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_compute_where_none_does(name):
    function = WITHOUT_RULE[name]
    expected = function(SQUARE)
    for x in (tg.constant(SQUARE), tg.Variable(SQUARE)):
        np.testing.assert_array_equal(function(x), expected)
    with tg.GradientTape() as tape:
        np.testing.assert_array_equal(function(tg.constant(SQUARE)), expected)
        with tape.stop_recording():
            np.testing.assert_array_equal(function(tg.Variable(SQUARE)), expected)
        with tg.no_record():
            np.testing.assert_array_equal(function(tg.Variable(SQUARE)), expected)


def test_facts_never_raise():
    x = tg.Variable(SQUARE)
    with tg.GradientTape():
        assert np.shape(x) == (2, 2)
        assert np.ndim(x) == 2
        assert np.size(x) == 4
        assert np.allclose(x, SQUARE)
        assert np.array_equal(x, SQUARE)
        assert not np.isclose(x, 2.0).all()
        assert np.result_type(x, np.float32) == "float64"
        assert np.count_nonzero(x) == 4
        assert [i.tolist() for i in np.where(x > 2.5)] == [[1], [1]]
        assert "2." in np.array2string(x)


# ---- operators

OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "**": operator.pow, "%": operator.mod,
}  # fmt: skip
LEFT = {
    "array": np.array([[1.5, 2.5, 0.5], [3.5, 1.25, 0.75]]),
    "row": np.array([1.5, 2.5, 0.5]),
    "0-d array": np.array(1.5),
    "NumPy number": np.float64(1.5),
    "float32 array": np.array([1.5, 2.5, 0.5], np.float32),
    "integers": np.array([3, 1, 2]),
    "integer": np.int64(3),
    "number": 1.5,
    "list": [1.5, 2.5, 0.5],
}


@pytest.mark.parametrize("make", [tg.Variable, tg.constant])
@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_array_on_the_left_of_an_operator(name, left, make):
    other, x = LEFT[left], make(A)
    array = np.asarray(other, np.float64)
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = OPERATORS[name](other, x)
    assert type(y) is tg.Tensor
    np.testing.assert_allclose(y, OPERATORS[name](array, A), rtol=1e-6)
    expected = differences(lambda a: OPERATORS[name](array, a), A)
    np.testing.assert_allclose(tape.gradient(y, x), expected, rtol=1e-6, atol=1e-8)


def test_a_matrix_on_the_left():
    y, (dx,) = taped(lambda x: B @ x, tg.Variable(A))
    assert type(y) is tg.Tensor
    np.testing.assert_allclose(y, B @ A, rtol=1e-15)
    np.testing.assert_allclose(dx, np.tile(B.sum(0)[:, None], 3), rtol=1e-15)
    y, (dx,) = taped(lambda x: A[0] @ x, tg.Variable(A[1]))
    np.testing.assert_allclose(dx, A[0])


@pytest.mark.parametrize("make", [tg.Variable, tg.constant])
@pytest.mark.parametrize("function", [operator.eq, operator.ne, operator.lt, operator.le,
                                      operator.gt, operator.ge, operator.floordiv])  # fmt: skip
def test_comparisons_with_an_array_on_the_left(function, make):
    other = np.array([0.61, 0.23, 0.17])
    y = function(other, make(A))
    assert type(y) is tg.Tensor
    np.testing.assert_array_equal(y, function(other, A))


@pytest.mark.parametrize("function", [operator.and_, operator.or_, operator.xor])
def test_bits_with_an_array_on_the_left(function):
    for left, right in ((np.array([6, 3]), [3, 5]), (np.array([True, False]), [True, True])):
        y = function(left, tg.constant(right))
        assert type(y) is tg.Tensor
        np.testing.assert_array_equal(y, function(left, np.array(right)))


def test_the_array_on_the_left_is_copied_in():
    left = np.array([1.0, 2.0, 3.0])
    x = tg.Variable(A)
    with tg.GradientTape() as tape:
        y = left * x
        left[...] = 100.0
    np.testing.assert_array_equal(tape.gradient(y, x), [[1.0, 2.0, 3.0]] * 2)


def test_what_is_no_number_is_left_to_the_other_side():
    class Other:
        def __radd__(self, left):
            return "mine"

        def __add__(self, right):
            return NotImplemented

    x = tg.constant(1.0)
    assert x + Other() == "mine"
    for wrong in ("text", None, {}, object()):
        with pytest.raises(TypeError):
            x + wrong
        with pytest.raises(TypeError):
            wrong * x


# ---- out=, in-place, reduce


def test_out_takes_arrays_and_no_tensors():
    x, out = tg.constant(A), np.zeros_like(A)
    assert np.multiply(x, 2.0, out=out) is out
    np.testing.assert_array_equal(out, A * 2)
    with pytest.raises(TypeError, match="cannot be written to"):
        np.multiply(A, 2.0, out=x)
    with pytest.raises(TypeError, match="cannot be written to"):
        np.multiply(x, 2.0, out=tg.Variable(A))
    np.testing.assert_array_equal(x, A)


def test_out_of_a_reduction():
    x, out = tg.constant(A), np.zeros(3)
    np.sum(x, axis=0, out=out)
    np.testing.assert_array_equal(out, A.sum(0))
    np.add.reduce(x, axis=0, out=out)
    np.testing.assert_array_equal(out, A.sum(0))


def test_an_array_changed_by_a_tensor():
    array = A.copy()
    array += tg.constant(A)
    assert type(array) is np.ndarray
    np.testing.assert_array_equal(array, A + A)
    with tg.GradientTape():
        with pytest.raises(TypeError, match="no gradient rule"):
            array += tg.Variable(A)  # the array cannot be on the tape
        with pytest.raises(TypeError, match="no gradient rule"):
            np.exp(tg.Variable(A), out=array)
    np.testing.assert_array_equal(array, A + A)


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"axis": 1}, {"axis": None}, {"axis": (0, 1)},
                                     {"axis": -1, "keepdims": True}])  # fmt: skip
@pytest.mark.parametrize("ufunc", [np.add, np.multiply, np.maximum, np.minimum])
def test_reduce_is_recorded(ufunc, options):
    def function(x):
        return ufunc.reduce(x, **options)

    y, (dx,) = taped(function, tg.Variable(A))
    assert type(y) is tg.Tensor
    np.testing.assert_allclose(y, function(A), rtol=1e-15)
    np.testing.assert_allclose(dx, differences(function, A), rtol=1e-7, atol=1e-9)


def test_reduce_with_its_axis_by_position():
    x = tg.constant(A)
    for axis in (0, 1):
        np.testing.assert_array_equal(np.add.reduce(x, axis), A.sum(axis))
    np.testing.assert_array_equal(np.logical_and.reduce(x > 0.15, 0), (A > 0.15).all(0))


# ---- the ways out


def test_asarray_of_a_tensor_is_a_read_only_view():
    x = tg.constant(A)
    out = np.asarray(x)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, A)
    assert not out.flags.writeable
    assert np.shares_memory(out, np.asarray(x))
    with pytest.raises(ValueError, match="read-only"):
        out[0, 0] = 9.0


@pytest.mark.parametrize("read", [lambda v: v, tg.asarray, lambda v: v.T, lambda v: v[0]])
def test_asarray_of_a_variables_memory_is_a_copy(read):
    v = tg.Variable(A)
    out = np.asarray(read(v))
    before = out.copy()
    v.assign(np.zeros_like(A))
    np.testing.assert_array_equal(out, before)
    with pytest.raises(ValueError, match="uncopied"):
        np.asarray(read(v), copy=False)


def test_array_gives_the_callers_own():
    for x in (tg.constant(A), tg.Variable(A)):
        out = np.array(x)
        out[...] = 9.0
        np.testing.assert_array_equal(x, A)


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
@pytest.mark.parametrize("value", [A, 1.5, [1, 2]])
def test_asarray_with_a_dtype(make, value):
    out = np.asarray(make(value), dtype=np.float16)
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out, np.asarray(value, np.float16))


def test_asarray_without_a_copy_in_another_dtype():
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(tg.constant(A), dtype=np.float32, copy=False)


def test_scalars_go_out_as_0_d_arrays():
    for x in (tg.constant(1.5), tg.Variable(1.5), tg.sum(tg.constant([1.0, 0.5]))):
        out = np.asarray(x)
        assert (type(out), out.shape, out.dtype) == (np.ndarray, (), np.float32)
        assert x.numpy().shape == ()
        assert type(x.array) is np.ndarray
        assert (x.item(), x.tolist()) == (1.5, 1.5)
    assert tg.constant(A).tolist() == A.tolist()


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
@pytest.mark.parametrize("value", [A, 1.5, np.arange(3), np.array([True, False])])
def test_dlpack_to_numpy_is_a_copy(make, value):
    x = make(value)
    out = np.from_dlpack(x)
    np.testing.assert_array_equal(out, value)
    assert out.dtype == x.dtype
    assert not np.shares_memory(out, x.array)
    assert x.__dlpack_device__() == (1, 0)  # kDLCPU


def test_dlpack_options():
    x = tg.constant(A)
    np.testing.assert_array_equal(np.from_dlpack(x, copy=True), A)
    with pytest.raises(BufferError, match="copies only"):
        np.from_dlpack(x, copy=False)
    np.testing.assert_array_equal(np.from_dlpack(x, device="cpu"), A)


@pytest.mark.parametrize("value", [A, A.T, A[::-1, ::2], np.array(1.5), np.arange(3)])
def test_dlpack_from_numpy_is_a_copy(value):
    source = np.array(value)
    x = tg.from_dlpack(source)
    assert (type(x), x.dtype, x.shape) == (tg.Tensor, value.dtype, value.shape)
    source[...] = 9
    np.testing.assert_array_equal(x, value)
    with pytest.raises(ValueError, match="copies always"):
        tg.from_dlpack(source, copy=False)


def test_dlpack_from_a_tensor():
    np.testing.assert_array_equal(tg.from_dlpack(tg.Variable(A)), A)


def test_dlpack_with_torch():
    torch = pytest.importorskip("torch")
    there = torch.from_dlpack(tg.Variable(A))
    there += 1.0
    back = tg.from_dlpack(there)
    there += 1.0
    np.testing.assert_array_equal(back, A + 1.0)


def test_the_array_namespace_is_tapegrad():
    for x in (tg.constant(A), tg.Variable(A)):
        xp = x.__array_namespace__()
        assert xp is tg
        assert x.__array_namespace__(api_version="2024.12") is tg
    # a program in terms of the standard
    _, (dx,) = taped(lambda x: xp.sum(xp.exp(x) * xp.asarray(2.0)), tg.Variable(A))
    np.testing.assert_allclose(dx, 2 * np.exp(A), rtol=1e-15)


# ---- copies and pickles


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [A, 1.5, np.arange(3), np.float16([1.5]), np.zeros((0, 2))])
def test_a_pickled_tensor(value, protocol):
    x = tg.constant(value)
    y = pickle.loads(pickle.dumps(x, protocol))
    assert (type(y), y.dtype, y.shape) == (tg.Tensor, x.dtype, x.shape)
    np.testing.assert_array_equal(y, x)
    assert y.id != x.id


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [A, 1.5, 3])
def test_a_pickled_variable(value, protocol):
    v = tg.Variable(value, trainable=False, name="weights")
    v.assign_add(v)
    w = pickle.loads(pickle.dumps(v, protocol))
    assert (type(w), w.dtype, w.name, w.trainable) == (tg.Variable, v.dtype, "weights", False)
    np.testing.assert_array_equal(w, 2 * np.asarray(value))
    w.assign_sub(w)
    np.testing.assert_array_equal(v, 2 * np.asarray(value))
    assert w.id != v.id


def test_pickled_things_are_on_no_tape():
    x = tg.Variable(A)
    with tg.GradientTape(persistent=True) as tape:
        m = x * x
        y = pickle.loads(pickle.dumps(m)) * 1.0
        z = pickle.loads(pickle.dumps(x)) * x
    assert tape.gradient(y, x) is None
    np.testing.assert_array_equal(tape.gradient(z, x), A)


def test_a_part_of_a_variable_pickles_as_a_tensor():
    part = pickle.loads(pickle.dumps(tg.Variable(A)[0]))
    assert type(part) is tg.Tensor
    np.testing.assert_array_equal(part, A[0])


def test_copies_of_a_tensor():
    x = tg.constant(A)
    assert copy.copy(x) is x  # a value never changes
    y = copy.deepcopy(x)
    assert type(y) is tg.Tensor
    assert y.id != x.id
    np.testing.assert_array_equal(y, A)
    with tg.GradientTape() as tape:
        tape.watch(x)
        z = y * x
    np.testing.assert_array_equal(tape.gradient(z, x), A)


@pytest.mark.parametrize("read", [tg.asarray, lambda v: v.T, lambda v: v[0]])
def test_a_deep_copy_of_what_a_variable_showed(read):
    v = tg.Variable(A)
    y = copy.deepcopy(read(v))
    expected = y.numpy()
    v.assign(np.zeros_like(A))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("value", [A, 1.5])
def test_copies_of_a_variable_are_variables_of_their_own(copied, value):
    v = tg.Variable(value, trainable=False, name="weights")
    w = copied(v)
    assert (type(w), w.name, w.trainable, w.dtype) == (tg.Variable, "weights", False, v.dtype)
    assert w.id != v.id
    w.assign(w + 1.0)
    np.testing.assert_array_equal(v, np.asarray(value, v.dtype))
    v.assign(v - 1.0)
    np.testing.assert_array_equal(w, np.asarray(value, v.dtype) + 1)


def test_a_deep_copy_keeps_what_is_shared():
    v = tg.Variable(A)
    first, second = copy.deepcopy([v, v])
    assert first is second
    assert first is not v


# ---- CuPy


@pytest.fixture
def cupy_array():
    """Return a CuPy array over the host's memory: it knows its operators, no device is asked."""
    cupy = pytest.importorskip("cupy")
    host = np.arange(3.0)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    return cupy.ndarray((3,), np.float64, memptr=cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
@pytest.mark.parametrize("name", [*OPERATORS, "@", "<", "==", "//"])
def test_a_cupy_array_on_the_left_leaves_the_operator_to_the_tensor(
    cupy_array, monkeypatch, name, make
):
    functions = {**OPERATORS, "@": operator.matmul, "<": operator.lt, "==": operator.eq,
                 "//": operator.floordiv}  # fmt: skip
    calls = []

    def observe(self, ufunc, method, *inputs, **options):
        calls.append((method, inputs))
        return "the tensor's answer"

    monkeypatch.setattr(Operand, "__array_ufunc__", observe)
    x = make([1.0, 2.0, 3.0])
    assert functions[name](cupy_array, x) == "the tensor's answer"
    ((method, inputs),) = calls
    assert method == "__call__"
    assert {id(given) for given in inputs} == {id(cupy_array), id(x)}


@pytest.mark.parametrize("make", [tg.constant, tg.Variable])
def test_tensors_have_no_cuda_array_interface(make):
    """With it CuPy would take `cupy_array * tensor` for itself, and nothing would be recorded."""
    assert not hasattr(make(A), "__cuda_array_interface__")
