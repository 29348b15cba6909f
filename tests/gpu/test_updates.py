"""What compiled training steps do with gradients: computed where they are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function import device as device_module
from tapegrad._function import simplify
from tapegrad.kernels import gemm, gemm_update
from tapegrad.primitive import primitives
from tests.function.compiled import rewritten

from .conftest import STAND_IN, on_device

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 16, 12)).astype("f4"), RNG.integers(0, 4, (6, 16))
SIZES = ((12, 8), (8,), (8, 8), (8,), (8, 4), (4,))


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    yield
    tg.config.cuda_graphs = True


class Net:
    """Two hidden layers, and what a step does with the gradients."""

    def __init__(self, finish: Callable[..., Any], activation: Any, weight_decay: bool) -> None:
        rng = np.random.default_rng(1)
        self.v = [tg.Variable(rng.normal(size=s).astype("f4") * 0.3) for s in SIZES]
        self.optimizer = tg.optimizers.SGD(0.1, momentum=0.9)
        self.clipped = tg.optimizers.Adam(0.01, global_clipnorm=0.5)
        self._finish, self._activation, self._decays = finish, activation, weight_decay
        self.compiled = tg.function(self.step)

    def step(self, x: Any, y: Any) -> Any:
        loss, gradients = self.gradients(x, y)
        self.batch = x, y
        return loss, self._finish(self, gradients)

    def gradients(self, x: Any, y: Any) -> Any:
        v = self.v
        with tg.GradientTape() as tape:
            h = self._activation(x @ v[0] + v[1])
            h = self._activation(h @ v[2] + v[3])
            loss = tg.mean(tg.nn.softmax_cross_entropy(h @ v[4] + v[5], y))
            if self._decays:
                loss = loss + 1e-3 * sum(tg.sum(w * w) for w in v)
        return loss, tape.gradient(loss, v)


def apply(net: Net, gradients: Any) -> None:
    net.optimizer.apply(gradients, net.v)


def clip(net: Net, gradients: Any) -> None:
    net.clipped.apply(gradients, net.v)


def give_out(net: Net, gradients: Any) -> Any:
    net.optimizer.apply(gradients, net.v)
    return gradients


def look_at_later(net: Net, gradients: Any) -> Any:
    net.optimizer.apply(gradients, net.v)
    return tg.sqrt(sum(tg.sum(g * g) for g in gradients))


def leave_out_some(net: Net, gradients: Any) -> None:
    """The first call packs all of them; later there are two runs, with a gap between."""
    if not net.optimizer._groups:
        net.optimizer.apply(gradients, net.v)
    else:
        net.optimizer.apply_gradients(
            zip(gradients[:2] + gradients[4:], net.v[:2] + net.v[4:], strict=True)
        )


def give_one_to_two(net: Net, gradients: Any) -> None:
    net.optimizer.apply([*gradients[:3], gradients[1], *gradients[4:]], net.v)


def apply_twice(net: Net, gradients: Any) -> None:
    net.optimizer.apply(gradients, net.v)
    net.optimizer.apply([g * 0.5 for g in gradients], net.v)


def go_on(net: Net, gradients: Any) -> None:
    net.optimizer.apply(gradients, net.v)
    net.optimizer.apply(net.gradients(*net.batch)[1], net.v)


def relu(x: Any) -> Any:
    return tg.nn.relu(x)


# What is done with the gradients, the activation, whether weights are decayed, and how many copies
# are left of those that gathering takes: what is gathered twice is copied once, and where two steps
# share the memory all are.
CASES: dict[str, tuple[Callable[..., Any], Any, bool, int]] = {
    "relu": (apply, relu, False, 0),
    "tanh": (apply, tg.tanh, False, 0),
    "weight decay": (apply, relu, True, 0),
    "clipping": (clip, tg.tanh, False, 0),
    "gradients are returned": (give_out, relu, False, 0),
    "gradients are used later": (look_at_later, tg.tanh, True, 0),
    "a layer is left out": (leave_out_some, relu, False, 0),
    "one gradient for two": (give_one_to_two, relu, False, 1),
    "two steps in one": (apply_twice, relu, False, 12),
    "two steps in one, one after the other": (go_on, relu, False, 12),
}


def run(name: str) -> tuple[list[bytes], int | None]:
    """Return all that some steps give and leave, as bits, and how many copies one of them makes."""
    net = Net(*CASES[name][:3])
    results = [net.compiled(tg.constant(X[i % 6]), tg.constant(Y[i % 6])) for i in range(12)]
    leaves = [
        x.numpy().tobytes()
        for loss, rest in results  # only now: a later call must not have changed them
        for x in (loss, *([] if rest is None else rest if isinstance(rest, list) else [rest]))
    ]
    program = net.compiled.programs[-1]
    graph = getattr(program._graph, "_graph", None)
    copies = sum(n.name == "setitem" for n in graph._nodes) if STAND_IN and graph else None
    return leaves + [v.numpy().tobytes() for v in net.v], copies


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_computed_where_they_are_gathered(
    name: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tg.config.cuda_graphs = graph
    values, copies = run(name)
    monkeypatch.setattr(device_module, "gathered", lambda program: {})
    copied, all_copies = run(name)
    assert values == copied
    if graph and STAND_IN:
        assert copies == CASES[name][3]
        assert all_copies == (4 if "left out" in name else 12 if "two steps" in name else 6)


FILLING = {
    "matmul": ({}, [(5, 8), (8, 4)]),
    "matmul_nt": ({}, [(5, 8), (4, 8)]),
    "matmul_tn": ({}, [(8, 5), (8, 4)]),
    "linear_relu_grad": ({}, [(300, 4), (300, 4)]),
    "sum_to": ({"shape": (4,)}, [(6, 5, 4)]),
}


@pytest.mark.parametrize("name", FILLING)
def test_a_kernel_fills_what_it_is_given_if_it_can(name: str, cupy: Any) -> None:
    """An output's memory must be as new memory would be: aligned, of the type, in C order."""
    primitive, (params, shapes) = primitives[name], FILLING[name]
    arrays = [on_device(RNG.normal(size=s).astype("f4")) for s in shapes]
    want = primitive.compute(arrays, params)
    for i, y in enumerate(want if isinstance(want, tuple) else [want]):
        memory = cupy.full(y.size * 2 + 4, np.nan, "f4")
        fits = memory[: y.size].reshape(y.shape)
        others = [
            memory[1 : y.size + 1].reshape(y.shape),
            memory[: 2 * y.size : 2].reshape(y.shape),
            memory.astype("f8")[: y.size].reshape(y.shape),
            memory[: y.size + 1],
        ]
        for to in [*(others if name != "sum_to" else ()), fits]:  # CuPy's own sum takes any
            out = [None] * (len(want) if isinstance(want, tuple) else 1)
            out[i] = to
            got = primitive.compute(arrays, params, out)
            got = got[i] if isinstance(got, tuple) else got
            assert (got is to) == (to is fits)
            assert tg.asarray(got).numpy().tobytes() == tg.asarray(y).numpy().tobytes()


