"""cuBLASLt's epilogues of training on the device: every algorithm, special values, whole steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")

import ml_dtypes

import tapegrad as tg
from tapegrad import _backend
from tapegrad._function import simplify
from tapegrad.kernels import cublaslt, epilogues, gemm
from tests.function.compiled import assert_same, rewritten

from .conftest import STAND_IN, on_device
from .test_gemm import integers

DTYPES = pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name
)
EPILOGUES = {"relu masks", "sums beside products"}


@pytest.fixture(autouse=True)
def tried(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the candidates gave; each pair is said to come faster than the last: epilogues win."""
    if not (state := gemm.describe(cupy)).endswith("in use"):
        pytest.skip(state)
    if STAND_IN:
        keep_nan(True)
    results: list[Any] = []
    seconds = itertools.accumulate(itertools.repeat(0.5), lambda a, b: a * b, initial=1.0)

    def timer(run: Callable[[], Any]) -> float:
        results.append(run())
        return next(seconds) if isinstance(results[-1], tuple) else 1.0

    monkeypatch.setattr(tg.config, "deterministic", False)
    monkeypatch.setattr(gemm, "_devices", {})
    monkeypatch.setattr(gemm, "timer", lambda xp: timer)
    monkeypatch.setattr(gemm.gemm_choice.Times, "_read", lambda self: {})
    monkeypatch.setattr(gemm.gemm_choice.Times, "_write", lambda self: None)
    return results


def keep_nan(keeps: bool) -> None:
    """Let the stand-in's ReLU epilogues keep NaN, or turn it into 0 as real ones may."""
    library, _ = cublaslt.load()
    assert library is not None
    library._functions.keeps_nan = keeps


def layers(n: int, i: int, o: int, k: int, dtype: Any) -> list[np.ndarray[Any, Any]]:
    shapes = (n, i), (i, o), (o,), (n, k), (o, k)
    return [integers(*shape, dtype=dtype, seed=s) for s, shape in enumerate(shapes)]


def meaning(x: Any, w: Any, b: Any, g: Any, above: Any) -> tuple[Any, ...]:
    """Return y, gz, gb and the gradients of the weights above and of their bias, in float64."""
    x, w, b, g, above = (a.astype("f8") for a in (x, w, b, g, above))
    with np.errstate(invalid="ignore"):
        y = np.maximum(x @ w + b, 0)
        gz = np.where(y > 0, g @ above.T, 0)
        return y, gz, gz.sum(0), y.T @ g, g.sum(0)


def by_launchers(xp: ModuleType, *arrays: Any) -> list[Any]:
    x, w, b, g, above = map(on_device, arrays)
    y, mask = epilogues.linear_relu_with_mask(xp, x, w, b, above=g.shape[1])
    below = epilogues.matmul_linear_relu_grad(xp, g, above.T, y, mask)
    return [y, *below, *epilogues.matmul_with_sums(xp, y.T, g)]


def assert_right(got: Any, want: Any, dtype: Any) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(_backend.to_numpy(a), b.astype(dtype), strict=True)


SHAPES = [(37, 100, 129, 10), (128, 64, 128, 32), (2, 3, 2, 2), (300, 7, 33, 1), (64, 48, 1, 8)]


