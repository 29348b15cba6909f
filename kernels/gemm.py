"""Launchers of matrix products through cuBLASLt, with what follows them fused where that is faster.

Unlike CuPy's own products they can be captured into a CUDA graph, once they have run outside one.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapegrad.config import config

from . import cublaslt, gemm_choice, gemm_plan
from ._build import Array, Module, result
from .cublaslt import DescriptorAttribute, Epilogue, PreferenceAttribute
from .gemm_choice import Candidate, Timed

# NVIDIA's advice: 32 MiB since Hopper, 4 MiB before.
_WORKSPACE, _WORKSPACE_BEFORE_HOPPER = 32 << 20, 4 << 20
_HOPPER = 9
_ALGORITHMS = 6  # of each way, that are timed
_MAX_PLANS = 4096  # then all are let go: a program whose shapes never repeat must not grow

_SCALES = {
    cublaslt.DataType.FLOAT32: (ctypes.c_float(1), ctypes.c_float(0)),
    cublaslt.DataType.FLOAT64: (ctypes.c_double(1), ctypes.c_double(0)),
}


# What our own kernels do to a plain product y with the bias b, in place; returns y.
Finish = Callable[[Module, Array, Any], Array]


class NotPlanned(RuntimeError):
    """A product met for the first time while its stream is captured: it must run before."""


class Operation(NamedTuple):
    """A product and what follows it: inside cuBLASLt, or by kernels of our own."""

    name: str
    fused: Epilogue = Epilogue.DEFAULT  # DEFAULT: none
    finish: Finish = lambda xp, y, b: y


def _add_bias(xp: Module, y: Array, b: Array) -> Array:
    y += b
    return y


MATMUL = Operation("matmul")
LINEAR = Operation("linear", Epilogue.BIAS, _add_bias)


def matmul(xp: Module, x: Array, w: Array, out: Sequence[Array | None] = (None,)) -> Array | None:
    """Return x @ w: matrices, or stacks of them that broadcast; or None for what CuPy must do.

    Of one floating dtype, in any layout; transposed operands are read where they lie. float16 and
    bfloat16 are accumulated in float32; float32 in TF32 where `tapegrad.config.tf32` allows it.

    out  memory for the result, which is used where it is aligned and C-contiguous.
    """
    return product(MATMUL, xp, x, w, out=out[0])


def linear(xp: Module, x: Array, w: Array, b: Array) -> Array | None:
    """Return x @ w + b: x (n, i), w (i, o), b (o,), as `matmul` takes them, b C-contiguous."""
    if x.ndim != 2 or w.ndim != 2 or b.shape != w.shape[1:] or not b.flags.c_contiguous:
        return None
    return product(LINEAR, xp, x, w, b)


def product(
    operation: Operation,
    xp: Module,
    x: Array,
    w: Array,
    b: Array | None = None,
    out: Array | None = None,
) -> Array | None:
    """Return what `operation` makes of x @ w and the bias b, or None for what CuPy must do.

    Raises `NotPlanned` while the stream is captured, unless the same product (shapes, strides,
    dtype, alignment) has run before.
    """
    if xp is np:
        return None
    library, _ = cublaslt.load()
    if library is None:
        return None
    device = _device(xp, library)
    if device is None:
        return None
    dtype = x.dtype
    if w.dtype != dtype or (b is not None and b.dtype != dtype):
        return None
    arrays = (x, w) if b is None else (x, w, b)
    memory = [array.data for array in arrays]
    if any(pointer.device_id != device.number for pointer in memory):
        return None
    pointers = [pointer.ptr for pointer in memory]
    key = (
        *(operation.name, dtype, x.shape, x.strides, w.shape, w.strides),
        *[pointer % gemm_plan.MAX_ALIGNMENT for pointer in pointers],
        *(config.tf32, config.deterministic),
    )
    plan = device.plans.get(key)
    if plan is None:
        if dtype.name not in gemm_plan.TYPES or not dtype.isnative:
            return None
        if min(x.ndim, w.ndim) < 2 or min(x.size, w.size) == 0:
            return None
        readable = [gemm_plan.is_matrix(a.shape, a.strides, a.itemsize) for a in (x, w)]
        if not all(readable):
            x, w = (
                a if r else xp.ascontiguousarray(a) for a, r in zip((x, w), readable, strict=True)
            )
            return product(operation, xp, x, w, b, out)
        problem = gemm_plan.problem(x.shape, x.strides, w.shape, w.strides, x.itemsize)
        if problem is None:
            return None
        plan = device.plan(operation, problem, key, xp, x, w, b)
    way = plan.fastest
    if way is None:
        if not _is_capturing(xp):
            return None
        way = plan.capturable
        if way is None:
            raise NotPlanned(f"cuBLASLt has no algorithm for {_text(operation, x, w)}")
    return way(xp, pointers, result(xp, plan.shape, dtype, out), b)


def _is_capturing(xp: Module) -> bool:
    return bool(xp.cuda.runtime.streamIsCapturing(xp.cuda.get_current_stream().ptr))


def _text(operation: Operation, x: Array, w: Array) -> str:
    return f"{operation.name} of {x.dtype} {x.shape} and {w.shape}"


class _Prepared:
    """A problem with an epilogue, as objects of cuBLASLt's."""

    def __init__(
        self,
        library: cublaslt.Library,
        handle: cublaslt.Owned,
        problem: gemm_plan.Problem,
        kind: gemm_plan.Type,
        epilogue: Epilogue,
    ) -> None:
        self._library = library
        self._kind = kind
        self._with_bias = epilogue is not Epilogue.DEFAULT
        # The bias's address is kept in the descriptor until the launch has read it.
        self._lock = threading.Lock()
        descriptor = library.descriptor(
            kind.compute,
            kind.scale,
            {
                DescriptorAttribute.TRANSPOSE_A: ctypes.c_int32(problem.transpose_a),
                DescriptorAttribute.TRANSPOSE_B: ctypes.c_int32(problem.transpose_b),
                DescriptorAttribute.EPILOGUE: ctypes.c_uint32(epilogue),
            },
        )
        a, b, d = (
            library.layout(kind.data, m.rows, m.columns, m.leading, problem.batch, m.stride)
            for m in (problem.a, problem.b, problem.d)
        )
        self.parts = (handle, descriptor, a, b, d, d)
        self._one, self._zero = map(ctypes.byref, _SCALES[kind.scale])

    def algorithms(
        self, count: int, workspace: int, pointers: list[int]
    ) -> list[tuple[bytes, int]]:
        """Return algorithms for arrays at such addresses, and the workspace of each."""
        x, w = (ctypes.c_uint32(gemm_plan.alignment(pointer)) for pointer in pointers[:2])
        result = ctypes.c_uint32(gemm_plan.MAX_ALIGNMENT)  # CuPy's memory begins at 512s
        preference = self._library.preference(
            {
                PreferenceAttribute.MAX_WORKSPACE: ctypes.c_uint64(workspace),
                PreferenceAttribute.REDUCTION_SCHEMES: ctypes.c_uint32(self._kind.reductions),
                PreferenceAttribute.ALIGNMENT_A: w,
                PreferenceAttribute.ALIGNMENT_B: x,
                PreferenceAttribute.ALIGNMENT_C: result,
                PreferenceAttribute.ALIGNMENT_D: result,
            }
        )
        with self._lock:
            if self._with_bias:  # whose alignment it is that algorithms must keep to
                self._library.set_bias(self.parts[1], pointers[2])
            return self._library.algorithms(self.parts, preference, count)

    def launch(
        self,
        xp: Module,
        algorithm: Any,
        workspace: int,
        pointers: list[int],
        result: int,
        scales: tuple[Any, Any] | None = None,
    ) -> None:
        """Enqueue the product on the current stream.

        scales  what the product and what the result held before are multiplied by, else 1 and 0.
        """
        alpha, beta = scales or (self._one, self._zero)
        handle, descriptor, a, b, d, _ = [part.pointer for part in self.parts]
        # A workspace of its own for each launch, from the pool: so streams, threads and captured
        # graphs never share one, and the memory is the graph's where the pool is.
        memory = xp.empty(workspace, np.uint8) if workspace else None
        arguments = (
            *(handle, descriptor, alpha, pointers[1], a, pointers[0], b),
            *(beta, result, d, result, d, algorithm),
            *(None if memory is None else memory.data.ptr, workspace),
            xp.cuda.get_current_stream().ptr,
        )
        if not self._with_bias:
            self._library.matmul(*arguments)
            return
        with self._lock:
            self._library.set_bias(self.parts[1], pointers[2])
            self._library.matmul(*arguments)


