"""Compiled functions as CUDA graphs: the same as by plain launches, on the device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function import device as device_module
from tapegrad.errors import TapeWarning
from tapegrad.kernels import gemm

from .conftest import device_only
from .test_training import OPTIMIZERS

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(96, 12)).astype("f4"), RNG.integers(0, 4, 96)


@pytest.fixture(autouse=True)
def told_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_module, "_told", set())
    yield
    tg.config.cuda_graphs = True


class Net:
    """A network whose products are sums of elementwise ones, unless `products` says otherwise.

    Where there is no cuBLASLt, CuPy's products run, which refuse a capture.
    """

    def __init__(self, optimizer: str = "adam", products: bool = False) -> None:
        tg.random.seed(1)
        sizes = ((12, 8), (8,), (8, 4), (4,))
        self.v = [tg.Variable(tg.random.normal(s) * 0.3) for s in sizes]
        self.optimizer = OPTIMIZERS[optimizer]()
        self.mean = tg.metrics.Mean()
        self.products = products
        self.compiled = tg.function(self.step)

    def times(self, x: Any, w: Any) -> Any:
        if self.products:
            return x @ w
        return tg.sum(tg.expand_dims(x, 2) * w, axis=1)

    def step(self, x: Any, y: Any) -> Any:
        v = self.v
        with tg.GradientTape() as tape:
            h = tg.nn.dropout(tg.nn.relu(self.times(x, v[0]) + v[1]), 0.2)
            logits = self.times(h, v[2]) + v[3]
            loss = tg.nn.softmax_cross_entropy(logits, y)
        gradients = tape.gradient(loss, v)
        self.optimizer.apply_gradients(zip(gradients, v, strict=True))
        self.mean.update_state(loss)
        return {"loss": loss, "logits": logits, "noise": [tg.random.normal((5,))]}

    def state(self) -> list[Any]:
        counters = [self.optimizer.iterations, tg.random.default_generator().counter]
        return [x.numpy() for x in (*self.v, *counters, self.mean.result())]

    @property
    def is_graph(self) -> bool:
        return "a CUDA graph of" in self.compiled.explain_program()


def run(net: Net, graph: bool, steps: int = 30) -> list[bytes]:
    """Take steps on changing batches; return all that they gave and left, as bits."""
    tg.config.cuda_graphs = graph
    found = []
    for i in range(steps):
        part = slice(16 * (i % 6), 16 * (i % 6) + 16)
        if i == 20:
            net.optimizer.learning_rate.assign(0.003)
        result = net.compiled(tg.constant(X[part]), tg.constant(Y[part]))
        found.append(result)
    assert net.is_graph == graph
    values = [(r["loss"].numpy(), r["logits"].numpy(), r["noise"][0].numpy()) for r in found]
    return [x.tobytes() for x in (*(a for row in values for a in row), *net.state())]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_step_is_the_same_bit_for_bit(optimizer: str) -> None:
    assert run(Net(optimizer), True) == run(Net(optimizer), False)


def test_a_thousand_steps() -> None:
    assert run(Net(), True, 1000) == run(Net(), False, 1000)


def test_products_are_captured(cupy: ModuleType) -> None:
    """One of them on the second branch; each launch has a workspace of its own."""
    if "not used" in gemm.describe(cupy):
        pytest.skip("CuPy's own products refuse captures")
    net = Net(products=True)
    got = run(net, True)
    assert "1 of them on a second branch" in net.compiled.explain_program()
    assert got == run(Net(products=True), False)


def test_what_goes_to_the_host_is_launched_one_by_one(capsys: Any) -> None:
    v = tg.Variable([1.0, 2.0])

    @tg.function
    def step(x: tg.Tensor) -> tg.Tensor:
        tg.print(x)
        v.assign_add(x)
        return v * 1.0

    with pytest.warns(TapeWarning, match=r"CUDA graph.*\(print at "):
        results = [step(tg.constant([1.0, 1.0])).tolist() for _ in range(6)]
    assert results == [[i + 2.0, i + 3.0] for i in range(6)]
    assert len(capsys.readouterr().out.splitlines()) == 6
    f = tg.function(lambda x: x * 2.0)  # the capture has ended: another one can begin
    for i in range(5):
        assert f(tg.constant([float(i)])).tolist() == [2.0 * i]
    assert "a CUDA graph of" in f.explain_program()


@pytest.mark.parametrize("count", [3, 12, 70])
@pytest.mark.parametrize("join", [tg.concat, tg.stack])
def test_many_arrays_are_joined(join: Callable[..., Any], count: int) -> None:
    """CuPy sends the addresses of more than 8 to the device, which no graph can hold."""
    f = tg.function(lambda x: join([x * k for k in range(count)]))
    for i in range(8):
        x = np.full(5, float(i), "f4")
        joined = f(tg.constant(x))
        for k in range(50):  # whatever else goes there
            tg.constant(np.full(60, k, "f4"))
        want = np.stack([x * k for k in range(count)])
        np.testing.assert_array_equal(joined.numpy().reshape(count, 5), want)
    assert "a CUDA graph of" in f.explain_program()


def test_a_variable_that_moves() -> None:
    v = tg.Variable(np.ones(5, "f4"))
    f = tg.function(lambda x: x * v)
    for i in range(12):
        if i == 6:
            tg.optimizers.SGD(1.0).apply([tg.full(5, -1.0)], [v])
        assert f(tg.full(5, float(i))).tolist() == [i * (1.0 if i < 6 else 2.0)] * 5
    assert "a CUDA graph of" in f.explain_program()


def test_results_and_memory_are_the_callers_own(cupy: ModuleType) -> None:
    """Whatever is allocated between two calls, a graph writes to its own memory only."""
    f = tg.function(lambda x: (tg.sum(x * x), tg.exp(x) * 2.0))
    kept, others = [], []
    for i in range(40):
        x = tg.constant(np.full(1000 + 0, i / 40, "f4"))
        kept.append((i / 40, *f(x)))
        others.append(cupy.full(1000, i, "f4"))
        if i % 7 == 0:
            gc.collect()
    for i, other in enumerate(others):
        assert (tg.asarray(other).numpy() == i).all()
    for value, total, y in kept:
        np.testing.assert_allclose(total.numpy(), 1000 * value**2, 1e-4)
        np.testing.assert_allclose(y.numpy(), np.full(1000, 2 * np.exp(value)), 1e-5)


def test_streams_of_ones_own(cupy: ModuleType) -> None:
    f = tg.function(lambda x: tg.sum(tg.tanh(x) * 2.0))
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    results = []
    for i in range(30):
        with streams[i % 3]:
            results.append((i, f(tg.constant(np.full(20_000, i / 30, "f4")))))
    for stream in streams:
        stream.synchronize()
    for i, y in results:
        np.testing.assert_allclose(y.numpy(), 40_000 * np.tanh(i / 30), 1e-4)


def test_threads() -> None:
    v = tg.Variable(np.zeros(3, "f4"))
    f = tg.function(lambda x: (v.assign_add(tg.ones_like(x)), x * 2.0)[1])
    wrong: list[Any] = []

    def work(k: int) -> None:
        with tg.backend("cupy"):
            for i in range(25):
                y = f(tg.constant(np.full(3, 100.0 * k + i, "f4"))).tolist()
                if y != [2 * (100.0 * k + i)] * 3:
                    wrong.append((k, i, y))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong
    assert v.tolist() == [100.0] * 3


def test_in_debug_mode_a_compiled_step_checks_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written: its operations are launched one by one."""
    net = Net()
    run(net, True, 6)
    monkeypatch.setattr(tg.config, "debug", True)
    before = [x.tobytes() for x in net.state()[:4]]
    wrong = tg.constant(np.full(16, 4))
    with pytest.raises(ValueError, match="labels must be from 0 to 3, got 4"):
        net.compiled(tg.constant(X[:16]), wrong)
    assert [x.tobytes() for x in net.state()[:4]] == before
    assert "tg.config.debug is True" in net.compiled.explain_program()