# ---- products that update weights


def momentum() -> Any:
    return tg.optimizers.SGD(0.1, momentum=0.9)


def sgd() -> Any:
    return tg.optimizers.SGD(0.1)


def steps_of(
    make: Callable[[], Any], dtype: str = "f4", change: Any = None, **options: Any
) -> tuple[list[Any], Any]:
    """Return what some steps of a net give and leave, and the compiled step."""
    net = Net(apply, options.get("activation", relu), options.get("weight_decay", False))
    net.v = [tg.Variable(v.numpy().astype(dtype)) for v in net.v]
    net.optimizer = make()
    if change is not None:
        net._finish = change
    found = []
    for i in range(9):
        if i == 5:
            net.optimizer.learning_rate.assign(0.05)  # read when the graph runs
        found.append(net.compiled(tg.constant(X[i % 6].astype(dtype)), tg.constant(Y[i % 6])))
    values = [x.numpy() for result in found for x in arrays(result)]
    return values + [v.numpy() for v in net.v], net.compiled


def arrays(result: Any) -> list[Any]:
    loss, rest = result
    return [loss, *(rest if isinstance(rest, list) else [] if rest is None else [rest])]


def calls(compiled: Any, name: str) -> int:
    return int(compiled.explain_program().count(f"{name}("))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let timing say that it pays to update weights in products."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(gemm_update, "pays", lambda *_: on)

    return switch


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("make", [sgd, momentum])
def test_products_that_update_weights(
    make: Callable[[], Any], dtype: str, graph: bool, always: Any, cupy: Any
) -> None:
    """The same but for roundings; one launch for all that no product updates."""
    if "not used" in gemm.describe(cupy):
        pytest.skip("there is no cuBLASLt")
    tg.config.cuda_graphs = graph
    always(False)
    wanted, plain = steps_of(make, dtype)
    always(True)
    got, fused = steps_of(make, dtype)
    assert ("a CUDA graph of" in fused.explain_program()) == graph
    rule = make.__name__
    assert (calls(plain, "add_product"), calls(plain, rule)) == (0, 1)
    assert (calls(fused, "add_product"), calls(fused, rule)) == (3, 1)
    assert calls(fused, "assign_add") - calls(plain, "assign_add") == (rule == "momentum")
    assert calls(fused, " matmul") == calls(plain, " matmul") - 3
    for a, b in zip(got, wanted, strict=True):
        bound = 1e-5 if dtype == "f4" else 1e-13
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound * np.abs(b).max())


def give_back_one(net: Net, gradients: Any) -> Any:
    net.optimizer.apply(gradients, net.v)
    return gradients[2]


def look_at_one(net: Net, gradients: Any) -> Any:
    net.optimizer.apply(gradients, net.v)
    return tg.sum(gradients[0] * gradients[0])


def use_weights_afterwards(net: Net, gradients: Any) -> Any:
    """The old ones and the new ones of a layer."""
    old = net.v[0].value()
    net.optimizer.apply(gradients, net.v)
    return [tg.sum(old * net.v[0]), old, net.v[0] * 1.0]


