"""Programs on a GPU as CUDA graphs, on a stand-in that keeps the rules of a device."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend, random
from tapegrad._function import device as device_module
from tapegrad._function import graphs, schedule, simplify
from tapegrad.errors import TapeWarning
from tapegrad.primitive import Update, primitives
from tests import fake_cupy, test_backends
from tests.cases import CASES
from tests.fake_cupy import CudaError
from tests.function import test_operations
from tests.function.compiled import assert_same, rewritten
from tests.function.programs import Training

cupy = test_backends.cupy
gpu = fake_cupy.device


def philox(xp: Any, counter: Any, key: Any, *, count: int) -> Any:
    """Draw random bits as the kernel does: counter and key are read when it runs."""
    bits = lambda c, k: np.random.Philox(
        key=int(k[1]) << 64 | int(k[0]), counter=int(c)
    ).random_raw(count)
    return gpu.call("philox", bits, (counter, key)) if count else None


def scatter_add(xp: Any, values: Any, index: Any, *, rows: int) -> Any:
    """Add rows by index as the kernel does: the meaning sorts, which waits for the device."""

    def add(v: Any, i: Any) -> Any:
        out = np.zeros((rows, v.shape[1]), v.dtype)
        np.add.at(out, i, v)
        return out

    return gpu.call("scatter_add", add, (values, index))


@pytest.fixture(autouse=True)
def on_device(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute on the stand-in, with no kernel but those that meanings have no graph without."""
    monkeypatch.setattr(_backend, "_kernels_enabled", True)
    for primitive in primitives.values():
        monkeypatch.setattr(primitive, "kernel", None)
    for update in vars(tg.optimizers).values():
        if isinstance(update, Update):
            monkeypatch.setattr(update, "kernel", None)
    monkeypatch.setattr(random._bits, "kernel", philox)
    monkeypatch.setattr(primitives["scatter_add"], "kernel", scatter_add)
    monkeypatch.setattr(simplify, "ENABLED", set(simplify.TABLE) - {"chains"})  # kernels too
    monkeypatch.setattr(device_module, "_told", set())
    monkeypatch.setattr(gpu, "graphs", [])
    tg.random.seed(0)
    yield
    assert gc.isenabled()
    assert len(gpu.streams) == 1
    assert not gpu.allocators


def graphs_alive() -> int:
    return sum(ref() is not None for ref in gpu.graphs)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: tg.optimizers.SGD(0.05),
    "momentum": lambda: tg.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: tg.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda: tg.optimizers.Adagrad(0.05),
    "rmsprop": lambda: tg.optimizers.RMSprop(0.01),
    "adam": lambda: tg.optimizers.Adam(0.01),
    "adam without epsilon": lambda: tg.optimizers.Adam(0.01, epsilon=0.0),
    "adamw": lambda: tg.optimizers.AdamW(0.01),
}
RNG = np.random.default_rng(0)
X = [RNG.normal(size=(8, 5)).astype("f4") for _ in range(4)]
Y = [RNG.integers(0, 3, 8) for _ in range(4)]


class Result(NamedTuple):
    loss: Any
    others: dict[str, Any]


class Trainer:
    """A network of three layers with dropout, an optimiser and metrics."""

    def __init__(self, optimizer: str = "adam", graph: bool = True) -> None:
        tg.random.seed(3)
        sizes = [(5, 16), (16,), (16, 16), (16,), (16, 3), (3,)]
        self.v = [tg.Variable(tg.random.normal(s) * 0.3, name=f"v{i}") for i, s in enumerate(sizes)]
        self.optimizer = OPTIMIZERS[optimizer]()
        self.accuracy = tg.metrics.SparseCategoricalAccuracy()
        self.mean = tg.metrics.Mean()
        self.graph = graph
        self.compiled = tg.function(self.step)

    def step(self, x: Any, y: Any) -> Any:
        v = self.v
        with tg.GradientTape() as tape:
            h = tg.nn.dropout(tg.nn.linear_relu(x, v[0], v[1]), 0.25)
            h = tg.nn.linear_relu(h, v[2], v[3])
            logits = tg.nn.linear(h, v[4], v[5])
            loss = tg.nn.softmax_cross_entropy(logits, y)
        gradients = tape.gradient(loss, v)
        self.optimizer.apply_gradients(zip(gradients, v, strict=True))
        self.accuracy.update_state(y, logits)
        self.mean.update_state(loss)
        noise = tg.random.uniform((3,))
        return Result(loss, {"logits": logits, "noise": [noise, tg.sum(noise)], "k": 3, "x": x})

    def __call__(self, i: int) -> Any:
        x, y = tg.constant(X[i % 4]), tg.constant(Y[i % 4])
        tg.config.cuda_graphs = self.graph
        try:
            return self.compiled(x, y)
        finally:
            tg.config.cuda_graphs = True

    def state(self) -> list[Any]:
        slots = [self.optimizer.slot(v, name) for v in self.v for name in self.optimizer._SLOTS]
        counters = [self.optimizer.iterations, tg.random.default_generator().counter]
        return [*self.v, *slots, *counters, self.accuracy.result(), self.mean.result()]


