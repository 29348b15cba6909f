"""Chains of elementwise operations in programs on a GPU: what is gathered, and the kernels' values.

Programs are compiled for a stand-in of CuPy, and the kernels written for them run on the CPU.
"""

from __future__ import annotations

import contextlib
import sys

import ml_dtypes
import numpy as np
import nvrtc
import pytest
from cpu_cuda import MODES, KernelError
from cpu_kernels import kernels_on_cpu, misaligned
from test_large import run_end, sparse

import tapegrad as tg
from tapegrad import _backend
from tapegrad.kernels import _build, chains
from tapegrad.kernels.chains import OPERATIONS, Chain, Input, Step
from tests.function.compiled import rewritten
from tests.function.programs import ACTIVATIONS, Training
from tests.gpu.conftest import _elementwise_kernel
from tests.test_backends import FakeCupy

# The activations of tg.nn that go element by element; softmax and its like go by rows.
NAMES = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "sigmoid"),
    *("log_sigmoid", "silu", "tanh", "softplus", "softsign"),
)
ELEMENTWISE = {name: ACTIVATIONS[name] for name in NAMES}


@contextlib.contextmanager
def device(mode="fast", change=None, kernels=True):
    """Let new tensors lie on a stand-in of CuPy, whose kernels run on the CPU."""
    fake = FakeCupy()
    fake.ElementwiseKernel = _elementwise_kernel
    with kernels_on_cpu(mode, change=change), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake)
        for name in ("_cupy", "cupy_ndarray", "_auto", "_setting"):
            patch.setattr(_backend, name, None)
        patch.setattr(_backend, "numpy_alone", True)
        patch.setattr(_backend, "_kernels_enabled", kernels)
        patch.setattr(tg.random, "_default", tg.random.Generator(0))
        with tg.backend("cupy"):
            yield


def normal(*shape, dtype="f4", seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 2).astype(dtype)


def layer(activation):
    def step(x, w, b, g):
        with tg.GradientTape() as tape:
            tape.watch([x, w, b])
            y = activation(tg.nn.linear(x, w, b))
        return y, *tape.gradient(y, [x, w, b], output_gradients=g)

    return step


def arrays_of(rows, columns, dtype="f4"):
    shapes = (rows, 5), (5, columns), (columns,), (rows, columns)
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def compiled(function, *arrays):
    """Return the results of the third call, and the names of the steps that it runs."""
    function = tg.function(function)
    tensors = [tg.constant(a) for a in arrays]
    results = [function(*tensors) for _ in range(3)][-1]
    steps = function.programs[0]._program.steps
    return [y.numpy() for y in results], [step.name for step in steps]


def in_float64(function, *arrays):
    with tg.backend("numpy"):
        return [y.numpy() for y in function(*[tg.constant(a.astype("f8")) for a in arrays])]


def check(got, want, units=64):
    for a, b in zip(got, want, strict=True):
        eps = float(ml_dtypes.finfo(a.dtype).eps)
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a.astype("f8"), b, units * eps, units * eps * scale)


GEMMS = {"linear", "matmul", "permute"}


@pytest.fixture(autouse=True)
def chains_alone(monkeypatch):
    """By plain launches, without what puts fused layers in the place of some chains."""
    monkeypatch.setattr(tg.config, "cuda_graphs", False)
    with rewritten({"chains"}):
        yield


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_layer_is_one_chain_forward_and_one_back(name, monkeypatch):
    """The one back sums the bias's gradient too, and is given no more than it needs."""
    step, arrays = layer(ELEMENTWISE[name]), arrays_of(33, 12)
    read = []
    run = chains.run
    monkeypatch.setattr(chains, "run", lambda *a: read.append(len(a) - 3) or run(*a))
    with device():
        got, names = compiled(step, *arrays)
    own = [step for step in names if step not in GEMMS]
    assert len(own) <= 2  # forward it may be a step alone, which is a kernel as it is
    assert own[-1] == "chain"
    assert all(count <= 3 for count in read)
    check(got, in_float64(step, *arrays))


