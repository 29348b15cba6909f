"""Every operation, by the table in `cases.py`: values, types, gradients, errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._recording import state
from tapegrad.primitive import primitives
from tapegrad.tensor import wrap
from tapegrad.testing import TOLERANCES, check_gradients
from tests.cases import CASES, KINDS, REFUSALS, Array, Case, Refusal, kinds_of

FLOATS = (np.float64, np.float32, np.float16)


def cases(*, gradients: bool = False) -> pytest.MarkDecorator:
    rows = [case for case in CASES if not gradients or (case.differentiable and has_floats(case))]
    return pytest.mark.parametrize("case", rows, ids=[case.name for case in rows])


def floating(array: Any) -> bool:
    return bool(array.dtype.kind == "f")


def has_floats(case: Case) -> bool:
    return any(map(floating, next(case.samples())))


def leaves(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def tolerance(case: Case, *arrays: Any) -> float:
    """Return what the least precise floating type among the arrays allows."""
    allowed = [TOLERANCES[a.dtype.name] for a in arrays if floating(a)]
    return case.factor * max(allowed, default=0.0)


def assert_close(got: Any, want: Any, relative: float, *arguments: Array) -> None:
    """Compare to a relative error of the largest element, arguments included, or exactly."""
    want = np.asarray(want)
    largest = max(np.abs(a).max(initial=0.0) for a in (want, *arguments)) if relative else 0.0
    np.testing.assert_allclose(np.asarray(got), want, rtol=relative, atol=relative * largest)


def weighted_sum(result: Any) -> Any:
    """Make a scalar of a result, each element counting with a weight of its own."""
    total: Any = 0.0
    for y in leaves(result):
        if floating(y):
            weights = np.random.default_rng(y.size).uniform(0.5, 1.5, y.shape).astype(y.dtype)
            total = total + tg.sum(y * tg.constant(weights))
    return tg.asarray(total)


def gradients(call: Callable[..., Any], arrays: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """Return the gradients of the weighted sum of a result for some of its arguments."""
    tensors = [wrap(a) for a in arrays]
    with tg.GradientTape() as tape:
        tape.watch([tensors[i] for i in wanted])
        y = weighted_sum(call(*tensors))
    return list(tape.gradient(y, [tensors[i] for i in wanted], unconnected_gradients="zero"))


# ---- values


@pytest.mark.parametrize("dtype", FLOATS)
@cases()
def test_values(case: Case, dtype: Any) -> None:
    if dtype != np.float64 and not has_floats(case):
        return  # nothing to take another type
    for arrays in case.samples(dtype):
        before = [a.copy() for a in arrays]
        got = leaves(case.call(*[wrap(a) for a in arrays]))
        exact = [a.astype(np.float64) if floating(a) else a for a in arrays]
        want = [np.asarray(w) for w in leaves(case.reference(*exact))]
        assert len(got) == len(want)
        inputs = [a for a in arrays if floating(a)]
        for y, w in zip(got, want, strict=True):
            assert type(y).__name__ == "Tensor"
            assert y.shape == w.shape
            promoted = np.result_type(*inputs) if inputs and floating(w) else w.dtype
            assert y.dtype == (case.dtype or promoted)
            if floating(w):
                assert_close(y, w, tolerance(case, y, *inputs), *filter(floating, exact))
            else:
                np.testing.assert_array_equal(y, w)
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)


@cases()
def test_raw_arrays_are_taken_as_tensors_are(case: Case) -> None:
    for sample in case.samples():
        got = leaves(case.call(*sample))
        for y, w in zip(got, leaves(case.call(*map(wrap, sample))), strict=True):
            assert y.dtype == w.dtype
            assert_close(y, w, 1e-12 if floating(w) else 0.0, *filter(floating, sample))


# ---- gradients


def curved(call: Callable[..., Any]) -> Callable[..., Any]:
    """Follow a function by y + y**2: the upstream gradient then depends on the arguments too.

    Else the rules' own derivatives with respect to it would never be seen.
    """

    def composed(*xs: Any) -> list[Any]:
        return [y * (y + 1) for y in leaves(call(*xs)) if floating(y)]

    return composed


@cases(gradients=True)
def test_gradients_agree_with_finite_differences(case: Case) -> None:
    for seed, sample in enumerate(case.samples(smooth=True)):
        check_gradients(curved(case.call), sample, order=case.order, seed=seed)


@cases(gradients=True)
def test_gradients_in_other_types_layouts_and_one_by_one(case: Case) -> None:
    for sample in case.samples(np.float32, smooth=True):
        wanted = [i for i, a in enumerate(sample) if floating(a)]
        exact = [np.array(a, np.float64 if floating(a) else None, order="C") for a in sample]
        want = gradients(case.call, exact, wanted)
        for i, g, w in zip(wanted, gradients(case.call, sample, wanted), want, strict=True):
            assert g.shape == w.shape == sample[i].shape
            assert (g.dtype, w.dtype) == (np.float32, np.float64)
            assert_close(g, w, tolerance(case, g), *filter(floating, exact))
            (alone,) = gradients(case.call, exact, [i])
            assert_close(alone, w, 1e-12, *filter(floating, exact))


@cases(gradients=True)
def test_gradients_have_the_type_and_shape_of_their_sources(case: Case) -> None:
    for sample in case.samples(np.float16, smooth=True):
        wanted = [i for i, a in enumerate(sample) if floating(a)]
        for i, g in zip(wanted, gradients(case.call, sample, wanted), strict=True):
            assert (g.shape, g.dtype) == (sample[i].shape, np.float16)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name) for c in CASES if not c.differentiable],
)
def test_no_gradient_flows(case: Case) -> None:
    for sample in case.samples():
        tensors = list(map(wrap, sample))
        with tg.GradientTape(persistent=True) as tape:
            tape.watch([x for x in tensors if floating(x)])
            results = leaves(case.call(*tensors))
        for x in filter(floating, tensors):
            assert [tape.gradient(y, x) for y in results] == [None] * len(results)


# ---- errors


@pytest.mark.parametrize(
    "refusal",
    [pytest.param(r, id=f"{i}-{r.function.__name__}") for i, r in enumerate(REFUSALS)],
)
def test_refusals(refusal: Refusal) -> None:
    with pytest.raises(refusal.exception, match=refusal.match):
        refusal.call()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name) for c in CASES if c.domains and has_floats(c)]
)
def test_complex_numbers_are_refused(case: Case) -> None:
    sample = next(s for s in case.samples() if all(a.size for a in s))
    if not isinstance(leaves(case.call(*sample))[0], tg.Tensor):
        return  # NumPy's own operators and methods
    for i, a in enumerate(sample):
        if floating(a):
            with pytest.raises(TypeError, match=r"complex numbers are not supp|must be a real num"):
                case.call(*sample[:i], a.astype(np.complex128), *sample[i + 1 :])


# ---- the table itself


@cases()
def test_samples_are_of_every_kind(case: Case) -> None:
    samples = list(case.samples())
    assert len(samples) >= 25 or not case.domains
    found = set().union(*[kinds_of(sample) for sample in samples])
    assert found == set(KINDS) - set(case.lacks)


def test_names_of_rows_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


# Public functions that are no operations on arrays: they take functions, or set something.
NOT_OPERATIONS = {
    tg.backend,
    tg.custom_gradient,
    tg.function,
    tg.get_backend,
    tg.grad,
    tg.grad_pass_through,
    tg.hessian,
    tg.hvp,
    tg.jvp,
    tg.no_record,
    tg.print,
    tg.recompute_grad,
    tg.set_backend,
    tg.value_and_grad,
    tg.vjp,
    tg.losses.get,
    tg.random.default_generator,
    tg.random.seed,
}


def public_operations() -> set[Callable[..., Any]]:
    found = {getattr(tg, name) for name in tg.__all__}
    for module in (tg.nn, tg.losses, tg.random):
        found |= {
            value
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        }
    return {f for f in found if inspect.isfunction(f)} - NOT_OPERATIONS


def test_every_public_operation_has_a_row() -> None:
    assert public_operations() == {case.function for case in CASES}


class Listener:
    """Takes the place of a tape, and notes the names of the primitives that run."""

    lasting = False
    since = 0

    def __init__(self) -> None:
        self.names: set[str] = set()

    def record(self, primitive: Any, inputs: Any, outputs: Any, params: Any, node: Any) -> Any:
        self.names.add(primitive.name)
        return node

    def accessed(self, variable: Any, version: Any) -> None: ...

    def writing(self, variable: Any) -> None: ...

    def watches(self, x: Any) -> bool:
        return False


@contextmanager
def listening() -> Iterator[Listener]:
    listener = Listener()
    state.recorders.append(listener)
    try:
        yield listener
    finally:
        state.recorders.remove(listener)


def test_every_row_runs_its_operation_and_every_primitive_runs() -> None:
    called: set[Any] = set()

    def profile(frame: Any, event: str, _argument: Any) -> None:
        if event == "call":
            called.add(frame.f_code)

    before = sys.getprofile()
    with listening() as listener:
        tg.random.Generator(0).mask(3, 0.5)  # a method, and so without a row
        for case in CASES:
            for sample in list(case.samples(smooth=True))[:3]:
                called.clear()
                sys.setprofile(profile)
                try:
                    case.call(*map(wrap, sample))
                finally:
                    sys.setprofile(before)
                operator = {tg.add, tg.subtract, tg.multiply, tg.divide, tg.power, tg.remainder}
                assert case.function.__code__ in called or case.function in operator, case.name
                if case.differentiable and has_floats(case):
                    check_gradients(curved(case.call), sample)
    # Only rewrites put these into programs: tests/function/test_epilogues.py.
    rest = {"linear_relu_with_mask", "matmul_linear_relu_grad", "matmul_with_sums"}
    assert primitives.keys() - listener.names == rest


# ---- promotion


@pytest.mark.parametrize("function", [tg.add, tg.multiply, tg.maximum, tg.hypot, tg.equal])
def test_types_are_promoted_as_numpy_does(function: Any) -> None:
    ufunc = getattr(np, function.__name__)
    types = (np.bool_, np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64)
    for first in types:
        for second in types:
            a, b = np.ones(2, first), np.ones((3, 1), second)
            assert function(tg.constant(a), tg.constant(b)).dtype == ufunc(a, b).dtype
        for number in (1, 2.5):
            a = np.ones(2, first)
            if number == 1 or first in types[4:]:  # an integer with a float is its own matter
                assert function(tg.constant(a), number).dtype == ufunc(a, number).dtype
                assert function(number, tg.constant(a)).dtype == ufunc(number, a).dtype


@pytest.mark.parametrize("function", [tg.add, tg.multiply, tg.power, tg.maximum, tg.atan2])
@pytest.mark.parametrize(
    ("value", "number", "dtype"),
    [
        ([1.0, 2.0], 2, np.float32),
        ([1.0, 2.0], 2.5, np.float32),
        ([1.0, 2.0], np.float64(2), np.float64),
        (np.float16(1), 2, np.float16),
        (np.float16(1), 2.5, np.float16),
        (np.float32(1), 2, np.float32),
        (np.ones(3, np.float16), 2, np.float16),
        (2.5, 2, np.float32),  # a Python float by itself makes float32
    ],
)
def test_python_numbers_are_weak(function: Any, value: Any, number: Any, dtype: Any) -> None:
    """NEP 50: beside anything that has a type, a Python number takes that type."""
    assert function(value, number).dtype == dtype
    assert function(number, value).dtype == dtype


def as_range(axes: list[int]) -> range:
    return range(axes[0], axes[-1] + 1)


@pytest.mark.parametrize("kind", [list, tuple, as_range])
def test_axes_come_in_any_sequence(kind: Any) -> None:
    x = np.zeros((1, 1, 3))
    assert tg.moveaxis(x, kind([1, 2]), kind([0, 1])).shape == (1, 3, 1)
    assert tg.expand_dims(x, kind([0, 1])).shape == (1, 1, 1, 1, 3)
    assert tg.squeeze(x, kind([0, 1])).shape == (3,)
    assert tg.permute_dims(x, kind([0, 1, 2])).shape == x.shape


# ---- check_gradients, which everything above relies on


@tg.custom_gradient
def wrong_first(x: Any) -> Any:
    return x * x, lambda g: g * x * 2.001


@tg.custom_gradient
def wrong_second(x: Any) -> Any:
    return x * x, lambda g: g * tg.stop_gradient(x) * 2.0


@pytest.mark.parametrize(("function", "order"), [(wrong_first, 1), (wrong_second, 2)])
def test_check_gradients_finds_a_wrong_rule(function: Any, order: int) -> None:
    with pytest.raises(AssertionError, match=f"^order {order}: the tape gives"):
        check_gradients(function, [np.array([0.5, 1.5])])
    if order == 2:
        check_gradients(function, [np.array([0.5, 1.5])], order=1)


def test_check_gradients_needs_something_to_check() -> None:
    with pytest.raises(ValueError, match="at least one floating input"):
        check_gradients(tg.abs, [np.arange(3)])
