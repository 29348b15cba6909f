"""Offsets past 2^32 elements: a grid's last block alone, on memory of which it touches little."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from cpu_kernels import kernels_on_cpu

from tapegrad.kernels import (
    linear_relu,
    optimizers,
    random,
    scatter_add,
    small_gemm,
    softmax_cross_entropy,
)

MAP_NORESERVE = 0x4000
PAST = 2**32


def sparse(*shape, dtype="f4"):
    """Return zeros of which only the pages that are touched take memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size >> 30} GiB of address space: {error}")
    return np.frombuffer(memory, dtype).reshape(shape)


def run_end(module, name, grid, block, *arguments, blocks=1):
    """Launch a kernel, but run only the last `blocks` of its grid."""
    skip = int(np.prod(grid)) - blocks
    module._SOURCE.kernel(name)(grid, block, arguments, skip=skip)


# 65535 blocks down of 8 rows each, the most there are, and so many columns that the end is past.
ROWS, COLUMNS = 65535 * 8, 8200
GRID, BLOCK = (257, 65535), (32, 8)
CORNER = np.s_[-8:, -8:]  # what the last block sees


def corner_values():
    return np.random.default_rng(0).normal(size=(8, 8)).astype("f4")


def test_bias_relu():
    with kernels_on_cpu():
        y, bias = sparse(ROWS, COLUMNS), np.full(COLUMNS, 0.5, "f4")
        y[CORNER] = corner_values()
        sizes = (np.int64(ROWS), np.int32(COLUMNS))
        run_end(linear_relu, "tapegrad_bias_relu<float, 1>", GRID, BLOCK, y, bias, *sizes)
        np.testing.assert_array_equal(y[CORNER], np.maximum(corner_values() + np.float32(0.5), 0))


def test_linear_relu_grad():
    with kernels_on_cpu():
        g, y, gz = sparse(ROWS, COLUMNS), sparse(ROWS, COLUMNS), sparse(ROWS, COLUMNS)
        partial = sparse(GRID[1], COLUMNS)
        g[CORNER] = y[CORNER] = corner_values()
        run_end(
            *(linear_relu, "tapegrad_linear_relu_grad<float, 1>", GRID, BLOCK, g, y, gz),
            *(None, partial, np.int64(ROWS), np.int32(COLUMNS), np.int64(8)),
        )
        want = np.maximum(corner_values(), 0)
        np.testing.assert_array_equal(gz[CORNER], want)
        np.testing.assert_allclose(partial[-1, -8:], want.sum(0), 1e-6)


def check_scatter_add():
    values, out = sparse(ROWS, COLUMNS), sparse(ROWS, COLUMNS)
    values[CORNER] = corner_values()
    index, link = np.arange(ROWS), np.full(ROWS, ROWS)
    run_end(
        *(scatter_add, "tapegrad_scatter_add<float>", GRID, BLOCK),
        *(values, index, link, out, np.int64(ROWS), np.int32(COLUMNS)),
    )
    np.testing.assert_array_equal(out[CORNER], corner_values())


def test_scatter_add():
    with kernels_on_cpu():
        check_scatter_add()


# 65535 tiles of 64 down, and so many columns that the end of x, of the gate and of y is past.
PRODUCT_ROWS, PRODUCT_COLUMNS = 65535 * 64, 1032


def check_small_gemm():
    x, w = sparse(PRODUCT_ROWS, PRODUCT_COLUMNS), np.eye(PRODUCT_COLUMNS, dtype="f4")
    y, gate = (sparse(PRODUCT_ROWS, PRODUCT_COLUMNS) for _ in range(2))
    x[-4:, -4:] = gate[-4:, -4:] = corner_values()[:4, :4]
    run_end(
        *(small_gemm, "tapegrad_small_gemm<64, 8, true, false>", (17, 65535), (256,)),
        *(x, w, y, None, gate, None, None),
        *map(np.int32, (PRODUCT_ROWS, PRODUCT_COLUMNS, PRODUCT_COLUMNS, 1 << 20, 0, 7)),
    )
    np.testing.assert_array_equal(y[-4:, -4:], np.maximum(x[-4:, -4:], 0))