# ---- the same as plain launches


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_step_is_the_same_as_by_plain_launches(optimizer: str) -> None:
    found = []
    for graph in (True, False):
        trainer = Trainer(optimizer, graph)
        before = gpu.launched_graphs
        results = []
        for i in range(20):
            if i == 11:
                trainer.optimizer.learning_rate.assign(0.002)
            results.append(trainer(i))
        assert gpu.launched_graphs - before == (16 if graph else 0)  # 3 recorded, 1 launched
        found.append((results, [x.numpy() for x in trainer.state()]))
    assert_same(found[0], found[1])


def test_and_the_same_as_eager() -> None:
    eager, compiled = Trainer(), Trainer()
    for i in range(8):
        x, y = tg.constant(X[i % 4]), tg.constant(Y[i % 4])
        tg.random.seed(i)
        want = eager.step(x, y)
        tg.random.seed(i)
        assert_same(compiled(i), want)
    for a, b in zip(compiled.state(), eager.state(), strict=True):
        assert_same(a.numpy(), b.numpy())


# ---- every operation


def with_gradients(case: Any) -> Callable[..., Any]:
    def function(*xs: Any) -> Any:
        if case.differentiable and any(map(test_operations.floating, xs)):
            return test_operations.with_gradients(case.call, *xs)
        return case.call(*xs)

    return function


# How many results a boolean without axes gives is asked on the host; CuPy waits for a sort.
WAITING = ("getitem-True", "getitem-False", "sort", "argsort", "top_k")
COMPUTING = [
    case
    for case in CASES
    if not case.name.startswith((*test_operations.REFUSED, "to_backend", "constant-python"))
    and case.domains
    and not case.name.startswith(("zeros", "ones", "full"))
]


@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
@pytest.mark.parametrize("case", COMPUTING, ids=[case.name for case in COMPUTING])
def test_an_operation(case: Any) -> None:
    arrays = [
        np.ascontiguousarray(a).reshape(a.shape)
        for a in test_operations.groups(case, np.float64)[-1][0]
    ]
    function = with_gradients(case)
    compiled = tg.function(function)
    xs = [tg.constant(a) for a in arrays]
    with rewritten(False), np.errstate(all="ignore"):
        want = function(*xs)
        for _ in range(4):
            assert_same(compiled(*xs), want)
    (program,) = compiled.programs
    text = program.explain().splitlines()[0]
    assert ("a CUDA graph of" in text) == (not case.name.startswith(WAITING)), text


# ---- random programs


@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
def test_random_programs() -> None:
    """Bit for bit what the same program gives by plain launches."""
    captured = 0
    for seed in range(24):
        found = []
        for graph in (True, False):
            training = Training(seed)
            compiled = tg.function(training.step)
            tg.config.cuda_graphs = graph
            try:
                found.append((training.run(compiled, 7), training.state()))
            finally:
                tg.config.cuda_graphs = True
            captured += "a CUDA graph of" in compiled.explain_program()
        assert_same(found[0], found[1])
    assert captured >= 12  # the others look their indices over on the host


# ---- values that share memory


def swap(a: Any, b: Any, _x: Any) -> Any:
    old = a.value()
    a.assign(b)
    b.assign(old)
    return old


def transpose_in_place(a: Any, _b: Any, _x: Any) -> None:
    a.assign(a.value().T)


def shift(a: Any, _b: Any, _x: Any) -> Any:
    a[1:].assign(a[:-1] + 0.0)
    a[:1].assign(a[2:])
    return a


def before_and_after(a: Any, b: Any, x: Any) -> Any:
    first, view = a.value(), tg.reshape(a, (-1,))
    twice = a * 2.0
    a.assign_add(x)
    second = a.value()
    b.assign_sub(twice)
    return {"first": first, "view": view[2:5], "second": [second, a], "twice": twice, "b": b}


def of_the_input(a: Any, _b: Any, x: Any) -> Any:
    a.assign(x)
    return [x, tg.reshape(x, (9,)), x.T, tg.stop_gradient(x), x + 0.0]


def constants(_a: Any, _b: Any, x: Any) -> Any:
    return tg.constant([1.0, 2.0]), x * tg.ones((3, 3)), None, "text", 7


def once_more(a: Any, b: Any, x: Any) -> Any:
    for _ in range(3):
        a.assign_add(tg.matmul(a, b) * 0.1)
        b.assign(b * 0.5 + x)
    return tg.sum(a)


SHARING = [swap, transpose_in_place, shift, before_and_after, of_the_input, constants, once_more]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("function", SHARING, ids=lambda f: f.__name__)
def test_values_stay_what_they_were(function: Callable[..., Any], graph: bool) -> None:
    tg.config.cuda_graphs = graph
    try:
        values = np.arange(18.0, dtype="f4").reshape(2, 3, 3)
        mine, other = ([tg.Variable(x) for x in values] for _ in range(2))
        compiled = tg.function(lambda x: function(*mine, x))
        results, wanted = [], []
        for i in range(6):
            x = tg.constant(X[0][:3, :3] * i)
            results.append(compiled(x))
            wanted.append(function(*other, x))
            assert_same(results, wanted)  # those of earlier calls too
            assert_same(mine, other)
        assert len(compiled.programs) == 1
    finally:
        tg.config.cuda_graphs = True


