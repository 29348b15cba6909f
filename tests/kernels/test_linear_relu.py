"""linear_relu and its gradient against their meaning in NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, misaligned, read_only

from tapegrad.kernels import linear_relu as module
from tapegrad.kernels.linear_relu import linear_relu, linear_relu_grad


def linear_relu_meaning(x, w, b):
    """In float64; np.maximum keeps NaN."""
    return np.maximum(x.astype("f8") @ w.astype("f8") + b.astype("f8"), 0)


def linear_relu_grad_meaning(g, y):
    gz = np.where(y.astype("f8") > 0, g.astype("f8"), 0)
    return gz, gz.sum(0)


DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16]
# Around the edges of a tile (32 packs of 4), of a pack, of the rows that one block adds up (256)
# and of a chunk of them; the last has more chunks than the second launch has lanes for.
SHAPES = [
    *[(1, 1), (3, 4), (31, 127), (8, 128), (33, 132), (255, 31), (256, 8), (257, 33), (1000, 12)],
    (2000, 132),
]


def integers(shape, dtype, seed):
    """Numbers so small that every sum of them is exact in every dtype: no tolerance is needed."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(dtype)


def layer(rows, columns, dtype):
    return read_only(
        integers((rows, 5), dtype, 1), integers((5, columns), dtype, 2), integers(columns, dtype, 3)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_relu(shape, dtype):
    x, w, b = layer(*shape, dtype)
    with kernels_on_cpu():
        y = linear_relu(np, x, w, b)
    np.testing.assert_array_equal(y, linear_relu_meaning(x, w, b).astype(dtype), strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_relu_grad(shape, dtype):
    g, y = read_only(integers(shape, dtype, 4), np.maximum(integers(shape, dtype, 5), 0))
    with kernels_on_cpu():
        gz, gb = linear_relu_grad(np, g, y)
    want_gz, want_gb = linear_relu_grad_meaning(g, y)
    np.testing.assert_array_equal(gz, want_gz.astype(dtype), strict=True)
    np.testing.assert_array_equal(gb, want_gb.astype(dtype), strict=True)


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        for rows, columns in [(9, 12), (3, 33)]:
            x, w, b = layer(rows, columns, "f4")
            np.testing.assert_array_equal(linear_relu(np, x, w, b), linear_relu_meaning(x, w, b))
        for rows, columns in [(257, 4), (5, 33)]:
            g, y = read_only(integers((rows, columns), "f4", 4), integers((rows, columns), "f4", 5))
            for got, want in zip(
                linear_relu_grad(np, g, y), linear_relu_grad_meaning(g, y), strict=True
            ):
                np.testing.assert_array_equal(got, want)


def test_misaligned_arrays_take_the_scalar_path():
    x, w, b = layer(9, 16, "f4")
    g, y = integers((9, 16), "f4", 4), integers((9, 16), "f4", 5)
    with kernels_on_cpu("asan"):
        np.testing.assert_array_equal(
            linear_relu(np, x, w, misaligned(b)), linear_relu_meaning(x, w, b)
        )
        gz, gb = linear_relu_grad(np, misaligned(g), misaligned(y))
    want_gz, want_gb = linear_relu_grad_meaning(g, y)
    np.testing.assert_array_equal(gz, want_gz)
    np.testing.assert_array_equal(gb, want_gb)


def test_linear_relu_takes_any_layout_of_what_goes_to_the_gemm():
    x, w, b = (
        integers((5, 40), "f4", 1).T,
        integers((24, 10), "f4", 2)[::2, ::2].T,
        np.ones(12, "f4"),
    )
    with kernels_on_cpu():
        np.testing.assert_array_equal(linear_relu(np, x, w, b), linear_relu_meaning(x, w, b))


@pytest.mark.parametrize("columns", [3, 4])
def test_nan_and_infinity(columns):
    special = np.array([np.nan, np.inf, -np.inf], "f4")
    x = np.repeat(special[:, None], columns, 1)
    w, b = np.eye(columns, dtype="f4"), np.zeros(columns, "f4")
    with kernels_on_cpu(), np.errstate(invalid="ignore"):
        y = linear_relu(np, x[:, :1], w[:1], b)
        np.testing.assert_array_equal(y, linear_relu_meaning(x[:, :1], w[:1], b))
        assert np.isnan(y[0, 0])
        # a dead unit passes exactly 0, whatever comes from above, and so does a NaN
        gz, _ = linear_relu_grad(np, x, np.zeros_like(x))
        np.testing.assert_array_equal(gz, np.zeros_like(x))
        gz, gb = linear_relu_grad(np, np.ones_like(x), np.full_like(x, np.nan))
        np.testing.assert_array_equal(gz, np.zeros_like(x))
        np.testing.assert_array_equal(gb, np.zeros(columns))
        gz, gb = linear_relu_grad(np, x, np.ones_like(x))
        np.testing.assert_array_equal(gz, x)
        assert np.isnan(gb).all()


def test_bias_gradient_is_accumulated_in_float32():
    """In float16, 4000 ones would stop at 2048: 2048 + 1 rounds to 2048."""
    g = np.ones((4000, 3), "f2")
    with kernels_on_cpu():
        np.testing.assert_array_equal(linear_relu_grad(np, g, g)[1], [4000] * 3)


def test_bias_gradient_has_the_same_bits_in_every_order_of_threads():
    rng = np.random.default_rng(6)
    g, y = rng.normal(size=(700, 40)).astype("f4"), rng.normal(size=(700, 40)).astype("f4")
    bits = set()
    for order in (0, 1, 7):
        with kernels_on_cpu(order=order):
            bits.add(linear_relu_grad(np, g, y)[1].tobytes())
    assert len(bits) == 1


F4, F8, EMPTY = np.ones((4, 4), "f4"), np.ones((4, 4), "f8"), np.ones((4, 0), "f4")


@pytest.mark.parametrize(
    "arrays",
    [
        (F4, F8, F4[0]),
        (F4, F4, F8[0]),
        (F4.astype("i4"), F4.astype("i4"), F4[0].astype("i4")),
        (F4.astype(">f4"), F4.astype(">f4"), F4[0].astype(">f4")),
        (F4, F4, F4[:, 0]),
        (F4, F4, F4),
        (F4[0], F4, F4[0]),
        (F4[None], F4, F4[0]),
        (F4, F4, F4[0, :3]),
        (F4[:, :3], F4, F4[0]),
        (F4, EMPTY, EMPTY[0]),
        (EMPTY, EMPTY.T, F4[0]),
    ],
)
def test_linear_relu_declines(arrays):
    with kernels_on_cpu():
        assert linear_relu(np, *arrays) is None


@pytest.mark.parametrize(
    ("g", "y"),
    [
        (F4, F8),
        (F4.astype("i8"), F4.astype("i8")),
        (F4.T[:, ::2], F4[:, ::2]),
        (np.asfortranarray(F4), F4),
        (F4[0], F4[0]),
        (F4, F4[:3]),
        (EMPTY, EMPTY),
    ],
)
def test_linear_relu_grad_declines(g, y):
    with kernels_on_cpu():
        assert linear_relu_grad(np, g, y) is None


def test_too_many_columns_decline(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMNS", 3)
    with kernels_on_cpu():
        assert linear_relu(np, F4, F4, F4[0]) is None
        assert linear_relu_grad(np, F4, F4) is None


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("tsan", "  __syncthreads();\n", ""),
        ("asan", "lane < blockDim.y", "lane <= blockDim.y"),
        ("asan", "if (c >= packs) return;", "if (c > packs) return;"),
        ("asan", "end = begin + chunk < rows ? begin + chunk : rows", "end = begin + chunk + 1"),
    ],
)
def test_planted_faults_are_found(mode, was, now):
    x, w, b = layer(9, 12, "f4")
    g, y = integers((257, 4), "f4", 4), integers((257, 4), "f4", 5)

    def run_everything():
        linear_relu(np, x, w, b)
        linear_relu_grad(np, g, y)

    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises(KernelError, match=r"data race|AddressSanitizer|out of bounds"),
    ):
        run_everything()
