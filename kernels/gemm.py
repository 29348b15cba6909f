"""Launchers of matrix products through cuBLASLt, with what follows them fused where that is faster.

Unlike CuPy's own products they can be captured into a CUDA graph, once they have run outside one.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from tapegrad.config import config

from . import cublaslt, gemm_choice, gemm_plan, small_gemm
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
    arrays = (x, w) if b is None else (x, w, b)
    device = _device_of(xp, arrays)
    if device is None:
        return None
    dtype = x.dtype
    pointers = [array.data.ptr for array in arrays]
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
    return way(xp, x, w, pointers, result(xp, plan.shape, dtype, out), b)


def _device_of(xp: Module, arrays: Sequence[Array]) -> _Device | None:
    """Return the device whose cuBLASLt may take arrays; None unless they are there, of one type."""
    if xp is np:
        return None
    library, _ = cublaslt.load()
    device = None if library is None else _device(xp, library)
    if device is None or any(array.dtype != arrays[0].dtype for array in arrays):
        return None
    if any(array.data.device_id != device.number for array in arrays):
        return None
    return device


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
        self._beside = cublaslt.BESIDE[epilogue]
        # The bias's address is kept in the descriptor until the launch has read it.
        self._lock = threading.Lock()
        attributes: dict[DescriptorAttribute, Any] = {
            DescriptorAttribute.TRANSPOSE_A: ctypes.c_int32(problem.transpose_a),
            DescriptorAttribute.TRANSPOSE_B: ctypes.c_int32(problem.transpose_b),
            DescriptorAttribute.EPILOGUE: ctypes.c_uint32(epilogue),
        }
        if DescriptorAttribute.AUX_POINTER in self._beside:
            _, row = gemm_plan.mask_shape(problem.d.columns, problem.d.rows)
            attributes[DescriptorAttribute.AUX_LEADING] = ctypes.c_int64(8 * row)
        descriptor = library.descriptor(kind.compute, kind.scale, attributes)
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
            self._point(pointers)  # algorithms must keep to the alignment of these too
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
        if not self._beside:
            self._library.matmul(*arguments)
            return
        with self._lock:
            self._point(pointers)
            self._library.matmul(*arguments)

    def _point(self, pointers: list[int]) -> None:
        # A bias that our own kernel adds is none of cuBLASLt's.
        for attribute, pointer in zip(self._beside, pointers[2:], strict=False):
            self._library.set_pointer(self.parts[1], attribute, pointer)


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

    def __call__(
        self, xp: Module, x: Array, w: Array, pointers: list[int], y: Array, b: Array | None
    ) -> Array:
        self._prepared.launch(xp, self._algorithm, self._workspace, pointers, y.data.ptr)
        return y if self._finish is None else self._finish(xp, y, b)


class _SmallWay(NamedTuple):
    """A kernel of our own, with all that follows inside."""

    variant: small_gemm.Variant
    relu: bool

    def __call__(
        self, xp: Module, x: Array, w: Array, pointers: list[int], y: Array, b: Array | None
    ) -> Array:
        return small_gemm.product(xp, self.variant, x, w, y, bias=b, relu=self.relu)


class _Plan(NamedTuple):
    """How a product runs. None: as CuPy does it, which cannot be captured."""

    shape: tuple[int, ...]
    fastest: _Way | _SmallWay | None
    capturable: _Way | _SmallWay | None


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
        kind_name, kind = _kind(x.dtype.name)
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
        # In float32 where TF32 is allowed, too: nobody minds a product that is more exact.
        relu = operation.fused is Epilogue.RELU_BIAS
        self._small = {
            variant.name: _SmallWay(variant, relu)
            for variant in small_gemm.variants(x, w, device.multiprocessors)
        }
        self.text = _key_text(operation.name, problem, kind_name, self._pointers)

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
        capturable = {*self._prepared, *self._small}
        for allowed in ({*capturable, "cupy"}, capturable):
            # CuPy's own only where it is really faster: it costs more of Python's time.
            ranked = [(times[name].seconds, name == "cupy", name) for name in allowed & {*times}]
            name = min(ranked)[2] if ranked else "cupy"
            way: _Way | _SmallWay | None = self._small.get(name)
            if way is None and name != "cupy":
                way = self._way(name, *times[name][1:])
            chosen.append(way)
        return _Plan(self._shape, *chosen)

    def usable(self, times: dict[str, Timed]) -> bool:
        """Tell whether times are of these ways, and their algorithms such as can run here."""
        return times.keys() <= {*self._prepared, *self._small, "cupy"} and all(
            self._device.can_run(self._prepared[name], timed)
            for name, timed in times.items()
            if name in self._prepared
        )

    def candidates(self) -> Iterator[Candidate]:
        """Yield what is to be timed. Each launch makes a result of its own."""
        for name in self._prepared:
            for algorithm in self._algorithms(name, _ALGORITHMS):
                way = self._way(name, *algorithm)
                if not self._may_lose_nan(name) or self._keeps_nan(way):
                    yield Candidate(name, functools.partial(self._run, way), *algorithm)
        for name, small in self._small.items():
            yield Candidate(name, functools.partial(self._run, small))
        # CuPy 14 refuses stacks of bfloat16 (its issue 10317).
        if len(self._shape) == 2 or self._arrays[0].dtype.name != "bfloat16":
            yield Candidate("cupy", self._run_cupy)

    def _algorithms(self, name: str, count: int) -> list[tuple[bytes, int]]:
        workspace = self._device.workspace
        return self._prepared[name].algorithms(count, workspace, self._pointers)

    def _way(self, name: str, algorithm: bytes, workspace: int) -> _Way:
        finish = self._operation.finish if name == "plain" else None
        return _Way(self._prepared[name], algorithm, workspace, finish)

    def _fresh(self) -> Array:
        return self._xp.empty(self._shape, self._arrays[0].dtype)

    def _run(self, way: _Way | _SmallWay) -> Array:
        x, w, b = self._arrays
        return way(self._xp, x, w, self._pointers, self._fresh(), b)

    def _run_cupy(self) -> Array:
        x, w, b = self._arrays
        y = self._xp.matmul(x, w, out=self._fresh())
        return self._operation.finish(self._xp, y, b)

    def _may_lose_nan(self, name: str) -> bool:
        return name == "fused" and self._operation.fused is Epilogue.RELU_BIAS

    def _keeps_nan(self, way: _Way) -> bool:
        """Tell whether an algorithm's ReLU keeps NaN: most turn it into 0."""
        x, w, b = self._arrays
        nan = self._xp.asarray(np.full(b.shape, np.nan, b.dtype))
        try:
            y = way(self._xp, x, w, [*self._pointers[:2], nan.data.ptr], self._fresh(), nan)
        except cublaslt.CublasLtError:
            return False
        return bool(self._xp.isnan(y.astype(np.float32)).all())


