"""Reverse programs: the bits that interpreting gives, used where it can be, blind to no change."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapegrad as tg
from tapegrad import _reverse, _reverse_text
from tapegrad._recording import state
from tapegrad._structure import flatten
from tapegrad.ops import elementwise as ew
from tapegrad.primitive import MultiPrimitive, Primitive, primitives
from tapegrad.tensor import Operand, wrap
from tests.cases import CASES, Array, Case
from tests.function.programs import Training
from tests.function.test_operations import (
    ONE_ARGUMENT,
    SPECIAL,
    floating,
    groups,
    leaves,
    tensors,
)
from tests.test_properties import programs, run, seeds, tries, values

REPETITIONS = 3  # before a program answers: one is met, two are written down


class Count:
    """How many programs were compiled, and how many gradients they gave."""

    def __init__(self) -> None:
        self.compiled = 0
        self.hits = 0
        self.programs: list[weakref.ref[Any]] = []


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Begin without programs, and count in a `with` block."""
    count, before = Count(), (_reverse._shelves, _reverse._compiled)

    def compiled(text: str, space: dict[str, Any]) -> Any:
        program = before[1](text, space)
        count.compiled += 1
        count.programs.append(weakref.ref(program))

        def call(*arguments: Any) -> Any:
            answers = program(*arguments)
            count.hits += answers is not None
            return answers

        return call

    _reverse._shelves, _reverse._compiled = {}, compiled
    try:
        yield count
    finally:
        _reverse._shelves, _reverse._compiled = before


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let no program answer in a `with` block, and none be made."""
    _reverse.on = False
    try:
        yield
    finally:
        _reverse.on = True


def bits(result: Any) -> list[Any]:
    """Return all that there is to compare of a structure of gradients."""
    arrays = [x.numpy() if isinstance(x, Operand) else x for x in flatten(result)]
    return [
        (type(x), x.dtype, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x for x in arrays
    ]


def check(step: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> None:
    """Compare the calls of a step, which gives gradients, with what interpreting them gives."""
    for arguments in calls:
        with interpreted():
            want = bits(step(*arguments))
        assert bits(step(*arguments)) == want


# ---- all operations


def gradients_of(case: Case, lengths: list[int]) -> Callable[..., Any]:
    """Return a step: the gradients of a row's results, weighted, for all of its arguments.

    lengths  is told how many operations each tape has recorded.
    """

    def step(*arrays: Array) -> Any:
        xs = tensors(arrays)
        wanted = [x for x in xs if floating(x)]
        tg.random.seed(3)
        with tg.GradientTape() as tape:
            tape.watch(wanted)
            y = [part for part in leaves(case.call(*xs)) if floating(part)]
        lengths.append(len(tape._nodes) if y else 0)
        weights = [np.cos(k + np.arange(p.size)).reshape(p.shape) for k, p in enumerate(y)]
        return tape.gradient(
            y, wanted, [w.astype(p.dtype) for w, p in zip(weights, y, strict=True)]
        )

    return step


ROWS = [case for case in CASES if case.differentiable and any(map(floating, next(case.samples())))]


@pytest.mark.parametrize("case", ROWS, ids=[case.name for case in ROWS])
def test_every_operation(case: Case) -> None:
    lengths: list[int] = []
    step = gradients_of(case, lengths)
    for dtype in (np.float64, np.float32):
        for group in groups(case, dtype):
            with counted() as count:
                check(step, [group[0]] * REPETITIONS)
                before = count.hits
                check(step, group)
                # Some rows give their argument itself, or nothing of an empty one.
                assert count.hits == before + len(group) * (lengths[-1] > 0)


OF_ONE_ARGUMENT = [case for case in ONE_ARGUMENT if case.differentiable]


@pytest.mark.parametrize("case", OF_ONE_ARGUMENT, ids=[case.name for case in OF_ONE_ARGUMENT])
def test_special_values(case: Case) -> None:
    """Programs compiled at ordinary values: those that `scale` repairs come later."""

    def step(x: Any, upstream: float) -> Any:
        x = tg.constant(x)
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = case.call(x * 1.0)
        return tape.gradient(y, x, np.full(y.shape, upstream))

    with np.errstate(all="ignore"):
        for shape in ((), (1,)):
            with counted() as count:
                check(step, [(np.full(shape, 0.5), 1.0)] * REPETITIONS)
                calls = list(itertools.product(SPECIAL, (1.0, 0.0, math.inf, math.nan)))
                check(step, [(np.full(shape, x), upstream) for x, upstream in calls])
                assert count.hits == len(calls)


WRITTEN = list(_reverse_text.WRITTEN_OUT.items())


@pytest.mark.parametrize(("name", "text"), WRITTEN, ids=[name for name, _ in WRITTEN])
def test_what_is_written_out_is_the_meaning(name: str, text: str) -> None:
    meaning = primitives[name].forward
    count = meaning.__code__.co_argcount - 1
    operands: list[Any] = [2, 0.5, -3.0, SPECIAL, *SPECIAL]
    with np.errstate(all="ignore"):
        single = SPECIAL.astype("f4")
    operands += [single, *single]
    with np.errstate(all="ignore"):
        for given_ in itertools.product(operands, repeat=count):
            if all(type(x) in (int, float) for x in given_):
                continue  # constants
            got = eval(text.format(*(f"x[{i}]" for i in range(count))), {"x": given_})
            want = meaning(np, *given_)
            assert type(got) is type(want)
            assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


# ---- random programs


@settings(tries, max_examples=200)
@given(steps=programs(), seed=seeds, wanted=st.integers(1, 3))
def test_random_programs(steps: Any, seed: int, wanted: int) -> None:
    def step(k: int) -> Any:
        xs = [tg.constant(values((3, 3), seed + k)), tg.constant(values((1, 3), seed + k + 9))]
        with tg.GradientTape() as tape:
            tape.watch(xs)
            y = run(steps, 1, *xs)
        return tape.gradient(y, [x for i, x in enumerate(xs) if wanted >> i & 1])

    with counted() as count:
        check(step, [(k,) for k in range(6)])
        with interpreted():
            connected = all(g is not None for g in step(0))
        assert count.hits == 3 * connected


@pytest.mark.parametrize("seed", range(60))
def test_random_training(seed: int) -> None:
    mine, other = Training(seed), Training(seed)
    with counted() as count:
        got = mine.run(mine.step, 8)
    with interpreted():
        want = other.run(other.step, 8)
    assert bits(got) == bits(want), mine.describe()
    assert bits(mine.state()) == bits(other.state()), mine.describe()
    alone = {"nested", "penalty", "recompute", "jacobian"}.isdisjoint(mine.extras)
    assert count.hits >= 5 or not alone, mine.describe()


# ---- what may change from call to call, and must be noticed

Answer = Callable[[], Any]


def of(function: Callable[..., Any], *xs: Any, wanted: Any = None, **options: Any) -> Any:
    """Return the gradients of a function's result, by default for what it is given."""
    with tg.GradientTape(**options) as tape:
        for x in xs:
            if type(x) is not tg.Variable:
                tape.watch(x)
        y = function(*xs)
    return tape.gradient(y, list(xs) if wanted is None else wanted)


