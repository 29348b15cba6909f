"""cuBLASLt's epilogues of training on a fake of it: values, what is refused, and what is chosen."""

from __future__ import annotations

import itertools
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from cpu_kernels import kernels_on_cpu
from cublaslt_emulation import FakeCublasLt, cublaslt_on_cpu, fake, on_threads

import tapegrad as tg
from tapegrad.kernels import cublaslt, epilogues, gemm, gemm_plan
from tests.fake_cupy import FakeCupy

PLAIN, WITH_MASK, RELU_GRAD, SUMS, CUPY = 1, 134, 152, 256, 0  # epilogues as the fake has them
FLOAT = pytest.mark.parametrize(
    "dtype", ["f4", "f2", ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)


@pytest.fixture
def xp():
    return FakeCupy()


def integers(*shape, dtype="f4", seed=0):
    """Numbers so small that every sum of products is exact in every type."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(dtype)


def layers(n=6, i=5, o=8, k=4, dtype="f4"):
    """Return what both products of a layer are given: x, w, b, the gradient above, its weights."""
    shapes = (n, i), (i, o), (o,), (n, k), (o, k)
    return [integers(*shape, dtype=dtype, seed=s) for s, shape in enumerate(shapes)]


def both(xp, x, w, b, g, above):
    """Return y, gz and gb by both launchers, as NumPy's, and whether there was a mask."""
    x, w, b, g, above = (fake(a) if type(a) is np.ndarray else a for a in (x, w, b, g, above))
    y, mask = epilogues.linear_relu_with_mask(xp, x, w, b, above=g.shape[1])
    gz, gb = epilogues.matmul_linear_relu_grad(xp, g, above.T, y, mask)
    return [a.get() for a in (y, gz, gb)], mask.size > 0


def meaning(x, w, b, g, above):
    x, w, b, g, above = (a.astype("f8") for a in (x, w, b, g, above))
    with np.errstate(invalid="ignore"):
        y = np.maximum(x @ w + b, 0)
        gz = np.where(y > 0, g @ above.T, 0)
    return y, gz, gz.sum(0)


def timed(**seconds):
    """Return times by epilogue, of every algorithm or of each."""
    names = {"plain": PLAIN, "with_mask": WITH_MASK, "relu_grad": RELU_GRAD, "cupy": CUPY}
    names["sums"] = SUMS
    table = {names[name]: times for name, times in seconds.items()}

    def seconds_of(epilogue, algorithm):
        times = table.get(epilogue, 9)
        return times[algorithm] if isinstance(times, list) else times

    return seconds_of


MASK_PAYS = timed(plain=4, with_mask=4, relu_grad=3)


def assert_right(got, want, dtype="f4"):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b.astype(dtype), strict=True)


def epilogues_of(lt):
    return [launch.epilogue for launch in lt.launches]


@FLOAT
@pytest.mark.parametrize("shape", [(6, 5, 8, 4), (2, 3, 2, 2), (33, 17, 129, 10), (5, 1, 9, 1)])
def test_values(xp, tmp_path, dtype, shape):
    arrays = layers(*shape, dtype=dtype)
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        both(xp, *arrays)
        before = len(made.launches)
        got, has_mask = both(xp, *arrays)
    assert has_mask
    assert epilogues_of(made)[before:] == [WITH_MASK, RELU_GRAD]
    assert_right(got, meaning(*arrays), dtype)
    assert {c.compute for c in made.launches} == {68}
    assert 1 in shape or made.launches[-1].transposed == (1, 0)  # weights are read where they lie


def test_tf32_only_where_it_is_asked_for(xp, tmp_path, monkeypatch):
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        for on, compute in ((False, 68), (True, 77), (False, 68)):
            monkeypatch.setattr(tg.config, "tf32", on)
            _, has_mask = both(xp, *layers())
            assert has_mask
            assert [c.compute for c in made.launches[-2:]] == [compute] * 2