class _Way:
    """A prepared product with one algorithm, and what our own kernels do to the result."""

    def __init__(
        self, prepared: _Prepared, algorithm: bytes, workspace: int, finish: Finish | None
    ) -> None:
        self._prepared = prepared
        self._buffer = ctypes.create_string_buffer(algorithm, cublaslt.ALGORITHM_BYTES)
        self._algorithm = ctypes.byref(self._buffer)
        self._workspace = workspace
        self._finish = finish

    def __call__(self, xp: Module, pointers: list[int], y: Array, b: Array | None) -> Array:
        self._prepared.launch(xp, self._algorithm, self._workspace, pointers, y.data.ptr)
        return y if self._finish is None else self._finish(xp, y, b)


class _Plan(NamedTuple):
    """How a product runs. None: as CuPy does it, which cannot be captured."""

    shape: tuple[int, ...]
    fastest: _Way | None
    capturable: _Way | None


class _Chooser:
    """A product that is met for the first time, and the ways that it may take."""

    def __init__(
        self,
        device: _Device,
        operation: Operation,
        problem: gemm_plan.Problem,
        xp: Module,
        x: Array,
        w: Array,
        b: Array | None,
    ) -> None:
        dtype = x.dtype.name
        tf32 = config.tf32 and dtype == "float32"
        kind = gemm_plan.TF32 if tf32 else gemm_plan.TYPES[dtype]
        self._device = device
        self._operation = operation
        self._xp = xp
        self._arrays: tuple[Any, ...] = (x, w, b)
        self._pointers = [array.data.ptr for array in ((x, w) if b is None else (x, w, b))]
        stack = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
        self._shape = (*stack, x.shape[-2], w.shape[-1])
        epilogues = {"plain": Epilogue.DEFAULT}
        if operation.fused is not Epilogue.DEFAULT:
            epilogues["fused"] = operation.fused
        self._prepared = {
            name: _Prepared(device.library, device.handle, problem, kind, epilogue)
            for name, epilogue in epilogues.items()
        }
        self.text = _key_text(operation, problem, "tf32" if tf32 else dtype, self._pointers)

    def untimed(self) -> _Plan:
        """Return the plan that needs no timing: the first algorithm of the first way.

        A bias is added by cuBLASLt; a ReLU is not, which may lose NaN: our own kernel follows.
        """
        names = [name for name in self._prepared if not self._may_lose_nan(name)]
        for name in reversed(names):
            for algorithm in self._algorithms(name, 1):
                way = self._way(name, *algorithm)
                return _Plan(self._shape, way, way)
        return _Plan(self._shape, None, None)

    def timed(self, times: dict[str, Timed]) -> _Plan:
        """Return the plan that is fastest by such times of the ways."""
        chosen = []
        for allowed in ({*self._prepared, "cupy"}, {*self._prepared}):
            # CuPy's own only where it is really faster: it costs more of Python's time.
            ranked = [(times[name].seconds, name == "cupy", name) for name in allowed & {*times}]
            name = min(ranked)[2] if ranked else "cupy"
            chosen.append(None if name == "cupy" else self._way(name, *times[name][1:]))
        return _Plan(self._shape, *chosen)

    def usable(self, times: dict[str, Timed]) -> bool:
        """Tell whether times are of these ways, and their algorithms such as can run here."""
        for name, timed in times.items():
            if name in self._prepared:
                parts = self._prepared[name].parts
                needed = self._device.library.accepts(parts, timed.algorithm)
                if needed is None or not needed <= timed.workspace <= self._device.workspace:
                    return False
        return times.keys() <= {*self._prepared, "cupy"}

    def candidates(self) -> Iterator[Candidate]:
        """Yield what is to be timed. Each launch makes a result of its own."""
        for name in self._prepared:
            for algorithm in self._algorithms(name, _ALGORITHMS):
                way = self._way(name, *algorithm)
                if not self._may_lose_nan(name) or self._keeps_nan(way):
                    yield Candidate(name, functools.partial(self._run, way), *algorithm)
        yield Candidate("cupy", self._run_cupy)

    def _algorithms(self, name: str, count: int) -> list[tuple[bytes, int]]:
        workspace = self._device.workspace
        return self._prepared[name].algorithms(count, workspace, self._pointers)

    def _way(self, name: str, algorithm: bytes, workspace: int) -> _Way:
        finish = self._operation.finish if name == "plain" else None
        return _Way(self._prepared[name], algorithm, workspace, finish)

    def _fresh(self) -> Array:
        return self._xp.empty(self._shape, self._arrays[0].dtype)

    def _run(self, way: _Way) -> Array:
        return way(self._xp, self._pointers, self._fresh(), self._arrays[2])

    def _run_cupy(self) -> Array:
        x, w, b = self._arrays
        y = self._xp.matmul(x, w, out=self._fresh())
        return self._operation.finish(self._xp, y, b)

    def _may_lose_nan(self, name: str) -> bool:
        return name == "fused" and self._operation.fused is Epilogue.RELU_BIAS

    def _keeps_nan(self, way: _Way) -> bool:
        """Tell whether an algorithm's ReLU keeps NaN: most turn it into 0."""
        b = self._arrays[2]
        nan = self._xp.asarray(np.full(b.shape, np.nan, b.dtype))
        try:
            y = way(self._xp, [*self._pointers[:2], nan.data.ptr], self._fresh(), nan)
        except cublaslt.CublasLtError:
            return False
        return bool(self._xp.isnan(y.astype(np.float32)).all())