def check_parts_of_small_gemm():
    """The last part of an inner index so long that the end of both operands is past."""
    x, w = (sparse(PRODUCT_ROWS, PRODUCT_COLUMNS) for _ in range(2))
    x[-3:, -6:] = w[-3:, -6:] = 1
    chunk = PRODUCT_ROWS // 4096 // 64 * 64
    size = (17, 17, -(-PRODUCT_ROWS // chunk))
    partial = sparse(size[2], PRODUCT_COLUMNS, PRODUCT_COLUMNS)
    run_end(
        *(small_gemm, "tapegrad_small_gemm<64, 8, false, false>", size, (256,)),
        *(x, w, w, None, None, None, partial),
        *map(np.int32, (PRODUCT_COLUMNS, PRODUCT_COLUMNS, PRODUCT_ROWS, chunk, 0, 0)),
    )
    np.testing.assert_array_equal(partial[-1, -6:, -6:], np.full((6, 6), 3.0))
    y = sparse(PRODUCT_COLUMNS, PRODUCT_COLUMNS)
    run_end(
        *(small_gemm, "tapegrad_small_gemm_sum<1>", (33, 129), (32, 8)),
        *(partial, y, None, None, None),
        *map(np.int32, (size[2], PRODUCT_COLUMNS, PRODUCT_COLUMNS, 0)),
    )
    np.testing.assert_array_equal(y[-6:, -6:], np.full((6, 6), 3.0))


@pytest.mark.parametrize("check", [check_small_gemm, check_parts_of_small_gemm])
def test_small_gemm(check):
    with kernels_on_cpu():
        check()


SHORT = ("short<float, 8, 1>", 250, 128, [np.int32(32)])
LONG = ("long<float, 1>", 50001, 256, [])


def check_cross_entropy(form, columns, threads, lanes):
    rows = PAST // columns + 2
    blocks = -(-rows // (threads // 32)) if lanes else rows
    x, q, dx = (sparse(rows, columns) for _ in range(3))
    loss, labels = sparse(rows), sparse(rows, dtype="i8")
    x[-1, -1], q[-1, -1], labels[-1] = 3, 1, columns - 1
    sizes = (np.int64(rows), np.int32(columns), *lanes)
    log_sum = np.log(np.exp(3.0) + columns - 1)
    smoothing = (np.int32(8), np.int32(0), np.int64(0), np.float32(0), np.float32(1), None)
    for target, extra in ((labels, smoothing), (q, ())):
        kind = "probability" if target is q else "label"
        name = f"tapegrad_{kind}_cross_entropy_{form}"
        loss[-1] = dx[-1, -1] = 7
        run_end(
            *(softmax_cross_entropy, name, (blocks,), (threads,)),
            *(x, target, loss, dx, *sizes, *extra),
        )
        np.testing.assert_allclose(loss[-1], log_sum - 3, 1e-5)
        np.testing.assert_allclose(dx[-1, -1], np.exp(3 - log_sum) - 1, 1e-5)


@pytest.mark.parametrize("case", [SHORT, LONG])
def test_cross_entropy(case):
    with kernels_on_cpu():
        check_cross_entropy(*case)


def check_slices_of_cross_entropy():
    rows, columns, slices = 5, 2**30, 2**16
    x, dx = sparse(rows, columns), sparse(rows, columns)
    loss, labels = np.empty(rows, "f4"), np.full(rows, columns - 1)
    x[-1, -1] = 30
    parts = np.zeros((rows, slices, 4), "f4")
    parts[-1, :, 1] = columns // slices  # of zeros: each the sum of exp(0 - 0)
    sizes = (np.int32(columns), np.int32(columns // slices))
    extra = (np.int32(8), np.int32(0), np.int64(0), np.float32(0), np.float32(1), None)
    name = "tapegrad_label_cross_entropy"
    run_end(
        *(softmax_cross_entropy, f"{name}_scan<float, 1>", (slices, rows), (256,)),
        *(x, labels, parts, *sizes, *extra),
    )
    run_end(
        *(softmax_cross_entropy, f"{name}_finish<float, 1>", (slices, rows), (256,)),
        *(x, labels, parts, loss, dx, *sizes, np.int32(slices), *extra),
    )
    log_sum = np.log(np.exp(30.0) + columns - 1)
    np.testing.assert_allclose(dx[-1, -1], np.exp(30 - log_sum) - 1, 1e-3)
    np.testing.assert_allclose(dx[-1, -2], np.exp(-log_sum), 1e-4)


def test_slices_of_cross_entropy():
    with kernels_on_cpu():
        check_slices_of_cross_entropy()


def check_sgd(width):
    count = PAST + 4 * 200 + 3
    p, g = sparse(count), sparse(count)
    g[-300:] = 1
    grid = (-(-count // width // 256),)
    run_end(
        *(optimizers, f"tapegrad_sgd<float, {width}>", grid, (256,)),
        *(p, g, None, np.int64(count), np.array(2.0)),
    )
    assert p[-4] == -2  # in the last block's last pack; the tail of 3 is the first block's


@pytest.mark.parametrize("width", [1, 4])
def test_optimizers(width):
    with kernels_on_cpu():
        check_sgd(width)


def test_philox():
    count = PAST + 6
    with kernels_on_cpu():
        out = sparse(count, dtype="u8")
        key, counter = np.array([1, 0], np.uint64), np.array(5)
        grid = (-(-count // 4 // 256),)
        run_end(random, "tapegrad_philox", grid, (256,), out, counter, key, np.int64(count))
        want = np.random.Philox(key=1, counter=5 + PAST // 4).random_raw(6)
        np.testing.assert_array_equal(out[-6:], want)


def check_long_cross_entropy():
    check_cross_entropy(*LONG)


def check_short_cross_entropy():
    check_cross_entropy(*SHORT)


@pytest.mark.parametrize(
    ("was", "now", "check"),
    [
        ("xr = x + r * columns;", "xr = x + unsigned(r * columns);", check_long_cross_entropy),
        ("load<N>(x + r * columns", "load<N>(x + unsigned(r * columns)", check_short_cross_entropy),
        (
            "scan<N>(x + r * columns, target",
            "scan<N>(x + unsigned(r * columns), target",
            check_slices_of_cross_entropy,
        ),
        (
            "write_gradient<N>(x + r * columns, dx",
            "write_gradient<N>(x + unsigned(r * columns), dx",
            check_slices_of_cross_entropy,
        ),
        (
            "dx + r * columns, row, seen, begin",
            "dx + unsigned(r * columns), row, seen, begin",
            check_slices_of_cross_entropy,
        ),
        ("load(const T *base, index_t pack)", "load(const T *base, unsigned pack)", check_sgd),
        (
            "index_t(o) * length + k : index_t(k)",
            "unsigned(o) * length + k : index_t(k)",
            check_small_gemm,
        ),
        (
            "index_t(o) * length + k : index_t(k)",
            "index_t(o) * length + k : unsigned(k)",
            check_parts_of_small_gemm,
        ),
        ("first = index_t(r) * columns", "first = unsigned(r) * columns", check_small_gemm),
        ("index_t(blockIdx.z) * height", "blockIdx.z * height", check_parts_of_small_gemm),
        ("(index_t(part) * height", "(unsigned(part) * height", check_parts_of_small_gemm),
        ("out[index[i] * columns + c]", "out[unsigned(index[i] * columns + c)]", check_scatter_add),
        ("values[k * columns + c]", "values[int(k * columns + c)]", check_scatter_add),
    ],
)
def test_offsets_of_32_bits_are_found(was, now, check):
    with kernels_on_cpu(change=(was, now)), pytest.raises(AssertionError):
        check(*([1] if check is check_sgd else []))