class Contest(Protocol):
    """Ways that a product may take; `text` is its name in the file of times."""

    text: str

    def usable(self, times: dict[str, Timed]) -> bool:
        """Tell whether times are of these ways, and their algorithms such as can run here."""

    def candidates(self) -> Iterator[Candidate]:
        """Yield what is to be timed."""


class _Device:
    """What this process knows of cuBLASLt on one device."""

    def __init__(self, library: cublaslt.Library, number: int, xp: Module) -> None:
        self.library = library
        self.number = number
        self.handle = library.handle()
        self.plans: dict[Any, _Plan] = {}
        self._decisions: dict[Any, Any] = {}
        self._lock = threading.RLock()  # deciding on a product may have others planned
        properties = xp.cuda.runtime.getDeviceProperties(number)
        before = properties["major"] < _HOPPER
        self.workspace = _WORKSPACE_BEFORE_HOPPER if before else _WORKSPACE
        self.multiprocessors = properties["multiProcessorCount"]
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

    def can_run(self, prepared: _Prepared, timed: Timed) -> bool:
        """Tell whether the library takes an algorithm for a problem, in the memory it had then."""
        needed = self.library.accepts(prepared.parts, timed.algorithm)
        return needed is not None and needed <= timed.workspace <= self.workspace

    def _fastest(self, chooser: _Chooser, xp: Module) -> _Plan:
        times = self.times_of(chooser, xp)
        return chooser.untimed() if times is None else chooser.timed(times)

    def decision(self, xp: Module, key: Any, decide: Callable[[], Any]) -> Any:
        """Return what `decide` has returned for a key once; None if that would be in a capture."""
        with self._lock:
            if key not in self._decisions:
                if _is_capturing(xp):
                    return None
                if len(self._decisions) >= _MAX_PLANS:
                    self._decisions.clear()
                self._decisions[key] = decide()
            return self._decisions[key]

    def times_of(self, contest: Contest, xp: Module) -> dict[str, Timed] | None:
        """Return the times of ways, from the file or taken now; None without memory to do so."""
        if self._times is None:
            self._times = gemm_choice.Times(self._facts)
        times = self._times.get(contest.text)
        if times is not None and not contest.usable(times):
            self._times.drop(contest.text, "cuBLASLt does not know an algorithm in it")
            times = None
        if times is None:
            try:
                with gemm_choice.scratch_memory(xp):
                    times = gemm_choice.measure(contest.candidates(), timer(xp))
            except MemoryError:  # there is none to try things out in
                return None
            self._times.put(contest.text, times)
        return times


timer = gemm_choice.DeviceTimer


def _kind(dtype: str) -> tuple[str, gemm_plan.Type]:
    """Return how a dtype is computed with, by name and for cuBLASLt."""
    if config.tf32 and dtype == "float32":
        return "tf32", gemm_plan.TF32
    return dtype, gemm_plan.TYPES[dtype]


def _key_text(name: str, problem: gemm_plan.Problem, kind: str, pointers: list[int]) -> str:
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
    return f"{name} {kind} {' '.join(matrices)} batch {problem.batch} aligned {aligned}"


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
