"""How a tape lives: construction, blocks, its one use, pauses and resets (rows L and R)."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest

import tapegrad as tg

USED_UP = (
    "A non-persistent GradientTape can only be used to compute one set of gradients (or jacobians)"
)


def cube(x):
    return x * x * x


# ---- construction


def test_L1_names_order_and_defaults_are_tensorflows():
    parameters = inspect.signature(tg.GradientTape).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("persistent", False),
        ("watch_accessed_variables", True),
    ]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


def test_L1_both_go_by_position():
    x = tg.Variable(3.0)
    with tg.GradientTape(True, False) as tape:
        y = x * x
    assert tape.gradient(y, x) is None
    assert tape.gradient(y, x) is None  # persistent: asking again is no error


@pytest.mark.parametrize("name", ["persistent", "watch_accessed_variables"])
@pytest.mark.parametrize("value", ["yes", 1, 0, None, 1.0])
def test_L1_only_bools_are_taken(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
        tg.GradientTape(**{name: value})


def test_L2_an_unknown_keyword():
    with pytest.raises(TypeError, match="unexpected keyword argument 'persist'"):
        tg.GradientTape(persist=True)


# ---- blocks


def test_L3_entering_gives_the_tape_itself():
    tape = tg.GradientTape()
    with tape as entered:
        assert entered is tape


def test_L4_an_exception_ends_the_recording_and_keeps_what_was_recorded():
    x = tg.Variable(3.0)
    tape = tg.GradientTape(persistent=True)
    recorded = []

    def fail():
        with tape:
            recorded.append(x * x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (y,) = recorded
    z = y * 2.0
    assert float(tape.gradient(y, x)) == 6.0
    assert tape.gradient(z, x) is None


def test_L5_entering_an_active_tape_again():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        with pytest.raises(ValueError, match="Tape is still recording"):
            tape.__enter__()
        z = y * x
    assert float(tape.gradient(z, x)) == 27.0


def test_L6_entering_again_before_a_gradient_goes_on():
    x = tg.Variable(3.0)
    tape = tg.GradientTape()
    with tape:
        y = 2.0 * x
    with tape:
        z = 2.0 * y
    assert float(tape.gradient(z, x)) == 4.0


def test_L7_entering_again_after_the_gradient_starts_afresh():
    x, c = tg.Variable(3.0), tg.constant(3.0)
    tape = tg.GradientTape()
    with tape:
        tape.watch(c)
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0
    with tape:
        z = cube(x) + cube(c)
    dx, dc = tape.gradient(z, [x, c])
    assert float(dx) == 27.0
    assert dc is None


def test_L8_entering_again_after_a_persistent_gradient_goes_on():
    x, c = tg.Variable(3.0), tg.constant(2.0)
    tape = tg.GradientTape(persistent=True)
    with tape:
        tape.watch(c)
        y = x * x * c
    assert float(tape.gradient(y, x)) == 12.0
    with tape:
        z = y * x
    dx, dc = tape.gradient(z, [x, c])
    assert float(dx) == 54.0  # 3 x^2 c: the first block's part counts
    assert float(dc) == 27.0  # and what was watched there is watched


# ---- one use


def test_L9_a_second_gradient():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
    line = inspect.currentframe().f_lineno + 1
    tape.gradient(y, x)
    with pytest.raises(RuntimeError) as caught:
        tape.gradient(y, x)
    assert str(caught.value) == USED_UP
    notes = "\n".join(caught.value.__notes__)
    assert f"{__file__}:{line}" in notes
    assert "persistent=True" in notes
    assert "all sources in one call" in notes


CALLS = {
    "gradient": lambda tape, y, x: tape.gradient(y, x),
    "jacobian": lambda tape, y, x: tape.jacobian(y, x),
    "batch_jacobian": lambda tape, y, x: tape.batch_jacobian(y, x),
}


@pytest.mark.parametrize("second", CALLS)
@pytest.mark.parametrize("first", CALLS)
def test_L10_gradient_and_jacobians_share_the_one_use(first, second):
    x = tg.Variable([[1.0, 2.0]])
    with tg.GradientTape() as tape:
        y = x * x
    CALLS[first](tape, y, x)
    with pytest.raises(RuntimeError) as caught:
        CALLS[second](tape, y, x)
    assert str(caught.value) == USED_UP


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("persistent", [False, True])
def test_L11_a_tape_that_was_never_entered(call, persistent):
    x = tg.Variable([[3.0]])
    tape = tg.GradientTape(persistent)
    with pytest.raises(RuntimeError, match=r"has not recorded anything.*`with tape:`"):
        CALLS[call](tape, x * x, x)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"unconnected_gradients": "nonsense"}, ValueError),
        ({"target": None}, TypeError),
        ({"target": 3.0}, TypeError),
        ({"sources": None}, TypeError),
        ({"sources": [3.0]}, TypeError),
        ({"output_gradients": [1.0, 2.0, 3.0]}, ValueError),
        ({"output_gradients": "abc"}, TypeError),
    ],
)
def test_L12_a_refused_call_does_not_spend_the_tape(arguments, error):
    x = tg.Variable([3.0, 4.0])
    with tg.GradientTape() as tape:
        y = x * x
    with pytest.raises(error):
        tape.gradient(**{"target": y, "sources": x, **arguments})
    np.testing.assert_array_equal(tape.gradient(y, x), [6.0, 8.0])


def test_L12_nor_does_a_refused_batch_jacobian():
    x = tg.Variable([3.0, 4.0])
    with tg.GradientTape() as tape:
        y = x * x
    with pytest.raises(ValueError, match="rank at least 2"):
        tape.batch_jacobian(y, x)
    np.testing.assert_array_equal(tape.jacobian(y, x), [[6.0, 0.0], [0.0, 8.0]])


def test_L13_an_exception_in_a_rule_spends_the_tape():
    @tg.custom_gradient
    def broken(x):
        def grad(upstream):
            raise ZeroDivisionError("in the rule")

        return x * x, grad

    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = broken(x)
    with pytest.raises(ZeroDivisionError) as raised:
        tape.gradient(y, x)
    assert str(raised.value) == "in the rule"
    with pytest.raises(RuntimeError) as caught:
        tape.gradient(y, x)
    assert str(caught.value) == USED_UP
    assert re.search(r"earlier gradient\(\) failed in .*broken", "\n".join(caught.value.__notes__))


def test_L13_but_not_a_persistent_one():
    fail = [True]

    @tg.custom_gradient
    def broken_once(x):
        def grad(upstream):
            if fail:
                fail.clear()
                raise ZeroDivisionError
            return upstream * 1000.0

        return x * x, grad

    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        y = broken_once(x) * 2.0
    with pytest.raises(ZeroDivisionError):
        tape.gradient(y, x)
    assert float(tape.gradient(y, x)) == 2000.0


def test_L14_a_gradient_inside_the_block_ends_the_recording():
    x, later = tg.Variable(3.0), tg.Variable(5.0)
    with tg.GradientTape() as tape:
        y = x * x
        assert float(tape.gradient(y, x)) == 6.0
        later * later
        assert tape.watched_variables() == (x,)
        with pytest.raises(RuntimeError) as caught:
            tape.gradient(y, x)
        assert str(caught.value) == USED_UP
    assert tape.watched_variables() == (x,)


def test_L15_a_persistent_gradient_inside_the_block_is_recorded(monkeypatch):
    monkeypatch.setattr("tapegrad.tape._warned_of_recorded_gradient", False)
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        y = cube(x)
        with pytest.warns(tg.TapeWarning, match="persistent") as caught:
            first = tape.gradient(y, x)
        second = tape.gradient(first, x)  # warns once in a process: a warning here is an error
    third = tape.gradient(second, x)
    assert [float(g) for g in (first, second, third)] == [27.0, 18.0, 6.0]
    assert [w.filename for w in caught] == [__file__]


def test_L16_tapes_left_out_of_order():
    x = tg.Variable(3.0)
    a, b = tg.GradientTape(persistent=True), tg.GradientTape(persistent=True)
    a.__enter__()
    only_a = x * x
    b.__enter__()
    both = cube(x)
    a.__exit__(None, None, None)
    only_b = x * 5.0
    b.__exit__(None, None, None)
    neither = x * 7.0
    targets = (only_a, both, only_b, neither)
    assert [a.gradient(t, x, unconnected_gradients="zero") for t in targets] == [6.0, 27.0, 0, 0]
    assert [b.gradient(t, x, unconnected_gradients="zero") for t in targets] == [0, 27.0, 5.0, 0]
    assert a.gradient(only_b, x) is None
    assert b.gradient(only_a, x) is None


def test_L17_a_generator_that_yields_inside_its_block():
    """Documented: recording is by thread, so the caller's operations are recorded meanwhile."""
    x = tg.Variable(3.0)

    def steps():
        with tg.GradientTape() as tape:
            y = x * x
            z = yield y
        yield tape.gradient(z, x)

    generator = steps()
    y = next(generator)
    assert float(generator.send(y * x)) == 27.0