def test_a_view_of_a_variable_as_an_argument() -> None:
    v = tg.Variable(np.arange(6.0, dtype="f4"))

    @tg.function
    def step(x: Any) -> Any:
        v.assign_sub(x)
        return v + x

    want = np.arange(6.0, dtype="f4")
    for _ in range(6):
        x = want[::-1].copy()
        y = step(v[::-1])
        want = want - x
        assert_same([y, v], [tg.constant(want + x), tg.constant(want)])
        want = want * 2 + np.arange(6.0, dtype="f4")
        v.assign(want)


def test_tensors_keep_the_old_values() -> None:
    v = tg.Variable([1.0, 2.0])
    step = tg.function(lambda: [v.assign(v * 2.0)])
    kept = []
    for i in range(6):
        kept.append((v.value(), v[:1], [2.0**i, 2.0 ** (i + 1)]))
        step()
    for value, part, want in kept:
        assert value.tolist() == want
        assert part.tolist() == want[:1]


def test_inputs_of_every_layout() -> None:
    f = tg.function(lambda x, y: (x @ y, x - y.T))
    for i in range(6):
        x = tg.constant(X[i % 4])
        y = tg.constant(X[(i + 1) % 4]).T if i % 2 else tg.constant(X[(i + 1) % 4].T.copy())
        x = x[::-1] if i % 3 else x
        assert_same(f(x, y), (x @ y, x - y.T))


# ---- what a graph costs


def test_a_call_is_one_launch_and_asks_the_device_nothing() -> None:
    trainer = Trainer()
    for i in range(6):
        trainer(i)
    batches = [(tg.constant(x), tg.constant(y)) for x, y in zip(X, Y, strict=True)]
    reads, launches, made = gpu.host_reads, gpu.launches, gpu.launched_graphs
    for _ in range(3):
        for x, y in batches:
            trainer.compiled(x, y)
    assert gpu.launched_graphs - made == 12
    assert gpu.host_reads == reads
    assert gpu.launches - launches == 12 * (2 + 4)  # two inputs in, four results out


def test_the_text_says_how_it_is_replayed() -> None:
    trainer = Trainer()
    for i in range(4):
        trainer(i)
    text = trainer.compiled.explain_program()
    assert text.startswith("# Trainer.step: 39 steps, 2 of them on a second branch, to be captured")
    trainer(4)
    (program,) = trainer.compiled.programs
    text = trainer.compiled.explain_program()
    assert text.startswith(
        "# Trainer.step: a CUDA graph of 39 steps, 2 of them on a second branch; "
        f"{program.arena / 1024:.1f} KiB of its own memory\n"
    )
    assert program.arena > 0
    assert text.count("\n  | ") == 2
    assert "linear_relu(x0, 'v0', 'v1')  float32[8, 16]" in text
    tg.config.cuda_graphs = False
    try:
        assert "plain launches of 39 steps: tg.config.cuda_graphs is False" in (
            trainer.compiled.explain_program()
        )
    finally:
        tg.config.cuda_graphs = True


def test_what_recording_left_free_is_given_back_first() -> None:
    f = tg.function(lambda x: tg.sum(tg.exp(x) * 2.0))
    gpu.pool.free_all_blocks()
    before, large = gpu.pool.total_bytes(), 1 << 20
    x = tg.constant(np.zeros(large, "f4"))
    sizes = []
    for _ in range(4):
        f(x)
        sizes.append(gpu.pool.total_bytes() - before)
    assert sizes[1] > 2 * x.nbytes
    assert max(sizes[2:]) < 2 * x.nbytes


def test_a_graph_goes_with_its_function() -> None:
    gc.disable()  # by counting references alone
    try:
        v = tg.Variable([1.0, 2.0])
        f = tg.function(lambda x: v.assign_add(x * v))
        for _ in range(5):
            f(tg.constant([1.0, 2.0]))
        assert graphs_alive() == 1
        del f
        assert graphs_alive() == 0
    finally:
        gc.enable()


# ---- capture again


def test_a_variable_that_moves_is_found() -> None:
    found = []
    for graph in (True, False):
        trainer = Trainer("sgd", graph)
        results = [trainer(i) for i in range(6)]
        frozen = tg.Variable(np.ones((5, 3), "f4"))
        f = tg.function(lambda x, v=frozen: x @ v)
        for _ in range(5):
            results.append(f(tg.constant(X[0])))
        before = frozen._array
        tg.optimizers.SGD(0.5).apply([tg.ones((5, 3))], [frozen])  # packs it into a buffer
        assert frozen._array is not before
        alive = graphs_alive()
        launched = gpu.launched_graphs
        for _ in range(4):
            results.append(f(tg.constant(X[0])))
        if graph:
            assert gpu.launched_graphs - launched == 3  # after one by plain launches
            assert graphs_alive() == alive
        results += [trainer(i) for i in range(3)]
        found.append((results, [x.numpy() for x in trainer.state()]))
    assert_same(found[0], found[1])
    np.testing.assert_allclose(
        found[0][0][-4].numpy(), X[0].sum(1)[:, None] * np.full(3, 0.5), 1e-5
    )


