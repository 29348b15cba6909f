"""Chains of elementwise operations as one kernel, sums over the rows included: what it computes,
written as CUDA C++, and its launcher.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._build import (
    ITEM_BYTES,
    MAX_COLUMNS,
    THREADS,
    Array,
    Kernels,
    Module,
    column_tiles,
    cpp_type,
    pack_width,
    result,
    row_blocks,
    row_chunks,
)

# By the primitive's name: the kinds of the operands and of the result (f the chain's floating type,
# b bool), and the C++ expression. A is the type in which values are computed.
OPERATIONS: dict[str, tuple[str, str]] = {
    "add": ("fff", "{0} + {1}"),
    "subtract": ("fff", "{0} - {1}"),
    "multiply": ("fff", "product({0}, {1})"),
    "divide": ("fff", "{0} / {1}"),
    "negative": ("ff", "-{0}"),
    "positive": ("ff", "{0}"),
    "broadcast_to": ("ff", "{0}"),
    "square": ("ff", "product({0}, {0})"),
    "sqrt": ("ff", "sqrt({0})"),
    "rsqrt": ("ff", "A(1) / sqrt({0})"),
    "reciprocal": ("ff", "A(1) / {0}"),
    "power": ("fff", "pow({0}, {1})"),
    "exp": ("ff", "exp({0})"),
    "exp2": ("ff", "exp2({0})"),
    "expm1": ("ff", "expm1({0})"),
    "log": ("ff", "log({0})"),
    "log2": ("ff", "log2({0})"),
    "log10": ("ff", "log10({0})"),
    "log1p": ("ff", "log1p({0})"),
    "sin": ("ff", "sin({0})"),
    "cos": ("ff", "cos({0})"),
    "tan": ("ff", "tan({0})"),
    "atan": ("ff", "atan({0})"),
    "sinh": ("ff", "sinh({0})"),
    "cosh": ("ff", "cosh({0})"),
    "tanh": ("ff", "tanh({0})"),
    "erf": ("ff", "erf({0})"),
    "abs": ("ff", "fabs({0})"),
    "sign": ("ff", "{0} > A(0) ? A(1) : {0} < A(0) ? A(-1) : {0} == A(0) ? A(0) : {0}"),
    # a comparison with NaN is false: where one is NaN it is taken
    "maximum": ("fff", "{0} >= {1} || {0} != {0} ? {0} : {1}"),
    "minimum": ("fff", "{0} <= {1} || {0} != {0} ? {0} : {1}"),
    "clip_below": ("fff", "{0} >= {1} || {0} != {0} ? {0} : {1}"),
    "clip_above": ("fff", "{0} <= {1} || {0} != {0} ? {0} : {1}"),
    "larger_share": ("fff", "{0} > {1} ? A(1) : {0} == {1} ? A(0.5) : A(0)"),
    "relu": ("ff", "{0} < A(0) ? A(0) : {0}"),
    "relu_grad": ("fff", "{1} > A(0) ? {0} : A(0)"),
    "sigmoid": ("ff", "A(1) / (A(1) + exp(-{0}))"),
    "softplus": ("ff", "({0} < A(0) ? A(0) : {0}) + log1p(exp(-fabs({0})))"),
    "scale": ("fff", "{0} == A(0) ? A(0) : product({0}, {1})"),
    "scale_both": ("fff", "{0} == A(0) || {1} == A(0) ? A(0) : product({0}, {1})"),
    "where": ("bfff", "{0} ? {1} : {2}"),
    "greater": ("ffb", "{0} > {1}"),
    "greater_equal": ("ffb", "{0} >= {1}"),
    "less": ("ffb", "{0} < {1}"),
    "less_equal": ("ffb", "{0} <= {1}"),
    "equal": ("ffb", "{0} == {1}"),
    "not_equal": ("ffb", "{0} != {1}"),
    "cast": ("bf", "{0} ? A(1) : A(0)"),
}  # fmt: skip
# of powers: pow takes some 100 instructions
_PRODUCTS = {2: "product({0}, {0})", 3: "product(product({0}, {0}), {0})"}


class Input(NamedTuple):
    """What a chain reads.

    kind     "each": an array of the chain's shape; "row": one of its last length, the same for
             every row; "one": a single element.
    boolean  whether the elements are bool, not the chain's floating type.
    """

    kind: str
    boolean: bool


class Step(NamedTuple):
    """An operation on values: the chain's inputs and then its steps are numbered from 0; a float
    stands for itself.
    """

    operation: str
    operands: tuple[int | float, ...]


class Chain(NamedTuple):
    """What one kernel computes for each element of arrays of one shape.

    type_name  the C++ name of the floating type.
    outputs    the values that are written, by number.
    sums       the values that are summed over all axes but the last.
    """

    type_name: str
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    sums: tuple[int, ...]

    def is_boolean(self, value: int) -> bool:
        """Tell whether a value is bool."""
        if value < len(self.inputs):
            return self.inputs[value].boolean
        kinds, _ = OPERATIONS[self.steps[value - len(self.inputs)].operation]
        return kinds[-1] == "b"

    def _type(self, value: int, floating: str) -> str:
        return "bool" if self.is_boolean(value) else floating

    def _expression(self, step: Step) -> str:
        text = OPERATIONS[step.operation][1]
        if step.operation == "power" and type(step.operands[1]) is float:
            text = _PRODUCTS.get(step.operands[1], text)  # type: ignore[call-overload]
        # a number takes the arrays' type before it takes part, as it does in NumPy
        return text.format(*[f"v{x}" if type(x) is int else f"A(T({x!r}))" for x in step.operands])

    def code(self) -> str:
        """Return the kernel as CUDA C++, `tapegrad_chain<N>`."""
        each = [k for k, x in enumerate(self.inputs) if x.kind == "each"]
        parameters, before, loads, body, after = [], [], [], [], []
        for k, x in enumerate(self.inputs):
            parameters.append(f"const {self._type(k, 'T')} *__restrict__ x{k}")
            if x.kind == "row":
                before.append(f"const Pack<{self._type(k, 'T')}, N> row{k} = load<N>(x{k}, c);")
            elif x.kind == "one":
                before.append(f"const {self._type(k, 'A')} v{k}(*x{k});")
        for k in each:
            loads.append(f"const Pack<{self._type(k, 'T')}, N> p{k} = load<N>(x{k}, i);")
        for k, x in enumerate(self.inputs):
            if x.kind != "one":
                pack = "p" if x.kind == "each" else "row"
                body.append(f"const {self._type(k, 'A')} v{k}({pack}{k}.at[j]);")
        for k, step in enumerate(self.steps, len(self.inputs)):
            body.append(f"const {self._type(k, 'A')} v{k} = {self._expression(step)};")
        for k in self.outputs:
            parameters.append(f"{self._type(k, 'T')} *__restrict__ y{k}")
            loads.append(f"Pack<{self._type(k, 'T')}, N> out{k};")
            body.append(f"out{k}.at[j] = {self._type(k, 'T')}(v{k});")
        for n, k in enumerate(self.sums):
            parameters.append(f"T *__restrict__ sum{n}, A *__restrict__ partial{n}")
            body.append(f"total{n}[j] += v{k};")
            after += ["__syncthreads();"] * (n > 0) + [
                f"keep_sum(total{n}, sum{n}, partial{n}, columns);"
            ]
        stores = [f"store<N>(y{k}, i, out{k});" for k in self.outputs]
        totals = [f"A total{n}[N] = {{}};" for n in range(len(self.sums))]
        return _TEMPLATE.format(
            type_name=self.type_name,
            parameters=",\n    ".join(parameters),
            totals=_lines(totals, 2),
            before=_lines(before, 4),
            loads=_lines(loads, 6),
            body=_lines(body, 8),
            stores=_lines(stores, 6),
            after=_lines(after, 2),
        )


def _lines(lines: list[str], indent: int) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in lines)


# `chunk` rows for each block of a tile of columns, as in columns.cuh.
_TEMPLATE = """\
#include "common.cuh"
#include "columns.cuh"

