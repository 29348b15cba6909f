"""Threads, and memory: what is kept and when it goes (rows T and M).

Everything here about memory holds by reference counting alone: the collector is switched off.
"""

import asyncio
import contextlib
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.primitive import Primitive

# ---- threads


def in_a_thread(function):
    """Run a function on a thread of its own, and return what it returns or raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=10)


def test_T1_operations_on_another_thread_are_not_recorded():
    x, there = tg.Variable(3.0), tg.Variable(5.0)
    with tg.GradientTape(persistent=True) as tape:
        y = in_a_thread(lambda: x * x * there)
        z = x * y
    assert tape.gradient(y, x) is None
    assert float(tape.gradient(z, x)) == 45.0  # y counts as a constant
    assert tape.watched_variables() == (x,)


def test_T2_a_tape_of_a_worker_is_asked_here():
    x = tg.Variable(3.0)
    tape = tg.GradientTape()

    def work():
        with tape:
            return x * x

    y = in_a_thread(work)
    assert float(tape.gradient(y, x)) == 6.0


@pytest.fixture
def busy_threads():
    """Let threads change so often that a race has a chance to show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_T3_eight_threads_with_tapes_of_their_own(busy_threads):
    shared = tg.Variable([2.0, 3.0])
    start = threading.Barrier(8)

    def work(k):
        start.wait(timeout=10)
        own = tg.Variable(float(k))
        for _ in range(20):
            with tg.GradientTape() as tape:
                y = own
                for _ in range(10):
                    y = y * shared + own
                y = tg.sum(y * 0.0 + own * own * shared * shared)
            dx, dshared = tape.gradient(y, [own, shared])
            assert float(dx) == 2.0 * k * 13.0
            np.testing.assert_array_equal(dshared, [4.0 * k * k, 6.0 * k * k])
            assert tape.watched_variables() == (shared, own)
        return k

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8), timeout=60)) == list(range(8))


def test_T4_one_tape_on_two_threads():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        with pytest.raises(RuntimeError, match="another thread"):
            in_a_thread(tape.__enter__)
        with pytest.raises(RuntimeError, match="another thread"):
            in_a_thread(lambda: tape.gradient(y, x))
        z = y * x
    assert float(tape.gradient(z, x)) == 27.0


def test_T5_tasks_that_share_a_thread():
    """Documented: recording is by thread; a task that awaits in its block records the others."""
    x = tg.Variable(3.0)

    async def other():
        return x * x

    async def main():
        with tg.GradientTape() as tape:
            y = await asyncio.create_task(other())
        return tape.gradient(y, x)

    assert float(asyncio.run(main())) == 6.0


# ---- memory


@pytest.fixture
def no_collector():
    """Switch the garbage collector off: what goes, goes by reference counting."""
    gc.disable()
    yield
    gc.enable()


pytestmark = pytest.mark.usefixtures("no_collector")


def alive(references):
    """Return which of the weak references still have their object."""
    return [reference() is not None for reference in references]


def chain(x):
    """Return exp(exp(x)) summed, and weak references to the two intermediates."""
    a = tg.exp(x)
    b = tg.exp(a)
    return tg.sum(b), [weakref.ref(a), weakref.ref(b)]


def test_M1_the_gradient_frees_the_intermediates():
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape() as tape:
        y, refs = chain(x)
    assert alive(refs) == [True, True]
    tape.gradient(y, x)
    assert alive(refs) == [False, False]
    assert tape.watched_variables() == (x,)


def test_M1_also_when_it_fails():
    def fail(g, y, x):
        raise ZeroDivisionError

    failing = Primitive("failing", lambda xp, x: x * 1, fail)
    x = tg.Variable([0.0, 0.5])
    for call in ("gradient", "jacobian"):
        with tg.GradientTape() as tape:
            y, refs = chain(x)
            z = failing(y)
        assert alive(refs) == [True, True]
        with pytest.raises(ZeroDivisionError):
            getattr(tape, call)(z, x)
        assert alive(refs) == [False, False]


