"""Which calls share a program: structure, shapes, types, Python values, objects, surroundings."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import math
import pickle
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._structure import flatten
from tapegrad.errors import FunctionError, TapeWarning
from tests.function.compiled import assert_same

X = tg.constant([1.0, 2.0])
Y = tg.constant([3.0, 5.0])


class Counted:
    """A compiled function, and how often its Python text ran."""

    def __init__(self, function, **options):
        self.runs = 0
        self.plain = function

        def counting(*args, **kwargs):
            self.runs += 1
            return function(*args, **kwargs)

        self.compiled = tg.function(counting, **options)

    def __call__(self, *args, **kwargs):
        got = self.compiled(*args, **kwargs)
        assert_same(got, self.plain(*args, **kwargs))
        return got

    def is_replayed(self, *args, **kwargs):
        """Call, check the result, and tell whether no Python text was needed."""
        before = self.runs
        self(*args, **kwargs)
        return self.runs == before


class Point(NamedTuple):
    a: Any
    b: Any


@dataclass
class Batch:
    x: Any
    label: Any = None


# Pairs of arguments that need programs of their own.
DIFFERENT = [
    ((X,), (tg.constant([1.0, 2.0, 3.0]),)),
    ((X,), (tg.constant([[1.0, 2.0]]),)),
    ((X,), (tg.constant([1.0, 2.0], dtype="float64"),)),
    ((X,), (tg.constant([1, 2]),)),
    (([X],), ([tg.constant([1.0, 2.0], dtype="float64")],)),
    (({"a": X},), ({"a": tg.constant([[1.0, 2.0]])},)),
    ((np.ones(2),), (np.ones(2, "f4"),)),
    ((X,), ([X],)),
    ((X, Y), ([X, Y],)),
    (([X, Y], 3.0), (X, Y)),
    (([X, Y],), ((X, Y),)),
    (([[X], []],), ([[X, []]],)),
    (([[]], X), ([], [], X)),
    ((Point([X], Y),), (Point(X, [Y]),)),
    ((Point(X, Y),), ((X, Y),)),
    ((Batch([X], Y),), (Batch(X, [Y]),)),
    ((Batch(X),), (Batch(X, Y),)),
    (({"a": X},), ({"b": X},)),
    ((collections.UserDict(a=X),), (collections.UserDict(b=X),)),
    (({"a": X, "b": Y},), ({"b": Y, "a": X},)),
    (({1: X},), ({True: X},)),
    (({0.0: X},), ({-0.0: X},)),
    (({("a", 2): X},), ({("a", 2.0): X},)),
    ((collections.UserDict({1: X}),), (collections.UserDict({1.0: X}),)),
    ((X, 1), (X, 2)),
    ((X, 1), (X, 1.0)),
    ((X, 1), (X, True)),
    ((X, 0), (X, None)),
    ((X, 0.0), (X, -0.0)),
    ((X, 0.0), (X, 0)),
    ((X, 1.0), (X, math.nan)),
    ((X, "a"), (X, "b")),
    ((X, b"a"), (X, "a")),
    ((X, len), (X, abs)),
    ((X, 1), (X, 1, 1)),
    ((X, None), (X, True)),
    ((X, True), (X, False)),
    ((X, None), (X,)),
    ((X,), (X, None)),
    ((np.ones(2), X), (np.ones(3), X)),
    ((np.ones(2), X), (X, np.ones(2))),
    ((X, np.float32), (X, np.float64)),
]


def describe(x: Any) -> Any:
    """Return what a program could not tell apart if two structures shared one."""
    if isinstance(x, (tg.Tensor, tg.Variable, np.ndarray)):
        return f"{x.dtype}{x.shape}"
    if isinstance(x, (list, tuple)):
        return f"{type(x).__name__}({','.join(map(describe, x))})"
    if isinstance(x, (dict, collections.UserDict)):
        return f"{type(x).__name__}({','.join(f'{k}={describe(v)}' for k, v in x.items())})"
    if isinstance(x, Batch):
        return f"Batch({describe(x.x)},{describe(x.label)})"
    return repr(x)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_what_differs_has_programs_of_its_own(first, second):
    f = Counted(lambda *args: describe(args))
    for _ in range(3):
        f(*first)
    for _ in range(3):
        f(*second)
    assert len(f.compiled.programs) == 2
    assert f.is_replayed(*first)
    assert f.is_replayed(*second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((X,), (Y,)),
        (([X, 2],), ([Y, 2],)),
        ((X, math.nan), (Y, float("nan"))),
        (({"a": X, "b": [Y]},), ({"a": Y, "b": [X]},)),
        ((X,), (np.array([7.0, 8.0], "f4"),)),
        ((X,), (tg.constant(np.arange(4.0, dtype="f4"))[::2],)),  # layouts share a program
        ((np.float64(1.0),), (np.float64(2.0),)),
        ((Batch(X, "s"),), (Batch(Y, "s"),)),
        ((Point(X, (Y, None)),), (Point(Y, (X, None)),)),
    ],
)
def test_what_differs_in_values_of_tensors_alone_shares_a_program(first, second):
    def total(*args):
        leaves = tg.vjp  # a global that is no number
        assert leaves is not None
        found = [
            tg.sum(tg.asarray(x) * 2.0)
            for x in flatten(args)
            if isinstance(x, (tg.Tensor, np.ndarray, np.generic))
        ]
        return sum(found)

    f = Counted(total)
    for _ in range(2):
        f(*first)
    assert f.is_replayed(*first)
    assert f.is_replayed(*second)
    assert len(f.compiled.programs) == 1


def test_a_closure_that_changes_after_many_calls():
    factor = 2.0
    f = tg.function(lambda x: x * factor)
    for factor in (2.0, 2.0, 2.0, 2.0, 3.0, 2.0, 3.0, 3.0, 3.0, 3.0, -0.0, 0.0):
        assert_same(f(X), X * factor)
    assert len(f.programs) == 2


def test_surroundings_whose_numbers_and_tensors_change_places():
    base = power = tg.constant([3.0, 2.0])

    def plain(x, shift=1.0, by=Y):
        return x * base**power + shift * by

    f = tg.function(plain)
    for surroundings in [
        (X, 2.0, (1.0, Y)),
        (2.0, X, (1.0, Y)),
        (X, 2.0, (Y, 1.0)),
        (2.0, 3.0, (1.0, Y)),
        (2.0, X, (Y, 1.0)),
        (X, 2.0, (1.0, Y)),
        (2.0, 3.0, (Y, 1.0)),
    ] * 2:
        base, power, plain.__defaults__ = surroundings
        for _ in range(3):
            assert_same(f(X), plain(X))
    assert len(f.programs) >= 6


@pytest.mark.parametrize("how", ["wrapper", "wrapped", "partial", "object", "method"])
def test_a_closure_that_changes_inside_of_what_is_called(how):
    factor = 2.0

    def times(x, offset=0.0):
        return x * factor + offset

    class Times:
        def __call__(self, x):
            return x * factor

    call = {
        "wrapper": functools.wraps(abs)(lambda x: x * factor),
        "wrapped": functools.wraps(times)(lambda x: times(x)),
        "partial": functools.partial(times, offset=1.0),
        "object": Times(),
        "method": Times().__call__,
    }[how]
    f = tg.function(call)
    for number in (2.0, 2.0, 2.0, 3.0, 2.0, 3.0, 3.0, 3.0):
        factor = number
        assert_same(f(X), call(X))
    assert len(f.programs) == 2


def test_an_argument_beside_none_is_handed_back():
    f = tg.function(lambda mask, x, y: (y, x if mask is None else mask))
    for _ in range(5):
        first, second = f(None, X, Y)
        assert first is Y
        assert second is X


@pytest.mark.parametrize("other", [2.0, None, "text", [1.0, 2.0], X, tg.Variable([1.0, 2.0])])
def test_something_else_after_many_arrays(other):
    f = Counted(lambda x: None if x is None or type(x) is str else tg.asarray(x) * 2.0)
    for _ in range(4):
        f(np.ones(2))
    for _ in range(3):
        f(other)
    assert f.is_replayed(other)
    assert f.is_replayed(np.ones(2))


def test_keywords():
    f = Counted(lambda x, *, scale=1.0, other=None: x * scale + (0.0 if other is None else other))
    for _ in range(2):
        f(X)
        f(X, scale=2.0)
        f(X, other=Y)
        f(x=X, other=Y)
    assert len(f.compiled.programs) == 4
    assert f.is_replayed(Y, other=X)
    assert f.is_replayed(Y, scale=2.0)


def test_one_tensor_twice_then_two():
    f = Counted(lambda x, y: x * x - y)
    for _ in range(3):
        f(X, X)
    assert f.is_replayed(X, Y)
    assert f.is_replayed(Y, X)


def test_numbers_of_numpy_are_tensors():
    f = Counted(lambda x, k: x * k)
    for k in range(2, 5):
        f(X, np.float32(k))
    assert f.is_replayed(X, np.float32(9.0))
    assert len(f.compiled.programs) == 1


def test_variables_are_known_by_identity():
    v, w = tg.Variable([1.0, 2.0]), tg.Variable([5.0, 7.0])

    def f(variable, x):
        variable.assign_add(x)
        return variable * 2.0

    compiled = tg.function(f)
    for _ in range(4):
        compiled(v, X)
        compiled(w, X)
    np.testing.assert_array_equal(v, [5.0, 10.0])
    np.testing.assert_array_equal(w, [9.0, 15.0])
    assert len(compiled.programs) == 2


def test_a_variable_and_a_tensor_of_its_values_differ():
    v = tg.Variable([1.0, 2.0])
    f = Counted(lambda x: x * 2.0)
    for _ in range(3):
        f(v)
    v.assign([5.0, 6.0])
    np.testing.assert_array_equal(f(v), [10.0, 12.0])
    for _ in range(3):
        f(v[:])
    assert len(f.compiled.programs) == 2


def test_decorator_with_and_without_arguments():
    @tg.function
    def f(x):
        """Double."""
        return x * 2.0

    @tg.function(strict=False)
    def g(x):
        return x * 3.0

    for _ in range(3):
        np.testing.assert_array_equal(f(X), [2.0, 4.0])
        np.testing.assert_array_equal(g(X), [3.0, 6.0])
    assert (f.__name__, f.__doc__) == ("f", "Double.")
    assert len(f.programs) == len(g.programs) == 1
    with pytest.raises(TypeError, match="needs a function"):
        tg.function(3)


def test_partial_functions_lambdas_and_callable_objects():
    import functools

    class Scale:
        def __call__(self, x):
            return x * 4.0

    for made in (functools.partial(tg.multiply, 4.0), Scale(), lambda x: x * 4.0, Scale().__call__):
        f = tg.function(made)
        for _ in range(3):
            np.testing.assert_array_equal(f(X), [4.0, 8.0])
        assert len(f.programs) == 1


# ---- methods


class Model:
    def __init__(self, w):
        self.v = tg.Variable(w)

    @tg.function
    def step(self, x):
        self.v.assign_add(x)
        return self.v * 2.0


def test_methods_have_programs_for_each_object():
    a, b = Model([1.0, 1.0]), Model([10.0, 10.0])
    for _ in range(3):
        a.step(X)
        b.step(X)
    np.testing.assert_array_equal(a.v, [4.0, 7.0])
    np.testing.assert_array_equal(b.v, [13.0, 16.0])
    assert len(a.step.programs) == len(b.step.programs) == 1
    assert "replay" in a.step.explain_program()


def test_objects_go_with_their_programs():
    gc.collect()
    gc.disable()
    try:
        model = Model([1.0, 1.0])
        for _ in range(3):
            model.step(X)
        refs = [weakref.ref(model), weakref.ref(model.v)]
        del model
        assert [ref() for ref in refs] == [None, None]
        assert Model.step._bound == {}
    finally:
        gc.enable()


def test_a_method_keeps_its_object():
    step = Model([1.0, 1.0]).step
    for _ in range(3):
        got = step(X)
    np.testing.assert_array_equal(got, [8.0, 14.0])


@dataclass
class Unhashable:
    scale: float

    @tg.function
    def step(self, x):
        return x * self.scale


class Equal:
    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1

    step = Unhashable.__dict__["step"]


@pytest.mark.parametrize("kind", [Unhashable, Equal])
def test_objects_without_a_hash_and_equal_ones(kind):
    objects = [kind(2.0), kind(3.0)]
    for _ in range(3):
        for one in objects:
            np.testing.assert_array_equal(one.step(X), X * one.scale)


def test_an_object_that_takes_no_weak_references():
    class Slotted:
        __slots__ = ()

        @tg.function
        def step(self, x):
            return x

    with pytest.raises(TypeError, match="add '__weakref__' to the __slots__"):
        Slotted().step(X)


def test_what_binds_no_object_is_not_bound():
    class Holder:
        static = tg.function(staticmethod(lambda x: x * 2.0))
        partial = tg.function(functools.partial(tg.multiply, 3.0))
        of_another = tg.function(Model([1.0, 1.0]).step)

    holder = Holder()
    for k in range(1, 5):
        assert_same(holder.static(X), X * 2.0)
        assert_same(holder.partial(X), X * 3.0)
        assert_same(holder.of_another(X), (X * k + 1.0) * 2.0)
    assert len(Holder.static.programs) == 1


class Inner:
    def __init__(self):
        self.v = tg.Variable([1.0, 1.0])
        self.compiled = tg.function(self.step, lease_results=True)
        self.method = self.twice

    def step(self, x):
        self.v.assign_add(x)
        return self.v * 2.0

    @tg.function
    def twice(self, x):
        return x * self.v


@tg.function
def module_level(x):
    return x * 2.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles(copied):
    assert copied(module_level) is module_level
    first = Inner()
    for _ in range(3):
        first.compiled(X)
    second = copied(first)
    for _ in range(3):
        leased = second.compiled(X)
    np.testing.assert_array_equal(first.v, [4.0, 7.0])
    np.testing.assert_array_equal(second.v, [7.0, 13.0])
    second.compiled(X)
    with pytest.raises(RuntimeError, match="leased"):
        leased.numpy()
    assert second.method.__self__ is second
    assert_same(second.method(X), X * second.v)


# ---- numbers in the function's surroundings

RATE = 2.0
LATE_SOURCE = """
import tapegrad as tg

