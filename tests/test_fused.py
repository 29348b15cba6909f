"""Fused primitives against the plain composition, to second order, and with their kernels."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend, _blocks, fused
from tapegrad._blocks import for_rows
from tapegrad.primitive import primitives

sys.path.insert(0, str(Path(__file__).parent / "cpu_cuda"))
from cpu_kernels import kernels_on_cpu

SIZES = [1, 31, 32, 33, 257]


# ---- the plain compositions


def plain_linear_relu(x, w, b):
    return tg.nn.relu(x @ w + b)


def plain_label_loss(x, labels, smoothing=0.0):
    p = tg.nn.log_softmax(x)
    target = (
        tg.one_hot(labels, x.shape[1], dtype=x.dtype) * (1 - smoothing) + smoothing / x.shape[1]
    )
    return -tg.sum(target * p, axis=1)


def plain_weighted_loss(x, weights, labels, smoothing=0.0, ignore=None):
    target = (
        tg.one_hot(labels, x.shape[1], dtype=x.dtype) * (1 - smoothing) + smoothing / x.shape[1]
    )
    used = (labels != ignore).astype(x.dtype)
    return -tg.sum(target * weights * tg.nn.log_softmax(x), axis=1) * used


def plain_probability_loss(x, q):
    return -tg.sum(tg.nn.log_softmax(x) * q, axis=1)


# ---- derivatives of both


def derivatives(function: Callable, *arrays: np.ndarray) -> list[np.ndarray]:
    """Return value, gradients, and gradients of a weighted sum of the gradients."""
    xs = [tg.constant(a) for a in arrays]
    weigh = lambda y, k: tg.sum(y * np.cos(k + np.arange(y.size, dtype=y.dtype)).reshape(y.shape))
    with tg.GradientTape() as outer:
        outer.watch(xs)
        with tg.GradientTape() as inner:
            inner.watch(xs)
            y = function(*xs)
            total = weigh(y, 0)
        first = inner.gradient(total, xs)
        again = sum(weigh(g, i) for i, g in enumerate(first, 1))
    second = outer.gradient(again, xs, unconnected_gradients="zero")
    return [t.numpy() for t in (y, *first, *second)]


def assert_same(fused: Callable, plain: Callable, *arrays: np.ndarray, rtol: float = 1e-11) -> None:
    for got, want in zip(derivatives(fused, *arrays), derivatives(plain, *arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


def normal(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@contextlib.contextmanager
def kernels_run(monkeypatch: pytest.MonkeyPatch, mode: str = "fast") -> Iterator[list[str]]:
    """Let primitives try their kernels on NumPy arrays; yield the names of those that ran."""
    ran: list[str] = []

    def noting(name, kernel):
        def call(*arguments, **options):
            answer = kernel(*arguments, **options)
            if answer is not None:
                ran.append(name)
            return answer

        return call

    with kernels_on_cpu(mode), monkeypatch.context() as patch:
        patch.setattr(_backend, "runs_kernels", lambda xp: True)
        patch.setattr(_backend, "numpy_alone", False)
        for name, primitive in primitives.items():
            if primitive.kernel is not None:
                patch.setattr(primitive, "kernel", noting(name, primitive.kernel))
        yield ran


# ---- on any machine


@pytest.mark.parametrize("n", SIZES)
def test_linear(n):
    arrays = normal(n, 5), normal(5, 7, seed=1), normal(7, seed=2)
    assert_same(tg.nn.linear, lambda x, w, b: x @ w + b, *arrays)


@pytest.mark.parametrize("n", SIZES)
def test_linear_relu(n):
    assert_same(
        tg.nn.linear_relu, plain_linear_relu, normal(n, 5), normal(5, 7, seed=1), normal(7, seed=2)
    )


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)])
def test_linear_takes_any_number_of_leading_axes(shape):
    arrays = normal(*shape), normal(4, 3, seed=1), normal(3, seed=2)
    assert_same(tg.nn.linear_relu, plain_linear_relu, *arrays)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (5, 10), (33, 257)])
def test_label_cross_entropy(n, classes, smoothing):
    labels = np.random.default_rng(3).integers(0, classes, n)
    assert_same(
        lambda x: tg.nn.softmax_cross_entropy(
            x, labels, label_smoothing=smoothing, reduction="none"
        ),
        lambda x: plain_label_loss(x, labels, smoothing),
        normal(n, classes),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (5, 10), (33, 257)])
@pytest.mark.parametrize("kernels", [False, True])
def test_weighted_label_cross_entropy(n, classes, smoothing, kernels, monkeypatch):
    labels = np.random.default_rng(3).integers(0, classes, n)
    options = {"label_smoothing": smoothing, "ignore_label": 1, "reduction": "none"}
    arrays = normal(n, classes), np.linspace(0.0, 2.0, classes)
    fused = lambda x, w: tg.nn.softmax_cross_entropy(x, labels, class_weights=w, **options)
    plain = lambda x, w: plain_weighted_loss(x, w, labels, smoothing, 1)
    if not kernels:
        assert_same(fused, plain, *arrays)
        return
    want = derivatives(plain, *arrays)
    with kernels_run(monkeypatch) as ran:
        got = derivatives(fused, *arrays)
    assert "weighted_label_cross_entropy_with_grad" in ran
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, 1e-11, 1e-11)


@pytest.mark.parametrize("weights", [None, np.ones(4, "f4")])
@pytest.mark.parametrize("debug", [False, True])
def test_labels_that_are_no_class(weights, debug, monkeypatch):
    """A kernel gives such a row the loss NaN and no gradient; in debug mode that is an error."""
    monkeypatch.setattr(tg.config, "debug", debug)
    x, labels = tg.Variable(normal(3, 4, dtype="float32")), tg.constant([1, 4, -7])

    def run():
        with tg.GradientTape() as tape:
            options = {"class_weights": weights, "ignore_label": -7, "reduction": "none"}
            losses = tg.nn.softmax_cross_entropy(x, labels, **options)
        return losses.numpy(), tape.gradient(losses, x).numpy()

    with kernels_run(monkeypatch) as ran:
        if debug:
            with pytest.raises(ValueError, match="labels must be from 0 to 3, got 4"):
                run()
            return
        losses, gradient = run()
    assert ran
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    np.testing.assert_array_equal((gradient != 0).any(axis=1), [True, False, False])


def test_masked_logits_and_class_weights():
    """A weight of 0 counts 0 where the loss is infinite; so does a class that is not the label."""
    x, w = tg.Variable([[-np.inf, 0.0], [3.0, -np.inf]]), tg.Variable([1.0, 0.0])
    with tg.GradientTape() as tape:
        losses = tg.nn.softmax_cross_entropy(x, [1, 0], class_weights=w, reduction="none")
        again = tg.nn.softmax_cross_entropy(x, [1, 1], class_weights=w, reduction="none")
        total = tg.sum(losses)
    np.testing.assert_array_equal(losses.numpy(), [0.0, 0.0])
    np.testing.assert_array_equal(again.numpy(), [0.0, 0.0])
    of_x, of_w = tape.gradient(total, [x, w])
    np.testing.assert_array_equal(of_x.numpy(), np.zeros((2, 2)))
    np.testing.assert_array_equal(of_w.numpy(), np.zeros(2))


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (5, 10), (33, 257)])
def test_probability_cross_entropy(n, classes):
    q = np.abs(normal(n, classes, seed=4))
    assert_same(
        lambda x, q: tg.nn.softmax_cross_entropy(x, q, reduction="none"),
        plain_probability_loss,
        normal(n, classes),
        q,
        rtol=1e-10,
    )


def test_third_order():
    labels = np.array([0, 2])
    fused = lambda x: tg.nn.softmax_cross_entropy(x, labels)
    plain = lambda x: tg.mean(plain_label_loss(x, labels))
    for f in (fused, plain):
        tg.testing.check_gradients(f, [normal(2, 3)], order=3, rtol=1e-5)
    tg.testing.check_gradients(
        lambda x, w, b: tg.nn.linear_relu(x, w, b) ** 3,
        [np.abs(normal(2, 3)), np.abs(normal(3, 2)) + 0.1, np.ones(2)],
        order=3,
        rtol=1e-5,
    )


def test_mean_loss_passes_its_upstream_gradient_on():
    # Times 1 nothing need be computed, but what is recorded still depends on the 1.
    x, labels = tg.Variable([[0.5, -1.0], [2.0, 0.0]]), [0, 1]
    with tg.GradientTape() as outer:
        weight = tg.constant(1.0)
        outer.watch(weight)
        with tg.GradientTape() as inner:
            loss = tg.nn.softmax_cross_entropy(x, labels)
        g = inner.gradient(loss, x, output_gradients=weight)
        length = tg.sum(g * g)
    p = tg.nn.softmax(x).numpy() - np.eye(2)[labels]
    np.testing.assert_allclose(g.numpy(), p / 2, rtol=1e-6)
    np.testing.assert_allclose(outer.gradient(length, weight), 2 * (p / 2) ** 2 @ [1, 1] @ [1, 1])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("special", [None, np.nan, -np.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_losses_are_those_of_their_rows(reduction, special, threads, monkeypatch):
    """Bit for bit, in blocks over threads; a special row sends all of them the long way."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 7)), rng.integers(0, 7, 50)
    if special is not None:
        logits[33] = special

    def derived(x):
        with tg.GradientTape() as tape:
            tape.watch(x)
            loss = tg.nn.softmax_cross_entropy(x, labels, reduction=reduction)
        return loss.numpy(), tape.gradient(loss, x).numpy(), alone(x).numpy()

    alone = lambda x: tg.nn.softmax_cross_entropy(x, labels, reduction=reduction)
    x = tg.constant(logits)
    with np.errstate(all="ignore"):
        want = derived(x)
        monkeypatch.setattr(fused, "LARGE", 1)
        monkeypatch.setattr(_blocks, "BLOCK", 14)
        monkeypatch.setattr(_blocks, "_THREADS_FROM", 1)
        monkeypatch.setattr(_blocks, "_THREADS", threads)
        seen = []
        monkeypatch.setattr(fused, "for_rows", lambda *a: (seen.append(a[:3]), for_rows(*a)))
        by_columns = tg.transpose(tg.constant(np.ascontiguousarray(logits.T)))
        for got in (derived(x), derived(by_columns)):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
    assert seen == [(50, 4, threads)] * 2  # not of the columns
    labels[40] = 7
    with pytest.raises(ValueError, match="labels must be from 0 to 6, got 7"):
        alone(x)


