"""Variables in compiled functions: their versions, optimisers, metrics, random numbers, moves."""

from __future__ import annotations

import gc
import math
import warnings

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._structure import flatten
from tapegrad.errors import FunctionError
from tests.function.compiled import assert_same, rewritten

X = tg.constant([1.0, 2.0])


def twin_runs(make, arguments, between=lambda parts, k: None, rtol=None, prepare=lambda: None):
    """Run a function eagerly and compiled, each with parts of its own; compare all there is.

    make     returns (function, parts): Variables, optimisers and what else `between` changes.
    between  is called with the parts and the number of each call, before it.
    """

    def run(compile_it):
        function, parts = make()
        prepare()
        call = tg.function(function) if compile_it else function
        results = []
        for k, args in enumerate(arguments):
            between(parts, k)
            results.append(call(*args))
            results[-1] = [np.array(y) for y in flatten(results[-1])]
        variables = [v.numpy() for v in parts.values() if isinstance(v, tg.Variable)]
        return results, variables, call

    want, wanted_state, _ = run(False)
    got, state, compiled = run(True)
    assert len(compiled.programs) >= 1
    assert_same(got, want, rtol)
    assert_same(state, wanted_state, rtol)
    return compiled


# ---- reading and writing within one call


def orders(v, w, x, index):
    before = v + 0.0
    kept = v * 2.0
    v.assign_add(x)
    between = v * x
    w.assign(v * 3.0)
    v.assign_sub(w)
    v.assign(v * 0.5 + before)
    return before, kept, between, v + w, tg.flip(before)


def slices(v, w, x, index):
    v[0].assign(x[1])
    v[1:].assign_add(w[1:])
    first = v * 1.0
    w[index].assign_add(x)
    w[tg.constant([1, 1, 0])].assign_sub(1.0)
    v[:].assign(w * 2.0)
    return first, v + 0.0, w + 0.0


def old_versions(v, w, x, index):
    old = v[:]  # shows the memory, until it is written
    turned = tg.flip(v)
    part = v[1:]
    v.assign_add(x)
    later = old + v
    v.assign_add(x)
    return old, turned, part, later, old * v


def swapped(v, w, x, index):
    a, b = v[:], w[:]
    v.assign(b)
    w.assign(a)
    return a - b


def numbers(v, w, x, index):
    v.assign_add(tg.ones(2))
    w.assign_sub(v * 0.5)
    v.assign(np.array([1.0, 2.0], "f4"))
    w.assign_add([1.0, 1.0])
    return v * w


def unread(v, w, x, index):
    v.assign(x)
    v.assign(x * 2.0)
    w.assign(v)
    return x


@pytest.mark.parametrize("function", [orders, slices, old_versions, swapped, numbers, unread])
def test_orders_of_reading_and_writing(function):
    def make():
        v, w = tg.Variable([1.0, 2.0]), tg.Variable([0.5, 0.25])
        return (lambda x, index: function(v, w, x, index)), {"v": v, "w": w}

    arguments = [(tg.constant([1.0 + k, 2.0]), tg.constant([k % 2, 1, 0][:2])) for k in range(6)]
    twin_runs(make, arguments)


@pytest.mark.parametrize("function", [orders, slices, old_versions, swapped])
def test_the_same_in_one_flat_buffer(function):
    def make():
        v, w = tg.Variable([1.0, 2.0]), tg.Variable([0.5, 0.25])
        tg.optimizers.SGD(0.0).apply([tg.zeros(2), tg.zeros(2)], [v, w])
        assert v._buffer is w._buffer
        return (lambda x, index: function(v, w, x, index)), {"v": v, "w": w}

    arguments = [(tg.constant([1.0 + k, 2.0]), tg.constant([k % 2, 1])) for k in range(6)]
    twin_runs(make, arguments)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_shapes_and_types_of_variables(shape, dtype):
    def make():
        v = tg.Variable(np.ones(shape, dtype))

        def f(x):
            before = v * 2
            v.assign_add(x)
            v.assign_sub(tg.ones(shape, dtype=dtype))
            v.assign_add(v * v)
            return before, v * 1, v[...] if shape else v + 0

        return f, {"v": v}

    twin_runs(make, [(tg.constant(np.full(shape, k, dtype)),) for k in range(5)])


def test_numbers_assigned_to_scalars():
    def make():
        v, n = tg.Variable(1.0), tg.Variable(3)

        def f(x):
            v.assign(2.0)
            v.assign_add(0.5)
            v.assign_sub(1)
            n.assign_add(2)
            return v * x, n * 2

        return f, {"v": v, "n": n}

    twin_runs(make, [(X,)] * 5)