@tg.function
def f(x):
    return x * LATE

LATE = 2.0
"""


def test_globals(monkeypatch):
    f = Counted(lambda x: x * 1.0)
    f.compiled = tg.function(lambda x: x * RATE)
    f.plain = lambda x: x * RATE
    for rate in (2.0, 5.0, 2.0, 7.0):
        monkeypatch.setitem(globals(), "RATE", rate)
        for _ in range(3):
            f(X)
    assert len(f.compiled.programs) == 3


def test_globals_that_are_defined_after_the_function():
    space: dict[str, Any] = {}
    exec(LATE_SOURCE, space)
    for late in (2.0, 3.0, 0.0, -0.0):
        space["LATE"] = late
        for _ in range(3):
            np.testing.assert_array_equal(space["f"](X), X * late)
    assert len(space["f"].programs) == 4


def test_closures_and_defaults():
    scale = 2.0

    def plain(x, shift=1.0, *, power=2):
        return (x * scale + shift) ** power

    f = tg.function(plain)
    for new_scale, shift, power in [(2.0, 1.0, 2), (3.0, 1.0, 2), (3.0, 4.0, 2), (3.0, 4.0, 3)]:
        scale = new_scale
        plain.__defaults__ = (shift,)
        plain.__kwdefaults__ = {"power": power}
        for _ in range(3):
            assert_same(f(X), plain(X))
    assert len(f.programs) == 4


def test_a_closure_that_is_assigned_later():
    f = tg.function(lambda x: x * later)
    for later in (2.0, 3.0):
        for _ in range(3):
            assert_same(f(X), X * later)


# ---- the cache


def test_many_signatures_warn_once_and_name_what_changes():
    f = tg.function(lambda x, k: x * k)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(20):
            f(X, k)
    assert [w.category for w in caught] == [TapeWarning]
    text = str(caught[0].message)
    assert "test_many_signatures" in text
    assert "then" in text
    assert "7" in text
    assert "8" in text
    assert "tg.constant(number)" in text
    assert caught[0].filename == __file__


def test_the_cache_is_bounded_and_forgets_the_oldest():
    f = tg.function(lambda x: tg.sum(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(1, 60):
            for _ in range(3):
                assert float(f(tg.ones(n))) == n
    assert len(f.programs) == 32
    for _ in range(3):
        assert float(f(tg.ones(1))) == 1


# ---- looking at programs


def test_programs_and_their_text():
    w = tg.Variable(np.ones((3, 2), "f4"), name="w")
    f = tg.function(lambda x: tg.nn.relu(x @ w))
    assert f.programs == []
    assert f.explain_program() == ""
    for n in (4, 5):
        for _ in range(3):
            f(tg.ones((n, 3)))
    assert len(f.programs) == 2
    text = f.explain_program()
    assert text.count("def replay(") == 2
    assert "KiB" in text
    assert "dot(" in text or "matmul(" in text
    assert "2 programs" in repr(f)


# ---- what a call returns is the caller's own


def test_results_do_not_change_in_later_calls():
    v = tg.Variable([1.0, 1.0])

    def f(x):
        v.assign_add(x)
        y = x * 2.0
        return {
            "y": y,
            "row": y[:1],
            "again": tg.reshape(y, (1, 2)),
            "v": v + 0.0,
            "sum": tg.sum(y),
        }

    compiled = tg.function(f)
    results = [compiled(tg.constant([float(k), 1.0])) for k in range(6)]
    for k, result in enumerate(results):
        np.testing.assert_array_equal(result["y"], [2.0 * k, 2.0])
        np.testing.assert_array_equal(result["row"], [2.0 * k])
        np.testing.assert_array_equal(result["again"], [[2.0 * k, 2.0]])
        np.testing.assert_array_equal(result["v"], [1.0 + sum(range(k + 1)), 2.0 + k])
        assert float(result["sum"]) == 2.0 * k + 2.0


def test_inputs_are_returned_as_they_are():
    array = np.ones(2)
    f = tg.function(lambda x, y, v: (x, {"y": y}, v, x * 1.0))
    v = tg.Variable(3.0)
    for _ in range(4):
        x, inner, variable, other = f(X, Y, v)
        assert x is X
        assert inner["y"] is Y
        assert variable is v
        assert other is not X
    g = tg.function(lambda a: (a, tg.asarray(a)))
    results = [g(array) for _ in range(4)]
    array[0] = 7.0  # which is the caller's own: results are tensors, and keep their values
    assert_same(results, [(tg.ones(2, dtype="float64"),) * 2] * 4)


VIEWS = {
    "whole": lambda x: x[...],
    "slice": lambda x: x[1:],
    "row": lambda x: x[0],
    "transpose": lambda x: tg.transpose(x),
    "reshape": lambda x: tg.reshape(x, (-1,)),
    "broadcast": lambda x: tg.broadcast_to(x, (2, *x.shape)),
    "flip": lambda x: tg.flip(x),
    "expand": lambda x: tg.expand_dims(x, 0),
    "stop": lambda x: tg.stop_gradient(x),
    "positive": lambda x: +x,
    "cast": lambda x: tg.astype(x, x.dtype, copy=False),
    "diagonal": lambda x: tg.diagonal(x),
    "twice": lambda x: tg.transpose(x)[1:],
    "split": lambda x: tg.split(x, 2),
    "unstack": lambda x: tg.unstack(x),
    "moved": lambda x: tg.moveaxis(tg.flip(x, axis=0), 0, 1),
}
SQUARE = np.arange(4.0, dtype="f4").reshape(2, 2)


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_arguments_variables_and_constants(name):
    view = VIEWS[name]
    v = tg.Variable(SQUARE)
    constant = tg.constant(SQUARE)

    def f(x):
        before = view(v)
        inner = view(x * 2.0)
        v.assign_add(x)
        return {
            "argument": view(x), "before": before, "after": view(v), "constant": view(constant),
            "inner": inner,
        }  # fmt: skip

    def run(function):
        v.assign(SQUARE)
        return [function(tg.constant(SQUARE + k)) for k in range(5)]

    want = [flatten(r) for r in run(f)]
    kept = [[np.array(y) for y in leaves] for leaves in want]
    got = run(tg.function(f))
    v.assign_add(SQUARE)
    for a, b in zip(got, kept, strict=True):
        assert_same(flatten(a), b)


def test_an_argument_that_shows_the_variable_which_is_written():
    v = tg.Variable([1.0, 2.0])

    def f(x):
        early = x + 1.0
        v.assign_add([1.0, 1.0])
        return early, x * v, x[:1], tg.flip(x), x

    def run(function):
        results = []
        for _ in range(4):
            results.append([np.array(y) for y in function(v[:])])
        return results

    want = run(f)
    v.assign([1.0, 2.0])
    assert_same(run(tg.function(f)), want)


@pytest.mark.parametrize("kind", [list, tuple, dict, Point, Batch])
def test_structures_come_back(kind):
    def f(x):
        if kind in (list, tuple):
            return kind([x * 2.0, None, [3, "text"], (x + 1.0,)])
        if kind is dict:
            return {"a": x * 2.0, "b": {"c": None}, 3: [x]}
        return kind(x * 2.0, [x, None])

    compiled = tg.function(f)
    for _ in range(4):
        got = compiled(X)
        assert type(got) is kind
        assert_same(got, f(X))


@dataclass
class Doubled:
    x: Any
    total: Any = field(init=False)

    def __post_init__(self):
        self.x = self.x * 2.0
        self.total = tg.sum(self.x)


def test_structures_are_not_initialised_anew():
    f = tg.function(lambda batch, counts: (Doubled(batch.x + batch.total), batch, counts))
    batch, counts = Doubled(X), collections.Counter("aab")  # x is [2, 4], the total 6
    for _ in range(4):
        made, again, counted = f(batch, counts)
        assert_same([made.x, made.total], [tg.constant([16.0, 20.0]), tg.constant(36.0)])
        assert again.x is batch.x
        assert (type(counted), counted) == (collections.Counter, counts)


@dataclass
class Scaling:
    scale: Any

    def __post_init__(self):
        self.length = self.scale.shape[0]
        self.v = tg.Variable([1.0, 1.0])
        self.total = [tg.sum(self.scale)]


def test_what_a_dataclass_has_beside_its_fields():
    scaling = Scaling(X)
    f = tg.function(lambda s, x: s.v.assign_add(s.scale * x) * float(s.length))
    for _ in range(4):
        f(scaling, Y)
    np.testing.assert_array_equal(scaling.v, [13.0, 41.0])
    made = tg.function(lambda x: Scaling(x * 2.0))
    # What is computed of other fields would be wrong: it is not there.
    assert not hasattr(made(X), "total")
    with pytest.raises(AttributeError, match="total"):
        tg.function(lambda s: s.scale * s.total[0])(scaling)


@pytest.mark.parametrize("value", [None, 3, 2.5, "text", True, (), [], {}])
def test_results_without_tensors(value):
    f = tg.function(lambda x: value)
    for _ in range(4):
        got = f(X)
        assert type(got) is type(value)
        assert got == value


def test_numbers_in_results_are_the_same_to_the_last_bit():
    f = tg.function(lambda x: (x * 2.0, float("nan"), np.float32("nan")))
    for _ in range(4):
        assert all(math.isnan(number) for number in f(X)[1:])
    assert len(f.programs) == 1
    zeros = iter([0.0, -0.0])
    g = tg.function(lambda x: (x * 2.0, next(zeros)))
    g(X)
    with pytest.raises(FunctionError, match=r"returned 0\.0, then -0\.0"):
        g(X)


def test_arrays_in_results_are_always_the_same_or_refused():
    array = np.arange(3.0)
    f = tg.function(lambda x: (x * 2.0, array))
    for _ in range(4):
        assert f(X)[1] is array
    g = tg.function(lambda x: (x * 2.0, np.arange(3.0)))
    g(X)
    with pytest.raises(FunctionError, match="returned another NumPy array"):
        g(X)


def test_the_same_tensor_twice_in_the_result():
    def f(x):
        y = x * 2.0
        return [y, y, y[0], x, x]

    compiled = tg.function(f)
    for _ in range(4):
        assert_same(compiled(X), f(X))


def test_constants_are_returned():
    c = tg.constant([1.0, 2.0])
    f = tg.function(lambda x: (c, tg.zeros(2), c * 2.0))
    for _ in range(4):
        assert_same(f(X), (c, tg.zeros(2), c * 2.0))
