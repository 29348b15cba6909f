"""Activations outside programs: on a GPU each is one launch, and so is its gradient."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import nvrtc
import pytest
from cpu_kernels import kernels_on_cpu
from cublaslt_emulation import cublaslt_on_cpu
from test_chains import ELEMENTWISE, check, in_float64, normal

import tapegrad as tg
from tapegrad.formulas import formulas
from tapegrad.kernels import _build, chains
from tapegrad.primitive import primitives
from tests.fake_cupy import FakeCupy
from tests.fake_cupy import device as gpu
from tests.gpu.conftest import _elementwise_kernel, _launched

DTYPES = ["f4", "f8", "f2", ml_dtypes.bfloat16]
# Of its kernels the stand-in's relu_grad is written with NumPy's operations.
COMPOSED = {"relu"}


@pytest.fixture
def on_device(tmp_path):
    """Let new tensors lie on the stand-in for CuPy, whose kernels run on the CPU."""
    fake = FakeCupy()
    fake.ElementwiseKernel = _elementwise_kernel
    with (
        kernels_on_cpu(),
        cublaslt_on_cpu(fake, tmp_path),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(_build, "raw_module", _launched(_build.raw_module))
        for kernel in _build.ELEMENTWISE:
            patch.setattr(kernel, "_kernel", None)
        with tg.backend("cupy"):
            yield


def derivatives(function, x, g):
    """Return y, its gradient, and the gradient of that one's sum of squares, with launches."""
    launches = [gpu.launches]
    with tg.GradientTape() as outer:
        outer.watch(x)
        with tg.GradientTape() as inner:
            inner.watch(x)
            y = function(x)
        launches.append(gpu.launches)
        gx = inner.gradient(y, x, output_gradients=g)
        launches.append(gpu.launches)
        total = tg.sum(tg.square(gx) * g)
    again = outer.gradient(total, x, unconnected_gradients="zero")
    return (y, gx, again), np.diff(launches)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_launch_forward_and_one_back(name, dtype, on_device):
    function = ELEMENTWISE[name]
    for shape in [(3, 7), (8, 64)]:
        x, g = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
        got, launches = derivatives(function, tg.constant(x), tg.constant(g))
        assert list(launches) == [1, 1] or name in COMPOSED
        want = in_float64(lambda x, g: derivatives(function, x, g)[0], x, g)
        check([y.numpy() for y in got], want)


def _elu(x, alpha=1.0):
    return tg.where(x >= 0, x, tg.expm1(tg.minimum(x, 0)) * alpha)


def _gelu(x, share):
    return x * 0.5 * (share + 1)


