"""Every CUDA kernel on the device, against its meaning in float64; what it declines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")

import ml_dtypes
from cpu_kernels import misaligned

from tapegrad import _backend
from tapegrad.kernels import (
    _build,
    elementwise,
    kernel_names,
    linear_relu,
    optimizers,
    random,
    scatter_add,
    small_gemm,
    softmax_cross_entropy,
)
from tests.kernels import test_dropout as dropout_meaning
from tests.kernels import test_linear_relu as linear_meanings
from tests.kernels import test_optimizers as optimizer_meanings
from tests.kernels import test_small_gemm as small_meanings
from tests.kernels import test_softmax_cross_entropy as loss_meanings

from .conftest import on_device

FLOAT = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", FLOAT, ids=lambda dtype: np.dtype(dtype).name)


@pytest.fixture(scope="module")
def launched() -> Iterator[set[str]]:
    """The names of the kernels that this module's tests have launched."""
    names: set[str] = set()
    kernel, call = _build.Source.kernel, _build.Elementwise.__call__

    def noting(source: _build.Source, name: str) -> _build.Kernel:
        names.add(name)
        return kernel(source, name)

    def noting_elementwise(self: _build.Elementwise, *arrays: Any) -> Any:
        names.add(self.name)
        return call(self, *arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build.Source, "kernel", noting)
        patch.setattr(_build.Elementwise, "__call__", noting_elementwise)
        yield names


@pytest.fixture(autouse=True)
def _noted(launched: set[str]) -> None:
    """Note the launches of every test here."""


def host(answer: Any) -> list[np.ndarray[Any, Any]]:
    assert answer is not None, "the kernel declined"
    answer = answer if isinstance(answer, tuple) else (answer,)
    return [_backend.to_numpy(a) for a in answer if a is not None]


# Around the edges of packs, warps, tiles and chunks; the last has several blocks a column.
@pytest.mark.parametrize("shape", [(1, 1), (31, 127), (33, 132), (257, 33), (2000, 136)], ids=str)
@DTYPES
def test_linear_relu(cupy: ModuleType, shape: tuple[int, int], dtype: Any) -> None:
    """Sums of small integers are exact in every type: no tolerance is needed."""
    x, w, b = linear_meanings.layer(*shape, dtype)
    (y,) = host(linear_relu.linear_relu(cupy, *map(on_device, (x, w, b))))
    want = linear_meanings.linear_relu_meaning(x, w, b).astype(dtype)
    np.testing.assert_array_equal(y, want, strict=True)
    g, y = linear_meanings.integers(shape, dtype, 4), linear_meanings.integers(shape, dtype, 5)
    got = host(linear_relu.linear_relu_grad(cupy, on_device(g), on_device(y)))
    for array, want in zip(got, linear_meanings.linear_relu_grad_meaning(g, y), strict=True):
        np.testing.assert_array_equal(array, want.astype(dtype), strict=True)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("side", small_meanings.SIDES)
@pytest.mark.parametrize("layout", small_meanings.LAYOUTS)
def test_small_gemm(cupy: ModuleType, layout: str, side: int, parts: int) -> None:
    variant = small_gemm.Variant(side, parts)
    for shape in [(1, 1, 1), (33, 300, 10), (64, 129, 12), (130, 70, 132)]:
        x, w = small_meanings.operands(*shape, layout)
        y, sums = (cupy.full(s, 7, "f4") for s in ((shape[0], shape[2]), (shape[2],)))
        for after in small_meanings.afters(shape[0], shape[2]):
            there = {k: v if v is True else on_device(v) for k, v in after.items()}
            arrays = on_device(x), on_device(w), y
            small_gemm.product(cupy, variant, *arrays, sums=sums, **there)
            np.testing.assert_array_equal(host(y)[0], small_meanings.meaning(x, w, **after))
            np.testing.assert_array_equal(host(sums)[0], w.sum(0))


@pytest.mark.parametrize("classes", [1, 10, 33, 96, 257, 1000, 1025, 1032, 8200, 50257])
@DTYPES
def test_cross_entropies(cupy: ModuleType, classes: int, dtype: Any) -> None:
    rows = 37
    x = loss_meanings.logits_of(rows, classes, dtype)
    labels = np.random.default_rng(2).integers(0, classes, rows)
    labels[1], labels[2] = -100, classes  # ignored; no class
    q = loss_meanings.probabilities_of(rows, classes, dtype)
    weights = np.linspace(0, 1.5, classes).astype(dtype)
    for smoothing, kind, weighted in itertools.product((0.0, 0.1), ("i4", "i8"), (False, True)):
        options = {"label_smoothing": smoothing, "ignore_label": -100}
        given = [weights] if weighted else []
        want = loss_meanings.label_meaning(x, labels, smoothing, -100, *given)
        arrays = [on_device(a) for a in (x, labels.astype(kind), *given)]
        module = softmax_cross_entropy
        got = host(module.softmax_cross_entropy_with_grad(cupy, *arrays, **options))
        loss_meanings.check(got, want, dtype)
        loss = host(module.softmax_cross_entropy(cupy, *arrays, **options))
        np.testing.assert_array_equal(loss[0].astype("f8"), got[0].astype("f8"))
    arrays = on_device(x), on_device(q)
    got = host(softmax_cross_entropy.probability_cross_entropy_with_grad(cupy, *arrays))
    loss_meanings.check(got, loss_meanings.probability_meaning(x, q), dtype)
    loss = host(softmax_cross_entropy.probability_cross_entropy(cupy, *arrays))
    np.testing.assert_array_equal(loss[0].astype("f8"), got[0].astype("f8"))