# ---- where a capture is not possible


def prints(v: Any, x: Any) -> Any:
    tg.print("x", x)
    v.assign_add(x)
    return v * 2.0


def copies(v: Any, x: Any) -> Any:
    v.assign_add(tg.tan(x))
    return v * 2.0


def refuses(v: Any, x: Any) -> Any:
    v.assign_add(tg.erf(x))
    return v * 2.0


def crosses(v: Any, x: Any) -> Any:
    there = tg.to_backend(x, "numpy")
    v.assign_add(tg.to_backend(there + 1.0, "cupy"))
    return v * 2.0


def only_captured(message: str) -> Callable[..., Any]:
    """Return a meaning of erf that CUDA's libraries refuse to have captured, as cuBLAS is."""

    def forward(xp: Any, x: Any) -> Any:
        if gpu.stream.capture is not None:
            raise NotImplementedError(message)
        return x * 0.5

    return forward


PLAIN = {
    "a value goes to the host": (prints, "CudaError: the host waits for a stream.*print at"),
    "something is copied from the host": (
        copies,
        "CudaError: an array is copied from the host.*tan at",
    ),
    "a library refuses": (refuses, r"NotImplementedError: no capture here \(erf at .*graphs.py:"),
    "NumPy takes part": (crosses, r"it computes with NumPy's arrays too \(transfer at"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_captured_is_launched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives["erf"], "forward", only_captured("no capture here"))
    tan = lambda xp, x: x + xp.asarray(np.full(x.shape, 0.5, "f4"))
    monkeypatch.setattr(primitives["tan"], "forward", tan)
    function, cause = PLAIN[name]
    v, other = tg.Variable(np.zeros(5, "f4")), tg.Variable(np.zeros(5, "f4"))
    f = tg.function(lambda x: function(v, x))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(8):
            x = tg.constant(X[0][i])
            assert_same([f(x), v], [function(other, x), other])
        assert gpu.stream.capture is None
        for _ in range(5):  # another signature, with the same cause: nothing more is said
            assert_same(f(x[:5]), function(other, x))
    (warning,) = caught
    assert warning.category is TapeWarning
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(
        "test_what_cannot_be_captured_is_launched.<locals>.<lambda> cannot be replayed as a CUDA "
        "graph, and its operations are launched one by one: "
    )
    assert re.search(cause, text)
    assert text.endswith("tg.config.cuda_graphs = False does so without this warning")
    assert re.search("plain launches of .+ steps: " + cause, f.explain_program())
    assert graphs_alive() == 0
    g = tg.function(lambda x: x * 2.0)  # and others can be captured as before
    for _ in range(4):
        g(tg.constant([1.0]))
    assert graphs_alive() == 1


def test_a_switch() -> None:
    assert tg.config.cuda_graphs is True
    v = tg.Variable([1.0])
    f = tg.function(lambda x: v.assign_add(x) * 2.0)
    for i in range(12):
        tg.config.cuda_graphs = i < 6 or i > 8
        before = gpu.launched_graphs
        assert f(tg.constant([1.0])).tolist() == [2.0 * (i + 2)]
        assert (gpu.launched_graphs > before) == (3 <= i < 6 or i > 8)
    with pytest.raises(
        ValueError, match=r"config.cuda_graphs must be one of True, False, got 'no'"
    ):
        tg.config.cuda_graphs = "no"  # type: ignore[assignment]


# ---- errors


def test_an_error_before_the_launch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    v = tg.Variable([1.0, 2.0])
    f = tg.function(lambda x: v.assign_add(x))
    for _ in range(4):
        f(tg.constant([1.0, 1.0]))

    def full(*_: Any) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(fake_cupy.FakeArray, "__setitem__", full)
        with pytest.raises(MemoryError):
            f(tg.constant([1.0, 1.0]))
    assert v.tolist() == [5.0, 6.0]
    f(tg.constant([1.0, 1.0]))
    assert v.tolist() == [6.0, 7.0]


def test_a_launch_that_fails_says_that_the_values_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    v, other = tg.Variable([1.0, 2.0], name="v"), tg.Variable([3.0])
    f = tg.function(lambda x: v.assign_add(x * other))
    for _ in range(4):
        f(tg.constant([1.0, 1.0]))
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "fails_to_launch", True)
        with pytest.raises(CudaError, match="could not be launched"):
            f(tg.constant([1.0, 1.0]))
    again = lambda: f(tg.constant([1.0, 1.0]))
    for use in (lambda: v * 1.0, again, again):
        with pytest.raises(RuntimeError, match="'v' holds neither its old nor its new values"):
            use()
    assert other.tolist() == [3.0]  # which is only read
    v.assign([0.0, 1.0])
    for i in range(4):
        f(tg.constant([1.0, 1.0]))
        assert v.tolist() == [3.0 * (i + 1), 3.0 * (i + 1) + 1]
    assert graphs_alive() == 1


