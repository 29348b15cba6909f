"""The optimiser updates against their formulas in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, misaligned, read_only

from tapegrad.kernels import optimizers


def sgd(p, g, rate):
    return (p - rate * g,)


def momentum(p, v, g, rate, mu):
    v = mu * v - rate * g
    return p + v, v


def nesterov(p, v, g, rate, mu):
    v = mu * v - rate * g
    return p + mu * v - rate * g, v


def adagrad(p, a, g, rate, epsilon):
    a = a + g**2
    return p - rate * g / (np.sqrt(a) + epsilon), a


def rmsprop(p, v, g, rate, rho, epsilon):
    v = rho * v + (1 - rho) * g**2
    return p - rate * g / (np.sqrt(v) + epsilon), v


def adam(p, m, v, g, t, rate, beta_1, beta_2, epsilon, decay):
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    corrected = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
    return p - rate * (corrected + decay * p), m, v


# name: (meaning, launcher, number of slots, hyper-parameters, keyword arguments)
RULES = {
    "sgd": (sgd, optimizers.sgd, 0, (0.1,), {}),
    "momentum": (momentum, optimizers.momentum, 1, (0.1, 0.9), {"nesterov": False}),
    "nesterov": (nesterov, optimizers.momentum, 1, (0.1, 0.9), {"nesterov": True}),
    "adagrad": (adagrad, optimizers.adagrad, 1, (0.1, 1e-7), {}),
    "rmsprop": (rmsprop, optimizers.rmsprop, 1, (0.01, 0.999, 1e-7), {}),
    "adam": (adam, optimizers.adam, 2, (0.01, 0.9, 0.999, 1e-7, 0.1), {}),
}
# Seen: 2e-7, 4e-16; in 16 bits half a unit in the last place.
TOLERANCE = {"float32": 5e-7, "float64": 1e-14, "float16": 2**-11, "bfloat16": 2**-8}
DTYPES = pytest.mark.parametrize(
    "dtype", ["f4", "f8", "f2", ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
SIZES = [1, 2, 3, 4, 5, 31, 33, 255, 257, 1023, 1025, 4100]


def buffers_of(name, size, dtype, seed=0):
    """Return [p, slots ...] and g; the second moments of adagrad, rmsprop and adam are positive."""
    rng = np.random.default_rng(seed)
    slots = RULES[name][2]
    p, g = rng.normal(size=size).astype(dtype), rng.normal(size=size).astype(dtype)
    state = [rng.random(size).astype(dtype) for _ in range(slots)]
    return [p, *state], g


def arguments_of(name, step=5):
    """Return what stands behind g in a call: arrays for the launcher, numbers for the meaning."""
    hyper = RULES[name][3]
    arrays = [np.array(h) for h in hyper]
    if name == "adam":
        return [np.array(step), *arrays], [step, *hyper]
    return arrays, list(hyper)


def update(name, buffers, g, step=5):
    """Run the kernel on copies and return them."""
    _, launcher, _, _, keywords = RULES[name]
    arrays, _ = arguments_of(name, step)
    copies = [buffer.copy() for buffer in buffers]
    assert launcher(np, *copies, *read_only(g, *arrays), **keywords) is True
    return copies


def check(name, got, buffers, g, step=5):
    _, numbers = arguments_of(name, step)
    exact = [a.astype("f8") for a in (*buffers, g)]
    want = RULES[name][0](*exact, *numbers)
    tolerance = TOLERANCE[got[0].dtype.name]
    exact_part = TOLERANCE["float32"] * (tolerance > TOLERANCE["float32"])
    for array, reference in zip(got, want, strict=True):
        # a number near 0 is a difference of numbers near 1
        np.testing.assert_allclose(
            array.astype("f8"), reference, tolerance + exact_part, min(tolerance, 5e-7)
        )


@pytest.mark.parametrize("name", RULES)
@DTYPES
def test_update(name, dtype):
    with kernels_on_cpu():
        for size in SIZES:
            buffers, g = buffers_of(name, size, dtype)
            check(name, update(name, buffers, g), buffers, g)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(name, mode):
    with kernels_on_cpu(mode):
        buffers, g = buffers_of(name, 77, "f4")
        check(name, update(name, buffers, g), buffers, g)


@pytest.mark.parametrize("name", RULES)
def test_one_misaligned_buffer_takes_the_scalar_path(name):
    _, launcher, _, _, keywords = RULES[name]
    with kernels_on_cpu("asan"):
        buffers, g = buffers_of(name, 9, "f4")
        for i in range(len(buffers) + 1):
            copies = [b.copy() for b in (*buffers, g)]
            copies[i] = misaligned(copies[i])
            launcher(np, *copies, *arguments_of(name)[0], **keywords)
            check(name, copies[:-1], buffers, g)


def test_more_parameters_than_threads_in_a_launch(monkeypatch):
    monkeypatch.setattr(optimizers, "grid", lambda items: (2,))
    with kernels_on_cpu():
        buffers, g = buffers_of("adam", 5003, "f4")
        check("adam", update("adam", buffers, g), buffers, g)


@pytest.mark.parametrize("name", RULES)
@DTYPES
def test_a_factor_multiplies_the_gradient(name, dtype):
    _, launcher, _, _, keywords = RULES[name]
    with kernels_on_cpu():
        buffers, g = buffers_of(name, 37, dtype)
        copies = [buffer.copy() for buffer in buffers]
        arrays, _ = arguments_of(name)
        assert launcher(np, *copies, g, *arrays, np.array(0.3), **keywords) is True
        check(name, copies, buffers, g.astype("f8") * 0.3)


def check_factor(gradients, limit, scale):
    """Compare with the definition; a number in the place of an array says that there is none."""
    factor = np.array(7.0)
    given = [x if type(x) is float else np.array(float(x)) for x in (limit, scale)]
    assert optimizers.gradient_factor(np, factor, *given, *read_only(*gradients)) is True
    norm = np.sqrt(sum((g.astype("f8") ** 2).sum() for g in gradients)) / scale
    want = min(1, limit / norm) / scale if norm else 1 / scale
    np.testing.assert_allclose(factor, want, rtol=1e-13)


# An int is made an array here; the floats are those that stand for nothing.
LIMITS = [(1, 1.0), (3, 8), (1000, 8), (np.inf, 8), (np.inf, 1.0)]


@pytest.mark.parametrize(("limit", "scale"), LIMITS)
def test_gradient_factor(limit, scale):
    rng = np.random.default_rng(0)
    with kernels_on_cpu():
        for sizes in ([1], [3, 257], [255, 256, 1024], [5003]):
            for dtype in ("f4", "f8", "f2", ml_dtypes.bfloat16):
                check_factor([rng.normal(size=n).astype(dtype) for n in sizes], limit, scale)
        check_factor([np.zeros(9, "f4"), misaligned(np.ones(9, "f8"))], limit, scale)
        check_factor([np.zeros(9, "f4")], limit, scale)


@pytest.mark.parametrize("mode", MODES[1:])
def test_gradient_factor_under_sanitizers(mode):
    with kernels_on_cpu(mode):
        check_factor([np.ones(77, "f4"), misaligned(np.ones(9, "f4"))], 2, 8)


def test_norms_beyond_the_gradients_type():
    with kernels_on_cpu():
        check_factor([np.full(9, 3e38, "f4"), np.full(9, 1e-30, "f4")], 1, 1.0)
        check_factor([np.full(9, 1e-30, "f4")], np.float64(1e-31), 1.0)
        check_factor([np.full(9, 6e4, "f2"), np.full(9, 1e-7, "f2")], 1, 1.0)


def test_more_gradients_than_threads_in_a_launch(monkeypatch):
    monkeypatch.setattr(optimizers, "_NORM_BLOCKS", 2)
    with kernels_on_cpu():
        check_factor([np.ones(5003, "f4"), np.ones(7, "f4")], 1, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_makes_the_factor_nan(value):
    """limit / infinity would be a factor of 0: nothing would move, and nobody would know."""
    factor, g = np.array(1.0), np.array([1, value, 2], "f4")
    with kernels_on_cpu():
        optimizers.gradient_factor(np, factor, np.array(1.0), 1.0, g)
    assert np.isnan(factor)


@pytest.mark.parametrize(
    ("limit", "scale", "g"),
    [
        (2.0, 1.0, np.ones(3, "f4")),
        (np.inf, 2.0, np.ones(3, "f4")),
        (np.array(1.0, "f4"), 1.0, np.ones(3, "f4")),
        (np.array(1.0), 1.0, np.ones(3, "i4")),
        (np.array(1.0), 1.0, np.ones(6, "f4")[::2]),
    ],
)
def test_gradient_factor_declines(limit, scale, g):
    with kernels_on_cpu():
        assert optimizers.gradient_factor(np, np.array(1.0), limit, scale, g) is None


def test_a_factor_on_the_host_is_declined():
    with kernels_on_cpu():
        for factor in (0.5, np.float64(0.5), np.array(0.5, "f4")):
            assert optimizers.sgd(np, P.copy(), P, RATE, factor) is None


def first_move(name, dtype, step=1):
    """Return the move of parameters from 0, the slots being 0, and what it should be: a number in
    which an error is not hidden by the parameters' own size.
    """
    buffers, g = buffers_of(name, 50, dtype)
    zeros = [np.zeros_like(buffer) for buffer in buffers]
    exact = [a.astype("f8") for a in (*zeros, g)]
    return update(name, zeros, g, step)[0], RULES[name][0](*exact, *arguments_of(name, step)[1])[0]


@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000, 123_457, 2**40])
def test_adam_bias_correction_keeps_its_digits(step):
    with kernels_on_cpu():
        np.testing.assert_allclose(*first_move("adam", "f8", step), rtol=1e-12)
        np.testing.assert_allclose(*first_move("adam", "f4", step), rtol=1e-6)


def test_rmsprop_keeps_the_digits_of_one_minus_rho():
    with kernels_on_cpu():
        np.testing.assert_allclose(*first_move("rmsprop", "f4"), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("adam", "power(*beta_2, *step)", "powf(float(*beta_2), *step)"),
        ("adam", "A(1.0 - *beta_2)", "A(1) - A(*beta_2)"),
        ("rmsprop", "A(1.0 - *rho)", "A(1) - A(*rho)"),
    ],
)
def test_scalars_computed_in_float32_would_be_seen(name, was, now):
    with kernels_on_cpu(change=(was, now)), pytest.raises(AssertionError, match="Not equal"):
        np.testing.assert_allclose(*first_move(name, "f4"), rtol=1e-6)


def test_16_bits_are_rounded_once():
    """In float16 1e-8 is 0, and so is the square of 1e-4; in bfloat16 0.999 is 1."""
    for dtype in ("f2", ml_dtypes.bfloat16):
        with kernels_on_cpu():
            zeros = [np.zeros(3, dtype) for _ in range(3)]
            g = np.array([1e-4, -3e-3, 0], dtype)
            p = update("adam", zeros, g, 1)[0]
            np.testing.assert_allclose(p.astype("f4"), [-0.01, 0.01, 0], rtol=2**-8)
            big = [np.zeros(1, dtype), np.zeros(1, dtype), np.full(1, 256, dtype)]
            for _ in range(4):  # 256 * 0.999 is 255.744, in float16 a number of its own
                big = update("adam", big, np.zeros(1, dtype), 1)
            assert big[2] == (255 if dtype == "f2" else 256)


@pytest.mark.parametrize("name", RULES)
def test_nan_and_infinity_pass(name):
    with kernels_on_cpu():
        for value in (np.nan, np.inf):
            buffers, g = buffers_of(name, 9, "f4")
            g[4] = value
            got = update(name, buffers, g)
            for array in got:
                assert not np.isfinite(array[4])
                assert np.isfinite(np.delete(array, 4)).all()


def test_a_gradient_of_zero_moves_nothing():
    """Flat buffers have padding of zeros; it must stay zero."""
    with kernels_on_cpu():
        for name, (_, _, slots, _, _) in RULES.items():
            zeros = [np.zeros(7, "f4") for _ in range(1 + slots)]
            for array in update(name, zeros, np.zeros(7, "f4")):
                np.testing.assert_array_equal(array, 0)


P, RATE = np.ones(8, "f4"), np.array(0.1)


@pytest.mark.parametrize(
    ("p", "g", "rate"),
    [
        (P.astype("f2"), P, RATE),
        (P.astype("i4"), P.astype("i4"), RATE),
        (P, P.astype("f8"), RATE),
        (P, P[:7], RATE),
        (P[::2], P[::2], RATE),
        (P[:0], P[:0], RATE),
        (P.reshape(2, 4), P.reshape(2, 4), RATE),
        (P, P, 0.1),
        (P, P, np.float64(0.1)),  # CuPy would take both of these by value
        (P, P, np.array([0.1])),
        (P, P, np.array(0.1, "f4")),
    ],
)
def test_declined(p, g, rate):
    before = p.copy()
    with kernels_on_cpu():
        assert optimizers.sgd(np, p, g, rate) is None
        assert optimizers.momentum(np, p, p, g, RATE, rate, nesterov=True) is None
        assert optimizers.adam(np, p, p, p, g, np.array(1), RATE, RATE, RATE, RATE, rate) is None
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("step", [1, np.int64(1), np.array(1.0), np.array([1]), np.array(1, "i4")])
def test_declined_step(step):
    with kernels_on_cpu():
        assert optimizers.adam(np, P, P, P, P, step, *[RATE] * 5) is None


FOUND = r"race|AddressSanitizer|[Nn]ot equal"


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("tsan", "  __syncthreads();\n", ""),
        ("asan", "i < count; i += step", "i <= count; i += step"),
        ("asan", "i < count / N; i += step", "i <= count / N; i += step"),
        ("fast", "index_t i = count / N * N + start", "index_t i = count / N * N + 1 + start"),
    ],
)
def test_planted_faults_are_found(mode, was, now):
    buffers, g = buffers_of("adam", 9, "f4")
    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises((KernelError, AssertionError), match=FOUND),
    ):
        check("adam", update("adam", buffers, g, 1), buffers, g, 1)


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("tsan", "    __syncthreads();\n", ""),
        ("tsan", "return sums[threadIdx.x]", "return sums[0]"),
        ("asan", "i < count / N; i += step", "i <= count / N; i += step"),
        ("asan", "i < partials; i", "i <= partials; i"),
        ("fast", "half > 0; half /= 2", "half > 1; half /= 2"),
        ("fast", "sum += square(g[i]);", ";"),
        ("fast", "* by + infinite", "* by"),
    ],
)
def test_faults_planted_in_the_norm_are_found(mode, was, now):
    g = buffers_of("adam", 9, "f4")[1]

    def run_everything():
        check_factor([g], 1, 2)
        wrong = g.copy()
        wrong[0] = np.inf
        factor = np.array(1.0)
        optimizers.gradient_factor(np, factor, np.array(1.0), 1.0, wrong)
        np.testing.assert_equal(factor, np.array(np.nan))

    with (
        kernels_on_cpu(mode, change=(was, now)),
        pytest.raises((KernelError, AssertionError), match=FOUND),
    ):
        run_everything()