def slope(function: Callable[..., Any], x: Any) -> Any:
    """Return the gradient of a function of one argument."""
    return of(function, x)[0]


a, b, c = tg.Variable(1.5), tg.Variable(-0.5), tg.Variable(2.25)
v, w = tg.Variable([1.0, -2.0, 3.0]), tg.Variable([0.5, 0.25, -1.0])
m = tg.Variable(np.arange(9.0).reshape(3, 3) / 7)
frozen = tg.Variable(1.5, trainable=False)
p, q = tg.constant([0.5, 1.5, 2.5]), tg.constant([3.0, -1.0, 4.0])
mask, other_mask = np.array([True, False, True]), np.array([True, False, False])


def on_both_tapes(shared: bool) -> Any:
    """Let a tape see what another, that watches more, has made a node of."""
    with tg.GradientTape() as outer:
        if shared:
            outer.watch(p)
        with tg.GradientTape() as tape:
            y = v * p
    return tape.gradient(y, v)


def two_targets(which: int) -> Any:
    with tg.GradientTape() as tape:
        x = a * b
        y = x * c
        z = x * y
    return tape.gradient([x, y, z][which], [a, b])


def weighted(weights: Any, target: Any = None) -> Any:
    with tg.GradientTape() as tape:
        y = v * w
    return tape.gradient(y if target is None else [y, y], [v, w], weights)


def assigned_inside(value: float | None) -> Any:
    """Read a variable twice, with and without an assignment in between."""
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * a
        if value is not None:
            x.assign(value)
        z = y * x
    return tape.gradient(z, [x, a])


def in_anothers_place(value: float | None) -> Any:
    """Read a variable, then another that is no source, or the same with another value."""
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * 2.0
        if value is not None:
            x.assign(value)
        z = y * (c if value is None else x)
    return tape.gradient(z, x)


def not_a_source(place: str) -> Any:
    """Let a watched tensor that is no source stand where a source or a result stands."""
    x, t = tg.constant(2.0), tg.constant(5.0)
    with tg.GradientTape() as tape:
        tape.watch([x, t])
        y = x * 3.0
        z = y * {"other": t, "source": x, "result": y}[place]
    return tape.gradient(z, x)


def a_slice(kind: str) -> Any:
    with tg.GradientTape() as tape:
        part = v[0:2]
        tape.watch(part)
        y = tg.square(part)
    return tape.gradient(y, {"part": part, "whole": v, "both": [part, v]}[kind])


def a_watch(late: bool) -> Any:
    x = tg.constant([2.0, 3.0])
    with tg.GradientTape() as tape:
        tape.watch(p)
        if not late:
            tape.watch(x)
        y = p[0:2] * x
        tape.watch(x)
        z = y * x
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return tape.gradient(z, [x, p]), len(told)


def watched_by_two(late: bool) -> Any:
    with tg.GradientTape() as outer:
        outer.watch(p)
        with tg.GradientTape() as tape:
            if not late:
                tape.watch(p)
            y = v * p
            tape.watch(p)
            z = y * p
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tape.gradient(z, [v, p])


def numbers(values_: Any, dtype: Any = np.float32) -> Any:
    return tg.constant(np.asarray(values_, dtype))