@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_lookups(dtype: str) -> None:
    """Out of range they are NaN; whatever waits for the device next tells of it."""

    def step(table: Any, i: Any) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(table)
            taken = table[i + 0]
        return taken, tape.gradient(taken, table)

    lookup = tg.function(lambda table, i: tg.take(table, i + 0, axis=0))
    with_gradient = tg.function(step)
    table = RNG.normal(size=(50, 7)).astype("f4")
    for call in range(12):
        i = RNG.integers(-50, 50, 33).astype(dtype)
        if wrong := call % 3 == 2 and call > 3:
            i[5], i[9] = 50, -51
        arguments = tg.constant(table), tg.constant(i)
        y = lookup(*arguments)
        z, g = with_gradient(*arguments)
        if wrong:
            with pytest.raises(IndexError, match=r"\[getitem\] index out of bounds .* size 50"):
                y.numpy()
            with pytest.raises(IndexError, match="index out of bounds for axis 0 with size 50"):
                z.numpy()
        want = np.insert(table, 50, np.nan, 0)[np.where((i < -50) | (i > 49), 50, i % 50)]
        np.testing.assert_array_equal(y.numpy(), want)
        np.testing.assert_array_equal(z.numpy(), want)
        counts = np.bincount(np.clip(i, -50, 49) % 50, minlength=50)
        np.testing.assert_array_equal(g.numpy(), np.broadcast_to(counts[:, None], g.shape))
    assert "a CUDA graph of" in lookup.explain_program()


