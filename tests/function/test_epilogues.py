"""Steps that one product computes on its way: their rules, and which programs get them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function import epilogues, simplify
from tapegrad._function.schedule import SECOND
from tapegrad.linear import sum_to
from tests.function import test_graphs
from tests.function.compiled import assert_same, rewritten
from tests.function.programs import Training
from tests.test_fused import assert_same as assert_same_derivatives
from tests.test_fused import normal

# ---- meanings and rules


def below_relu(g: Any, w: Any, y: np.ndarray) -> Any:
    return tg.where(y > 0, g @ w, 0.0)


Y = np.maximum(normal(6, 4, seed=9), 0)
X, W, B, G, ABOVE = normal(6, 5), normal(5, 4), normal(4), normal(6, 3), normal(3, 4)
RELU = epilogues.linear_relu_with_mask
GRAD = epilogues.matmul_linear_relu_grad
NO_MASK = np.empty(0, np.uint8)
# name: (one of the outputs, or both, by the primitive, the same by plain operations, arguments)
RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
    "layer": (
        lambda x, w, b: RELU(x, w, b, above=3)[0],
        lambda x, w, b: tg.nn.relu(x @ w + b),
        (X, W, B),
    ),
    "gradient": (
        lambda g, w: GRAD(g, w, Y, NO_MASK)[0],
        lambda g, w: below_relu(g, w, Y),
        (G, ABOVE),
    ),
    "gradient of the bias": (
        lambda g, w: GRAD(g, w, Y, NO_MASK)[1],
        lambda g, w: tg.sum(below_relu(g, w, Y), axis=0),
        (G, ABOVE),
    ),
    "both gradients": (
        lambda g, w: tg.add(*(tg.exp(x) for x in GRAD(g, w, Y, NO_MASK))),
        lambda g, w: tg.exp(below_relu(g, w, Y)) + tg.exp(tg.sum(below_relu(g, w, Y), axis=0)),
        (G, ABOVE),
    ),
    "product": (
        lambda x, w: epilogues.matmul_with_sums(x, w)[0],
        lambda x, w: x @ w,
        (X, W),
    ),
    "sums": (
        lambda x, w: epilogues.matmul_with_sums(x, w)[1] + 0.0 * tg.sum(x),
        lambda x, w: tg.sum(w, axis=0) + 0.0 * tg.sum(x),
        (X, W),
    ),
    "product and sums": (
        lambda x, w: tg.add(*(tg.exp(y) for y in epilogues.matmul_with_sums(x, w))),
        lambda x, w: tg.exp(x @ w) + tg.exp(tg.sum(w, axis=0)),
        (X, W),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_values_and_derivatives(name: str) -> None:
    by_primitive, plain, arrays = RULES[name]
    assert_same_derivatives(by_primitive, plain, *arrays)


def test_the_output_that_tells_where_values_passed_has_no_gradient() -> None:
    x, w, b = map(tg.Variable, (X, W, B))
    y = Y.astype("f4")
    with tg.GradientTape() as tape:
        _, mask = RELU(x, w, b, above=3)
        _, sums = GRAD(tg.constant(G), tg.constant(ABOVE), tg.constant(y), mask)
    assert mask.dtype == np.uint8
    assert tape.gradient(sums, [x, w, b]) == [None] * 3


def test_nan_and_zero_stop_a_gradient() -> None:
    y = np.array([[np.nan, 0.0, 1.0], [np.nan, -0.0, 2.0]])
    g = np.array([[np.nan], [np.inf]])
    gz, gb = GRAD(g, np.ones((1, 3)), y, NO_MASK)
    np.testing.assert_array_equal(gz.numpy(), [[0, 0, np.nan], [0, 0, np.inf]])
    np.testing.assert_array_equal(gb.numpy(), [0, 0, np.nan])


# ---- programs, on a stand-in of a device whose kernels are switched off: the meanings run

cupy = test_graphs.cupy
on_device = test_graphs.on_device
device = pytest.mark.usefixtures("on_device")

WITH_MASK, GRAD_OF_PRODUCT, WITH_SUMS = RELU.name, GRAD.name, epilogues.matmul_with_sums.name
FUSED = (WITH_MASK, GRAD_OF_PRODUCT, WITH_SUMS)
RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=(8, 6)).astype("f4"), RNG.integers(0, 3, 8)) for _ in range(4)]


class Net:
    """A network of dense layers.

    sources  what else the loss's gradient is given out for, of the hidden layers' outputs.
    then     what is done to these gradients.
    also     a target and sources, from the Variables, the hidden outputs and the logits, whose
             gradient is given out too.
    """

    def __init__(
        self,
        *sizes: int,
        activation: Callable[[Any], Any] = tg.nn.relu,
        sources: Callable[[Any], Any] = lambda hidden: [],
        then: Callable[[Any], Any] = lambda g: g,
        also: Callable[..., Any] | None = None,
    ) -> None:
        rng = np.random.default_rng(1)
        self.v = [
            tg.Variable((rng.normal(size=shape) / 2).astype("f4"))
            for n, m in itertools.pairwise(sizes)
            for shape in ((n, m), (m,))
        ]
        self.optimizer = tg.optimizers.Adam(0.01)
        self.activation, self.sources, self.then, self.also = activation, sources, then, also

    def step(self, x: Any, labels: Any) -> Any:
        hidden = []
        with tg.GradientTape(persistent=True) as tape:
            h = x
            for w, b in zip(self.v[:-2:2], self.v[1:-2:2], strict=True):
                h = self.activation(tg.nn.linear(h, w, b))
                hidden.append(h)
            logits = tg.nn.linear(h, self.v[-2], self.v[-1])
            loss = tg.nn.softmax_cross_entropy(logits, labels)
        gradients = tape.gradient(loss, [*self.v, *self.sources(hidden)])
        others: Any = [self.then(g) for g in gradients[len(self.v) :]]
        if self.also is not None:
            others.append(tape.gradient(*self.also(self.v, hidden, logits)))
        self.optimizer.apply_gradients(zip(gradients[: len(self.v)], self.v, strict=True))
        return loss, logits, hidden, others


def taken(net: Any, steps: int = 4) -> list[Any]:
    """Return what some steps on a device gave, and the Variables after them."""
    found = [net.step(*map(tg.constant, batch)) for batch in itertools.islice(BATCHES, steps)]
    return [found, *(v.numpy() for v in net.v)]


def compiled(net: Any, names: Any) -> tuple[list[Any], list[str]]:
    """Return the same of the compiled step, and the names of its program's steps."""
    step = net.step
    net.step = function = tg.function(step)
    with rewritten(names):
        results = taken(net)
    (replay,) = function.programs
    return results, [s.name for s in replay._program.steps]