def test_shape_of_a_mask():
    for columns, row in ((1, 16), (128, 16), (129, 32), (512, 64)):
        assert gemm_plan.mask_shape(7, columns) == (7, row)


@pytest.mark.parametrize("arrays_of", [lambda a: a, lambda a: np.asfortranarray(a)])
def test_layouts_of_the_operands(xp, tmp_path, arrays_of):
    x, w, b, g, above = layers()
    arrays = [arrays_of(x), arrays_of(w), b, arrays_of(g), arrays_of(above)]
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        for _ in range(2):
            got, has_mask = both(xp, *arrays)
            assert has_mask
            assert_right(got, meaning(*arrays))
    assert epilogues_of(made)[-2:] == [WITH_MASK, RELU_GRAD]


# ---- which way


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        (timed(plain=4, with_mask=4, relu_grad=3), True),
        (timed(plain=4, with_mask=4, relu_grad=4), False),  # nothing gained
        (timed(plain=4, with_mask=5, relu_grad=2), True),  # the mask costs 1 and saves 2
        (timed(plain=4, with_mask=6, relu_grad=3), False),
        (timed(plain=4, with_mask=1, relu_grad=8), False),
        (timed(plain=4, with_mask=[9, 9, 4], relu_grad=[8, 3, 9]), True),  # each one's best
        (timed(plain=4, with_mask=4, relu_grad=3, cupy=2), False),  # CuPy's own is the plain way
    ],
)
def test_both_products_are_decided_on_together(xp, tmp_path, seconds, want):
    arrays = layers()
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds), kernels_on_cpu():
        for _ in range(2):
            before = len(made.launches)
            got, has_mask = both(xp, *arrays)
            assert has_mask is want
            assert_right(got, meaning(*arrays))
    used = epilogues_of(made)[before:]
    assert (used == [WITH_MASK, RELU_GRAD]) is want
    assert want or not {WITH_MASK, RELU_GRAD} & {*used}


def test_the_fastest_algorithm_is_launched(xp, tmp_path):
    made = FakeCublasLt(keeps_nan=True)
    seconds = timed(plain=9, with_mask=[5, 4, 3], relu_grad=[5, 3, 4])
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds), kernels_on_cpu():
        both(xp, *layers())
        both(xp, *layers())
        assert [c.algorithm for c in made.launches[-2:]] == [2, 1]
        assert [c.workspace for c in made.launches[-2:]] == [2048, 1024]
        assert not any(c.scratch for c in made.launches[-2:])