def test_an_error_while_launching_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    v = tg.Variable([1.0, 2.0])
    f = tg.function(lambda x: [v.assign_add(x), v.assign(tg.sinh(v * x))][:0])
    for _ in range(2):
        f(tg.constant([0.0, 0.0]))

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(primitives["sinh"], "forward", fails)
        with pytest.raises(ZeroDivisionError):  # in the warm-up: after the first write
            f(tg.constant([1.0, 1.0]))
    with pytest.raises(RuntimeError, match="neither its old nor its new"):
        v.numpy()
    assert len(gpu.streams) == 1
    (program,) = f.programs
    assert program._workplace is None  # type: ignore[attr-defined]  # nothing is warm yet


class _Full:
    """Pools of which the n-th malloc of those that are not the default one finds no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        plain, self.calls = fake_cupy.MemoryPool.malloc, 0

        def malloc(pool: Any, size: int) -> Any:
            self.calls += pool is not gpu.pool
            if pool is not gpu.pool and self.calls >= at:
                raise MemoryError("out of memory")
            return plain(pool, size)

        monkeypatch.setattr(fake_cupy.MemoryPool, "malloc", malloc)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_without_memory_for_a_graph_it_is_launched(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, other = tg.Variable(np.zeros(5, "f4")), tg.Variable(np.zeros(5, "f4"))
    step = lambda v, x: (v.assign_add(tg.sinh(tg.exp(x))), x * 2.0)[1]
    f = tg.function(lambda x: step(v, x))
    full = _Full(monkeypatch, at)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(6):
            x = tg.constant(X[0][i])
            assert_same([f(x), v], [step(other, x), other])
    assert full.calls == at
    (warning,) = caught
    assert "one by one: there is no memory left for a graph of its own" in str(warning.message)
    assert len(gpu.streams) == 1
    assert gpu.stream.capture is None


def test_memory_that_ends_after_the_first_write(monkeypatch: pytest.MonkeyPatch) -> None:
    v = tg.Variable([1.0, 2.0])
    f = tg.function(lambda x: [v.assign_add(x), v.assign(tg.sinh(v * x))][:0])
    for _ in range(2):
        f(tg.constant([0.0, 0.0]))
    full = _Full(monkeypatch, 2)  # the input's copy is the first
    with pytest.raises(MemoryError):
        f(tg.constant([1.0, 1.0]))
    assert full.calls == 2
    with pytest.raises(RuntimeError, match="neither its old nor its new"):
        v.numpy()


# ---- threads and streams


@pytest.fixture
def busy_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_threads")
@pytest.mark.parametrize("attempt", range(4))  # a recording beside a replay showed in one of 4
def test_threads(attempt: int) -> None:
    v = tg.Variable(np.zeros(5, "f4"))
    f = tg.function(lambda x: (v.assign_add(tg.ones_like(x)), x * 2.0)[1])
    wrong: list[Any] = []
    start = threading.Barrier(4)

    def work(k: int) -> None:
        with tg.backend("cupy"):
            start.wait(timeout=30)
            for i in range(20):
                x = tg.constant(np.full(5, k * 100.0 + i, "f4"))
                y = f(x)
                if y.tolist() != [2.0 * (k * 100 + i)] * 5:
                    wrong.append((k, i, y))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert v.tolist() == [80.0] * 5
    assert graphs_alive() == 1


def test_callers_on_streams_of_their_own() -> None:
    """The stand-in refuses whatever another stream may still be busy with."""
    stateless = tg.function(lambda x, y: (tg.tanh(x) @ y, tg.sum(x)))
    results = []
    streams = [gpu.null, fake_cupy.Stream(non_blocking=True), fake_cupy.Stream()]
    for i in range(12):
        with streams[i % 3]:
            x = tg.constant(X[i % 4])
            y = tg.tanh(tg.constant(X[0].T))
            results.append((stateless(x, y), (tg.tanh(x) @ y, tg.sum(x))))
            del x, y  # their memory is used again at once
            tg.constant(X[1])
    assert gpu.launched_graphs
    for stream in streams:
        stream.synchronize()
    for got, want in results:
        assert_same(got, want)


def test_a_capture_of_the_callers_own() -> None:
    """It gets the launches themselves."""
    v = tg.Variable([1.0, 2.0])
    f = tg.function(lambda x: v.assign_add(x * 2.0) * 1.0)
    x = tg.constant([1.0, 1.0])
    for _ in range(4):
        f(x)
    stream, pool = fake_cupy.Stream(non_blocking=True), fake_cupy.MemoryPool()
    stream.wait_event(gpu.stream.record())
    collects, before = gc.isenabled(), gpu.launched_graphs
    gc.disable()
    try:
        with stream, fake_cupy.FakeCupy().cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            y = f(x)
            graph = stream.end_capture()
    finally:
        if collects:
            gc.enable()
    assert v.tolist() == [9.0, 10.0]
    for i in range(3):
        graph.launch(stream)
        stream.synchronize()
        assert y.tolist() == v.tolist() == [9.0 + 2 * (i + 1), 10.0 + 2 * (i + 1)]
    assert gpu.launched_graphs - before == 3


# ---- faults planted on purpose


def trained(count: int = 8) -> Trainer:
    trainer = Trainer()
    for i in range(count):
        trainer(i)
    return trainer


def no_waits(branch: int) -> Callable[..., None]:
    place = schedule.Schedule._place

    def forgetful(self: Any, *arguments: Any) -> None:
        place(self, *arguments)
        self.launches = [x._replace(after=None) if x.branch == branch else x for x in self.launches]
        if branch == schedule.MAIN:  # but for the end, where it must
            self.end = max(i for i, x in enumerate(self.launches) if x.branch == schedule.SECOND)
            self.awaited.add(self.end)

    return forgetful


def gradients_only(x: Any, w: Any, v: Any) -> Any:
    with tg.GradientTape() as tape:
        tape.watch([w, v])
        loss = tg.sum(tg.square(tg.nn.relu(x @ w) @ v))
    return tape.gradient(loss, [w, v])


def gradients_alone() -> None:
    w = [tg.constant(RNG.normal(size=s).astype("f4")) for s in ((5, 6), (6, 3))]
    f = tg.function(gradients_only)
    for x in X:
        f(tg.constant(x), *w)


class Forgetful(schedule.Schedule):
    """Does not wait for the second branch at the end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.end = None