def check(make: Callable[[], Any]) -> list[str]:
    """Compare a step that is rewritten with one that is not and the eager one, bit for bit.

    The meanings compute the same. Returns the names of its steps, with those of epilogues.
    """
    table = simplify.ENABLED - epilogues.REWRITES.keys()
    want, plain = compiled(make(), table)
    got, steps = compiled(make(), {*table, *epilogues.REWRITES})
    assert_same(got, want)
    assert not {*plain} & {*FUSED}
    with rewritten(()):
        assert_same(taken(make()), want, 1e-6)
    return steps


@device
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_network_of_dense_layers(layers: int) -> None:
    steps = check(lambda: Net(*([6] * layers), 5, 3))
    assert [steps.count(name) for name in FUSED] == [layers, layers, 1]
    assert not {"linear_relu", "linear_relu_grad", "sum_to"} & {*steps}
    assert steps.count("matmul") == layers  # the gradients of the other layers' weights


@device
def test_each_rewrite_alone() -> None:
    masks, plain = compiled(Net(6, 5, 4, 3), {"linear", "linear_relu", "linear_relu_grad"})
    for name, wanted in (
        ("relu masks", {WITH_MASK, GRAD_OF_PRODUCT}),
        ("sums beside products", {WITH_SUMS}),
    ):
        got, steps = compiled(Net(6, 5, 4, 3), {"linear", "linear_relu", "linear_relu_grad", name})
        assert {*steps} & {*FUSED} == wanted
        assert_same(got, masks)
    assert {"linear_relu", "linear_relu_grad", "sum_to", "matmul"} <= {*plain}


