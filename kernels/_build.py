"""Where CUDA sources become kernels: built at first use, listed for tests and `tapegrad info`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# An array of NumPy or CuPy and such a module. CuPy has no types to import where it is missing.
Array = Any
Module = Any
Kernel = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]

OPTIONS = ("-std=c++17",)
THREADS = 256  # of a block, as the kernels' __launch_bounds__ say
WARP = 32
# Blocks of a grid-stride launch: enough for 8 on each of 132 multiprocessors, twice over.
MAX_BLOCKS = 2048
_H200_MULTIPROCESSORS = 132  # for launches on the CPU
MAX_COLUMNS = 2**30  # column numbers are 32 bits in the kernels
_MAX_GRID_Y = 65535  # the hardware's
_ROWS_OF_ONE_BLOCK = 256
_MAX_CHUNKS = 256
_MIN_ROWS_A_LANE = 8

_FOLDER = os.path.dirname(__file__)
_CPP_TYPES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    np.dtype(np.float16): "__half",
}
_BFLOAT16 = "__nv_bfloat16"
FLOATING = (*_CPP_TYPES.values(), _BFLOAT16)
ITEM_BYTES = {"float": 4, "double": 8, "__half": 2, _BFLOAT16: 2}

SOURCES: list[Source] = []
ELEMENTWISE: list[Elementwise] = []


def _cupy_raw_module(**arguments: Any) -> Any:
    import cupy

    return cupy.RawModule(**arguments)


# The one place where a source becomes machine code: tests put a builder for the CPU here.
raw_module: Callable[..., Any] = _cupy_raw_module


def _text(file: str) -> str:
    with open(os.path.join(_FOLDER, file), encoding="utf-8") as source:
        return source.read()


class Kernels:
    """Kernels of one text of CUDA C++, built at first use.

    `groups` are their C++ name expressions. A group is compiled as a whole, so it holds what one
    program uses together: the instances for one dtype.
    """

    def __init__(self, text: str, *groups: tuple[str, ...]) -> None:
        self.text = text
        self.groups = groups
        self._kernels: dict[tuple[Callable[..., Any], str], Kernel] = {}

    def code(self) -> str:
        """Return the text to compile, our own headers pasted in."""
        return re.sub(r'#include "(.+)"\n', lambda match: _text(match[1]), self.text)

    def kernel(self, name: str) -> Kernel:
        """Return a kernel, called as `kernel(grid, block, arguments)`.

        It is a `cupy.RawKernel`, which finds its handle for the current device at each call.
        """
        kernel = self._kernels.get((raw_module, name))
        if kernel is None:
            group = next(group for group in self.groups if name in group)
            module = raw_module(code=self.code(), options=OPTIONS, name_expressions=group)
            for member in group:
                self._kernels[raw_module, member] = module.get_function(member)
            kernel = self._kernels[raw_module, name]
        return kernel


class Source(Kernels):
    """The kernels of one `.cu` file beside this one."""

    def __init__(self, file: str, *groups: tuple[str, ...]) -> None:
        super().__init__("", *groups)
        self.file = file
        SOURCES.append(self)

    def code(self) -> str:
        """Return the text to compile, our own headers pasted in."""
        self.text = self.text or _text(self.file)
        return super().code()


class Elementwise:
    """A `cupy.ElementwiseKernel`, built at first use: broadcasts, takes any layout."""

    def __init__(self, inputs: str, output: str, operation: str, name: str) -> None:
        self.arguments = (inputs, output, operation, name)
        self.name = name
        self._kernel: Callable[..., Array] | None = None
        ELEMENTWISE.append(self)

    def __call__(self, *arrays: Array) -> Array:
        """Launch it and return the result."""
        if self._kernel is None:
            import cupy

            self._kernel = cupy.ElementwiseKernel(*self.arguments)
        return self._kernel(*arrays)


def kernel_names() -> dict[str, list[str]]:
    """Return every kernel by the file it is in: C++ name expressions, not yet built.

    >>> from tapegrad.kernels import kernel_names
    >>> kernel_names()["philox.cu"]
    ['tapegrad_philox']
    """
    names = {source.file: [n for group in source.groups for n in group] for source in SOURCES}
    return names | {"ElementwiseKernel": [kernel.name for kernel in ELEMENTWISE]}


def cpp_type(*arrays: Array) -> str | None:
    """Return the C++ type of the arrays' elements, or None unless all can go to a raw kernel:
    one floating dtype, in C order (a raw kernel ignores strides), not empty.
    """
    dtype = arrays[0].dtype
    for array in arrays:
        if array.dtype != dtype or not array.flags.c_contiguous or array.size == 0:
            return None
    name = _CPP_TYPES.get(dtype)
    # NumPy knows no bfloat16; ml_dtypes registers one by this name
    return _BFLOAT16 if name is None and dtype.name == "bfloat16" else name


def result(xp: Module, shape: tuple[int, ...], dtype: Any, out: Array | None = None) -> Array:
    """Return memory for a result: `out` where it is as new memory would be, else new memory."""
    if (
        out is not None
        and out.shape == shape
        and out.dtype == dtype
        and out.flags.c_contiguous
        and out.data.ptr % 16 == 0  # the widest load
    ):
        return out
    return xp.empty(shape, dtype)


def pack_width(xp: Module, type_name: str, length: int, *arrays: Array) -> int:
    """Return how many values a load may take: 16 bytes of them, or 1 where `length` or an address
    is no multiple of that.
    """
    width = 16 // ITEM_BYTES[type_name]
    if length % width:
        return 1
    for array in arrays:
        if (array.ctypes.data if xp is np else array.data.ptr) % 16:
            return 1
    return width


def grid(items: int, threads: int = THREADS) -> tuple[int]:
    """Return the grid of a grid-stride launch over `items` threads."""
    return (min(-(-items // threads), MAX_BLOCKS),)


_multiprocessors: dict[int, int] = {}  # of each device


def multiprocessors(xp: Module) -> int:
    """Return how many blocks run side by side on the current device at least."""
    if xp is np:
        return _H200_MULTIPROCESSORS
    number = xp.cuda.runtime.getDevice()
    if number not in _multiprocessors:
        properties = xp.cuda.runtime.getDeviceProperties(number)
        _multiprocessors[number] = properties["multiProcessorCount"]
    return _multiprocessors[number]


def column_tiles(columns: int) -> tuple[int, tuple[int, int]]:
    """Return how many tiles cover the columns, and the block for one, for kernels whose threads
    walk down columns: (lanes across, lanes down).

    A warp across at most: wider tiles waste more at the right edge and gain nothing. 8 at least:
    fewer would leave more lanes down to add up than there are rows to share.
    """
    across = min(max(8, 1 << (columns - 1).bit_length()), WARP)
    return -(-columns // across), (across, THREADS // across)


def row_chunks(rows: int, lanes_down: int) -> tuple[int, int]:
    """Return how many rows a block adds up, and how many blocks that makes for a tile of columns.

    So many rows go to one block a tile, saving the second launch (1.3 us in a graph) and its wait;
    beyond them the rows are cut, for at most so many partial sums.
    """
    chunk = rows
    if rows > _ROWS_OF_ONE_BLOCK:
        chunk = max(lanes_down * _MIN_ROWS_A_LANE, -(-rows // _MAX_CHUNKS))
    return chunk, -(-rows // chunk)


def row_blocks(rows: int, tiles: int, lanes_down: int) -> int:
    """Return how many blocks share the rows of each tile of columns in a grid-stride launch."""
    return min(-(-rows // lanes_down), max(1, MAX_BLOCKS // tiles), _MAX_GRID_Y)