IN_CAPTURE: dict[str, tuple[Any, str, Any, str]] = {
    "memory goes back before the branches meet": (
        schedule.Schedule, "_known_done", lambda self, position: position, "a race: "
    ),
    "the main branch does not wait": (schedule.Schedule, "_place", no_waits(0), "a race: "),
    "the second branch does not wait": (
        schedule.Schedule, "_place", no_waits(1),
        "a captured stream waits for an event from outside",
    ),
    "the branches do not meet": (
        device_module, "Schedule", Forgetful, "a stream that did not come back"
    ),
    "an event is not kept": (
        graphs.Workplace, "record",
        lambda self, branch: self.streams[branch].record(), "an event was freed before the end",
    ),
    "the collector runs": (
        graphs, "_without_collection", contextlib.nullcontext, "garbage collector may run"
    ),
}  # fmt: skip


# What shows the fault, where a training step does not.
RUNS: dict[str, Callable[[], Any]] = {
    "the branches do not meet": gradients_alone,
    "an event is not kept": lambda: run_steps(5),
}


@pytest.mark.parametrize("name", IN_CAPTURE)
def test_a_fault_is_found_in_the_capture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, fault, message = IN_CAPTURE[name]
    monkeypatch.setattr(owner, attribute, fault)
    # What is launched one by one is not looked at: there it would be found before.
    monkeypatch.setattr(gpu, "checks", False)
    with pytest.warns(TapeWarning, match=message):
        RUNS.get(name, trained)()


@pytest.mark.parametrize("branch", [0, 1])
def test_a_branch_that_does_not_wait_is_found_in_the_first_call(
    branch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule.Schedule, "_place", no_waits(branch))
    with pytest.raises(CudaError, match="on another stream, and did not wait for that"):
        trained()


def test_memory_from_the_common_pool_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Workplace, "allocator", lambda self: contextlib.nullcontext())
    with pytest.raises(CudaError, match="touches memory that was given back"):
        trained()


def test_a_pool_that_is_not_kept_is_found() -> None:
    trainer = trained()
    (program,) = trainer.compiled.programs
    place = program._graph._workplace  # type: ignore[attr-defined]
    place.pool = None
    with pytest.raises(CudaError, match="the graph's pool is gone"):
        trainer(8)


def test_memory_taken_from_a_captured_pool_is_found() -> None:
    trainer = trained()
    (program,) = trainer.compiled.programs
    place = program._graph._workplace  # type: ignore[attr-defined]
    with pytest.raises(CudaError, match="from the pool of a captured graph"), place.allocator():
        tg.zeros(5)


def test_a_call_that_waits_for_nobody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Workplace, "turn", lambda self: contextlib.nullcontext(gpu.stream))
    with pytest.raises(CudaError, match="on another stream, and did not wait for that"):
        test_callers_on_streams_of_their_own()