def leave_out(net: Net, gradients: Any) -> None:
    if not net.optimizer._groups:
        net.optimizer.apply(gradients, net.v)
    else:
        net.optimizer.apply(gradients[:2] + gradients[4:], net.v[:2] + net.v[4:])


# What is done, the optimiser, and how many products update weights.
UPDATES: dict[str, tuple[Any, Callable[[], Any], int]] = {
    "all": (apply, sgd, 3),
    "a gradient is returned": (give_back_one, sgd, 2),
    "a gradient is looked at": (look_at_one, momentum, 2),
    "old weights are used": (use_weights_afterwards, sgd, 3),
    "old weights are used, momentum": (use_weights_afterwards, momentum, 3),
    "a layer is left out": (leave_out, momentum, 2),
    "two steps in one": (apply_twice, sgd, 0),
    "two steps in one, one after the other": (go_on, sgd, 0),
    "nesterov": (apply, lambda: tg.optimizers.SGD(0.1, momentum=0.9, nesterov=True), 0),
    "clipping": (apply, lambda: tg.optimizers.SGD(0.1, global_clipnorm=0.5), 0),
    "loss scale": (apply, lambda: tg.optimizers.SGD(0.1, loss_scale_factor=2.0), 0),
    "adam": (apply, lambda: tg.optimizers.Adam(0.01), 0),
}


@pytest.mark.parametrize("name", UPDATES)
def test_weights_whose_gradient_somebody_needs(name: str, always: Any, cupy: Any) -> None:
    if "not used" in gemm.describe(cupy):
        pytest.skip("there is no cuBLASLt")
    change, make, products = UPDATES[name]
    always(False)
    wanted, _ = steps_of(make, change=change)
    always(True)
    got, compiled = steps_of(make, change=change)
    (program,) = compiled.programs[-1:]
    assert program.text.count("add_product(") == products
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_it_is_a_rewrite_like_others(always: Any) -> None:
    always(True)
    with rewritten(set(simplify.TABLE) - {"updates"}):
        _, compiled = steps_of(sgd)
    assert calls(compiled, "add_product") == 0


def test_weight_decay_is_no_product(always: Any) -> None:
    always(True)
    _, compiled = steps_of(sgd, weight_decay=True)
    assert calls(compiled, "add_product") == 0


def test_layers_of_which_some_pay(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    """What is between two of them is updated in one launch for each stretch."""
    if "not used" in gemm.describe(cupy):
        pytest.skip("there is no cuBLASLt")
    monkeypatch.setattr(gemm_update, "pays", lambda *_: False)
    wanted, _ = steps_of(momentum)
    asked = []

    def pays(rule: Any, batch: int, rows: int, columns: int, dtype: Any, xp: Any) -> bool:
        asked.append((rule.name, batch, rows, columns, np.dtype(dtype).name))
        return rows == columns

    monkeypatch.setattr(gemm_update, "pays", pays)
    got, compiled = steps_of(momentum)
    sizes = [(12, 8), (8, 8), (8, 4)]
    assert asked == [("momentum", 16, *size, "float32") for size in sizes]
    assert calls(compiled, "add_product") == 1
    assert calls(compiled, "momentum") == 2  # the first weight; the last and all biases
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


RULES = {"sgd": gemm_update.SGD, "momentum": gemm_update.MOMENTUM}


@pytest.mark.parametrize("name", RULES)
def test_whether_it_pays_is_timed(name: str, monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    if "not used" in gemm.describe(cupy):
        pytest.skip("there is no cuBLASLt")
    assert not gemm_update.pays(RULES[name], 16, 40, 24, "f4", cupy)  # tests are deterministic
    monkeypatch.setattr(tg.config, "deterministic", False)
    found = gemm_update.pays(RULES[name], 16, 40, 24, "f4", cupy)
    times = gemm._devices[0][0]._times  # type: ignore[union-attr]
    assert times is not None
    ways = times.get("add_product float32 40x16 by 16x24")
    assert ways is not None
    assert {"fused", f"fused, {name}", f"apart, {name}"} <= ways.keys()
    assert found == (ways[f"fused, {name}"].seconds < ways[f"apart, {name}"].seconds)
    monkeypatch.setattr(gemm, "timer", lambda xp: pytest.fail("timed again"))
    assert gemm_update.pays(RULES[name], 16, 40, 24, "f4", cupy) == found


@pytest.mark.parametrize("dtype", ["f4", "bfloat16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_sum_keeps_the_layout_of_memory_that_it_is_given(order: Any, dtype: str) -> None:
    """CuPy's sum of an array in Fortran's order may write its `out` in that order, too."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
    numbers = RNG.integers(-2, 3, (200, 3, 4))
    x = on_device(np.asarray(numbers.astype(dtype), order=order))
    given = on_device(np.zeros((3, 4), dtype))
    flat = given.reshape(-1)  # as the gradients' buffer shows it
    y = primitives["sum_to"].compute([x], {"shape": (3, 4)}, [given])
    assert (y is given) == (order == "C")
    if y is not given:
        flat[:] = y.reshape(-1)
    np.testing.assert_array_equal(flat.get().astype("i8"), numbers.sum(0).reshape(-1))
