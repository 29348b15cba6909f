"""Products of small matrices, with what follows them, against their meaning in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, misaligned, read_only

from tapegrad.kernels.small_gemm import Variant, product, variants

SIDES = (16, 32, 64)
LAYOUTS = {
    "x w": (lambda x: x, lambda w: w),
    "x v.T": (lambda x: x, lambda w: w.T.copy().T),
    "v.T w": (lambda x: x.T.copy().T, lambda w: w),
}
# Around the edges of a pack, of the tiles (16, 32, 64) and of the stages (128, 64, 32 deep); the
# last has a row of tiles for the sums alone.
SHAPES = [
    *[(1, 1, 1), (3, 5, 2), (15, 16, 17), (33, 32, 31), (4, 127, 8), (64, 129, 12), (65, 63, 66)],
    *[(10, 300, 10), (64, 64, 64)],
]


def integers(*shape, seed=0):
    """Numbers so small that every sum of products is exact: no tolerance is needed."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype("f4")


def operands(rows, inner, columns, layout="x w"):
    of_x, of_w = LAYOUTS[layout]
    return of_x(integers(rows, inner)), of_w(integers(inner, columns, seed=1))


def meaning(x, w, bias=None, relu=False, gate=None):
    y = x.astype("f8") @ w.astype("f8")
    y = y if bias is None else y + bias
    y = np.maximum(y, 0) if relu else y  # keeps NaN
    return y if gate is None else np.where(gate > 0, y, 0)


def run(variant, x, w, place=lambda a: a, **after):
    """Return (y, sums) as the kernel makes them, in memory that `place` gives."""
    y = place(np.full((x.shape[0], w.shape[1]), 7, "f4"))
    sums = place(np.full(w.shape[1], 7, "f4"))
    assert product(np, variant, x, w, y, sums=sums, **after) is y
    return y, sums


def check(variant, x, w, place=lambda a: a, **after):
    y, sums = run(variant, x, w, place, **after)
    np.testing.assert_array_equal(y, meaning(x, w, **after))
    np.testing.assert_array_equal(sums, w.sum(0))


def afters(rows, columns):
    """Return what may follow a product: each alone, and all together."""
    bias, gate = read_only(integers(columns, seed=2), integers(rows, columns, seed=3))
    each = [{"bias": bias}, {"relu": True}, {"gate": gate}]
    return [{}, *each, {k: v for d in each for k, v in d.items()}]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, side, parts):
    rows, _, columns = shape
    with kernels_on_cpu():
        for layout in LAYOUTS:
            x, w = read_only(*operands(*shape, layout))
            for after in afters(rows, columns):
                check(Variant(side, parts), x, w, **after)
            y = np.empty((rows, columns), "f4")
            product(np, Variant(side, parts), x, w, y)  # without sums
            np.testing.assert_array_equal(y, meaning(x, w))


