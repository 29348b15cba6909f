"""What is done for large arrays only (blocks, threads, memory used again), tried on small ones."""

from __future__ import annotations

import gc
import re
import time
import warnings

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _blocks, _flat_update
from tapegrad._function import blocks, lowering, own_calls, softmax_calls, update_calls
from tapegrad.ops.elementwise import scale, scale_both
from tests.cases import CASES
from tests.function import test_operations
from tests.function.compiled import assert_same, rewritten
from tests.function.programs import LOSSES
from tests.function.test_random_programs import compare


@pytest.fixture(params=["blocks", "blocks over threads"])
def everything_is_large(request, monkeypatch):
    for module in (blocks, _blocks, _flat_update, update_calls):
        monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(blocks, "LARGE", 1)
    monkeypatch.setattr(lowering, "_RECYCLED", 1)
    monkeypatch.setattr(softmax_calls, "_BY_ROWS", 1)
    if request.param == "blocks over threads":
        monkeypatch.setattr(_blocks, "_THREADS_FROM", 16)
        monkeypatch.setattr(_blocks, "_THREADS", 3)
        monkeypatch.setattr(_blocks, "_pool", None)
        for module in (blocks, _flat_update):  # beside products, too
            monkeypatch.setattr(module, "lanes", lambda size, **_: _blocks.lanes(size))
    yield
    if request.param == "blocks over threads" and _blocks._pool is not None:
        _blocks._pool.shutdown()


@pytest.mark.parametrize("seed", range(500, 525))
def test_random_programs(seed, everything_is_large):
    with rewritten(False):
        compare(seed, 8, None)


@pytest.mark.parametrize("seed", range(525, 545))
def test_random_programs_rewritten(seed, everything_is_large):
    compare(seed, 5, 1e-9, "f8")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "special",
    [0.0, np.nan, -np.nan, -np.inf, np.inf, 800.0, -800.0, [-800.0, 0.0, 1.0], [800.0, 0.0, -1.0],
     [709.5, 709.5, 709.5], [-708.0, -708.0, 0.0], [-500.0, 500.0, 0.0]],
)  # fmt: skip
def test_cross_entropy_by_rows(reduction, special, everything_is_large):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(25, 3)) * 5.0
    logits[7] = special
    classes = rng.integers(0, 3, 25)
    classes[7] = 0
    x, labels = tg.Variable(logits), tg.constant(classes)

    def step(labels):
        with tg.GradientTape() as tape:
            loss = tg.nn.softmax_cross_entropy(x, labels, reduction=reduction)
        return loss, tape.gradient(loss, x)

    f = tg.function(step)
    with np.errstate(all="ignore"):
        want = step(labels)
        for _ in range(4):
            assert_same(f(labels), want, rtol=1e-14)
    assert "softmax_cross_entropy" in f.explain_program()


@pytest.mark.parametrize("factor", [1.0, -1.0, 1e-3])
@pytest.mark.parametrize("offset", [-80.0, 0.0, 60.0, 80.0, 84.0])
def test_gradients_of_exponentials_near_the_ends(offset, factor, everything_is_large):
    """What the exponentials are multiplied by is not rounded to few bits."""
    rng = np.random.default_rng(4)
    near, labels = rng.normal(size=(70, 5)).astype("f4"), tg.constant(rng.integers(0, 5, 70))

    def step(x):
        with tg.GradientTape() as tape:
            tape.watch(x)
            loss = tg.sum(tg.nn.softmax_cross_entropy(x, labels, reduction="none")) * factor
        return tape.gradient(loss, x)

    f = tg.function(step)
    x = tg.constant(near + np.float32(offset))
    for _ in range(4):
        got = f(x)
    assert "softmax_cross_entropy" in f.explain_program()
    assert_same(got, step(x), 4e-6)