using T = {type_name};
using A = accumulator_t<T>;

// Rounded before anything is added to it, as between two launches. The compiler would make
// fma(x, x, -(y * y)) of a difference of squares: not 0 where x is y, and NaN its root.
__device__ float product(float a, float b) {{ return __fmul_rn(a, b); }}
__device__ double product(double a, double b) {{ return __dmul_rn(a, b); }}

// 3 blocks: 80 registers a thread. Without a number the compiler takes 40, and spills on sm_80.
template <int N> __global__ void __launch_bounds__(kThreads, 3) tapegrad_chain(
    {parameters},
    index_t rows, int columns, index_t chunk) {{
  const int packs = columns / N, c = blockIdx.x * blockDim.x + threadIdx.x;
  const index_t begin = blockIdx.y * chunk, end = begin + chunk < rows ? begin + chunk : rows;
{totals}  if (c < packs) {{
{before}    for (index_t r = begin + threadIdx.y; r < end; r += blockDim.y) {{
      const index_t i = r * packs + c;
{loads}#pragma unroll
      for (int j = 0; j < N; ++j) {{
{body}      }}
{stores}    }}
  }}
{after}}}
"""


def is_literal(number: Any) -> bool:
    """Tell whether a Python number can stand in a kernel's text."""
    return type(number) in (int, float) and math.isfinite(number)