def test_tensors_that_the_caller_holds_keep_their_values():
    v = tg.Variable([1.0, 2.0])
    f = tg.function(lambda x: v.assign_add(x) * 1.0)
    for _ in range(3):
        f(X)
    held = [v[:], v[0], tg.flip(v), v + 0.0, tg.transpose(v), v._read()]
    values = [h.numpy() for h in held]
    with tg.GradientTape() as tape:
        y = tg.sum(v * v)
    for _ in range(3):
        f(X)
    for h, value in zip(held, values, strict=True):
        np.testing.assert_array_equal(h, value)
    np.testing.assert_array_equal(tape.gradient(y, v), 2 * values[0])
    np.testing.assert_array_equal(v, [7.0, 14.0])


def test_what_is_assigned_between_calls():
    def make():
        v = tg.Variable([1.0, 2.0])
        s = tg.Variable(1.0)

        def f(x):
            v.assign_add(x * s)
            return v * 2.0

        return f, {"v": v, "s": s}

    def between(parts, k):
        if k == 4:
            parts["v"].assign([10.0, 20.0])
        if k == 5:
            parts["v"][0].assign_add(5.0)
            parts["s"].assign(0.5)

    twin_runs(make, [(X,)] * 8, between)


def test_weights_that_are_loaded_between_calls(tmp_path):
    def make():
        tg.random.seed(1)
        model = tg.Sequential([tg.layers.Dense(3, "tanh"), tg.layers.Dense(2)])
        model(tg.ones((1, 4)))
        optimizer = tg.optimizers.Adam(0.1)

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.mean(tg.square(model(x)))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.variables)
            return loss

        return step, {"model": model, **{str(i): v for i, v in enumerate(model.variables)}}

    def between(parts, k):
        path = tmp_path / "weights.safetensors"
        if k == 3:
            parts["model"].save_weights(path)
        if k == 6:
            parts["model"].load_weights(path)
        if k == 8:
            parts["model"].set_weights([w.numpy() * 0.5 for w in parts["model"].variables])

    with rewritten(False):
        twin_runs(make, [(tg.ones((5, 4)) * float(k),) for k in range(12)], between)


# ---- optimisers


def regression(optimizers):
    rng = np.random.default_rng(0)
    shapes = (3, 4), (4,), (4, 2), (2,)
    variables = [tg.Variable(rng.normal(size=shape)) for shape in shapes]

    def step(x):
        with tg.GradientTape() as tape:
            h = tg.nn.linear_relu(x, *variables[:2])
            loss = tg.mean(tg.square(tg.nn.linear(h, *variables[2:]) - 1.0))
        gradients = tape.gradient(loss, variables)
        count = len(variables) // len(optimizers)
        for i, optimizer in enumerate(optimizers):
            part = slice(i * count, (i + 1) * count)
            optimizer.apply(gradients[part], variables[part])
        return loss

    parts = {f"v{i}": v for i, v in enumerate(variables)}
    return step, parts | {"optimizers": optimizers, "variables": variables}


def batches(count):
    rng = np.random.default_rng(1)
    return [(tg.constant(rng.normal(size=(6, 3))),) for _ in range(count)]


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_hyper_parameters_change_between_calls(name):
    def between(parts, k):
        optimizer = parts["optimizers"][0]
        if k == 4:
            optimizer.learning_rate.assign(0.5)
        if k == 6:
            optimizer.learning_rate = 0.001
        if k == 8 and name.startswith("Adam"):
            optimizer.beta_1 = 0.5
            optimizer.weight_decay.assign(0.1)

    with rewritten(False):
        twin_runs(lambda: regression([getattr(tg.optimizers, name)(0.01)]), batches(12), between)


def test_a_schedule_inside():
    def make():
        step, parts = regression([tg.optimizers.Adam(0.1)])
        optimizer = parts["optimizers"][0]

        def scheduled(x):
            optimizer.learning_rate.assign(
                0.1 / (1.0 + tg.astype(optimizer.iterations, tg.float64))
            )
            return step(x), optimizer.learning_rate * 1.0

        return scheduled, parts

    with rewritten(False):
        twin_runs(make, batches(12))


@pytest.mark.parametrize("count", [2, 4])
def test_several_optimisers_in_one_step(count):
    kinds = [tg.optimizers.SGD, tg.optimizers.Adam, tg.optimizers.RMSprop, tg.optimizers.Adagrad]
    with rewritten(False):
        twin_runs(lambda: regression([kind(0.01) for kind in kinds[:count]]), batches(12))


