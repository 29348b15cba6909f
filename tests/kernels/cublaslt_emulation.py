"""cuBLASLt's products emulated on the CPU: column-major matrices in raw memory, in float64.

`FakeCublasLt` has the C functions that the launchers call, as C function pointers with the same
signatures, and refuses what the real library would refuse.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from tapegrad import _backend
from tapegrad.kernels import cublaslt, gemm, small_gemm
from tests.fake_cupy import FakeArray, device

DTYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}
SUCCESS, FAILED, UNSUPPORTED = 0, 13, 15


def fake(array: np.ndarray[Any, Any]) -> Any:
    """Copy an array to the stand-in for CuPy with its layout: strides, gaps, misalignment."""
    array = np.asarray(array)
    low, high = _backend.byte_bounds(array)
    lead = low % 16
    memory = device.empty(lead + high - low, np.uint8)
    plain = np.ndarray.view(memory, np.ndarray)
    plain[lead:] = np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8)
    first = array.__array_interface__["data"][0] - low
    view = np.ndarray(array.shape, array.dtype, plain, lead + first, array.strides)
    return view.view(FakeArray)


class Matrix(NamedTuple):
    """Column-major matrices at an address."""

    address: int
    dtype: Any
    rows: int
    columns: int
    leading: int
    batch: int = 1
    stride: int = 0

    def _strides(self) -> tuple[int, ...]:
        size = np.dtype(self.dtype).itemsize
        return self.stride * size, size, self.leading * size

    def on_device(self) -> FakeArray:
        """Return its elements as an array of the stand-in; they must lie within its memory."""
        shape = self.batch, self.rows, self.columns
        return device.array_at(self.address, shape, self.dtype, self._strides())

    def view(self) -> np.ndarray[Any, Any]:
        """Return its elements, (batch, rows, columns), where they lie."""
        size = np.dtype(self.dtype).itemsize
        last = (self.columns - 1) * self.leading + self.rows + (self.batch - 1) * self.stride
        memory = (ctypes.c_char * (last * size)).from_address(self.address)
        shape = self.batch, self.rows, self.columns
        return np.ndarray(shape, self.dtype, memory, 0, self._strides())


def on_threads(work: Callable[[int], None]) -> None:
    """Run `work(number)` on four threads at once, and wait for them."""
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rounded_to_tf32(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return float32 numbers with 10 bits of mantissa, the rest cut off."""
    bits = x.astype("f4").view("u4") & np.uint32(0xFFFFE000)
    return bits.view("f4")


def multiply(
    a: Matrix,
    transpose_a: bool,
    b: Matrix,
    transpose_b: bool,
    d: Matrix,
    *,
    tf32: bool = False,
    finish: Callable[[Any, Any], Any] = lambda left, y: y,
    scales: Callable[[], tuple[float, float]] = lambda: (1.0, 0.0),
) -> None:
    """Do d = finish(op(a), op(a) op(b)) as the documentation of cublasLtMatmul defines it."""
    left, right = a.view(), b.view()
    if tf32:
        left, right = rounded_to_tf32(left), rounded_to_tf32(right)
    left = left.swapaxes(1, 2) if transpose_a else left
    right = right.swapaxes(1, 2) if transpose_b else right
    assert left.shape[2] == right.shape[1], "op(A) and op(B) do not fit"
    assert (left.shape[1], right.shape[2]) == (d.rows, d.columns), "D does not fit"
    alpha, beta = scales()
    y = alpha * (left.astype("f8") @ right.astype("f8"))
    if beta:  # else D may hold NaN
        y = y + beta * d.view().astype("f8")
    d.view()[...] = finish(left.astype("f8"), y).astype(d.dtype)