# name: (the network's settings, how often each of FUSED is in its program)
KEPT: dict[str, tuple[dict[str, Any], list[int]]] = {
    # gradients of another result, which go through both ReLUs, or through the first one's alone
    "two gradients": ({"also": lambda v, h, y: (y, v)}, [0, 0, 1]),
    "two gradients of one layer": ({"also": lambda v, h, y: (h[0], v[:2])}, [1, 1, 1]),
    # the product is a result, or something else reads it
    "a gradient is given out": ({"sources": lambda h: [h[1]]}, [1, 1, 1]),
    "all gradients are given out": ({"sources": lambda h: h}, [0, 0, 1]),
    "a gradient is used once more": (
        {"sources": lambda h: [h[0]], "then": tg.exp},
        [1, 1, 1],
    ),
    "another activation": ({"activation": tg.tanh}, [0, 0, 3]),
    "no activation": ({"activation": lambda x: x}, [0, 0, 3]),
    # the gradient that comes to the ReLU is no product
    "something between": ({"activation": lambda x: tg.nn.relu(x) * 0.5}, [0, 0, 1]),
}


@device
@pytest.mark.parametrize("name", KEPT)
def test_what_else_needs_a_value_gets_it(name: str) -> None:
    settings, counts = KEPT[name]
    steps = check(lambda: Net(6, 5, 4, 3, **settings))
    assert [steps.count(fused) for fused in FUSED] == counts


# name: (a function of x and g, whether the product sums g's columns)
ORDERS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "sum first": (lambda x, g: (sum_to(g, shape=(3,)), tg.transpose(x) @ g)[::-1], True),
    "product first": (lambda x, g: (tg.transpose(x) @ g, sum_to(g, shape=(3,))), True),
    "the product needs the sum": (
        lambda x, g: tg.transpose(x * tg.sum(sum_to(g, shape=(3,)))) @ g,
        False,
    ),
    "the sum comes too late": (
        lambda x, g: (tg.exp(tg.transpose(x) @ g), sum_to(g, shape=(3,))),
        False,
    ),
    "the first factor": (lambda x, g: (sum_to(g, shape=(3,)), g @ tg.transpose(g)), False),
    "the sums of rows": (lambda x, g: (sum_to(g, shape=(6, 1)), tg.transpose(x) @ g), False),
    "of a stack": (lambda x, g: (sum_to(g, shape=(3,)), tg.stack([x.T, x.T]) @ g), True),
}


@device
@pytest.mark.parametrize("name", ORDERS)
def test_a_product_sums_what_is_there_in_time(name: str) -> None:
    function, fused = ORDERS[name]
    x, g = tg.constant(X.astype("f4")), tg.constant(G.astype("f4"))
    step = tg.function(lambda x, g: function(x, tg.tanh(g)))
    for _ in range(4):
        assert_same(step(x, g), function(x, tg.tanh(g)))
    (replay,) = step.programs
    assert (WITH_SUMS in [s.name for s in replay._program.steps]) is fused


@device
def test_programs_of_numpy_have_none() -> None:
    with tg.backend("numpy"):
        net = Net(6, 5, 4, 3)
        _, steps = compiled(net, True)
    assert "linear_relu_grad" in steps
    assert not {*steps} & {*FUSED}


@device
def test_the_text_and_the_branches() -> None:
    net = Net(6, 5, 4, 3)
    net.step = step = tg.function(net.step)
    taken(net)
    text = step.explain_program()
    assert (
        "t0, t1 = linear_relu_with_mask(x0, 'Variable', 'Variable')  float32[8, 5], uint8[8, 16]"
        in text
    )
    assert "matmul_linear_relu_grad(" in text
    (replay,) = step.programs
    steps = replay._program.steps
    assert [s.params["above"] for s in steps if s.name == WITH_MASK] == [4, 3]
    second = [x.step.name for x in replay._schedule.launches if x.branch == SECOND]
    assert second == [WITH_SUMS, "matmul"]


@device
@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
def test_random_programs() -> None:
    """With these rewrites and without, bit for bit: the meanings compute the same."""
    table = simplify.ENABLED - epilogues.REWRITES.keys()
    seen: set[str] = set()
    for seed in range(20):
        found = []
        for names in (table, {*table, *epilogues.REWRITES}):
            training = Training(seed)
            compiled = tg.function(training.step)
            with rewritten(names):
                found.append((training.run(compiled, 4), training.state()))
            for replay in compiled.programs:
                seen |= {step.name for step in replay._program.steps}
        assert_same(*found)
    assert {*FUSED} <= seen