def test_two_optimisers_of_the_same_variables():
    def make():
        step, parts = regression([tg.optimizers.SGD(0.01)])
        second = tg.optimizers.Adam(0.01)
        variables = parts["variables"]

        def both(x):
            loss = step(x)
            with tg.GradientTape() as tape:
                penalty = sum(tg.sum(v * v) for v in variables)
            second.apply(tape.gradient(penalty, variables), variables)
            return loss, penalty

        return both, parts

    with rewritten(False):
        twin_runs(make, batches(10))


def test_variables_without_a_gradient_stay():
    def make():
        a, b, c = (tg.Variable([1.0, 2.0]) for _ in range(3))
        optimizer = tg.optimizers.Adam(0.1)

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.sum(a * x + c * c)
            with pytest.warns(tg.TapeWarning) if not optimizer._warned else _nothing():
                optimizer.apply(tape.gradient(loss, [a, b, c]), [a, b, c])
            return loss

        return step, {"a": a, "b": b, "c": c}

    twin_runs(make, [(X,)] * 6)


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_memory_that_moves_after_compilation():
    def make():
        v, w = tg.Variable([1.0, 2.0]), tg.Variable([0.5, 1.0])

        def f(x):
            v.assign_add(x * w)
            return v * 2.0

        return f, {"v": v, "w": w}

    def between(parts, k):
        if k == 4:  # an optimiser's first step packs
            tg.optimizers.SGD(0.1).apply([X, X], [parts["w"], parts["v"]])
        if k == 6:
            tg.optimizers.Adam(0.1).apply([X], [parts["v"]])

    twin_runs(make, [(X,)] * 9, between)


def test_a_training_step_whose_variables_move():
    def between(parts, k):
        if k == 5:
            tg.Variable(np.ones(1000))
            variables = parts["variables"]
            tg.optimizers.SGD(0.0).apply([v * 0.0 for v in variables], variables)

    with rewritten(False):
        twin_runs(lambda: regression([tg.optimizers.Adam(0.01)]), batches(10), between)


@pytest.mark.parametrize("size", [(1 << 14) + 1, 1 << 20, (1 << 20) + 12345])
def test_updates_by_blocks_and_threads(size):
    def make():
        v = tg.Variable(np.linspace(0.0, 1.0, size, dtype="f4"))
        optimizer = tg.optimizers.Adam(0.1)

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.sum(v * v) * x
            optimizer.apply([tape.gradient(loss, v)], [v])
            return loss

        return step, {"v": v}

    with rewritten(False):
        twin_runs(make, [(tg.constant(1.0 + k),) for k in range(4)])


# ---- metrics


def test_metrics_that_are_updated_and_reset():
    def make():
        mean, accuracy = tg.metrics.Mean(), tg.metrics.Accuracy()

        def f(x, labels):
            mean.update_state(x, tg.abs(x))
            accuracy.update_state(labels, x)
            return mean.result(), accuracy.result()

        return f, {"mean": mean, "accuracy": accuracy}

    seen = []

    def between(parts, k):
        seen.append([float(m.result()) for m in parts.values()])
        if k in (1, 4, 7):
            for metric in parts.values():
                metric.reset_state()
            assert float(parts["mean"].result()) == 0.0

    rng = np.random.default_rng(0)
    arguments = [
        (tg.constant(rng.normal(size=(5, 3))), tg.constant(rng.integers(0, 3, 5)))
        for _ in range(10)
    ]
    twin_runs(make, arguments, between)
    assert seen[:10] == seen[10:]


# ---- random numbers


def draws(generator=None):
    source = tg.random if generator is None else generator

    def f(x):
        a = source.normal((3,))
        b = source.uniform((2, 2), -1.0, 3.0, dtype=tg.float64)
        c = source.uniform((4,), 0, 10, dtype=tg.int64)
        d = tg.nn.dropout(tg.ones((4, 5)), 0.4, generator=generator)
        e = source.permutation(7)
        g = source.shuffle(tg.arange(5.0) * x[0])
        h = source.normal((), dtype=tg.float64)
        i = tg.nn.dropout(x, 0.5, generator=generator)
        return a, b, c, d, e, g, h, i

    return f


def test_draws_equal_eager_ones():
    def between(parts, k):
        if k in (4, 7):
            tg.random.seed(k)

    twin_runs(lambda: (draws(), {}), [(X,)] * 10, between, prepare=lambda: tg.random.seed(5))


def test_generators_of_ones_own():
    def make():
        generator = tg.random.Generator(3)
        return draws(generator), {"generator": generator, "counter": generator.counter}

    def between(parts, k):
        if k == 4:
            parts["generator"].seed(9)
        if k == 6:
            parts["generator"].normal(5)

    twin_runs(make, [(X,)] * 9, between)


def test_each_call_draws_anew():
    tg.random.seed(None)
    f = tg.function(lambda: tg.random.uniform((4,), dtype=tg.float64))
    seen = {tuple(f().tolist()) for _ in range(10)}
    assert len(seen) == 10


