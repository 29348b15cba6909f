"""Errors and interrupts in a replay: the state is that of whole steps, or says that it is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tapegrad as tg
from tests.function.compiled import assert_same

ROOT = Path(__file__).parents[2]
LABELS = tg.constant([0, 1, 2])


def classifier():
    rng = np.random.default_rng(0)
    variables = [tg.Variable(rng.normal(size=s)) for s in [(4, 8), (8,), (8, 3), (3,)]]
    optimizer = tg.optimizers.Adam(0.01)
    steps = tg.Variable(0)

    def step(x, labels):
        with tg.GradientTape() as tape:
            h = tg.nn.dropout(tg.nn.linear_relu(x, *variables[:2]), 0.2)
            loss = tg.nn.softmax_cross_entropy(tg.nn.linear(h, *variables[2:]), labels)
        optimizer.apply(tape.gradient(loss, variables), variables)
        steps.assign_add(1)
        return loss

    state = [*variables, optimizer.iterations, steps]
    return step, state


def numbers(state):
    return [v.numpy() for v in state]


def test_an_error_before_the_first_write_leaves_the_state():
    step, state = classifier()
    compiled = tg.function(step)
    x = tg.ones((3, 4), dtype="f8")
    for _ in range(4):
        compiled(x, LABELS)
    before = numbers([*state, tg.random.default_generator().counter])
    for wrong in (
        [0, 1, 3],
        [0, -1, 2],
        [200, 0, 0],
        [0, 2, 1 << 8],
        [-(1 << 63), 1, 0],
        [1 << 40, 1, 0],
    ):
        with pytest.raises(
            ValueError, match=r"\[label_cross_entropy.*\] labels must be from 0 to 2"
        ):
            compiled(x, tg.constant(wrong))
        assert_same(numbers([*state, tg.random.default_generator().counter]), before)
    compiled(x, LABELS)
    assert int(state[-1]) == 5


ERRORS = {
    "getitem": (lambda x, i: x[i], [0, 1], [0, 9]),
    "take": (lambda x, i: tg.take(x, i, axis=0), [0, 1], [0, 9]),
    "gather": (lambda x, i: tg.gather(x, i), [0, 1], [-9, 0]),
    "take_along_axis": (lambda x, i: tg.take_along_axis(x, i), [0, 1], [0, 9]),
    "labels": (lambda x, i: tg.nn.softmax_cross_entropy(x[None], i[:1]), [0, 1], [9, 0]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_eager_calls(name):
    function, good, bad = ERRORS[name]
    x = tg.constant([1.0, 2.0, 3.0])
    compiled = tg.function(function)
    for _ in range(3):
        compiled(x, tg.constant(good))
    with pytest.raises(Exception) as eager:
        function(x, tg.constant(bad))
    with pytest.raises(type(eager.value)) as replayed:
        compiled(x, tg.constant(bad))
    assert str(eager.value).split(" (got")[0].split("[")[1][:5] in str(replayed.value)
    assert_same(compiled(x, tg.constant(good)), function(x, tg.constant(good)))


# ---- errors after the first write


def torn():
    v, other = tg.Variable([1.0, 2.0], name="torn"), tg.Variable([1.0, 1.0])

    def step(x, labels):
        v.assign_add(x)
        loss = tg.nn.softmax_cross_entropy((v * 2.0)[None], labels)
        other.assign_sub(x)
        return loss

    compiled = tg.function(step)
    x = tg.constant([1.0, 1.0])
    for _ in range(3):
        compiled(x, tg.constant([0]))
    with pytest.raises(ValueError, match="labels must be from 0 to 1"):
        compiled(x, tg.constant([7]))
    return v, other, compiled, x


READS = {
    "numpy": lambda v: v.numpy(),
    "operator": lambda v: v + 1.0,
    "operation": lambda v: tg.sin(v),
    "index": lambda v: v[0],
    "asarray": lambda v: np.asarray(v),
    "repr": lambda v: repr(v),
    "assign_add": lambda v: v.assign_add([1.0, 1.0]),
    "slice": lambda v: v[0].assign(1.0),
    "shape": lambda v: v.shape,
    "float": lambda v: float(tg.sum(v)),
}


@pytest.mark.parametrize("name", READS)
def test_torn_variables_say_so(name):
    for v in torn()[:2]:
        with pytest.raises(RuntimeError, match=r"neither its old nor its new values.*failed while"):
            READS[name](v)


def test_a_compiled_call_on_torn_variables_says_so():
    _, _, compiled, x = torn()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="neither its old nor its new values"):
            compiled(x, tg.constant([0]))


def test_torn_variables_can_be_assigned_again():
    v, other, compiled, x = torn()
    v.assign([1.0, 2.0])
    other.assign([0.0, 0.0])
    np.testing.assert_array_equal(v + 0.0, [1.0, 2.0])
    compiled(x, tg.constant([0]))
    np.testing.assert_array_equal(v, [2.0, 3.0])
    np.testing.assert_array_equal(other, [-1.0, -1.0])


def test_other_variables_of_the_program_are_untouched_by_a_tear():
    read = tg.Variable([1.0, 2.0])
    v = tg.Variable([1.0, 2.0])

    def step(x, labels):
        v.assign_add(x * read)
        return tg.nn.softmax_cross_entropy(v[None], labels)

    compiled = tg.function(step)
    for _ in range(3):
        compiled(tg.ones(2), tg.constant([0]))
    with pytest.raises(ValueError, match="labels"):
        compiled(tg.ones(2), tg.constant([7]))
    np.testing.assert_array_equal(read, [1.0, 2.0])


# ---- Ctrl-C


@pytest.mark.parametrize("program", ["small", "large", "training", "once"])
def test_interrupts_never_tear_an_update(program):
    answer = subprocess.run(
        [sys.executable, "-m", "tests.function.interrupted", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=os.environ | {"TAPEGRAD_BACKEND": "numpy"},
    )
    assert answer.returncode == 0, answer.stderr


def test_a_handler_of_ones_own_is_called():
    v = tg.Variable([0.0])
    f = tg.function(lambda x: v.assign_add(x) * 1.0)
    called = []
    before = signal.signal(signal.SIGINT, lambda *arguments: called.append(arguments))
    try:
        for _ in range(5):
            signal.raise_signal(signal.SIGINT)
            f(tg.ones(1))
        own = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(called) == 5
    assert own is not before
    np.testing.assert_array_equal(v, [5.0])


def test_ignored_interrupts_stay_ignored():
    v = tg.Variable([0.0])
    f = tg.function(lambda x: v.assign_add(x) * 1.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(5):
            f(tg.ones(1))
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
