"""What a tape watches, and what it tells of it (rows W)."""

import inspect
from collections import namedtuple

import numpy as np
import pytest

import tapegrad as tg


def here():
    """Return `file:line` of the caller's next line."""
    frame = inspect.currentframe().f_back
    return f"{__file__}:{frame.f_lineno + 1}"


def test_W1_a_constant_is_not_watched():
    x = tg.constant(3.0)
    with tg.GradientTape() as tape:
        y = x * x
    assert tape.gradient(y, x) is None


def test_W2_watch_makes_a_constant_a_source():
    x = tg.constant(3.0)
    with tg.GradientTape() as tape:
        assert tape.watch(x) is None
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: Pair(a, b),
        lambda a, b: {"a": a, "b": b},
        lambda a, b: {"a": a, "b": b}.values(),
        lambda a, b: [a, {"k": (b,)}],
    ],
)
def test_W3_watch_takes_structures(wrap):
    a, b, c = tg.constant(3.0), tg.constant(2.0), tg.constant(5.0)
    with tg.GradientTape() as tape:
        tape.watch(wrap(a, b))
        z = a * a + 3.0 * b + c
    da, db, dc = tape.gradient(z, [a, b, c])
    assert (float(da), float(db), dc) == (6.0, 3.0, None)


def test_W4_a_use_before_the_watch_does_not_count():
    x = tg.constant(3.0)
    with tg.GradientTape() as tape:
        where = here()
        y = x * x
        tape.watch(x)
        z = y + x
    with pytest.warns(tg.TapeWarning) as caught:
        dx = tape.gradient(z, x)
    assert float(dx) == 1.0
    (warning,) = caught
    assert f"multiply at {where}" in str(warning.message)
    assert "before it was watched" in str(warning.message)
    assert warning.filename == __file__


def test_W4_nor_when_it_is_the_only_use():
    x = tg.constant(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        tape.watch(x)
    with pytest.warns(tg.TapeWarning, match="before it was watched"):
        assert tape.gradient(y, x) is None


def test_W4_an_early_use_behind_a_recorded_one_does_not_count():
    """The later use must not let the gradient run back into the earlier one."""
    x, w = tg.constant(3.0), tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = x * w  # on the tape because of w: its rule for x must not run
        tape.watch(x)
        z = y * x
    with pytest.warns(tg.TapeWarning, match="before it was watched"):
        dx, dw = tape.gradient(z, [x, w])
    assert float(dx) == 6.0  # y, not 2 w x = 12
    assert float(dw) == 9.0


@pytest.mark.parametrize(
    "multiply", [lambda x, w: x * w, lambda x, w: tg.prod(tg.stack([x, w]))], ids=["one", "joint"]
)
def test_W4_nor_when_an_outer_tape_recorded_it(multiply):
    """The outer tape's node, which both share, has a rule for x that the inner must not run."""
    x, w = tg.constant(3.0), tg.Variable(2.0)
    with tg.GradientTape() as outer:
        outer.watch(x)
        with tg.GradientTape() as inner:
            y = multiply(x, w)
            inner.watch(x)
            z = y * x
        with pytest.warns(tg.TapeWarning, match="before it was watched"):
            dx, dw = inner.gradient(z, [x, w])
    assert (float(dx), float(dw)) == (6.0, 9.0)
    assert outer.gradient(z, [x, w]) == [12.0, 9.0]


def test_W4_the_jacobian_warns_too():
    x = tg.constant([3.0])
    with tg.GradientTape() as tape:
        y = x * x
        tape.watch(x)
        z = y + x
    with pytest.warns(tg.TapeWarning, match="before it was watched"):
        np.testing.assert_array_equal(tape.jacobian(z, x), [[1.0]])


def test_W5_watching_a_copy_leaves_the_original_unwatched():
    x = tg.constant(3.0)
    for copied in (tg.positive(x), x * 1.0, tg.constant(x)):
        with tg.GradientTape() as tape:
            tape.watch(copied)
            y = x * copied
        dx, dcopied = tape.gradient(y, [x, copied])
        assert dx is None
        assert float(dcopied) == 3.0


def test_W6_watching_an_intermediate_keeps_its_history():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        tape.watch(y)
        z = y * y
    assert [float(g) for g in tape.gradient(z, [x, y])] == [108.0, 18.0]


@pytest.mark.parametrize("value", [3, True, np.arange(3)])
def test_W7_integers_and_bools_warn_every_time_and_have_no_gradient(value):
    """Documented: no error, since programs watch whole batches; the warning names the dtype."""
    x = tg.constant(value)
    with tg.GradientTape() as tape:
        for _ in range(7):  # TensorFlow falls silent after five
            with pytest.warns(tg.TapeWarning, match=str(x.dtype)) as caught:
                tape.watch(x)
            assert [w.filename for w in caught] == [__file__]
        y = x * 2.0
    assert tape.gradient(y, x) is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1.0, "float"),
        (None, "None"),
        ("x", "str"),
        (np.ones(2), "ndarray"),
        (np.float32(1), "float32"),
    ],
)
def test_W8_what_is_no_tensor_is_refused_before_anything_is_watched(value, kind):
    good = tg.constant(3.0)
    with tg.GradientTape() as tape:
        with pytest.raises(TypeError, match=kind) as caught:
            tape.watch([good, value])
        y = good * good
    assert "tensor[1]" in str(caught.value)
    assert "tg.constant(x)" in str(caught.value)
    assert tape.gradient(y, good) is None