@pytest.mark.parametrize("call", [pickle.dumps, copy.deepcopy, copy.copy])
def test_L18_a_tape_cannot_be_pickled_or_copied(call):
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        y = x * x
    with pytest.raises(TypeError, match="GradientTape"):
        call(tape)
    assert float(tape.gradient(y, x)) == 6.0


def test_L19_repr_tells_what_it_holds():
    x, w = tg.Variable(np.zeros(2**18, np.float32)), tg.Variable(1.0)
    with tg.GradientTape() as tape:
        y = tg.exp(x)  # its rule reads the output: 2**18 float32 are 1 MiB
        y = y + w  # reads nothing
        assert repr(tape) == "<GradientTape persistent=False recording 2 ops, 2 variables, 1.0 MiB>"
    assert "recording" not in repr(tape)
    assert "persistent=True" in repr(tg.GradientTape(persistent=True))


# ---- stop_recording


def test_R1_operations_inside_are_not_recorded_and_recording_resumes():
    x, inside = tg.Variable(3.0), tg.Variable(5.0)
    with tg.GradientTape(persistent=True) as tape:
        with tape.stop_recording():
            y = x * x
            inside * inside
        z = x * y
    assert tape.gradient(y, x) is None
    assert float(tape.gradient(z, x)) == 9.0  # y counts as a constant
    assert tape.watched_variables() == (x,)