@pytest.mark.parametrize("classes", [65536, 131071, 131072])
@DTYPES
def test_cross_entropies_of_few_long_rows(cupy: ModuleType, classes: int, dtype: Any) -> None:
    """Several blocks for each row."""
    x = loss_meanings.logits_of(2, classes, dtype)
    labels = np.array([classes - 1, 5])
    q = loss_meanings.probabilities_of(2, classes, dtype)
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing, "ignore_label": 5}
        want = loss_meanings.label_meaning(x, labels, smoothing, 5)
        arrays = on_device(x), on_device(labels)
        got = host(softmax_cross_entropy.softmax_cross_entropy_with_grad(cupy, *arrays, **options))
        loss_meanings.check(got, want, dtype)
        (loss,) = host(softmax_cross_entropy.softmax_cross_entropy(cupy, *arrays, **options))
        np.testing.assert_array_equal(loss.astype("f8"), got[0].astype("f8"))
    arrays = on_device(x), on_device(q)
    got = host(softmax_cross_entropy.probability_cross_entropy_with_grad(cupy, *arrays))
    loss_meanings.check(got, loss_meanings.probability_meaning(x, q), dtype)
    (loss,) = host(softmax_cross_entropy.probability_cross_entropy(cupy, *arrays))
    np.testing.assert_array_equal(loss.astype("f8"), got[0].astype("f8"))


@pytest.mark.parametrize("size", [1, 5, 257, 4100, 100_003])
@pytest.mark.parametrize("aligned", [True, False])
@DTYPES
@pytest.mark.parametrize("name", optimizer_meanings.RULES)
def test_optimizers(cupy: ModuleType, name: str, dtype: Any, aligned: bool, size: int) -> None:
    _, launcher, _, _, keywords = optimizer_meanings.RULES[name]
    buffers, g = optimizer_meanings.buffers_of(name, size, dtype)
    hyper = [on_device(h) for h in optimizer_meanings.arguments_of(name)[0]]
    place = (lambda b: on_device(b.copy())) if aligned else (lambda b: on_device(misaligned(b)))
    copies = [place(b) for b in buffers]
    assert launcher(cupy, *copies, on_device(g), *hyper, **keywords) is True
    optimizer_meanings.check(name, host(tuple(copies)), buffers, g)


@pytest.mark.parametrize("sizes", [[1], [3, 257], [100_003, 5]])
@DTYPES
def test_gradient_factor(cupy: ModuleType, dtype: Any, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=n).astype(dtype) for n in sizes]
    norm = np.sqrt(sum((g.astype("f8") ** 2).sum() for g in gradients)) / 2.0
    for place in (lambda g: g, misaligned):
        factor, limit, scale = (on_device(np.array(x)) for x in (7.0, 0.5, 2.0))
        arrays = [on_device(place(g)) for g in gradients]
        assert optimizers.gradient_factor(cupy, factor, limit, scale, *arrays) is True
        np.testing.assert_allclose(host(factor)[0], min(1, 0.5 / norm) / 2, rtol=1e-12)
    p, g = on_device(np.zeros(9, dtype)), on_device(np.ones(9, dtype))
    assert optimizers.sgd(cupy, p, g, on_device(np.array(1.0)), on_device(np.array(0.25))) is True
    np.testing.assert_array_equal(host(p)[0], np.full(9, -0.25))


SCATTERED = [(1, 1, 1), (33, 32, 1), (257, 8, 1000), (3000, 129, 9), (40_000, 2, 30_000)]


@pytest.mark.parametrize("shape", SCATTERED, ids=str)
@DTYPES
def test_scatter_add(cupy: ModuleType, shape: tuple[int, int, int], dtype: Any) -> None:
    count, columns, rows = shape
    rng = np.random.default_rng(0)
    values, index = rng.normal(size=(count, columns)).astype(dtype), rng.integers(0, rows, count)
    (got,) = host(scatter_add.scatter_add(cupy, on_device(values), on_device(index), rows))
    wide = np.float64 if dtype == np.float64 else np.float32
    want = np.zeros((rows, columns), wide)
    np.add.at(want, index, values.astype(wide))  # in the kernel's order: the same bits
    np.testing.assert_array_equal(got, want.astype(dtype), strict=True)


