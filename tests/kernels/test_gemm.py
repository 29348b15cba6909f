"""Whole launches through a fake cuBLASLt, on arrays of a stand-in for CuPy: values and choices."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest
from cpu_kernels import kernels_on_cpu
from cublaslt_emulation import FakeCublasLt, cublaslt_on_cpu, fake, on_threads

import tapegrad as tg
from tapegrad.kernels import cublaslt, gemm, linear_relu
from tests.fake_cupy import FakeCupy, device

BFLOAT16 = ml_dtypes.bfloat16
PLAIN, BIAS, RELU_BIAS, CUPY = 1, 4, 6, 0  # epilogues as the fake reports them


@pytest.fixture
def xp():
    return FakeCupy()


@pytest.fixture
def lt(xp, tmp_path):
    with cublaslt_on_cpu(xp, tmp_path) as made, kernels_on_cpu():
        yield made


def integers(*shape, dtype="f4", seed=0):
    """Numbers so small that every sum of products is exact in every type."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", BFLOAT16], ids=lambda d: np.dtype(d).name)
def test_values_and_types(xp, lt, dtype):
    x, w, b = integers(6, 5, dtype=dtype), integers(5, 8, dtype=dtype), integers(8, dtype=dtype)
    z = x.astype("f8") @ w.astype("f8")
    for launcher, arrays, want in [
        (gemm.matmul, (x, w), z),
        (gemm.linear, (x, w, b), z + b.astype("f8")),
        (linear_relu.linear_relu, (x, w, b), np.maximum(z + b.astype("f8"), 0)),
    ]:
        y = launcher(xp, *map(fake, arrays))
        np.testing.assert_array_equal(y.get(), want.astype(dtype), strict=True)
        for tried in lt.timer.results:  # every candidate, CuPy's own too
            np.testing.assert_array_equal(tried.get(), want.astype(dtype), strict=True)
        lt.timer.results.clear()
        compute, scale = (70, 1) if dtype == "f8" else (68, 0)  # float16 in float32
        assert {(c.compute, c.scale, c.stream) for c in lt.launches} == {
            (compute, scale, device.stream.ptr or None)
        }
        lt.launches.clear()


def test_float16_is_accumulated_in_float32(xp, lt):
    """In float16, 4000 ones would stop at 2048, and parts rounded to it are no better."""
    ones = np.ones((1, 4000), "f2")
    assert gemm.matmul(xp, fake(ones), fake(ones.T.copy())).get() == 4000
    assert {p[3] for p in lt.preferences} == {2}  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
    lt.preferences.clear()
    gemm.matmul(xp, fake(integers(2, 2)), fake(integers(2, 2)))
    assert {p[3] for p in lt.preferences} == {7}


def test_tf32_only_where_it_is_asked_for(xp, lt, settings):
    x = np.array([[1 + 2**-12]], "f4")
    one = np.ones((1, 1), "f4")
    assert gemm.matmul(xp, fake(x), fake(one)).get() == 1 + 2**-12
    settings(tf32=True)
    assert gemm.matmul(xp, fake(x), fake(one)).get() == 1
    assert lt.launches[-1].compute == 77
    wide = gemm.matmul(xp, fake(x.astype("f8")), fake(one.astype("f8")))
    assert (wide.get(), lt.launches[-1].compute) == (1 + 2**-12, 70)
    settings(tf32=False)
    assert gemm.matmul(xp, fake(x), fake(one)).get() == 1 + 2**-12


@pytest.fixture
def settings():
    """Change settings for a test, and set them back."""
    before = tg.config.tf32, tg.config.deterministic

    def change(**values):
        for name, value in values.items():
            setattr(tg.config, name, value)

    yield change
    change(tf32=before[0], deterministic=before[1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (1, 7, 1), (33, 17, 10)], ids=str)
def test_operations_and_their_gradients(xp, lt, shape):
    """Transposed operands are read where they lie: by strides, without copies."""
    n, i, o = shape
    arrays = [integers(n, i), integers(i, o, seed=1), integers(o, seed=2)]
    for function, inputs in [
        (tg.matmul, arrays[:2]),
        (tg.nn.linear, arrays),
        (tg.nn.linear_relu, arrays),
    ]:
        found = []
        for backend in ("numpy", "cupy"):
            with tg.backend(backend), tg.GradientTape() as tape:
                variables = [tg.Variable(a) for a in inputs]
                y = function(*variables)
                upstream = tg.constant(integers(n, o, seed=3))
                gradients = tape.gradient(y, variables, upstream)
                found.append([y.numpy(), *(g.numpy() for g in gradients)])
        for got, want in zip(*reversed(found), strict=True):
            np.testing.assert_array_equal(got, want, strict=True)
    assert {c.transposed for c in lt.launches} == {(0, 0), (1, 0), (0, 1)} or 1 in shape


