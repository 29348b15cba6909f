"""Fused primitives on the device: kernel, meaning, plain composition and NumPy agree."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.kernels import gemm
from tapegrad.tensor import wrap
from tests.test_fused import (
    derivatives,
    normal,
    plain_label_loss,
    plain_linear_relu,
    plain_probability_loss,
    plain_weighted_loss,
)

from .conftest import on_device

LABELS = np.random.default_rng(3).integers(0, 10, 33)
TARGETS = np.abs(normal(33, 10, seed=4))


def label_loss(x: Any, **options: Any) -> Any:
    return tg.nn.softmax_cross_entropy(x, LABELS, reduction="none", **options)


def masked(x: Any) -> Any:
    used = (LABELS != 3).astype("f8")
    return plain_label_loss(x, LABELS) * used.astype(x.dtype)


# name: (fused, plain, arguments, the primitives whose kernels must run)
FUSED: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], set[str]]] = {
    "relu": (tg.nn.relu, lambda x: tg.where(x > 0, x, 0.0), (normal(33, 7),), {"relu_grad"}),
    "linear": (
        tg.nn.linear,
        lambda x, w, b: x @ w + b,
        (normal(33, 5), normal(5, 7, seed=1), normal(7, seed=2)),
        {"linear", "matmul_nt", "matmul_tn"},
    ),
    "matmul": (
        tg.matmul,
        lambda a, b: tg.sum(a[..., None] * b[..., None, :, :], axis=-2),
        (normal(2, 9, 5), normal(2, 5, 7, seed=1)),
        {"matmul"},
    ),
    "linear_relu": (
        tg.nn.linear_relu,
        plain_linear_relu,
        (normal(33, 5), normal(5, 7, seed=1), normal(7, seed=2)),
        {"linear_relu", "linear_relu_grad"},
    ),
    "linear_relu wide": (
        tg.nn.linear_relu,
        plain_linear_relu,
        (normal(600, 12), normal(12, 132, seed=1), normal(132, seed=2)),
        {"linear_relu", "linear_relu_grad"},
    ),
    "softmax": (
        tg.nn.softmax,
        lambda x: tg.exp(x) / tg.sum(tg.exp(x), axis=-1, keepdims=True),
        (normal(33, 10),),
        set(),
    ),
    "labels": (
        label_loss,
        lambda x: plain_label_loss(x, LABELS),
        (normal(33, 10),),
        {"label_cross_entropy_with_grad"},
    ),
    "labels smoothed": (
        lambda x: label_loss(x, label_smoothing=0.1),
        lambda x: plain_label_loss(x, LABELS, 0.1),
        (normal(33, 10),),
        {"label_cross_entropy_with_grad"},
    ),
    "labels ignored": (
        lambda x: label_loss(x, ignore_label=3),
        masked,
        (normal(33, 10),),
        {"label_cross_entropy_with_grad"},
    ),
    "labels weighted": (
        lambda x, w: label_loss(x, class_weights=w, label_smoothing=0.1),
        lambda x, w: plain_weighted_loss(x, w, LABELS, 0.1),
        (normal(33, 10), np.linspace(0.0, 2.0, 10)),
        {"weighted_label_cross_entropy_with_grad"},
    ),
    "probabilities": (
        lambda x, q: tg.nn.softmax_cross_entropy(x, q, reduction="none"),
        plain_probability_loss,
        (normal(33, 10), TARGETS),
        {"probability_cross_entropy_with_grad"},
    ),
    "gather": (
        lambda x: x[[0, 0, 2, -1]] ** 3,
        lambda x: tg.stack([x[0], x[0], x[2], x[3]]) ** 3,
        (normal(4, 3),),
        {"scatter_add"},
    ),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FUSED)
def test_all_ways_agree_to_second_order(
    cupy: ModuleType,
    name: str,
    dtype: str,
    ran: list[str],
    without_kernels: Callable[..., Any],
) -> None:
    fused, plain, arguments, kernels = FUSED[name]
    arrays = [a.astype(dtype) for a in arguments]
    rtol = 1e-10 if dtype == "float64" else 1e-4
    got = derivatives(fused, *arrays)
    if not gemm.describe(cupy).endswith("in use"):
        kernels = kernels - {"linear", "matmul", "matmul_nt", "matmul_tn"}
    assert kernels <= set(ran)
    ran.clear()
    ways = {
        "meaning": without_kernels(derivatives, fused, *arrays),
        "plain": without_kernels(derivatives, plain, *arrays),
    }
    assert ran == []
    with tg.backend("numpy"):
        ways["numpy"] = derivatives(fused, *arrays)
    for way, wants in ways.items():
        for g, w in zip(got, wants, strict=True):
            assert g.dtype == w.dtype == dtype
            scale = max(1.0, np.abs(w).max())
            np.testing.assert_allclose(g, w, rtol, rtol * scale, err_msg=way)


def declined_cases() -> dict[str, Callable[[], Any]]:
    x = normal(6, 4, dtype="float32")
    labels = np.arange(6) % 4
    across = lambda a: wrap(on_device(a.T.copy().T))
    return {
        "logits across": lambda: tg.nn.softmax_cross_entropy(across(x), labels),
        "int16 labels": lambda: tg.nn.softmax_cross_entropy(x, labels.astype("i2")),
        "probabilities across": lambda: tg.nn.softmax_cross_entropy(across(x), np.abs(x)),
        "no rows": lambda: tg.nn.softmax_cross_entropy(x[:0], labels[:0], reduction="sum"),
        "no rows, linear": lambda: tg.nn.linear_relu(x[:0], x.T, np.ones(6, "f4")),
        "no columns, linear": lambda: tg.nn.linear_relu(x[:, :0], x.T[:0], np.ones(6, "f4")),
        "mixed types": lambda: tg.nn.linear_relu(x, x.T.astype("f8"), np.ones(6, "f4")),
    }


@pytest.mark.parametrize("name", declined_cases())
def test_what_kernels_decline_the_meaning_computes(name: str, ran: list[str]) -> None:
    got = declined_cases()[name]()
    assert got.backend == "cupy"
    assert ran == []
    with tg.backend("numpy"):
        case = declined_cases()[name]
        if "across" not in name:  # else the argument lies on the device already
            np.testing.assert_allclose(got.numpy(), case().numpy(), 1e-5)
    x, labels = normal(6, 4, dtype="float32"), np.arange(6) % 4
    if name == "logits across":
        np.testing.assert_allclose(
            got.numpy(), tg.nn.softmax_cross_entropy(x, labels).numpy(), 1e-5
        )


def test_a_wrong_label_is_nan_and_has_no_gradient(without_kernels: Callable[..., Any]) -> None:
    def run() -> tuple[Any, Any]:
        x = tg.Variable(normal(3, 4, dtype="float32"))
        with tg.GradientTape() as tape:
            losses = tg.nn.softmax_cross_entropy(x, [0, 4, -1], reduction="none")
        return losses.numpy(), tape.gradient(losses, x).numpy()

    for losses, gradient in (run(), without_kernels(run)):
        np.testing.assert_array_equal(np.isnan(losses), [False, True, True])
        assert (gradient[0] != 0).all()
        np.testing.assert_array_equal(gradient[1:], 0)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_wrong_label_is_an_error_in_debug_mode(
    kernels: bool, monkeypatch: pytest.MonkeyPatch, without_kernels: Callable[..., Any]
) -> None:
    monkeypatch.setattr(tg.config, "debug", True)
    run = lambda: tg.nn.softmax_cross_entropy(normal(2, 4, dtype="float32"), [0, 4])
    with pytest.raises(ValueError, match="labels must be from 0 to 3, got 4"):
        run() if kernels else without_kernels(run)
    tg.nn.softmax_cross_entropy(normal(2, 4, dtype="float32"), [0, 3])


def test_nan_stays_nan() -> None:
    x = tg.constant([[np.nan, 1.0], [-1.0, 2.0]])
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = tg.nn.linear_relu(x, np.eye(2, dtype="f4")[:, :1], np.zeros(1, "f4"))
    assert np.isnan(y.numpy()[0, 0])
    np.testing.assert_array_equal(tg.nn.relu(x).numpy(), [[np.nan, 1], [0, 2]])
    np.testing.assert_array_equal(tape.gradient(y, x).numpy()[0], [0.0, 0.0])
