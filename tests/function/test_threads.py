"""Compiled functions on several threads at once: results are those of eager calls."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tapegrad as tg
from tests.function.compiled import assert_same, rewritten


@pytest.fixture(autouse=True)
def busy_threads():
    """Let threads change so often that a race has a chance to show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with rewritten(False):
        yield
    sys.setswitchinterval(before)


def together(work, count=6):
    """Run `work(k)` on so many threads at once, and return what they return."""
    start = threading.Barrier(count)

    def run(k):
        start.wait(timeout=10)
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count), timeout=60))


W = tg.constant(np.random.default_rng(0).normal(size=(5, 5)))


def forward(x):
    y = tg.nn.relu(x @ W)
    return {"y": y, "sum": tg.sum(tg.exp(-y) * x, axis=0), "x": x}


@pytest.mark.parametrize("compiled_before", [False, True])
def test_one_function_of_values(compiled_before):
    f = tg.function(forward)
    if compiled_before:
        for _ in range(3):
            f(tg.ones((4, 5), dtype="f8"))

    def work(k):
        rng = np.random.default_rng(k)
        for i in range(60):
            x = tg.constant(rng.normal(size=(4 + i % 2, 5)))
            assert_same(f(x), forward(x))

    together(work)
    assert len(f.programs) == 2


def test_different_functions_and_variables():
    def work(k):
        v = tg.Variable(np.full(3, float(k)))
        optimizer = tg.optimizers.Adam(0.1)

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.sum(tg.square(v * x - 1.0))
            optimizer.apply([tape.gradient(loss, v)], [v])
            return loss

        f = tg.function(step)
        losses = [float(f(tg.constant([1.0, 2.0, 3.0]))) for _ in range(40)]
        return losses, v.numpy()

    assert_same(together(work), [work(k) for k in range(6)])


def test_one_function_of_state_counts_every_call():
    v = tg.Variable(np.zeros(2000))
    f = tg.function(lambda x: v.assign_add(x) * 1.0)
    one = tg.ones(2000, dtype="f8")
    for _ in range(3):
        f(one)

    def work(k):
        for _ in range(100):
            y = f(one).numpy()
            assert (y == y[0]).all()
        return y[0]

    last = together(work)
    np.testing.assert_array_equal(v, np.full(2000, 603.0))
    assert max(last) == 603.0


def test_recordings_and_programs_of_all_signatures_take_turns():
    """Arrays so large that NumPy lets other threads run while it adds."""
    size, count, calls = 1 << 18, 4, 30
    for _ in range(5):
        v = tg.Variable(np.zeros(size))
        f = tg.function(lambda x, v=v: v.assign_add(tg.reshape(x, size)) * 1.0)
        ones = [tg.ones((1 << k, size >> k), dtype="f8") for k in range(count)]

        def work(k, f=f, ones=ones):
            for i in range(calls):
                y = f(ones[(k + i // 5) % count])
                assert float(tg.min(y)) == float(tg.max(y))

        together(work, count)
        np.testing.assert_array_equal(v, np.full(size, float(count * calls)))


def test_methods_of_objects_on_threads():
    class Scale:
        def __init__(self, k):
            self.v = tg.Variable(float(k))

        @tg.function
        def __call__(self, x):
            return x * self.v

        @tg.function
        def step(self, x):
            return x * self.v

    objects = [Scale(k) for k in range(6)]

    def work(k):
        for i in range(50):
            one = objects[(k + i) % 6]
            assert float(one.step(tg.constant(2.0))) == 2.0 * float(one.v)

    together(work)


def test_a_recording_does_not_hear_other_threads():
    ready, go = threading.Event(), threading.Event()

    def slow(x):
        y = x * 2.0
        ready.set()
        go.wait(timeout=10)
        return y + 1.0

    f = tg.function(slow)

    def other():
        ready.wait(timeout=10)
        z = tg.constant([1.0]) * 3.0
        value = float(z[0])
        go.set()
        return value

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(other)
        f(tg.constant([1.0]))
        assert found.result(timeout=10) == 3.0
    for _ in range(3):
        np.testing.assert_array_equal(f(tg.constant([2.0])), [5.0])
    assert len(f.programs) == 1


def test_many_signatures_on_threads():
    f = tg.function(lambda x: tg.sum(x * 2.0))

    def work(k):
        for _ in range(4):
            for n in range(1, 8):
                assert float(f(tg.ones((n, k % 3 + 1)))) == 2.0 * n * (k % 3 + 1)
                repr(f)
                f.explain_program()

    with pytest.warns(tg.TapeWarning, match="each is compiled anew"):
        together(work)
    assert len(f.programs) == 21