def test_a_stream_that_is_not_seeded_yet():
    generator = tg.random.Generator(None)
    f = tg.function(lambda: generator.uniform((4,)))
    seen = {tuple(f().tolist()) for _ in range(8)}
    assert len(seen) == 8
    assert len(f.programs) == 1


def test_draws_without_use_advance_the_stream():
    def make():
        def f(x):
            tg.random.normal((3,))
            return tg.random.normal((3,)) + x[0]

        return f, {}

    twin_runs(make, [(X,)] * 6, prepare=lambda: tg.random.seed(2))


# ---- check


class Holder:
    scale = 2.0


def test_check_finds_what_is_neither_argument_nor_variable():
    holder, numbers = Holder(), [1.0]
    v = tg.Variable([1.0, 1.0])

    def f(x):
        v.assign_add(x * holder.scale)
        return v * numbers[0]

    compiled = tg.function(f)
    compiled.check(X)
    compiled.check(X)
    assert len(compiled.programs) == 1
    holder.scale = 3.0
    with pytest.raises(FunctionError, match="is neither an argument nor a Variable"):
        compiled.check(X)
    holder.scale = 2.0
    compiled.check(X)
    numbers[0] = 5.0
    with pytest.raises(FunctionError, match=r"the result is .* computed eagerly"):
        compiled.check(X)


@pytest.mark.parametrize(
    ("result", "first", "second", "words"),
    [
        (lambda x, k: (x * 1.0, k), 2, 3, r"result\[1\] is 3 computed eagerly and 2 by replay"),
        (lambda x, k: (x * 1.0, k), 2, 2.0, r"result\[1\] is 2.0 .* and 2 by"),
        (lambda x, k: (x * 1.0, k), 0.0, -0.0, r"result\[1\] is -0.0 .* and 0.0 by"),
        (lambda x, k: [x * 1.0, k], X, 2.0, r"result\[1\] is 2.0 "),
        (lambda x, k: [x * 1.0, k], None, X, r"result\[1\] is .*Tensor.* and None by"),
        (lambda x, k: [x * 1.0] * k, 1, 2, r"a list of .*\[1\] comp.* and a list of .*\[0\] by"),
        (lambda x, k: {k: x * 1.0}, "a", "b", r"a dict of .*'b'.* and a dict of .*'a'.* by"),
        (lambda x, k: k([x * 1.0]), tuple, list, r"a list of .* and a tuple of .* by"),
        (lambda x, k: tg.ones(k) * x[0], 1, 2, r"result is float32\[2\] .* float32\[1\] by"),
        (tg.astype, "float32", "int64", r"result is int64\[2\] .* float32\[2\] by"),
        (lambda x, k: x * tg.constant([np.inf, k]), 2.0, 3.0, r"\[inf  6.\] .* \[inf  4.\]"),
    ],
)
def test_check_finds_other_results(result, first, second, words):
    holder = Holder()
    holder.scale = first
    f = tg.function(lambda x: result(x, holder.scale))
    f.check(X)
    holder.scale = second
    with pytest.raises(FunctionError, match=words):
        f.check(X)


def test_check_takes_nan_for_nan():
    f = tg.function(lambda x: (x * math.nan, math.nan, x / tg.constant([1.0, math.nan])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.check(X)


def test_check_of_arrays_that_are_handed_back():
    f = tg.function(lambda x, y: (x, y * 2.0))
    f.check(np.ones(2), np.float64(3.0))


def test_check_of_state_alone():
    holder = Holder()
    v = tg.Variable([1.0, 1.0], name="weights")
    f = tg.function(lambda x: [v.assign_add(x * holder.scale), None][1])
    f.check(X)
    holder.scale = 4.0
    with pytest.raises(FunctionError, match="variable 'weights' is"):
        f.check(X)


def test_check_of_random_numbers_and_training():
    tg.random.seed(4)
    step, _ = regression([tg.optimizers.Adam(0.01)])
    f = tg.function(lambda x: step(tg.nn.dropout(x, 0.3)))
    f.check(*batches(1)[0])


def test_check_needs_a_program():
    f = tg.function(lambda x: x * float(x[0]), strict=False)
    with pytest.warns(tg.TapeWarning), pytest.raises(FunctionError, match="is not compiled"):
        f.check(X)


def test_variables_may_go_before_the_function():
    f = tg.function(lambda v, x: v.assign_add(x) * 1.0)
    for _ in range(3):
        v = tg.Variable([0.0, 0.0])
        for _ in range(4):
            f(v, X)
        np.testing.assert_array_equal(v, [4.0, 8.0])
        del v
        gc.collect()