STACKS = [((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (4, 5))]


@pytest.mark.parametrize("dtype", ["f4", BFLOAT16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shapes", STACKS, ids=str)
def test_stacks(xp, lt, shapes, dtype):
    """Those of bfloat16 CuPy refuses: it is not tried."""
    x, w = integers(*shapes[0], dtype=dtype), integers(*shapes[1], dtype=dtype, seed=1)
    y = gemm.matmul(xp, fake(x), fake(w))
    np.testing.assert_array_equal(y.get(), (x.astype("f4") @ w.astype("f4")).astype(dtype))
    lt.launches.clear()
    with tg.backend("cupy"):
        np.testing.assert_array_equal(tg.matmul(x, w).numpy(), x @ w)
    assert len(lt.launches) == 1


def test_what_cannot_be_read_is_copied(xp, lt):
    for x, w in [
        (integers(4, 6)[:, ::2], integers(3, 5)),
        (integers(4, 3), integers(3, 5)[::-1]),
        (np.broadcast_to(integers(3), (4, 3)), integers(6, 10)[::2, ::2]),
    ]:
        y = gemm.matmul(xp, fake(x), fake(w))
        np.testing.assert_array_equal(y.get(), x @ w)
    assert lt.launches


def test_what_is_declined(xp, lt):
    x, w, b = integers(3, 4), integers(4, 5), integers(5)
    for arrays in [
        (x, w.astype("f8")), (x.astype("i4"), w.astype("i4")), (x[:0], w), (x[:, :0], w[:0]),
        (x, x), (x.astype(">f4"), w.astype(">f4")), (x[0], w), (integers(2, 5, 3, 4)[:, :2], w),
        (x.astype("c8"), w.astype("c8")),
    ]:  # fmt: skip
        assert gemm.matmul(xp, *map(fake, arrays)) is None
    for arrays in [
        (x, w, b.astype("f8")), (x, w, b[:4]), (x, w, integers(10)[::2]), (x[None], w, b),
        (x, w, b[:, None]),
    ]:  # fmt: skip
        assert gemm.linear(xp, *map(fake, arrays)) is None
    assert gemm.matmul(np, x, w) is None
    assert not lt.launches


def test_arrays_of_another_device_are_declined(xp, lt):
    xp.cuda.runtime.getDevice = lambda: 1
    assert gemm.matmul(xp, fake(integers(3, 4)), fake(integers(4, 5))) is None


def test_without_the_library(xp, monkeypatch):
    monkeypatch.setattr(cublaslt, "load", lambda: (None, "it was not found"))
    x = fake(integers(3, 3))
    assert gemm.matmul(xp, x, x) is None
    assert gemm.linear(xp, x, x, x[0]) is None
    assert gemm.describe(xp) == "not used: it was not found; CuPy's own products run"
    with kernels_on_cpu():
        y = linear_relu.linear_relu(xp, x, x, x[0])
    np.testing.assert_array_equal(y.get(), np.maximum(x.get() @ x.get() + x.get()[0], 0))


def test_without_a_handle(xp, tmp_path):
    """A driver too old for the library, say: asked once."""
    made = FakeCublasLt()
    made.no_handle = True
    with cublaslt_on_cpu(xp, tmp_path, made):
        x = fake(integers(3, 3))
        assert gemm.matmul(xp, x, x) is None
        made.no_handle = False
        assert gemm.matmul(xp, x, x) is None
        assert gemm.describe(xp) == (
            "not used: cublasLtCreate failed with status 1: not initialized; "
            "CuPy's own products run"
        )


def test_the_description(xp, lt):
    assert gemm.describe(xp) == "13.10.0, in use"
    assert gemm.describe(np).startswith("not in use")


# ---- which way


def ways(lt):
    return [(c.epilogue, c.algorithm) for c in lt.launches]


def chosen(xp, lt, launcher, arrays):
    """Return what a call launches once everything is timed; [] is CuPy's own way."""
    launcher(xp, *map(fake, arrays))
    before = len(lt.launches)
    answer = launcher(xp, *map(fake, arrays))
    return ways(lt)[before:], answer


LAYER = integers(4, 3), integers(3, 5, seed=1), integers(5, seed=2)


def timed(**seconds):
    """Return times by epilogue: plain, bias, relu, cupy; the algorithms 0, 1, 2 as given."""
    numbers = {"plain": PLAIN, "bias": BIAS, "relu": RELU_BIAS, "cupy": CUPY}
    table = {numbers[name]: times for name, times in seconds.items()}
    return lambda epilogue, algorithm: table[epilogue][algorithm]


@pytest.mark.parametrize(
    ("seconds", "launcher", "keeps_nan", "want"),
    [
        (timed(plain=[3, 1, 2], cupy=[9]), gemm.matmul, False, [(PLAIN, 1)]),
        (timed(plain=[3, 4, 2], cupy=[1]), gemm.matmul, False, []),
        (timed(plain=[3, 4, 2], cupy=[2]), gemm.matmul, False, [(PLAIN, 2)]),
        (timed(plain=[3, 3, 2], bias=[1, 2, 3], cupy=[9]), gemm.linear, False, [(BIAS, 0)]),
        (timed(plain=[3, 3, 1], bias=[4, 2, 3], cupy=[9]), gemm.linear, False, [(PLAIN, 2)]),
        (timed(plain=[3, 3, 3], bias=[4, 5, 4], cupy=[2]), gemm.linear, False, []),
        (
            timed(plain=[3, 2, 3], relu=[1, 1, 1], cupy=[9]),
            linear_relu.linear_relu,
            True,
            [(RELU_BIAS, 0)],
        ),
        (  # fastest, but it turns NaN into 0
            timed(plain=[3, 2, 3], relu=[1, 1, 1], cupy=[9]),
            linear_relu.linear_relu,
            False,
            [(PLAIN, 1)],
        ),
    ],
)
def test_the_fastest_way_is_taken(xp, tmp_path, seconds, launcher, keeps_nan, want):
    arrays = LAYER[:2] if launcher is gemm.matmul else LAYER
    made = FakeCublasLt(keeps_nan=keeps_nan)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds), kernels_on_cpu():
        got, answer = chosen(xp, made, launcher, arrays)
        assert got == want
        if launcher is linear_relu.linear_relu:  # whatever its way, it answers
            x, w, b = LAYER
            np.testing.assert_array_equal(answer.get(), np.maximum(x @ w + b, 0))
        else:
            assert (answer is None) == (want == [])


@pytest.mark.parametrize("keeps_nan", [False, True])
def test_relu_keeps_nan_on_every_way(xp, tmp_path, keeps_nan):
    x, w, b = np.array([[np.nan], [1], [-1]], "f4"), np.ones((1, 4), "f4"), np.zeros(4, "f4")
    seconds = timed(plain=[2, 2, 2], relu=[1, 1, 1], cupy=[9])
    made = FakeCublasLt(keeps_nan=keeps_nan)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds), kernels_on_cpu():
        for _ in range(2):
            y = linear_relu.linear_relu(xp, *map(fake, (x, w, b))).get()
            np.testing.assert_array_equal(y[:, 0], [np.nan, 1, 0])
        assert made.launches[-1].epilogue == (RELU_BIAS if keeps_nan else PLAIN)
        made.failing = {(RELU_BIAS, 0)}  # it cannot even be asked
        y = linear_relu.linear_relu(xp, *map(fake, (x[:2], w, b))).get()
        np.testing.assert_array_equal(y[:, 0], [np.nan, 1])
        assert made.launches[-1].epilogue == (RELU_BIAS if keeps_nan else PLAIN)


def test_what_the_library_refuses_is_no_candidate(xp, tmp_path):
    made = FakeCublasLt()
    made.failing = {(BIAS, 0), (PLAIN, 1)}
    seconds = timed(plain=[3, 1, 4], bias=[1, 2, 2], cupy=[9])
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds):
        assert chosen(xp, made, gemm.linear, LAYER)[0] == [(BIAS, 1)]
        assert chosen(xp, made, gemm.matmul, LAYER[:2])[0] == [(PLAIN, 0)]
        w, b = LAYER[1:]
        for n, status in enumerate((0, -7, -8, -15)):  # no algorithm at all
            made.algorithms = {BIAS: status}
            x = integers(20 + n, 3)
            assert chosen(xp, made, gemm.linear, (x, w, b))[0] == [(PLAIN, 0)]
        made.algorithms = {PLAIN: -14}
        with pytest.raises(cublaslt.CublasLtError, match="GetHeuristic failed with status 14: int"):
            gemm.matmul(xp, fake(integers(30, 3)), fake(w))
        made.algorithms = {PLAIN: 0}
        assert chosen(xp, made, gemm.matmul, (x, w))[0] == []
        made.algorithms, made.unusable, made.failing = {}, {1}, set()
        x = integers(8, 3)
        assert chosen(xp, made, gemm.matmul, (x, w))[0] == [(PLAIN, 0)]
        made.failing = {(PLAIN, 0)}
        with pytest.raises(cublaslt.CublasLtError, match="cublasLtMatmul failed with status 13"):
            gemm.matmul(xp, *map(fake, LAYER[:2]))  # planned before; now it fails