def test_what_the_second_branch_holds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a deep network would keep the gradients of all its activations."""

    def step(x: Any, *w: Any) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(w)
            for v in w:
                x = tg.tanh(x @ v)
            loss = tg.sum(x)
        return tape.gradient(loss, w)

    def size(layers: int) -> int:
        f = tg.function(step)
        x = tg.constant(np.ones((64, 64), "f4"))
        w = [tg.constant(np.eye(64, dtype="f4"))] * layers
        for _ in range(4):
            f(x, *w)
        (program,) = f.programs
        return program.arena

    activations, weights = 64 * 64 * 4, 64 * 64 * 4
    grows = size(24) - size(12)
    assert grows <= 12 * (activations + 2 * weights)  # w's static copy, its gradient
    monkeypatch.setattr(schedule, "_UNFINISHED", 1000)
    assert size(24) - size(12) >= grows + 8 * activations


# ---- several steps a launch


def run_steps(per_call: int, epochs: int = 5, graph: bool = True, rows: int = 40) -> Any:
    tg.config.cuda_graphs = graph
    try:
        trainer = Trainer()
        rng = np.random.default_rng(1)
        data = rng.normal(size=(rows, 5)).astype("f4"), rng.integers(0, 3, rows)
        steps = tg.data.Steps(
            trainer.step, tg.data.Batches(data, 4, shuffle=True, seed=7), per_call
        )
        results = [result for _ in range(epochs) for result in steps]
        return results, trainer.state(), steps
    finally:
        tg.config.cuda_graphs = True


@pytest.mark.parametrize(("rows", "per_call"), [(40, 5), (40, 10), (43, 4), (41, 20)])
def test_several_steps_a_launch(rows: int, per_call: int) -> None:
    *got, steps = run_steps(per_call, rows=rows)
    plain = run_steps(per_call, rows=rows, graph=False)
    assert_same([got[0], [x.numpy() for x in got[1]]], [plain[0], [x.numpy() for x in plain[1]]])
    loss = got[0][0].loss
    assert loss.shape == (min(per_call, rows // 4),)
    text = steps._step.explain_program()
    assert (f"; another of {per_call} batches, " in text) == (per_call < 20)


def test_a_call_of_several_steps_is_one_launch() -> None:
    reads: list[int] = []
    made: list[int] = []
    *_, steps = run_steps(5)
    for _ in range(3):
        reads.append(gpu.host_reads)
        made.append(gpu.launched_graphs)
        for _ in steps:
            pass
    assert np.diff(reads).tolist() == [0, 0]
    assert np.diff(made).tolist() == [2, 2]


@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
def test_steps_that_cannot_be_captured(capsys: pytest.CaptureFixture[str]) -> None:
    v = tg.Variable(0.0)

    def step(x: Any) -> Any:
        tg.print(tg.sum(x))
        v.assign_add(tg.sum(x))
        return v + 0.0

    steps = tg.data.Steps(step, tg.data.Batches(np.arange(12.0, dtype="f4"), 2), 3)
    totals = np.cumsum(np.arange(12).reshape(6, 2).sum(1))
    for epoch in range(3):
        got = np.concatenate([x.numpy() for x in steps])
        np.testing.assert_array_equal(got, totals + epoch * 66)
    assert len(capsys.readouterr().out.split()) == 18


@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
@pytest.mark.parametrize("at", [1, 4])
def test_steps_without_memory_for_a_graph(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of several steps has written nothing yet: they are done one by one."""
    v = tg.Variable(0.0)

    def step(x: Any) -> Any:
        v.assign_add(tg.sum(x))
        return v + 0.0

    _Full(monkeypatch, at)
    steps = tg.data.Steps(step, tg.data.Batches(np.arange(12.0, dtype="f4"), 2), 3)
    totals = np.cumsum(np.arange(12).reshape(6, 2).sum(1))
    for epoch in range(3):
        got = np.concatenate([x.numpy() for x in steps])
        np.testing.assert_array_equal(got, totals + epoch * 66)


@pytest.mark.parametrize("per_call", [2, 3])
def test_steps_that_compute_with_numpy_too(per_call: int) -> None:
    total = tg.Variable(0.0)
    with tg.backend("numpy"):
        there = tg.Variable(1.0)

    def step(x: Any) -> Any:
        there.assign_add(1.0)
        total.assign_add(tg.sum(x) + tg.to_backend(there, "cupy"))
        return total + 0.0

    steps = tg.data.Steps(step, tg.data.Batches(np.zeros(12, "f4"), 1), per_call)
    with pytest.warns(TapeWarning, match=r"computes with NumPy's arrays too \(\w+ at "):
        got = np.concatenate([x.numpy() for x in steps])
    np.testing.assert_array_equal(got, np.cumsum(np.arange(2, 14)))


def test_steps_read_what_variables_hold_then() -> None:
    """Variables that move between two calls, and data that was read from one."""
    v, data = tg.Variable([1.0, 1.0]), tg.Variable(np.arange(16.0, dtype="f4").reshape(8, 2))
    values = data.numpy()

    def step(x: Any) -> Any:
        v.assign_add(tg.sum(x, axis=0))
        return v + 0.0, x, tg.constant([3.0])

    steps = tg.data.Steps(step, tg.data.Batches(data, 2), 2)
    total = np.ones(2)
    for epoch in range(6):
        if epoch == 4:
            tg.optimizers.SGD(0.0).apply([tg.ones(2)], [v])
            data.assign(values * 2.0)  # the batches are of the values that were read
        results = list(steps)
        for k, (sums, x, three) in enumerate(results):
            rows = values[4 * k : 4 * k + 4].reshape(2, 2, 2)
            np.testing.assert_array_equal(x.numpy(), rows)
            for j in range(2):
                total = total + rows[j].sum(0)
                np.testing.assert_array_equal(sums.numpy()[j], total)
            np.testing.assert_array_equal(three.numpy(), [[3.0], [3.0]])
    assert "another of 2 batches" in steps._step.explain_program()