class _Device:
    """What this process knows of cuBLASLt on one device."""

    def __init__(self, library: cublaslt.Library, number: int, xp: Module) -> None:
        self.library = library
        self.number = number
        self.handle = library.handle()
        self.plans: dict[Any, _Plan] = {}
        self._lock = threading.Lock()
        properties = xp.cuda.runtime.getDeviceProperties(number)
        before = properties["major"] < _HOPPER
        self.workspace = _WORKSPACE_BEFORE_HOPPER if before else _WORKSPACE
        self._facts = {
            "gpu": properties["name"].decode(),
            "driver": str(xp.cuda.runtime.driverGetVersion()),
            "cublaslt": str(library.version),
        }
        self._times: gemm_choice.Times | None = None

    def plan(
        self,
        operation: Operation,
        problem: gemm_plan.Problem,
        key: Any,
        xp: Module,
        x: Array,
        w: Array,
        b: Array | None,
    ) -> _Plan:
        """Decide how a product runs, and keep the decision."""
        if _is_capturing(xp):
            raise NotPlanned(
                f"{_text(operation, x, w)} was met for the first time while its stream is "
                "captured; run it once before the capture: choosing its algorithm needs the device"
            )
        with self._lock:
            plan = self.plans.get(key)
            if plan is None:
                if len(self.plans) >= _MAX_PLANS:
                    self.plans.clear()
                chooser = _Chooser(self, operation, problem, xp, x, w, b)
                plan = chooser.untimed() if config.deterministic else self._fastest(chooser, xp)
                self.plans[key] = plan
        return plan

    def _fastest(self, chooser: _Chooser, xp: Module) -> _Plan:
        if self._times is None:
            self._times = gemm_choice.Times(self._facts)
        times = self._times.get(chooser.text)
        if times is not None and not chooser.usable(times):
            self._times.drop(chooser.text, "cuBLASLt does not know an algorithm in it")
            times = None
        if times is None:
            try:
                with gemm_choice.scratch_memory(xp):
                    times = gemm_choice.measure(chooser.candidates(), timer(xp))
            except MemoryError:  # there is none to try things out in
                return chooser.untimed()
            self._times.put(chooser.text, times)
        return chooser.timed(times)