SMALL = [(-16, 1), (-32, 1), (-64, 1)]  # a layer as small as LAYER is not cut into parts


@pytest.mark.parametrize("best", SMALL)
def test_our_own_kernel_for_small_matrices(xp, tmp_path, best):
    """With the bias and the ReLU inside; both may be transposed; NaN stays."""
    x, w, b = integers(6, 5), integers(5, 8, seed=1), integers(8, seed=2)
    x[1, 1] = np.nan
    with (
        cublaslt_on_cpu(
            xp, tmp_path, seconds=lambda *key: 1 if key == best else 2, small=True
        ) as made,
        kernels_on_cpu(),
    ):
        for layout in (lambda a: a, lambda a: a.T.copy().T):
            z = x @ w
            for launcher, arrays, want in [
                (gemm.matmul, (layout(x), w), z),
                (gemm.matmul, (x, layout(w)), z),
                (gemm.linear, (x, layout(w), b), z + b),
                (linear_relu.linear_relu, (layout(x), w, b), np.maximum(z + b, 0)),
            ]:
                launched, y = chosen(xp, made, launcher, arrays)
                assert launched == [best]
                np.testing.assert_array_equal(y.get(), want)
                for tried in made.timer.results:
                    np.testing.assert_array_equal(tried.get()[2:], want[2:])
                made.timer.results.clear()


