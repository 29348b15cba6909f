"""Indices that programs on a GPU compute: captured, in range, and told of where they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend
from tapegrad.errors import TapeWarning
from tests import fake_cupy, test_backends
from tests.function import test_graphs
from tests.function.compiled import assert_same

cupy, on_device = test_backends.cupy, test_graphs.on_device
gpu = fake_cupy.device
X = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("f4")
_ = slice(None)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    tg.config.cuda_graphs, tg.config.debug = True, False
    gpu.null.synchronize()
    for look in tuple(_backend.after_waiting):  # what a failed test has left
        with contextlib.suppress(IndexError):
            look()


def at(*index: Any) -> Callable[..., Any]:
    """Return a lookup of x[index], in which functions make arrays of the given ones."""

    def look_up(x: Any, *arrays: Any) -> Any:
        return x[tuple(part(*arrays) if callable(part) else part for part in index)]

    return look_up


def first(i: Any, *_: Any) -> Any:
    return i


def second(_i: Any, j: Any) -> Any:
    return j


# What is looked up, the shapes of the index arrays and the axes of x that they are for.
LOOKUPS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], list[int]]] = {
    "rows": (at(first), [(3,)], [0]),
    "one row": (at(first), [()], [0]),
    "a table of rows": (at(first), [(2, 3)], [0]),
    "the second axis": (at(_, first), [(3,)], [1]),
    "the last axis": (at(..., first), [(2, 3)], [2]),
    "in the middle": (at(..., first, _), [(3,)], [1]),
    "with a new axis before": (at(None, first), [(3,)], [0]),
    "with a new axis behind": (at(first, None, _), [(3,)], [0]),
    "two arrays": (at(first, second), [(3,), (3,)], [0, 1]),
    "two that broadcast": (at(first, second), [(3, 1), (2,)], [0, 1]),
    "the last two": (at(_, first, second), [(3,), (2, 3)], [1, 2]),
    "two that stand apart": (at(first, _, second), [(3,), (2, 3)], [0, 2]),
    "two with a new axis between": (at(first, None, second), [(3,), (3,)], [0, 1]),
    "a number behind": (at(first, 2), [(3,)], [0]),
    "a number before": (at(1, first), [(2, 2)], [1]),
    "a slice behind": (at(first, slice(1, 4)), [(3,)], [0]),
    "take": (lambda x, i: tg.take(x, i, axis=1), [(3,)], [1]),
    "along an axis": (lambda x, i: tg.take_along_axis(x, i, axis=1), [(4, 2, 6)], [1]),
}


def computed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *arrays: function(x, *[i + 0 for i in arrays])


def padded(x: np.ndarray[Any, Any], axes: list[int], arrays: Any, function: Any) -> Any:
    """Return what NumPy takes where each axis that is looked along ends with a NaN."""
    for axis in axes:
        x = np.insert(x, x.shape[axis], np.nan, axis)
    lengths = [X.shape[axis] for axis in axes]
    moved = [np.where((i < -n) | (i >= n), n, i % n) for i, n in zip(arrays, lengths, strict=True)]
    with tg.backend("numpy"):
        return function(tg.constant(x), *map(tg.constant, moved)).numpy()


@pytest.mark.parametrize("dtype", ["i8", "i4", "u1"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_what_is_out_of_range_is_nan_and_told(name: str, dtype: str) -> None:
    look_up, shapes, axes = LOOKUPS[name]
    rng = np.random.default_rng(1)
    f = tg.function(computed(look_up))
    for call in range(8):
        arrays = [
            rng.integers(0 if dtype == "u1" else -X.shape[a], X.shape[a], s).astype(dtype)
            for s, a in zip(shapes, axes, strict=True)
        ]
        wrong = call > 3 and call % 2
        if wrong:
            k = call % len(arrays)
            n = X.shape[axes[k]]
            beyond = [n, 200, -1 - n, -100][: 2 if dtype == "u1" else 4]
            arrays[k].reshape(-1)[rng.integers(arrays[k].size)] = rng.choice(beyond)
        y = f(tg.constant(X), *map(tg.constant, arrays))
        if wrong:
            with pytest.raises(IndexError, match=r"\[getitem\] index out of bounds for axis \d"):
                y.numpy()
        want = padded(X, axes, arrays, look_up)
        if "slice" in name:  # which may not take the NaN
            assert want.shape == y.shape
        np.testing.assert_array_equal(y.numpy(), want)
        assert np.isnan(want).any() == bool(wrong)
        assert _backend.after_waiting == []
    assert "a CUDA graph of" in f.explain_program()


def test_numbers_apart_from_arrays_are_looked_at_by_the_host() -> None:
    """There NumPy and CuPy put the axes in different places."""
    f = tg.function(lambda x, i: x[0, :, i + 0])
    call = lambda: [f(tg.constant(X), tg.constant([0, 5])) for _call in range(5)][-1]
    with pytest.warns(TapeWarning, match="getitem at"):
        y = call()
    np.testing.assert_array_equal(y.numpy(), X[0, :, [0, 5]])


def rows(x: Any, i: Any) -> Any:
    return x[i + 0]


def test_the_next_call_tells_too() -> None:
    f = tg.function(rows)
    x, fine, wrong = tg.constant(X), tg.constant([0, 3]), tg.constant([0, 4])
    for _call in range(4):
        f(x, fine)
    f(x, wrong)
    f(x, fine)  # the device may not be so far
    gpu.null.synchronize()
    with pytest.raises(IndexError, match=r"axis 0 with size 4, at .*test_lookups.py:\d+, in a cal"):
        f(x, fine)
    for _call in range(3):  # once is enough
        assert f(x, fine).shape == (2, 5, 6)
        gpu.null.synchronize()


@pytest.mark.parametrize("read", ["numpy", "item", "tolist", "float", "bool", "in", "str"])
def test_whatever_waits_for_the_device_tells(read: str) -> None:
    readers: dict[str, Callable[[Any], Any]] = {
        "float": float, "bool": bool, "str": str, "in": lambda x: 1.0 in x,
    }  # fmt: skip
    f = tg.function(lambda x, i: tg.sum(x[i + 0]))
    for i in (0, 0, 0, 0, 7):
        f(tg.constant(X[0, 0]), tg.constant([i]))
    other = tg.constant(1.0)
    with pytest.raises(IndexError, match="size 6"):
        readers.get(read, lambda x: getattr(x, read)())(other)


def test_integers_are_told_of_too() -> None:
    f = tg.function(lambda x, i: tg.sum(x[i + 0]))
    x = tg.constant(np.arange(5))
    for i in (0, 1, 2, 3, 4):
        assert f(x, tg.constant([i])).item() == i
    y = f(x, tg.constant([5]))
    with pytest.raises(IndexError, match="size 5"):
        y.item()


@pytest.mark.parametrize("how", ["debug", "no graphs"])
def test_without_graphs_the_call_itself_raises_and_nothing_is_written(how: str) -> None:
    v = tg.Variable([0.0, 0.0])

    @tg.function
    def step(x: Any, i: Any) -> Any:
        v.assign_add(x[i - 1] * 0.0 + x[i + 0])
        return v + 0.0

    x = tg.constant([1.0, 2.0, 3.0])
    for call in range(8):
        if call == 3 and how == "debug":
            tg.config.debug = True
        if call == 0 and how == "no graphs":
            tg.config.cuda_graphs = False
        step(x, tg.constant([call % 3, 0]))
    before = v.numpy()
    with pytest.raises(IndexError, match=r"^\[getitem\] index out of bounds for axis 0 with siz"):
        step(x, tg.constant([0, 3]))
    np.testing.assert_array_equal(v.numpy(), before)
    tg.config.debug = False
    tg.config.cuda_graphs = True
    for _call in range(3):
        step(x, tg.constant([0, 1]))
    np.testing.assert_array_equal(v.numpy(), np.add(before, [3.0, 6.0]))
    assert "a CUDA graph of" in step.explain_program()


def test_gradients_stay_in_range() -> None:
    """Also of a lookup whose values nobody needs."""
    for needed in (True, False):

        def step(table: Any, i: Any, needed: bool = needed) -> Any:
            with tg.GradientTape() as tape:
                tape.watch(table)
                taken = table[i + 0]
                loss = tg.sum(taken * taken if needed else taken)
            return tape.gradient(loss, table)

        f = tg.function(step)
        table = tg.constant(X[:, :, 0])
        for i in ([0, 3], [1, 1], [3, -4], [2, 0]):
            assert_same(f(table, tg.constant(i)), step(table, tg.constant(i)))
        g = f(table, tg.constant([0, 4]))
        with pytest.raises(IndexError, match="size 4"):
            g.numpy()
        assert np.isfinite(g.numpy()[1:3]).all()
        assert (g.numpy()[1:3] == 0).all()
        assert "a CUDA graph of" in f.explain_program()


@pytest.mark.filterwarnings("ignore:.*cannot be replayed as a CUDA graph")
@pytest.mark.parametrize("update", ["assign", "assign_add", "assign_sub"])
def test_parts_that_are_assigned(update: str) -> None:
    mine, other = (tg.Variable(np.zeros((4, 2), "f4")) for _v in range(2))
    f = tg.function(lambda i, x: [getattr(mine[i + 0], update)(x)][:0])
    x = tg.constant(X[0, :3, :2])
    for i in ([0, 1, 2], [3, 3, 3], [-1, 0, -4], [2, 0, 2], [1, 1, 2]):
        f(tg.constant(i), x)
        getattr(other[tg.constant(i)], update)(x)
        assert_same(mine, other)
    before = mine.numpy()
    with pytest.raises(IndexError, match=rf"^\[{update}\] index out of bounds .* size 4"):
        f(tg.constant([0, 1, 4]), x)
    np.testing.assert_array_equal(mine.numpy(), before)


def test_several_steps_a_launch() -> None:
    i = np.arange(24) % 4
    i[13] = 9
    f = tg.function(lambda i: tg.sum(tg.constant(X)[i + 0]))
    steps = tg.data.Steps(f, tg.data.Batches(i, 2), 3)
    told = []
    for epoch in range(3):
        for k, sums in enumerate(steps):
            try:
                sums.numpy()
            except IndexError:
                told.append((epoch, k))
            want = np.array([i[6 * k + 2 * n : 6 * k + 2 * n + 2].max() > 3 for n in range(3)])
            np.testing.assert_array_equal(np.isnan(sums.numpy()), want)
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_callers_on_streams_of_their_own() -> None:
    f = tg.function(rows)
    streams = [gpu.null, fake_cupy.Stream(non_blocking=True), fake_cupy.Stream()]
    told = []
    for call in range(12):
        with streams[call % 3] as stream:
            y = f(tg.constant(X), tg.constant([call % 4 if call != 7 else 4]))
            try:
                y.numpy()
            except IndexError:
                told.append(call)
            stream.synchronize()
    assert told == [7]


@pytest.mark.filterwarnings("ignore:.*computes with NumPy's arrays too")
def test_arrays_of_numpy_in_a_program_on_a_device() -> None:
    def look_up(x: Any, i: Any) -> Any:
        x, i = (tg.to_backend(value, "numpy") for value in (x, i))
        return tg.to_backend(x[i + 0], "cupy") * 2.0

    f = tg.function(look_up)
    for i in ([0, 1], [2, 3], [-1, -4], [1, 1], [3, 0]):
        np.testing.assert_array_equal(f(tg.constant(X), tg.constant(i)).numpy(), X[i] * 2)
    with pytest.raises(
        IndexError, match=r"^\[getitem\] index out of bounds for axis 0 with size 4"
    ):
        f(tg.constant(X), tg.constant([0, 4]))


def test_constant_masks_are_captured() -> None:
    masks = [X[:, 0, 0] > 0, X[:, :, 0] > 0, X > 0]
    for mask in masks:
        f = tg.function(lambda x, mask=mask: tg.sum(x[mask] * 2.0))
        for k in range(5):
            got = f(tg.constant(X * k)).numpy()
            np.testing.assert_allclose(got, (X * k)[mask].sum() * 2, rtol=1e-5, atol=1e-6)
        assert "a CUDA graph of" in f.explain_program()
    f = tg.function(lambda x, i: x[masks[0], :, i + 0])
    for _call in range(5):
        i = np.arange(masks[0].sum()) % 6
        np.testing.assert_array_equal(f(tg.constant(X), tg.constant(i)).numpy(), X[masks[0], :, i])
    assert "a CUDA graph of" in f.explain_program()
