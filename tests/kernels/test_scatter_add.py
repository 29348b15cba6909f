"""scatter_add against numpy.add.at."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, read_only

from tapegrad.kernels import _build
from tapegrad.kernels import scatter_add as module
from tapegrad.kernels.scatter_add import scatter_add


@pytest.fixture(params=["pairs", "sorted"], autouse=True)
def way(request, monkeypatch):
    """How equal entries are found."""
    if request.param == "sorted":
        monkeypatch.setattr(module, "_FEW", 0)
    return request.param


def meaning(values, index, rows):
    """In the dtype of the values: rows added one after the other, as the kernel does."""
    out = np.zeros((rows, values.shape[1]), values.dtype)
    np.add.at(out, index, values)
    return out


def data(count, columns, rows, dtype="f4", seed=0):
    rng = np.random.default_rng(seed)
    return read_only(rng.normal(size=(count, columns)).astype(dtype), rng.integers(0, rows, count))


SHAPES = [
    (1, 1, 1),
    (7, 3, 20),
    (31, 33, 5),
    (33, 32, 1),
    (257, 8, 1000),
    (1000, 1, 3),
    (50, 129, 9),
]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_a_loop_over_the_rows(shape, dtype):
    values, index = data(*shape, dtype)
    with kernels_on_cpu():
        out = scatter_add(np, values, index, shape[2])
    np.testing.assert_array_equal(out, meaning(values, index, shape[2]), strict=True)


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits_are_accumulated_in_float32(dtype):
    values, index = data(500, 5, 3, dtype)
    with kernels_on_cpu():
        out = scatter_add(np, values, index, rows=3)
    want = meaning(values.astype("f4"), index, 3).astype(dtype)
    np.testing.assert_array_equal(out, want, strict=True)


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        for shape in [(9, 3, 4), (3, 33, 2)]:
            values, index = data(*shape)
            out = scatter_add(np, values, index, shape[2])
            np.testing.assert_array_equal(out, meaning(values, index, shape[2]))


def test_same_bits_in_every_order_of_threads():
    values, index = data(300, 7, 11)
    bits = set()
    for order in (0, 1, 7):
        with kernels_on_cpu(order=order):
            bits.add(scatter_add(np, values, index, 11).tobytes())
    assert len(bits) == 1


def test_more_positions_than_threads_in_a_launch(monkeypatch):
    monkeypatch.setattr(module, "row_blocks", lambda *_: 1)
    values, index = data(700, 9, 300)
    with kernels_on_cpu():
        np.testing.assert_array_equal(
            scatter_add(np, values, index, 300), meaning(values, index, 300)
        )


def test_nan_and_infinity_stay_in_their_row():
    values = np.array([[np.nan], [np.inf], [1.0], [-np.inf]], "f4")
    with kernels_on_cpu():
        out = scatter_add(np, values, np.array([2, 0, 1, 3]), 5)
    np.testing.assert_array_equal(out[:, 0], [np.inf, 1, np.nan, -np.inf, 0])


VALUES, INDEX = np.ones((4, 3), "f4"), np.zeros(4, "i8")


@pytest.mark.parametrize(
    ("values", "index", "rows"),
    [
        (VALUES.astype("i4"), INDEX, 2),
        (np.asfortranarray(VALUES), INDEX, 2),
        (VALUES[:, 0], INDEX, 2),
        (VALUES[None], INDEX[:1], 2),
        (VALUES[:0], INDEX[:0], 2),
        (VALUES[:, :0], INDEX, 2),
        (VALUES, INDEX, 0),
        (VALUES, INDEX[:3], 2),
        (VALUES, INDEX.astype("i4"), 2),
        (VALUES, np.zeros(8, "i8")[::2], 2),
    ],
)
def test_declined(values, index, rows):
    with kernels_on_cpu():
        assert scatter_add(np, values, index, rows) is None


def test_too_many_columns_decline(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMNS", 2)
    with kernels_on_cpu():
        assert scatter_add(np, VALUES, INDEX, 2) is None


@pytest.mark.parametrize(
    ("way", "mode", "was", "now"),
    [
        # two threads that believe they start the same run
        ("pairs", "tsan", "first = first && start + k >= i;", ""),
        ("sorted", "tsan", "p == 0 || index[order[p - 1]] != mine", "p % 2 == 0"),
        ("pairs", "tsan", "    __syncthreads();\n    for", "    for"),
        ("pairs", "asan", "threadIdx.x < length", "true"),
        ("pairs", "asan", "i < count ? index[i] : 0", "index[i]"),
        ("sorted", "asan", "p + 1 < count && ", ""),
        ("pairs", "asan", "if (c >= columns) return;", "if (c > columns) return;"),
        ("pairs", "fast", " && next == count", ""),
        ("sorted", "fast", "index_t k = i;", "index_t k = link[i];"),
    ],
    indirect=["way"],
)
def test_planted_faults_are_found(way, mode, was, now, monkeypatch):
    values, index = np.ones((9, 3), "f4"), np.repeat([0, 1, 2], 3)
    with kernels_on_cpu(mode, change=(was, now)):
        faulty = _build.raw_module
    with kernels_on_cpu(mode):
        plain = _build.raw_module

    def build(*, code, **arguments):  # of the two sources one has the fault
        return (faulty if was in code else plain)(code=code, **arguments)

    monkeypatch.setattr(_build, "raw_module", build)
    with pytest.raises((KernelError, AssertionError), match=r"race|AddressSanitizer|not equal"):
        np.testing.assert_array_equal(scatter_add(np, values, index, 3), meaning(values, index, 3))