timer = gemm_choice.DeviceTimer


def _key_text(
    operation: Operation, problem: gemm_plan.Problem, kind: str, pointers: list[int]
) -> str:
    """Return a problem as the file of times names it."""
    matrices = [
        f"{m.rows}x{m.columns}/{m.leading}/{m.stride}{'t' if transposed else ''}"
        for m, transposed in (
            (problem.a, problem.transpose_a),
            (problem.b, problem.transpose_b),
            (problem.d, False),
        )
    ]
    aligned = ",".join(str(gemm_plan.alignment(pointer)) for pointer in pointers)
    return f"{operation.name} {kind} {' '.join(matrices)} batch {problem.batch} aligned {aligned}"


_devices: dict[int, tuple[_Device | None, str]] = {}
_making = threading.Lock()


def _device(xp: Module, library: cublaslt.Library) -> _Device | None:
    number = xp.cuda.runtime.getDevice()
    found = _devices.get(number)
    if found is None:
        if _is_capturing(xp):
            raise NotPlanned(
                "cuBLASLt cannot start while a stream is captured; run the products once before"
            )
        with _making:
            found = _devices.get(number)
            if found is None:
                try:
                    found = _Device(library, number, xp), ""
                except cublaslt.CublasLtError as error:
                    found = None, str(error)
                _devices[number] = found
    return found[0]


def describe(xp: Module) -> str:
    """Return the version of cuBLASLt and whether products go through it, for people to read."""
    if xp is np:
        return "not in use: NumPy computes the same values"
    library, problem = cublaslt.load()
    if library is not None and _device(xp, library) is not None:
        return f"{library.version_text}, in use"
    if library is not None:
        problem = _devices[xp.cuda.runtime.getDevice()][1]
    return f"not used: {problem}; CuPy's own products run"