def test_small_matrices_in_parts(xp, tmp_path):
    x, w, b = integers(20, 300), integers(300, 10, seed=1), integers(10, seed=2)
    seconds = {(-32, 5): 1}
    with (
        cublaslt_on_cpu(xp, tmp_path, seconds=lambda *key: seconds.get(key, 2), small=True) as made,
        kernels_on_cpu(),
    ):
        launched, y = chosen(xp, made, linear_relu.linear_relu, (x, w, b))
        assert launched == [(-32, 5)]
        np.testing.assert_array_equal(y.get(), np.maximum(x @ w + b, 0))


def test_when_our_own_kernel_is_tried(xp, tmp_path, settings):
    """In float32, where TF32 is allowed too; not where no timing may decide."""

    def tried(*arrays):
        before = len(made.timer.timed)
        gemm.matmul(xp, *map(fake, arrays))
        return [key for key in made.timer.timed[before:] if key[0] < 0]

    x, w = integers(4, 3), integers(3, 5)
    with cublaslt_on_cpu(xp, tmp_path, small=True) as made, kernels_on_cpu():
        assert set(tried(x, w)) == set(SMALL)
        assert tried(x, w) == []
        settings(tf32=True)
        assert set(tried(x, w)) == set(SMALL)
        settings(tf32=False, deterministic=True)
        assert tried(x, integers(3, 6)) == []
        settings(deterministic=False)
        for arrays in [
            (x.astype("f8"), w.astype("f8")),
            (x.astype("f2"), w.astype("f2")),
            (integers(2, 4, 3), integers(2, 3, 5)),
            (integers(4, 6)[:, :3], w),
            (x.T.copy().T, w.T.copy().T),
        ]:
            assert tried(*arrays) == []
            assert made.timer.timed