# What they are, in operations that a tape records one by one.
PLAIN = {
    "relu6": lambda x: tg.where(x >= 6, 6.0, tg.maximum(x, 0)),
    "leaky_relu": lambda x: tg.where(x > 0, x, x * 0.1),
    "elu": lambda x: _elu(x, 1.3),
    "selu": lambda x: _elu(x, 1.6732632423543772) * 1.0507009873554805,
    "gelu": lambda x: _gelu(x, tg.erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: _gelu(x, tg.tanh((x + x * x * x * 0.044715) * np.sqrt(2 / np.pi))),
    "sigmoid": lambda x: 1 / (1 + tg.exp(-x)),
    "log_sigmoid": lambda x: -tg.log1p(tg.exp(-x)),
    "silu": lambda x: x / (1 + tg.exp(-x)),
    "tanh": lambda x: (tg.exp(x) - tg.exp(-x)) / (tg.exp(x) + tg.exp(-x)),
    "softplus": lambda x: tg.log1p(tg.exp(x)),
    "softsign": lambda x: x / (tg.abs(x) + 1),
}
FUSED = {
    "leaky_relu": lambda x: tg.nn.leaky_relu(x, 0.1),
    "elu": lambda x: tg.nn.elu(x, 1.3),
    "gelu_tanh": lambda x: tg.nn.gelu(x, approximate=True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_derivatives_to_the_third(name):
    x = tg.constant(np.linspace(-4, 8, 25) + 0.01)

    def orders(function):
        def slope(f):
            def of(x):
                with tg.GradientTape() as tape:
                    tape.watch(x)
                    y = f(x)
                return tape.gradient(y, x, unconnected_gradients="zero")

            return of

        def times_slope(x):
            with tg.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            return y * tape.gradient(y, x, unconnected_gradients="zero")

        functions = [function]
        for _ in range(3):
            functions.append(slope(functions[-1]))
        # both results of those that keep a share have a gradient to bring
        functions.append(slope(times_slope))
        return [f(x).numpy() for f in functions]

    fused = FUSED.get(name) or getattr(tg.nn, name)
    for got, want in zip(orders(fused), orders(PLAIN[name]), strict=True):
        np.testing.assert_allclose(got, want, 1e-9, 1e-9)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_the_slope_of_large_numbers_is_that_of_their_limit(name):
    x = tg.constant(np.array([np.inf, 1e30, 100.0, -100.0, -1e30, -np.inf], "f4"))
    with tg.GradientTape() as tape, np.errstate(all="ignore"):
        tape.watch(x)
        y = (FUSED.get(name) or getattr(tg.nn, name))(x)
    np.testing.assert_allclose(tape.gradient(y, x), [1, 1, 1, 0, 0, 0], atol=1e-30)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 6.0, np.nan, np.inf, -np.inf, 30.0, -30.0, 1e30, -1e30]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_special_values_are_those_of_numpy(name, on_device):
    x = np.array([SPECIAL], "f4")
    for upstream in (1.0, 0.0, np.nan):
        g = np.full_like(x, upstream)
        (y, gx, _), _ = derivatives(ELEMENTWISE[name], tg.constant(x), tg.constant(g))
        with tg.backend("numpy"), np.errstate(all="ignore"):
            want, _ = derivatives(ELEMENTWISE[name], tg.constant(x), tg.constant(g))
        np.testing.assert_allclose(y.numpy(), want[0].numpy(), 1e-6)
        np.testing.assert_allclose(gx.numpy(), want[1].numpy(), 1e-5, 1e-30)
        if upstream == 0:
            np.testing.assert_array_equal(gx.numpy(), np.zeros_like(x))


def test_what_a_kernel_declines_is_computed_step_by_step(on_device):
    x = normal(6, 8)
    for function in (tg.nn.gelu, tg.nn.elu, tg.nn.softplus):
        want = in_float64(lambda x, f=function: [f(x)], np.ascontiguousarray(x[::2, ::2]))
        check([function(tg.constant(x)[::2, ::2]).numpy()], want)
    np.testing.assert_array_equal(
        tg.nn.leaky_relu(tg.constant([-1.0, 2.0]), np.inf).numpy(), [-np.inf, 2]
    )
    ones = np.ones((3, 4), "f4")
    assert formulas["tanh_grad"].kernel(np, ones, ones) is not None
    assert formulas["tanh_grad"].kernel(np, ones, ones[0]) is None
    np.testing.assert_array_equal(tg.nn.relu6(tg.constant([-1, 3, 9])).numpy(), [0, 3, 6])
    assert tg.nn.silu(tg.constant(1.0)).shape == ()


@pytest.mark.parametrize("function", [tg.nn.leaky_relu, tg.nn.elu])
def test_alpha(function):
    """A number, or what has a gradient of its own."""
    x = tg.constant(np.array([-2.0, -0.5, 3.0], "f4"))
    for alpha in (0.5, np.float64(0.5), np.float32(0.5)):
        assert function(x, alpha).dtype == np.float32
        np.testing.assert_array_equal(function(x, alpha), function(x, 0.5))
    np.testing.assert_array_equal(function(x, 2), function(x, 2.0))
    alpha = tg.Variable(0.5)
    with tg.GradientTape() as tape:
        y = function(x, alpha)
    np.testing.assert_array_equal(y, function(x, 0.5))
    unit = function(x, 1.0).numpy()
    np.testing.assert_allclose(tape.gradient(y, alpha), unit[:2].sum(), 1e-6)


def test_params_that_are_new_in_every_call_are_not_kept(monkeypatch):
    x = np.ones(3, "f4")
    written = formulas["leaky_relu"]
    monkeypatch.setattr(chains, "run", lambda *_: None)  # nothing is built
    for k in range(1000):
        written.steps({"alpha": k / 1000})
        assert written.kernel(np, x, alpha=k / 1000) is None
    assert len(written._written) < 300
    assert len(written._chains) < 300
    np.testing.assert_array_equal(tg.nn.leaky_relu(-x, 0.25), np.full(3, -0.25, "f4"))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_programs_meet_what_a_formula_stands_for(name):
    """So a chain may begin before it and go on behind it, on a CPU in blocks."""

    def step(x):
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = ELEMENTWISE[name](x)
        return y, tape.gradient(y, x)

    compiled = tg.function(step)
    x = tg.constant(normal(9, 5))
    for _ in range(3):
        for got, want in zip(compiled(x), step(x), strict=True):
            np.testing.assert_allclose(got, want, 1e-6, 1e-6)
    steps = compiled.programs[0]._program.steps
    assert not {s.name for s in steps} & set(formulas)
    for s in steps:
        assert (s.outputs[0].dtype == np.bool_) is s.name.startswith(("greater", "less"))


def test_a_formula_of_other_types_stays_one_step():
    compiled = tg.function(lambda x: tg.nn.relu6(x > 0))  # integers of booleans
    x = tg.constant(np.arange(-3, 9))
    for _ in range(3):
        np.testing.assert_array_equal(compiled(x), x > 0)
    assert "relu6" in {s.name for s in compiled.programs[0]._program.steps}


def test_every_formula_is_a_primitive_of_known_operations():
    for name, formula in formulas.items():
        assert primitives[name].kernel == formula.kernel
        params = {"alpha": 0.5} if "elu" in name and name[:2] in ("el", "le") else {}
        steps, results = formula.steps(params)
        assert {step.name for step in steps} <= set(chains.OPERATIONS)
        assert max(results) == formula.inputs + len(steps) - 1


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize("type_name", ["float", "double"])
def test_formulas_compile_without_spills(type_name):
    texts, names = [], []
    width = 16 // _build.ITEM_BYTES[type_name]
    for name, formula in formulas.items():
        params = {"alpha": 0.5} if "elu" in name and name[:2] in ("el", "le") else {}
        kernels = chains.kernels_of(formula._chain(type_name, params))
        *headers, text = kernels.text.partition('"columns.cuh"\n')
        texts.append(f"namespace {name} {{{text}}}")
        names.append(f"{name}::tapegrad_chain<{width}>")
    together = _build.Kernels("\n".join(["".join(headers), *texts]), tuple(names))
    for architecture in nvrtc.ARCHITECTURES:
        usage = nvrtc.resource_usage(together.code(), architecture, names, _build.OPTIONS)
        assert len(usage) == len(names)
        for name, used in usage.items():
            assert used["stack"] == used["spilled"] == 0, (architecture, name, used)