@functools.lru_cache(maxsize=1024)
def kernels_of(chain: Chain) -> Kernels:
    """Return the kernels of a chain, not yet built; equal chains share them."""
    width = 16 // ITEM_BYTES[chain.type_name]
    names = ["tapegrad_chain<1>", f"tapegrad_chain<{width}>"]
    if chain.sums:
        names.append(f"tapegrad_sum_partials<{chain.type_name}>")
    return Kernels(chain.code(), tuple(names))


def run(
    chain: Chain,
    shape: tuple[int, ...],
    xp: Module,
    *arrays: Array,
    out: Sequence[Array | None] | None = None,
) -> tuple[Array, ...] | None:
    """Return the chain's outputs, of this shape, and then its sums, (shape[-1],).

    `arrays` are the chain's inputs; None unless all are arrays of `xp` in C order. `out` is memory
    for the results, used where it is aligned and C-contiguous.
    """
    if not all(isinstance(array, xp.ndarray) for array in arrays):
        return None
    floating = [a for a, x in zip(arrays, chain.inputs, strict=True) if not x.boolean]
    if not floating or cpp_type(*floating) != chain.type_name:
        return None
    if not all(array.flags.c_contiguous for array in arrays):
        return None
    dtype = floating[0].dtype
    size = math.prod(shape)
    by_rows = chain.sums or size > MAX_COLUMNS or any(x.kind == "row" for x in chain.inputs)
    rows, columns = (size // shape[-1], shape[-1]) if by_rows else (1, size)
    if columns > MAX_COLUMNS:
        return None
    wanted = [(shape, np.bool_ if chain.is_boolean(k) else dtype) for k in chain.outputs]
    wanted += [((columns,), dtype) for _ in chain.sums]
    results = [
        result(xp, *want, to) for want, to in zip(wanted, out or [None] * len(wanted), strict=True)
    ]
    outputs, sums = results[: len(chain.outputs)], results[len(chain.outputs) :]
    packed = [a for a, x in zip(arrays, chain.inputs, strict=True) if x.kind != "one"]
    width = pack_width(xp, chain.type_name, columns, *packed, *outputs, *sums)
    if by_rows:
        tiles, block = column_tiles(columns // width)
    else:  # one row: the whole block goes along it
        tiles, block = -(-columns // width // THREADS), (THREADS, 1)
    if sums:
        chunk, chunks = row_chunks(rows, block[1])
    else:
        chunk = -(-rows // row_blocks(rows, tiles, block[1]))
        chunks = -(-rows // chunk)
    accumulator = xp.float64 if chain.type_name == "double" else xp.float32
    partials = [xp.empty((chunks, columns), accumulator) if chunks > 1 else None for _ in sums]
    kernels = kernels_of(chain)
    kernels.kernel(f"tapegrad_chain<{width}>")(
        (tiles, chunks),
        block,
        (
            *arrays,
            *outputs,
            *[x for pair in zip(sums, partials, strict=True) for x in pair],
            *(np.int64(rows), np.int32(columns), np.int64(chunk)),
        ),
    )
    for total, partial in zip(sums, partials, strict=True):
        if partial is not None:
            tiles, block = column_tiles(columns)
            kernels.kernel(f"tapegrad_sum_partials<{chain.type_name}>")(
                (tiles,), block, (partial, total, np.int32(chunks), np.int32(columns))
            )
    return *outputs, *sums
