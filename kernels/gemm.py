"""Launchers of matrix products through cuBLASLt, with what follows them fused where that is faster.

Unlike CuPy's own products they can be captured into a CUDA graph, once they have run outside one.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tapegrad.config import config

from . import cublaslt, gemm_choice, gemm_plan
from ._build import Array, Module
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


class NotPlanned(RuntimeError):
    """A product met for the first time while its stream is captured: it must run before."""


class Operation(NamedTuple):
    """A product and what follows it: inside cuBLASLt, or by kernels of our own."""

    name: str
    fused: Epilogue = Epilogue.DEFAULT  # DEFAULT: none
    finish: Callable[[Module, Array, Any], Array] = lambda xp, y, b: y


def _add_bias(xp: Module, y: Array, b: Array) -> Array:
    y += b
    return y


MATMUL = Operation("matmul")
LINEAR = Operation("linear", Epilogue.BIAS, _add_bias)


def matmul(xp: Module, x: Array, w: Array) -> Array | None:
    """Return x @ w: matrices, or stacks of them that broadcast; or None for what CuPy must do.

    Of one floating dtype, in any layout; transposed operands are read where they lie. float16 and
    bfloat16 are accumulated in float32; float32 in TF32 where `tapegrad.config.tf32` allows it.
    """
    return product(MATMUL, xp, x, w)


def linear(xp: Module, x: Array, w: Array, b: Array) -> Array | None:
    """Return x @ w + b: x (n, i), w (i, o), b (o,), as `matmul` takes them, b C-contiguous."""
    if x.ndim != 2 or w.ndim != 2 or b.shape != w.shape[1:] or not b.flags.c_contiguous:
        return None
    return product(LINEAR, xp, x, w, b)


def product(
    operation: Operation, xp: Module, x: Array, w: Array, b: Array | None = None
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
            return product(operation, xp, x, w, b)
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
    return way(xp, pointers, xp.empty(plan.shape, dtype), b)


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
        self, xp: Module, algorithm: Any, workspace: int, pointers: list[int], result: int
    ) -> None:
        """Enqueue the product on the current stream."""
        handle, descriptor, a, b, d, _ = [part.pointer for part in self.parts]
        # A workspace of its own for each launch, from the pool: so streams, threads and captured
        # graphs never share one, and the memory is the graph's where the pool is.
        memory = xp.empty(workspace, np.uint8) if workspace else None
        arguments = (
            *(handle, descriptor, self._one, pointers[1], a, pointers[0], b),
            *(self._zero, result, d, result, d, algorithm),
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
        self, prepared: _Prepared, algorithm: bytes, workspace: int, operation: Operation | None
    ) -> None:
        self._prepared = prepared
        self._buffer = ctypes.create_string_buffer(algorithm, cublaslt.ALGORITHM_BYTES)
        self._algorithm = ctypes.byref(self._buffer)
        self._workspace = workspace
        self._finish = None if operation is None else operation.finish

    def __call__(self, xp: Module, pointers: list[int], y: Array, b: Array | None) -> Array:
        self._prepared.launch(xp, self._algorithm, self._workspace, pointers, y.data.ptr)
        return y if self._finish is None else self._finish(xp, y, b)


class _Plan(NamedTuple):
    """How a product runs. None: as CuPy does it, which cannot be captured."""

    shape: tuple[int, ...]
    fastest: _Way | None
    capturable: _Way | None


class _Device:
    """What this process knows of cuBLASLt on one device."""

    def __init__(self, xp: Module, library: cublaslt.Library, number: int) -> None:
        self.number = number
        self.plans: dict[Any, _Plan] = {}
        self._library = library
        self._handle = library.handle()
        self._lock = threading.RLock()
        properties = xp.cuda.runtime.getDeviceProperties(number)
        before = properties["major"] < _HOPPER
        self._workspace = _WORKSPACE_BEFORE_HOPPER if before else _WORKSPACE
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
                plan = self.plans[key] = self._decide(operation, problem, xp, x, w, b)
        return plan

    def _decide(
        self,
        operation: Operation,
        problem: gemm_plan.Problem,
        xp: Module,
        x: Array,
        w: Array,
        b: Array | None,
    ) -> _Plan:
        dtype = x.dtype.name
        tf32 = config.tf32 and dtype == "float32"
        kind = gemm_plan.TF32 if tf32 else gemm_plan.TYPES[dtype]
        pointers = [array.data.ptr for array in ((x, w) if b is None else (x, w, b))]
        stack = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
        shape = (*stack, x.shape[-2], w.shape[-1])
        prepared = {"plain": self._prepare(problem, kind, Epilogue.DEFAULT)}
        if operation.fused is not Epilogue.DEFAULT:
            prepared["fused"] = self._prepare(problem, kind, operation.fused)

        def way(name: str, algorithm: bytes, workspace: int) -> _Way:
            finish = operation if name == "plain" else None
            return _Way(prepared[name], algorithm, workspace, finish)

        def fresh() -> Array:
            return xp.empty(shape, x.dtype)

        def launched(run: _Way) -> Array:
            return run(xp, pointers, fresh(), b)

        def first() -> _Plan:
            """Return what needs no timing: our own kernels after the algorithm thought best."""
            found = prepared["plain"].algorithms(1, self._workspace, pointers)
            chosen = way("plain", *found[0]) if found else None
            return _Plan(shape, chosen, chosen)

        def candidates() -> Iterator[Candidate]:
            for name, made in prepared.items():
                may_lose_nan = name == "fused" and operation.fused is Epilogue.RELU_BIAS
                for algorithm in made.algorithms(_ALGORITHMS, self._workspace, pointers):
                    run = way(name, *algorithm)
                    if may_lose_nan and not _keeps_nan(xp, run, pointers, fresh(), b):
                        continue
                    launch = functools.partial(launched, run)
                    yield Candidate(name, launch, *algorithm)
            yield Candidate("cupy", lambda: operation.finish(xp, xp.matmul(x, w, out=fresh()), b))

        if config.deterministic:
            return first()
        if self._times is None:
            self._times = gemm_choice.Times(self._facts)
        text = _key_text(operation, problem, dtype, tf32, pointers)
        times = self._times.get(text)
        if times is not None and not self._usable(times, prepared):
            self._times.drop(text, "cuBLASLt does not know an algorithm in it")
            times = None
        if times is None:
            try:
                times = gemm_choice.measure(candidates(), timer(xp))
            except MemoryError:  # there is none to try things out in
                return first()
            self._times.put(text, times)
        return _Plan(
            shape,
            *(_fastest(times, way, allowed) for allowed in ({*prepared, "cupy"}, {*prepared})),
        )

    def _prepare(
        self, problem: gemm_plan.Problem, kind: gemm_plan.Type, epilogue: Epilogue
    ) -> _Prepared:
        return _Prepared(self._library, self._handle, problem, kind, epilogue)

    def _usable(self, times: dict[str, Timed], prepared: dict[str, _Prepared]) -> bool:
        """Tell whether the algorithms that a file names are algorithms here."""
        for name, timed in times.items():
            if name in prepared:
                needed = self._library.accepts(prepared[name].parts, timed.algorithm)
                if needed is None or not needed <= timed.workspace <= self._workspace:
                    return False
        return times.keys() <= {*prepared, "cupy"}


timer = gemm_choice.DeviceTimer


def _fastest(
    times: dict[str, Timed], way: Callable[[str, bytes, int], _Way], allowed: set[str]
) -> _Way | None:
    """Return the fastest of the allowed ways; None where it is CuPy's, or there is none."""
    named = [(times[name].seconds, name == "cupy", name) for name in allowed & times.keys()]
    if not named:
        return None
    name = min(named)[2]
    return None if name == "cupy" else way(name, *times[name][1:])


def _keeps_nan(xp: Module, way: _Way, pointers: list[int], y: Array, b: Any) -> bool:
    """Tell whether an algorithm's ReLU keeps NaN: most turn it into 0."""
    nan = xp.asarray(np.full(b.shape, np.nan, b.dtype))
    try:
        way(xp, [*pointers[:2], nan.data.ptr], y, nan)
    except cublaslt.CublasLtError:
        return False
    return bool(xp.isnan(y.astype(np.float32)).all())


def _key_text(
    operation: Operation, problem: gemm_plan.Problem, dtype: str, tf32: bool, pointers: list[int]
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
    kind = "tf32" if tf32 else dtype
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
                    found = _Device(xp, library, number), ""
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
