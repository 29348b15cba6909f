"""cuBLASLt through ctypes: the library, found where CuPy finds its own, and the calls of a GEMM.

CuPy's own cuBLAS calls refuse to run while a stream is captured, and know no epilogues. These take
the stream with each call.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import weakref
from ctypes import c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

_NAMES = ("libcublasLt.so.13", "libcublasLt.so.12", "cublasLt64_13.dll", "cublasLt64_12.dll")
ALGORITHM_BYTES = 64


class DataType(enum.IntEnum):
    """cudaDataType_t."""

    FLOAT32 = 0
    FLOAT64 = 1
    FLOAT16 = 2
    BFLOAT16 = 14


class Compute(enum.IntEnum):
    """cublasComputeType_t: in what a product is accumulated."""

    FLOAT32 = 68
    FLOAT64 = 70
    TF32 = 77


class Epilogue(enum.IntEnum):
    """cublasLtEpilogue_t: what is done to the product before it is stored.

    RELU_AUX_BIAS  writes a mask too, whose bits say where the ReLU let a value pass.
    DRELU_BGRAD    lets pass where such a mask says so, and sums each row of D.
    BGRADA         sums each row of op(A).
    """

    DEFAULT = 1
    BIAS = 4
    RELU_BIAS = 6
    RELU_AUX_BIAS = 134
    DRELU_BGRAD = 152
    BGRADA = 256


class DescriptorAttribute(enum.IntEnum):
    """cublasLtMatmulDescAttributes_t."""

    POINTER_MODE = 2
    TRANSPOSE_A = 3
    TRANSPOSE_B = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    AUX_POINTER = 11
    AUX_LEADING = 12


# What an epilogue reads or writes beside the matrices, by address: a bias or its gradient, a mask.
BESIDE: dict[Epilogue, tuple[DescriptorAttribute, ...]] = {
    Epilogue.DEFAULT: (),
    Epilogue.BIAS: (DescriptorAttribute.BIAS_POINTER,),
    Epilogue.RELU_BIAS: (DescriptorAttribute.BIAS_POINTER,),
    Epilogue.RELU_AUX_BIAS: (DescriptorAttribute.BIAS_POINTER, DescriptorAttribute.AUX_POINTER),
    Epilogue.DRELU_BGRAD: (DescriptorAttribute.BIAS_POINTER, DescriptorAttribute.AUX_POINTER),
    Epilogue.BGRADA: (DescriptorAttribute.BIAS_POINTER,),
}


class LayoutAttribute(enum.IntEnum):
    """cublasLtMatrixLayoutAttribute_t."""

    BATCH_COUNT = 5
    BATCH_STRIDE = 6


class PreferenceAttribute(enum.IntEnum):
    """cublasLtMatmulPreferenceAttributes_t."""

    MAX_WORKSPACE = 1
    REDUCTION_SCHEMES = 3
    ALIGNMENT_A = 5
    ALIGNMENT_B = 6
    ALIGNMENT_C = 7
    ALIGNMENT_D = 8


_ON_DEVICE = 1  # cublasLtPointerMode_t: where alpha and beta are read

_STATUS = {
    1: "not initialized",
    3: "allocation failed",
    7: "invalid value",
    8: "not supported by this architecture",
    11: "mapping error",
    13: "execution failed",
    14: "internal error",
    15: "not supported",
    16: "license error",
}


# What is answered for a problem that the library or the device has no algorithm for.
_NONE_FOR_IT = (7, 8, 15)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_ubyte * ALGORITHM_BYTES),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


_MADE = ctypes.POINTER(c_void_p)
_SET = (c_void_p, c_int, c_void_p, c_size_t)
_PROBLEM = (c_void_p,) * 6  # handle, descriptor, layouts of A, B, C and D

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_MADE,),
    "cublasLtDestroy": (c_void_p,),
    "cublasLtMatmulDescCreate": (_MADE, c_int, c_int),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatmulDescSetAttribute": _SET,
    "cublasLtMatrixLayoutCreate": (_MADE, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatrixLayoutSetAttribute": _SET,
    "cublasLtMatmulPreferenceCreate": (_MADE,),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": _SET,
    "cublasLtMatmulAlgoGetHeuristic": (
        *(*_PROBLEM, c_void_p, c_int, ctypes.POINTER(HeuristicResult), ctypes.POINTER(c_int)),
    ),
    "cublasLtMatmulAlgoCheck": (*_PROBLEM, c_void_p, ctypes.POINTER(HeuristicResult)),
    "cublasLtMatmul": (
        *(c_void_p, c_void_p),  # handle, descriptor
        *(c_void_p, c_void_p, c_void_p),  # alpha, A and its layout
        *(c_void_p, c_void_p),  # B and its layout
        *(c_void_p, c_void_p, c_void_p),  # beta, C and its layout
        *(c_void_p, c_void_p),  # D and its layout
        *(c_void_p, c_void_p, c_size_t, c_void_p),  # algorithm, workspace, its bytes, stream
    ),
}


class CublasLtError(RuntimeError):
    """A call of cuBLASLt was refused."""


class Owned:
    """An object of cuBLASLt's, destroyed when Python lets go of it."""

    __slots__ = ("__weakref__", "pointer")

    def __init__(self, pointer: c_void_p, destroy: Any) -> None:
        self.pointer = pointer
        weakref.finalize(self, destroy, pointer).atexit = False