@pytest.mark.parametrize(("rows", "per_call"), [(96, 3), (90, 5)])
def test_several_steps_a_launch(rows: int, per_call: int) -> None:
    def take(graph: bool) -> list[bytes]:
        tg.config.cuda_graphs = graph
        net = Net()
        batches = tg.data.Batches((X[:rows], Y[:rows]), 8, shuffle=True, seed=4)
        steps = tg.data.Steps(net.compiled, batches, per_call)
        losses = [result["loss"].numpy() for _ in range(5) for result in steps]
        text = net.compiled.explain_program()
        assert (f"another of {per_call} batches" in text) == graph
        return [x.tobytes() for x in (*losses, *net.state())]

    assert take(True) == take(False)


def test_fit_takes_several_steps_a_launch() -> None:
    def fitted(many: int) -> Any:
        tg.random.seed(3)
        model = tg.Sequential([tg.layers.Dense(8, "relu"), tg.layers.Dense(4)])
        loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, ["accuracy"], steps_per_execution=many)
        history = model.fit(X, Y, batch_size=8, epochs=4, seed=2)
        return history.history, [w.tobytes() for w in model.get_weights()]

    assert fitted(1) == fitted(5)


@device_only
def test_the_second_branch_is_in_the_graph() -> None:
    """Two products that do not wait for each other."""
    a = tg.Variable(np.eye(64, dtype="f4"))
    f = tg.function(lambda x: (x @ a, (x + 1.0) @ a))
    x = tg.constant(RNG.normal(size=(64, 64)).astype("f4"))
    for _ in range(5):
        first, second = f(x)
    np.testing.assert_allclose(first.numpy(), x.numpy(), 1e-6)
    np.testing.assert_allclose(second.numpy(), x.numpy() + 1, 1e-6)
    if "a CUDA graph of" not in f.explain_program():
        pytest.skip("CuPy's cuBLAS refuses captures")
    assert "1 of them on a second branch" in f.explain_program()


@device_only
def test_memory_goes_back_with_the_function(cupy: ModuleType) -> None:
    def used() -> int:
        gc.collect()
        cupy.cuda.Device().synchronize()
        cupy.get_default_memory_pool().free_all_blocks()
        free, total = cupy.cuda.Device().mem_info
        return int(total - free)

    def work() -> None:
        f: Callable[..., Any] = tg.function(lambda x: tg.sum(tg.exp(x) * x))
        x = tg.constant(np.ones(1 << 22, "f4"))
        for _ in range(5):
            f(x)

    work()
    before = used()
    for _ in range(5):
        work()
    assert used() - before < 1 << 25
