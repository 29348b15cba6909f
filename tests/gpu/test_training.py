"""A small network on both backends: the same training, weights that go from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tapegrad as tg

OPTIMIZERS: dict[str, Callable[[], tg.optimizers.Optimizer]] = {
    "sgd": lambda: tg.optimizers.SGD(0.05),
    "momentum": lambda: tg.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: tg.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda: tg.optimizers.Adagrad(0.05),
    "rmsprop": lambda: tg.optimizers.RMSprop(0.01),
    "adam": lambda: tg.optimizers.Adam(0.01),
    "adamw": lambda: tg.optimizers.AdamW(0.01),
}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(96, 6)).astype("f4"), RNG.integers(0, 4, 96)


def model_of(optimizer: str) -> tg.Sequential:
    tg.random.seed(1)
    layers = [tg.layers.Dense(16, "relu"), tg.layers.Dropout(0.2), tg.layers.Dense(4)]
    model = tg.Sequential(layers)
    loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](), loss, ["accuracy"])
    return model


def trained(backend: str, optimizer: str, data: Any = (X, Y)) -> tuple[Any, tg.Sequential]:
    with tg.backend(backend):
        model = model_of(optimizer)
        history = model.fit(*data, batch_size=16, epochs=3, seed=2, validation_split=0.25)
        assert {v.backend for v in model.variables} == {backend}
        return history.history, model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_training_on_both_backends(optimizer: str, ran: list[str]) -> None:
    wanted, on_host = trained("numpy", optimizer)
    assert ran == []
    got, on_device = trained("cupy", optimizer)
    update = {"nesterov": "momentum", "adamw": "adam"}.get(optimizer, optimizer)
    kernels = {"linear_relu", "linear_relu_grad", "label_cross_entropy_with_grad", "random_bits"}
    assert {update, *kernels} <= set(ran)
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert got[name] == pytest.approx(values, rel=1e-4), name
    for a, b in zip(on_device.variables, on_host.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-5)
    with tg.backend("numpy"):
        want = on_host.predict(X)
    np.testing.assert_allclose(on_device.predict(X), want, rtol=1e-3, atol=1e-4)


def test_a_compiled_function_computes_on_the_device() -> None:
    v = tg.Variable(np.zeros(3, "f4"))

    @tg.function
    def step(x: tg.Tensor) -> tg.Tensor:
        with tg.GradientTape() as tape:
            loss = tg.sum(tg.square(v - x)) + tg.sum(tg.random.uniform((2,)) * 0.0)
        v.assign_sub(tape.gradient(loss, v) * 0.25)
        return loss

    x = tg.constant([1.0, 2.0, 3.0])
    losses = [step(x) for _ in range(5)]
    assert {y.backend for y in losses} == {v.backend} == {"cupy"}
    np.testing.assert_allclose([float(y) for y in losses], 14 * 0.25 ** np.arange(5), rtol=1e-5)
    np.testing.assert_allclose(v.numpy(), x.numpy() * (1 - 0.5**5), rtol=1e-5)


def test_data_may_lie_on_the_device() -> None:
    there = tg.constant(X), tg.constant(Y)
    first, _ = trained("cupy", "adam", there)
    second, _ = trained("cupy", "adam")
    assert first == second


def test_training_without_kernels_agrees(without_kernels: Callable[..., Any]) -> None:
    with_kernels, _ = trained("cupy", "adam")
    plain, _ = without_kernels(trained, "cupy", "adam")
    for name, values in plain.items():
        assert with_kernels[name] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize(("here", "there"), [("cupy", "numpy"), ("numpy", "cupy")])
def test_weights_go_from_one_backend_to_the_other(here: str, there: str, tmp_path: Path) -> None:
    _, model = trained(here, "adam")
    file = str(tmp_path / "weights.safetensors")
    model.save_weights(file)
    with tg.backend(there):
        other = model_of("adam")
        other.build((None, 6))
        other.load_weights(file)
        assert {v.backend for v in other.variables} == {there}
        for a, b in zip(model.variables, other.variables, strict=True):
            assert a.numpy().tobytes() == b.numpy().tobytes()
        np.testing.assert_allclose(other.predict(X), model_predictions(model, here), 1e-4, 1e-5)
        other.fit(X, Y, epochs=1)  # and training goes on there


def model_predictions(model: tg.Sequential, backend: str) -> Any:
    with tg.backend(backend):
        return model.predict(X)


def test_float64_to_the_last_digits() -> None:
    """Over three steps of Adam nothing is lost but rounding."""

    def run() -> list[Any]:
        rng = np.random.default_rng(3)
        w, b = (tg.Variable(rng.normal(size=s)) for s in ((6, 4), (4,)))
        optimizer = tg.optimizers.Adam(0.1)
        for _ in range(3):
            with tg.GradientTape() as tape:
                logits = tg.nn.linear(tg.tanh(tg.constant(X.astype("f8"))), w, b)
                loss = tg.nn.softmax_cross_entropy(logits, Y)
            optimizer.apply_gradients(zip(tape.gradient(loss, [w, b]), [w, b], strict=True))
        return [w.numpy(), b.numpy(), loss.numpy()]

    with tg.backend("numpy"):
        want = run()
    for a, b in zip(run(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