@pytest.mark.parametrize("value", [{1.0}, (x for x in (1.0,))])
def test_W8_nor_are_sets_and_generators(value):
    with tg.GradientTape() as tape, pytest.raises(TypeError, match="list"):
        tape.watch(value)


def test_W9_two_arguments():
    a, b = tg.constant(1.0), tg.constant(2.0)
    with tg.GradientTape() as tape, pytest.raises(TypeError, match=r"watch\(\[x, y\]\)"):
        tape.watch(a, b)


@pytest.mark.parametrize("make", [tg.constant, lambda value: tg.Variable(value, trainable=False)])
def test_W10_watching_before_the_first_block_counts(make):
    x = make(3.0)
    tape = tg.GradientTape()
    tape.watch(x)
    with tape:
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


@pytest.mark.parametrize("other_tape_is_active", [False, True])
@pytest.mark.parametrize("spent", [False, True])
def test_W11_watching_between_two_blocks_counts(spent, other_tape_is_active):
    x, first = tg.constant(3.0), tg.Variable(1.0)
    tape = tg.GradientTape()
    with tape:
        y = first * 2.0
    if spent:
        tape.gradient(y, first)
    if other_tape_is_active:
        with tg.GradientTape():
            tape.watch(x)
    else:
        tape.watch(x)
    with tape:
        z = x * x
    assert float(tape.gradient(z, x)) == 6.0


@pytest.mark.parametrize("other_tape_is_active", [False, True])
def test_W12_watching_inside_stop_recording_counts(other_tape_is_active):
    x = tg.constant(3.0)
    other = tg.GradientTape()
    if other_tape_is_active:
        other.__enter__()
    with tg.GradientTape() as tape:
        with tape.stop_recording():
            tape.watch(x)
        y = x * x
    if other_tape_is_active:
        other.__exit__(None, None, None)
    assert float(tape.gradient(y, x)) == 6.0


def test_W13_two_tapes_watch_the_same_tensor_each_for_itself():
    x = tg.constant(3.0)
    with tg.GradientTape() as a, tg.GradientTape() as b:
        a.watch(x)
        y = x * x
        b.watch(x)
        z = y * x
    assert float(a.gradient(z, x)) == 27.0
    with pytest.warns(tg.TapeWarning, match="before it was watched"):
        assert float(b.gradient(z, x)) == 9.0  # y was computed before b watched