WRONG = {
    "ReLU turns NaN into 0": {"keeps_nan": False},
    "the mask lets NaN pass": {"marks_nan": True},
    "the mask lets 0 pass": {"marks_zero": True},
    "the gradient is multiplied by the mask": {"multiplies": True},
    "one of them has no algorithm": {"algorithms": {WITH_MASK: 0}},
    "the other has none": {"algorithms": {RELU_GRAD: -15}},
    "launches fail": {"failing": {(WITH_MASK, i) for i in range(3)}},
    "launches of the other fail": {"failing": {(RELU_GRAD, i) for i in range(3)}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_not_right_is_no_candidate(xp, tmp_path, wrong):
    """NaN and 0 reach both products as the meaning says, though the epilogues would be faster."""
    arrays = layers()
    arrays[2] += 0.5  # no sum is 0: that is what the probe is for
    special = [*map(np.copy, arrays)]
    special[0][1], special[0][2], special[2][:] = np.nan, 0, 0
    special[3][3] = np.inf
    special[3][4] = np.nan
    made = FakeCublasLt(keeps_nan=True)
    vars(made).update(wrong)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        for given in (arrays, special):
            before = len(made.launches)
            got, has_mask = both(xp, *given)
            assert not has_mask
            assert_right(got, meaning(*given))
        assert not {WITH_MASK, RELU_GRAD} & {*epilogues_of(made)[before:]}


def test_special_values_by_the_epilogues(xp, tmp_path):
    arrays = layers()
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        both(xp, *arrays)
        arrays[0][1], arrays[0][2], arrays[2][:] = np.nan, 0, 0
        arrays[3][3], arrays[3][4] = np.inf, np.nan
        got, has_mask = both(xp, *arrays)
    assert has_mask
    assert_right(got, meaning(*arrays))
    assert np.isnan(got[0][1]).all()
    np.testing.assert_array_equal(got[1][1:3], 0)


def declined_cases():
    x, w, b, g, above = layers()
    wide = lambda *arrays: [a.astype("f8") for a in arrays]
    return {
        "float64": wide(x, w, b, g, above),
        "one row": [x[:1], w, b, g[:1], above],
        "one column": [x, w[:, :1], b[:1], g, above[:1]],
        "a part of wider rows": [np.ones((6, 9), "f4")[:, 2:7], w, b, g, above],
    }


@pytest.mark.parametrize("name", declined_cases())
def test_what_is_declined_goes_the_plain_way(xp, tmp_path, name):
    arrays = declined_cases()[name]
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        got, has_mask = both(xp, *arrays)
    assert not has_mask
    assert_right(got, meaning(*arrays), arrays[0].dtype)
    assert not {WITH_MASK, RELU_GRAD} & {*epilogues_of(made)}


def test_what_no_kernel_takes(xp, tmp_path):
    x, w, b, g, above = layers()
    y = np.asfortranarray(np.ones((6, 8), "f4"))
    with cublaslt_on_cpu(xp, tmp_path), kernels_on_cpu():
        for arrays in ((x, w, b[:4]), (x, w, b.astype("f8")), (x[0], w, b), (x, x, b)):
            assert epilogues.linear_relu_with_mask(xp, *map(fake, arrays), above=4) is None
        mask = xp.empty((0,), np.uint8)
        rows = np.ascontiguousarray(y)
        for arrays in [
            (g, above.T, y), (g, above.T, rows.astype("f8")), (g, above.T.astype("f8"), rows),
            (g[None], above.T, rows), (g, above.T, rows[0]),
        ]:  # fmt: skip
            assert epilogues.matmul_linear_relu_grad(xp, *map(fake, arrays), mask) is None


def test_without_the_library(xp, monkeypatch):
    monkeypatch.setattr(cublaslt, "load", lambda: (None, "it was not found"))
    arrays = layers()
    with kernels_on_cpu():
        got, has_mask = both(xp, *arrays)
    assert not has_mask
    assert_right(got, meaning(*arrays))


def test_no_timing_decides_where_that_is_asked_for(xp, tmp_path, monkeypatch):
    monkeypatch.setattr(tg.config, "deterministic", True)
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        assert not both(xp, *layers())[1]
        assert made.timer.timed == []


def test_no_memory_to_time_in(xp, tmp_path, monkeypatch):
    def seconds(epilogue, algorithm):
        if epilogue in (WITH_MASK, RELU_GRAD):
            raise MemoryError
        return 1.0

    def zeros(shape, dtype, ready=xp.zeros):
        if shape == (6, 4):
            raise MemoryError
        return ready(shape, dtype)

    for process, clock in enumerate((seconds, MASK_PAYS)):
        made = FakeCublasLt(keeps_nan=True)
        folder = tmp_path / str(process)
        with cublaslt_on_cpu(xp, folder, made, seconds=clock), kernels_on_cpu():
            if clock is MASK_PAYS:  # but none for what stands for the gradient above
                monkeypatch.setattr(xp, "zeros", zeros, raising=False)
            got, has_mask = both(xp, *layers())
        assert not has_mask
        assert_right(got, meaning(*layers()))
    assert {key[0] for key in made.timer.timed} >= {WITH_MASK}


# ---- once, in this process and in the next


def test_a_problem_is_decided_on_once(xp, tmp_path):
    for process in range(2):
        made = FakeCublasLt(keeps_nan=True)
        with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
            both(xp, *layers())
            assert bool(made.timer.timed) is (process == 0)
            asked, timed_before = len(made.preferences), len(made.timer.timed)
            assert both(xp, *layers())[1]
            assert (len(made.preferences), len(made.timer.timed)) == (asked, timed_before)
            both(xp, *layers(n=7 + process))
            assert len(made.preferences) > asked


@pytest.mark.parametrize(
    "change",
    [
        lambda ways: ways["fused"].__setitem__(1, "07" * 64),
        lambda ways: ways["fused"].__setitem__(2, 1 << 40),
        lambda ways: ways.__setitem__("other", ways["plain"]),
    ],
)
@pytest.mark.parametrize("name", ["linear_relu_with_mask", "matmul_linear_relu_grad"])
def test_algorithms_of_a_foreign_file_are_not_launched(xp, tmp_path, name, change):
    def run():
        made = FakeCublasLt(keeps_nan=True)
        made.known = {
            bytes([e & 255, i, e >> 8] + [0] * 61)
            for e in (PLAIN, 6, WITH_MASK, RELU_GRAD)
            for i in range(3)
        }
        with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
            got, has_mask = both(xp, *layers())
        assert has_mask
        assert_right(got, meaning(*layers()))

    run()
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    (ways,) = [ways for key, ways in content["problems"].items() if key.startswith(name)]
    change(ways)
    path.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match="is not of this device"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_nothing_is_asked_or_timed_during_a_capture(xp, tmp_path):
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        assert both(xp, *layers())[1]
        known = layers(7)
        gemm.matmul(xp, fake(known[3]), fake(known[4]).T)
        epilogues.linear_relu(xp, *map(fake, known[:3]))
        asked, times = len(made.preferences), len(made.timer.timed)
        made.capturing = True
        got, has_mask = both(xp, *layers())
        assert has_mask
        assert_right(got, meaning(*layers()))
        got, has_mask = both(xp, *known)  # met for the first time: the ways that are planned
        assert not has_mask
        assert_right(got, meaning(*known))
        assert (len(made.preferences), len(made.timer.timed)) == (asked, times)
        made.capturing = False
        assert both(xp, *known)[1]  # what was not decided then can be now


def test_threads_do_not_take_each_others_mask(xp, tmp_path):
    """Its address lies in the descriptor, which threads share."""
    made = FakeCublasLt(keeps_nan=True)
    wrong = []
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=MASK_PAYS), kernels_on_cpu():
        both(xp, *layers())
        made.pause = 1e-4

        def work(number):
            arrays = layers()
            arrays[2] = np.full(8, number - 2, "f4")
            want = meaning(*arrays)
            for _ in range(5):
                got, _ = both(xp, *arrays)
                if not all(map(np.array_equal, got, want)):
                    wrong.append(number)

        on_threads(work)
    assert wrong == []


def test_bias_gradients_are_accumulated_in_float32(xp, tmp_path):
    """In float16, 4000 ones would stop at 2048: no candidate where the library does so."""
    ones = [np.ones(s, "f2") for s in ((4000, 1), (1, 2), (2,), (4000, 1), (2, 1))]
    for in_type in (False, True):
        made = FakeCublasLt(keeps_nan=True)
        made.sums_in_type = in_type
        folder = tmp_path / str(in_type)
        with cublaslt_on_cpu(xp, folder, made, seconds=MASK_PAYS), kernels_on_cpu():
            got, has_mask = both(xp, *ones)
            assert has_mask is not in_type
            assert_right(got, meaning(*ones), "f2")
        with cublaslt_on_cpu(xp, folder, made, seconds=SUMS_PAY), kernels_on_cpu():
            pair = np.ones((4000, 2), "f2")
            np.testing.assert_array_equal(with_sums(xp, pair, pair)[1], [4000, 4000])
            assert (SUMS in {key[0] for key in made.timer.timed}) is not in_type


# ---- the gradients of weights and of a bias


SUMS_PAY = timed(plain=4, sums=3)


def with_sums(xp, x, g):
    """Return x.T @ g and the sums of g's columns, as NumPy's."""
    return [a.get() for a in epilogues.matmul_with_sums(xp, fake(x).T, fake(g))]


@FLOAT
@pytest.mark.parametrize("shape", [(6, 5, 8), (2, 3, 2), (300, 17, 33), (1, 2, 3)])
def test_values_of_a_product_and_sums(xp, tmp_path, dtype, shape):
    n, i, o = shape
    x, g = integers(n, i, dtype=dtype), integers(n, o, dtype=dtype, seed=1)
    want = x.T.astype("f8") @ g.astype("f8"), g.astype("f8").sum(0)
    for pays in (True, False):
        seconds = timed(plain=4, sums=3 if pays else 4)
        made = FakeCublasLt()
        with cublaslt_on_cpu(xp, tmp_path / str(pays), made, seconds=seconds), kernels_on_cpu():
            for _ in range(2):
                assert_right(with_sums(xp, x, g), want, dtype)
            assert made.launches[-1].epilogue == (SUMS if pays else PLAIN)
            assert n == 1 or made.launches[-1].transposed == (0, 1)  # read where it lies


@pytest.mark.parametrize("tf32", [False, True])
def test_sums_keep_the_digits_that_tf32_drops(xp, tmp_path, monkeypatch, tf32):
    """Where the library rounds what it adds up there is no candidate: sums are no product."""
    monkeypatch.setattr(tg.config, "tf32", tf32)
    made = FakeCublasLt()
    x, g = integers(300, 5), np.full((300, 8), 1 + 2**-11, "f4")
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=SUMS_PAY), kernels_on_cpu():
        for _ in range(2):
            np.testing.assert_allclose(with_sums(xp, x, g)[1], g.sum(0), 1e-6)
        assert (SUMS in {key[0] for key in made.timer.timed}) is not tf32


