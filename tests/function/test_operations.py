"""Every row of the table of operations, compiled: bit for bit what the eager call gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad.errors import FunctionError
from tapegrad.tensor import wrap
from tests.cases import CASES, RANK0, Array, Case
from tests.function.compiled import assert_same, replayed, rewritten
from tests.function.programs import LOSSES

FLOATS = (np.float64, np.float32, np.float16)
# Rows whose calls make a generator of their own each time, or hand values to others.
REFUSED = ("from_dlpack", "nn.dropout", "random.")
# The rows that move an axis inside: memory in another order is summed in another order.
REORDERED = ("vecdot--2",)


def floating(x: Any) -> bool:
    return bool(x.dtype.kind == "f")


def groups(case: Case, dtype: Any) -> list[list[list[Array]]]:
    """Return the samples that share shapes (not layouts): one program is for all of them."""
    found: dict[Any, list[list[Array]]] = {}
    for arrays in itertools.islice(case.samples(dtype), 3 * len(case.shapes)):
        found.setdefault(tuple(a.shape for a in arrays), []).append(arrays)
    return list(found.values())


def tensors(arrays: Sequence[Array]) -> list[Any]:
    """Make tensors without copying, so that they keep their layout."""
    return [wrap(a) if a.ndim else tg.constant(a) for a in arrays]


def leaves(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def with_gradients(call: Callable[..., Any], *xs: Any) -> tuple[Any, list[Any]]:
    wanted = [x for x in xs if floating(x)]
    with tg.GradientTape() as tape:
        tape.watch(wanted)
        y = call(*xs)
        total: Any = tg.constant(0.0)
        for k, part in enumerate(leaves(y)):
            if floating(part):
                weights = np.cos(k + np.arange(part.size)).reshape(part.shape)
                total = total + tg.sum(part * weights.astype(part.dtype))
    return y, list(tape.gradient(total, wanted))


def check(
    function: Callable[..., Any],
    samples: Sequence[Sequence[Array]],
    rtol: float,
    *,
    reordered: bool = False,
) -> None:
    """Record with two layouts, replay with all; bitwise for plain ones, which sum in one order."""
    compiled = tg.function(function)
    plain = [[np.ascontiguousarray(a).reshape(a.shape) for a in arrays] for arrays in samples]
    # The first two calls have the same values: what is a constant by mistake then stays one.
    for arrays in [samples[0], plain[0], *plain[::-1], *samples]:
        exact = not reordered and all(a.flags.c_contiguous for a in arrays)
        want = function(*tensors(arrays))
        assert_same(compiled(*tensors(arrays)), want, None if exact else rtol)
    assert len(compiled.programs) == 1


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_row_compiled(case: Case) -> None:
    if case.name.startswith(REFUSED):
        compiled = tg.function(case.call)
        arguments = tensors(next(case.samples()))

        def twice() -> None:
            for _ in range(2):
                compiled(*arguments)

        with pytest.raises(FunctionError, match=r"makes a Variable in every call|DLPack"):
            twice()
        return
    with rewritten(False), np.errstate(all="ignore"):
        for dtype in FLOATS:
            samples = groups(case, dtype)
            if dtype != np.float64 and not any(floating(a) for a in samples[0][0]):
                continue
            rtol = 32 * float(np.finfo(dtype).eps)
            reordered = case.name in REORDERED
            for group in samples if dtype == np.float64 else samples[:2]:
                check(case.call, group, rtol, reordered=reordered)
                if case.differentiable and any(map(floating, group[0])):
                    check(
                        lambda *xs: with_gradients(case.call, *xs), group, rtol, reordered=reordered
                    )


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-320, 710.0, -750.0])
ONE_ARGUMENT = [
    case
    for case in CASES
    if len(case.domains) == 1
    and case.shapes is RANK0
    and floating(next(case.samples())[0])
    and not case.name.startswith(REFUSED)
]


@pytest.mark.parametrize("case", ONE_ARGUMENT, ids=[case.name for case in ONE_ARGUMENT])
def test_special_values(case: Case) -> None:
    """Where upstream gradients are 0, a product with what is infinite is 0; elsewhere NaN stays."""

    def function(x: Any, upstream: Any) -> Any:
        with tg.GradientTape() as tape:
            tape.watch(x)
            y = [part for part in leaves(case.call(x * 1.0)) if floating(part)]
        outer = [tg.broadcast_to(tg.astype(upstream[0], part.dtype), part.shape) for part in y]
        return y, tape.gradient(y, x, output_gradients=outer, unconnected_gradients="zero")

    with rewritten(False), np.errstate(all="ignore"):
        for dtype in (np.float64, np.float32):
            compiled = tg.function(function)
            values = SPECIAL.astype(dtype)
            for x in (np.ones_like(values), np.ones_like(values), values, values[::-1].copy()):
                for upstream in (1.0, 0.0, np.inf, np.nan):
                    arguments = tg.constant(x), tg.constant(np.full(2, upstream, dtype))
                    assert_same(compiled(*arguments), function(*arguments))
            assert len(compiled.programs) == 1


ROWS = np.array(
    [[0.5, -1.0, 2.0]] + [[v, 0.0, 1.0] for v in SPECIAL] + [[v, v, v] for v in SPECIAL]
)
TARGETS = {
    "labels": np.arange(len(ROWS)) % 3,
    "probabilities": np.eye(3)[np.arange(len(ROWS)) % 3],
    "numbers": np.zeros((len(ROWS), 3)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_special_rows(kind: str) -> None:
    for name, loss in LOSSES[kind].items():
        if kind == "labels" and "ignored" in name:
            continue

        def function(x: Any, loss: Any = loss) -> Any:
            with tg.GradientTape() as tape:
                tape.watch(x)
                y = loss(tg.nn.linear_relu(x, np.eye(3), np.zeros(3)) + x * 0.5, TARGETS[kind])
                z = tg.nn.softmax_cross_entropy(x, TARGETS["labels"], reduction="none")
            return y, z, tape.gradient([y, z], x)

        with rewritten(False), np.errstate(all="ignore"):
            compiled = tg.function(function)
            for x in (np.ones_like(ROWS), np.ones_like(ROWS), ROWS, ROWS * 0.5):
                assert_same(compiled(tg.constant(x)), function(tg.constant(x)))
            assert len(compiled.programs) == 1, name


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_cross_entropy_of_targets_in_special_rows(with_gradient, dtype):
    """A logit of -inf counts nothing where the target is 0; a row of them, and NaN, as they do."""
    inf = np.inf
    z = np.array([[0.5, -inf], [-inf, -inf], [np.nan, 1.0], [inf, 0.0], [1.0, 2.0]], dtype)
    t = np.array([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.3, 0.6]], dtype)

    def loss(z, t):
        with tg.GradientTape() as tape:
            if with_gradient:
                tape.watch(z)
            y = tg.nn.softmax_cross_entropy(z, t, reduction="none")
        return (y, tape.gradient(y, z)) if with_gradient else y

    for rows in (slice(0, 1), slice(1, 2), slice(4, 5), slice(0, 5)):
        args = tg.constant(z[rows]), tg.constant(t[rows])
        with np.errstate(all="ignore"):
            assert_same(replayed(loss, *args), loss(*args))


@pytest.mark.parametrize("number", [-1, 300, 2**40])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u4", "u8"])
def test_integers_that_a_type_does_not_hold(dtype, number):
    """NumPy compares with them, and `where` wraps them."""
    x = tg.constant(np.array([0, 1, 7, 100], dtype))
    assert_same(
        replayed(lambda x: [x < number, number >= x, tg.not_equal(x, number)], x),
        [x < number, number >= x, tg.not_equal(x, number)],
    )
    assert_same(replayed(lambda x: tg.where(x > 1, x, number), x), tg.where(x > 1, x, number))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_layer_of_bfloat16(optimizer):
    """NumPy has no products of it that would be written to where it belongs."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=s).astype(bfloat16) for s in ((6, 3), (3, 4), (4,)))

    def made():
        w, b = tg.Variable(kernel), tg.Variable(bias)
        update = getattr(tg.optimizers, optimizer)(0.25)

        def step(x, labels):
            with tg.GradientTape() as tape:
                loss = tg.nn.softmax_cross_entropy(tg.nn.linear_relu(x, w, b), labels)
            gradients = tape.gradient(loss, [w, b])
            update.apply(gradients, [w, b])
            return loss, gradients, w + b

        return step

    compiled, eager = tg.function(made()), made()
    labels = tg.constant([0, 1, 2, 3, 0, 1])
    for _ in range(5):
        got, want = compiled(tg.constant(x), labels), eager(tg.constant(x), labels)
        assert_same(got, want)
        assert {y.dtype for y in (got[0], *got[1], got[2])} == {np.dtype(bfloat16)}