def mask_bits(address: int, leading: int, d: Matrix) -> np.ndarray[Any, Any]:
    """Return the bytes of a mask: one bit for each element of a column, from the lowest on."""
    memory = (ctypes.c_char * (d.columns * leading // 8)).from_address(address)
    return np.ndarray((d.columns, leading // 8), np.uint8, memory)


def write_mask(bits: np.ndarray[Any, Any], passes: np.ndarray[Any, Any]) -> None:
    """Write which elements (rows, columns) a ReLU lets pass; the padding stays as it is."""
    padded = np.unpackbits(bits, axis=1, bitorder="little")
    padded[:, : len(passes)] = passes.T
    bits[...] = np.packbits(padded, axis=1, bitorder="little")


def read_mask(bits: np.ndarray[Any, Any], rows: int) -> np.ndarray[Any, Any]:
    """Return which elements (rows, columns) a mask lets pass."""
    return np.unpackbits(bits, axis=1, bitorder="little")[:, :rows].T.astype(bool)


class FakeCublasLt:
    """The C functions of cuBLASLt; what they were asked is kept.

    found       how many algorithms there are; `algorithms` says it for one epilogue's number. A
                status of failure is written with a minus.
    keeps_nan   whether the RELU epilogue keeps NaN; the real one is said not to.
    marks_nan   whether the mask of a RELU_AUX epilogue lets NaN pass; marks_zero: or 0.
    multiplies  whether the DRELU epilogue multiplies by the mask, so that NaN stays.
    sums_in_type  whether the gradient of a bias is accumulated in its own type.
    failing     pairs (epilogue, algorithm) whose launch fails.
    unusable    algorithms that the heuristic and the check answer with a state of failure.
    """

    def __init__(self, *, found: int = 3, keeps_nan: bool = False, version: int = 131000) -> None:
        self.found, self.keeps_nan = found, keeps_nan
        self.marks_nan = self.marks_zero = self.multiplies = self.sums_in_type = False
        self.algorithms: dict[int, int] = {}
        self.failing: set[tuple[int, int]] = set()
        self.unusable: set[int] = set()
        self.known: set[bytes] | None = None  # that cublasLtMatmulAlgoCheck knows; None: all
        self.launches: list[types.SimpleNamespace] = []
        self.preferences: list[dict[int, int]] = []
        self.pause = 0.0
        self.no_handle = self.capturing = False
        self.timer: FakeTimer
        self.objects: dict[int, Any] = {}
        self._numbers = itertools.count(0x1000, 16)
        # Kept here, for ctypes does not keep callbacks alive.
        self.cublasLtGetVersion = ctypes.CFUNCTYPE(ctypes.c_size_t)(lambda: version)
        for name, arguments in cublaslt.SIGNATURES.items():
            kind = name.removeprefix("cublasLt")
            for ending in ("Create", "Destroy", "SetAttribute"):
                if kind.endswith(ending) and kind != ending:
                    method = getattr(self, f"_{ending}")
                    break
            else:
                method = getattr(self, f"_{kind}")
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(method))

    def _enter(self, where: Any, made: Any) -> int:
        number = next(self._numbers)
        self.objects[number] = made
        where[0] = number
        return SUCCESS

    def _Create(self, where: Any, *arguments: int) -> int:
        if not arguments and self.no_handle:
            return 1
        return self._enter(where, types.SimpleNamespace(arguments=arguments, attributes={}))

    def _Destroy(self, number: int) -> int:
        del self.objects[number]
        return SUCCESS

    def _SetAttribute(self, number: int, attribute: int, value: int, size: int) -> int:
        self.objects[number].attributes[attribute] = int.from_bytes(
            ctypes.string_at(value, size), "little"
        )
        if attribute in (8, 11):  # the bias, or the mask, of a descriptor: let another thread in
            time.sleep(self.pause)
        return SUCCESS

    def _epilogue(self, descriptor: int) -> int:
        return int(self.objects[descriptor].attributes[7])

    def _MatmulAlgoGetHeuristic(
        self, handle: int, desc: int, a: int, b: int, c: int, d: int, pref: int,
        count: int, results: Any, found: Any,
    ) -> int:  # fmt: skip
        assert handle in self.objects
        epilogue = self._epilogue(desc)
        preference = self.objects[pref].attributes
        self.preferences.append(preference)
        attributes = self.objects[desc].attributes
        if epilogue != 1:
            assert attributes[8], "the bias's address says how it is aligned"
        if epilogue & 128:
            assert attributes[11], "the mask's address says how it is aligned"
        number = self.algorithms.get(epilogue, self.found)
        if number <= 0:
            return -number or UNSUPPORTED
        found[0] = min(count, number)
        for i in range(found[0]):
            results[i].algorithm[:] = bytes([epilogue & 255, i, epilogue >> 8] + [0] * 61)
            results[i].workspace = min(i * 1024, preference[1])
            results[i].state = UNSUPPORTED if i in self.unusable else SUCCESS
        return SUCCESS

    def _MatmulAlgoCheck(
        self, handle: int, desc: int, a: int, b: int, c: int, d: int, algorithm: int, result: Any
    ) -> int:
        blob = ctypes.string_at(algorithm, 64)
        if self.known is not None and blob not in self.known:
            return UNSUPPORTED
        result[0].workspace = blob[1] * 1024
        result[0].state = UNSUPPORTED if blob[1] in self.unusable else SUCCESS
        return SUCCESS

    def _matrix(self, address: int, layout: int) -> Matrix:
        data, rows, columns, leading = self.objects[layout].arguments
        attributes = self.objects[layout].attributes
        assert leading >= rows, "columns overlap"
        assert address % np.dtype(DTYPES[data]).itemsize == 0
        return Matrix(
            *(address, DTYPES[data], rows, columns, leading),
            *(attributes.get(5, 1), attributes.get(6, 0)),
        )

    def _Matmul(
        self, handle: int, desc: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int,
        beta: int, c: int, c_layout: int, d: int, d_layout: int, algorithm: int, workspace: int,
        size: int, stream: int,
    ) -> int:  # fmt: skip
        compute, scale = self.objects[desc].arguments
        attributes = self.objects[desc].attributes
        number = {0: ctypes.c_float, 1: ctypes.c_double}[scale]
        on_device = attributes.get(2, 0) == 1
        scales = lambda: (number.from_address(alpha).value, number.from_address(beta).value)
        assert on_device or scales() == (1.0, 0.0)
        assert (c, c_layout) == (d, d_layout)
        low, index, high = ctypes.string_at(algorithm, 3)
        epilogue = low | high << 8
        assert epilogue == attributes[7], "an algorithm of another epilogue"
        needed = index * 1024
        assert size >= needed
        if needed:
            ctypes.memset(workspace, 0xFF, size)  # it may hold anything afterwards
        if (epilogue, index) in self.failing:
            return FAILED
        matrices = [self._matrix(*m) for m in ((a, a_layout), (b, b_layout), (d, d_layout))]
        self.launches.append(
            types.SimpleNamespace(
                epilogue=epilogue, algorithm=index, compute=compute, scale=scale, stream=stream,
                scratch=bool(device.allocators),
                a=matrices[0], b=matrices[1], d=matrices[2], workspace=size,
                transposed=(attributes[3], attributes[4]),
            )
        )  # fmt: skip
        bias = attributes.get(8) if epilogue != 1 else None
        mask = attributes[11] if epilogue & 128 else None
        with np.errstate(all="ignore"):
            launch = functools.partial(
                multiply,
                *(matrices[0], bool(attributes[3]), matrices[1], bool(attributes[4]), matrices[2]),
                tf32=compute == 77,
                scales=scales,
                finish=self._finish(epilogue, matrices[2], bias, mask, attributes.get(12)),
            )
            touched = [m.on_device() for m in matrices]
            if bias is not None:
                touched.append(Matrix(bias, matrices[2].dtype, matrices[2].rows, 1, 1).on_device())
            if mask is not None:
                row = attributes[12] // 8
                touched.append(Matrix(mask, np.uint8, row, matrices[2].columns, row).on_device())
            if on_device:
                kind = np.dtype(number)
                touched += [Matrix(a, kind, 1, 1, 1).on_device() for a in (alpha, beta)]
            if size:
                touched.append(Matrix(workspace, np.uint8, size, 1, size).on_device())
            device.kernel("cublasLtMatmul", lambda views: launch(), touched)
        return SUCCESS

    def _finish(
        self, epilogue: int, d: Matrix, bias: int | None, mask: int | None, leading: int | None
    ) -> Callable[[Any, Any], Any]:
        """Return what an epilogue does to a product, from op(A) and the product."""
        relu = np.maximum if self.keeps_nan else np.fmax
        beside = bits = np.empty(0)
        if bias is not None:  # one value for each row of D
            beside = Matrix(bias, d.dtype, d.rows, 1, d.rows).view()
        if mask is not None:
            assert leading is not None
            assert leading % 128 == 0
            assert leading >= d.rows
            assert mask % 16 == 0
            assert d.batch == 1
            bits = mask_bits(mask, leading, d)
        if epilogue & (16 | 256):
            assert d.rows > 1, "refused by real ones"
            assert d.columns > 1, "refused by real ones"

        def finish(left: Any, y: Any) -> Any:
            if epilogue & 4:
                y = y + beside.astype("f8")
            if epilogue & 2:
                if mask is not None:
                    passes = y[0] > 0
                    passes |= self.marks_nan & np.isnan(y[0]) | self.marks_zero & (y[0] == 0)
                    write_mask(bits, passes)
                y = relu(y, 0)
            if epilogue & 8:
                passes = read_mask(bits, d.rows)
                y = y * passes if self.multiplies else np.where(passes, y, 0)
            if epilogue & (16 | 256):
                terms = y if epilogue & 16 else left
                if self.sums_in_type:
                    terms = np.add.accumulate(terms.astype(d.dtype), 2)[..., -1:]
                beside[...] = terms.sum(2, keepdims=True)
            return y

        return finish


class FakeTimer:
    """Gives each way the time that a test says, whatever runs."""

    def __init__(self, fake: FakeCublasLt, seconds: Callable[[int, int], float]) -> None:
        self.fake, self.seconds = fake, seconds
        self.timed: list[tuple[int, int]] = []
        self.results: list[Any] = []

    def __call__(self, run: Callable[[], object]) -> float:
        assert device.allocators, "what is only tried out stays in the user's memory"
        before = len(self.fake.launches)
        self.results.append(run())
        launched = self.fake.launches[before:]
        key = (launched[-1].epilogue, launched[-1].algorithm) if launched else (0, 0)
        self.timed.append(key)
        return self.seconds(*key)


@contextmanager
def cublaslt_on_cpu(
    xp: Any,
    folder: Path,
    fake: FakeCublasLt | None = None,
    *,
    seconds: Callable[[int, int], float] = lambda epilogue, algorithm: 1.0 - epilogue / 1000,
    major: int = 9,
    small: bool = False,
) -> Iterator[FakeCublasLt]:
    """Let products on `xp`, a stand-in for CuPy, go through a fake cuBLASLt; yield the fake.

    folder   where times are kept.
    seconds  the time that a launch of (epilogue, algorithm) takes; (0, 0) is CuPy's own product,
             (-side, parts) our own kernel for small matrices, (-1000 - side, parts) where it sums
             columns too.
    small    whether there are such kernels; they need `kernels_on_cpu`.
    """
    fake = fake or FakeCublasLt()
    library = cublaslt.Library(fake)
    fake.timer = FakeTimer(fake, seconds)
    runtime = xp.cuda.runtime
    runtime.getDevice = lambda: 0
    properties = {"name": b"NVIDIA Fake", "major": major, "multiProcessorCount": 132}
    runtime.getDeviceProperties = lambda number: properties
    runtime.driverGetVersion = lambda: 13000
    captures = runtime.streamIsCapturing
    runtime.streamIsCapturing = lambda stream: fake.capturing or captures(stream)
    small_product = small_gemm.product

    def noted(xp: Any, variant: small_gemm.Variant, *arrays: Any, **after: Any) -> Any:
        y = small_product(xp, variant, *arrays, **after)
        side = variant.side if after.get("sums") is None else variant.side + 1000
        key = {"epilogue": -side, "algorithm": variant.parts}
        fake.launches.append(types.SimpleNamespace(**key, scratch=bool(device.allocators)))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_gemm, "product", noted)
        if not small:
            patch.setattr(small_gemm, "variants", lambda x, w, multiprocessors: [])
        patch.setitem(sys.modules, "cupy", xp)
        patch.setenv("TAPEGRAD_CACHE", str(folder))
        patch.setattr(cublaslt, "load", lambda: (library, ""))
        patch.setattr(gemm, "_devices", {})
        patch.setattr(gemm, "timer", lambda xp: fake.timer)
        for name in ("_cupy", "cupy_ndarray", "numpy_alone", "_auto"):
            patch.setattr(_backend, name, getattr(_backend, name))  # put back afterwards
        _backend._load(xp)
        yield fake