@pytest.mark.parametrize("keeps_nan", [True, False] if STAND_IN else [True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_values(
    cupy: ModuleType, shape: tuple[int, ...], dtype: Any, keeps_nan: bool, tried: list[Any]
) -> None:
    if STAND_IN:
        keep_nan(keeps_nan)
    arrays = layers(*shape, dtype)
    want = meaning(*arrays)
    for _ in range(2):
        assert_right(by_launchers(cupy, *arrays), want, dtype)
    assert tried


def test_what_cublaslt_has_no_epilogue_for(cupy: ModuleType, tried: list[Any]) -> None:
    arrays = layers(33, 17, 12, 5, np.float64)
    assert_right(by_launchers(cupy, *arrays), meaning(*arrays), np.float64)


@DTYPES
def test_every_algorithm_that_is_timed_is_right(
    cupy: ModuleType, dtype: Any, tried: list[Any]
) -> None:
    arrays = layers(128, 96, 136, 64, dtype)
    y_want, gz_want, gb_want, gw_want, gs_want = (a.astype(dtype) for a in meaning(*arrays))
    x, w, b, g, above = map(on_device, arrays)
    y, mask = epilogues.linear_relu_with_mask(cupy, x, w, b, above=64)
    found = pairs(tried)
    assert all(np.array_equal(y, y_want) for y, second in found if second.dtype == np.uint8)

    def all_are(launch: Callable[[], Any], *want: Any) -> None:
        """Take the decisions again, with these arrays."""
        tried.clear()
        (device,) = (device for device, _ in gemm._devices.values())
        assert device is not None
        device._decisions.clear()
        assert device._times is not None
        device._times._times.clear()
        launch()
        for got in pairs(tried):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
        assert pairs(tried)

    if mask.size:
        launch = lambda: epilogues.matmul_linear_relu_grad(cupy, g, above.T, y, mask)
        all_are(launch, gz_want, gb_want)
    all_are(lambda: epilogues.matmul_with_sums(cupy, y.T, g), gw_want, gs_want)


def pairs(tried: list[Any]) -> list[list[Any]]:
    """Return what fusions and the ways without them gave; others give one array."""
    return [[_backend.to_numpy(a) for a in y] for y in tried if isinstance(y, tuple)]


@pytest.mark.parametrize("keeps_nan", [True, False] if STAND_IN else [True])
@DTYPES
def test_special_values(cupy: ModuleType, dtype: Any, keeps_nan: bool) -> None:
    """Whatever way wins: ReLU keeps NaN, and neither there nor at 0 a gradient goes through."""
    if STAND_IN:
        keep_nan(keeps_nan)
    arrays = layers(64, 32, 48, 16, dtype)
    by_launchers(cupy, *arrays)  # decided on ordinary ones
    x, _, b, g, _ = arrays
    x[1], x[2], b[:] = np.nan, 0, 0
    g[1:3] = np.nan
    g[3] = np.inf
    got = [_backend.to_numpy(a).astype("f4") for a in by_launchers(cupy, *arrays)]
    want = meaning(*arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert np.isnan(got[0][1]).all()
    np.testing.assert_array_equal(got[1][1:3], 0)
    finite = np.isfinite(want[1])
    np.testing.assert_array_equal(got[1][finite], want[1][finite])


@pytest.mark.parametrize("keeps_nan", [True, False] if STAND_IN else [True])
@pytest.mark.parametrize("tf32", [False, True])
def test_a_training_step(
    cupy: ModuleType, tf32: bool, keeps_nan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a graph and by plain launches, with the epilogues and without, and eager."""
    if STAND_IN:
        keep_nan(keeps_nan)
    monkeypatch.setattr(tg.config, "tf32", tf32)
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(96, 12)).astype("f4"), rng.integers(0, 4, 96)

    def train(graph: bool, names: set[str]) -> tuple[Any, str]:
        tg.random.seed(1)
        monkeypatch.setattr(tg.config, "cuda_graphs", graph)
        v = [tg.Variable(tg.random.normal(s) * 0.3) for s in
             ((12, 24), (24,), (24, 16), (16,), (16, 4), (4,))]  # fmt: skip
        optimizer = tg.optimizers.SGD(0.01)

        def step(x: Any, labels: Any) -> Any:
            with tg.GradientTape() as tape:
                h = tg.nn.linear_relu(tg.nn.linear_relu(x, v[0], v[1]), v[2], v[3])
                logits = tg.nn.linear(h, v[4], v[5])
                # A mean's factor would be a chain's, which sums the bias's gradient on its way.
                loss = tg.nn.softmax_cross_entropy(logits, labels, reduction="sum")
            optimizer.apply(tape.gradient(loss, v), v)
            return loss

        compiled = tg.function(step)
        with rewritten(names):
            parts = [slice(16 * (i % 6), 16 * (i % 6) + 16) for i in range(8)]
            losses = [compiled(tg.constant(x[p]), tg.constant(labels[p])) for p in parts]
        return [losses, v], compiled.explain_program()

    names = set(simplify.TABLE)
    got, text = train(True, names)
    assert "a CUDA graph of" in text
    for name in ("linear_relu_with_mask", "matmul_linear_relu_grad", "matmul_with_sums"):
        assert f"= {name}(" in text
    assert_same(got, train(False, names)[0])
    tolerance = 1e-2 if tf32 else 1e-5
    assert_same(got, train(True, names - EPILOGUES)[0], tolerance)
    if STAND_IN:
        library, _ = cublaslt.load()
        assert library is not None
        launches = [x for x in library._functions.launches if x.epilogue > 0]  # of cuBLASLt
        used = {launch.epilogue for launch in launches if not launch.scratch}
        assert ({134, 152} <= used) is keeps_nan
        assert 256 in used
