"""Jacobians (rows J)."""

from collections import namedtuple

import numpy as np
import pytest

import tapegrad as tg

RECORDS_ITSELF = "ignore:calling gradient on a persistent tape:tapegrad.TapeWarning"
USED_UP = (
    "A non-persistent GradientTape can only be used to compute one set of gradients (or jacobians)"
)
Pair = namedtuple("Pair", "first second")


def jacobian(function, x, **options):
    with tg.GradientTape() as tape:
        y = function(x)
    return tape.jacobian(y, x, **options)


def batch_jacobian(function, x, **options):
    with tg.GradientTape() as tape:
        y = function(x)
    return tape.batch_jacobian(y, x, **options)


MATRIX = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


# ---- jacobian


def test_J1_shape_is_target_shape_plus_source_shape():
    scalar, vector = tg.Variable(2.0), tg.Variable([3.0, 5.0])
    weights = np.array([1.0, 4.0, 6.0])
    np.testing.assert_array_equal(jacobian(lambda x: x * x * weights, scalar), [4.0, 16.0, 24.0])
    np.testing.assert_array_equal(jacobian(lambda x: tg.sum(x * x), vector), [6.0, 10.0])
    assert jacobian(lambda x: x * x, scalar).shape == ()
    assert float(jacobian(lambda x: x * x, scalar)) == 4.0
    answer = jacobian(lambda x: tg.matmul(MATRIX, x), vector)
    assert answer.dtype == "float32"
    np.testing.assert_array_equal(answer, MATRIX)
    matrix = tg.Variable(MATRIX)
    answer = jacobian(lambda x: tg.transpose(x), matrix)
    assert answer.shape == (2, 3, 3, 2)
    expected = np.einsum("ac,bd->abdc", np.eye(2), np.eye(3))  # d y[a, b] / d x[d, c]
    np.testing.assert_array_equal(answer, expected)


def test_J2_the_structure_of_the_sources_is_kept():
    x, w = tg.Variable([1.0, 2.0]), tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * w
    answer = tape.jacobian(y, {"w": w, "a": Pair([x], w)})
    assert list(answer) == ["w", "a"]
    np.testing.assert_array_equal(answer["w"], [1.0, 2.0])
    np.testing.assert_array_equal(answer["a"].first[0], [[3.0, 0.0], [0.0, 3.0]])
    np.testing.assert_array_equal(answer["a"].second, [1.0, 2.0])


def test_J3_a_structure_of_targets_gives_a_structure_of_answers():
    x = tg.Variable([1.0, 2.0])
    with tg.GradientTape() as tape:
        targets = {"square": x * x, "sum": tg.sum(x)}
    answer = tape.jacobian(targets, [x])
    assert list(answer) == ["square", "sum"]
    np.testing.assert_array_equal(answer["square"][0], [[2.0, 0.0], [0.0, 4.0]])
    np.testing.assert_array_equal(answer["sum"][0], [1.0, 1.0])


def test_J4_an_unconnected_source():
    x, unused = tg.Variable([1.0, 2.0]), tg.Variable(np.ones((3, 1)), dtype="float16")
    with tg.GradientTape(persistent=True) as tape:
        y = x * x
    assert tape.jacobian(y, [x, unused])[1] is None
    zero = tape.jacobian(y, unused, unconnected_gradients="zero")
    assert (zero.shape, zero.dtype) == ((2, 3, 1), np.dtype("float16"))
    assert not np.any(zero.numpy())


def test_J5_rows_of_constant_elements_are_zero():
    x = tg.Variable(3.0)
    answer = jacobian(lambda x: tg.stack([x * x, tg.constant(7.0), x]), x)
    np.testing.assert_array_equal(answer, [6.0, 0.0, 1.0])


def test_J6_a_target_that_was_not_recorded():
    x = tg.Variable([1.0, 2.0])
    y = x * x
    with tg.GradientTape() as tape:
        pass
    assert tape.jacobian(y, x) is None


def test_J7_a_target_that_is_the_source():
    x = tg.Variable([1.0, 2.0])
    np.testing.assert_array_equal(jacobian(lambda x: x, x), np.eye(2))