def test_the_fastest_way_to_the_sums(xp, tmp_path):
    x, g = integers(6, 5), integers(6, 8, seed=1)
    for number, (seconds, want) in enumerate(
        [
            (timed(plain=4, sums=[9, 3, 9]), (SUMS, 1)),
            (timed(plain=[9, 9, 2], sums=3), (PLAIN, 2)),
            (timed(plain=4, sums=3, cupy=2), None),
        ]
    ):
        made = FakeCublasLt()
        with cublaslt_on_cpu(xp, tmp_path / str(number), made, seconds=seconds), kernels_on_cpu():
            with_sums(xp, x, g)
            before = len(made.launches)
            assert_right(with_sums(xp, x, g), (x.T @ g, g.sum(0)))
            launched = [(c.epilogue, c.algorithm) for c in made.launches[before:]]
            assert launched == ([] if want is None else [want])


@pytest.mark.parametrize("best", [(-1016, 1), (-1032, 5), (-1064, 1)])
def test_sums_by_our_own_kernel_for_small_matrices(xp, tmp_path, best):
    """In one launch, also where cuBLASLt has no such epilogue; out of the file, too."""
    x, g = integers(300, 5), integers(300, 8, seed=1)
    want = x.T @ g, g.sum(0)
    for algorithms in ({}, {SUMS: 0}, {}):
        made = FakeCublasLt()
        made.algorithms = algorithms
        with (
            cublaslt_on_cpu(
                xp, tmp_path, made, seconds=lambda *key: 1 if key == best else 2, small=True
            ),
            kernels_on_cpu(),
        ):
            with_sums(xp, x, g)
            made.launches.clear()
            assert_right(with_sums(xp, x, g), want)
            assert [(c.epilogue, c.algorithm) for c in made.launches] == [best]
            for tried in made.timer.results:
                if isinstance(tried, tuple):
                    assert_right([a.get() for a in tried], want)