def test_our_own_kernel_in_a_capture_and_from_the_file(tmp_path):
    def seconds(epilogue, algorithm):
        return {0: 1, -32: 2}.get(epilogue, 3)

    for _ in range(2):
        xp = FakeCupy()
        with (
            cublaslt_on_cpu(xp, tmp_path, seconds=seconds, small=True) as made,
            kernels_on_cpu(),
        ):
            assert gemm.matmul(xp, *map(fake, LAYER[:2])) is None  # CuPy's own is the fastest
            made.capturing = True
            y = gemm.matmul(xp, *map(fake, LAYER[:2]))
            np.testing.assert_array_equal(y.get(), LAYER[0] @ LAYER[1])
            assert ways(made)[-1] == (-32, 1)
    assert made.timer.timed == []
    xp = FakeCupy()
    with (
        cublaslt_on_cpu(xp, tmp_path, seconds=seconds) as made,
        pytest.warns(RuntimeWarning, match="is not of this device"),
    ):
        gemm.matmul(xp, *map(fake, LAYER[:2]))  # without such kernels the times are none
    assert made.timer.timed


def test_without_timing_the_first_algorithm_is_taken(xp, tmp_path, settings):
    settings(deterministic=True)
    seconds = timed(plain=[3, 1, 1], bias=[1, 1, 1], relu=[1, 1, 1], cupy=[1])
    made = FakeCublasLt(keeps_nan=True)
    with cublaslt_on_cpu(xp, tmp_path, made, seconds=seconds), kernels_on_cpu():
        for launcher, epilogue in [
            (gemm.matmul, PLAIN),
            (gemm.linear, BIAS),
            (linear_relu.linear_relu, PLAIN),  # cuBLASLt's own ReLU may lose NaN
        ]:
            arrays = LAYER[:2] if launcher is gemm.matmul else LAYER
            assert chosen(xp, made, launcher, arrays)[0] == [(epilogue, 0)]
        assert made.timer.timed == []
        assert list(tmp_path.iterdir()) == []
        settings(deterministic=False)  # what was timed does not count with the setting, nor before
        assert chosen(xp, made, gemm.matmul, LAYER[:2])[0] == [(PLAIN, 1)]
        settings(deterministic=True)
        assert chosen(xp, made, gemm.matmul, LAYER[:2])[0] == [(PLAIN, 0)]
        made.algorithms = {BIAS: 0}
        x, w, b = integers(9, 3), *LAYER[1:]
        assert chosen(xp, made, gemm.linear, (x, w, b))[0] == [(PLAIN, 0)]
        made.algorithms = {PLAIN: 0}
        assert chosen(xp, made, gemm.matmul, (x, w))[0] == []


def test_no_memory_to_time_in(xp, tmp_path):
    def seconds(epilogue, algorithm):
        raise MemoryError

    with cublaslt_on_cpu(xp, tmp_path, seconds=seconds) as made:
        assert chosen(xp, made, gemm.matmul, LAYER[:2])[0] == [(PLAIN, 0)]
        assert list(tmp_path.iterdir()) == []


def test_a_problem_is_prepared_and_timed_once(xp, lt, monkeypatch):
    x, w, b = map(fake, LAYER)
    gemm.linear(xp, x, w, b)
    assert not lt.launches[-1].scratch  # what is given out lies in the user's memory
    asked, timed, objects = len(lt.preferences), len(lt.timer.timed), len(lt.objects)
    for _ in range(3):
        gemm.linear(xp, fake(LAYER[0].copy()), w, b)
    assert (len(lt.preferences), len(lt.timer.timed), len(lt.objects)) == (asked, timed, objects)
    gemm.linear(xp, fake(integers(8, 3)), w, b)  # another problem
    assert len(lt.preferences) > asked
    monkeypatch.setattr(gemm, "_MAX_PLANS", 2)
    for n in range(10, 40):
        gemm.linear(xp, fake(integers(n, 3)), w, b)
    gc.collect()
    assert len(lt.objects) < 30  # what no plan needs any more is destroyed


