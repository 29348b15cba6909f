"""Steps: the same as a loop over batches, whatever the number of steps a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.data import Batches, Steps
from tests.function.compiled import assert_same

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(23, 4)).astype("f4"), RNG.integers(0, 3, 23)


class Result(NamedTuple):
    loss: Any
    rest: dict[str, Any]


class Net:
    """A network with dropout and an optimiser; `step` is what is run."""

    def __init__(self) -> None:
        tg.random.seed(1)
        self.w = tg.Variable(tg.random.normal((4, 8)))
        self.v = tg.Variable(tg.random.normal((8, 3)))
        self.optimizer = tg.optimizers.Adam(0.05)
        self.counter = tg.Variable(0)

    def step(self, x: Any, y: Any) -> Any:
        variables = [self.w, self.v]
        with tg.GradientTape() as tape:
            h = tg.nn.dropout(tg.nn.relu(x @ self.w), 0.3)
            loss = tg.nn.softmax_cross_entropy(h @ self.v, y)
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.counter.assign_add(1)
        return Result(
            loss, {"labels": y, "steps": self.counter + 0, "v": self.w, "name": "x", "none": None}
        )

    def state(self) -> list[Any]:
        return [self.w, self.v, self.optimizer.iterations, tg.random.default_generator().counter]


def by_hand(batches: Any, per_call: int, epochs: int) -> tuple[list[Any], list[Any]]:
    """Return the losses, labels and counts of each call, by a loop that is written out."""
    net = Net()
    calls: list[Any] = []
    size = batches.batch_size
    for _ in range(epochs):
        taken: list[Any] = []
        for x, y in batches:
            result = net.step(x, y)
            taken.append((result.loss.numpy(), y.numpy(), net.counter.numpy()))
            if len(taken) == per_call or len(y) < size:
                if len(y) < size and len(taken) > 1:
                    calls.append(taken[:-1])
                    taken = taken[-1:]
                calls.append(taken)
                taken = []
        if taken:
            calls.append(taken)
    return [[np.stack(c) for c in zip(*taken, strict=True)] for taken in calls], net.state()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("per_call", [1, 2, 4, 5, 7, 100])
def test_a_loop_over_batches(per_call: int, shuffle: bool, drop_last: bool) -> None:
    options = {"shuffle": shuffle, "seed": 5, "drop_last": drop_last}
    net = Net()
    batches = Batches((X, Y), 4, **options)
    steps = Steps(net.step, batches, per_call)
    got = []
    for _ in range(3):
        calls = list(steps)
        assert len(calls) == len(steps)
        got += calls
    state = net.state()
    values = [v.numpy() for v in state]
    want, wanted_state = by_hand(Batches((X, Y), 4, **options), per_call, 3)
    assert len(got) == len(want)
    for result, (loss, labels, counts) in zip(got, want, strict=True):
        assert type(result) is Result
        assert result.loss.shape == loss.shape
        np.testing.assert_allclose(result.loss.numpy(), loss, 1e-4)
        np.testing.assert_array_equal(result.rest["labels"], labels)
        np.testing.assert_array_equal(result.rest["steps"], counts)
        assert result.rest["name"] == "x"
        assert result.rest["v"] is net.w
        assert result.rest["none"] is None
    for a, b in zip(values, wanted_state, strict=True):
        np.testing.assert_allclose(a, b.numpy(), 1e-3, 1e-5)


def test_what_a_step_may_be() -> None:
    batches = Batches((X, Y), 4)
    for make in (
        lambda net: net.step,
        lambda net: tg.function(net.step),
        lambda net: tg.function(net.step, strict=False),
    ):
        net = Net()
        losses = [result.loss.numpy() for result in Steps(make(net), batches, 3)]
        assert [len(x) for x in losses] == [3, 2, 1]

    class Owner:
        total = 0.0

        @tg.function
        def method(self, x: Any) -> Any:
            return tg.sum(x)

    owner = Owner()
    (sums,) = Steps(owner.method, Batches(X[:8], 2), 4)
    np.testing.assert_allclose(sums.numpy(), X[:8].reshape(4, -1).sum(1), 1e-4)
    assert len(owner.method.programs) == 1
    assert list(Steps(lambda x: None, Batches(X, 10), 2)) == [None, None]
    pairs = {"x": X, "y": Y}
    (shape,) = Steps(lambda d: {**d, "k": 1}, Batches(pairs, 23), 2)
    assert shape["x"].shape == (1, 23, 4)
    assert shape["k"] == 1


@pytest.mark.filterwarnings("ignore:.*stays eager")
def test_results_whose_keys_change_places() -> None:
    number = iter(range(100))

    def step(x: Any) -> Any:
        found = {"sum": tg.sum(x), "none": tg.sum(x) * 0.0}
        return dict(reversed(found.items())) if next(number) % 2 else found

    (sums,) = Steps(tg.function(step, strict=False), Batches(np.arange(8.0), 2), 4)
    assert sums["sum"].tolist() == [1.0, 5.0, 9.0, 13.0]
    assert sums["none"].tolist() == [0.0] * 4
    one_or_two = tg.function(lambda x: [x] * (1 + next(number) % 2), strict=False)
    with pytest.raises(ValueError, match="that of one before must have the structure of a step's"):
        list(Steps(one_or_two, Batches(np.arange(8.0), 2), 4))


def test_results_that_the_step_leases() -> None:
    f = tg.function(lambda x: {"twice": x * 2.0, "k": 1}, lease_results=True)
    for _ in range(3):
        calls = list(Steps(f, Batches(np.arange(12.0), 2), 3))
        assert [c["twice"].numpy().reshape(-1).tolist() for c in calls] == [
            [0.0, 2.0, 4.0, 6.0, 8.0, 10.0],
            [12.0, 14.0, 16.0, 18.0, 20.0, 22.0],
        ]


def test_a_tape_around_it_hears_every_step() -> None:
    w = tg.Variable(2.0)
    steps = Steps(lambda x: tg.sum(w * x), Batches(X[:8], 2), 2)
    for _ in range(3):
        with tg.GradientTape() as tape:
            total = sum(tg.sum(sums) for sums in steps)
        np.testing.assert_allclose(tape.gradient(total, w).numpy(), X[:8].sum(), 1e-4)


def test_two_iterations_at_once_do_not_mix() -> None:
    steps = Steps(lambda x: x * 1.0, Batches(np.arange(12), 3, shuffle=True, seed=2), 2)
    alone = Steps(lambda x: x * 1.0, Batches(np.arange(12), 3, shuffle=True, seed=2), 2)
    want = [[x.tolist() for x in alone] for _ in range(2)]
    for a, b, c, d in zip(steps, steps, *want, strict=True):
        assert (a.tolist(), b.tolist()) == (c, d)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Steps needs a tapegrad.data.Batches, got a list: "):
        Steps(lambda x: x, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_call must be at least 1, got 0"):
        Steps(lambda x: x, Batches(X, 2), 0)
    with pytest.raises(TypeError, match="integer"):
        Steps(lambda x: x, Batches(X, 2), 1.5)  # type: ignore[arg-type]


# ---- fit


def fitted(many: int, data: Any = (X, Y), **options: Any) -> tuple[Any, Any]:
    tg.random.seed(2)
    layers = [tg.layers.Dense(6, "relu"), tg.layers.Dropout(0.2), tg.layers.Dense(3)]
    model = tg.Sequential(layers)
    loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        "adam",
        loss,
        ["accuracy"],
        run_eagerly=options.pop("eager", False),
        steps_per_execution=many,
    )
    history = model.fit(*data, batch_size=4, epochs=4, seed=3, **options)
    return history.history, model.get_weights()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation_split": 0.25},
        {"sample_weight": np.linspace(0.5, 1.5, 23).astype("f4")},
        {"shuffle": False},
        {"eager": True},
    ],
)
@pytest.mark.parametrize("many", [2, 3, 64])
def test_fit_gives_the_same(many: int, options: dict[str, Any]) -> None:
    assert_same(fitted(many, **options), fitted(1, **options))


def test_fit_with_batches_of_ones_own() -> None:
    class Given:
        def __iter__(self) -> Any:
            return iter([(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)])

    assert_same(fitted(3, (Given(),)), fitted(1, (Given(),)))


def test_progress_and_interrupts_come_after_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from tapegrad.training import model

    seen: list[int] = []

    class Noting(model.Progress):
        def update(self, done: int, numbers: Any) -> None:
            seen.append(done)

    monkeypatch.setattr(model, "Progress", Noting)
    fitted(2)
    assert seen == [2, 4, 5, 6] * 4
    del seen[:]
    fitted(4, eager=True)
    assert seen == [4, 6] * 4


def test_a_train_step_without_defaults() -> None:
    class Own(tg.Sequential):
        weights_given: Any = ()

        def train_step(self, x: Any, y: Any, sample_weight: Any) -> None:
            self.weights_given = (*self.weights_given, sample_weight)
            super().train_step(x, y, sample_weight)

    own = Own([tg.layers.Dense(3)])
    loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)
    own.compile("sgd", loss, steps_per_execution=2)
    own.fit(X, Y, batch_size=4)
    assert own.weights_given
    assert set(own.weights_given) == {None}


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_wrong_number_of_steps(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"steps_per_execution must be at least 1, got {wrong}"):
        tg.Sequential([tg.layers.Dense(1)]).compile("sgd", "mse", steps_per_execution=wrong)