def test_our_own_kernel_sums_where_that_is_fastest(xp, tmp_path):
    x, g = integers(300, 5), integers(300, 8, seed=1)
    for number, (own, want) in enumerate([(2, -1032), (3, SUMS), (9, SUMS)]):
        times = {SUMS: 2.5, -1032: own, PLAIN: 4}
        made = FakeCublasLt()
        with (
            cublaslt_on_cpu(
                *(xp, tmp_path / str(number), made),
                seconds=lambda e, _, times=times: times.get(e, 9),
                small=True,
            ),
            kernels_on_cpu(),
        ):
            with_sums(xp, x, g)
            assert_right(with_sums(xp, x, g), (x.T @ g, g.sum(0)))
            assert made.launches[-1].epilogue == want


@pytest.mark.parametrize(
    "arrays",
    [
        (np.ones((6, 5)), np.ones((6, 8))),
        (np.ones((6, 1), "f4"), np.ones((6, 8), "f4")),
        (np.ones((6, 5), "f4"), np.ones((6, 1), "f4")),
    ],
    ids=["float64", "one row", "one column"],
)
def test_sums_that_are_declined_go_the_plain_way(xp, tmp_path, arrays):
    made = FakeCublasLt()
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=SUMS_PAY), kernels_on_cpu():
        x, g = arrays
        assert_right(with_sums(xp, x, g), (x.T @ g, g.sum(0)), x.dtype)
    assert SUMS not in epilogues_of(made)


