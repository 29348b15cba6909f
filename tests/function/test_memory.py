"""The memory of compiled functions: nothing is allocated in a replay, and all goes with them."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
import warnings
import weakref

import numpy as np
import pytest

import tapegrad as tg
from tests.function.programs import ACTIVATIONS, Training


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Peak:
    """Measures how many bytes of array data lie above those at its beginning, at most."""

    def __enter__(self):
        tracemalloc.start()
        tracemalloc.clear_traces()
        self._begin = tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(self, *_):
        self.bytes = tracemalloc.get_traced_memory()[1] - self._begin
        tracemalloc.stop()


def classifier(optimizer, widths=(300, 200, 100, 10), dropout=0.0, dtype="f4"):
    rng = np.random.default_rng(0)
    variables = [
        tg.Variable(values.astype(dtype))
        for n, m in itertools.pairwise(widths)
        for values in (rng.normal(size=(n, m)) / np.sqrt(n), np.zeros(m))
    ]

    def step(x, labels):
        with tg.GradientTape() as tape:
            for w, b in zip(variables[:-2:2], variables[1:-2:2], strict=True):
                x = tg.nn.linear_relu(x, w, b)
                if dropout:
                    x = tg.nn.dropout(x, dropout)
            loss = tg.nn.softmax_cross_entropy(tg.nn.linear(x, *variables[-2:]), labels)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    x = tg.constant(rng.normal(size=(128, widths[0])).astype(dtype))
    labels = tg.constant(rng.integers(0, widths[-1], 128))
    return step, (x, labels)


OPTIMIZERS = {
    "sgd": lambda: tg.optimizers.SGD(0.01),
    "momentum": lambda: tg.optimizers.SGD(0.01, momentum=0.9),
    "rmsprop": lambda: tg.optimizers.RMSprop(0.01),
    "adam": lambda: tg.optimizers.Adam(0.01),
}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_allocates_no_arrays(name, dtype):
    step, arguments = classifier(OPTIMIZERS[name](), dtype=dtype)
    f = tg.function(step)
    for _ in range(4):
        f(*arguments)
    with Peak() as eager:
        step(*arguments)
    with Peak() as replay:
        for _ in range(5):
            f(*arguments)
    assert eager.bytes > 300_000
    # The result, integers, and what an iterator of NumPy takes where a row is spread.
    assert replay.bytes < 8_000 + 8192 * np.dtype(dtype).itemsize, replay.bytes


@pytest.mark.parametrize(
    "name", ["relu", "tanh", "sigmoid", "softplus", "elu", "silu", "gelu_tanh"]
)
def test_activations_allocate_no_arrays(name):
    w = tg.Variable(np.random.default_rng(0).normal(size=(200, 200)).astype("f4") * 0.1)

    def step(x):
        with tg.GradientTape() as tape:
            loss = tg.mean(tg.square(ACTIVATIONS[name](x @ w)))
        w.assign_sub(tape.gradient(loss, w) * 0.1)
        return loss

    f = tg.function(step)
    x = tg.ones((100, 200))
    for _ in range(4):
        f(x)
    with Peak() as replay:
        f(x)
    # One array of the batch would be 80 kB.
    assert replay.bytes < 20_000 + 4 * 8192, replay.bytes


def test_only_the_result_is_allocated():
    f = tg.function(lambda x: (tg.exp(x) * 2.0 + x, tg.sum(x)))
    x = tg.ones((100, 100))
    for _ in range(3):
        f(x)
    results = []
    with Peak() as peak:
        for _ in range(5):
            results.append(f(x))
    assert 5 * 40_000 <= peak.bytes < 5 * 40_000 + 10_000


@pytest.mark.parametrize(
    ("widths", "dropout"), [((300, 200, 100, 10), 0.0), ((50, 400, 400, 400, 5), 0.2)]
)
def test_the_arena_is_at_most_what_eager_takes(widths, dropout):
    step, arguments = classifier(tg.optimizers.Adam(0.01), widths, dropout)
    f = tg.function(step)
    for _ in range(4):
        f(*arguments)
    with Peak() as eager:
        step(*arguments)
    assert f.programs[0].arena <= eager.bytes


@pytest.mark.parametrize("seed", range(30))
def test_arenas_of_random_programs(seed):
    training = Training(1000 + seed)
    training.batch = 64
    f = tg.function(training.step)
    training.run(f, 3)
    x, t = next(training.batches(1))
    with Peak() as eager, np.errstate(all="ignore"):
        training.step(x, t)
    assert f.programs[0].arena <= eager.bytes, training.describe()


def test_long_chains_reuse_memory():
    def chain(x):
        for k in range(40):
            x = tg.tanh(x + float(k)) @ tg.ones((100, 100))
        return tg.sum(x)

    f = tg.function(chain)
    x = tg.ones((100, 100))
    for _ in range(3):
        f(x)
    assert f.programs[0].arena <= 4 * 40_000


# ---- what goes when


def test_programs_go_with_their_function():
    step, arguments = classifier(tg.optimizers.Adam(0.01))
    keep = []

    def build():
        f = tg.function(step)
        for _ in range(4):
            f(*arguments)
        keep.append(weakref.ref(f))
        keep.append(weakref.ref(f.programs[0]))
        return f.programs[0].arena

    tg.function(step)(*arguments)
    build()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    arena = build()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert [ref() for ref in keep] == [None] * 4
    assert arena > 200_000
    assert after - before < 100_000


def test_variables_go_with_their_function():
    def build():
        v, w = tg.Variable(np.ones(50_000)), tg.Variable(1.0)
        f = tg.function(lambda x: v.assign_add(x) * w)
        for _ in range(4):
            f(tg.ones(50_000, dtype="f8"))
        return weakref.ref(v), weakref.ref(w)

    assert [ref() for ref in build()] == [None, None]


def test_a_program_keeps_no_arguments_and_no_results():
    f = tg.function(lambda x: {"y": x * 2.0, "x": x})
    for _ in range(2):
        x = tg.constant(np.ones(1000))
        result = f(x)
        refs = [weakref.ref(x), weakref.ref(result["y"])]
        del x, result
    assert [ref() for ref in refs] == [None, None]
    for _ in range(3):
        x = tg.constant(np.ones(1000))
        result = f(x)
        refs = [weakref.ref(x), weakref.ref(result["y"])]
        del x, result
        assert [ref() for ref in refs] == [None, None]


def test_intermediates_of_recorded_calls_go():
    refs = []

    def step(x):
        y = tg.exp(x)
        refs.append(weakref.ref(y))
        return tg.sum(y * y)

    f = tg.function(step)
    for _ in range(3):
        f(tg.ones(10))
    assert [ref() for ref in refs] == [None, None]


def test_evicted_programs_go():
    f = tg.function(lambda x: tg.sum(x * 2.0))

    def call(n):
        for _ in range(3):
            f(tg.ones(n))

    call(1)
    ref = weakref.ref(f.programs[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(2, 40):
            call(n)
    assert ref() is None


def test_a_first_call_keeps_nothing_that_its_constants_were_made_of():
    c = tg.constant(np.ones((300, 300)))
    f = tg.function(lambda x: x * tg.sum(tg.exp(tg.sin(c))))
    tracemalloc.start()
    for _ in range(3):
        f(tg.constant([1.0]))
        assert tracemalloc.get_traced_memory()[0] < c.nbytes / 2
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_step_written_by_hand_allocates_no_arrays(dtype):
    _, (x, labels) = classifier(None, dtype=dtype)
    rng = np.random.default_rng(0)
    w = [tg.Variable(rng.normal(size=s).astype(dtype) / 9) for s in ((300, 200), (200, 10))]
    b = [tg.Variable(np.zeros(n, dtype)) for n in (200, 10)]
    losses = {
        "index": lambda z, k: -tg.mean(tg.nn.log_softmax(z)[np.arange(128), k]),
        "one-hot": lambda z, k: (
            -tg.mean(tg.sum(tg.one_hot(k, 10, dtype=dtype) * tg.log(tg.nn.softmax(z)), axis=1))
        ),
    }
    for loss in losses.values():

        @tg.function
        def step(x, k, loss=loss):
            with tg.GradientTape() as tape:
                y = loss(tg.nn.relu(x @ w[0] + b[0]) @ w[1] + b[1], k)
            for v, g in zip(w + b, tape.gradient(y, w + b), strict=True):
                v.assign_sub(g * 0.1)
            return y

        for _ in range(4):
            step(x, labels)
        with Peak() as eager:
            step._function(x, labels)
        with Peak() as replay:
            step(x, labels)
        assert eager.bytes > 300_000
        # What two operands of an iterator of NumPy take where a row is spread or a type changes.
        assert replay.bytes < 8_000 + 2 * 8192 * np.dtype(dtype).itemsize, replay.bytes
        for name in ("one_hot", "row_numbers"):
            assert name not in step.explain_program()