def test_R1_recording_resumes_after_an_exception():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        with pytest.raises(ZeroDivisionError), tape.stop_recording():
            raise ZeroDivisionError
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


def test_R2_outer_tapes_go_on():
    x = tg.Variable(3.0)
    with tg.GradientTape() as outer, tg.GradientTape() as inner, inner.stop_recording():
        y = x * x
    assert float(outer.gradient(y, x)) == 6.0
    assert inner.gradient(y, x) is None


def test_R3_never_entered():
    tape = tg.GradientTape()
    with pytest.raises(RuntimeError, match="not recording"), tape.stop_recording():
        pass


def test_R4_after_leaving():
    with tg.GradientTape() as tape:
        pass
    with pytest.raises(ValueError, match="Tape is not recording"), tape.stop_recording():
        pass


def test_R4_nesting_counts():
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        with tape.stop_recording():
            with tape.stop_recording():
                pass
            y = x * x
        z = x * x
    assert tape.gradient(y, x) is None
    assert float(tape.gradient(z, x)) == 6.0


def test_R5_a_gradient_inside_spends_the_tape_and_the_block_starts_afresh():
    x = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = x * x
        with tape.stop_recording():
            assert float(tape.gradient(y, x)) == 4.0
        z = cube(x)
    assert float(tape.gradient(z, x)) == 12.0


def test_R6_a_persistent_gradient_inside_is_not_recorded(monkeypatch):
    monkeypatch.setattr("tapegrad.tape._warned_of_recorded_gradient", False)  # a warning fails
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        y = cube(x)
        with tape.stop_recording():
            first = tape.gradient(y, x)
    assert float(first) == 27.0
    assert tape.gradient(first, x) is None


# ---- reset, no_record


def test_R7_reset_forgets_all_and_keeps_recording():
    x, before, c = tg.Variable(3.0), tg.Variable(5.0), tg.constant(3.0)
    with tg.GradientTape(persistent=True) as tape:
        tape.watch(c)
        y = x * before
        tape.reset()
        assert tape.watched_variables() == ()
        z = x * x + c * c + y
    assert tape.watched_variables() == (x,)
    assert tape.gradient(y, x) is None
    assert tape.gradient(z, c) is None
    assert tape.gradient(z, before) is None
    assert float(tape.gradient(z, x)) == 6.0  # not 11: y was computed before


def test_R7_reset_forgets_variables_that_were_watched_by_name():
    x = tg.Variable(3.0, trainable=False)
    with tg.GradientTape() as tape:
        tape.watch(x)
        tape.reset()
        y = x * x
    assert tape.gradient(y, x) is None


def test_R8_reset_is_legal_at_any_time():
    """Documented: outside its block, before and after its use, `reset` clears the tape."""
    x = tg.Variable(3.0)
    tape = tg.GradientTape()
    tape.reset()
    with tape:
        y = x * x
    tape.reset()
    assert tape.gradient(y, x) is None
    tape.reset()
    with tape:
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


def test_R8_reset_after_a_gradient_inside_the_block():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        tape.gradient(y, x)
        tape.reset()
        z = x * x
    assert float(tape.gradient(z, x)) == 6.0


def test_R9_no_record_hides_from_all_tapes():
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as outer, tg.GradientTape(persistent=True) as inner:
        with tg.no_record():
            hidden = x * x
        seen = x * hidden
    for tape in (outer, inner):
        assert tape.gradient(hidden, x) is None
        assert float(tape.gradient(seen, x)) == 9.0


def test_R9_no_record_ends_with_an_exception_and_nests():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        with pytest.raises(ZeroDivisionError), tg.no_record(), tg.no_record():
            raise ZeroDivisionError
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


def test_R9_a_persistent_gradient_inside_is_not_recorded(monkeypatch):
    monkeypatch.setattr("tapegrad.tape._warned_of_recorded_gradient", False)  # a warning fails
    x = tg.Variable(3.0)
    with tg.GradientTape(persistent=True) as tape:
        y = cube(x)
        with tg.no_record():
            first = tape.gradient(y, x)
    assert float(first) == 27.0
    assert tape.gradient(first, x) is None


def test_R9_a_gradient_inside_spends_the_tape():
    x, later = tg.Variable(3.0), tg.Variable(5.0)
    with tg.GradientTape() as tape:
        y = cube(x)
        with tg.no_record():
            assert float(tape.gradient(y, x)) == 27.0
        later * later
    assert tape.watched_variables() == (x,)


def test_R9_no_record_decorates_and_lets_an_own_tape_record():
    x = tg.Variable(3.0)

    @tg.no_record()
    def slope():
        with tg.GradientTape() as tape:
            y = x * x
        return tape.gradient(y, x)

    with tg.GradientTape() as outer:
        y = slope() * x
    assert float(outer.gradient(y, x)) == 6.0  # the slope counts as a constant