def test_alignment_and_workspace_are_told(xp, tmp_path):
    wide = np.zeros(64, "f4")
    offset = wide[(-wide.ctypes.data // 4) % 4 :]  # 16-byte aligned
    x, w, b = offset[1:7].reshape(2, 3), offset[8:14].reshape(3, 2), offset[18:20]
    for major, workspace in ((8, 4 << 20), (9, 32 << 20), (10, 32 << 20)):
        with cublaslt_on_cpu(xp, tmp_path / str(major), major=major) as made:
            gemm.linear(xp, fake(x), fake(w), fake(b))
            told = [(p[1], p[5], p[6], p[7], p[8]) for p in made.preferences]
            assert set(told) == {(workspace, 16, 4, 16, 16)}  # A is w, B is x
            before = len(made.preferences)
            gemm.linear(xp, fake(x + 0), fake(w), fake(b))  # x is aligned now: another problem
            assert len(made.preferences) > before


def test_an_algorithm_gets_the_workspace_it_asked_for(xp, tmp_path):
    seconds = timed(plain=[3, 2, 1], cupy=[9])
    with cublaslt_on_cpu(xp, tmp_path, seconds=seconds) as made:
        assert chosen(xp, made, gemm.matmul, LAYER[:2])[0] == [(PLAIN, 2)]
        assert made.launches[-1].workspace == 2048


# ---- capture


def test_capture_needs_a_plan(xp, tmp_path):
    seconds = timed(plain=[3, 1, 2], bias=[4, 5, 6], cupy=[2])
    with cublaslt_on_cpu(xp, tmp_path, seconds=seconds) as made:
        made.capturing = True
        told = r"matmul of float32 \(4, 3\) and \(3, 5\) was met .* run it once before the capture"
        with pytest.raises(gemm.NotPlanned, match="cuBLASLt cannot start while a stream is capt"):
            gemm.matmul(xp, *map(fake, LAYER[:2]))
        assert made.objects == {}
        made.capturing = False
        gemm.matmul(xp, fake(integers(2, 2)), fake(integers(2, 2)))
        made.preferences.clear()
        made.timer.timed.clear()
        made.capturing = True
        with pytest.raises(gemm.NotPlanned, match=told):
            gemm.matmul(xp, *map(fake, LAYER[:2]))
        assert made.preferences == []  # the heuristic may not be asked
        assert made.timer.timed == []
        made.capturing = False
        gemm.matmul(xp, *map(fake, LAYER[:2]))
        made.capturing = True
        asked, timed_before = len(made.preferences), len(made.timer.timed)
        y = gemm.matmul(xp, *map(fake, LAYER[:2]))
        np.testing.assert_array_equal(y.get(), LAYER[0] @ LAYER[1])
        assert ways(made)[-1] == (PLAIN, 1)
        assert (len(made.preferences), len(made.timer.timed)) == (asked, timed_before)


def test_capture_takes_what_can_be_captured(xp, tmp_path):
    """CuPy's own product is the fastest here, but refuses to be captured."""
    seconds = timed(plain=[3, 4, 2], bias=[4, 5, 6], cupy=[1])
    with cublaslt_on_cpu(xp, tmp_path, seconds=seconds) as made:
        assert gemm.matmul(xp, *map(fake, LAYER[:2])) is None
        made.capturing = True
        y = gemm.matmul(xp, *map(fake, LAYER[:2]))
        np.testing.assert_array_equal(y.get(), LAYER[0] @ LAYER[1])
        assert ways(made)[-1] == (PLAIN, 2)
        made.capturing = False
        assert gemm.matmul(xp, *map(fake, LAYER[:2])) is None
        made.algorithms = {PLAIN: 0}
        x = fake(integers(9, 3))
        assert gemm.matmul(xp, x, fake(LAYER[1])) is None
        made.capturing = True
        with pytest.raises(gemm.NotPlanned, match="cuBLASLt has no algorithm for matmul of float"):
            gemm.matmul(xp, x, fake(LAYER[1]))


# ---- threads


def test_threads_do_not_take_each_others_bias(xp, lt):
    """The bias's address lies in the descriptor, which threads share."""
    x, w = integers(4, 3), integers(3, 5)
    gemm.linear(xp, fake(x), fake(w), fake(integers(5)))
    wrong = []
    lt.pause = 1e-4  # for another thread to come between the address and the launch

    def work(number):
        b = np.full(5, number, "f4")
        for _ in range(5):
            y = gemm.linear(xp, fake(x), fake(w), fake(b)).get()
            if not np.array_equal(y, x @ w + b):
                wrong.append(number)

    on_threads(work)
    assert wrong == []
    assert lt.launches[-1].epilogue == BIAS


def test_settings_are_checked(settings):
    assert (tg.config.tf32, tg.config.deterministic) == (False, False)
    for name in ("tf32", "deterministic"):
        for value in (1, 0, None, "yes", [True]):
            with pytest.raises(
                ValueError, match=rf"config\.{name} must be one of False, True, got"
            ):
                setattr(tg.config, name, value)
    with pytest.raises(AttributeError, match=r"there is no setting 'tf_32'; there are .*tf32"):
        tg.config.tf_32 = True
    settings(tf32=True)
    assert "tf32=True, deterministic=False" in repr(tg.config)