def test_two_epochs_at_once_do_not_mix() -> None:
    batches = tg.data.Batches(np.arange(12.0, dtype="f4"), 2, shuffle=True, seed=2)
    f = tg.function(lambda x: x * 1.0)
    for steps in [tg.data.Steps(f, batches, 2)] * 3:
        seen = [np.concatenate([a.numpy(), b.numpy()]) for a, b in zip(steps, steps, strict=True)]
        for half in (slice(0, 2), slice(2, 4)):
            assert sorted(np.concatenate([x[half] for x in seen]).reshape(-1)) == list(range(12))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where there was a capture, one entry for each."""
    found: list[Any] = []
    begin = fake_cupy.Stream.begin_capture
    monkeypatch.setattr(
        fake_cupy.Stream, "begin_capture", lambda stream: found.append(stream) or begin(stream)
    )
    return found


@pytest.mark.parametrize("feeds", [2, 4, 5])
def test_several_feeds_of_one_function(feeds: int, captures: list[Any]) -> None:
    """Each has a graph of its own that stays, while there are no more than four."""
    f = tg.function(lambda x: tg.sum(x))
    all_steps = [
        tg.data.Steps(f, tg.data.Batches(np.arange(8.0, dtype="f4") + 10 * k, 2), 2)
        for k in range(feeds)
    ]
    for _ in range(5):
        for k, steps in enumerate(all_steps):
            sums = np.concatenate([x.numpy() for x in steps])
            np.testing.assert_array_equal(sums, np.array([1, 5, 9, 13]) + 20 * k)
    (program,) = f.programs
    # One whose graph was let go of has a call that warms up and one that captures, in each epoch.
    assert len(captures) == (feeds if feeds < 5 else 5 * feeds - 1)
    assert len(program._loops) == min(feeds, 4)  # type: ignore[attr-defined]
    assert f.explain_program().count("another of 2 batches") == min(feeds, 4)


def test_training_and_validation_take_turns(captures: list[Any]) -> None:
    """What one writes the other reads."""
    total = tg.Variable(0.0)

    def step(x: Any, sign: Any) -> Any:
        total.assign_add(tg.sum(x * sign))
        return total + 0.0

    f = tg.function(step)
    data = np.arange(12.0, dtype="f4")
    up, down = (
        tg.data.Steps(f, tg.data.Batches((data, np.full(12, sign, "f4")), 3), 2)
        for sign in (1.0, -1.0)
    )
    for _ in range(6):
        rising, falling = (np.concatenate([x.numpy() for x in steps]) for steps in (up, down))
        np.testing.assert_array_equal(rising, [3, 15, 36, 66])
        np.testing.assert_array_equal(falling, [63, 51, 30, 0])
    assert len(captures) == 2


def test_a_feed_that_is_gone_takes_its_graph_along() -> None:
    f = tg.function(lambda x: tg.sum(x))
    kept = tg.data.Steps(f, tg.data.Batches(np.arange(8.0, dtype="f4"), 2), 2)
    gc.disable()  # no collection is needed
    try:
        for k in range(3):
            steps = tg.data.Steps(f, tg.data.Batches(np.arange(8.0, dtype="f4") + k, 2), 2)
            for _ in range(3):
                for each in (kept, steps):
                    list(each)
            (program,) = f.programs
            assert len(program._loops) == 2  # type: ignore[attr-defined]
            del steps, each
            assert len(program._loops) == 1  # type: ignore[attr-defined]
    finally:
        gc.enable()


def test_data_that_a_graph_does_not_keep_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    make = graphs.Graph.__init__
    monkeypatch.setattr(
        graphs.Graph,
        "__init__",
        lambda self, place, issue, inputs, kept=(): make(self, place, issue, inputs),
    )
    *_, steps = run_steps(5)
    (program,) = steps._step.programs
    feed = steps._feed
    feed.arrays, steps._batches._arrays = [], None
    with pytest.raises(CudaError, match="touches memory that was given back"):
        program.run_many(feed, 0)


def test_fit_takes_several_steps_a_launch() -> None:
    found = []
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 5)).astype("f4"), rng.integers(0, 3, 50)
    for many in (1, 4):
        tg.random.seed(5)
        model = tg.Sequential(
            [tg.layers.Dense(8, "relu"), tg.layers.Dropout(0.25), tg.layers.Dense(3)]
        )
        loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, ["accuracy"], steps_per_execution=many)
        before = gpu.launched_graphs
        history = model.fit(x, y, batch_size=4, epochs=4, seed=2)
        found.append((history.history, model.get_weights()))
        # 12 whole batches an epoch, 3 recorded and 1 launched; of calls of 4 the first is so, and
        # the second launched. The batches of 2 rows are launched as a graph from the fourth.
        assert gpu.launched_graphs - before == {1: 45, 4: 11}[many]
    assert_same(found[0], found[1])