# Each row: what is asked again and again, then what is like it, and whether a program may answer.
CHANGES: dict[str, tuple[Answer, Answer, bool]] = {
    "nothing": (lambda: of(ew._multiply, a, b), lambda: of(ew._multiply, a, b), True),
    "values": (lambda: of(tg.square, p), lambda: of(tg.square, q), True),
    "variables": (lambda: of(ew._multiply, a, b), lambda: of(ew._multiply, b, c), True),
    "layout": (
        lambda: of(tg.square, numbers(np.ones((2, 3)))),
        lambda: of(tg.square, wrap(np.arange(6.0, dtype="f4").reshape(3, 2).T)),
        True,
    ),
    "a setting": (
        lambda: of(lambda x: tg.sum(x, axis=0) * 2.0, m),
        lambda: of(lambda x: tg.sum(x, axis=1) * 2.0, m),
        False,
    ),
    "a setting's type": (
        lambda: of(lambda x: primitives["place_row"](x, index=1, count=2), v),
        lambda: of(lambda x: primitives["place_row"](x, index=True, count=2), v),
        False,
    ),
    "an index": (lambda: of(lambda x: x[0:2], v), lambda: of(lambda x: x[1:3], v), False),
    "a number": (lambda: of(lambda x: x**2, a), lambda: of(lambda x: x**3, a), False),
    "a number's type": (lambda: of(lambda x: x**2, a), lambda: of(lambda x: x**2.0, a), False),
    "a number's sign": (lambda: of(lambda x: x * 0.0, a), lambda: of(lambda x: x * -0.0, a), False),
    "an equal number": (
        lambda: of(lambda x: x * 0.5, a),
        lambda: of(lambda x: x * float("0.5"), a),
        True,
    ),
    "not a number": (
        lambda: of(lambda x: x * 0.5, a),
        lambda: of(lambda x: x * math.nan, a),
        False,
    ),
    "a number for a tensor": (
        lambda: of(lambda x: x * tg.constant(2.0), a),
        lambda: of(lambda x: x * 2.0, a),
        False,
    ),
    "shape": (lambda: of(tg.square, numbers([1, 2])), lambda: of(tg.square, p), False),
    "rank": (lambda: of(tg.square, numbers(2)), lambda: of(tg.square, numbers([2])), False),
    "a shape that is broadcast": (
        lambda: of(ew._multiply, numbers([1, 2, 3]), numbers([2, 3, 4])),
        lambda: of(ew._multiply, numbers([1, 2, 3]), numbers([2])),
        False,
    ),
    "the shape of what no rule reads": (
        lambda: of(ew._add, numbers([1, 2, 3]), numbers([2, 3, 4])),
        lambda: of(ew._add, numbers([1, 2, 3]), numbers([2])),
        False,
    ),
    "dtype": (
        lambda: of(tg.square, numbers([1, 2])),
        lambda: of(tg.square, numbers([1, 2], "f8")),
        False,
    ),
    "an equal dtype": (
        lambda: of(tg.square, p),
        lambda: of(tg.square, wrap(pickle.loads(pickle.dumps(p.numpy())))),
        True,
    ),
    "the order of a number's bytes": (
        lambda: of(tg.square, p),
        lambda: of(tg.square, wrap(p.numpy().astype(">f4"))),
        False,
    ),
    "the dtype of a scalar": (
        lambda: of(tg.square, numbers(2)),
        lambda: of(tg.square, numbers(2, "f8")),
        False,
    ),
    "the dtype of what no rule reads": (
        lambda: of(ew._add, numbers([1, 2]), numbers([2, 3])),
        lambda: of(ew._add, numbers([1, 2]), numbers([2, 3], "f8")),
        False,
    ),
    "the dtype of a constant": (
        lambda: of(lambda x: x * numbers([2, 3, 4]), v),
        lambda: of(lambda x: x * numbers([2, 3, 4], "f8"), v),
        False,
    ),
    "how many a mask chooses": (
        lambda: of(lambda x: tg.square(x)[mask] * 2.0, v),
        lambda: of(lambda x: tg.square(x)[other_mask] * 2.0, v),
        False,
    ),
    "how many a mask leaves to a sum": (
        lambda: of(lambda x: tg.sum(tg.square(x)[other_mask]), v),
        lambda: of(lambda x: tg.sum(tg.square(x)[mask]), v),
        False,
    ),
    "which a mask chooses": (
        lambda: of(lambda x: tg.square(x)[mask] * 2.0, v),
        lambda: of(lambda x: tg.square(x)[~other_mask] * 2.0, v),
        True,
    ),
    "the operation": (lambda: of(ew._add, a, b), lambda: of(ew._multiply, a, b), False),
    "an operation inside": (
        lambda: of(lambda x: tg.exp(x) * 2.0, a),
        lambda: of(lambda x: tg.sin(x) * 2.0, a),
        False,
    ),
    "which result is used": (
        lambda: of(lambda x: (tg.exp(x) + 0 * tg.sin(x)) * 2.0, a),
        lambda: of(lambda x: (0 * tg.exp(x) + tg.sin(x)) * 2.0, a),
        False,
    ),
    "wiring": (
        lambda: of(lambda x, y: (x * y) * x, a, b),
        lambda: of(lambda x, y: (x * y) * y, a, b),
        False,
    ),
    "wiring of what no rule reads": (
        lambda: of(lambda x, y: (x + y) + x, v, w),
        lambda: of(lambda x, y: (x + y) + y, v, w),
        False,
    ),
    "one leaf for two": (
        lambda: of(lambda x, y: x * y, a, b),
        lambda: of(lambda x, y: x * x, a, b),
        False,
    ),
    "the same leaf twice": (
        lambda: of(ew._multiply, a, b),
        lambda: of(lambda x: x * x, a, wanted=[a, a]),
        False,
    ),
    "a result for a leaf": (
        lambda: of(lambda x, y: (x * 2.0) * y, a, b),
        lambda: of(lambda x, y: (x * 2.0) * (x * 2.0), a, b),
        False,
    ),
    "a leaf for a result": (
        lambda: of(lambda x, y: (x * 2.0) * y, a, b, wanted=[a]),
        lambda: of(lambda x, y: x * y + 0 * a * 1.0, a, b, wanted=[a]),
        False,
    ),
    "no source for another": (
        lambda: not_a_source("other"),
        lambda: not_a_source("source"),
        False,
    ),
    "no source for a result": (
        lambda: not_a_source("other"),
        lambda: not_a_source("result"),
        False,
    ),
    "a variable that is no source": (
        lambda: of(lambda: a * b * c, wanted=[a, b]),
        lambda: of(lambda: a * b * a, wanted=[a, b]),
        False,
    ),
    "constants that were one": (
        lambda: of(lambda x: (x * p) * p, v),
        lambda: of(lambda x: (x * p) * q, v),
        False,
    ),
    "constants that become one": (
        lambda: of(lambda x: (x * p) * q, v),
        lambda: of(lambda x: (x * q) * q, v),
        True,
    ),
    "a constant for a leaf": (
        lambda: of(lambda x, y: x * y, a, b, wanted=[a]),
        lambda: of(lambda x, y: x * tg.constant(-0.5), a, b, wanted=[a]),
        False,
    ),
    "a leaf for a constant": (
        lambda: of(lambda x: x * tg.constant(-0.5), a),
        lambda: of(lambda x: x * x, a),
        False,
    ),
    "what another tape watches": (lambda: on_both_tapes(False), lambda: on_both_tapes(True), False),
    "order of sources": (
        lambda: of(ew._divide, a, b, wanted=[a, b]),
        lambda: of(ew._divide, a, b, wanted=[b, a]),
        False,
    ),
    "fewer sources": (
        lambda: of(ew._divide, a, b),
        lambda: of(ew._divide, a, b, wanted=[a]),
        False,
    ),
    "no sources": (
        lambda: of(ew._divide, a, b, wanted=[]),
        lambda: of(ew._divide, a, b),
        False,
    ),
    "more sources": (
        lambda: of(ew._divide, a, b, wanted=[b]),
        lambda: of(ew._divide, a, b, wanted=[b, a]),
        False,
    ),
    "a source twice": (
        lambda: of(ew._divide, a, b, wanted=[a, b]),
        lambda: of(ew._divide, a, b, wanted=[a, a]),
        False,
    ),
    "always a source twice": (
        lambda: of(ew._divide, a, b, wanted=[a, b, a]),
        lambda: of(ew._divide, b, c, wanted=[b, c, b]),
        True,
    ),
    "structure of the sources": (
        lambda: of(ew._divide, a, b, wanted=[a, b]),
        lambda: of(ew._divide, a, b, wanted={"x": a, "y": (b,)}),
        True,
    ),
    "an unconnected source": (
        lambda: of(ew._divide, a, b, wanted=[a, b]),
        lambda: of(ew._divide, a, b, wanted=[a, c]),
        False,
    ),
    "a source that was read in vain": (
        lambda: of(lambda x, y: x * y, a, b, wanted=[a, b]),
        lambda: of(lambda x, y: [x * y, c._read()][0], a, b, wanted=[a, c]),
        False,
    ),
    "an integer source": (
        lambda: of(ew._divide, a, b, wanted=[a, b]),
        lambda: of(ew._divide, a, b, wanted=[a, tg.Variable(3)]),
        False,
    ),
    "a source that is a result": (
        lambda: of(lambda x: tg.exp(x) * 2.0, p),
        lambda: (lambda y: of(lambda x: x * 2.0, y))(tg.exp(p)),
        False,
    ),
    "not trainable": (
        lambda: of(lambda x: x * b, a, wanted=[a, b]),
        lambda: of(lambda x: x * b, frozen, wanted=[frozen, b]),
        False,
    ),
    "assigned between two reads": (
        lambda: assigned_inside(None),
        lambda: assigned_inside(7.0),
        False,
    ),
    "assigned, and read in another's place": (
        lambda: in_anothers_place(None),
        lambda: in_anothers_place(7.0),
        False,
    ),
    "another target": (lambda: two_targets(2), lambda: two_targets(1), False),
    "a target in the middle": (lambda: two_targets(0), lambda: two_targets(2), False),
    "a part of a variable": (lambda: a_slice("part"), lambda: a_slice("whole"), False),
    "two ways to a variable": (lambda: a_slice("both"), lambda: a_slice("part"), False),
    "weights": (
        lambda: weighted(numbers([1, 2, 3])),
        lambda: weighted(numbers([0, math.inf, math.nan])),
        True,
    ),
    "no weights": (lambda: weighted(numbers([1, 2, 3])), lambda: weighted(None), False),
    "weights at last": (lambda: weighted(None), lambda: weighted(numbers([1, 2, 3])), False),
    "two weights": (
        lambda: weighted([numbers([1, 2, 3]), None], 2),
        lambda: weighted([None, numbers([1, 2, 3])], 2),
        False,
    ),
    "watched too late": (lambda: a_watch(False), lambda: a_watch(True), False),
    "watched too late, by another tape in time": (
        lambda: watched_by_two(False),
        lambda: watched_by_two(True),
        False,
    ),
    "infinite factors": (
        lambda: of(lambda x: tg.log(x) * 0.0, numbers(2.0)),
        lambda: of(lambda x: tg.log(x) * 0.0, numbers(0.0)),
        True,
    ),
    "a product that is not a number": (
        lambda: of(lambda x: tg.sqrt(x) * x, numbers([2.0, 3.0])),
        lambda: of(lambda x: tg.sqrt(x) * x, numbers([0.0, math.nan])),
        True,
    ),
}


