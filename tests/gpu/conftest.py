"""What the GPU tests share: the device (or its stand-in), arrays on it, and which kernels ran.

They need CuPy and a usable GPU, and are skipped as a whole where there is none. To check the tests
themselves without a GPU, set TAPEGRAD_GPU_TESTS=standin: a CuPy made of NumPy
(../fake_cupy.py) takes the device's place, and the kernels run on the CPU (see ../cpu_cuda). Tests
that only a device can answer are then skipped.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend, optimizers
from tapegrad.kernels import _build
from tapegrad.primitive import Primitive, Update, primitives

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent / name) for name in ("cpu_cuda", "kernels")]

STAND_IN = os.environ.get("TAPEGRAD_GPU_TESTS") == "standin"
device_only = pytest.mark.skipif(STAND_IN, reason="only a device can answer")


@functools.cache
def _why_not() -> str | None:
    return None if STAND_IN else _backend._usable_cupy()[1]


if STAND_IN or (os.environ.get("TAPEGRAD_BACKEND") == "cupy" and _why_not()):
    # Some modules make tensors when they are imported: let them be collected, and then skipped.
    os.environ["TAPEGRAD_BACKEND"] = "numpy"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    # What has no kernel may be refused in a capture; test_graphs.py asks for those that are not.
    plain = pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(plain)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the times of products are kept: not among the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cupy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The array module of the device; new tensors are made there."""
    monkeypatch.setenv("TAPEGRAD_CACHE", str(cache))
    # Timing the candidates of thousands of shapes would take minutes; test_gemm.py does it.
    monkeypatch.setattr(tg.config, "deterministic", True)
    if (problem := _why_not()) is not None:
        pytest.skip(f"needs CuPy and a GPU: {problem}")
    if not STAND_IN:
        import cupy

        if os.environ.get("TAPEGRAD_GPU_TESTS") == "no pool":
            # For a memory checker: the pool would hide an access beyond an array's end.
            cupy.cuda.set_allocator(None)
        with tg.backend("cupy"):
            yield cupy
        return
    from cpu_kernels import kernels_on_cpu
    from cublaslt_emulation import cublaslt_on_cpu

    from tests.fake_cupy import FakeCupy

    fake = FakeCupy()
    fake.ElementwiseKernel = _elementwise_kernel  # type: ignore[attr-defined]
    with (
        pytest.MonkeyPatch.context() as patch,
        kernels_on_cpu(),
        cublaslt_on_cpu(fake, cache, small=True),
    ):
        patch.setattr(_build, "raw_module", _launched(_build.raw_module))
        for kernel in _build.ELEMENTWISE:
            patch.setattr(kernel, "_kernel", None)
        with tg.backend("cupy"):
            yield fake


@functools.cache
def _launched(build: Callable[..., Any]) -> Callable[..., Any]:
    """Let the kernels that are built for the CPU be launches of the stand-in."""
    from tests.fake_cupy import FakeArray, device

    class Module:
        def __init__(self, **arguments: Any) -> None:
            self._module = build(**arguments)

        def get_function(self, name: str) -> Callable[..., None]:
            kernel = self._module.get_function(name)

            def launch(grid: Any, block: Any, arguments: Any) -> None:
                def run(views: Any) -> None:
                    rest = iter(views)
                    filled = [next(rest) if isinstance(a, FakeArray) else a for a in arguments]
                    kernel(grid, block, tuple(filled))

                device.kernel(name, run, [a for a in arguments if isinstance(a, FakeArray)])

            return launch

    return Module


def _elementwise_kernel(_inputs: str, _output: str, _operation: str, name: str) -> Any:
    """Do what the two elementwise kernels do, whose source CuPy writes."""

    def call(x: Any, y: Any) -> Any:
        with np.errstate(all="ignore"):
            zero = x.dtype.type(0)
            if name == "tapegrad_scale":
                return np.where(x == 0, zero, x * y)
            return np.where(y > 0, x, zero)

    return call


def on_device(array: np.ndarray[Any, Any]) -> Any:
    """Copy an array to the device with its memory layout: strides, gaps, misalignment."""
    array = np.asarray(array)
    xp = _backend._require_cupy()
    low, high = _backend.byte_bounds(array)
    first = array.__array_interface__["data"][0] - low
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    # The bytes between the first and the last element, gaps and all.
    start = low - owner.__array_interface__["data"][0]
    span = np.ndarray((high - low,), np.uint8, owner, start) if high > low else np.empty(0, "u1")
    lead = low % 16  # CuPy's memory begins at multiples of 512
    memory = xp.empty(lead + span.size, np.uint8)
    memory[lead:] = xp.asarray(span)
    if STAND_IN:
        view = np.ndarray(
            array.shape, array.dtype, memory.view(np.ndarray), lead + first, array.strides
        )
        return view.view(xp.ndarray)
    return xp.ndarray(array.shape, array.dtype, memory.data + lead + first, array.strides)


def _tables() -> list[Primitive | Update]:
    updates = [x for x in vars(optimizers).values() if isinstance(x, Update)]
    return [x for x in (*primitives.values(), *updates) if x.kernel is not None]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the primitives whose kernels ran, and did not decline."""
    names: list[str] = []

    def noting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: Any, **options: Any) -> Any:
            answer = kernel(*arrays, **options)
            if answer is not None:
                names.append(name)
            return answer

        return call

    for row in _tables():
        assert row.kernel is not None
        monkeypatch.setattr(row, "kernel", noting(row.name, row.kernel))
    return names


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call a function with all kernels turned off: the meanings run, on the device."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(_backend, "_kernels_enabled", False)
            return function(*arguments)

    return call