class Library:
    """The functions of one loaded cuBLASLt. They raise `CublasLtError` for any status but 0."""

    def __init__(self, functions: Any) -> None:
        """Bind the C functions, which are attributes of `functions`."""
        self._functions = functions
        functions.cublasLtGetVersion.restype = c_size_t
        self.version: int = functions.cublasLtGetVersion()
        for name, arguments in SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes = arguments
            function.restype = c_int
        self._matmul = functions.cublasLtMatmul
        self._set_in_descriptor = functions.cublasLtMatmulDescSetAttribute

    @property
    def version_text(self) -> str:
        """The version as people write it: 13.10.0."""
        return f"{self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"

    def _call(self, name: str, *arguments: Any) -> None:
        _check(name, getattr(self._functions, name)(*arguments))

    def _make(self, kind: str, *arguments: Any) -> Owned:
        pointer = c_void_p()
        self._call(f"cublasLt{kind}Create", ctypes.byref(pointer), *arguments)
        return Owned(pointer, getattr(self._functions, f"cublasLt{kind}Destroy"))

    def handle(self) -> Owned:
        """Return a handle for the current device, which threads may share."""
        return self._make("")

    def descriptor(
        self, compute: Compute, scale: DataType, attributes: dict[DescriptorAttribute, Any]
    ) -> Owned:
        """Return what is to be done to matrices; the attributes as ctypes values."""
        made = self._make("MatmulDesc", compute, scale)
        for attribute, value in attributes.items():
            self._set("MatmulDesc", made, attribute, value)
        return made

    def layout(
        self, data: DataType, rows: int, columns: int, leading: int, batch: int, stride: int
    ) -> Owned:
        """Return where the elements of a column-major matrix lie, or of `batch` of them."""
        made = self._make("MatrixLayout", data, rows, columns, leading)
        if batch > 1:
            self._set("MatrixLayout", made, LayoutAttribute.BATCH_COUNT, ctypes.c_int32(batch))
            self._set("MatrixLayout", made, LayoutAttribute.BATCH_STRIDE, c_int64(stride))
        return made

    def read_scales_on_device(self, descriptor: Owned) -> None:
        """Let alpha and beta be addresses of the device's memory, read when the product runs."""
        mode = ctypes.c_int32(_ON_DEVICE)
        self._set("MatmulDesc", descriptor, DescriptorAttribute.POINTER_MODE, mode)

    def preference(self, attributes: dict[PreferenceAttribute, Any]) -> Owned:
        """Return what the algorithms must keep to."""
        made = self._make("MatmulPreference")
        for attribute, value in attributes.items():
            self._set("MatmulPreference", made, attribute, value)
        return made

    def _set(self, kind: str, made: Owned, attribute: int, value: Any) -> None:
        size = ctypes.sizeof(value)
        name = f"cublasLt{kind}SetAttribute"
        self._call(name, made.pointer, attribute, ctypes.byref(value), size)

    def set_pointer(self, descriptor: Owned, attribute: DescriptorAttribute, pointer: int) -> None:
        """Say where a bias or a mask lies; the next call of `matmul` reads the address."""
        value = c_void_p(pointer)
        arguments = attribute, ctypes.byref(value), ctypes.sizeof(value)
        status = self._set_in_descriptor(descriptor.pointer, *arguments)
        if status:
            _check("cublasLtMatmulDescSetAttribute", status)

    def algorithms(
        self, problem: tuple[Owned, ...], preference: Owned, count: int
    ) -> list[tuple[bytes, int]]:
        """Return up to `count` algorithms, the one thought best first, and their workspace's bytes.

        problem  handle, descriptor, and the layouts of A, B, C and D.
        """
        results = (HeuristicResult * count)()
        found = c_int()
        name = "cublasLtMatmulAlgoGetHeuristic"
        pointers = [part.pointer for part in (*problem, preference)]
        status = getattr(self._functions, name)(*pointers, count, results, ctypes.byref(found))
        if status in _NONE_FOR_IT:
            return []
        _check(name, status)
        return [
            (bytes(result.algorithm), result.workspace)
            for result in results[: found.value]
            if result.state == 0
        ]

    def accepts(self, problem: tuple[Owned, ...], algorithm: bytes) -> int | None:
        """Return the bytes of workspace that an algorithm needs here; None: it cannot be used."""
        result = HeuristicResult()
        blob = ctypes.create_string_buffer(algorithm, ALGORITHM_BYTES)
        status = self._functions.cublasLtMatmulAlgoCheck(
            *[part.pointer for part in problem], ctypes.byref(blob), ctypes.byref(result)
        )
        return None if status or result.state else int(result.workspace)

    def matmul(self, *arguments: Any) -> None:
        """Launch a product; the arguments are those of the C function."""
        status = self._matmul(*arguments)
        if status:
            _check("cublasLtMatmul", status)


def _check(name: str, status: int) -> None:
    if status:
        reason = _STATUS.get(status, "an unknown error")
        raise CublasLtError(f"{name} failed with status {status}: {reason}")


@functools.cache
def load() -> tuple[Library | None, str]:
    """Return the library and an empty text, or None and why there is none; looked for once."""
    paths: tuple[str | None, ...] = _NAMES
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        paths = (load_nvidia_dynamic_lib("cublasLt").abs_path, *_NAMES)
    except (ImportError, RuntimeError):  # no such package, or it found none: ask the loader
        pass
    for path in filter(None, paths):
        try:
            return Library(ctypes.CDLL(path)), ""
        except (OSError, AttributeError):  # not there, or too old to have all functions
            continue
    return None, 'libcublasLt was not found (pip install "tapegrad[cuda13]" or [cuda12] brings it)'
