"""Launchers of softmax_cross_entropy.cu: the loss of each row and the gradient of the logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._build import (
    FLOATING,
    ITEM_BYTES,
    MAX_BLOCKS,
    MAX_COLUMNS,
    WARP,
    Array,
    Module,
    Source,
    cpp_type,
    grid,
    multiprocessors,
    pack_width,
)

# Values of a short row that one lane keeps in registers: few for few classes, so that no lane is
# idle; 32 for the most that a warp can hold without spilling.
_FEW, _MANY = 8, 32


def _widths(type_name: str) -> tuple[int, int]:
    return 1, 16 // ITEM_BYTES[type_name]


def _names(*forms: str) -> tuple[str, ...]:
    kinds = ("label", "probability")
    return tuple(f"tapegrad_{kind}_cross_entropy_{form}" for kind in kinds for form in forms)


_SOURCE = Source(
    "softmax_cross_entropy.cu",
    *(
        _names(
            *(f"short<{t}, {values}, {n}>" for values in (_FEW, _MANY) for n in _widths(t)),
            *(f"long<{t}, {n}>" for n in _widths(t)),
        )
        for t in FLOATING
    ),
    *(
        _names(*(f"{part}<{t}, {n}>" for part in ("scan", "finish") for n in _widths(t)))
        for t in FLOATING
    ),
)

_SHORT_THREADS = 128
# A row of more bytes gets as many threads as fit, instead of 256: with fewer rows in flight (264 on
# an H200) the second read of each still finds it in L2.
_WIDE_BYTES = 32 << 10
_LONG_THREADS, _MOST_THREADS = 256, {"double": 512}
# A row of more bytes than the first is cut into slices of the second at least, where that gives
# work to multiprocessors that have no row. Reckoned, not measured: below, the second launch takes
# as long as it saves.
_SLICED_BYTES, _SLICE_BYTES = 64 << 10, 16 << 10


def softmax_cross_entropy(
    xp: Module,
    logits: Array,
    labels: Array,
    class_weights: Array | None = None,
    *,
    label_smoothing: float,
    ignore_label: int | None,
) -> Array | None:
    """Return the loss of each row, shape (n,), or None for arrays the kernel was not written for.

    logits are (n, classes), floating and C-contiguous; labels (n,), int32 or int64; class_weights
    (classes,), of the logits' type. With s the smoothing, t = (1 - s) [c is label] + s / classes
    and w the class weights, loss = sum_c w_c t_c (lse(x) - x_c); an ignored row's is 0, and that of
    a row whose label is no class NaN.
    """
    options = label_smoothing, ignore_label
    result = _with_labels(xp, logits, labels, class_weights, *options, with_grad=False)
    return None if result is None else result[0]


def softmax_cross_entropy_with_grad(
    xp: Module,
    logits: Array,
    labels: Array,
    class_weights: Array | None = None,
    *,
    label_smoothing: float,
    ignore_label: int | None,
) -> tuple[Array, Array] | None:
    """Return (loss, dlogits), both in one launch; arguments as for `softmax_cross_entropy`.

    dlogits = softmax(x) * sum(w t) - w t; 0 in an ignored row and in one whose label is no class.
    """
    options = label_smoothing, ignore_label
    return _with_labels(xp, logits, labels, class_weights, *options, with_grad=True)


def probability_cross_entropy(xp: Module, logits: Array, targets: Array) -> Array | None:
    """Return the sum over c of targets * (lse(logits) - logits) for each row, shape (n,).

    Both are (n, classes), of one floating dtype, C-contiguous; else the answer is None. A term
    whose target is 0 is exactly 0, also where the logit is -inf.
    """
    result = _with_probabilities(xp, logits, targets, with_grad=False)
    return None if result is None else result[0]


def probability_cross_entropy_with_grad(
    xp: Module, logits: Array, targets: Array
) -> tuple[Array, Array] | None:
    """Return (loss, dlogits), both in one launch: dlogits = softmax(x) * sum(targets) - targets."""
    return _with_probabilities(xp, logits, targets, with_grad=True)


def _with_labels(
    xp: Module,
    logits: Array,
    labels: Array,
    class_weights: Array | None,
    smoothing: float,
    ignore_label: int | None,
    *,
    with_grad: bool,
) -> tuple[Array, Any] | None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.flags.c_contiguous:
        return None
    t = cpp_type(logits) if class_weights is None else cpp_type(logits, class_weights)
    if t is None or labels.dtype not in (np.int32, np.int64):
        return None
    if class_weights is not None and class_weights.shape != logits.shape[1:]:
        return None
    accumulator = np.float64 if t == "double" else np.float32
    even = smoothing / logits.shape[1]
    extra = (
        np.int32(labels.dtype.itemsize),
        np.int32(ignore_label is not None),
        np.int64(ignore_label or 0),
        accumulator(even),
        accumulator(1 - smoothing + even),
        class_weights,
    )
    return _launch(xp, "label", t, logits, labels, extra, with_grad)


def _with_probabilities(
    xp: Module, logits: Array, targets: Array, *, with_grad: bool
) -> tuple[Array, Any] | None:
    if logits.ndim != 2 or targets.shape != logits.shape:
        return None
    t = cpp_type(logits, targets)
    return None if t is None else _launch(xp, "probability", t, logits, targets, (), with_grad)


def _launch(
    xp: Module,
    target_kind: str,
    t: str,
    logits: Array,
    target: Array,
    extra: tuple[Any, ...],
    with_grad: bool,
) -> tuple[Array, Any] | None:
    rows, columns = logits.shape
    if columns > MAX_COLUMNS:
        return None
    loss = xp.empty(rows, logits.dtype)
    dlogits = xp.empty_like(logits) if with_grad else None
    name = f"tapegrad_{target_kind}_cross_entropy"
    in_packs = [a for a in (logits, target, dlogits) if a is not None and a.ndim == 2]
    width = pack_width(xp, t, columns, *in_packs)
    arguments = (logits, target, loss, dlogits, np.int64(rows), np.int32(columns))
    if columns <= WARP * _MANY:
        values = _FEW if columns <= WARP * _FEW else _MANY
        lanes = 1 << (-(-columns // values) - 1).bit_length()
        _SOURCE.kernel(f"{name}_short<{t}, {values}, {width}>")(
            grid(rows * lanes, _SHORT_THREADS),
            (_SHORT_THREADS,),
            (*arguments, np.int32(lanes), *extra),
        )
    elif (slices := _slices(xp, logits)) > 1:
        packs = columns // width
        each = -(-packs // slices)
        slices = -(-packs // each)
        accumulator = np.float64 if t == "double" else np.float32
        parts = xp.empty((rows, slices, 4), accumulator)
        threads = _MOST_THREADS.get(t, 1024)
        sizes = np.int32(columns), np.int32(each)
        _SOURCE.kernel(f"{name}_scan<{t}, {width}>")(
            (slices, rows), (threads,), (logits, target, parts, *sizes, *extra)
        )
        _SOURCE.kernel(f"{name}_finish<{t}, {width}>")(
            (slices if with_grad else 1, rows),
            (threads if with_grad else WARP,),
            (logits, target, parts, loss, dlogits, *sizes, np.int32(slices), *extra),
        )
    else:
        wide = columns * logits.itemsize > _WIDE_BYTES
        threads = _MOST_THREADS.get(t, 1024) if wide else _LONG_THREADS
        _SOURCE.kernel(f"{name}_long<{t}, {width}>")(
            (min(rows, MAX_BLOCKS),), (threads,), (*arguments, *extra)
        )
    return loss, dlogits


def _slices(xp: Module, logits: Array) -> int:
    """Return into how many slices each row is cut, for several blocks; below 2: into none."""
    rows: int = logits.shape[0]
    row_bytes: int = logits.shape[1] * logits.itemsize
    if row_bytes < _SLICED_BYTES:
        return 0
    return min(multiprocessors(xp) // rows, row_bytes // _SLICE_BYTES)
