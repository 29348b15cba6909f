"""Products through cuBLASLt on the device: every algorithm that is tried, capture, precision."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")

import ml_dtypes

import tapegrad as tg
from tapegrad import _backend
from tapegrad.kernels import cublaslt, gemm, linear_relu

from .conftest import device_only, on_device

FLOAT = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", FLOAT, ids=lambda dtype: np.dtype(dtype).name)


@pytest.fixture(autouse=True)
def _used(cupy: ModuleType) -> None:
    """Where cuBLASLt is missing there is nothing to test."""
    if not (state := gemm.describe(cupy)).endswith("in use"):
        pytest.skip(state)


def integers(*shape: int, dtype: Any = "f4", seed: int = 0) -> np.ndarray[Any, Any]:
    """Numbers so small that every sum of their products is exact in every type."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(dtype)


# How a matrix lies in memory; the last two must be copied.
LAYOUTS: dict[str, Callable[..., np.ndarray[Any, Any]]] = {
    "rows": integers,
    "columns": lambda n, k, **options: integers(k, n, **options).T,
    "part": lambda n, k, **options: integers(n, k + 5, **options)[:, 2:-3],
    "part of columns": lambda n, k, **options: integers(k, n + 3, **options).T[1:-2],
    "every other": lambda n, k, **options: integers(n, 2 * k, **options)[:, ::2],
    "backwards": lambda n, k, **options: integers(n, k, **options)[::-1],
}
SHAPES = [(1, 1, 1), (1, 64, 10), (64, 1, 10), (128, 33, 1), (37, 100, 129), (128, 128, 128)]


def check(launcher: Callable[..., Any], xp: ModuleType, arrays: Any) -> None:
    """Compare with the meaning; the algorithms that are timed on the way are checked too."""
    x, w, *rest = (a.astype("f8") for a in arrays)
    want = x @ w
    if rest:
        want = want + rest[0]
    if launcher is linear_relu.linear_relu:
        want = np.maximum(want, 0)
    want = want.astype(arrays[0].dtype)
    y = launcher(xp, *map(on_device, arrays))
    if y is not None:  # None: CuPy's own product is the fastest
        np.testing.assert_array_equal(_backend.to_numpy(y), want, strict=True)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_values(
    cupy: ModuleType,
    shape: tuple[int, int, int],
    dtype: Any,
    timed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tg.config, "deterministic", not timed)
    n, k, m = shape
    for x_layout in LAYOUTS.values():
        for w_layout in LAYOUTS.values():
            x, w = x_layout(n, k, dtype=dtype), w_layout(k, m, dtype=dtype, seed=1)
            check(gemm.matmul, cupy, (x, w))
            if timed:  # one layout: timing takes its time
                break
    x, w, b = (integers(*s, dtype=dtype, seed=s[-1]) for s in ((n, k), (k, m), (m,)))
    check(gemm.linear, cupy, (x, w, b))
    check(linear_relu.linear_relu, cupy, (x, w, b))


@DTYPES
def test_every_algorithm_that_is_timed_is_right(
    cupy: ModuleType, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg.config, "deterministic", False)
    monkeypatch.setattr(gemm, "_devices", {})
    monkeypatch.setenv("TAPEGRAD_CACHE", "")  # nothing is read: the folder is the home's
    monkeypatch.setattr(gemm.gemm_choice.Times, "_read", lambda self: {})
    monkeypatch.setattr(gemm.gemm_choice.Times, "_write", lambda self: None)
    wrong: list[Any] = []
    seen = 0

    for n, k, m in [(128, 784, 512), (128, 512, 10), (1000, 37, 129)]:
        x, w, b = (integers(*s, dtype=dtype, seed=s[-1]) for s in ((n, k), (k, m), (m,)))
        z = x.astype("f8") @ w.astype("f8")
        for launcher, want in [
            (gemm.matmul, z),
            (gemm.linear, z + b.astype("f8")),
            (linear_relu.linear_relu, np.maximum(z + b.astype("f8"), 0)),
        ]:
            answer = want.astype(dtype)

            def comparing(run: Callable[[], Any], answer: Any = answer) -> float:
                nonlocal seen
                seen += 1
                if not np.array_equal(_backend.to_numpy(run()), answer):
                    wrong.append((launcher.__name__, answer.shape))  # noqa: B023
                return 1.0

            monkeypatch.setattr(gemm, "timer", lambda xp, comparing=comparing: comparing)
            arrays = (x, w) if launcher is gemm.matmul else (x, w, b)
            launcher(cupy, *map(on_device, arrays))
    assert seen > 9
    assert wrong == []


