"""Softmax cross-entropy and its gradient, from labels and from probabilities, in NumPy's words."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, misaligned, read_only

from tapegrad.kernels import _build
from tapegrad.kernels import softmax_cross_entropy as module
from tapegrad.kernels.softmax_cross_entropy import (
    probability_cross_entropy,
    probability_cross_entropy_with_grad,
    softmax_cross_entropy,
    softmax_cross_entropy_with_grad,
)
from tests.fake_cupy import FakeCupy


def probability_meaning(x, q):
    """In float64: (loss, dlogits)."""
    x, q = x.astype("f8"), q.astype("f8")
    with np.errstate(all="ignore"):
        top = x.max(1, keepdims=True)
        log_softmax = x - top - np.log(np.exp(x - top).sum(1, keepdims=True))
        loss = np.where(q == 0, 0, q * -log_softmax).sum(1)
        return loss, np.exp(log_softmax) * q.sum(1, keepdims=True) - q


def label_meaning(x, labels, smoothing=0.0, ignore=None, weights=None):
    """In float64: (loss, dlogits), by way of the probabilities that a label stands for."""
    classes = x.shape[1]
    is_class = (labels >= 0) & (labels < classes)
    safe = np.where(is_class, labels, 0)
    q = np.full(x.shape, smoothing / classes)
    q[np.arange(len(labels)), safe] += 1 - smoothing
    q *= 1 if weights is None else weights.astype("f8")
    loss, dlogits = probability_meaning(x, q)
    ignored = labels == (-(2**63) if ignore is None else ignore)
    loss = np.where(ignored, 0, np.where(is_class, loss, np.nan))
    return loss, np.where((ignored | ~is_class)[:, None], 0, dlogits)


DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16]
# In float32 the largest errors seen over this file are 6e-7 of the loss and 3e-7 of the gradient,
# where it is near 1; 16-bit results are the float32 ones, rounded: half a unit in the last place.
TOLERANCE = {"float32": 4e-6, "float64": 1e-13, "float16": 2**-11 + 4e-6, "bfloat16": 2**-8 + 4e-6}
# Around the edges of lanes, of a warp, of 8 and 32 values a lane, of the short form (1024) and of
# a block of 256 threads with packs; the last have a block of 1024 threads in float32.
CLASSES = [1, 2, 8, 9, 10, 31, 32, 33, 255, 256, 257, 1000, 1024, 1025, 1028, 2049, 8200, 8193]


def logits_of(rows, classes, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, classes)) * 5).astype(dtype)


def probabilities_of(rows, classes, dtype, seed=1):
    q = np.random.default_rng(seed).random((rows, classes))
    q[:, ::3] = 0
    return (q / np.maximum(q.sum(1, keepdims=True), 1e-30)).astype(dtype)


def check(got, want, dtype):
    dtype = np.dtype(dtype)
    tolerance = TOLERANCE[dtype.name]
    for array, reference in zip(got, want, strict=True):
        assert array.dtype == dtype
        assert array.shape == reference.shape
        # a loss near 0 and a gradient near 0 are differences of numbers near 1
        np.testing.assert_allclose(array.astype("f8"), reference, tolerance, 0.1 * tolerance)


def check_labels(x, labels, weights, dtype):
    """Compare loss and gradient with the meaning; the loss alone must be the same."""
    for smoothing, w in itertools.product((0.0, 0.1), (None, weights)):
        options = {"label_smoothing": smoothing, "ignore_label": -100}
        want = label_meaning(x, labels, smoothing, -100, w)
        got = softmax_cross_entropy_with_grad(np, x, labels, w, **options)
        check(got, want, dtype)
        loss = softmax_cross_entropy(np, x, labels.astype("i4"), w, **options)
        np.testing.assert_array_equal(loss, got[0])


def check_probabilities(x, q, dtype):
    """Compare loss and gradient with the meaning; the loss alone must be the same."""
    got = probability_cross_entropy_with_grad(np, x, q)
    check(got, probability_meaning(x, q), dtype)
    np.testing.assert_array_equal(probability_cross_entropy(np, x, q), got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("classes", CLASSES)
def test_labels(classes, dtype):
    rows = 5
    x = logits_of(rows, classes, dtype)
    labels = np.random.default_rng(2).integers(0, classes, rows)
    labels[1] = -100
    weights = np.linspace(0, 1.5, classes).astype(dtype)
    read_only(x, labels, weights)
    with kernels_on_cpu():
        check_labels(x, labels, weights, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("classes", CLASSES)
def test_probabilities(classes, dtype):
    x, q = read_only(logits_of(5, classes, dtype), probabilities_of(5, classes, dtype))
    with kernels_on_cpu():
        check_probabilities(x, q, dtype)


def test_many_classes():
    x, labels = logits_of(2, 50257, "f4"), np.array([3, 50256])
    with kernels_on_cpu():
        got = softmax_cross_entropy_with_grad(np, x, labels, label_smoothing=0.0, ignore_label=None)
    check(got, label_meaning(x, labels), "f4")


@contextmanager
def in_slices(of_bytes=64, multiprocessors=132):
    """Let rows that are too long for the registers of a warp be cut into slices.

    For blocks of two warps, since a sanitizer takes about a millisecond a thread.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_THREADS", dict.fromkeys(_build.FLOATING, 64))
        patch.setattr(module, "_SLICED_BYTES", 1)
        patch.setattr(module, "_SLICE_BYTES", of_bytes)
        patch.setattr(_build, "_H200_MULTIPROCESSORS", multiprocessors)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("classes", [c for c in CLASSES if c > 1024])