@pytest.mark.filterwarnings(RECORDS_ITSELF)
@pytest.mark.parametrize("persistent", [False, True])
def test_J8_inside_the_block_and_once(persistent):
    x = tg.Variable([1.0, 2.0])
    with tg.GradientTape(persistent) as tape:
        y = x * x
        inside = tape.jacobian(y, x)
    np.testing.assert_array_equal(inside, [[2.0, 0.0], [0.0, 4.0]])
    if persistent:
        np.testing.assert_array_equal(tape.jacobian(y, x), inside)
    else:
        with pytest.raises(RuntimeError) as caught:
            tape.gradient(y, x)
        assert str(caught.value) == USED_UP


def test_J9_a_jacobian_of_a_jacobian():
    x = tg.Variable([2.0, 3.0])
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = x * x * x
        first = inner.jacobian(y, x)
    second = outer.jacobian(first, x)
    np.testing.assert_array_equal(first, [[12.0, 0.0], [0.0, 27.0]])
    expected = np.zeros((2, 2, 2))
    expected[0, 0, 0], expected[1, 1, 1] = 12.0, 18.0  # 6 x
    np.testing.assert_array_equal(second, expected)


def hessian_by_tapes(function, x, **options):
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = function(x)
        slope = inner.gradient(y, x)
    return outer.jacobian(slope, x, **options)


def test_J10_hessians():
    x = tg.Variable([1.0, 2.0])
    cubes = hessian_by_tapes(lambda x: tg.sum(x * x * x), x)
    np.testing.assert_array_equal(cubes, [[6.0, 0.0], [0.0, 12.0]])
    assert hessian_by_tapes(lambda x: tg.sum(2.0 * x), x) is None
    zero = hessian_by_tapes(lambda x: tg.sum(2.0 * x), x, unconnected_gradients="zero")
    np.testing.assert_array_equal(zero, np.zeros((2, 2)))
    np.testing.assert_array_equal(tg.hessian(lambda x: tg.sum(x**3))(x), cubes)
    np.testing.assert_array_equal(tg.hessian(lambda x: tg.sum(2.0 * x))(x), np.zeros((2, 2)))


def test_J11_an_empty_target():
    x = tg.Variable([1.0, 2.0, 3.0])
    answer = jacobian(lambda x: (x * x)[:0], x)
    assert answer.shape == (0, 3)
    assert answer.dtype == "float32"


def test_J11_an_empty_target_without_a_path():
    x, w = tg.Variable([1.0, 2.0, 3.0]), tg.Variable(np.zeros((0, 2)))
    with tg.GradientTape() as tape:
        y = w * 2.0
    assert tape.jacobian(y, x) is None


def test_J12_an_integer_target():
    x = tg.Variable([1.0, 2.0])
    assert jacobian(lambda x: tg.astype(x, "int32"), x) is None


