"""The table of operations: one row says how an operation is called, and what it must give.

A row's reference is mathematics in NumPy, mpmath or plain Python, never tapegrad. `test_ops.py`
drives every row through value, shape, dtype, gradients of first and second order, and errors.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mpmath
import numpy as np

import tapegrad as tg

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Domain = Callable[[np.random.Generator, Shape], Array]

SAMPLES = 25  # of each row, for values and for each order of gradients
# What the samples of a row must hold, unless the row says that it cannot.
KINDS = ("0-d", "empty", "size-1", "odd", "non-contiguous", "stride 0")
LAYOUTS = ("contiguous", "transposed", "strided", "reversed", "stride 0")


@dataclass(frozen=True)
class Raises:
    """A call that must fail, and how."""

    call: Callable[[], Any]
    exception: type[Exception]
    match: str


@dataclass(frozen=True)
class Case:
    """A row of the table.

    function        the public operation that the row is about.
    name            of the row, for pytest.
    call            takes tensors (or arrays), returns a tensor or a structure of them.
    reference       the same on NumPy arrays.
    shapes          of the arguments, a tuple of shapes for each sample, in turns.
    domains         draw an argument each, away from kinks and poles.
    valid           whether arguments together are away from kinks and poles; else drawn anew.
    order           up to which gradients are checked.
    factor          by which the tolerances of the types are multiplied.
    differentiable  whether gradients flow; if not, they must be None.
    ties            whether equal elements are a kink: a broadcast argument is then for values only.
    dtype           of the result, where it is not that of the floating arguments together.
    lacks           the KINDS of arguments that the operation has no use for.
    errors          calls that must fail.
    """

    function: Callable[..., Any]
    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: tuple[tuple[Shape, ...], ...]
    domains: tuple[Domain, ...]
    valid: Callable[..., Any] = lambda *_: True
    order: int = 2
    factor: float = 1.0
    differentiable: bool = True
    ties: bool = False
    dtype: Any = None
    lacks: tuple[str, ...] = ()
    errors: tuple[Raises, ...] = ()

    def samples(self, *, smooth: bool = False) -> Iterator[list[Array]]:
        """Yield arguments, the same ones every time; `smooth` leaves out those at kinks."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        layouts = [kind for kind in LAYOUTS if not (smooth and self.ties and kind == "stride 0")]
        n = len(self.shapes)
        for i in range(SAMPLES if self.domains else 1):
            layout = layouts[(i + i // n) % len(layouts)]
            for _ in range(1000):
                arrays = [
                    laid_out(draw(rng, shape), layout)
                    for draw, shape in zip(self.domains, self.shapes[i % n], strict=True)
                ]
                if self.valid(*arrays):
                    break
            else:
                raise AssertionError(f"no valid arguments of {self.shapes[i % n]}, {layout}")
            yield arrays


def laid_out(values: Array, layout: str) -> Array:
    """Return the values, or for `stride 0` one slice of them repeated, in another memory layout."""
    if values.ndim == 0 or layout == "contiguous":
        return values
    if layout == "transposed":
        return np.array(values.T, order="C").T
    if layout == "strided":
        wide = np.repeat(values, 2, axis=-1)
        return wide[..., ::2]
    if layout == "reversed":
        return np.array(values[..., ::-1], order="C")[..., ::-1]
    axis = next((i for i, length in enumerate(values.shape) if length > 1), None)
    if axis is None:
        return values
    return np.broadcast_to(values.take([0], axis), values.shape)


def kinds_of(arrays: Sequence[Array]) -> set[str]:
    """Tell which of the KINDS are among some arguments of one sample."""
    lengths = [length for a in arrays for length in a.shape]
    found = {
        "0-d": any(a.ndim == 0 for a in arrays),
        "empty": any(a.size == 0 for a in arrays),
        "size-1": 1 in lengths,
        "odd": any(length % 2 and length > 1 for length in lengths),
        "non-contiguous": any(not a.flags.c_contiguous for a in arrays),
        "stride 0": any(
            length > 1 and stride == 0
            for a in arrays
            for length, stride in zip(a.shape, a.strides, strict=True)
        ),
    }
    return {kind for kind, there in found.items() if there}


# ---- domains


def uniform(low: float, high: float) -> Domain:
    return lambda rng, shape: np.asarray(rng.uniform(low, high, shape))


def away(*kinks: float, gap: float = 0.05, low: float = -2.0, high: float = 2.0) -> Domain:
    """Draw evenly between two numbers, no nearer to a kink than the gap."""

    def draw(rng: np.random.Generator, shape: Shape) -> Array:
        x = np.asarray(rng.uniform(low, high, shape))
        while (near := np.any([np.abs(x - k) < gap for k in kinks], axis=0)).any():
            x = np.where(near, rng.uniform(low, high, shape), x)
        return x

    return draw


def distinct(rng: np.random.Generator, shape: Shape) -> Array:
    """Draw elements at least 0.05 apart, of absolute values as far apart from each other."""
    n = math.prod(shape)
    sizes = 0.2 + 0.1 * rng.permutation(n) + rng.uniform(0.0, 0.05, n)
    return np.asarray((sizes * rng.choice([-1.0, 1.0], n)).reshape(shape))


def whole(low: int, high: int) -> Domain:
    """Draw whole numbers, as floats: equal ones and zeros are among them."""
    return lambda rng, shape: np.asarray(rng.integers(low, high, shape), np.float64)


def integers(low: int, high: int, dtype: Any = np.int64) -> Domain:
    return lambda rng, shape: np.asarray(rng.integers(low, high, shape), dtype)


def booleans(rng: np.random.Generator, shape: Shape) -> Array:
    return np.asarray(rng.integers(0, 2, shape), bool)


def unlike_numbers(rng: np.random.Generator, shape: Shape) -> Array:
    """Draw finite numbers, infinities and NaN."""
    return np.asarray(rng.choice([0.0, -1.5, 2.0, np.inf, -np.inf, np.nan], shape))


def probabilities(rng: np.random.Generator, shape: Shape) -> Array:
    """Draw positive numbers that sum to 1 along the last axis."""
    p = rng.uniform(0.2, 1.0, shape)
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


ANY = uniform(-2.0, 2.0)
POSITIVE = uniform(0.4, 2.5)
UNIT = uniform(-0.8, 0.8)

# ---- shapes


def each(*shapes: Shape) -> tuple[tuple[Shape, ...], ...]:
    return tuple((shape,) for shape in shapes)


RANK0 = each((), (0,), (1, 3), (7,), (3, 5), (2, 1, 3), (2, 0, 3))
RANK1 = each((1,), (0,), (7,), (5, 1), (3, 4), (1, 3), (2, 0))
RANK2 = each((3, 5), (1, 4), (3, 1), (0, 3), (3, 3), (2, 3, 5), (2, 1, 3))
RANK3 = each((2, 3, 5), (2, 1, 3), (1, 3, 1), (0, 2, 3), (2, 0, 3), (3, 2, 0), (3, 5, 2))
PAIRS = (
    ((), ()),
    ((3,), ()),
    ((), (2, 3)),
    ((5,), (5,)),
    ((0,), (1,)),
    ((2, 1, 3), (4, 1)),
    ((1, 3), (3, 1)),
    ((2, 0, 3), (3,)),
    ((3, 5), (3, 5)),
    ((1,), (3, 3)),
)
NO_0D = ("0-d",)
NO_EMPTY = ("empty",)


def over(shapes: tuple[tuple[Shape, ...], ...], axis: Any) -> tuple[tuple[Shape, ...], ...]:
    """Leave those shapes of which the given axes hold elements."""

    def count(shape: Shape) -> int:
        axes = range(len(shape)) if axis is None else np.atleast_1d(axis).astype(int)
        return math.prod(shape[i] for i in axes)

    return tuple((shape,) for (shape,) in shapes if count(shape))


# ---- references


def exactly(function: Callable[..., Any]) -> Callable[..., Array]:
    """Turn a function of mpmath into one of arrays, computed with 30 digits."""

    def number(*xs: float) -> float:
        with mpmath.workdps(30):
            return float(function(*[mpmath.mpf(float(x)) for x in xs]))

    return np.vectorize(number, otypes=[np.float64])


def logsumexp(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    return np.asarray(np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims)))


def softmax(x: Array, axis: int = -1) -> Array:
    return np.asarray(np.exp(x) / np.sum(np.exp(x), axis=axis, keepdims=True))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def moved(function: Callable[[Array], Array], axis: int) -> Callable[[Array], Array]:
    return lambda x: np.moveaxis(function(np.moveaxis(x, axis, -1)), -1, axis)


def one_hot(labels: Array, classes: int) -> Array:
    return np.eye(classes)[labels]


def cross_entropy(
    logits: Array, targets: Array, smoothing: float = 0.0, weights: Array | None = None
) -> Array:
    """Return -sum_c w_c t_c log p_c of each example, with t smoothed."""
    classes = logits.shape[-1]
    t = (1 - smoothing) * targets + smoothing / classes
    w = np.ones(classes) if weights is None else weights
    return np.asarray(-(w * t * (logits - logsumexp(logits, -1, True))).sum(axis=-1))


def bits(seed: int, count: int) -> Array:
    """Return the stream of a seed from its beginning, from NumPy's own Philox."""
    key = tg.random.Generator(seed).key
    return np.asarray(np.random.Philox(key=key, counter=0).random_raw(count))


def halves(seed: int, count: int) -> Array:
    """Return the stream as 32-bit words, the lower half of each 64-bit word first."""
    wide = bits(seed, count)
    return np.stack([wide & np.uint64(2**32 - 1), wide >> np.uint64(32)], axis=1).ravel()[:count]


# ---- the table

CASES: list[Case] = []


def row(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    shapes: tuple[tuple[Shape, ...], ...],
    *domains: Domain,
    label: str = "",
    call: Callable[..., Any] | None = None,
    **fields: Any,
) -> None:
    """Enter a row; the call is the function itself unless it says otherwise."""
    module = function.__module__.removeprefix("tapegrad.")
    prefix = f"{module}." if module in ("nn", "losses", "random") else ""
    name = f"{prefix}{function.__name__}" + (f"-{label}" if label else "")
    CASES.append(Case(function, name, call or function, reference, shapes, domains, **fields))


def both(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    shapes: tuple[tuple[Shape, ...], ...],
    *domains: Domain,
    options: dict[str, Any],
    **fields: Any,
) -> None:
    """Enter a row for options that the reference knows by the same names."""
    label = ",".join(f"{k}={v}" for k, v in options.items()).replace(" ", "")
    call = partial(function, **options) if options else function
    want = partial(reference, **options)
    row(function, want, shapes, *domains, label=label, call=call, **fields)


def broadcast_error(function: Callable[..., Any]) -> tuple[Raises, ...]:
    name = function.__name__
    return (
        Raises(lambda: function(np.ones((2, 3)), np.ones(4)), ValueError, rf"^\[{name}\].*\[2, 3\]"),
        Raises(lambda: function(np.ones(2), "two"), TypeError, rf"^\[{name}\] argument 1 must be"),
    )


def not_convertible(function: Callable[..., Any]) -> tuple[Raises, ...]:
    name = function.__name__
    return (Raises(lambda: function(None), TypeError, rf"^\[{name}\] argument 0 must be .*None"),)


X = np.arange(6.0).reshape(2, 3)

# ---- elementwise

for function, reference, domain, order in [
    (tg.negative, lambda x: -x, ANY, 2),
    (tg.positive, lambda x: x, ANY, 2),
    (tg.square, lambda x: x * x, ANY, 3),
    (tg.sqrt, exactly(mpmath.sqrt), POSITIVE, 3),
    (tg.rsqrt, exactly(lambda x: 1 / mpmath.sqrt(x)), POSITIVE, 2),
    (tg.reciprocal, exactly(lambda x: 1 / x), away(0.0, gap=0.4), 2),
    (tg.exp, exactly(mpmath.exp), ANY, 3),
    (tg.exp2, exactly(lambda x: mpmath.power(2, x)), ANY, 2),
    (tg.expm1, exactly(mpmath.expm1), ANY, 2),
    (tg.log, exactly(mpmath.log), POSITIVE, 3),
    (tg.log2, exactly(lambda x: mpmath.log(x, 2)), POSITIVE, 2),
    (tg.log10, exactly(mpmath.log10), POSITIVE, 2),
    (tg.log1p, exactly(mpmath.log1p), uniform(-0.6, 2.0), 2),
    (tg.sin, exactly(mpmath.sin), ANY, 3),
    (tg.cos, exactly(mpmath.cos), ANY, 3),
    (tg.tan, exactly(mpmath.tan), uniform(-1.1, 1.1), 2),
    (tg.asin, exactly(mpmath.asin), UNIT, 2),
    (tg.acos, exactly(mpmath.acos), UNIT, 2),
    (tg.atan, exactly(mpmath.atan), ANY, 2),
    (tg.sinh, exactly(mpmath.sinh), ANY, 2),
    (tg.cosh, exactly(mpmath.cosh), ANY, 2),
    (tg.tanh, exactly(mpmath.tanh), ANY, 3),
    (tg.asinh, exactly(mpmath.asinh), ANY, 2),
    (tg.acosh, exactly(mpmath.acosh), uniform(1.5, 4.0), 2),
    (tg.atanh, exactly(mpmath.atanh), UNIT, 2),
    (tg.abs, abs, away(0.0), 2),
    (tg.erf, exactly(mpmath.erf), uniform(-5.0, 5.0), 2),
]:
    row(function, reference, RANK0, domain, order=order, errors=not_convertible(function))
row(tg.sign, exactly(mpmath.sign), RANK0, away(0.0))

for function, reference, domain in [
    (tg.floor, exactly(mpmath.floor), ANY),
    (tg.ceil, exactly(mpmath.ceil), ANY),
    (tg.round, exactly(mpmath.nint), lambda rng, shape: whole(-9, 9)(rng, shape) / 2),
    (tg.trunc, lambda x: np.sign(x) * exactly(lambda x: mpmath.floor(abs(x)))(x), ANY),
    (tg.isfinite, np.vectorize(math.isfinite, otypes=[bool]), unlike_numbers),
    (tg.isinf, np.vectorize(math.isinf, otypes=[bool]), unlike_numbers),
    (tg.isnan, np.vectorize(math.isnan, otypes=[bool]), unlike_numbers),
    (tg.logical_not, lambda x: x == 0, whole(-1, 2)),
]:
    row(function, reference, RANK0, domain, differentiable=False, errors=not_convertible(function))
row(
    tg.bitwise_invert,
    lambda x: -x - 1,
    RANK0,
    integers(-9, 9),
    errors=(
        Raises(lambda: tg.bitwise_invert(1.5), TypeError, r"^\[bitwise_invert\].*not supported"),
    ),
)
row(tg.bitwise_invert, np.logical_not, RANK0, booleans, label="bool")


def apart(x1: Array, x2: Array) -> Any:
    return (np.abs(x1 - x2) > 0.05).all()


def off_multiples(x1: Array, x2: Array) -> Any:
    part = np.mod(x1 / x2, 1.0)
    return ((part > 0.05) & (part < 0.95)).all()


DIVISOR = away(0.0, gap=0.5)
for function, reference, first, second, fields in [
    (tg.add, lambda x1, x2: x1 + x2, ANY, ANY, {}),
    (tg.subtract, lambda x1, x2: x1 - x2, ANY, ANY, {}),
    (tg.multiply, lambda x1, x2: x1 * x2, ANY, ANY, {"order": 3}),
    (tg.divide, lambda x1, x2: x1 / x2, ANY, DIVISOR, {"order": 3}),
    (tg.remainder, np.vectorize(lambda a, b: a % b, [float]), ANY, DIVISOR,
     {"valid": off_multiples}),
    (tg.power, exactly(mpmath.power), POSITIVE, ANY, {"order": 3}),
    (tg.hypot, exactly(mpmath.hypot), away(0.0, gap=0.3), away(0.0, gap=0.3), {}),
    (tg.logaddexp, exactly(lambda a, b: mpmath.log(mpmath.exp(a) + mpmath.exp(b))), ANY, ANY, {}),
    (tg.xlogy, exactly(lambda a, b: a * mpmath.log(b)), ANY, POSITIVE, {}),
    (tg.atan2, exactly(mpmath.atan2), away(0.0, gap=0.3), away(0.0, gap=0.3), {}),
    (tg.maximum, np.vectorize(max, [float]), ANY, ANY, {"valid": apart}),
    (tg.minimum, np.vectorize(min, [float]), ANY, ANY, {"valid": apart}),
]:  # fmt: skip
    row(function, reference, PAIRS, first, second, errors=broadcast_error(function), **fields)
row(
    tg.floor_divide,
    np.vectorize(lambda a, b: a // b, [float]),
    PAIRS,
    ANY,
    DIVISOR,
    valid=off_multiples,
    differentiable=False,
    errors=broadcast_error(tg.floor_divide),
)
for function, reference in [
    (tg.equal, lambda a, b: a == b),
    (tg.not_equal, lambda a, b: a != b),
    (tg.less, lambda a, b: a < b),
    (tg.less_equal, lambda a, b: a <= b),
    (tg.greater, lambda a, b: a > b),
    (tg.greater_equal, lambda a, b: a >= b),
    (tg.logical_and, lambda a, b: bool(a) and bool(b)),
    (tg.logical_or, lambda a, b: bool(a) or bool(b)),
    (tg.logical_xor, lambda a, b: bool(a) != bool(b)),
]:
    row(
        function,
        np.vectorize(reference, [bool]),
        PAIRS,
        whole(-1, 2),
        whole(-1, 2),
        differentiable=False,
        errors=broadcast_error(function),
    )
for function, bitwise in [
    (tg.bitwise_and, lambda a, b: int(a) & int(b)),
    (tg.bitwise_or, lambda a, b: int(a) | int(b)),
    (tg.bitwise_xor, lambda a, b: int(a) ^ int(b)),
]:
    name = function.__name__
    refused = Raises(partial(function, 1.5, 2), TypeError, rf"^\[{name}\].*not supported")
    errors = (*broadcast_error(function), refused)
    row(function, np.vectorize(bitwise, [int]), PAIRS, *[integers(-9, 9)] * 2, errors=errors)

# With numbers, and by operators: rules have ways of their own for those.
row(tg.divide, lambda x: x / 4, RANK0, ANY, label="by-number", call=lambda x: x / 4.0)
row(tg.divide, lambda x: 3 / x, RANK0, DIVISOR, label="number-by", call=lambda x: 3.0 / x)
row(tg.divide, lambda x: x / 0.0, RANK0, away(0.0), label="by-zero", call=lambda x: _by_zero(x),
    differentiable=False)  # fmt: skip
row(tg.power, lambda x: x * x, RANK0, ANY, label="2", call=lambda x: x**2, order=3)
row(tg.power, lambda x: x * x * x, RANK0, ANY, label="3.0", call=lambda x: x**3.0, order=3)
row(tg.power, lambda x: x * 0 + 1, RANK0, ANY, label="0", call=lambda x: x**0)
row(tg.power, lambda x: 1 / x, RANK0, DIVISOR, label="-1", call=lambda x: x**-1)
row(tg.power, exactly(lambda x: mpmath.power(2, x)), RANK0, ANY, label="of-number",
    call=lambda x: 2**x)  # fmt: skip
row(tg.multiply, lambda x: 3 * x, RANK0, ANY, label="number", call=lambda x: 3 * x)
row(tg.subtract, lambda x: 1 - x, RANK0, ANY, label="from-number", call=lambda x: 1 - x)
row(tg.remainder, lambda x: x - np.floor(x / 1.5) * 1.5, RANK0, ANY, label="number",
    call=lambda x: x % 1.5, valid=lambda x: off_multiples(x, np.array(1.5)))  # fmt: skip
row(tg.maximum, lambda x: np.where(x > 0.5, x, 0.5), RANK0, away(0.5), label="number",
    call=lambda x: tg.maximum(x, 0.5))  # fmt: skip
row(tg.minimum, lambda x: np.where(x < 0.5, x, 0.5), RANK0, away(0.5), label="number",
    call=lambda x: tg.minimum(0.5, x))  # fmt: skip