def test_several_blocks_for_a_row(classes, dtype):
    """Two slices; more than a warp has lanes; a last one that is short."""
    rows = 3
    x, q = logits_of(rows, classes, dtype), probabilities_of(rows, classes, dtype)
    x[1, 500:] += 20  # the largest is not in the first slice
    labels = np.array([classes - 1, -100, 0])
    weights = np.linspace(0, 1.5, classes).astype(dtype)
    read_only(x, q, labels, weights)
    for multiprocessors in (7, 132):
        with in_slices(multiprocessors=multiprocessors), kernels_on_cpu():
            check_labels(x, labels, weights, dtype)
            check_probabilities(x, q, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "slices"),
    [
        ((4, 131072), "f4", 32),  # 16 KiB each
        ((4, 131072), "f2", 16),
        ((1, 1 << 22), "f4", 132),  # as many as multiprocessors
        ((66, 131072), "f4", 2),
        ((67, 131072), "f4", 1),
        ((4, 16384), "f4", 4),
        ((4, 16383), "f4", 0),
        ((133, 131072), "f4", 0),
    ],
)
def test_when_a_row_is_cut(shape, dtype, slices):
    assert module._slices(np, np.empty(shape, dtype)) == slices


def test_the_device_says_how_many_multiprocessors_it_has(monkeypatch):
    monkeypatch.setattr(_build, "_multiprocessors", {})
    xp = FakeCupy()
    xp.cuda.runtime.getDevice = lambda: 3
    xp.cuda.runtime.getDeviceProperties = lambda number: {"multiProcessorCount": 20 + number}
    assert [_build.multiprocessors(xp) for _ in range(2)] == [23, 23]
    xp.cuda.runtime.getDevice = lambda: 1
    assert _build.multiprocessors(xp) == 21


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 257])
def test_rows_around_the_edges_of_a_block(rows):
    x, labels = logits_of(rows, 10, "f4"), np.arange(rows) % 10
    with kernels_on_cpu():
        got = softmax_cross_entropy_with_grad(np, x, labels, label_smoothing=0.1, ignore_label=3)
    check(got, label_meaning(x, labels, 0.1, 3), "f4")


def test_more_rows_than_blocks_in_a_launch(monkeypatch):
    """A block takes several rows in turn."""
    monkeypatch.setattr(_build, "MAX_BLOCKS", 2)
    monkeypatch.setattr(module, "MAX_BLOCKS", 2)
    with kernels_on_cpu():
        for classes in (100, 1100):
            x, labels = logits_of(33, classes, "f4"), np.arange(33)
            got = softmax_cross_entropy_with_grad(
                np, x, labels, label_smoothing=0.1, ignore_label=None
            )
            check(got, label_meaning(x, labels, 0.1), "f4")


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        for rows, classes, multiprocessors in [
            *[(3, 10, 0), (3, 12, 0), (2, 257, 0), (2, 1025, 0), (1, 1028, 0)],
            *[(2, 1025, 5), (1, 1028, 3)],  # in slices
        ]:
            x = logits_of(rows, classes, "f4")
            labels, q = np.full(rows, classes - 1), probabilities_of(rows, classes, "f4")
            weights = np.linspace(0, 1.5, classes).astype("f4")
            read_only(x, labels, weights, q)
            with in_slices(multiprocessors=multiprocessors):
                got = softmax_cross_entropy_with_grad(
                    np, x, labels, weights, label_smoothing=0.1, ignore_label=None
                )
                check(got, label_meaning(x, labels, 0.1, weights=weights), "f4")
                got = probability_cross_entropy_with_grad(np, x, q)
                check(got, probability_meaning(x, q), "f4")


@pytest.mark.parametrize("classes", [12, 300, 1028])
def test_misaligned_rows_take_the_scalar_path(classes):
    x, q = logits_of(2, classes, "f4"), probabilities_of(2, classes, "f4")
    with kernels_on_cpu("asan"):
        check(
            probability_cross_entropy_with_grad(np, misaligned(x), misaligned(q)),
            probability_meaning(x, q),
            "f4",
        )


