"""What was computed from a Variable keeps its values when the Variable is written to."""

import numpy as np
import pytest

import tapegrad as tg

VIEWS = {
    "the read itself": (tg.asarray, lambda a: a),
    "constant": (tg.constant, lambda a: a),
    "Tensor": (tg.Tensor, lambda a: a),
    "transpose": (lambda v: v.T, lambda a: a.T),
    "slice": (lambda v: v[1:, ::2], lambda a: a[1:, ::2]),
    "row": (lambda v: v[0], lambda a: a[0]),
    "element": (lambda v: v[0, 1], lambda a: a[0, 1]),
    "negative step": (lambda v: v[::-1, ::-1], lambda a: a[::-1, ::-1]),
    "new axis": (lambda v: v[:, None], lambda a: a[:, None]),
    "reshape": (lambda v: tg.reshape(v, (3, 2)), lambda a: a.reshape(3, 2)),
    "broadcast": (lambda v: tg.broadcast_to(v, (2, 2, 3)), lambda a: np.broadcast_to(a, (2, 2, 3))),
    "stop_gradient": (tg.stop_gradient, lambda a: a),
    "cast to the same": (lambda v: tg.astype(v, "float64"), lambda a: a),
    "squeeze": (lambda v: tg.squeeze(v[:, 1:2]), lambda a: a[:, 1]),
    "split": (lambda v: tg.split(v, 3, axis=1)[1], lambda a: a[:, 1:2]),
    "unstack": (lambda v: tg.unstack(v)[1], lambda a: a[1]),
    "diagonal": (tg.diagonal, np.diagonal),
    "flip": (tg.flip, np.flip),
    "view of a view": (lambda v: v.T[1:][::-1], lambda a: a.T[1:][::-1]),
    "real positive": (tg.positive, lambda a: a),
    "iterated": (lambda v: list(v)[1], lambda a: a[1]),
}
CONSTANTS = ("constant", "Tensor", "stop_gradient")
WRITES = {
    "assign": lambda v: v.assign(np.full((2, 3), -100.0)),
    "assign_add": lambda v: v.assign_add(np.full((2, 3), -100.0)),
    "assign_sub": lambda v: v.assign_sub(np.full((2, 3), 100.0)),
    "a part": lambda v: v[0].assign(-100.0),
    "an item": lambda v: v.__setitem__((slice(None), 1), -100.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_variable_keeps_its_values(name, write):
    view, expected = VIEWS[name]
    values = np.arange(6.0).reshape(2, 3) + 1.0
    v = tg.Variable(values)
    shown = view(v)
    WRITES[write](v)
    np.testing.assert_array_equal(shown, expected(values))
    assert float(tg.sum(v)) < 0.0  # it did change
    WRITES[write](v)
    np.testing.assert_array_equal(shown, expected(values))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", [n for n in VIEWS if n not in CONSTANTS])
def test_what_a_tape_has_saved_keeps_its_values(name, write):
    """The gradient of sum(view^2) is twice the old values, where the view shows them."""
    view, expected = VIEWS[name]
    values = np.arange(6.0).reshape(2, 3) + 1.0
    places = np.zeros(6)
    np.add.at(places, expected(np.arange(6).reshape(2, 3)).reshape(-1), 1.0)
    v = tg.Variable(values)
    with tg.GradientTape() as tape:
        y = tg.sum(view(v) ** 2)
        WRITES[write](v)
    np.testing.assert_array_equal(tape.gradient(y, v), 2.0 * values * places.reshape(2, 3))


def packed(*values):
    """Return variables that an optimiser has put into one memory, side by side."""
    variables = [tg.Variable(value) for value in values]
    tg.optimizers.SGD(0.5).apply([np.zeros(v.shape) for v in variables], variables)
    return variables


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_packed_variable_keeps_its_values(name, write):
    view, expected = VIEWS[name]
    values = np.arange(6.0).reshape(2, 3) + 1.0
    before, v, after = packed(values - 1.0, values, values + 1.0)
    shown, others = view(v), (view(before), view(after))
    memory = [other._array for other in others]
    WRITES[write](v)
    np.testing.assert_array_equal(shown, expected(values))
    assert float(tg.sum(v)) < 0.0
    for other, array in zip(others, memory, strict=True):
        assert other._array is array  # what is not written to is not moved
    np.testing.assert_array_equal(before, values - 1.0)
    np.testing.assert_array_equal(after, values + 1.0)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_keeps_its_values_when_an_optimiser_packs_and_steps(name):
    view, expected = VIEWS[name]
    values = np.arange(6.0).reshape(2, 3) + 1.0
    v, w = tg.Variable(values), tg.Variable(values)
    optimizer = tg.optimizers.SGD(0.5)
    read_before = view(v)
    optimizer.apply([np.ones((2, 3)), np.ones((2, 3))], [v, w])
    np.testing.assert_array_equal(v, values - 0.5)
    read_between = view(v)
    optimizer.apply([np.ones((2, 3)), np.ones((2, 3))], [v, w])
    np.testing.assert_array_equal(v, values - 1.0)
    np.testing.assert_array_equal(read_before, expected(values))
    np.testing.assert_array_equal(read_between, expected(values - 0.5))


def test_a_tape_over_an_optimisers_step_keeps_the_old_values():
    v, w = tg.Variable([1.0, 2.0]), tg.Variable([3.0, 4.0])
    optimizer = tg.optimizers.SGD(0.5)
    for factor in (1.0, 2.0):  # packs in the first round
        before = v.numpy(), w.numpy()
        with tg.GradientTape() as tape:
            y = factor * v * w
            optimizer.apply([np.ones(2), np.ones(2)], [v, w])
        dv, dw = tape.gradient(y, [v, w])
        np.testing.assert_array_equal(dv, factor * before[1])
        np.testing.assert_array_equal(dw, factor * before[0])
        np.testing.assert_array_equal(v, before[0] - 0.5)


def test_a_variable_assigned_from_a_view_of_itself():
    v = tg.Variable([[1.0, 2.0], [3.0, 4.0]])
    v.assign(v.T)
    np.testing.assert_array_equal(v, [[1.0, 3.0], [2.0, 4.0]])
    v.assign_add(v[::-1])
    np.testing.assert_array_equal(v, [[3.0, 7.0], [3.0, 7.0]])
    v[0].assign(v[:, 1])
    np.testing.assert_array_equal(v, [[7.0, 7.0], [3.0, 7.0]])


def test_arrays_that_were_handed_out_keep_their_values():
    v = tg.Variable([1.0, 2.0])
    read = v + 0.0
    handed = [v.numpy(), np.asarray(v), np.from_dlpack(v), np.asarray(v[:]), read.array]
    v.assign([9.0, 9.0])
    for array in handed:
        np.testing.assert_array_equal(array, [1.0, 2.0])


class Counted(np.ndarray):
    """An array that counts its copies: what is moved away before a write is copied."""

    copies = 0

    def copy(self, order="C"):
        Counted.copies += 1
        return super().copy(order)


def counted_variable(values):
    v = tg.Variable(values)
    v._array = v._array.view(Counted)
    Counted.copies = 0
    return v


def test_a_training_loop_moves_nothing():
    v = counted_variable(np.ones((3, 2)))
    x = tg.constant(np.ones((4, 3)))
    for _ in range(100):
        with tg.GradientTape() as tape:
            y = x @ v + v[0] + tg.sum(v.T)
            loss = tg.mean(y * y)
        v.assign_sub(0.001 * tape.gradient(loss, v))
    assert Counted.copies == 0


def test_only_what_is_held_is_moved():
    v = counted_variable(np.ones((3, 2)))
    for step in range(10):
        held = v.T, tg.reshape(v, 6)  # moved at the next write; the last step's are gone
        v.assign_add(np.ones((3, 2)))
        assert Counted.copies == 2 * (step + 1)
    np.testing.assert_array_equal(held[1], np.full(6, 10.0))


def test_what_was_moved_once_is_moved_no_more():
    v = counted_variable(np.ones((3, 2)))
    held = v.T
    for _ in range(10):
        v.assign_add(np.ones((3, 2)))
    assert Counted.copies == 1
    np.testing.assert_array_equal(held, np.ones((2, 3)))