@pytest.mark.parametrize("count", [1, 4, 5, 1023, 100_001])
def test_philox(cupy: ModuleType, count: int) -> None:
    key, counter = np.array([12345, 2**63], np.uint64), np.array(2**63 - 2)
    (bits,) = host(random.philox_bits(cupy, on_device(counter), on_device(key), count=count))
    want = np.random.Philox(key=2**127 + 12345, counter=2**63 - 2).random_raw(count)
    np.testing.assert_array_equal(bits, want, strict=True)


@pytest.mark.parametrize("size", [7, 8, 2049, 100_003])
@DTYPES
def test_dropout(cupy: ModuleType, size: int, dtype: Any) -> None:
    state = on_device(np.array(dropout_meaning.COUNTER)), on_device(dropout_meaning.WORDS)
    x = dropout_meaning.values(size, dtype)
    for place in (lambda a: a, misaligned):
        got = host(random.dropout(cupy, on_device(place(x)), *state, rate=0.3))
        dropout_meaning.check(got, dropout_meaning.meaning(x, 0.3))


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_elementwise(cupy: ModuleType, dtype: str) -> None:
    special = np.array([0.0, -0.0, 1.5, -2.0, np.nan, np.inf, -np.inf], dtype)
    a, b = (m.copy() for m in np.meshgrid(special, special))
    with np.errstate(all="ignore"):
        cases: list[tuple[Callable[..., Any], Any]] = [
            (elementwise.scale, np.where(a == 0, 0, a * b)),
            (elementwise.relu_grad, np.where(b > 0, a, 0)),
        ]
    for kernel, want in cases:
        (got,) = host(kernel(cupy, on_device(a), on_device(b)))
        np.testing.assert_array_equal(got, want.astype(dtype), strict=True)
        (got,) = host(kernel(cupy, on_device(special), on_device(b.T.copy().T)))  # broadcast
        np.testing.assert_array_equal(got, want.astype(dtype), strict=True)


X = np.ones((4, 6), np.float32)
LABELS, INDEX = np.zeros(4, np.int64), np.zeros(4, np.int64)
OPTIONS = {"label_smoothing": 0.0, "ignore_label": None}


@pytest.mark.parametrize(
    ("launcher", "arrays", "options"),
    [
        (linear_relu.linear_relu, (X, X.T, np.ones(4, "f8")), {}),
        (linear_relu.linear_relu, (X[:0], X.T, np.ones(4, "f4")), {}),
        (linear_relu.linear_relu, (X[0], X.T, np.ones(4, "f4")), {}),
        (linear_relu.linear_relu, (X, X.T, np.ones(8, "f4")[::2]), {}),
        (linear_relu.linear_relu_grad, (X.T, X.T), {}),
        (linear_relu.linear_relu_grad, (X.astype("i4"), X.astype("i4")), {}),
        (softmax_cross_entropy.softmax_cross_entropy, (X.T, np.zeros(6, "i8")), OPTIONS),
        (softmax_cross_entropy.softmax_cross_entropy, (X, LABELS.astype("i2")), OPTIONS),
        (softmax_cross_entropy.softmax_cross_entropy, (X[:0], LABELS[:0]), OPTIONS),
        (softmax_cross_entropy.probability_cross_entropy, (X, X.astype("f8")), {}),
        (softmax_cross_entropy.probability_cross_entropy, (X, X.T.copy().T), {}),
        (scatter_add.scatter_add, (X.T, np.zeros(6, "i8")), {"rows": 2}),
        (scatter_add.scatter_add, (X, INDEX.astype("i4")), {"rows": 2}),
        (optimizers.sgd, (X[0].astype("f2"), X[0], np.array(0.1)), {}),
        (optimizers.sgd, (X[0, ::2], X[0, ::2], np.array(0.1)), {}),
        (optimizers.sgd, (X[0], X[0], np.array(0.1, "f4")), {}),
        (elementwise.scale, (X, X.astype("f8")), {}),
        (elementwise.relu_grad, (X.astype("i4"), X.astype("i4")), {}),
    ],
)
def test_declined(
    cupy: ModuleType, launcher: Callable[..., Any], arrays: Any, options: dict[str, Any]
) -> None:
    assert launcher(cupy, *map(on_device, arrays), **options) is None


def test_a_scalar_on_the_host_is_declined(cupy: ModuleType) -> None:
    p = on_device(X[0].copy())
    assert optimizers.sgd(cupy, p, p, np.array(0.1)) is None
    assert optimizers.sgd(cupy, p, p, 0.1) is None
    assert elementwise.scale(cupy, p, 2.0) is None


def test_every_kernel_was_launched(launched: set[str], request: pytest.FixtureRequest) -> None:
    ran = {item.originalname for item in request.session.items if item.path == request.path}
    if len(ran) < 9:
        pytest.skip("only when the whole file runs")
    every = {name for names in kernel_names().values() for name in names}
    assert every - launched == set()