def test_sums_that_no_kernel_takes(xp, tmp_path):
    x, g = integers(6, 5), integers(6, 8)
    with cublaslt_on_cpu(xp, tmp_path) as made, kernels_on_cpu():
        for arrays in [
            (x.T, np.asfortranarray(g)), (x.T.astype("i4"), g.astype("i4")), (x.T, g.astype("f8")),
            (x.T[None], g), (x.T, g[None]),
        ]:  # fmt: skip
            assert epilogues.matmul_with_sums(xp, *map(fake, arrays)) is None
        assert made.launches == []


def test_no_sums_are_decided_on_during_a_capture(xp, tmp_path):
    x, g = integers(6, 5), integers(6, 8, seed=1)
    made = FakeCublasLt()
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=SUMS_PAY), kernels_on_cpu():
        gemm.matmul(xp, fake(x).T, fake(g))
        made.capturing = True
        assert_right(with_sums(xp, x, g), (x.T @ g, g.sum(0)))
        assert SUMS not in epilogues_of(made)
        made.capturing = False
        with_sums(xp, x, g)
        made.capturing = True
        assert_right(with_sums(xp, x, g), (x.T @ g, g.sum(0)))
        assert made.launches[-1].epilogue == SUMS


# ---- where results are written


@pytest.mark.parametrize("pays", [True, False])
def test_results_are_written_to_memory_that_fits(xp, tmp_path, pays):
    x, w, b, g, above = layers()
    y, gz, gb = meaning(x, w, b, g, above)
    seconds = timed(plain=4, with_mask=3, relu_grad=3, sums=3) if pays else timed(plain=1)
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds), kernels_on_cpu():
        there, mask = epilogues.linear_relu_with_mask(xp, *map(fake, (x, w, b)), above=4)
        assert (mask.size > 0) is pays
        for launcher, arrays, want in [
            (epilogues.matmul_linear_relu_grad, (fake(g), fake(above).T, there, mask), (gz, gb)),
            (epilogues.matmul_with_sums, (there.T, fake(g)), (y.T @ g, g.sum(0))),
        ]:
            shapes = [a.shape for a in want]
            for out in itertools.product(*[(xp.empty(s, "f4"), None) for s in shapes]):
                got = launcher(xp, *arrays, out=out)
                assert_right([a.get() for a in got], want)
                assert [a is b for a, b in zip(got, out, strict=True)] == [
                    a is not None for a in out
                ]
            columns = [xp.empty(s[::-1], "f4").T[:, :1] for s in shapes[:1]]
            got = launcher(xp, *arrays, out=(*columns, xp.empty(shapes[1], "f2")))
            assert_right([a.get() for a in got], want)