@pytest.mark.parametrize("rows", [2, 3, 7, 24, 25, 70, 71])  # from 64 on rows are spread
def test_rows_are_summed_on_the_way(rows, everything_is_large):
    """Of two biases in one run; of what is used otherwise, before and after."""
    rng = np.random.default_rng(rows)
    x, g = tg.Variable(rng.normal(size=(rows, 4))), tg.constant(rng.normal(size=(rows, 4)))
    b, c = tg.Variable(rng.normal(size=4)), tg.Variable(rng.normal(size=4))

    def step(g):
        with tg.GradientTape() as tape:
            y, z = tg.nn.relu(x + b), tg.nn.relu(c - x)
        of_x, of_b, of_c = tape.gradient([y, z], [x, b, c], output_gradients=[g, g])
        return y, z, of_x, of_b, of_c, of_x - of_b, tg.exp(of_c)

    f = tg.function(step)
    for i in range(5):
        b.assign(b + float(i))
        assert_same(f(g), step(g), rtol=1e-14)
    text = f.explain_program()
    assert "run" in text
    assert "dot" not in text


def test_sums_do_not_depend_on_the_faster_thread(everything_is_large, monkeypatch):
    """A lane adds up its own blocks: which these are is fixed where something is added up."""
    rng = np.random.default_rng(0)
    x, b = tg.Variable(rng.normal(size=(200, 4))), tg.Variable(rng.normal(size=4))
    g = tg.constant(rng.normal(size=(200, 4)))

    def step(g):
        with tg.GradientTape() as tape:
            y = tg.nn.relu(x + b)
        return tape.gradient(y, b, output_gradients=g)

    f = tg.function(step)
    lane = _blocks._lane

    def uneven(work, *rest):
        def delayed(s, number):
            if rng.random() < 0.1:
                time.sleep(1e-4)
            work(s, number)

        lane(delayed, *rest)

    monkeypatch.setattr(_blocks, "_lane", uneven)
    found = {f(g).numpy().tobytes() for _ in range(20)}
    assert "run" in f.explain_program()
    assert len(found) <= 2  # of the eager calls at first, and of all others


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_ordinary_numbers(dtype):
    info = np.finfo(dtype)
    for x in (1.0, 1e-30, 1e30, float(info.tiny) * 2**20, float(info.max) / 2**20):
        assert softmax_calls._ordinary(np.array([1.0, x, 1.0], dtype))
        assert softmax_calls._ordinary(np.array([1.0, -x, 1.0], dtype))
    for x in (0.0, info.smallest_subnormal, info.tiny, info.max, np.inf, np.nan, -np.nan):
        assert not softmax_calls._ordinary(np.array([1.0, x, 1.0], dtype))
        assert not softmax_calls._ordinary(np.array([1.0, -x, 1.0], dtype))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_what_is_kept_where_a_number_is_positive(dtype):
    tiny = np.nextafter(np.array(0, dtype), np.array(1, dtype))
    huge = np.finfo(dtype).max
    numbers = [0.0, -0.0, 1.0, -1.0, tiny, -tiny, huge, -huge, np.inf, -np.inf, np.nan, -np.nan]
    y, g = (x.ravel() for x in np.meshgrid(np.array(numbers, dtype), np.array(numbers, dtype)))
    want = np.where(y > 0, g, 0)
    bits = f"u{y.itemsize}"
    for part in (slice(None), y >= 0, y == 1.0, slice(0, 0)):  # with and without what is rare
        out, mask = np.empty_like(g[part]), np.empty(y[part].shape, bits)
        own_calls.keep_positive(y[part].view(bits), g[part].view(bits), mask, out.view(bits))
        np.testing.assert_array_equal(out, want[part])
        own = g[part].view(bits)
        own_calls.keep_positive(y[part].view(bits), own, mask, own)  # in place
        np.testing.assert_array_equal(own.view(dtype), want[part])


@pytest.mark.parametrize("times", [1, 1000])  # of many it is asked in another way
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(("name", "meaning"), [("scaled", scale), ("scaled_both", scale_both)])
def test_products_in_which_zero_wins(name, meaning, dtype, times):
    numbers = np.array([0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan], dtype)
    a, b = (np.tile(x.ravel(), times) for x in np.meshgrid(numbers, numbers))
    with np.errstate(all="ignore"):
        for part in (slice(None), np.isfinite(a * b)):  # with and without what needs mending
            out = np.empty_like(a[part])
            own_calls.OWN_CALLS[name](a[part], b[part], out)
            np.testing.assert_array_equal(out, meaning.forward(np, a[part], b[part]))