def test_W14_a_variable_that_is_not_trainable():
    x = tg.Variable(3.0, trainable=False)
    with tg.GradientTape() as tape:
        y = x * x
    assert tape.watched_variables() == ()
    assert tape.gradient(y, x) is None
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    assert tape.watched_variables() == (x,)
    assert float(tape.gradient(y, x)) == 6.0


def test_W14_stays_watched_after_an_assignment():
    x = tg.Variable(3.0, trainable=False)
    with tg.GradientTape() as tape:
        tape.watch(x)
        x.assign(5.0)
        y = x * x
    assert float(tape.gradient(y, x)) == 10.0


def test_W15_only_what_was_watched():
    x, w = tg.Variable(3.0), tg.Variable(2.0)
    with tg.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(w)
        y = x * x * w
    dx, dw = tape.gradient(y, [x, w])
    assert dx is None
    assert float(dw) == 9.0
    assert tape.watched_variables() == (w,)


@pytest.mark.parametrize("nothing", [[], (), {}, [[], {}]])
def test_W15_watching_an_empty_structure_warns(nothing):
    tape = tg.GradientTape(watch_accessed_variables=False)
    with tape, pytest.warns(tg.TapeWarning, match="nothing to watch") as caught:
        tape.watch(nothing)
    assert caught[0].filename == __file__


def test_W16_watched_variables_in_order_of_construction():
    first, second, third = tg.Variable(1.0), tg.Variable(2.0), tg.Variable(3.0)
    tape = tg.GradientTape()
    assert tape.watched_variables() == ()
    with tape:
        assert tape.watched_variables() == ()
        y = third * first
        assert tape.watched_variables() == (first, third)
        y = y * second * third
    expected = (first, second, third)
    assert tape.watched_variables() == expected
    tape.gradient(y, first)
    assert tape.watched_variables() == expected
    assert type(tape.watched_variables()) is tuple
    tape.reset()
    assert tape.watched_variables() == ()


def test_W17_what_counts_as_access():
    """Documented: reading in an operation counts; facts, `.numpy()` and `assign` do not."""
    v, w = tg.Variable([1.0, 2.0]), tg.Variable([3.0, 4.0])
    with tg.GradientTape() as tape:
        _ = v.shape, v.dtype, v.ndim, v.size, v.name, v.trainable, repr(v), len(v)
        v.numpy()
        np.asarray(v)
        v.assign([5.0, 6.0])
        v.assign_add([1.0, 1.0])
        assert tape.watched_variables() == ()
        v.assign(w)  # w is read, v is not
        assert tape.watched_variables() == (w,)
        tg.negative(v)
        assert tape.watched_variables() == (v, w)


def test_W17_asking_for_a_gradient_and_watching_are_no_reads():
    x, asked, watched = tg.Variable(3.0), tg.Variable(5.0), tg.Variable(7.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            inner.watch(watched)
            y = x * x
        inner.gradient(y, [x, asked], unconnected_gradients="zero")
    assert outer.watched_variables() == (x,)


def test_W18_constants_are_never_among_the_variables():
    x, v = tg.constant(3.0), tg.Variable(2.0)
    with tg.GradientTape() as tape:
        tape.watch(x)
        x * x * v
    assert tape.watched_variables() == (v,)


def test_W19_a_variable_made_inside_the_block():
    with tg.GradientTape() as tape:
        x = tg.Variable(3.0)
        assert tape.watched_variables() == ()
        y = x * x
    assert tape.watched_variables() == (x,)
    assert float(tape.gradient(y, x)) == 6.0


def test_W20_an_integer_variable_is_not_listed():
    """Documented: what can have no gradient is not listed, unlike in TensorFlow."""
    n, x = tg.Variable(3), tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = n * x
    assert tape.watched_variables() == (x,)
    dn, dx = tape.gradient(y, [n, x])
    assert dn is None
    assert float(dx) == 3.0