def test_nan_stays_nan_and_its_gradient_is_zero():
    x = tg.Variable([[np.nan, 1.0]])
    w, b = tg.constant(np.eye(2, dtype="f4")), tg.zeros(2)
    with tg.GradientTape(persistent=True) as tape:
        y = tg.nn.relu(x)
        z = tg.nn.linear_relu(tg.constant([[np.nan, 1.0]]), w, b)
    assert np.isnan(y.numpy()[0, 0])
    assert np.isnan(z.numpy()).all()
    np.testing.assert_array_equal(tape.gradient(y, x).numpy(), [[0.0, 1.0]])


def test_a_dead_unit_passes_nothing_even_of_an_infinite_gradient():
    x = tg.Variable([-1.0, 2.0])
    with tg.GradientTape() as tape:
        y = tg.nn.relu(x)
    got = tape.gradient(y, x, output_gradients=[np.inf, np.inf]).numpy()
    np.testing.assert_array_equal(got, [0.0, np.inf])


# ---- with the CUDA kernels, run on the CPU


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [1, 33])
def test_with_kernels(n, dtype, monkeypatch):
    rtol = 1e-11 if dtype == "float64" else 2e-5
    labels = np.random.default_rng(5).integers(0, 7, n)
    x, w, b = normal(n, 5, dtype=dtype), normal(5, 7, dtype=dtype), normal(7, dtype=dtype)

    def network(x, w, b):
        hidden = tg.nn.linear_relu(x, w, b)
        return tg.nn.softmax_cross_entropy(hidden, labels, reduction="none")

    want = derivatives(network, x, w, b)
    with kernels_run(monkeypatch) as ran:
        got = derivatives(network, x, w, b)
    assert {"linear_relu", "linear_relu_grad", "label_cross_entropy_with_grad"} <= set(ran)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_a_linear_map_of_nothing_is_its_bias(lead):
    y = tg.nn.linear(tg.zeros((*lead, 0)), tg.zeros((0, 2)), [1.0, 2.0])
    np.testing.assert_array_equal(y, np.broadcast_to([1.0, 2.0], (*lead, 2)))