@pytest.mark.parametrize("function", [tg.log, tg.nn.relu, lambda x: x / x])
def test_signs_of_zeros_do_not_depend_on_the_block(function, everything_is_large):
    """A NaN in another block, or none: a zero that a product gave keeps its sign."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(40, 3)), np.resize([0.0, -0.0, 1.0, -1.0], (40, 3))
    x[5, 1], g[5, 1], x[17, 2], g[17, 2] = 0.0, 0.0, np.nan, -1.0

    def step(x, g):
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x, output_gradients=g)

    with rewritten(False), np.errstate(all="ignore"):
        f = tg.function(step)
        for _ in range(4):
            assert_same(f(tg.constant(x), tg.constant(g)), step(tg.constant(x), tg.constant(g)))
    assert "run" in f.explain_program()


def plain_gelu(x):
    return 0.5 * x * (1.0 + tg.tanh(0.79788456 * (x + 0.044715 * x * x * x)))


@pytest.mark.parametrize("rewrites", [True, False])
def test_a_chain_is_one_run(rewrites, everything_is_large):
    """Products that are mended where they hold a NaN, choices and casts do not cut it in two."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 4))
    x[3, 1], x[10, 2], x[24, 3] = np.nan, np.inf, 0.0

    def step(x):
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = tg.where(x > 0.0, plain_gelu(x), tg.log(x))
            z = tg.cast(y, "float32") * 2.0
        return tape.gradient(z, x)

    f = tg.function(step)
    with rewritten(rewrites), np.errstate(all="ignore"):
        want = step(tg.constant(x))
        for _ in range(4):
            assert_same(f(tg.constant(x)), want, rtol=1e-14 if rewrites else None)
    assert np.isnan(want.numpy()).any()
    assert len(re.findall(r"run\d+\(", f.explain_program())) == 1
    assert f.programs[0].arena == 0


