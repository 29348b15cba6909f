"""The elementwise kernels: CuPy's own source around our one line, run on the CPU and compiled."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import nvrtc
import pytest
from cpu_cuda import RawModule, why_not

from tapegrad.kernels import elementwise

cupy = pytest.importorskip("cupy")


def generated_source(kernel, dtype):
    """Return the source CuPy writes for 2-D strided arguments, got through names private to it."""
    from cupy._core import _carray, _kernel

    built = cupy.ElementwiseKernel(*kernel.arguments)
    dtype = np.dtype(dtype)
    # kind, type, dtype, dimensions, contiguous, 32-bit indices
    array = _kernel._ArgInfo(1, cupy.ndarray, dtype, 2, False, True)
    index = _kernel._ArgInfo(2, _carray.Indexer, None, 2, True, True)
    _, _, types = built._decide_params_type((dtype, dtype), ())
    source = _kernel._get_elementwise_kernel_code(
        *((array, array, array, index), types),
        *(built.params, built.operation, built.name, built.preamble),
    )
    return "#include <cupy/carray.cuh>\n" + source


INCLUDE = f"-I{Path(cupy.__file__).parent / '_core' / 'include'}"


def run(kernel, *arrays):
    """Run CuPy's source for the kernel on arrays that broadcast together, at most 2-D."""
    if why_not("fast"):
        pytest.skip(str(why_not("fast")))
    arrays = [np.atleast_2d(a) for a in np.broadcast_arrays(*arrays)]
    out = np.empty(arrays[0].shape, arrays[0].dtype)

    def carray(a):  # CArray<T, 2>: pointer, size, shape, strides
        return np.void(struct.pack("=Q5q", a.ctypes.data, a.size, *a.shape, *a.strides))

    module = RawModule(generated_source(kernel, out.dtype), options=(INCLUDE, "-D__CUDACC_RTC__"))
    indexer = np.void(struct.pack("=5q", out.size, *out.shape, 0, 0))
    module.get_function(kernel.name)((4,), (32,), (*map(carray, [*arrays, out]), indexer))
    return out


NAN, INF = np.nan, np.inf
G = np.array([[0.0, -0.0, 0.0, 0.0, 2.0, NAN, INF, 1.0]])
D = np.array([[NAN, INF, -INF, 3.0, 0.5, 2.0, 0.0, NAN]])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_scale(dtype):
    got = run(elementwise._SCALE, G.astype(dtype), D.astype(dtype))
    want = np.array([[0, 0, 0, 0, 1, NAN, NAN, NAN]], dtype)
    np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_relu_grad(dtype):
    y = np.array([1, 0, -0.0, NAN, INF, -INF, 2, -1], dtype)
    for g in (G, D):
        got = run(elementwise._RELU_GRAD, g.astype(dtype), y)
        np.testing.assert_array_equal(got, np.where(y > 0, g, 0).astype(dtype), strict=True)


def test_broadcast_and_strides():
    rng = np.random.default_rng(0)
    column, matrix = rng.normal(size=(7, 1)), rng.normal(size=(10, 7)).T[:, ::2]
    for kernel, meaning in [
        (elementwise._SCALE, lambda g, d: g * d),
        (elementwise._RELU_GRAD, lambda g, y: np.where(y > 0, g, 0)),
    ]:
        np.testing.assert_array_equal(run(kernel, column, matrix), meaning(column, matrix))


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
@pytest.mark.parametrize("kernel", [elementwise._SCALE, elementwise._RELU_GRAD])
def test_compiles(kernel, dtype):
    for architecture in nvrtc.ARCHITECTURES:
        usage = nvrtc.resource_usage(
            generated_source(kernel, dtype), architecture, (), (INCLUDE, "-std=c++17")
        )
        assert list(usage) == [kernel.name]
        assert usage[kernel.name]["stack"] == 0


class FakeCupy:
    """An array module that is not NumPy."""

    ndarray = np.ndarray


@pytest.mark.parametrize("launcher", [elementwise.scale, elementwise.relu_grad])
def test_declines(launcher, monkeypatch):
    monkeypatch.setattr(elementwise, "_SCALE", lambda *arrays: "launched")
    monkeypatch.setattr(elementwise, "_RELU_GRAD", lambda *arrays: "launched")
    g = np.ones(3, "f4")
    assert launcher(FakeCupy, g, g) == "launched"
    assert launcher(np, g, g) is None  # NumPy has no ElementwiseKernel
    assert launcher(FakeCupy, g, g.astype("f8")) is None
    assert launcher(FakeCupy, g, 2.0) is None
    assert launcher(FakeCupy, g.astype("i4"), g.astype("i4")) is None