def test_kernels_decline_what_they_were_not_written_for(monkeypatch):
    transposed = normal(4, 6, dtype="float32").T
    labels = np.zeros(6, np.int64)
    cases = [
        lambda: tg.nn.softmax_cross_entropy(tg.constant(transposed.T).T, labels),
        lambda: tg.nn.softmax_cross_entropy(tg.zeros((0, 3)), np.zeros(0, int), reduction="sum"),
        lambda: tg.nn.linear_relu(tg.zeros((0, 3)), tg.zeros((3, 2)), tg.zeros(2)),
    ]
    want = [case().numpy() for case in cases]
    with kernels_run(monkeypatch) as ran:
        got = [case().numpy() for case in cases]
    assert ran == []
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_training_with_kernels_equals_training_without(name, monkeypatch):
    images, labels = normal(24, 6, dtype="float32"), np.random.default_rng(6).integers(0, 4, 24)

    def train():
        tg.random.seed(1)
        model = tg.Sequential(
            [tg.layers.Dense(5, "relu"), tg.layers.Dropout(0.2), tg.layers.Dense(4)]
        )
        optimizer = (
            tg.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
            if name == "Momentum"
            else getattr(tg.optimizers, name)(0.01)
        )
        model.compile(optimizer, tg.losses.SparseCategoricalCrossentropy(from_logits=True))
        history = model.fit(images, labels, batch_size=8, epochs=3, seed=2)
        return history.history["loss"], [w.numpy() for w in model.variables]

    losses, weights = train()
    with kernels_run(monkeypatch) as ran:
        update = {"Momentum": "momentum", "AdamW": "adam"}.get(name, name.lower())
        from tapegrad import optimizers

        rule = getattr(optimizers, f"{update}_update")
        kernel = rule.kernel
        monkeypatch.setattr(rule, "kernel", lambda *a, **k: ran.append(update) or kernel(*a, **k))
        losses_with, weights_with = train()
    assert {update, "linear_relu", "random_bits"} <= set(ran)
    np.testing.assert_allclose(losses_with, losses, rtol=1e-5)
    for a, b in zip(weights_with, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adagrad", "RMSprop", "Adam"])
def test_clipped_updates_with_kernels(name, monkeypatch):
    from tapegrad import optimizers

    options = {"global_clipnorm": 0.5, "loss_scale_factor": 4.0}
    gradients = [normal(6, 5, dtype="float32"), normal(5, dtype="float64"), normal(7, seed=1)]

    def train():
        variables = [tg.Variable(np.ones_like(g)) for g in gradients]
        kind = getattr(optimizers, "SGD" if name == "Momentum" else name)
        more = {"momentum": 0.9} if name == "Momentum" else {}
        optimizer = kind(0.1, **more, **options)
        for _ in range(3):
            optimizer.apply([tg.constant(g) for g in gradients], variables)
        return [v.numpy() for v in variables]

    want = train()
    ran = []
    rule = getattr(optimizers, f"{name.lower()}_update")
    with kernels_run(monkeypatch):
        for update in (rule, optimizers.gradient_factor):

            def noted(*arrays, kernel=update.kernel, label=update.name, **params):
                ran.append((label, kernel(*arrays, **params)))
                return ran[-1][1]

            monkeypatch.setattr(update, "kernel", noted)
        got = train()
    assert ran.count(("gradient_factor", True)) == 3
    assert ran.count((rule.name, True)) == 3 * 2  # for each type
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_gather_with_the_kernel(monkeypatch):
    x, rows = normal(4, 3), [0, 0, 2, -1]
    want = derivatives(lambda x: x[rows] ** 3, x)
    with kernels_run(monkeypatch) as ran:
        got = derivatives(lambda x: x[rows] ** 3, x)
    assert "scatter_add" in ran
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
