"""Launchers of products with cuBLASLt's epilogues of training, each against the way without it.

A layer's ReLU may leave a mask of one bit an element; the product that brings its gradient then
lets pass what the mask says, and sums the bias's gradient on the way. The mask costs the one what
it saves the other, or not: so both are timed with and without, and decided on together. A product
may also sum the columns of its second operand, which it reads anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tapegrad.config import config

from . import chains, cublaslt, gemm, gemm_choice, gemm_plan, small_gemm
from ._build import Array, Module, cpp_type, result
from .cublaslt import Epilogue
from .gemm import _ALGORITHMS, _Device, _device_of, _key_text, _kind, _Prepared, _Way
from .gemm_choice import Candidate, Timed
from .linear_relu import linear_relu, linear_relu_grad

# The types that cuBLASLt has these epilogues for, and how far their numbers lie apart at 1.
_EPSILONS = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
_FUSED, _PLAIN = "fused", "plain"

_AnyWay = _Way | small_gemm.Variant

Pair = tuple[Array, Array]
Out = Sequence[Array | None]  # memory for the results, used where it is aligned and C-contiguous
_NEW: Out = (None, None)


class _Fusion(NamedTuple):
    """A product x @ w with an epilogue, which gives a second array beside it.

    second    returns shape and dtype of the second array: `second(rows, columns, dtype)`.
    beside    returns what the epilogue is given beside the matrices: `beside(second, *arrays)`.
    plain     does the same without the epilogue: `plain(xp, *arrays, out=out)`; None where it
              declines.
    is_right  tells whether an algorithm's values are those of the meaning where libraries differ:
              `is_right(xp, way, *arrays)`.
    small     returns what `small_gemm.product` is given for the same: `small(second, *arrays)`;
              None where it cannot do it.
    """

    name: str
    epilogue: Epilogue
    second: Callable[[int, int, Any], tuple[tuple[int, ...], Any]]
    beside: Callable[..., tuple[Array, ...]]
    plain: Callable[..., Pair | None]
    is_right: Callable[..., bool]
    small: Callable[..., dict[str, Array]] | None = None

    def launch(self, xp: Module, way: _AnyWay, *arrays: Array, out: Out = _NEW) -> Pair:
        """Run it by one algorithm."""
        x, w = arrays[:2]
        shape = x.shape[0], w.shape[1]
        y = result(xp, shape, x.dtype, out[0])
        second = result(xp, *self.second(*shape, x.dtype), out[1])
        if isinstance(way, small_gemm.Variant):
            assert self.small is not None
            return small_gemm.product(xp, way, x, w, y, **self.small(second, *arrays)), second
        return way(xp, x, w, self.pointers(second, *arrays), y, None), second

    def pointers(self, second: Array, *arrays: Array) -> list[int]:
        """Return the addresses of what is read and written, but for the product."""
        return [a.data.ptr for a in (*arrays[:2], *self.beside(second, *arrays))]


class _Contest:
    """A fusion for such arrays as these against the way without it."""

    def __init__(
        self,
        device: _Device,
        fusion: _Fusion,
        problem: gemm_plan.Problem,
        xp: Module,
        arrays: tuple[Array, ...],
    ) -> None:
        x, w = arrays[:2]
        kind_name, kind = _kind(x.dtype.name)
        self._device, self._fusion, self._xp, self._arrays = device, fusion, xp, arrays
        self._prepared = _Prepared(device.library, device.handle, problem, kind, fusion.epilogue)
        shape, dtype = fusion.second(x.shape[0], w.shape[1], x.dtype)
        self._pointers = fusion.pointers(xp.empty(shape, dtype), *arrays)
        variants = small_gemm.variants(x, w, device.multiprocessors) if fusion.small else []
        self._small = {variant.name: variant for variant in variants}
        self.text = _key_text(fusion.name, problem, kind_name, self._pointers)

    def usable(self, times: dict[str, Timed]) -> bool:
        """Tell whether times are of these ways, and the algorithm such as can run here."""
        return times.keys() <= {_FUSED, _PLAIN, *self._small} and (
            _FUSED not in times or self._device.can_run(self._prepared, times[_FUSED])
        )

    def candidates(self) -> Iterator[Candidate]:
        """Yield what is to be timed: the algorithms that give the right values."""
        launch = functools.partial(self._fusion.launch, self._xp)
        yield Candidate(_PLAIN, functools.partial(self._fusion.plain, self._xp, *self._arrays))
        found = self._prepared.algorithms(_ALGORITHMS, self._device.workspace, self._pointers)
        for algorithm in found:
            way = self._way(*algorithm)
            if self._is_right(way):
                yield Candidate(_FUSED, functools.partial(launch, way, *self._arrays), *algorithm)
        for name, variant in self._small.items():
            yield Candidate(name, functools.partial(launch, variant, *self._arrays))

    def verdict(self) -> _Verdict | None:
        """Return how long both ways take, by the fastest algorithm or kernel of the one."""
        times = self._device.times_of(self, self._xp) or {}
        fused = [(timed.seconds, name) for name, timed in times.items() if name != _PLAIN]
        if _PLAIN not in times or not fused:
            return None
        seconds, name = min(fused)
        way = self._small.get(name) or self._way(*times[name][1:])
        return _Verdict(seconds, times[_PLAIN].seconds, way)

    def _way(self, algorithm: bytes, workspace: int) -> _Way:
        return _Way(self._prepared, algorithm, workspace, None)

    def _is_right(self, way: _Way) -> bool:
        try:
            return self._fusion.is_right(self._xp, way, *self._arrays)
        except cublaslt.CublasLtError:
            return False


class _Verdict(NamedTuple):
    """The seconds that a fusion takes, by its fastest way, and those without it."""

    fused: float
    plain: float
    way: _AnyWay


def _are_matrices(*arrays: Array) -> bool:
    """Tell whether arrays are matrices of one floating type, the last such as our kernels take."""
    alike = all(a.ndim == 2 and a.dtype == arrays[0].dtype for a in arrays)
    return alike and cpp_type(arrays[-1]) is not None


def _device_for(xp: Module, *arrays: Array) -> _Device | None:
    """Return the device whose cuBLASLt may fuse something into x @ w; None where it may not.

    arrays  x, w and others of their type.
    """
    if xp is np or config.deterministic:  # then no timing decides, and nothing else would
        return None
    x, w = arrays[:2]
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        return None
    # The sums of one row or one column are refused by some versions.
    if x.shape[0] < 2 or w.shape[1] < 2 or x.dtype.name not in _EPSILONS or not x.dtype.isnative:
        return None
    # What is tried out is laid out as these are.
    dense = (a.flags.c_contiguous or a.flags.f_contiguous for a in arrays)
    return _device_of(xp, arrays) if all(dense) else None


def _key(name: str, *arrays: Array) -> tuple[Any, ...]:
    layouts = [(a.shape, a.strides, gemm_plan.alignment(a.data.ptr)) for a in arrays]
    return name, config.tf32, arrays[0].dtype, *layouts


def _verdict(device: _Device, fusion: _Fusion, xp: Module, *arrays: Array) -> _Verdict | None:
    """Return the verdict on a fusion; None where it cannot be used, or not found in a capture."""

    def decide() -> _Verdict | None:
        x, w = arrays[:2]
        problem = gemm_plan.problem(x.shape, x.strides, w.shape, w.strides, x.itemsize)
        if problem is None:
            return None
        return _Contest(device, fusion, problem, xp, arrays).verdict()

    found: _Verdict | None = device.decision(xp, _key(fusion.name, *arrays), decide)
    return found


def _full_like(xp: Module, array: Array, value: float, beside: float | None = None) -> Array:
    """Return an array laid out as another, with one value in it, or another from column 1 on."""
    made = xp.full(array.shape, value, np.float32)
    if beside is not None:
        made[:, 1:] = beside
    made = made.astype(array.dtype)
    return made if array.flags.c_contiguous else xp.ascontiguousarray(made.T).T


def _are_sums(sums: Array, counts: Any) -> bool:
    """Tell whether sums of so many ones are right: in 16 bits they would stop at 256 or 2048."""
    error = abs(sums.astype(np.float32) - counts)
    return bool((error <= _EPSILONS[sums.dtype.name] * counts).all())


def _is_nan(xp: Module, array: Array) -> Array:
    return xp.isnan(array.astype(np.float32))


# ---- a layer with ReLU that leaves a mask, and the product that brings its gradient


def linear_relu_with_mask(xp: Module, x: Array, w: Array, b: Array, *, above: int) -> Pair | None:
    """Return relu(x @ w + b), and a mask for `matmul_linear_relu_grad` or an array of no bytes.

    above  the columns of the gradient that will be brought down.

    The arrays as `linear_relu` takes them, which also says what None means. relu(NaN) is NaN, and
    no mask lets it pass.
    """
    way = _way_with_mask(xp, x, w, b, above)
    if way is not None:
        return _WITH_MASK.launch(xp, way, x, w, b)
    return _without_mask(xp, x, w, b)


def matmul_linear_relu_grad(
    xp: Module, g: Array, w: Array, y: Array, mask: Array, out: Out = _NEW
) -> Pair | None:
    """Return `linear_relu_grad` of g @ w and y: the gradient below a ReLU, and its column sums.

    g is (n, k), w (k, o), y (n, o), C-contiguous; the mask is of `linear_relu_with_mask`'s making.
    """
    if not _are_matrices(g, w, y):  # it would be declined below, after the product
        return None
    if mask.size:
        device = _device_for(xp, g, w, y)
        verdict = device and _verdict(device, _RELU_GRAD, xp, g, w, y, mask)
        if verdict:
            return _RELU_GRAD.launch(xp, verdict.way, g, w, y, mask, out=out)
    return _relu_grad_of_product(xp, g, w, y, out=out)


def _way_with_mask(xp: Module, x: Array, w: Array, b: Array, above: int) -> _AnyWay | None:
    """Return the way that leaves a mask, or None unless that makes up for its cost."""
    device = _device_for(xp, x, w, b)
    if device is None or b.shape != w.shape[1:]:
        return None

    def decide() -> _AnyWay | None:
        down = _verdict(device, _WITH_MASK, xp, x, w, b)
        if down is None:
            return None
        try:
            with gemm_choice.scratch_memory(xp):
                y, mask = _WITH_MASK.launch(xp, down.way, x, w, b)
                # Of the shapes and the layout they will have; values hardly count for the time.
                g = xp.zeros((len(x), above), x.dtype)
                weights = xp.zeros((w.shape[1], above), x.dtype)
                up = _verdict(device, _RELU_GRAD, xp, g, weights.T, y, mask)
        except MemoryError:
            return None
        pays = up is not None and down.fused + up.fused < down.plain + up.plain
        return down.way if pays else None

    found: _AnyWay | None = device.decision(xp, (above, *_key("mask", x, w, b)), decide)
    return found


def _without_mask(xp: Module, x: Array, w: Array, b: Array) -> Pair | None:
    y = linear_relu(xp, x, w, b)
    return None if y is None else (y, xp.empty((0,), np.uint8))


def _relu_grad_of_product(
    xp: Module, g: Array, w: Array, y: Array, _mask: Any = None, out: Out = _NEW
) -> Pair | None:
    return linear_relu_grad(xp, _product(xp, g, w), y, out)


def _product(xp: Module, x: Array, w: Array, out: Array | None = None) -> Array:
    y = gemm.matmul(xp, x, w, (out,))
    if y is None:
        y = xp.matmul(x, w, out=result(xp, (len(x), w.shape[1]), x.dtype, out))
    return y


def _of_columns(rows: int, columns: int, dtype: Any) -> tuple[tuple[int, ...], Any]:
    return (columns,), dtype


def _keeps_nan_and_stops_zero(xp: Module, way: _Way, x: Array, w: Array, b: Array) -> bool:
    """Tell whether NaN goes through the ReLU, and neither it nor 0 through the mask.

    Most of cuBLASLt's ReLU epilogues turn NaN into 0. The order of the mask's bits is the
    library's own, but here all of them must be 0.
    """

    def passed(*arrays: Array) -> tuple[Array, bool]:
        mask = xp.zeros(gemm_plan.mask_shape(len(x), w.shape[1]), np.uint8)
        y, _ = _WITH_MASK.launch(xp, way, *arrays, out=(None, mask))
        return y, bool(mask.any())

    y, marked = passed(x, w, _full_like(xp, b, np.nan))
    if marked or not _is_nan(xp, y).all():
        return False
    y, marked = passed(*[_full_like(xp, a, 0) for a in (x, w, b)])
    return not marked and not bool(y.astype(np.float32).any())


def _follows_the_mask(xp: Module, way: _Way, g: Array, w: Array, y: Array, mask: Array) -> bool:
    """Tell whether the mask lets pass what y > 0 would, and stops even NaN elsewhere."""
    passes = y.astype(np.float32) > 0
    gz, _ = _RELU_GRAD.launch(xp, way, _full_like(xp, g, np.nan), w, y, mask)
    if not xp.where(passes, _is_nan(xp, gz), gz.astype(np.float32) == 0).all():
        return False
    one, ones = _full_like(xp, g, 1, beside=0), _full_like(xp, w, 1)
    _, gb = _RELU_GRAD.launch(xp, way, one, ones, y, mask)
    return _are_sums(gb, passes.sum(0))


_WITH_MASK = _Fusion(
    "linear_relu_with_mask",
    Epilogue.RELU_AUX_BIAS,
    lambda rows, columns, _: (gemm_plan.mask_shape(rows, columns), np.uint8),
    lambda mask, _x, _w, b: (b, mask),
    _without_mask,
    _keeps_nan_and_stops_zero,
)
_RELU_GRAD = _Fusion(
    "matmul_linear_relu_grad",
    Epilogue.DRELU_BGRAD,
    _of_columns,
    lambda gb, _g, _w, _y, mask: (gb, mask),
    _relu_grad_of_product,
    _follows_the_mask,
)


# ---- a product that sums its second operand's columns: the gradients of weights and bias


def matmul_with_sums(xp: Module, x: Array, w: Array, out: Out = _NEW) -> Pair | None:
    """Return x @ w and the sums of w's columns, or None for what no kernel was written for.

    x (n, k), w (k, o), of one floating type, w C-contiguous. The sums are accumulated in float32.
    """
    if not _are_matrices(x, w):
        return None
    device = _device_for(xp, x, w)
    verdict = device and _verdict(device, _WITH_SUMS, xp, x, w)
    if verdict and verdict.fused < verdict.plain:
        return _WITH_SUMS.launch(xp, verdict.way, x, w, out=out)
    return _product_and_sums(xp, x, w, out)


def _product_and_sums(xp: Module, x: Array, w: Array, out: Out = _NEW) -> Pair | None:
    column_sums = chains.Chain(str(cpp_type(w)), (chains.Input("each", False),), (), (), (0,))
    sums = chains.run(column_sums, w.shape, xp, w, out=out[1:])
    return None if sums is None else (_product(xp, x, w, out[0]), sums[0])


_EXACT_SUMS = 4096  # of so many numbers of 12 digits, in float32


def _sums_in_float32(xp: Module, way: _Way, x: Array, w: Array) -> bool:
    """Tell whether neither the sums are rounded on the way, nor what is added up."""
    _, sums = _WITH_SUMS.launch(xp, way, x, _full_like(xp, w, 1))
    if not _are_sums(sums, len(w)):
        return False
    fine = _full_like(xp, w, 1 + 2.0**-11)  # one digit more than TF32 has; 1 in 16 bits
    fine[_EXACT_SUMS:] = 0
    _, sums = _WITH_SUMS.launch(xp, way, x, fine)
    return _are_sums(sums, fine.astype(np.float32).sum(0))


_WITH_SUMS = _Fusion(
    "matmul_with_sums",
    Epilogue.BGRADA,
    _of_columns,
    lambda sums, _x, _w: (sums,),
    _product_and_sums,
    _sums_in_float32,
    lambda sums, _x, _w: {"sums": sums},
)