LARGE = 1e38
ROWS = {
    "masked": [-np.inf, 3.0, -np.inf, 1.0],
    "all masked": [-np.inf] * 4,
    "nan": [0.0, np.nan, 1.0, 2.0],
    "infinity": [0.0, 1.0, np.inf, 2.0],
    "both": [np.nan, -np.inf, np.inf, 0.0],
    "equal and huge": [1e30, 1e30, 1e30, 1e30],
    "huge": [LARGE, -LARGE, 0.0, 1.0],
    "all at the bottom": [-LARGE] * 4,
    "far apart": [0.0, 100.0, -100.0, 88.0],
}


@pytest.mark.parametrize("row", list(ROWS))
@pytest.mark.parametrize(
    ("length", "multiprocessors"), [(4, 0), (1028, 0), (1029, 0), (1028, 3), (1029, 70)]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_special_logits(row, length, multiprocessors, dtype):
    """In the short form, and where the row's pattern repeats the long one, also in slices."""
    x = np.resize(np.array(ROWS[row], dtype), (1, length))
    if dtype == "f8":
        x[abs(x) == LARGE] *= 1e266
    with kernels_on_cpu(), in_slices(multiprocessors=multiprocessors):
        for label in range(4):
            labels = np.array([label])
            for smoothing in (0.0, 0.1):
                got = softmax_cross_entropy_with_grad(
                    np, x, labels, label_smoothing=smoothing, ignore_label=None
                )
                check(got, label_meaning(x, labels, smoothing), dtype)
            q = np.zeros_like(x)
            q[0, label] = 1
            got = probability_cross_entropy_with_grad(np, x, q)
            check(got, probability_meaning(x, q), dtype)
        if row in ("all masked", "nan", "infinity", "both"):
            assert all(np.isnan(a).all() for a in got)
        if row == "masked":
            assert np.isfinite(got[1]).all()


@pytest.mark.parametrize(("length", "multiprocessors"), [(10, 0), (1030, 0), (1030, 20)])
@pytest.mark.parametrize("label_dtype", ["i4", "i8"])
def test_labels_that_are_no_class_and_ignored_rows(length, multiprocessors, label_dtype):
    wrong = [-1, length, 2**31 - 1, -(2**31)] + [2**40, -(2**63)] * (label_dtype == "i8")
    x = logits_of(len(wrong) + 2, length, "f4")
    x[-1] = np.nan
    labels = np.array([*wrong, 3, -7], label_dtype)
    with kernels_on_cpu("asan"), in_slices(multiprocessors=multiprocessors):
        for smoothing in (0.0, 0.1):
            loss, dlogits = softmax_cross_entropy_with_grad(
                np, x, labels, label_smoothing=smoothing, ignore_label=-7
            )
            assert np.isnan(loss[:-2]).all()
            assert loss[-1] == 0
            assert not dlogits[:-2].any()
            assert not dlogits[-1].any()
            check((loss, dlogits), label_meaning(x, labels, smoothing, -7), "f4")


@pytest.mark.parametrize(("length", "multiprocessors"), [(4, 0), (1028, 0), (1028, 6)])
def test_a_target_of_zero_counts_exactly_zero(length, multiprocessors):
    x = np.full((2, length), -np.inf, "f4")
    x[:, 0] = [2.0, np.nan]
    q = np.zeros_like(x)
    q[0, 0] = 2.0  # not normalised: the gradient is softmax * 2 - q
    with kernels_on_cpu(), in_slices(multiprocessors=multiprocessors):
        loss, dlogits = probability_cross_entropy_with_grad(np, x, q)
    np.testing.assert_array_equal(loss, [0, 0])  # a row without target: 0, whatever the logits
    np.testing.assert_array_equal(dlogits[0], 0)


def test_small_loss_of_large_logits_keeps_its_digits():
    """The difference top - x comes before log(sum) is added: lse - x would be 0.6875."""
    x = np.full((1, 2), 3e5, "f4")
    with kernels_on_cpu():
        loss = softmax_cross_entropy(np, x, np.array([0]), label_smoothing=0.0, ignore_label=None)
        np.testing.assert_allclose(loss, np.log(2), 1e-6)
        wide = np.full((1, 2000), 3e5, "f4")
        for multiprocessors in (0, 9):
            with in_slices(multiprocessors=multiprocessors):
                loss = probability_cross_entropy(np, wide, np.full_like(wide, 1 / 2000))
            np.testing.assert_allclose(loss, np.log(2000), 1e-6)


@pytest.mark.parametrize(
    ("classes", "multiprocessors"), [(10, 0), (300, 0), (3000, 0), (3000, 400)]
)
def test_same_bits_in_every_order_of_threads(classes, multiprocessors):
    x, labels = logits_of(9, classes, "f4"), np.arange(9)
    bits = set()
    for order in (0, 1, 7):
        with kernels_on_cpu(order=order), in_slices(multiprocessors=multiprocessors):
            loss, dlogits = softmax_cross_entropy_with_grad(
                np, x, labels, label_smoothing=0.1, ignore_label=None
            )
            bits.add(loss.tobytes() + dlogits.tobytes())
    assert len(bits) == 1


X, LABELS = np.ones((4, 6), "f4"), np.zeros(4, "i8")


@pytest.mark.parametrize(
    ("x", "labels"),
    [
        (X.astype("i4"), LABELS),
        (X.astype(">f4"), LABELS),
        (np.asfortranarray(X), LABELS),
        (X[:, ::2], LABELS),
        (X[0], LABELS),
        (X[None], LABELS),
        (X[:, :0], LABELS),
        (X[:0], LABELS[:0]),
        (X, LABELS[:3]),
        (X, LABELS[:, None]),
        (X, LABELS.astype("i2")),
        (X, LABELS.astype("u8")),
        (X, LABELS.astype("f4")),
        (X, np.zeros(8, "i8")[::2]),
    ],
)
def test_labels_decline(x, labels):
    with kernels_on_cpu():
        for function in (softmax_cross_entropy, softmax_cross_entropy_with_grad):
            assert function(np, x, labels, label_smoothing=0.0, ignore_label=None) is None


@pytest.mark.parametrize("weights", [X[0].astype("f8"), X[0, :5], X[0, ::2], X])
def test_class_weights_decline(weights):
    with kernels_on_cpu():
        options = {"label_smoothing": 0.0, "ignore_label": None}
        assert softmax_cross_entropy(np, X, LABELS, weights, **options) is None


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (X, X.astype("f8")),
        (X.astype("i4"), X.astype("i4")),
        (X, np.asfortranarray(X)),
        (np.asfortranarray(X), X),
        (X, X[:3]),
        (X[0], X[0]),
        (X[:, :0], X[:, :0]),
        (X, LABELS),
    ],
)
def test_probabilities_decline(x, q):
    with kernels_on_cpu():
        for function in (probability_cross_entropy, probability_cross_entropy_with_grad):
            assert function(np, x, q) is None