def test_M1_values_go_as_the_reverse_pass_goes():
    at_the_end = []

    def rule(g, _y, _x):
        at_the_end.extend(alive(refs))
        return g

    probe = Primitive("probe", lambda xp, x: x * 1, rule)
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape() as tape:
        y, refs = chain(probe(x))
    tape.gradient(y, x)
    assert at_the_end == [False, False]


def test_M1_a_jacobian_frees_them_too():
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape() as tape:
        y, refs = chain(x)
    tape.jacobian(y, x)
    assert alive(refs) == [False, False]


def test_M2_a_persistent_tape_keeps_them_until_it_goes():
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape(persistent=True) as tape:
        y, refs = chain(x)
    tape.gradient(y, x)
    assert alive(refs) == [True, True]
    del tape
    assert alive(refs) == [False, False]


def test_M3_a_tape_that_is_never_asked():
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape() as tape:
        _, refs = chain(x)
    reference = weakref.ref(tape)
    del tape
    assert reference() is None
    assert alive(refs) == [False, False]


def test_M3_reset_frees_them():
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape() as tape:
        _, refs = chain(x)
        tape.reset()
        assert alive(refs) == [False, False]


def test_M4_a_dead_branch():
    """Documented: values that no rule reads go at once, others when the tape lets go."""
    x = tg.Variable([0.0, 0.5])
    with tg.GradientTape() as tape:
        m = 2.0 * x
        k = 3.0 * m
        refs = [weakref.ref(m), weakref.ref(k)]
        del m, k
        assert alive(refs) == [False, False]
        e = tg.exp(x)
        refs = [weakref.ref(e)]
        del e
        assert alive(refs) == [True]
    del tape
    assert alive(refs) == [False]


