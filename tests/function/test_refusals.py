"""What cannot be compiled: refused with the line and the remedy, or left eager with one warning."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
import warnings
from dataclasses import dataclass

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.errors import FunctionError, TapeWarning
from tests.function.compiled import assert_same

X = tg.constant([1.0, 2.0])
MASK = tg.constant([True, False])


def branch(x):
    if x[0] > 1.5:
        return x * 2.0
    return x * 3.0


def loop(x):
    while tg.sum(x) < 10.0:
        x = x * 2.0
    return x


LEAVING = {
    "float": lambda x: x * float(x[0]),
    "int": lambda x: x * int(x[1]),
    "bool": lambda x: x * bool(x[0]),
    "if": branch,
    "while": loop,
    "and": lambda x: x * 2.0 if x[0] > 0 and x[1] > 3 else x,
    "numpy": lambda x: x * x.numpy().max(),
    "item": lambda x: x * x[0].item(),
    "asarray": lambda x: x * np.asarray(x).max(),
    "np.array": lambda x: x * np.array(x).max(),
    "array": lambda x: x * float(x.array[0]),
    "tolist": lambda x: x * x.tolist()[0],
    "dlpack": lambda x: x * float(np.from_dlpack(x)[0]),
    "median": lambda x: x * np.median(x),
    "mask": lambda x: x[x > 1.5],
    "rows of a mask": lambda x: [y * 2.0 for y in x[x > 0.5]],
    "index": lambda x: tg.arange(5)[int(x[0])],
    "range": lambda x: sum(x * k for k in range(int(x[1]) + 1)),
    "slice": lambda x: tg.constant([1.0, 2.0, 3.0])[: tg.astype(x[0], "int64")],
    "in": lambda x: x * 2.0 if 2.0 in x else x,
    "in a list": lambda x: x * 2.0 if x[0] in [1.0, 2.0] else x,
    "max of Python": lambda x: max(x[0], x[1]) * x,
    "sorted": lambda x: tg.stack(sorted(x)),
    "format": lambda x: x * len(f"{x[0]:.3f}"),
    "f-string": lambda x: (tg.print(f"x is {x}"), x)[1],  # it was the first call's text for ever
    "round": lambda x: x * round(float(x[0])),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "arange": lambda x: tg.arange(x[0]),
    "reshape": lambda x: tg.reshape(x, (tg.astype(x[0], "int64"), -1)),
    "repeat": lambda x: tg.repeat(x, tg.astype(x, "int64")),
    "full of NumPy": lambda x: tg.constant(np.full(2, x[0])),
}
OTHER = tg.constant([2.0, 3.0])


@pytest.mark.parametrize("name", LEAVING)
def test_strict_functions_name_the_line_and_the_remedy(name):
    f = tg.function(LEAVING[name])
    for _ in range(3):  # in every call
        with pytest.raises(FunctionError, match=r"needs the value of a tensor") as caught:
            f(X)
        assert f"{__file__}:" in str(caught.value)
        assert "tg.where" in str(caught.value)
    assert f.programs == []


@pytest.mark.parametrize("name", LEAVING)
def test_others_stay_eager_with_one_warning(name):
    f = tg.function(LEAVING[name], strict=False)
    with pytest.warns(TapeWarning, match=r"needs the value.*It is not compiled") as caught:
        first = f(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_same(first, LEAVING[name](X))
    for x in (OTHER, X, OTHER):
        assert_same(f(x), LEAVING[name](x))
    assert f.programs == []


def test_a_variable_that_becomes_a_number():
    v = tg.Variable(2.0)
    f = tg.function(lambda x: x * float(v))
    with pytest.raises(FunctionError, match=r"a Python float needs the value"):
        f(X)
    g = tg.function(lambda x: x * 2.0 if v > 1.0 else x, strict=False)
    with pytest.warns(TapeWarning):
        assert_same(g(X), X * 2.0)
    v.assign(0.0)
    assert_same(g(X), X)


def test_values_of_constants_may_leave():
    c = tg.constant([2.0, 3.0])
    f = tg.function(lambda x: x * float(c[0]) if tg.sum(c) > 1.0 else x)
    for x in (X, OTHER, X, OTHER):
        assert_same(f(x), x * 2.0)
    assert len(f.programs) == 1


def test_facts_about_shapes_may_be_asked():
    f = tg.function(lambda x: x * len(x) + x.shape[0] - x.ndim + x.size * (2 if x.shape else 3))
    for x in (X, OTHER, X, OTHER):
        assert_same(f(x), f._function(x))


# ---- copies and conversions stay what they are: dependent on the inputs

STAYING = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "constant": tg.constant,
    "constant of a type": lambda x: tg.constant(x, dtype="float64"),
    "constant of a shape": lambda x: tg.constant(x, shape=(2, 1)),
    "constant spread": lambda x: tg.constant(x[0], shape=(3,)),
    "Tensor": tg.Tensor,
    "asarray": lambda x: tg.asarray(x, copy=True),
    "to_backend": lambda x: tg.to_backend(x, "numpy"),
    "full": lambda x: tg.full((3,), x[0]),
    "ufunc": lambda x: np.add(np.ones(2, "f4"), x),
    "array function": lambda x: np.sum(x),
    "list": lambda x: tg.stack(list(x)),
    "sum": lambda x: sum(x),
    "zip": lambda x: [a * b for a, b in zip(x, x, strict=True)],
    "exponent": lambda x: tg.constant([2.0, 3.0]) ** x[0],
    "index": lambda x: tg.constant([1.0, 2.0, 3.0, 4.0])[tg.astype(x[0], "int64")],
    "class weights": lambda x: tg.nn.softmax_cross_entropy([[1.0, 2.0]], [0], class_weights=x),
    "stop_gradient": tg.stop_gradient,
}


@pytest.mark.parametrize("name", STAYING)
def test_a_copy_is_no_constant(name):
    f = tg.function(lambda x: STAYING[name](x))
    try:
        for _ in range(3):
            f(X)
    except FunctionError:
        return  # refused is as good as right
    assert len(f.programs) == 1
    for x in (OTHER, X):
        assert_same(f(x), STAYING[name](x))


# ---- constants that differ between calls

COUNTER = itertools.count()
VARIABLE = tg.Variable(1.0)
VARIABLES = itertools.cycle([tg.Variable(1.0), tg.Variable(2.0)])
CHANGING = {
    "counter": lambda x: x * float(next(COUNTER)),
    "counter as a tensor": lambda x: x + tg.constant(float(next(COUNTER))),
    "counter in the settings": lambda x: tg.clip(tg.pad(x, 1, value=float(next(COUNTER))), 0, 9),
    "random": lambda x: x * np.random.default_rng().normal(size=2),
    "time": lambda x: x * time.perf_counter(),
    "counter returned": lambda x: (x * 1.0, next(COUNTER)),
    "constant returned": lambda x: (x * 1.0, tg.constant(next(COUNTER))),
    "generator returned": lambda x: (y for y in [x]),
    "object returned": lambda x: object(),
    "growing": lambda x, k=COUNTER: [x] * next(k),
    "another operation": lambda x, k=COUNTER: tg.exp(x) if next(k) % 2 else tg.sin(x),
    "another length": lambda x, k=COUNTER: sum(x for _ in range(2 + next(k))),
    "another variable": lambda x: x * next(VARIABLES),
}


def read_before_or_after(x, v=VARIABLE):
    """Multiply with the value before an assignment, or with the one after it."""
    before = next(COUNTER) % 2
    read = tg.asarray(v) if before else None
    v.assign(x[0])
    return (read if before else tg.asarray(v)) * x


def one_or_the_other(x):
    a, b = tg.exp(x), tg.exp(x * 2.0)
    return (a if next(COUNTER) % 2 else b) * 2.0, a, b


CHANGING |= {
    "a returned name": lambda x: {f"step {next(COUNTER)}": x * 2.0},
    "a returned container": lambda x: [x * 2.0] if next(COUNTER) % 2 else (x * 2.0,),
    "a returned depth": lambda x: [[x * 2.0], x] if next(COUNTER) % 2 else [x * 2.0, [x]],
    "a returned key's type": lambda x: {1 if next(COUNTER) % 2 else 1.0: x * 2.0},
}
CHANGING |= {"when it reads": read_before_or_after, "what it takes": one_or_the_other}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_is_named(name):
    function = CHANGING[name]
    f = tg.function(lambda x: function(x))

    def calls():
        for _ in range(6):
            f(X)

    with pytest.raises(FunctionError, match=r"does not do the same in every call") as caught:
        calls()
    text = str(caught.value)
    assert "tg.random" in text
    assert "returned" in name or "growing" in name or "length" in name or __file__ in text
    assert f.programs == []


@pytest.mark.parametrize("name", ["counter", "random", "counter as a tensor"])
def test_it_is_an_error_in_every_further_call(name):
    f = tg.function(lambda x: CHANGING[name](x))
    f(X)
    for _ in range(4):
        with pytest.raises(FunctionError, match=r"does not do the same"):
            f(X)


def test_what_changes_stays_eager_if_not_strict():
    counter = itertools.count(1)
    f = tg.function(lambda x: x * float(next(counter)), strict=False)
    f(X)
    with pytest.warns(TapeWarning, match=r"was 1\.0, then 2\.0.*It is not compiled") as caught:
        f(X)
    assert len(caught) == 1
    for k in range(3, 8):
        assert_same(f(X), X * float(k))


def test_results_keyed_by_variables():
    variables = [tg.Variable([1.0, 2.0]), tg.Variable([3.0, 4.0])]

    def f(x):
        with tg.GradientTape() as tape:
            loss = sum(tg.sum(v * x) for v in variables)
        gradients = tape.gradient(loss, {v: v for v in variables})
        for v, gradient in gradients.items():
            v.assign_add(gradient)
        return {v: v * x for v in variables}

    compiled = tg.function(f)
    for _ in range(4):
        found = compiled(X)
        for v in variables:
            assert_same(found[v], v * X)
    assert len(compiled.programs) == 1


def test_calls_that_settle_are_compiled():
    calls = []

    def f(x):
        calls.append(1)
        return x * 2.0 if len(calls) > 1 else tg.exp(tg.sin(x)) * 2.0

    compiled = tg.function(f)
    for _ in range(5):
        compiled(X)
    assert len(compiled.programs) == 1
    assert len(calls) == 3
    assert_same(compiled(OTHER), OTHER * 2.0)


# ---- Variables


def test_variables_are_made_in_the_first_call_only():
    made = []

    def f(x):
        if not made:
            made.append(tg.Variable([1.0, 1.0]))
        made[0].assign_add(x)
        return made[0] * 2.0

    compiled = tg.function(f)
    for k in range(1, 6):
        assert_same(compiled(X), (1.0 + k * X) * 2.0)
    assert len(compiled.programs) == 1


def test_a_first_call_that_fails_is_none():
    made = []

    def f(x, y):
        z = x @ y
        if not made:
            made.append(tg.Variable(1.0))
        return z * made[0]

    compiled = tg.function(f)
    for _ in range(2):
        with pytest.raises(ValueError, match="matmul"):
            compiled(tg.ones((2, 3)), tg.ones((2, 3)))
    for _ in range(4):
        compiled(tg.ones((2, 3)), tg.ones((3, 2)))
    assert len(compiled.programs) == 1


def test_variables_in_every_call_are_refused():
    f = tg.function(lambda x: tg.Variable(x) * 2.0)
    f(X)
    with pytest.raises(FunctionError, match=r"makes a Variable in every call, at .*refusals.*seed"):
        f(X)
    g = tg.function(lambda x: tg.Variable(x) * 2.0, strict=False)
    g(X)
    with pytest.warns(TapeWarning, match="makes a Variable in every call"):
        g(X)
    assert_same(g(OTHER), OTHER * 2.0)


def test_layers_and_optimisers_that_are_built_inside():
    def build():
        tg.random.seed(3)
        model = tg.Sequential([tg.layers.Dense(4, "relu"), tg.layers.Dense(2)])
        optimizer = tg.optimizers.Adam(0.05)
        loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)

        def step(x, labels):
            with tg.GradientTape() as tape:
                y = loss(labels, model(x, training=True))
            optimizer.apply(tape.gradient(y, model.trainable_variables), model.trainable_variables)
            return y

        return step, model

    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 3)), rng.integers(0, 2, 8)) for _ in range(10)]
    (eager, model), (step, other) = build(), build()
    tg.random.seed(3)
    wanted = [float(eager(*batch)) for batch in batches]
    tg.random.seed(3)
    compiled = tg.function(step)
    got = [float(compiled(*batch)) for batch in batches]
    assert len(compiled.programs) == 1
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for a, b in zip(other.variables, model.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- Python's side


def test_side_effects_happen_while_recording_only():
    seen = []
    f = tg.function(lambda x: (seen.append(1), x * 2.0)[1])
    for _ in range(6):
        f(X)
    assert len(seen) == 2


@dataclass
class State:
    h: tg.Tensor


def attribute(state):
    state.h = state.h * 2.0


def renamed(batch):
    batch["y"] = batch.pop("x")


CHANGED = {
    "append": (lambda: [X], lambda xs: xs.append(xs[0] * 2.0)),
    "item": (lambda: [[X], X], lambda xs: xs[0].__setitem__(0, X * 2.0)),
    "order": (lambda: [X, OTHER], lambda xs: xs.reverse()),
    "pop": (lambda: {"x": X, "y": OTHER}, lambda batch: batch.pop("y") * 2.0),
    "name": (lambda: {"x": X}, renamed),
    "count": (lambda: {"x": X, "n": 1}, lambda batch: batch.update(n=2)),
    "attribute": (lambda: State(X), attribute),
}


@pytest.mark.parametrize("name", CHANGED)
def test_arguments_that_the_function_changes_are_refused(name):
    make, change = CHANGED[name]
    f = tg.function(change)
    for _ in range(3):
        with pytest.raises(FunctionError, match="changes a list, dict or object that it was given"):
            f(make())
    g = tg.function(change, strict=False)
    with pytest.warns(TapeWarning, match=r"change a copy.*It is not compiled"):
        g(make())
    got, want = make(), make()
    assert_same(g(got), change(want))
    assert_same(got, want)


def test_arguments_that_the_function_copies_are_its_own():
    v = tg.Variable([1.0, 1.0])

    def f(*xs, by, **batch):
        batch["y"] = batch.pop("x") * 2.0
        xs = [*xs, batch["y"]]
        xs.append(by[v] * v)
        v.assign_add(xs[0])
        return xs, batch

    compiled = tg.function(f)
    for _ in range(4):
        want = f(X, x=OTHER, by={v: X})
        v.assign([1.0, 1.0])
        assert_same(compiled(X, x=OTHER, by={v: X}), want)
        v.assign([1.0, 1.0])
    assert len(compiled.programs) == 1


def test_no_warning_of_numpy_in_a_replay():
    f = tg.function(lambda x: tg.log(x) + 1.0 / x)
    with np.errstate(all="ignore"):
        for _ in range(2):
            f(tg.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(tg.zeros(2))
    with np.errstate(all="raise"):
        f(tg.zeros(2))
