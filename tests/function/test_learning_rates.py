"""Learning rates multiplied into what all gradients are made of: where, where not, and that it is
the same step."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function import learning_rates
from tests.function import programs
from tests.function.compiled import assert_same, rewritten
from tests.function.programs import Training

SGD = tg.optimizers.SGD
RNG = np.random.default_rng(0)
X, TARGETS = RNG.normal(size=(2, 6, 5))
LABELS = RNG.integers(0, 5, 6)


@pytest.fixture(autouse=True)
def small_nets_too(monkeypatch):
    monkeypatch.setattr(learning_rates, "_WORTH", 0)


class Net:
    """Two layers (5, 8, 5), a step of theirs, and what it changes."""

    def __init__(self, optimizer, loss, change=lambda _, gradients: gradients, through=tg.positive):
        rng = np.random.default_rng(1)
        shapes = [(5, 8), (8,), (8, 5), (5,)]
        self.variables = [tg.Variable(rng.normal(size=shape)) for shape in shapes]
        self.optimizer = optimizer()
        self.loss, self.change, self.through = loss, change, through

    def step(self, x):
        w, b, u, c = self.variables
        with tg.GradientTape() as tape:
            hidden = self.through(tg.nn.relu(x @ w + b))
            loss = self.loss(tg.nn.linear(hidden, u, c), self.variables)
        gradients = tape.gradient(loss, self.variables)
        changed, answer = self.change(self, gradients), None
        if isinstance(changed, tuple):
            changed, answer = changed
        self.optimizer.apply_gradients(zip(changed, self.variables, strict=True))
        return loss, answer

    def state(self):
        slots = [self.optimizer.slot(v, s) for v in self.variables for s in self.optimizer._SLOTS]
        return [v.numpy() for v in self.variables] + [s.numpy() for s in slots]


LOSSES = {
    "labels": lambda y, _: tg.nn.softmax_cross_entropy(y, LABELS),
    "labels, no mean": lambda y, _: tg.sum(
        tg.nn.softmax_cross_entropy(y, LABELS, reduction="none") * np.arange(6.0)
    ),
    "numbers": lambda y, _: tg.mean((y - TARGETS) ** 2),
    "tanh": lambda y, _: tg.sum(tg.tanh(y) * TARGETS),
}
OPTIMIZERS = {
    "plain": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
}


def multiplied_early(make, assign=True):
    """Compare five steps with eager ones; tell whether the update has a product fewer."""
    eager = make()
    wanted = [run(eager, eager.step, k, assign) for k in range(5)]
    products = []
    for names in ((), {"learning rates"}):
        net = make()
        with rewritten(names):
            compiled = tg.function(net.step)
            for k in range(5):
                assert_same(run(net, compiled, k, assign), wanted[k], 1e-13)
        update = compiled.explain_program().split("try:")[1]
        products.append(len(re.findall(r"\bmultiply\(", update)))
    assert products[0] - products[1] in (0, 1)
    return products[1] < products[0]


def run(net, step, k, assign):
    if assign:
        net.optimizer.learning_rate = 0.1 / (k + 1)
    return step(tg.constant(X)), net.state()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_and_its_schedule(optimizer, loss):
    assert multiplied_early(lambda: Net(OPTIMIZERS[optimizer], LOSSES[loss]))


def scaled(net, gradients):
    return [g * 0.5 for g in gradients]


def multiplied(net, gradients):
    return [g * g for g in gradients]


def shown(net, gradients):
    return gradients, gradients[0]


def measured(net, gradients):
    return gradients, tg.sum(gradients[1] ** 2)


def bounded(net, gradients):
    return [tg.clip(g, -0.1, 0.1) for g in gradients]


def decayed(net, gradients):
    return [g + 0.1 * v for g, v in zip(gradients, net.variables, strict=True)]


def of_one_layer(net, gradients):
    return [gradients[0], gradients[1], tg.ones((8, 5), dtype="f8"), gradients[3]]


def with_a_schedule_of_its_own(net, gradients):
    net.optimizer.learning_rate.assign(net.optimizer.learning_rate * 0.9)
    return gradients


CHANGES = {
    scaled: True,
    multiplied: False,
    shown: False,
    measured: False,
    bounded: False,
    decayed: False,
    of_one_layer: False,
    with_a_schedule_of_its_own: False,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_gradients_that_somebody_else_sees(change):
    assign = change is not with_a_schedule_of_its_own
    net = lambda: Net(OPTIMIZERS["plain"], LOSSES["labels"], change)
    assert multiplied_early(net, assign) == CHANGES[change]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tg.optimizers.Adam(0.1),
        lambda: SGD(0.1, global_clipnorm=0.5),
        lambda: SGD(0.1, loss_scale_factor=8.0),
    ],
)
def test_updates_that_are_not_linear_in_the_rate_times_a_gradient(make):
    assert not multiplied_early(lambda: Net(make, LOSSES["labels"]))


def penalty(y, variables):
    return LOSSES["labels"](y, variables) + 0.01 * tg.sum(variables[0] ** 2)


def test_a_gradient_with_two_origins():
    assert not multiplied_early(lambda: Net(OPTIMIZERS["plain"], penalty))


def test_the_loss_keeps_its_gradient_for_others():
    """The origin is returned: it is not multiplied."""

    def step(x, w, optimizer):
        with tg.GradientTape(persistent=True) as tape:
            y = tg.matmul(x, w)
            loss = tg.sum(y**3)
        gradient, of_y = tape.gradient(loss, [w, y])
        optimizer.apply_gradients([(gradient, w)])
        return of_y

    def run(wrap):
        w, optimizer = tg.Variable(np.ones((5, 4))), SGD(0.01)
        f = wrap(lambda x: step(x, w, optimizer))
        return [f(tg.constant(X)) for _ in range(4)], w.numpy()

    with rewritten({"learning rates"}):
        assert_same(run(tg.function), run(lambda f: f), 1e-13)


def test_parameters_are_many_and_the_origin_is_small(monkeypatch):
    net = lambda: Net(OPTIMIZERS["plain"], LOSSES["labels"])
    buffer = 128  # of 93 parameters, at multiples of 32
    monkeypatch.setattr(learning_rates, "_WORTH", buffer)
    assert multiplied_early(net)
    monkeypatch.setattr(learning_rates, "_WORTH", buffer + 1)
    assert not multiplied_early(net)


def test_an_origin_as_large_as_the_parameters(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "X", np.resize(X, (13, 5)))  # 65 > 128 / 2
    net = lambda: Net(OPTIMIZERS["plain"], lambda y, _: tg.sum(tg.square(y)))
    assert not multiplied_early(net)
    monkeypatch.setattr(sys.modules[__name__], "X", np.resize(X, (12, 5)))
    assert multiplied_early(net)


@pytest.mark.parametrize("name", ["f4", "f8"])
def test_gradients_that_pass_through_a_narrower_type(name):
    """There the rate could make a small gradient 0."""
    through = lambda h: tg.astype(tg.astype(h, name), "f8")
    net = lambda: Net(OPTIMIZERS["plain"], LOSSES["labels"], through=through)
    assert multiplied_early(net) == (name == "f8")


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_random_training(seed, monkeypatch):
    ways = {name: programs.OPTIMIZERS[name] for name in ("sgd", "momentum", "nesterov")}
    monkeypatch.setattr(programs, "OPTIMIZERS", ways)
    eager, other = Training(seed, "f8"), Training(seed, "f8")
    with rewritten({"learning rates"}):
        got = other.run(tg.function(other.step), 5)
    assert_same(got, eager.run(eager.step, 5), 1e-9)
    assert_same(other.state(), eager.state(), 1e-9)