@pytest.mark.parametrize("row", CHANGES.values(), ids=list(CHANGES))
def test_changes_are_noticed(row: tuple[Answer, Answer, bool]) -> None:
    usual, changed, answered = row
    with np.errstate(all="ignore"):
        with interpreted():
            want, want_changed = bits(usual()), bits(changed())
        with counted() as count:
            for _ in range(REPETITIONS + 2):
                assert bits(usual()) == want
            assert count.hits == 2
            assert bits(changed()) == want_changed
            assert count.hits == 2 + answered
            assert bits(usual()) == want
            assert count.hits == 3 + answered
            for _ in range(REPETITIONS + 2):  # with a program of its own, if there can be one
                assert bits(changed()) == want_changed
                assert bits(usual()) == want


# ---- what cannot be written down


def enter(monkeypatch: pytest.MonkeyPatch, name: str, *rest: Any, **options: Any) -> Any:
    """Make a primitive and enter it in the table for the time of a test."""
    kind = MultiPrimitive if options.pop("several", False) else Primitive
    made = kind(name, *rest, **options)
    monkeypatch.setitem(primitives, name, made)
    return made


def test_a_gradient_of_the_users_own_runs_each_time() -> None:
    calls = []

    @tg.custom_gradient
    def custom(x: Any) -> Any:
        def grad(upstream: Any) -> Any:
            calls.append(1)
            return upstream * float(len(calls))

        return x * 1.0, grad

    with counted() as count:
        for function in (custom, lambda x: custom(x) * 2.0):
            got = [float(slope(function, a)) for _ in range(6)]
            assert got == [got[0] * (i + len(calls) - 5) / (len(calls) - 5) for i in range(6)]
        assert (len(calls), count.compiled) == (12, 0)
        assert all(_reverse_text.can_be_replayed(key[1]) for key in _reverse._shelves)


