"""What compiled training steps do with gradients: computed where they are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function import device as device_module
from tapegrad.primitive import primitives

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
        v = self.v
        with tg.GradientTape() as tape:
            h = self._activation(x @ v[0] + v[1])
            h = self._activation(h @ v[2] + v[3])
            loss = tg.mean(tg.nn.softmax_cross_entropy(h @ v[4] + v[5], y))
            if self._decays:
                loss = loss + 1e-3 * sum(tg.sum(w * w) for w in v)
        return loss, self._finish(self, tape.gradient(loss, v))


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
        assert all_copies == {"a layer is left out": 4, "two steps in one": 12}.get(name, 6)


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