VIEWS = {
    "transpose": tg.transpose,
    "rows reversed": lambda g: g[::-1],
    "columns reversed": lambda g: g[:, ::-1],
    "first row": lambda g: g[0],
    "last column": lambda g: g[:, -1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_gradients_in_the_optimizers_buffer(name, everything_is_large):
    """A block of the transpose needs all blocks of what it shows."""
    view, inputs = VIEWS[name], np.random.default_rng(1).normal(size=(5, 8, 8))

    def run(compiled):
        w = tg.Variable(np.random.default_rng(0).normal(size=(8, 8)))
        mixed = tg.Variable(np.zeros((8, 8)), trainable=False)
        optimizer = tg.optimizers.SGD(0.1)

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.sum(tg.tanh(w * x) * x)
            g = tape.gradient(loss, w)
            y = view(g) - g * g
            optimizer.apply_gradients([(g, w)])
            mixed.assign(y)

        f = tg.function(step) if compiled else step
        found = []
        for x in inputs:
            f(tg.constant(x))
            found += [+w, +mixed]
        return found

    assert_same(run(True), run(False), rtol=1e-13)


def test_runs_share_their_scratch(everything_is_large, monkeypatch):
    made = []

    class Spare(blocks._Spare):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(blocks, "_Spare", Spare)
    x, w = (tg.constant(np.random.default_rng(k).normal(size=(70, 70))) for k in range(2))

    def layers(count, x):
        for _ in range(count):
            x = plain_gelu((x @ w) * w[0])
        return x

    sizes = []
    for count in (1, 5):
        f = tg.function(lambda x, count=count: layers(count, x))
        for _ in range(4):
            assert_same(f(x), layers(count, x), rtol=1e-14)
        assert len(re.findall(r"run\d+\(", f.explain_program())) == count
        sizes.append(sum(buffer.nbytes for buffer in made[-1]._buffers))
    assert sizes[0] == sizes[1] > 0


def test_one_thread_beside_products(everything_is_large, monkeypatch):
    """Whose own threads would be in the way: of runs, and of an update."""
    counts = []
    for module in (blocks, _flat_update):
        monkeypatch.setattr(module, "lanes", _blocks.lanes)
        plain = module.for_rows
        monkeypatch.setattr(
            module,
            "for_rows",
            lambda *a, plain=plain, **k: (counts.append(a[2]), plain(*a, **k))[1],
        )
    v, optimizer = tg.Variable(np.ones((20, 20))), tg.optimizers.Adam(0.1)

    def step(x, multiply):
        with tg.GradientTape() as tape:
            y = plain_gelu(x @ v if multiply else x * v)
        optimizer.apply([tape.gradient(y, v)], [v])

    for multiply in (False, True):
        f = tg.function(step)
        for _ in range(3):
            f(tg.ones((20, 20), dtype="f8"), multiply)
        counts.clear()
        f(tg.ones((20, 20), dtype="f8"), multiply)
        lanes = _blocks.lanes(400)
        assert len(counts) > 1
        assert set(counts) == {1 if multiply else lanes}


@pytest.mark.parametrize("kind", LOSSES)
def test_special_rows(kind, everything_is_large):
    test_operations.test_special_rows(kind)


ELEMENTWISE = [
    case
    for case in CASES
    if case.name
    in ("add", "multiply", "where", "clip", "tanh", "erf", "nn.gelu", "nn.elu", "power")
    or case.name.startswith(("nn.softmax", "maximum", "divide"))
]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=[case.name for case in ELEMENTWISE])
def test_rows_of_the_table(case, everything_is_large):
    test_operations.test_the_row_compiled(case)


def test_results_in_memory_that_nobody_holds_any_more(everything_is_large):
    def plain(x):
        y = x * 2.0
        return y, tg.exp(x), y[1:], tg.sum(x, axis=0)

    f = tg.function(plain)
    held = []
    rng = np.random.default_rng(0)
    for k in range(60):
        x = tg.constant(rng.normal(size=(5, 3)))
        result = f(x)
        how = k % 6
        if how == 0:
            held.append((result, plain(x)))
        elif how == 1:
            held.append((result[0].array, plain(x)[0].array))
        elif how == 2:
            held.append((result[0][2], plain(x)[0][2]))
        elif how == 3:
            held.append((np.asarray(result[1])[::2], plain(x)[1].numpy()[::2]))
        elif how == 4:
            held.append((tg.transpose(result[0]), tg.transpose(plain(x)[0])))
        else:
            held.append((memoryview(np.asarray(result[1])), np.asarray(plain(x)[1])))
        del result
        if k % 7 == 0:
            gc.collect()
        for got, want in held:
            if isinstance(got, memoryview):
                np.testing.assert_array_equal(np.asarray(got), want)
            else:
                assert_same(got, want)
        if k % 10 == 9:
            held.clear()


def test_results_that_go_into_variables_tapes_and_calls(everything_is_large):
    f = tg.function(lambda x: x * 2.0)
    v = tg.Variable(np.zeros((4, 4)))
    for k in range(8):
        x = tg.constant(np.full((4, 4), float(k)))
        v.assign(f(x))
        with tg.GradientTape() as tape:
            y = f(x)
            z = tg.sum(y * v)
        again = f(f(f(x)))
        np.testing.assert_array_equal(v, x * 2.0)
        np.testing.assert_array_equal(again, x * 8.0)
        np.testing.assert_array_equal(tape.gradient(z, v), x * 2.0)


def test_no_warning_of_numpy_on_other_threads(everything_is_large):
    f = tg.function(lambda x: tg.log(x * 0.0) + tg.exp(x * 1e6) - 1.0 / (x - x))
    x = tg.ones((64, 4))
    with np.errstate(all="ignore"):
        want = f(x)
        f(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(f(x), want)


def test_an_error_in_a_block_is_raised(everything_is_large):
    f = tg.function(lambda x, t: tg.nn.softmax_cross_entropy(x, t))
    x = tg.ones((64, 4))
    labels = np.arange(64) % 4
    for _ in range(3):
        f(x, tg.constant(labels))
    labels[50] = 9
    with pytest.raises(ValueError, match="labels must be from 0 to 3, got 9"):
        f(x, tg.constant(labels))