@pytest.mark.parametrize("deterministic", [True, False])
@DTYPES
def test_relu_keeps_nan(
    cupy: ModuleType, dtype: Any, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way wins: most of cuBLASLt's ReLU epilogues turn NaN into 0."""
    monkeypatch.setattr(tg.config, "deterministic", deterministic)
    x = np.zeros((64, 64), dtype)
    x[3, 5] = np.nan
    w, b = np.eye(64, dtype=dtype), np.full(64, -1, dtype)
    b[7] = np.nan
    y = linear_relu.linear_relu(cupy, *map(on_device, (x, w, b)))
    got = np.isnan(_backend.to_numpy(y).astype("f4"))
    want = np.zeros((64, 64), bool)
    want[3] = want[:, 7] = True
    np.testing.assert_array_equal(got, want)


def test_stacks(cupy: ModuleType) -> None:
    for a, b in [((3, 4, 5), (3, 5, 6)), ((2, 3, 4, 5), (5, 6)), ((4, 5), (3, 5, 6))]:
        x, w = integers(*a), integers(*b, seed=1)
        y = gemm.matmul(cupy, on_device(x), on_device(w))
        np.testing.assert_array_equal(_backend.to_numpy(y), x @ w)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_accumulated_in_float32(cupy: ModuleType, dtype: Any) -> None:
    """In float16, 4096 ones would stop at 2048; in bfloat16 at 256."""
    ones = np.ones((64, 4096), dtype)
    y = gemm.matmul(cupy, on_device(ones), on_device(ones.T))
    np.testing.assert_array_equal(_backend.to_numpy(y).astype("f4"), 4096)


def test_tf32_is_opt_in(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.full((128, 128), 1 + 2**-20, "f4")
    eye = np.eye(128, dtype="f4")
    product = lambda: _backend.to_numpy(gemm.matmul(cupy, on_device(x), on_device(eye)))
    np.testing.assert_array_equal(product(), x)  # in true float32
    monkeypatch.setattr(tg.config, "tf32", True)
    y = product()
    np.testing.assert_allclose(y, x, 2**-10)
    major = cupy.cuda.runtime.getDeviceProperties(0)["major"]
    assert (y == 1).all() == (major >= 8)  # before Ampere there is no TF32


@device_only
def test_capture(cupy: ModuleType) -> None:
    x, w, b = (integers(*s, seed=s[-1]) for s in ((32, 48), (48, 16), (16,)))
    device = [cupy.asarray(a) for a in (x, w, b)]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):

        def products() -> list[Any]:
            return [
                gemm.matmul(cupy, *device[:2]),
                gemm.matmul(cupy, device[1].T, device[0].T),
                gemm.linear(cupy, *device),
                linear_relu.linear_relu(cupy, *device),
            ]

        products()
        stream.begin_capture()
        captured = products()
        new = cupy.empty((7, 48), "f4")
        with pytest.raises(gemm.NotPlanned, match="was met for the first time while"):
            gemm.matmul(cupy, new, device[1])
        graph = stream.end_capture()
        for seed in (1, 2):  # replayed on what the inputs hold then
            x = integers(32, 48, seed=seed)
            device[0].set(x)
            for answer in captured:
                answer.fill(7)
            graph.launch()
            stream.synchronize()
            z = x @ w
            for got, want in zip(captured, (z, z.T, z + b, np.maximum(z + b, 0)), strict=True):
                np.testing.assert_array_equal(got.get(), want)


@device_only
def test_other_streams_and_one_workspace_each(cupy: ModuleType) -> None:
    x, w = integers(64, 4096), integers(4096, 64, seed=1)  # long sums are split, in a workspace
    cupy_x, cupy_w = cupy.asarray(x), cupy.asarray(w)
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    answers = []
    for _ in range(10):
        for stream in streams:
            with stream:
                answers.append(gemm.matmul(cupy, cupy_x, cupy_w))
    cupy.cuda.Device().synchronize()
    for answer in answers:
        np.testing.assert_array_equal(answer.get(), x @ w)


@device_only
def test_the_timer_and_the_file(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tg.config, "deterministic", False)
    monkeypatch.setattr(gemm, "_devices", {})
    x, w = cupy.ones((96, 80), "f4"), cupy.ones((80, 48), "f4")
    gemm.matmul(cupy, x, w)
    times = gemm._devices[0][0]._times  # type: ignore[union-attr]
    assert times is not None
    (found,) = (t for name, t in times._times.items() if "48x80/48/0 80x96/80/0" in name)
    assert {"plain", "cupy"} <= set(found)
    assert all(0 < timed.seconds < 1 for timed in found.values())
    monkeypatch.setattr(gemm, "_devices", {})  # as in the next process
    monkeypatch.setattr(gemm, "timer", lambda xp: pytest.fail("timed again"))
    gemm.matmul(cupy, x, w)


@device_only
def test_the_library_is_that_of_cupy(cupy: ModuleType) -> None:
    library, _ = cublaslt.load()
    assert library is not None
    assert library.version // 10000 == cupy.cuda.runtime.runtimeGetVersion() // 1000