@pytest.mark.parametrize("options", [
    {"experimental_use_pfor": False},
    {"parallel_iterations": 1},
    {"parallel_iterations": 2, "experimental_use_pfor": True},
    {"parallel_iterations": 100, "experimental_use_pfor": False},
])  # fmt: skip
def test_J13_tensorflows_keywords_are_taken(options):
    x = tg.Variable([1.0, 2.0, 3.0])
    expected = np.diag([2.0, 4.0, 6.0])
    np.testing.assert_array_equal(jacobian(lambda x: x * x, x, **options), expected)
    batch = tg.Variable([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(batch_jacobian(lambda x: x * x, batch, **options), [expected])


def test_J15_chunks():
    x = tg.Variable(np.arange(5.0))
    for size in (1, 2, 5, 100):
        answer = jacobian(lambda x: x * x, x, chunk_size=size)
        np.testing.assert_array_equal(answer, np.diag(2.0 * np.arange(5.0)))


def test_J16_gather_inside_gives_no_warning():
    x = tg.Variable([5.0, 6.0, 7.0])
    answer = jacobian(lambda x: tg.gather(x, [2, 0, 2]), x)
    np.testing.assert_array_equal(answer, [[0, 0, 1], [1, 0, 0], [0, 0, 1]])


# ---- batch_jacobian


def mixed(x):
    """Map each row (a, b) to (a b, a^2, b): the Jacobian is [[b, a], [2 a, 0], [0, 1]]."""
    a, b = x[:, 0], x[:, 1]
    return tg.stack([a * b, a * a, b], axis=1)


def test_J17_batch_jacobian_is_the_block_diagonal():
    x = tg.Variable([[1.0, 2.0], [3.0, 4.0]])
    answer = batch_jacobian(mixed, x)
    expected = [[[2.0, 1.0], [2.0, 0.0], [0.0, 1.0]], [[4.0, 3.0], [6.0, 0.0], [0.0, 1.0]]]
    np.testing.assert_array_equal(answer, expected)
    full = jacobian(mixed, x).numpy()
    np.testing.assert_array_equal(answer, [full[i, :, i] for i in range(2)])


def test_J17_of_higher_rank():
    x = tg.Variable(np.arange(1.0, 13.0).reshape(2, 3, 2))
    answer = batch_jacobian(lambda x: tg.sum(x * x, axis=1, keepdims=True), x)
    assert answer.shape == (2, 1, 2, 3, 2)
    expected = np.zeros((2, 1, 2, 3, 2))
    for row, i, j in np.ndindex(2, 3, 2):
        expected[row, 0, j, i, j] = 2.0 * x.numpy()[row, i, j]
    np.testing.assert_array_equal(answer, expected)


def test_J18_cross_talk_is_found_on_request():
    x = tg.Variable([[1.0, 2.0], [3.0, 4.0]])
    # Documented caution: without the check, the sums over the batch.
    summed = batch_jacobian(lambda x: x * tg.sum(x), x)
    assert summed.shape == (2, 2, 2)
    np.testing.assert_array_equal(summed[:, 0, 0], [14.0, 14.0])  # 10 + x[0,0] + x[1,0]
    with pytest.raises(ValueError, match=r"depend on each other.*use jacobian"):
        batch_jacobian(lambda x: x * tg.sum(x), x, check=True)
    np.testing.assert_array_equal(batch_jacobian(mixed, x, check=True), batch_jacobian(mixed, x))


def test_J18_examples_that_exchange_places_are_found():
    """Each example depends on one other only: the sums over the batch look independent."""
    x = tg.Variable([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match="depend on each other"):
        batch_jacobian(lambda x: tg.flip(x, axis=0) * 2.0, x, check=True)


def test_J19_another_number_of_examples():
    x = tg.Variable(np.ones((2, 3)))
    with tg.GradientTape() as tape:
        y = tg.concat([x, x])
    with pytest.raises(ValueError, match="Need first dimension of target shape") as caught:
        tape.batch_jacobian(y, x)
    assert "(4, 3)" in str(caught.value)
    assert "(2, 3)" in str(caught.value)


@pytest.mark.parametrize("shape", [(2,), ()])
def test_J20_rank_below_two(shape):
    x = tg.Variable(np.ones(shape))
    with pytest.raises(ValueError, match=r"must have rank at least 2.*use jacobian"):
        batch_jacobian(lambda x: x * x, x)


def test_J21_a_structure_of_sources():
    x, w = tg.Variable([[1.0, 2.0], [3.0, 4.0]]), tg.Variable([[5.0], [6.0]])
    with tg.GradientTape() as tape:
        y = x * w
    answer = tape.batch_jacobian(y, {"x": x, "w": [w]})
    np.testing.assert_array_equal(answer["x"], [5.0 * np.eye(2), 6.0 * np.eye(2)])
    np.testing.assert_array_equal(answer["w"][0], [[[1.0], [2.0]], [[3.0], [4.0]]])


@pytest.mark.parametrize("unconnected", ["none", "zero"])
def test_J22_an_unconnected_source_gives_zeros(unconnected):
    """Documented: zeros also for "none", as in TensorFlow."""
    x, unused = tg.Variable([[1.0, 2.0]]), tg.Variable([[5.0, 6.0, 7.0]], dtype="float64")
    with tg.GradientTape() as tape:
        y = x * x
    zero = tape.batch_jacobian(y, unused, unconnected_gradients=unconnected)
    assert (zero.shape, zero.dtype) == ((1, 2, 3), np.dtype("float64"))
    assert not np.any(zero.numpy())


def test_J22_raise_raises():
    x, unused = tg.Variable([[1.0, 2.0]]), tg.Variable([[5.0]], name="unused")
    with tg.GradientTape() as tape:
        y = x * x
    with pytest.raises(ValueError, match="unused"):
        tape.batch_jacobian(y, unused, unconnected_gradients="raise")


@pytest.mark.parametrize("check", [False, True])
def test_J23_a_batch_of_none(check):
    x = tg.Variable(np.zeros((0, 2), np.float32))
    answer = batch_jacobian(mixed, x, check=check)
    assert answer.shape == (0, 3, 2)