def test_too_many_columns_decline(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMNS", 5)
    with kernels_on_cpu():
        assert probability_cross_entropy(np, X, X) is None


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        # the barrier between a warp's part and its readers, and the one before the next row
        ("tsan", "costs[warp] = seen.cost;\n  __syncthreads();", "costs[warp] = seen.cost;"),
        ("tsan", "    __syncthreads();  // before the next row", "    // before the next row"),
        (
            "tsan",
            "seen = lanes_seen(seen);\n  if (lane == 0)",
            "seen = lanes_seen(seen);\n  if (1)",
        ),
        ("asan", "packs = r < rows ? columns / N : 0;", "packs = columns / N + 1;"),
        ("asan", "if (counts && class_weights &&", "if (class_weights &&"),
        ("asan", "label >= 0 && label < columns", "label >= 0 && label <= columns"),
        ("asan", "scan<N>(xr, row, 0, columns / N)", "scan<N>(xr, row, 0, columns / N + 1)"),
        ("asan", "row, seen, 0, columns / N)", "row, seen, 0, columns / N + 1)"),
        ("asan", "slice < slices; slice += kWarp", "slice <= slices; slice += kWarp"),
        ("asan", "parts[r * gridDim.x + blockIdx.x] = seen", "parts[(r + 1) * gridDim.x] = seen"),
        ("tsan", "if (threadIdx.x == 0) parts[", "if (threadIdx.x < 2) parts["),
        ("tsan", "row, seen, begin, end);", "row, seen, 0, end);"),
    ],
)
def test_planted_faults_are_found(mode, was, now, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCKS", 1)  # so that a block takes both rows

    def run_everything():
        x, weights = logits_of(3, 12, "f4"), np.ones(12, "f4")
        options = {"label_smoothing": 0.0, "ignore_label": 5}
        plain = {"label_smoothing": 0.0, "ignore_label": None}
        softmax_cross_entropy_with_grad(np, x, np.array([5, 1, 12]), weights, **options)
        for x, label in [(logits_of(2, 1025, "f4"), 1025), (logits_of(1, 10, "f4"), 10)]:
            labels = np.full(len(x), label)
            softmax_cross_entropy_with_grad(np, x, labels, **plain)
            probability_cross_entropy_with_grad(np, x, x)
        with in_slices(multiprocessors=5):
            softmax_cross_entropy_with_grad(np, logits_of(2, 1025, "f4"), np.zeros(2, int), **plain)

    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises(KernelError, match=r"data race|AddressSanitizer|out of bounds"),
    ):
        run_everything()