ONES = np.ones((2, 3))
COUNT = np.arange(6).reshape(2, 3) % 3
# operation of an intermediate x: whether the tape keeps (x, the result) for the derivative
KEEPS = {
    "x + 1": (lambda x: x + 1.0, (False, False)),
    "x + array": (lambda x: x + ONES, (False, False)),
    "x - array": (lambda x: ONES - x, (False, False)),
    "x * 2": (lambda x: x * 2.0, (False, False)),
    "x * array": (lambda x: x * ONES, (False, False)),
    "x / array": (lambda x: x / (ONES + 1), (False, False)),
    "array / x": (lambda x: ONES / x, (True, True)),
    "x * x": (lambda x: x * x, (True, False)),
    "-x": (lambda x: -x, (False, False)),
    "x ** 2": (lambda x: x**2, (True, False)),
    "exp": (tg.exp, (False, True)),
    "log": (tg.log, (True, False)),
    "sqrt": (tg.sqrt, (False, True)),
    "tanh": (tg.tanh, (False, True)),
    "sin": (tg.sin, (True, False)),
    "abs": (tg.abs, (True, False)),
    "relu": (tg.nn.relu, (False, True)),
    "sigmoid": (tg.nn.sigmoid, (False, True)),
    "softmax": (tg.nn.softmax, (False, True)),
    "log_softmax": (tg.nn.log_softmax, (False, True)),
    # One number is no more than what is kept of it otherwise.
    "sum": (tg.sum, (False, True)),
    "sum of an axis": (lambda x: tg.sum(x, axis=0), (False, False)),
    "mean": (tg.mean, (False, True)),
    "max": (lambda x: tg.max(x, axis=0), (True, True)),
    "reshape": (lambda x: tg.reshape(x, (3, 2)), (False, False)),
    "transpose": (tg.transpose, (False, False)),
    "broadcast": (lambda x: tg.broadcast_to(x, (4, 2, 3)), (False, False)),
    "slice": (lambda x: x[:, 1:], (False, False)),
    "gather": (lambda x: x[[0, 0, 1]], (False, False)),
    "concat": (lambda x: tg.concat([x, ONES]), (False, False)),
    "stack": (lambda x: tg.stack([x, ONES]), (False, False)),
    "where": (lambda x: tg.where(COUNT > 0, x, 0.0), (False, False)),
    "cast": (lambda x: tg.astype(x, "float32"), (False, False)),
    "matmul with an array": (lambda x: x @ ONES.T, (False, False)),
    # One rule for all inputs: it reads x for the weights' sake.
    "linear_relu": (lambda x: tg.nn.linear_relu(x, ONES.T, np.ones(2)), (True, True)),
    "cumulative_sum": (lambda x: tg.cumulative_sum(x, axis=0), (False, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS)
def test_M5_what_an_operation_keeps(name):
    """It keeps the values that its rule reads, not those whose shape would do."""
    operation, expected = KEEPS[name]
    x = tg.Variable(np.full((2, 3), 0.5))
    with tg.GradientTape() as tape:
        m = x + 1.0
        y = operation(m)
    values = [weakref.ref(m), weakref.ref(y)]
    del m, y
    assert tuple(alive(values)) == expected
    assert "2 ops" in repr(tape) or name not in ("x + 1", "exp")  # the tape itself is whole


def test_M5_matmul_keeps_for_each_side_the_other():
    w = tg.Variable(np.ones((3, 2)))
    batch = tg.constant(np.ones((4, 3))) * 2.0
    for weights_are_watched in (True, False):
        with tg.GradientTape(watch_accessed_variables=False) as tape:
            other = w + 0.0
            tape.watch(other if weights_are_watched else batch)
            y = batch @ other
        values = [weakref.ref(batch), weakref.ref(other), weakref.ref(y)]
        del other, y
        again, batch = batch + 0.0, None
        assert alive(values) == [weights_are_watched, not weights_are_watched, False]
        batch = again
        del tape


def test_M5_forgotten_values_are_not_needed_for_the_gradient():
    x = tg.Variable([4.0, 9.0])
    with tg.GradientTape() as tape:
        y = tg.sum(tg.reshape(tg.sqrt(x + 0.0), (2, 1)) * 3.0 - 1.0)
    np.testing.assert_array_equal(tape.gradient(y, x), [0.75, 0.5])


@pytest.mark.parametrize("inside", [True, False])
def test_M6_a_running_loss_keeps_nothing(inside):
    x = tg.Variable([0.0, 0.5])
    running = tg.constant(0.0)
    refs = []
    for _ in range(5):
        with tg.GradientTape() as tape:
            m = tg.exp(x)
            loss = tg.sum(m * m)
            if inside:
                running = running + loss
        if not inside:
            running = running + loss
        tape.gradient(loss, x)
        refs.append(weakref.ref(m))
        del m, loss
    del tape
    assert alive(refs) == [False] * 5
    assert float(running) == pytest.approx(5 * (1 + np.e), rel=1e-6)


def test_M6_losses_kept_in_a_list_keep_nothing():
    x = tg.Variable([0.0, 0.5])
    losses, refs = [], []
    for _ in range(5):
        with tg.GradientTape() as tape:
            loss, (a, b) = chain(x)
        losses.append(loss)
        refs += [a, b]
    del tape
    assert alive(refs) == [False] * 10


def test_M7_operations_of_constants_are_not_recorded():
    c = tg.constant([1.0, 2.0])
    with tg.GradientTape() as tape:
        _, refs = chain(c)
        assert alive(refs) == [False, False]
        assert "0 ops" in repr(tape)


def test_M8_gradients_are_summed_as_they_arrive():
    most, pieces = 0, []

    def rule(g, _y, _x):
        nonlocal most
        most = max(most, sum(alive(pieces)))
        piece = g * 2.0
        pieces.append(weakref.ref(piece))
        return piece

    double = Primitive("double", lambda xp, x: x * 2, rule)
    x = tg.Variable(np.ones(3))
    with tg.GradientTape() as tape:
        y = tg.constant(np.zeros(3))
        for _ in range(50):
            y = y + double(x)
    np.testing.assert_array_equal(tape.gradient(y, x), [100.0, 100.0, 100.0])
    assert len(pieces) == 50
    assert most <= 2


# ---- nothing grows


def count_tensors():
    return sum(type(thing) is tg.Tensor for thing in gc.get_objects())


def assert_nothing_grows(step):
    """Run 1,000 steps: they must leave no Tensor, no cycle and no memory behind."""
    for _ in range(100):  # caches fill, lists reach their size
        step()
    gc.collect()  # which also empties free lists: they count as allocated
    tensors, blocks = count_tensors(), sys.getallocatedblocks()
    for _ in range(1000):
        step()
    assert count_tensors() == tensors
    assert gc.collect() == 0  # so there was nothing that only the collector can free
    # One object a step would be 1,000; NumPy's and Python's own caches take up to 450.
    assert sys.getallocatedblocks() - blocks < 900


def training_step():
    random = np.random.default_rng(0)
    w1, b1 = tg.Variable(random.normal(size=(3, 4))), tg.Variable(np.zeros(4))
    w2 = tg.Variable(random.normal(size=(4, 2)))
    x, labels = random.normal(size=(5, 3)), np.array([0, 1, 1, 0, 1])
    history = []

    def step():
        with tg.GradientTape() as tape:
            hidden = tg.nn.linear_relu(x, w1, b1)
            loss = tg.nn.softmax_cross_entropy(hidden @ w2, labels) + 1e-3 * tg.sum(
                w2[0] * w2.T[0, 0]
            )
        for v, g in zip((w1, b1, w2), tape.gradient(loss, [w1, b1, w2]), strict=True):
            v.assign_sub(0.1 * g)
        history[:] = [float(loss)]

    return step


def second_order_step():
    x = tg.Variable([1.0, 2.0])

    def step():
        with tg.GradientTape() as outer:
            with tg.GradientTape() as inner:
                y = tg.sum(x**3)
            slope = inner.gradient(y, x)
        outer.jacobian(slope, x)

    return step


def evaluation_step():
    """Views of a Variable that is never written to: who shows its memory must not be a list."""
    v = tg.Variable(np.ones((3, 4)))

    def step():
        return v[0], v.T, tg.reshape(v, (4, 3)) + 1.0

    return step


def short_lived_step():
    def step():
        v = tg.Variable([1.0, 2.0])
        view = v[1:]
        v.assign([3.0, 4.0])
        return view, tg.stop_gradient(v)

    return step


def custom_step():
    @tg.custom_gradient
    def cube(x):
        return x * x * x, lambda upstream: upstream * 3.0 * x * x

    again = tg.recompute_grad(lambda x: cube(x) * v)
    v = tg.Variable([1.0, 2.0])

    def step():
        with tg.GradientTape() as tape:
            y = again(v)
        tape.gradient(y, v)

    return step


def failing_step():
    x = tg.Variable([1.0, 2.0])

    def step():
        with tg.GradientTape() as tape:
            y = x * x
        with contextlib.suppress(ValueError):
            tape.gradient(y, x, unconnected_gradients="nonsense")
        with contextlib.suppress(TypeError):
            tape.gradient(y, [3.0])
        with contextlib.suppress(ValueError):
            x @ tg.ones((3, 3))

    return step


@pytest.mark.parametrize(
    "make",
    [
        training_step,
        second_order_step,
        evaluation_step,
        short_lived_step,
        custom_step,
        failing_step,
    ],
)
def test_M9_a_thousand_steps_leave_nothing_behind(make):
    assert_nothing_grows(make())


def test_M9_a_persistent_tape_that_is_reset_each_step():
    x = tg.Variable([1.0, 2.0])
    tape = tg.GradientTape(persistent=True)

    def step():
        tape.reset()
        with tape:
            y = tg.exp(x) * x
        tape.gradient(y, x)
        x.assign([1.0, 2.0])

    assert_nothing_grows(step)


def test_long_chains_are_freed_without_recursion():
    x = tg.Variable([0.5])
    with tg.GradientTape(persistent=True) as tape:
        y = x
        for _ in range(20_000):
            y = tg.tanh(y)
    first = weakref.ref(y)
    del y, tape
    assert first() is None


def test_a_long_chain_of_views_of_a_variable():
    x = tg.Variable(np.arange(6.0))
    with tg.GradientTape() as tape:
        y = x
        for i in range(2_000):
            y = tg.reshape(y, (2, 3) if i % 2 else (3, 2))
        y = y * y
    x.assign(np.zeros(6))
    np.testing.assert_array_equal(tape.gradient(y, x), 2.0 * np.arange(6.0))