def test_a_gradient_of_the_users_own_runs_whenever_a_tape_is_asked() -> None:
    calls = []

    @tg.custom_gradient
    def custom(x: Any) -> Any:
        return x * 1.0, lambda upstream: [upstream * 2.0, calls.append(1)][0]

    with counted() as count:
        with tg.GradientTape(persistent=True) as tape:
            y = custom(a) * 2.0
        for k in range(6):
            assert float(tape.gradient(y, a)) == 4.0
            assert len(calls) == k + 1
        assert count.compiled == 0


def test_a_function_that_is_run_again_is() -> None:
    calls = []

    @tg.recompute_grad
    def again(x: Any) -> Any:
        calls.append(1)
        return tg.exp(x) * a

    with counted() as count:
        for k in range(6):
            x = tg.constant(float(k))
            dx, da = of(lambda x: again(x) * 1.0, x, wanted=[x, a])
            assert float(dx) == float(np.exp(np.float32(k)) * np.float32(1.5))
            assert float(da) == float(np.exp(np.float32(k)))
        assert len(calls) == 12
        assert count.compiled <= 1  # the pass inside may be, which is of library's operations


counter, generator = tg.Variable(0.0), tg.random.Generator(5)
kept: list[Any] = []
# Rules that are no functions of types, shapes and settings alone.
HEARD: dict[str, Callable[..., Any]] = {
    "reads a variable": lambda g, _y, _x: g * counter,
    "writes a variable": lambda g, _y, _x: [g * 2.0, counter.assign_add(1.0)][0],
    "makes a variable": lambda g, _y, _x: [g * 2.0, tg.Variable(1.0)][0],
    "looks at a value": lambda g, _y, x: g * 2.0 if float(x) > 0.5 else g,
    "looks by an if": lambda g, _y, x: g * 2.0 if x > 0.5 else g,
    "copies": lambda g, _y, x: g * tg.constant(x),
    "draws": lambda g, _y, _x: g * generator.uniform(()),
    "prints": lambda g, _y, x: [g * x, tg.print(x)][0],
    "calls what is not in the table": lambda g, _y, _x: Primitive(
        "twice", lambda xp, x: x * 2, None
    )(g),
}
CHANGING: dict[str, Callable[..., Any]] = {
    "a number": lambda g, _y, _x: g * float(len(kept)),
    "a constant": lambda g, _y, _x: g * tg.constant(np.float32(len(kept))),
}