@pytest.mark.parametrize("side", SIDES)
def test_rounding_is_that_of_float32(side):
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(20, 1000)).astype("f4"), rng.normal(size=(1000, 24)).astype("f4")
    with kernels_on_cpu():
        for parts in (1, 4):
            y, sums = run(Variant(side, parts), x, w)
            # 31 is the root of the sum of the squares; seen: 4e-6
            np.testing.assert_allclose(y, meaning(x, w), rtol=0, atol=31 * 2e-6)
            np.testing.assert_allclose(sums, w.astype("f8").sum(0), rtol=0, atol=31 * 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode, layout):
    with kernels_on_cpu(mode):
        for side in SIDES:
            shapes = [(5, 2048 // side + 3, 7), (4, 8, 12)] + [(side + 1, 4, 6)] * (side < 64)
            for shape in shapes:
                x, w = read_only(*operands(*shape, layout))
                check(Variant(side, 2), x, w, **afters(shape[0], shape[2])[-1])


def test_each_matrix_may_be_misaligned():
    rows, inner, columns = 8, 12, 16
    x, w, gate = integers(rows, inner), integers(inner, columns), integers(rows, columns, seed=3)
    same = np.asarray
    with kernels_on_cpu("asan"):
        for places in itertools.product((same, misaligned), repeat=4):
            of_x, of_w, of_gate, of_y = places
            check(Variant(16, 1), of_x(x), of_w(w), of_y, gate=of_gate(gate))
        check(Variant(16, 2), *operands(8, 256, 16), misaligned)


@pytest.mark.parametrize("columns", [3, 4])
def test_nan_and_infinity(columns):
    """They reach their row and column alone; relu keeps NaN, a closed gate nothing."""
    x, w = np.ones((5, 7), "f4"), np.ones((7, columns), "f4")
    x[1, 6], w[0, 2], x[3, 0] = np.nan, np.inf, -np.inf
    gate = np.ones((5, columns), "f4")
    gate[:, 1] = [0, -1, np.nan, 0, 0]
    with kernels_on_cpu(), np.errstate(invalid="ignore"):
        for side, parts in itertools.product(SIDES, (1, 2)):
            for after in ({}, {"relu": True}, {"gate": gate}):
                y, sums = run(Variant(side, parts), x, w, **after)
                np.testing.assert_array_equal(y, meaning(x, w, **after))
                np.testing.assert_array_equal(sums, w.sum(0))
                assert np.isnan(y[1, 0])


@pytest.mark.parametrize("side", SIDES)
def test_same_bits_in_every_order_of_threads(side):
    rng = np.random.default_rng(6)
    x, w = rng.normal(size=(20, 300)).astype("f4"), rng.normal(size=(300, 40)).astype("f4")
    bits = set()
    for order in (0, 1, 7):
        with kernels_on_cpu(order=order):
            bits.add(b"".join(a.tobytes() for a in run(Variant(side, 2), x, w)))
    assert len(bits) == 1


# ---- what is tried


def named(rows, inner, columns, multiprocessors=132):
    x, w = np.empty((rows, inner), "f4"), np.empty((inner, columns), "f4")
    return [variant.name for variant in variants(x, w, multiprocessors)]


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((128, 512, 10), ["small 16x1", "small 16x4", "small 32x1", "small 32x8", "small 64x1",
                          "small 64x16"]),
        ((128, 784, 512), ["small 16x1", "small 32x1", "small 64x1", "small 64x5"]),
        ((512, 1024, 1024), ["small 16x1", "small 32x1", "small 64x1"]),
        ((1, 1, 1), ["small 16x1", "small 32x1", "small 64x1"]),
        ((513, 1024, 1024), []),
        ((1 << 20, 1, 10), ["small 32x1", "small 64x1"]),
        ((1 << 29, 1, 1), []),
        ((0, 3, 4), []), ((4, 0, 3), []), ((4, 3, 0), []),
    ],
)  # fmt: skip
def test_what_is_tried(shape, names):
    assert named(*shape) == names


def test_parts_are_for_idle_multiprocessors():
    assert named(128, 4096, 64, multiprocessors=6)[-1] == "small 64x2"
    assert named(128, 4096, 64, multiprocessors=5)[-1] == "small 64x1"
    assert named(1, 1 << 20, 1, multiprocessors=132)[-1] == "small 64x32"


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.astype("f8"), w.astype("f8")),
        lambda x, w: (x.astype("f2"), w.astype("f2")),
        lambda x, w: (x.astype(">f4"), w.astype(">f4")),
        lambda x, w: (x[None], w),
        lambda x, w: (x[0], w),
        lambda x, w: (x, w[:, ::2]),
        lambda x, w: (x[:, :3], w[:3]),
        lambda x, w: (x.T.copy().T, w.T.copy().T),
    ],
)
def test_declines(change):
    assert variants(*change(*operands(6, 5, 8)), 132) == []


# ---- planted faults


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("tsan", "of_w.put(shared.stages.w[stage]);\n    __syncthreads();",
         "of_w.put(shared.stages.w[stage]);"),
        ("tsan", "half /= 2) {\n    __syncthreads();", "half /= 2) {"),
        ("tsan", "    __syncthreads();\n    if (slice < half)", "    if (slice < half)"),
        ("tsan", "put(stage ^ 1);", "put(stage);"),
        ("asan", "j < room ? at[j] : 0.0f", "j <= room ? at[j] : 0.0f"),
        ("asan", "o < outers ? end - k : 0", "o <= outers ? end - k : 0"),
        ("asan", "if (c + j >= columns) break;", "if (c + j > columns) break;"),
        ("tsan", "!plain && (r > rows || !sums)", "!plain && !sums"),
        ("asan", "const int height = rows + (sums != nullptr);\n    partial",
         "const int height = rows + 1 + (sums != nullptr);\n    partial"),
        ("asan", "if (packed && room >= kWidth)", "if (packed || room >= kWidth)"),
        ("asan", "float[kDepth][SIDE + kWidth]", "float[kDepth][SIDE + 1]"),
    ],
)  # fmt: skip
def test_planted_faults_are_found(mode, was, now):
    def run_everything():
        for layout in LAYOUTS:
            run(Variant(16, 1), *operands(5, 300, 7, layout), bias=integers(7))
            run(Variant(16, 2), *operands(16, 260, 8, layout), gate=integers(16, 8))

    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises(KernelError, match=r"data race|AddressSanitizer|out of bounds|misaligned"),
    ):
        run_everything()