# Around the edges of packs (4, 2, 8), of a tile of columns, and of the rows that one block sums.
@pytest.mark.parametrize("shape", [(1, 1), (31, 127), (257, 33), (2000, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ml_dtypes.bfloat16], ids=str)
def test_types_and_edges(shape, dtype):
    def chain_alone(y, b, g):
        with tg.GradientTape() as tape:
            tape.watch([y, b])
            z = tg.nn.silu(y + b)
        return z, *tape.gradient(z, [y, b], output_gradients=g)

    shapes = shape, shape[1:], shape
    arrays = [normal(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    with device():
        got, names = compiled(chain_alone, *arrays)
    assert names == ["chain"]
    check(got, in_float64(chain_alone, *arrays), units=8 if shape[0] < 1000 else 32)


@pytest.mark.parametrize(
    ("constant", "kind"),
    [
        (np.full((33, 12), 0.5, "f4"), "one"),
        (np.full((33, 1), 0.5, "f4"), "one"),
        (np.broadcast_to(np.float32(0.5), (33, 12)), "one"),
        (normal(33, 12), "each"),
        (np.where(np.arange(12) == 5, -0.0, np.zeros((33, 12))).astype("f4"), "each"),
        (np.full(12, 0.5, "f4"), "one"),
        (normal(12), "row"),
    ],
)
def test_a_constant_of_one_number_is_read_once(constant, kind, monkeypatch):
    found = []
    run = chains.run
    monkeypatch.setattr(chains, "run", lambda chain, *a: found.append(chain) or run(chain, *a))
    f = lambda x: (tg.tanh(x * constant) + 1.0,)
    x = normal(33, 12, seed=1)
    with device():
        got, names = compiled(f, x)
    assert names == ["chain"]
    assert sorted(x.kind for x in found[-1].inputs) == sorted(["each", kind])
    check(got, in_float64(f, x))


def test_a_constant_that_gives_the_shape_stays():
    f = lambda x: (x * np.full((33, 12), 0.5, "f4"),)
    x = normal(12)
    with device():
        got, _ = compiled(f, x)
    check(got, in_float64(f, x))


@pytest.mark.parametrize("mode", MODES[1:])
def test_under_sanitizers(mode):
    step, arrays = layer(tg.nn.gelu), arrays_of(257, 12)
    with device(mode):
        got, _ = compiled(step, *arrays)
    check(got, in_float64(step, *arrays))


@pytest.mark.parametrize(
    ("mode", "was", "now"),
    [
        ("tsan", "  __syncthreads();\n  if (threadIdx.y == 0)\n", "  if (threadIdx.y == 0)\n"),
        ("asan", "  if (c < packs) {", "  if (c <= packs) {"),
        ("asan", "begin + chunk < rows ? begin + chunk : rows", "begin + chunk + 1"),
        ("tsan", "  if (threadIdx.y != 0 || c >=", "  if (c >="),
    ],
)
def test_planted_faults_are_found(mode, was, now):
    with (
        device(mode, change=(was, now)),
        pytest.raises(KernelError, match=r"data race|AddressSanitizer|out of bounds"),
    ):
        compiled(layer(tg.tanh), *arrays_of(257, 12))


def end_of_a_large_chain():
    rows, columns = 65535 * 8, 8200
    chain = Chain(
        "float", (Input("each", False), Input("row", False)), (Step("add", (0, 1)),), (2,), ()
    )
    module = type("Module", (), {"_SOURCE": chains.kernels_of(chain)})
    x, y, b = sparse(rows, columns), sparse(rows, columns), np.full(columns, 2, "f4")
    x[-8:, -8:] = normal(8, 8)
    sizes = np.int64(rows), np.int32(columns), np.int64(8)
    run_end(module, "tapegrad_chain<1>", (257, 65535), (32, 8), x, b, y, *sizes)
    np.testing.assert_array_equal(y[-8:, -8:], normal(8, 8) + np.float32(2))


def test_offsets_past_32_bits():
    with kernels_on_cpu():
        end_of_a_large_chain()


def test_offsets_of_32_bits_are_found():
    change = "const index_t i = r * packs + c;", "const index_t i = unsigned(r * packs + c);"
    with kernels_on_cpu(change=change), pytest.raises(AssertionError):
        end_of_a_large_chain()


# ---- every operation

SPECIAL = np.array([0.0, -0.0, 0.5, -1.5, 3.0, 1.0, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_every_operation_is_what_its_primitive_says(dtype):
    """All of them in one kernel, on pairs of numbers that are none or special."""
    from tapegrad.primitive import primitives

    a, b = (m.ravel().astype(dtype) for m in np.meshgrid(SPECIAL, SPECIAL))
    condition = a > b
    inputs = [a, b, condition]
    given = {"f": 0, "b": 2}
    steps, want = [], []
    for name, (kinds, _) in OPERATIONS.items():
        operands = [given[k] for k in kinds[:-1]]
        if len(operands) > 1 and kinds[:2] == "ff":
            operands[1] = 1
        elif name == "where":
            operands = [2, 0, 1]
        params = {"broadcast_to": {"shape": a.shape}, "cast": {"dtype": np.dtype(dtype)}}
        with np.errstate(all="ignore"):
            arrays = [inputs[k] for k in operands]
            want.append(primitives[name].forward(np, *arrays, **params.get(name, {})))
        steps.append(Step(name, tuple(operands)))
    for exponent in (2.0, 3.0, -1.5):
        steps.append(Step("power", (0, exponent)))
        with np.errstate(all="ignore"):
            want.append(a ** a.dtype.type(exponent))
    kinds = (Input("each", False), Input("each", False), Input("each", True))
    outputs = tuple(range(3, 3 + len(steps)))
    chain = Chain({"f4": "float", "f8": "double"}[dtype], kinds, tuple(steps), outputs, ())
    with kernels_on_cpu():
        got = chains.run(chain, a.shape, np, *inputs)
    tolerance = {"f4": 1e-5, "f8": 1e-12}[dtype]
    for step, y, w in zip(steps, got, want, strict=True):
        assert y.dtype == w.dtype, step
        np.testing.assert_allclose(y, w, tolerance, tolerance, err_msg=str(step))


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize("type_name", ["float", "double", "__half"])
def test_products_are_rounded_before_they_are_added_up(type_name):
    """As between two launches: fma(x, x, -(y * y)) is not 0 where x is y, nor its root a number."""
    products = [
        *(Step("multiply", (0, 1)), Step("square", (0,)), Step("scale", (0, 1))),
        *(Step("scale_both", (1, 0)), Step("power", (0, 2.0)), Step("power", (1, 3.0))),
    ]
    sums = [Step("add", (2, 3)), Step("subtract", (8, 4)), Step("subtract", (5, 9))]
    steps = (*products, *sums, Step("add", (6, 10)), Step("subtract", (7, 11)))
    chain = Chain(type_name, (Input("each", False),) * 2, steps, (12,), (2, 3))
    kernels = chains.kernels_of(chain)
    name = kernels.groups[0][0]
    text = nvrtc.ptx(kernels.code(), "sm_90", (name,), _build.OPTIONS)
    assert "fma" not in text
    assert "mul.rn" in text


# ---- what is gathered


@pytest.mark.parametrize("seed", range(40))
def test_gathering_changes_nothing(seed):
    """Without kernels a chain runs its steps one by one: the same bits as the eager program."""
    with device(kernels=False):
        eager, other = Training(seed, None), Training(seed, None)
        step = tg.function(other.step)
        wanted, got = eager.run(eager.step, 6), other.run(step, 6)
        for a, b in zip(got, wanted, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_of(function, *arrays):
    with device(kernels=False):
        return compiled(function, *arrays)[1]


def test_what_lies_between_two_steps_parts_them():
    """A chain runs at one place: the product needs the first step, and the last the product."""

    def f(x, w):
        y = tg.exp(x) * 2.0
        return (y + tg.matmul(y, w),)

    x, w = normal(4, 4), normal(4, 4)
    names = steps_of(f, x, w)
    assert names == ["chain", "matmul", "add"]


def test_a_value_is_computed_again_unless_it_is_long_or_wanted():
    def f(x, w):
        e = tg.exp(x)
        y = tg.matmul(e + 1.0, w)
        return (y * e,)

    names = steps_of(f, normal(4, 4), normal(4, 4))
    assert names == ["chain", "matmul", "chain"]  # exp in both

    def g(x, w):
        e = tg.exp(x)
        y = tg.matmul(e, w)
        return (y * e,)

    assert steps_of(g, normal(4, 4), normal(4, 4)) == ["exp", "matmul", "multiply"]

    def long(x, w):
        e = x
        for _ in range(20):
            e = tg.sin(e)
        return (tg.matmul(e + 1.0, w) * e,)

    assert steps_of(long, normal(4, 4), normal(4, 4)) == ["chain", "matmul", "multiply"]


def test_single_steps_integers_and_scalars_stay():
    assert steps_of(lambda x: (tg.exp(x),), normal(3)) == ["exp"]
    assert steps_of(lambda x: (tg.exp(tg.sum(x)) * 2.0,), normal(3)) == ["sum", "exp", "multiply"]
    integers = np.arange(6)
    assert steps_of(lambda x: (x * 2 + 1,), integers) == ["multiply", "add"]
    mixed = steps_of(lambda x, y: (x * y + 1.0,), normal(3), normal(3, dtype="f8"))
    assert mixed == ["multiply", "add"]


def test_chains_of_other_types_and_shapes_meet():
    """What they give each other is stored: a kernel computes in one type, for one shape."""

    def f(x, wide, b):
        chosen = tg.where(wide * 2.0 > 1.0, x * 3.0, x)
        return chosen * (tg.exp(b) + 1.0), wide

    arrays = normal(5, 4), normal(5, 4, dtype="f8", seed=1), normal(4, seed=2)
    with device():
        got, names = compiled(f, *arrays)
    assert names == ["chain"] * 3
    check(got, in_float64(f, *arrays))


def test_a_long_chain_is_cut():
    def f(x):
        for _ in range(100):
            x = tg.sin(x)
        return (x,)

    names = steps_of(f, normal(3))
    assert names.count("chain") == 3
    assert set(names) == {"chain"}


def test_state_is_read_before_it_changes():
    def run(compile):
        v = tg.Variable(normal(3, 4))

        def step(x):
            y = tg.exp(v * 0.1)
            v.assign_add(x)
            return y + tg.exp(v * 0.1)

        step = tg.function(step) if compile else step
        x = tg.constant(np.ones((3, 4), "f4"))
        return [step(x).numpy() for _ in range(4)]

    with device(kernels=False):
        np.testing.assert_array_equal(run(True), run(False))


# ---- launching

TANH = Chain("float", (Input("each", False), Input("row", False), Input("one", False)),
             (Step("add", (0, 1)), Step("multiply", (3, 2))), (4,), (4,))  # fmt: skip


def launch(x, b, k, xp=np):
    return chains.run(TANH, x.shape, xp, x, b, k)


def test_rows_numbers_and_sums():
    for rows, columns in [(3, 4), (5, 7), (300, 12)]:
        x, b, k = normal(rows, columns), normal(columns), np.array(2, "f4")
        want = (x + b) * k
        with kernels_on_cpu("asan"):
            for place in (lambda a: a, misaligned):
                y, total = launch(place(x), b, k)
                np.testing.assert_allclose(y, want, 1e-6)
                np.testing.assert_allclose(total, want.sum(0), 1e-4, 1e-4)


X, B, K = normal(3, 4), normal(4), np.array(2, "f4")


@pytest.mark.parametrize(
    ("x", "b", "k"),
    [
        (np.asfortranarray(X), B, K),
        (X.astype("f8"), B, K),
        (X.astype("f8"), B.astype("f8"), K.astype("f8")),
        (X, normal(8)[::2], K),
        (X, B, np.float32(2)),  # CuPy would take it by value
        (X, B, 2.0),
    ],
)
def test_declined(x, b, k):
    with kernels_on_cpu():
        assert launch(x, b, k) is None


def test_too_many_columns_decline(monkeypatch):
    monkeypatch.setattr(chains, "MAX_COLUMNS", 3)
    with kernels_on_cpu():
        assert launch(X, B, K) is None


def test_more_elements_than_there_are_column_numbers_are_taken_by_rows(monkeypatch):
    monkeypatch.setattr(chains, "MAX_COLUMNS", 40)
    chain = Chain("float", (Input("each", False),), (Step("square", (0,)),), (1,), ())
    x = normal(8, 33)
    with kernels_on_cpu():
        (y,) = chains.run(chain, x.shape, np, x)
        assert chains.run(chain, (x.size,), np, x.reshape(-1)) is None
    np.testing.assert_array_equal(y, x * x)


def test_a_declined_chain_runs_step_by_step():
    f = lambda x: (tg.exp(tg.transpose(x)) * 2.0 + 1.0,)
    x = normal(3, 5)
    with device():
        got, names = compiled(f, x)
    assert names == ["permute", "chain"]
    check(got, [np.exp(x.T.astype("f8")) * 2 + 1])


@pytest.mark.parametrize("dtype", ["f4", "f2", ml_dtypes.bfloat16], ids=str)
def test_check_accepts_what_a_chain_rounds_less(dtype):
    with device():
        x = tg.constant(normal(40, 12, dtype=dtype))
        tg.function(lambda x: tg.tanh(x * 0.7 + 1.0) * x + tg.square(x)).check(x)


def kernels_of_activations(type_name, width, chosen):
    """Return the text of these activations' chains, and the names in it: compiled as one."""
    written = {}
    with device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "run", lambda chain, *_: written.setdefault(chain))
        for activation in chosen:
            compiled(layer(ELEMENTWISE[activation]), *arrays_of(3, 4))
    texts, names = [], []
    for i, chain in enumerate(written):
        kernels = chains.kernels_of(chain._replace(type_name=type_name))
        *headers, text = kernels.text.partition('"columns.cuh"\n')
        texts.append(f"namespace n{i} {{{text}}}")
        names.append(f"n{i}::tapegrad_chain<{width}>")
    return _build.Kernels("\n".join(["".join(headers), *texts]), tuple(names))


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize(
    ("type_name", "width", "chosen"),
    [("float", 4, NAMES), ("__half", 8, ["gelu"])],
)
def test_activations_compile_without_spills(type_name, width, chosen):
    kernels = kernels_of_activations(type_name, width, chosen)
    (names,) = kernels.groups
    assert len(names) >= len(chosen)
    for architecture in nvrtc.ARCHITECTURES:
        usage = nvrtc.resource_usage(kernels.code(), architecture, names, _build.OPTIONS)
        assert len(usage) == len(names)
        for name, used in usage.items():
            assert used["stack"] == used["spilled"] == 0, (architecture, name, used)