def run_each_time(
    rule: Callable[..., Any], steps: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare gradients with those of interpreting while what the rule sees takes these steps."""
    runs: list[int] = []

    def counting(g: Any, y: Any, x: Any) -> Any:
        runs.append(1)
        return rule(g, y, x)

    made = enter(monkeypatch, "odd", lambda xp, x: x * 1, counting)
    with counted() as count:
        for k in steps:
            found = []
            for on in (False, True):
                monkeypatch.setattr(_reverse, "on", on)
                counter.assign(float(k + 1))
                generator.counter.assign(np.full((), k, generator.counter.dtype))
                kept[:] = [1] * k
                found.append(bits(slope(lambda x: made(x) * 1.0, tg.constant(k / 4))))
            assert found[0] == found[1]
        assert len(runs) == 2 * len(steps)
        assert count.compiled == 0


@pytest.mark.parametrize("rule", HEARD.values(), ids=list(HEARD))
def test_rules_that_must_run_each_time(
    rule: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they see is for a while the same: only by being heard are they known."""
    run_each_time(rule, [1, 1, 1, 1, 1, 2, 3, 4], monkeypatch)


@pytest.mark.parametrize("rule", CHANGING.values(), ids=list(CHANGING))
def test_rules_with_another_constant_each_time(
    rule: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_each_time(rule, [1, 2, 3, 4, 5, 6], monkeypatch)


def test_a_rule_that_knows_a_tensor_of_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another way than its node, which keeps no values of it."""
    made = enter(monkeypatch, "odd", lambda xp, x: x * 1, lambda g, _y, _x: g * kept[0])
    with counted() as count:
        for k in (1.0, 1.0, 1.0, 1.0, 2.0):
            x = tg.constant([k])
            kept[:] = [x]
            assert slope(lambda x: made(x) * 1.0, x).tolist() == [k]
        assert count.compiled == 0


def test_a_rule_that_knows_a_variables_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps it when the variable changes."""
    x = tg.Variable([2.0, 3.0])
    value = x._read()
    made = enter(monkeypatch, "odd", lambda xp, x: x * 1, lambda g, _y, _x: g * value)
    with counted() as count:
        for k in range(6):
            if k == 5:
                x.assign([0.0, 0.0])
            assert slope(lambda x: made(x) * x, numbers([1, 1])).tolist() == [3.0, 4.0]
        assert count.compiled == 0


def test_a_setting_that_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = enter(
        monkeypatch,
        "odd",
        lambda xp, x, *, factor=1.0: x * factor,
        lambda g, _y, _x, *, factor=1.0: g * factor,
    )
    with counted() as count:
        for settings in ({}, {}, {}, {}, {"factor": 2.0}, {}):
            got = slope(lambda x, settings=settings: made(x, **settings), a)
            assert float(got) == settings.get("factor", 1.0)
        assert count.hits == 2


def test_a_setting_that_is_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change in its place: no comparison would tell."""
    made = enter(
        monkeypatch,
        "odd",
        lambda xp, x, *, table: x * table[0],
        lambda g, _y, _x, *, table: g * float(table[0]),
    )
    table = np.ones(1)
    with counted() as count:
        for k in (1.0, 1.0, 1.0, 1.0, 2.0):
            table[0] = k
            assert float(slope(lambda x: made(x, table=table), a)) == k
        assert count.compiled == 0


def test_targets_that_are_no_results() -> None:
    def step(which: str) -> Any:
        with tg.GradientTape() as tape:
            y = a * b
            z = y * 2.0
        others = {"constant": p, "variable": a, "integer": tg.astype(y, np.int64), "result": y}
        return tape.gradient([z, others[which]], [a, b])

    for which in ("constant", "variable", "integer"):
        with counted() as count:
            check(step, [(which,)] * (REPETITIONS + 1) + [("result",), ("variable",), (which,)])
            assert count.hits == 0


def test_a_rule_whose_numbers_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts, or two constants of one text, in turns: never what the last one was."""
    made = enter(
        monkeypatch, "odd", lambda xp, x: x * 1, lambda g, _y, _x: g * tg.constant(float(k % 2))
    )
    with counted() as count:
        for k in range(10):
            assert float(slope(lambda x: made(x) * 1.0, a)) == k % 2
        assert count.compiled == 0


# ---- errors


def test_errors_are_those_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(xp: Any, g: Any, x: Any) -> Any:
        if x < 0:
            raise ValueError("x must not be negative")
        return g * x

    grad = enter(monkeypatch, "fussy_grad", forward, None, None)
    fussy = enter(monkeypatch, "fussy", lambda xp, x: x * x / 2, lambda g, _y, x: grad(g, x))

    def fail() -> tuple[Any, ...]:
        x = tg.constant(-1.0)
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = fussy(x) * 2.0
        with pytest.raises(ValueError, match="must not be negative") as caught:
            tape.gradient(y, x)
        with pytest.raises(RuntimeError) as again:
            tape.gradient(y, x)
        errors = caught.value, again.value
        return tuple((type(e), str(e), e.__notes__) for e in errors), len(tape._nodes)

    with interpreted():
        want = fail()
    assert "raised in the gradient of fussy" in want[0][0][2]
    with counted() as count:
        for _ in range(REPETITIONS + 1):
            assert float(slope(lambda x: fussy(x) * 2.0, tg.constant(3.0))) == 6.0
        assert count.hits == 1
        assert fail() == want
        assert float(slope(lambda x: fussy(x) * 2.0, tg.constant(3.0))) == 6.0
        assert count.hits == 2


def test_a_program_that_is_interrupted_is_an_interrupted_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(xp: Any, g: Any, x: Any) -> Any:
        if x < 0:
            raise KeyboardInterrupt
        return g * x

    grad = enter(monkeypatch, "slow_grad", forward, None, None)
    slow = enter(monkeypatch, "slow", lambda xp, x: x * x / 2, lambda g, _y, x: grad(g, x))
    with counted() as count:
        for _ in range(REPETITIONS + 1):
            of(lambda x: slow(x) * 2.0, tg.constant(3.0))
        assert count.hits == 1
        with pytest.raises(KeyboardInterrupt):
            of(lambda x: slow(x) * 2.0, tg.constant(-3.0))
        assert state.recorders == []


def test_an_error_while_it_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(g: Any, _y: Any, x: Any) -> Any:
        raise ZeroDivisionError

    made = enter(monkeypatch, "failing", lambda xp, x: x * 1, rule)
    with counted() as count:
        for _ in range(REPETITIONS + 2):
            with pytest.raises(ZeroDivisionError):
                of(lambda x: made(x) * 1.0, a)
            assert state.recorders == []
        assert count.compiled == 0


# ---- tapes


def ready(count: Count, step: Callable[..., Any], *arguments: Any) -> None:
    """Call a step until it is answered by a program."""
    for _ in range(REPETITIONS + 1):
        step(*arguments)
    assert count.hits > 0


def test_the_tape_is_used_up_as_ever() -> None:
    def use() -> tuple[Any, ...]:
        with tg.GradientTape() as tape:
            y = v * w * c
        tape.gradient(y, [v, w, c])
        with pytest.raises(RuntimeError) as caught:
            tape.gradient(y, v)
        return str(caught.value), caught.value.__notes__, tape.watched_variables(), repr(tape)

    with interpreted():
        want = use()
    with counted() as count:
        ready(count, use)
        assert use() == want
        assert count.hits == 2


def test_a_tape_is_asked_in_its_own_block() -> None:
    def step() -> Any:
        with tg.GradientTape() as tape:
            y = v * w
            found = tape.gradient(y, [v, w])
            assert tape._nodes == []
            y = y * v
        assert tape._nodes == []
        return found

    with counted() as count:
        check(step, [()] * 6)
        assert count.hits == 3


def test_a_persistent_tape() -> None:
    def step() -> Any:
        with tg.GradientTape(persistent=True) as tape:
            y = v * w
            z = tg.sum(y * v)
        return [tape.gradient(t, s) for t in (y, z) for s in (v, [w, v], y)], len(tape._nodes)

    with counted() as count:
        check(step, [()] * 6)
        assert count.compiled == 6
        assert count.hits >= 15


def test_a_source_that_is_the_target() -> None:
    def step(x: Any) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = tg.square(x)
        return tape.gradient(y, [y, x])

    with counted() as count:
        check(step, [(numbers(k),) for k in range(6)])
        assert count.hits == 3


def test_an_inner_tape_is_seen_by_the_outer_one() -> None:
    def step(x: Any) -> Any:
        with tg.GradientTape() as outer:
            outer.watch(x)
            with tg.GradientTape() as inner:
                inner.watch(x)
                y = x * x * x
            slope = inner.gradient(y, x)
        return slope, outer.gradient(slope, x)

    with counted() as count:
        for k in range(8):
            slope, second = step(tg.constant(float(k)))
            assert (float(slope), float(second)) == (3.0 * k * k, 6.0 * k)
        assert count.hits == 5  # the outer ones


def test_a_compiled_function_sees_the_whole_reverse_pass() -> None:
    def step(x: Any) -> Any:
        return slope(lambda x: tg.square(x) * v, x)

    with counted() as count:
        ready(count, step, p)
        hits = count.hits
        compiled = tg.function(step)
        for k in range(4):
            x = numbers([k, 2 * k, 3 * k])
            np.testing.assert_array_equal(compiled(x), 2 * x.numpy() * v.numpy())
        assert count.hits == hits


def test_where_arrays_may_be_cupys_rules_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted() as count:
        ready(count, of, ew._multiply, v, w)
        hits = count.hits
        monkeypatch.setattr(tg._backend, "numpy_alone", False)
        of(ew._multiply, v, w)
        assert count.hits == hits


def test_jacobians_are_as_ever() -> None:
    def jacobian(x: Any) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
        return tape.jacobian(y, x)

    with counted() as count:
        for _ in range(6):
            np.testing.assert_array_equal(jacobian(p), np.diag(2 * p.numpy()))
        assert (count.compiled, _reverse._shelves) == (0, {})


def test_unconnected_gradients() -> None:
    def step(unconnected: str) -> Any:
        with tg.GradientTape() as tape:
            y = a * b
        return tape.gradient(y, [a, b], unconnected_gradients=unconnected)

    def other() -> Any:
        with tg.GradientTape() as tape:
            y = a * b
        return tape.gradient(y, [a, b, c], unconnected_gradients="zero")

    with counted() as count:
        check(step, [("none",), ("zero",), ("raise",)] * 3)
        assert count.hits == 6
        check(other, [()] * 5)
        assert count.hits == 6


def test_answers_are_tensors_of_their_own() -> None:
    def step() -> Any:
        return of(lambda: v + w, wanted=[v, w])

    with counted() as count:
        ready(count, step)
        found = step()
        assert found[0].id == found[1].id != step()[0].id  # as interpreted: g for both
        assert all(type(g) is tg.Tensor for g in found)


def test_an_answer_that_shows_a_variables_memory() -> None:
    """The gradient of sum(v * x) for x is v's value: it stays what it was when v changes."""
    x = tg.Variable([1.0, 2.0, 3.0])
    other = tg.Variable([4.0, 5.0, 6.0])

    def step() -> Any:
        return of(lambda: tg.sum(x * other), wanted=x)

    with counted() as count:
        ready(count, step)
        before = other.numpy()
        g = step()
        other.assign([0.0, 0.0, 0.0])
        np.testing.assert_array_equal(g, before)


# ---- threads, bounds, memory


def test_threads() -> None:
    start, before = threading.Barrier(6), sys.getswitchinterval()
    wrong: list[Any] = []

    def work(k: int) -> None:
        own = tg.Variable(np.float32(k))
        start.wait(timeout=10)
        for i in range(60):
            x = tg.constant(np.full(2 + i % 3, k + 1, "f4"))
            with tg.GradientTape() as tape:
                tape.watch(x)
                y = x * x * own
            dx, down = tape.gradient(y, [x, own])
            if not (
                np.array_equal(dx.numpy(), np.full(2 + i % 3, 2 * (k + 1) * k, "f4"))
                and float(down) == (2 + i % 3) * (k + 1) ** 2
            ):
                wrong.append((k, i))

    sys.setswitchinterval(1e-6)
    try:
        with counted() as count:
            threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=60)
            assert wrong == []
            assert count.hits > 100
            assert all(
                len(s.programs) <= _reverse._MOST_PROGRAMS for s in _reverse._shelves.values()
            )
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note each reverse pass that is written down."""
    made: list[int] = []
    init = _reverse_text.Recording.__init__

    def noted(self: Any, *arguments: Any) -> None:
        made.append(1)
        init(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_reverse_text.Recording, "__init__", noted)
        yield made


def test_forms_that_never_come_back_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted() as count, recordings(monkeypatch) as made:
        for k in range(200):  # numbers that stand in the text
            assert float(slope(lambda x, k=k: (x * (k + 0.5)) * x, a)) == 3.0 * (k + 0.5)
        assert len(made) == _reverse._MOST_RECORDINGS
        assert count.compiled == 0
        (shelf,) = _reverse._shelves.values()
        assert len(shelf.written) <= _reverse._MOST_PROGRAMS
        for k in range(_reverse._MOST_MISSES - 200):
            of(lambda x, k=k: (x * (k + 0.25)) * x, a)
        for _ in range(REPETITIONS + 2):  # and everything begins anew
            of(lambda x: (x * 0.125) * x, a)
        assert (count.compiled, count.hits) == (1, 2)


def test_so_many_programs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    most = _reverse._MOST_PROGRAMS
    with counted() as count, recordings(monkeypatch) as made:
        for k in range(2 * most):
            for _ in range(4):
                assert float(slope(lambda x, k=k: x * (k + 0.5), a)) == k + 0.5
        assert count.compiled == most
        assert len(made) == 2 * most
        (shelf,) = _reverse._shelves.values()
        assert len(shelf.programs) == most


def test_programs_used_last_are_asked_first() -> None:
    with counted() as count:
        for k in (1.5, 2.5):
            ready(count, lambda k=k: of(lambda x: x * k, a))
        (shelf,) = _reverse._shelves.values()
        first, second = shelf.programs
        of(lambda x: x * 1.5, a)
        assert shelf.programs == (second, first)


def test_so_many_shelves_and_no_more() -> None:
    most = _reverse._MOST_SHELVES
    with counted():
        for k in range(1, most + 10):
            x: Any = a
            with tg.GradientTape() as tape:
                for _ in range(k):
                    x = x * 0.5
            tape.gradient(x, a)
            assert len(_reverse._shelves) == (k - 1) % most + 1


@pytest.mark.parametrize("kind", ["values", "results", "constants", "nodes"])
def test_large_tapes_are_interpreted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For them memory counts, and what is computed."""
    written: list[int] = []
    monkeypatch.setattr(_reverse_text.Recording, "finished", lambda *_: written.append(1))
    large = np.ones(_reverse_text.MOST_BYTES // 4 // (1 if kind != "constants" else 8) + 1, "f4")
    x = tg.constant(large if kind in ("values", "constants") else [1.0])

    def step(nodes: int) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = x
            if kind == "results":
                y = tg.broadcast_to(y, large.shape)
            for _ in range(nodes):
                y = y * 1.0 if kind != "values" else tg.square(y)
            if kind == "values":
                y = tg.sum(y)
        return tape.gradient(y, x)

    with counted() as count:
        for _ in range(5):
            step(_reverse._MOST_NODES + 1 if kind == "nodes" else 1)
        assert count.compiled == 0
        # While it writes, a recording keeps the values: of large tapes it does not begin.
        assert len(written) == (4 if kind in ("results", "constants") else 0)


def test_nothing_of_the_users_is_kept() -> None:
    gc.disable()
    try:
        with counted() as count:

            def step(*, late: bool) -> list[Any]:
                x, own = wrap(np.arange(3.0, dtype="f4")), tg.Variable([1.0, 2.0, 3.0])
                weight = tg.constant([1.0, 2.0, 1.0])
                with tg.GradientTape() as tape:
                    y = tg.exp(x * own) * x
                found = tape.gradient(y, own, weight)
                things = [x, own, weight, y, tape, found, x._array, own._array, y._array]
                return [weakref.ref(thing) for thing in things]

            for _ in range(REPETITIONS + 2):
                assert [ref() for ref in step(late=False)] == [None] * 9
            assert count.hits == 2
            assert [ref() is None for ref in count.programs] == [False]
            _reverse._shelves.clear()
            assert [ref() is None for ref in count.programs] == [True]  # not even by themselves
    finally:
        gc.enable()


def test_the_operations_are_let_go_of() -> None:
    gc.disable()
    try:
        with counted() as count:
            for _ in range(REPETITIONS + 2):
                with tg.GradientTape() as tape:
                    inner = tg.exp(v)
                    y = tg.exp(inner)
                ref = weakref.ref(inner)
                del inner
                assert ref() is not None
                tape.gradient(y, v)
                assert ref() is None
            assert count.hits == 2
    finally:
        gc.enable()
