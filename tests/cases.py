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

    def samples(self, dtype: Any = np.float64, *, smooth: bool = False) -> Iterator[list[Array]]:
        """Yield arguments, read-only, the same every time; `smooth` leaves out those at kinks.

        dtype  of the floating ones.
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        layouts = [kind for kind in LAYOUTS if not (smooth and self.ties and kind == "stride 0")]
        n = len(self.shapes)
        for i in range(SAMPLES if self.domains else 1):
            layout = layouts[(i % n + i // n) % len(layouts)]
            for _ in range(1000):
                arrays = [
                    laid_out(draw(rng, shape), layout, dtype)
                    for draw, shape in zip(self.domains, self.shapes[i % n], strict=True)
                ]
                if self.valid(*arrays):
                    break
            else:
                raise AssertionError(f"no valid arguments of {self.shapes[i % n]}, {layout}")
            for array in arrays:
                array.flags.writeable = False
            yield arrays


def laid_out(values: Array, layout: str, dtype: Any) -> Array:
    """Return the values, or for `stride 0` one slice of them repeated, in another memory layout."""
    if values.dtype == np.float64:
        values = values.astype(dtype)
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
RANK1 = each((1,), (0,), (7,), (5, 1), (3, 4), (1, 3), (2, 0), (0, 3))
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
    label: str = "",
    **fields: Any,
) -> None:
    """Enter a row for options that the reference knows by the same names."""
    words = [*([label] if label else []), *[f"{k}={v}" for k, v in options.items()]]
    label = ",".join(words).replace(" ", "")
    call = partial(function, **options) if options else function
    want = partial(reference, **options)
    row(function, want, shapes, *domains, label=label, call=call, **fields)


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
    row(function, reference, RANK0, domain, order=order)
row(tg.sign, exactly(mpmath.sign), RANK0, away(0.0))

for function, reference, domain in [
    (tg.floor, exactly(mpmath.floor), ANY),
    (tg.ceil, exactly(mpmath.ceil), ANY),
    (tg.round, exactly(mpmath.nint), lambda rng, shape: np.asarray(whole(-9, 9)(rng, shape) / 2)),
    (tg.trunc, lambda x: np.sign(x) * exactly(lambda x: mpmath.floor(abs(x)))(x), ANY),
    (tg.isfinite, np.vectorize(math.isfinite, otypes=[bool]), unlike_numbers),
    (tg.isinf, np.vectorize(math.isinf, otypes=[bool]), unlike_numbers),
    (tg.isnan, np.vectorize(math.isnan, otypes=[bool]), unlike_numbers),
    (tg.logical_not, lambda x: x == 0, whole(-1, 2)),
]:
    row(function, reference, RANK0, domain, differentiable=False)
row(tg.bitwise_invert, lambda x: -x - 1, RANK0, integers(-9, 9))
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
    row(function, reference, PAIRS, first, second, **fields)
row(
    tg.floor_divide,
    np.vectorize(lambda a, b: a // b, [float]),
    PAIRS,
    ANY,
    DIVISOR,
    valid=off_multiples,
    differentiable=False,
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
    )
for function, bitwise in [
    (tg.bitwise_and, lambda a, b: int(a) & int(b)),
    (tg.bitwise_or, lambda a, b: int(a) | int(b)),
    (tg.bitwise_xor, lambda a, b: int(a) ^ int(b)),
]:
    row(function, np.vectorize(bitwise, [int]), PAIRS, *[integers(-9, 9)] * 2)

# With numbers, and by operators: rules have ways of their own for those.
row(tg.divide, lambda x: x / 4, RANK0, ANY, label="by-number", call=lambda x: x / 4.0)
row(tg.divide, lambda x: 3 / x, RANK0, DIVISOR, label="number-by", call=lambda x: 3.0 / x)
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


def outside(x: Array, low: Any, high: Any) -> Any:
    return (np.abs(x - low) > 0.05).all() and (np.abs(x - high) > 0.05).all()


LIMITS = tuple((*pair, pair[1]) for pair in PAIRS)
row(
    tg.clip,
    lambda x, low, high: np.where(x < low, low, np.where(x > high, high, x)),
    LIMITS,
    ANY,
    uniform(-1.5, -0.5),
    uniform(0.5, 1.5),
    valid=outside,
)
for label, call, reference in [
    ("numbers", lambda x: tg.clip(x, -1, 1.0), lambda x: np.clip(x, -1, 1)),
    ("min", lambda x: tg.clip(x, -1.0), lambda x: np.where(x < -1, -1, x)),
    ("max", lambda x: tg.clip(x, max=1.0), lambda x: np.where(x > 1, 1, x)),
    ("neither", lambda x: tg.clip(x), lambda x: x),
]:
    row(tg.clip, reference, RANK0, away(-1.0, 1.0), label=label, call=call)

row(
    tg.where,
    np.vectorize(lambda c, a, b: a if c else b, [float]),
    tuple((pair[0], *pair) for pair in PAIRS),
    booleans,
    ANY,
    ANY,
)
row(tg.where, lambda c, x: np.where(c, x, 1), PAIRS, booleans, ANY, label="number",
    call=lambda c, x: tg.where(c, x, 1))  # fmt: skip
row(tg.where, lambda c: np.where(c, 1.5, -2).astype(np.float32), RANK0, booleans, label="numbers",
    call=lambda c: tg.where(c, 1.5, -2))  # fmt: skip

row(tg.astype, lambda x: x, RANK0, ANY, call=lambda x: tg.astype(x, tg.float64),
    dtype=np.float64)  # fmt: skip
row(
    tg.astype,
    lambda x: x,
    RANK0,
    ANY,
    label="same",
    call=lambda x: tg.astype(x, x.dtype, copy=False),
)
row(tg.astype, lambda x: np.trunc(x).astype(np.int32), RANK0, ANY, label="int32",
    call=lambda x: tg.astype(x, tg.int32), differentiable=False)  # fmt: skip
row(tg.astype, lambda x: x != 0, RANK0, whole(-1, 2), label="bool",
    call=lambda x: tg.astype(x, tg.bool), differentiable=False)  # fmt: skip
row(tg.astype, lambda x: x.astype(np.float32), RANK0, integers(-9, 9), label="from-int",
    call=lambda x: tg.astype(x, "float32"))  # fmt: skip
row(tg.stop_gradient, lambda x: x, RANK0, ANY, differentiable=False)

# ---- reductions


AXES: tuple[dict[str, Any], ...] = (
    {},
    {"keepdims": True},
    {"axis": 0},
    {"axis": -1, "keepdims": True},
    {"axis": (0, -1)},
    {"axis": (2, 1), "keepdims": True},
    {"axis": ()},
)


def ranked(options: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes that have the axis of the options, and what they lack."""
    return {"lacks": NO_0D} if options.get("axis", ()) not in ((), None) else {}


for options in AXES:
    shapes = RANK0 if not ranked(options) else RANK3
    filled = over(shapes, options.get("axis"))
    # Over nothing at all a mean is NaN, and an extreme an error.
    lacks = ranked(options).get("lacks", ())
    lacks_empty = lacks if ranked(options) or "axis" in options else (*lacks, "empty")
    both(tg.sum, np.sum, shapes, ANY, options=options, lacks=lacks)
    both(tg.prod, np.prod, shapes, ANY, options=options, lacks=lacks)
    both(tg.prod, np.prod, shapes, whole(-1, 3), options=options, label="zeros", lacks=lacks)
    both(tg.mean, np.mean, filled, ANY, options=options, lacks=lacks_empty)
    both(tg.var, np.var, filled, ANY, options=options, lacks=lacks_empty)
    for function, reference, domain, ties in [
        (tg.std, np.std, distinct, True),
        (tg.max, np.max, distinct, True),
        (tg.min, np.min, distinct, True),
        (tg.logsumexp, logsumexp, ANY, False),
    ]:
        both(function, reference, filled, domain, options=options, ties=ties, lacks=lacks_empty)
    for function, reference in [(tg.all, np.all), (tg.any, np.any)]:
        both(
            function,
            reference,
            shapes,
            lambda rng, shape: np.where(rng.random(shape) < 0.7, rng.uniform(-1, 1, shape), 0.0),
            options=options,
            lacks=lacks,
            differentiable=False,
        )
row(tg.sum, lambda x: np.sum(x, 0), RANK1, integers(-9, 9, np.int32), label="int32",
    call=lambda x: tg.sum(x, axis=0), lacks=NO_0D)  # fmt: skip
row(tg.sum, lambda x: np.sum(x, -1), RANK1, ANY, label="dtype", lacks=NO_0D, dtype=np.float64,
    call=lambda x: tg.sum(x, axis=-1, dtype=tg.float64))  # fmt: skip
row(tg.mean, lambda x: np.sum(x, 0) / len(x), over(RANK1, 0), integers(-9, 9), label="int",
    call=lambda x: tg.mean(x, axis=0), lacks=NO_0D)  # fmt: skip
row(tg.mean, lambda x: np.mean(x, 0, dtype=np.float64), over(RANK1, 0), integers(2**62, 2**63 - 1),
    label="large-int", call=lambda x: tg.mean(x, axis=0), lacks=NO_0D)  # fmt: skip
for function, reference in [(tg.var, np.var), (tg.std, np.std)]:
    several = each((3, 1), (2, 5), (5,), (3, 0), (4, 1, 3))
    row(function, partial(reference, axis=0, ddof=1), several, distinct, label="correction",
        call=partial(function, axis=0, correction=1), lacks=NO_0D, ties=True)  # fmt: skip
for function in (tg.max, tg.min, tg.logsumexp):
    row(function, lambda x: x, each((1, 3), (1, 1), (1, 0), (1, 7, 3)), ANY, label="of-one",
        call=partial(function, axis=0, keepdims=True), lacks=NO_0D)  # fmt: skip

OFF_AXES = away(0.0, gap=0.3)
for options in ({}, {"axis": 0}, {"axis": (0, -1), "keepdims": True}):
    shapes = RANK3 if options else RANK0
    axis, keepdims = options.get("axis"), options.get("keepdims", False)
    for order_p, domain, ties in [
        (1, away(0.0), False),
        (2, OFF_AXES, False),
        (3, OFF_AXES, False),
        (1.5, OFF_AXES, False),
        (math.inf, distinct, True),
        (-math.inf, distinct, True),
        (0, whole(-1, 2), False),
    ]:

        def reference(x: Array, p: float = order_p, axis: Any = axis, keep: bool = keepdims) -> Any:
            sizes = np.abs(x)
            if math.isinf(p):
                return (np.max if p > 0 else np.min)(sizes, axis=axis, keepdims=keep)
            if p == 0:
                return np.sum(sizes > 0, axis=axis, keepdims=keep).astype(np.float64)
            return np.sum(sizes**p, axis=axis, keepdims=keep) ** (1 / p)

        extreme = math.isinf(order_p)
        row(
            tg.norm,
            reference,
            over(shapes, axis) if extreme else shapes,
            domain,
            label=f"{order_p},{axis},{keepdims}".replace(" ", ""),
            call=partial(tg.norm, ord=order_p, **options),
            differentiable=order_p != 0,
            ties=ties,
            lacks=NO_0D if options else NO_EMPTY if extreme else (),
        )
row(tg.norm, lambda x: np.sqrt(np.sum(x * x, 0)).astype(np.float64), RANK1, integers(1, 9),
    label="int", call=lambda x: tg.norm(x, axis=0), lacks=NO_0D)  # fmt: skip

for function, reference in [(tg.argmax, np.argmax), (tg.argmin, np.argmin)]:
    for options in ({}, {"axis": 0}, {"axis": -1, "keepdims": True}):
        both(
            function,
            reference,
            over(RANK3 if options else RANK0, options.get("axis")),
            whole(-3, 3),
            options=options,
            lacks=NO_0D if options else NO_EMPTY,
            differentiable=False,
        )

# ---- scans


def scan(x: Array, step: Callable[[float, float], float], axis: int, initial: Any) -> Array:
    """Accumulate along an axis element by element; `initial` or None comes first."""

    def run(line: Array) -> Array:
        return np.array([*itertools.accumulate(line, step, initial=initial)])

    length = x.shape[axis] + (initial is not None)
    if x.size == 0:
        shape = list(x.shape)
        shape[axis] = length
        return np.full(shape, 0.0 if initial is None else initial)
    return np.apply_along_axis(run, axis, x)


for function, step, initial in [
    (tg.cumulative_sum, lambda a, b: a + b, 0.0),
    (tg.cumulative_prod, lambda a, b: a * b, 1.0),
]:
    for axis, first, shapes in [
        (0, None, RANK1),
        (-1, None, RANK3),
        (1, initial, RANK3),
        (None, initial, each((1,), (0,), (7,), (3,))),
    ]:
        for kind, domain in [("", ANY), (",zeros", whole(-1, 3))]:
            row(
                function,
                partial(scan, step=step, axis=axis or 0, initial=first),
                shapes,
                domain,
                label=f"{axis},{first}{kind}",
                call=partial(function, axis=axis, include_initial=first is not None),
                lacks=NO_0D,
            )
for label, function, call, reference in [
    ("flat-method", tg.cumulative_sum, lambda x: x.cumsum(), lambda x: np.cumsum(x)),
    ("method", tg.cumulative_sum, lambda x: x.cumsum(0), lambda x: np.cumsum(x, 0)),
    ("flat-method", tg.cumulative_prod, lambda x: x.cumprod(), lambda x: np.cumprod(x)),
    ("method", tg.cumulative_prod, lambda x: x.cumprod(-1), lambda x: np.cumprod(x, -1)),
]:
    row(function, reference, RANK1, ANY, label=label, call=call, lacks=NO_0D)

# ---- shapes

row(
    tg.reshape,
    lambda x: np.reshape(x, (3, x.size // 3)),
    each((3, 5), (5, 3, 1), (0, 2), (3,), (2, 3, 5)),
    ANY,
    call=lambda x: tg.reshape(x, (3, -1)),
    lacks=NO_0D,
)
for label, call, reference in [
    ("flat", lambda x: tg.reshape(x, -1), lambda x: np.ravel(x)),
    ("method", lambda x: x.reshape(1, -1), lambda x: np.ravel(x)[None]),
    ("flatten", lambda x: x.flatten(), lambda x: np.ravel(x)),
]:
    row(tg.reshape, reference, RANK0, ANY, label=label, call=call)
for axes in ((2, 0, 1), (1, -1, 0), (0, 1, 2)):
    row(tg.permute_dims, partial(np.transpose, axes=axes), RANK3, ANY, label=str(axes),
        call=partial(tg.permute_dims, axes=axes), lacks=NO_0D)  # fmt: skip
row(tg.transpose, lambda x: np.transpose(x), RANK0, ANY)
row(tg.transpose, lambda x: np.transpose(x), RANK3, ANY, label="T", call=lambda x: x.T, lacks=NO_0D)
row(tg.transpose, lambda x: np.transpose(x, (1, 2, 0)), RANK3, ANY, label="method", lacks=NO_0D,
    call=lambda x: x.transpose(1, 2, 0))  # fmt: skip
row(tg.matrix_transpose, lambda x: np.swapaxes(x, -1, -2), RANK2, ANY, lacks=NO_0D)  # fmt: skip
for source, destination in [(0, -1), (-1, 0), ((0, 1), (2, 0)), (1, 1)]:
    row(
        tg.moveaxis,
        lambda x, a=source, b=destination: np.moveaxis(x, a, b),
        RANK3,
        ANY,
        label=f"{source}to{destination}",
        call=lambda x, a=source, b=destination: tg.moveaxis(x, a, b),
        lacks=NO_0D,
    )
for axis in (0, -1, (0, -1)):
    row(tg.expand_dims, partial(np.expand_dims, axis=axis), RANK0, ANY, label=str(axis),
        call=partial(tg.expand_dims, axis=axis))  # fmt: skip
row(tg.squeeze, lambda x: np.squeeze(x), RANK0, ANY)
for axis in (0, (0, -2)):
    row(tg.squeeze, lambda x, axis=axis: np.squeeze(x, axis),
        each((1, 1, 3), (1, 1, 7), (1, 3, 1, 2), (1, 2, 1, 3), (1, 1, 0)) if axis == 0
        else each((1, 1, 3), (1, 2, 1, 3), (1, 5, 1, 2), (1, 1, 0)), ANY,
        label=str(axis), call=partial(tg.squeeze, axis=axis), lacks=NO_0D)  # fmt: skip
row(
    tg.broadcast_to,
    lambda x: np.zeros((2, 3, 5)) + x,
    each((), (5,), (3, 1), (2, 1, 5), (1, 1, 1), (2, 3, 5)),
    ANY,
    call=lambda x: tg.broadcast_to(x, (2, 3, 5)),
    lacks=NO_EMPTY,
)
row(tg.broadcast_to, lambda x: np.zeros((3, 0)) + x, each((), (1,), (3, 1), (0,), (3, 0)), ANY,
    label="empty", call=lambda x: tg.broadcast_to(x, (3, 0)))  # fmt: skip
row(tg.broadcast_to, lambda x: np.zeros(3) + x, each((), (1,), (3,)), ANY,
    label="int", call=lambda x: tg.broadcast_to(x, 3), lacks=NO_EMPTY)  # fmt: skip

JOINED = (
    ((2, 3), (1, 3), (5, 3)),
    ((1, 1), (0, 1), (3, 1)),
    ((2, 0, 3), (3, 0, 3), (1, 0, 3)),
    ((3, 2, 2), (1, 2, 2), (0, 2, 2)),
)
row(
    tg.concat,
    lambda *xs: np.concatenate(xs, axis=0),
    (*JOINED, ((3,), (0,), (1,))),
    *[ANY] * 3,
    call=lambda *xs: tg.concat(xs),
    lacks=NO_0D,
)
row(tg.concat, lambda *xs: np.concatenate([np.swapaxes(x, 0, -1) for x in xs], -1),
    tuple(shapes for shapes in JOINED if len(shapes[0]) == 2), *[ANY] * 3, label="-1",
    call=lambda *xs: tg.concat([tg.transpose(x) for x in xs], axis=-1), lacks=NO_0D)  # fmt: skip
row(tg.concat, lambda *xs: np.concatenate([np.ravel(x) for x in xs]),
    (*JOINED, ((), (3,), (2, 2))), *[ANY] * 3, label="None",
    call=lambda *xs: tg.concat(xs, axis=None))  # fmt: skip
ALIKE = tuple((shape, shape, shape) for (shape,) in RANK0)
for axis in (0, -1):
    row(
        tg.stack,
        lambda *xs, axis=axis: np.stack(xs, axis),
        ALIKE,
        *[ANY] * 3,
        label=str(axis),
        call=lambda *xs, axis=axis: tg.stack(xs, axis=axis),
    )
row(tg.stack, lambda *xs: np.stack(xs, 1), tuple((s, s) for (s,) in RANK1), ANY, ANY, label="1",
    call=lambda *xs: tg.stack(xs, axis=1), lacks=NO_0D)  # fmt: skip
for axis in (0, -1):
    row(tg.unstack, lambda x, axis=axis: [*np.moveaxis(x, axis, 0)], RANK1, ANY, label=str(axis),
        call=partial(tg.unstack, axis=axis), lacks=NO_0D)  # fmt: skip
for parts, axis, shapes in [
    (3, 0, each((3,), (9, 1), (3, 5), (0, 2), (6, 3))),
    (2, -1, each((2,), (1, 4), (3, 6), (5, 2), (3, 0))),
    ([1, 3], 0, each((5,), (3, 1), (7, 2), (4, 3), (4, 0))),
    ([2, 2, 1, -1], 1, each((1, 4), (3, 5), (2, 2, 3), (0, 3))),
    ([0, 9], 0, each((5,), (1, 3), (2, 2), (0, 3))),
]:
    row(
        tg.split,
        lambda x, parts=parts, axis=axis: np.split(x, parts, axis),
        shapes,
        ANY,
        label=f"{parts},{axis}".replace(" ", ""),
        call=lambda x, parts=parts, axis=axis: tg.split(x, parts, axis=axis),
        lacks=NO_0D,
    )
for axis in (None, 0, (0, -1)):
    row(tg.flip, partial(np.flip, axis=axis), RANK0 if axis is None else RANK2, ANY,
        label=str(axis), call=partial(tg.flip, axis=axis),
        lacks=() if axis is None else NO_0D)  # fmt: skip
for shift, axis in [(1, None), (-2, 0), ((1, -2), (0, 1)), (2, (0, -1)), (4, -1)]:
    row(
        tg.roll,
        partial(np.roll, shift=shift, axis=axis),
        RANK0 if axis is None else RANK2,
        ANY,
        label=f"{shift},{axis}",
        call=partial(tg.roll, shift=shift, axis=axis),
        lacks=() if axis is None else NO_0D,
    )
for times, axis, shapes in [
    (2, None, RANK0),
    (3, 0, RANK1),
    (0, -1, RANK2),
    (2, 1, RANK2),
    ([2, 0, 1], 0, each((3,), (3, 1), (3, 5), (3, 0))),
    ([1, 3, 2], -1, each((3,), (1, 3), (5, 3), (0, 3))),
]:
    row(
        tg.repeat,
        lambda x, times=times, axis=axis: np.repeat(x, times, axis),
        shapes,
        ANY,
        label=f"{times},{axis}".replace(" ", ""),
        call=lambda x, times=times, axis=axis: tg.repeat(x, times, axis=axis),
        lacks=() if axis is None else NO_0D,
    )
for times in (2, (2, 1), (3, 1, 2), (0, 2), ()):
    row(tg.tile, lambda x, times=times: np.tile(x, times), RANK0, ANY, label=str(times),
        call=lambda x, times=times: tg.tile(x, times))  # fmt: skip
PADDED = each((3,), (1,), (7,), (5,), (0,)), each((3, 5), (1, 4), (3, 1), (0, 3), (3, 3))
for mode, widths, shapes, value in [
    ("constant", 2, (*PADDED[0], *PADDED[1], ((),)), 0.0),
    ("constant", (1, 2), PADDED[1], 0.5),
    ("constant", ((0, 1), (2, 0)), PADDED[1], -1.0),
    ("edge", (2, 1), each((3,), (1, 4), (3, 1), (3, 5)), None),
    ("reflect", ((1, 2), (0, 1)), each((3, 5), (4, 2), (7, 3)), None),
    ("reflect", ((5, 0), (0, 1)), each((3, 5), (1, 2), (7, 3)), None),  # further than it is long
    ("symmetric", ((2, 0), (0, 3)), each((3, 5), (1, 4), (3, 1), (2, 2)), None),
    ("symmetric", ((0, 0), (1, 2)), each((0, 3), (1, 4), (3, 1), (3, 3)), None),
]:
    extra = {} if value is None else {"constant_values": value}
    options = {"mode": mode} if value is None else {"value": value}
    shapes_lack = {
        kind
        for kind, there in {"0-d": ((),) in shapes, "empty": any(0 in s for (s,) in shapes),
                            "size-1": any(1 in s for (s,) in shapes)}.items()
        if not there
    }  # fmt: skip
    row(
        tg.pad,
        lambda x, w=widths, mode=mode, extra=extra: np.pad(x, w, mode=mode, **extra),
        shapes,
        ANY,
        label=f"{mode},{widths}".replace(" ", ""),
        call=lambda x, w=widths, options=options: tg.pad(x, w, **options),
        lacks=tuple(sorted(shapes_lack)),
    )

# ---- indexing


def taken(*index: Any) -> Any:
    return index if len(index) != 1 else index[0]


LEAD4 = each((4,), (5, 3), (4, 1), (7, 0), (4, 3, 5))  # axis 0 has at least four elements
LEAD43 = each((4, 3), (5, 3, 1), (4, 5, 3), (7, 3, 0))
MASK4 = np.array([True, False, True, True])
for shapes, index in [
    (LEAD4, 1),
    (LEAD4, -2),
    (LEAD4, np.int64(3)),
    (LEAD4, slice(1, -1)),
    (LEAD4, slice(None, None, -2)),
    (LEAD4, slice(9, None)),
    (LEAD4, taken(..., None)),
    (LEAD4, taken(None, 2)),
    (LEAD4, ()),
    (LEAD43, taken(slice(None), 0)),
    (LEAD43, taken(..., 2, slice(None, 0, -1))),
    (LEAD43, taken(slice(None, None, 3), None, 1)),
    (LEAD4, [0, 2, 2, -1, 0]),
    (LEAD4, []),
    (LEAD4, np.array([[3, 3], [-4, 0]])),
    (LEAD4, np.array(2)),
    (LEAD4, taken([1, 1, 0], ...)),
    (LEAD43, taken([0, 0, 3], [2, 2, -1])),
    (LEAD43, taken(np.array([[0], [3]]), [1, 1, 0])),
    (LEAD43, taken(slice(1, 4), [2, 2, 0])),
    (LEAD43, taken([0, 0, 1], slice(None, 0, -1))),
    (LEAD43, taken(None, [3, 3], slice(None), None)),
    (LEAD43, taken([1, 1], 2)),
    (each((4, 2, 3), (5, 1, 3), (4, 0, 5)), taken([0, 0, 3], slice(None), [2, 2, -1])),
    (each((4, 2, 3), (5, 1, 3), (4, 0, 5)), taken(1, slice(None), [2, 2, -1])),
    (each((4,), (4, 3), (4, 1), (4, 0)), MASK4),
    (each((4,), (4, 3), (4, 1), (4, 0)), [True, False, False, True]),
    (each((4, 3), (4, 3, 1), (4, 3, 5), (4, 3, 0)), np.arange(12).reshape(4, 3) % 3 != 1),
    (each((4, 3), (4, 5, 1), (4, 1), (4, 7, 0)), taken(MASK4, 0)),
    (each((4, 3), (4, 5, 3), (4, 3, 1), (4, 4, 0)), taken(MASK4, [0, 0, 1])),
    (each((3, 4), (1, 4), (5, 4, 2), (0, 4)), taken(slice(None), MASK4)),
    (RANK0, True),
    (RANK0, False),
]:
    written = str(index).replace(" ", "").replace("\n", "")
    row(
        tg.getitem,
        lambda x, index=index: x[index],
        shapes,
        ANY,
        label=written,
        call=lambda x, index=index: tg.getitem(x, index),
        lacks=tuple(
            kind
            for kind, there in [
                ("0-d", shapes is RANK0),
                ("empty", shapes is not LEAD43 or any(0 in s for (s,) in shapes)),
            ]
            if not there
        ),
    )
row(tg.getitem, lambda x, i: x[i], tuple((s, (2, 3)) for (s,) in LEAD4), ANY, integers(-4, 4),
    label="tensor", call=lambda x, i: x[i], lacks=NO_0D)  # fmt: skip
for indices, axis, shapes in [
    ([2, 0, 2, -1], 0, LEAD4),
    ([[1, 1], [0, -1]], -1, each((3,), (1, 2), (2, 5, 3), (0, 3))),
    (1, 1, each((3, 5), (1, 2), (3, 2, 1), (0, 3))),
    ([], 0, LEAD4),
]:
    picked = np.array(indices, np.int64)
    row(
        tg.take,
        lambda x, indices=picked, axis=axis: np.take(x, indices, axis),
        shapes,
        ANY,
        label=f"{indices},{axis}".replace(" ", ""),
        call=lambda x, indices=indices, axis=axis: tg.take(x, indices, axis=axis),
        lacks=NO_0D,
    )
row(tg.take, lambda x: x[[2, 0]], each((3,), (5,), (4,)), ANY, label="vector", lacks=(
    "0-d", "empty", "size-1"), call=lambda x: tg.take(x, [2, 0]))  # fmt: skip
row(tg.gather, lambda x, i: x[i], tuple((s, (2, 3)) for (s,) in LEAD4), ANY, integers(-4, 4),
    lacks=NO_0D)  # fmt: skip
row(tg.gather, lambda x: np.take(x, [1, 1], 1), each((3, 5), (1, 2), (0, 3)), ANY, label="axis",
    call=lambda x: tg.gather(x, [1, 1], axis=1), lacks=NO_0D)  # fmt: skip


def along(x: Array, indices: Array, axis: int) -> Array:
    """Pick element by element: `take_along_axis` as a loop."""
    shape = list(np.broadcast_shapes(
        *[(*a.shape[: axis % x.ndim], 1, *a.shape[axis % x.ndim + 1 :]) for a in (x, indices)]
    ))  # fmt: skip
    shape[axis] = indices.shape[axis]
    wide = np.broadcast_to(indices, shape)
    out = np.empty(shape)
    for place in np.ndindex(*shape):
        source = [0 if n == 1 else i for i, n in zip(place, x.shape, strict=True)]
        source[axis] = wide[place]
        out[place] = x[tuple(source)]
    return out


for axis, shapes in [
    (0, (((4, 3), (5, 3)), ((4,), (3,)), ((4, 1), (2, 1)), ((5, 3), (3, 1)), ((4, 0), (3, 0)))),
    (-1, (((3, 4), (3, 5)), ((2, 3, 4), (2, 1, 3)), ((1, 4), (1, 1)), ((3, 4), (3, 0)))),
]:
    row(
        tg.take_along_axis,
        partial(along, axis=axis),
        shapes,
        ANY,
        integers(-4, 4),
        label=str(axis),
        call=partial(tg.take_along_axis, axis=axis),
        lacks=NO_0D,
    )
for axis in (-1, 0, 1):
    row(
        tg.one_hot,
        lambda i, axis=axis: np.moveaxis(
            np.where((i >= 0) & (i < 3), np.eye(3)[:, i % 3], 0.0), 0, axis
        ).astype(np.float64),
        RANK1 if axis == 1 else RANK0,
        integers(-2, 5),
        lacks=NO_0D if axis == 1 else (),
        label=str(axis),
        call=lambda i, axis=axis: tg.one_hot(i, 3, axis=axis, dtype=tg.float64),
    )
for axis, descending in [(-1, False), (0, False), (0, True), (-1, True)]:
    for function in (tg.sort, tg.argsort):

        def reference(
            x: Array, axis: int = axis, down: bool = descending, values: bool = function is tg.sort
        ) -> Array:
            def line(v: Array) -> Array:  # Python's sort is stable, in both directions
                order = np.array(sorted(range(len(v)), key=lambda i: -v[i] if down else v[i]), int)
                return v[order] if values else order

            empty = x if values else x.astype(np.int64)
            return np.apply_along_axis(line, axis, x) if x.size else empty

        row(
            function,
            reference,
            RANK1,
            distinct if function is tg.sort else whole(-2, 3),
            label=f"{axis},{descending}",
            call=partial(function, axis=axis, descending=descending),
            ties=True,
            differentiable=function is tg.sort,
            lacks=NO_0D,
        )
for k in (0, 1, 3):
    row(
        tg.top_k,
        lambda x, k=k: [
            np.sort(x, -1)[..., ::-1][..., :k],
            np.argsort(-x, -1, stable=True)[..., :k],
        ],
        each((3,), (5, 3), (1, 4), (2, 1, 3), (0, 3)),
        distinct,
        label=str(k),
        call=lambda x, k=k: tg.top_k(x, k),
        ties=True,
        lacks=NO_0D,
    )

# ---- linear algebra

PRODUCTS = (
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3, 5)),
    ((1, 3), (3, 1)),
    ((5, 2, 3), (3, 4)),
    ((2, 1, 2, 3), (3, 3, 2)),
    ((2, 3), (4, 3, 1)),
    ((3,), (2, 3, 4)),
    ((2, 5, 3), (3,)),
    ((0, 3), (3, 2)),
    ((2, 0), (0, 3)),
)


def contracted(x1: Array, x2: Array) -> Array:
    left, right = np.atleast_2d(x1), x2 if x2.ndim > 1 else x2[:, None]
    y = np.sum(left[..., :, :, None] * right[..., None, :, :], axis=-2)
    y = y if x1.ndim > 1 else y[..., 0, :]
    return y if x2.ndim > 1 else y[..., 0]


row(tg.matmul, contracted, PRODUCTS, ANY, ANY, lacks=NO_0D)
row(tg.matmul, contracted, PRODUCTS, ANY, ANY, label="operator", call=lambda a, b: a @ b,
    lacks=NO_0D)  # fmt: skip
row(
    tg.outer,
    lambda a, b: a[:, None] * b,
    (((3,), (5,)), ((1,), (3,)), ((0,), (2,)), ((4,), (1,))),
    ANY,
    ANY,
    lacks=NO_0D,
)
row(
    tg.vecdot,
    lambda a, b: np.sum(a * b, -1),
    (
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((2, 1, 3), (5, 3)),
        ((1,), (4, 1)),
        ((0, 3), (3,)),
        ((2, 0),) * 2,
    ),
    ANY,
    ANY,
    lacks=NO_0D,
)
row(tg.vecdot, lambda a, b: np.sum(a * b, -2), (((3, 2), (3, 1)), ((2, 5, 1), (1, 5, 3)),
    ((0, 2), (0, 2))), ANY, ANY, label="-2", call=partial(tg.vecdot, axis=-2),
    lacks=NO_0D)  # fmt: skip
for axes, shapes in [
    (0, (((), ()), ((3,), (1, 2)), ((0,), (3,)))),
    (np.int64(1), (((2, 3), (3, 5)), ((1, 3), (3,)), ((2, 0), (0, 3)))),
    (2, (((2, 3, 5), (3, 5, 2)), ((1, 3), (1, 3)), ((2, 3, 0), (3, 0)))),
    (((0, 2), (1, 0)), (((2, 3, 5), (5, 2)), ((1, 4, 3), (3, 1, 2)), ((2, 0, 3), (3, 2)))),
    ((-1, 0), (((2, 3), (3, 5)), ((1, 3), (3, 1)), ((0, 3), (3, 2)))),
]:
    row(
        tg.tensordot,
        lambda a, b, axes=axes: np.tensordot(a, b, axes),
        shapes,
        ANY,
        ANY,
        label=str(axes).replace(" ", ""),
        call=partial(tg.tensordot, axes=axes),
        lacks=() if axes == 0 else NO_0D,
    )
for subscripts, shapes in [
    ("i->", each((3,), (1,), (0,))),
    ("ij->ji", each((3, 5), (1, 2), (0, 3))),
    ("ii->i", each((3, 3), (1, 1), (0, 0))),
    ("iij->j", each((3, 3, 2), (1, 1, 3), (2, 2, 0))),
    ("ijkj->ki", each((2, 3, 5, 3), (1, 2, 3, 2), (0, 3, 2, 3))),
    ("ba", each((3, 5), (1, 2), (0, 3))),
    ("...i->i...", each((3,), (2, 5), (2, 1, 3), (0, 3))),
    ("ij,jk->ik", (((2, 3), (3, 5)), ((1, 3), (3, 1)), ((2, 0), (0, 3)))),
    ("ij,jk", (((2, 3), (3, 5)), ((1, 3), (3, 1)), ((2, 0), (0, 3)))),
    ("i,j->ij", (((3,), (5,)), ((1,), (3,)), ((0,), (2,)))),
    ("ij,ij->", (((2, 3), (2, 3)), ((1, 5), (1, 5)), ((0, 3), (0, 3)))),
    ("ij,kl->jl", (((2, 3), (5, 2)), ((1, 3), (3, 1)), ((2, 0), (3, 2)))),
    ("...ij,...jk->...ik", (((5, 2, 3), (3, 2)), ((2, 1, 1, 3), (3, 3, 2)), ((0, 3), (3, 2)))),
    ("bii,bj->b", (((2, 3, 3), (2, 5)), ((1, 2, 2), (1, 3)), ((3, 0, 0), (3, 2)))),
    (
        "ij,jk,kl->il",
        (((2, 3), (3, 5), (5, 2)), ((1, 3), (3, 1), (1, 2)), ((0, 3), (3, 2), (2, 1))),
    ),
    ("i,i,i->i", (((3,),) * 3, ((1,),) * 3, ((0,),) * 3)),
    ("i,i->", (((1,), (3,)), ((3,), (1,)), ((1,), (0,)))),
    ("ij,jk,k->i", (((2, 1), (3, 5), (1,)), ((1, 3), (1, 1), (4,)), ((2, 1), (0, 3), (1,)))),
    (",ij->ij", (((), (3, 5)), ((), (1, 2)), ((), (0, 3)))),
]:
    row(
        tg.einsum,
        lambda *xs, s=subscripts: np.einsum(s, *xs, optimize=False),
        shapes,
        *[ANY] * len(shapes[0]),
        label=subscripts.replace("...", "_"),
        call=lambda *xs, s=subscripts: tg.einsum(s, *xs),
        lacks=NO_0D if () not in shapes[0] else (),
    )
for offset, axis1, axis2 in [(0, -2, -1), (1, -2, -1), (-1, 0, 1), (0, 1, 0), (2, -1, 0)]:
    row(
        tg.diagonal,
        partial(np.diagonal, offset=offset, axis1=axis1, axis2=axis2),
        RANK2 if offset != 2 else each((3, 5), (5, 1, 3), (4, 4), (0, 3)),
        ANY,
        label=f"{offset},{axis1},{axis2}",
        call=partial(tg.diagonal, offset=offset, axis1=axis1, axis2=axis2),
        lacks=NO_0D,
    )
for offset in (0, 1, -1):
    row(tg.trace, partial(np.trace, offset=offset, axis1=-2, axis2=-1), RANK2, ANY,
        label=str(offset), call=partial(tg.trace, offset=offset), lacks=NO_0D)  # fmt: skip
    for function, keeps in [(tg.tril, np.less_equal), (tg.triu, np.greater_equal)]:

        def reference(x: Array, keeps: Any = keeps, k: int = offset) -> Array:
            i, j = np.indices(x.shape[-2:])
            return np.where(keeps(j - i, k), x, 0.0)

        row(function, reference, RANK2, ANY, label=str(offset), call=partial(function, k=offset),
            lacks=NO_0D)  # fmt: skip

# ---- creation: their results are constants

F32, I64 = np.float32, np.int64
row(
    tg.arange,
    lambda: [
        np.array([0, 1, 2]),
        np.array([1, 3, 5]),
        np.array([3, 2, 1, 0, -1]),
        np.array([0.0, 0.25, 0.5, 0.75], F32),
        np.array([0, 1], np.int8),
        np.empty(0, I64),
        np.arange(20_000_001)[20_000_000:] * 0.1,
    ],
    ((),),
    call=lambda: [
        tg.arange(3),
        tg.arange(1, 7, 2),
        tg.arange(3, -2, -1),
        tg.arange(0.0, 1.0, 0.25),
        tg.arange(2, dtype=tg.int8),
        tg.arange(3, 3),
        tg.arange(0, 2_000_000.05, 0.1, dtype=tg.float64)[20_000_000:],
    ],
    lacks=KINDS,
)
row(
    tg.linspace,
    lambda: [
        np.array([0, 0.25, 0.5, 0.75, 1], F32),
        np.array([2.0, 1.5]),
        np.empty(0, F32),
        np.array([-5, -2, 1, 5], np.int32),
    ],
    ((),),
    call=lambda: [
        tg.linspace(0, 1, 5),
        tg.linspace(2.0, 1.0, 2, endpoint=False, dtype=tg.float64),
        tg.linspace(0, 1, 0),
        tg.linspace(-5, 5, 4, dtype=tg.int32),
    ],
    lacks=KINDS,
)
row(
    tg.eye,
    lambda: [
        np.array([[1, 0], [0, 1]], F32),
        np.array([[0, 1, 0], [0, 0, 1]], np.float64),
        np.array([[0], [1], [0]], I64),
    ],
    ((),),
    call=lambda: [
        tg.eye(2),
        tg.eye(2, 3, k=1, dtype=tg.float64),
        tg.eye(3, 1, k=-1, dtype=tg.int64),
    ],
    lacks=KINDS,
)
for function, filling in [(tg.zeros, 0), (tg.ones, 1)]:
    row(
        function,
        lambda v=filling: [np.array([v, v], F32), np.array([[v] * 3], np.int8), np.array(v, F32)],
        ((),),
        call=lambda f=function: [f(2), f((1, 3), dtype=tg.int8), f(())],
        lacks=KINDS,
    )
row(
    tg.full,
    lambda: [
        np.array([7.0, 7.0], F32),
        np.array([[3]], I64),
        np.array([True]),
        np.array(2.5, np.float64),
    ],
    ((),),
    call=lambda: [
        tg.full(2, 7.0),
        tg.full((1, 1), 3),
        tg.full([1], True),
        tg.full((), 2.5, dtype=tg.float64),
    ],
    lacks=KINDS,
)
for function, filling in [(tg.zeros_like, 0.0), (tg.ones_like, 1.0)]:
    row(function, lambda x, v=filling: np.full(x.shape, v), RANK0, ANY, differentiable=False)
    row(function, lambda x, v=filling: np.full(x.shape, v, np.int8), RANK0, ANY, label="dtype",
        call=partial(function, dtype=tg.int8), differentiable=False)  # fmt: skip
row(tg.full_like, lambda x: np.full(x.shape, 2.5), RANK0, ANY, call=lambda x: tg.full_like(x, 2.5),
    differentiable=False)  # fmt: skip
row(tg.to_backend, lambda x: x, RANK0, ANY, call=lambda x: tg.to_backend(x, "numpy"))  # fmt: skip
row(tg.asarray, lambda x: x, RANK0, ANY)  # fmt: skip
row(tg.asarray, lambda x: x, RANK0, ANY, label="dtype", dtype=np.float64,
    call=lambda x: tg.asarray(x, dtype=tg.float64, copy=True))  # fmt: skip
row(tg.from_dlpack, lambda x: x, RANK0, ANY, differentiable=False)  # fmt: skip
row(tg.constant, lambda x: x, RANK0, ANY, differentiable=False)
row(
    tg.constant,
    lambda: [
        np.array([1, 2], F32),
        np.array([1, 2], I64),
        np.array(True),
        np.array([[1, 2]], np.float16),
        np.full((2, 3), 5.0, F32),
        np.array([[1.0], [2.0]]),
    ],
    ((),),
    label="python",
    call=lambda: [
        tg.constant([1.0, 2.0]),
        tg.constant([1, 2]),
        tg.constant(True),
        tg.constant([[1, 2]], tg.float16),
        tg.constant(5.0, shape=(2, 3)),
        tg.constant(np.array([1.0, 2.0]), shape=(2, 1)),
    ],
    lacks=KINDS,
)

# ---- neural networks

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. (2017)


def normal_share(x: float) -> Any:
    return mpmath.ncdf(x)


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


for function, reference, domain in [
    (tg.nn.relu, relu, away(0.0)),
    (tg.nn.relu6, lambda x: np.clip(x, 0, 6), away(0.0, 6.0, low=-2, high=9)),
    (tg.nn.leaky_relu, lambda x: np.where(x > 0, x, 0.2 * x), away(0.0)),
    (tg.nn.elu, lambda x: np.where(x > 0, x, np.exp(x) - 1), away(0.0)),
    (
        tg.nn.selu,
        lambda x: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * (np.exp(x) - 1)),
        away(0.0),
    ),
    (tg.nn.gelu, exactly(lambda x: x * normal_share(x)), ANY),
    (tg.nn.sigmoid, exactly(lambda x: 1 / (1 + mpmath.exp(-x))), ANY),
    (tg.nn.log_sigmoid, exactly(lambda x: -mpmath.log1p(mpmath.exp(-x))), ANY),
    (tg.nn.silu, exactly(lambda x: x / (1 + mpmath.exp(-x))), ANY),
    (tg.nn.tanh, exactly(mpmath.tanh), ANY),
    (tg.nn.softplus, exactly(lambda x: mpmath.log1p(mpmath.exp(x))), away(0.0)),
    (tg.nn.softsign, lambda x: x / (1 + np.abs(x)), away(0.0)),
]:
    row(function, reference, RANK0, domain, order=3 if function is tg.nn.relu else 2)
row(tg.nn.leaky_relu, lambda x: np.where(x > 0, x, -0.5 * x), RANK0, away(0.0), label="alpha",
    call=lambda x: tg.nn.leaky_relu(x, -0.5))  # fmt: skip
row(tg.nn.elu, lambda x: np.where(x > 0, x, 2 * (np.exp(x) - 1)), RANK0, away(0.0), label="alpha",
    call=lambda x: tg.nn.elu(x, 2.0))  # fmt: skip
row(
    tg.nn.gelu,
    exactly(
        lambda x: (
            x
            * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))
            / 2
        )
    ),
    RANK0,
    ANY,
    label="approximate",
    call=lambda x: tg.nn.gelu(x, approximate=True),
)
for axis in (-1, 0):
    for function, reference in [
        (tg.nn.softmax, softmax),
        (tg.nn.log_softmax, lambda x, axis: x - logsumexp(x, axis, True)),
    ]:
        row(function, partial(reference, axis=axis), over(RANK1, axis), ANY, label=str(axis),
            call=partial(function, axis=axis), lacks=NO_0D)  # fmt: skip


def dropped(x: Array, rate: float, seed: int) -> Array:
    kept = halves(seed, x.size).reshape(x.shape) < round((1 - rate) * 2**32)
    return np.where(kept, x / (1 - rate), 0.0)


for rate in (0.0, 0.25):
    row(
        tg.nn.dropout,
        partial(dropped, rate=rate, seed=3),
        RANK0,
        ANY,
        label=str(rate),
        call=lambda x, rate=rate: tg.nn.dropout(x, rate, generator=tg.random.Generator(3)),
    )

LAYERS = (
    ((2, 3), (3, 5), (5,)),
    ((3,), (3, 2), (2,)),
    ((2, 1, 3), (3, 4), (4,)),
    ((1, 1), (1, 1), (1,)),
    ((0, 3), (3, 2), (2,)),
    ((4, 7), (7, 3), (3,)),
    ((3, 0), (0, 2), (2,)),
)


def affine(x: Array, w: Array, b: Any = 0.0) -> Array:
    return np.asarray(np.sum(x[..., :, None] * w, axis=-2) + b)


def off_zero(*arguments: Array) -> Any:
    return (np.abs(affine(*arguments)) > 0.02).all()


for function, reference, valid in [
    (tg.nn.linear, affine, lambda *_: True),
    (tg.nn.linear_relu, lambda *xs: relu(affine(*xs)), off_zero),
]:
    away_weights = [ANY, ANY, away(0.0, gap=0.1)]  # the bias: of an empty sum it is all there is
    row(function, reference, LAYERS, *away_weights, valid=valid, order=3, lacks=NO_0D)
    # A product over nothing is zero, where ReLU has its kink: it is left out without a bias.
    pairs = tuple(shapes[:2] for shapes in LAYERS if shapes[0] != (3, 0))
    row(function, reference, pairs, *away_weights[:2], label="no-bias", valid=valid, lacks=NO_0D)

# ---- cross-entropies

CLASSES = 5
LOGITS = (
    ((3, CLASSES), (3,)),
    ((1, CLASSES), (1,)),
    ((CLASSES,), ()),
    ((2, 1, CLASSES), (2, 1)),
    ((7, CLASSES), (7,)),
)
EMPTY_LOGITS = (*LOGITS, ((0, CLASSES), (0,)))
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.25, 3.0])


def label_loss(
    logits: Array,
    labels: Array,
    smoothing: float = 0.0,
    ignore: int | None = None,
    weights: Array | None = None,
    reduction: str = "mean",
) -> Any:
    used = np.ones(labels.shape) if ignore is None else (labels != ignore).astype(float)
    safe = np.where(used > 0, labels, 0)
    losses = used * cross_entropy(logits, one_hot(safe, CLASSES), smoothing, weights)
    if reduction == "none":
        return losses
    counts = used if weights is None else used * weights[safe]
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def some_are_used(_logits: Array, labels: Array) -> Any:
    return (labels != 2).any()


for options in (
    {},
    {"reduction": "none"},
    {"reduction": "sum"},
    {"smoothing": 0.1},
    {"ignore": 2},
    {"ignore": 2, "smoothing": 0.2, "reduction": "none"},
    {"weights": WEIGHTS},
    {"weights": WEIGHTS, "reduction": "none"},
    {"weights": WEIGHTS, "smoothing": 0.1},
    {"weights": WEIGHTS, "smoothing": 0.3, "ignore": 2},
    {"weights": WEIGHTS, "ignore": 2, "reduction": "sum"},
):
    names = {"smoothing": "label_smoothing", "ignore": "ignore_label", "weights": "class_weights"}
    row(
        tg.nn.softmax_cross_entropy,
        partial(label_loss, **options),
        EMPTY_LOGITS if "reduction" in options else LOGITS,
        ANY,
        integers(0, CLASSES),
        label=",".join("weights" if k == "weights" else f"{k}={v}" for k, v in options.items()),
        call=partial(
            tg.nn.softmax_cross_entropy, **{names.get(k, k): v for k, v in options.items()}
        ),
        valid=some_are_used
        if "ignore" in options and "reduction" not in options
        else lambda *_: True,
        order=3,  # gradients that are primitives have rules of their own
        lacks=() if "reduction" in options else NO_EMPTY,
    )


def target_loss(logits: Array, targets: Array, *, reduction: str = "mean", **options: Any) -> Any:
    losses = cross_entropy(logits, targets, **options)
    return (
        losses
        if reduction == "none"
        else losses.sum() / (losses.size if reduction == "mean" else 1)
    )


for options in (
    {},
    {"reduction": "none"},
    {"smoothing": 0.1, "reduction": "sum"},
    {"weights": WEIGHTS},
    {"weights": WEIGHTS, "smoothing": 0.2, "reduction": "none"},
):
    row(
        tg.nn.softmax_cross_entropy,
        partial(target_loss, **options),
        tuple((x, x) for x, _ in (EMPTY_LOGITS if "reduction" in options else LOGITS)),
        ANY,
        probabilities,
        label="targets,"
        + ",".join("weights" if k == "weights" else f"{k}={v}" for k, v in options.items()),
        call=partial(
            tg.nn.softmax_cross_entropy, **{names.get(k, k): v for k, v in options.items()}
        ),
        order=3,
        lacks=NO_0D if "reduction" in options else ("0-d", "empty"),
    )

ALIKE_PAIRS = tuple((shape, shape) for (shape,) in RANK0)
for reduction in ("mean", "sum", "none"):

    def reference(x: Array, t: Array, reduction: str = reduction) -> Any:
        p = sigmoid(x)
        losses = -(t * np.log(p) + (1 - t) * np.log(1 - p))
        if reduction == "none":
            return losses
        return losses.sum() / (losses.size if reduction == "mean" else 1)

    row(
        tg.nn.sigmoid_cross_entropy,
        reference,
        tuple(s for s in ALIKE_PAIRS if 0 not in s[0]) if reduction == "mean" else ALIKE_PAIRS,
        away(0.0),
        uniform(0.0, 1.0),
        label=reduction,
        call=partial(tg.nn.sigmoid_cross_entropy, reduction=reduction),
        lacks=NO_EMPTY if reduction == "mean" else (),
    )

# ---- losses: (y_true, y_pred)

EXAMPLES = tuple((s, s) for s in [(2, 3), (1, 1), (0, 3), (5,), (2, 1, 3), (7, 2), ()])
PROBABLE = tuple((s, s) for s in [(2, 3), (1, 2), (0, 3), (5,), (2, 1, 3), (7, 2)])


def last(losses: Array) -> Array:
    return losses if losses.ndim == 0 else np.asarray(losses.sum(-1) / losses.shape[-1])


def huber(t: Array, p: Array, delta: float = 1.0) -> Array:
    e = np.abs(t - p)
    return last(np.where(e <= delta, e * e / 2, delta * (e - delta / 2)))


def binary(t: Array, p: Array, smoothing: float = 0.0) -> Array:
    t = (1 - smoothing) * t + smoothing / 2
    return last(-(t * np.log(p) + (1 - t) * np.log(1 - p)))


def categorical(t: Array, p: Array, smoothing: float = 0.0) -> Array:
    t = (1 - smoothing) * t + smoothing / t.shape[-1]
    return np.asarray(-(t * np.log(p / p.sum(-1, keepdims=True))).sum(-1))


def divergence(t: Array, p: Array) -> Array:
    return np.asarray(np.sum(t * (np.log(t) - np.log(p)), axis=-1))


def off_bend(delta: float) -> Callable[[Array, Array], Any]:
    return lambda t, p: (np.abs(np.abs(t - p) - delta) > 0.05).all() and apart(t, p)


for function, reference, fields in [
    (tg.losses.mean_squared_error, lambda t, p: last((t - p) ** 2), {}),
    (tg.losses.mean_absolute_error, lambda t, p: last(np.abs(t - p)), {"valid": apart}),
    (tg.losses.huber, huber, {"valid": off_bend(1.0)}),
]:
    row(function, reference, EXAMPLES, ANY, ANY, **fields)
row(tg.losses.mean_squared_error, lambda t, p: last((t[..., None] - p) ** 2),
    (((3,), (3, 1)), ((1,), (1, 1)), ((0,), (0, 1)), ((2, 5), (2, 5, 1))), ANY, ANY,
    label="column", lacks=NO_0D)  # fmt: skip
row(tg.losses.huber, partial(huber, delta=0.5), EXAMPLES, ANY, ANY, label="delta",
    call=partial(tg.losses.huber, delta=0.5), valid=off_bend(0.5))  # fmt: skip

INSIDE = uniform(0.1, 0.9)
row(tg.losses.binary_crossentropy, binary, EXAMPLES, INSIDE, INSIDE)
row(
    tg.losses.binary_crossentropy,
    partial(binary, smoothing=0.2),
    EXAMPLES,
    INSIDE,
    INSIDE,
    label="smoothing",
    call=partial(tg.losses.binary_crossentropy, label_smoothing=0.2),
)
row(tg.losses.binary_crossentropy, lambda t, x: binary(t, sigmoid(x), 0.1), EXAMPLES, INSIDE,
    away(0.0), label="logits",
    call=partial(tg.losses.binary_crossentropy, from_logits=True, label_smoothing=0.1))  # fmt: skip
row(tg.losses.categorical_crossentropy, categorical, PROBABLE, probabilities, probabilities,
    lacks=NO_0D)  # fmt: skip
row(tg.losses.categorical_crossentropy, partial(categorical, smoothing=0.3), PROBABLE,
    probabilities, probabilities, label="smoothing", lacks=NO_0D,
    call=partial(tg.losses.categorical_crossentropy, label_smoothing=0.3))  # fmt: skip
row(tg.losses.categorical_crossentropy, lambda t, x: cross_entropy(x, t, 0.1), PROBABLE,
    probabilities, ANY, label="logits", lacks=NO_0D, call=partial(
        tg.losses.categorical_crossentropy, from_logits=True, label_smoothing=0.1))  # fmt: skip
row(tg.losses.kl_divergence, divergence, PROBABLE,
    probabilities, probabilities, lacks=NO_0D)  # fmt: skip


def sparse(labels: Array, p: Array, ignore: int | None = None) -> Array:
    labels = labels.reshape(p.shape[:-1])
    p = p / p.sum(axis=-1, keepdims=True)  # what a softmax of their logarithms makes of them
    losses = -np.log(np.take_along_axis(p, labels[..., None], -1)[..., 0])
    return np.where(labels == ignore, 0.0, losses) if ignore is not None else losses


LABELLED = tuple((labels, logits) for logits, labels in EMPTY_LOGITS)
row(
    tg.losses.sparse_categorical_crossentropy, sparse, LABELLED, integers(0, CLASSES), probabilities
)
row(tg.losses.sparse_categorical_crossentropy, sparse,
    (((3, 1), (3, CLASSES)), ((1, 1), (1, CLASSES)), ((0, 1), (0, CLASSES))),
    integers(0, CLASSES), probabilities, label="column", lacks=NO_0D)  # fmt: skip
row(tg.losses.sparse_categorical_crossentropy, lambda t, x: sparse(t, softmax(x), ignore=2),
    LABELLED, integers(0, CLASSES), ANY, label="logits,ignore", call=partial(
        tg.losses.sparse_categorical_crossentropy, from_logits=True, ignore_class=2))  # fmt: skip

# The classes reduce over examples; with weights each loss is multiplied before.
BATCHES = tuple((s, s) for s in [(2, 3), (1, 1), (5,), (2, 1, 3), (7, 2)])
BATCH_LACKS = ("0-d", "empty")
LOSS_CLASSES: dict[Any, Callable[..., Any]] = {
    tg.losses.mean_squared_error: tg.losses.MeanSquaredError,
    tg.losses.mean_absolute_error: tg.losses.MeanAbsoluteError,
    tg.losses.huber: tg.losses.Huber,
    tg.losses.binary_crossentropy: tg.losses.BinaryCrossentropy,
    tg.losses.categorical_crossentropy: tg.losses.CategoricalCrossentropy,
    tg.losses.kl_divergence: tg.losses.KLDivergence,
}
for function, losses in [
    (tg.losses.mean_squared_error, lambda t, p: last((t - p) ** 2)),
    (tg.losses.mean_absolute_error, lambda t, p: last(np.abs(t - p))),
    (tg.losses.huber, huber),
    (tg.losses.binary_crossentropy, binary),
    (tg.losses.categorical_crossentropy, categorical),
    (tg.losses.kl_divergence, divergence),
]:
    make = LOSS_CLASSES[function]
    row(
        function,
        lambda t, p, losses=losses: np.mean(losses(t, p)),
        BATCHES,
        INSIDE,
        INSIDE,
        label="class",
        call=lambda t, p, make=make: make()(t, p),
        valid=apart,
        lacks=BATCH_LACKS,
    )
    row(
        function,
        lambda t, p, w, losses=losses: losses(t, p) * w,
        (
            ((2, 3), (2, 3), (2,)),
            ((1, 1), (1, 1), (1,)),
            ((7, 2), (7, 2), ()),
            ((0, 3),) * 2 + ((0,),),
        ),
        INSIDE,
        INSIDE,
        POSITIVE,
        label="weights",
        call=lambda t, p, w, make=make: make(reduction="none")(t, p, w),
        valid=lambda t, p, w: apart(t, p),
    )
row(tg.losses.mean_squared_error, lambda t, p, w: np.sum(last((t - p) ** 2) * w),
    (((2, 3), (2, 3), (2,)), ((1, 1), (1, 1), (1,)), ((0, 3), (0, 3), (0,))), ANY, ANY, POSITIVE,
    label="sum", call=lambda t, p, w: tg.losses.MeanSquaredError("sum")(t, p, w),
    lacks=NO_0D)  # fmt: skip
row(
    tg.losses.sparse_categorical_crossentropy,
    lambda t, x: sparse(t, softmax(x), ignore=2).sum() / max((t != 2).sum(), 1),
    tuple(pair for pair in LABELLED if pair[0] != (0,)),
    integers(0, CLASSES),
    ANY,
    label="class,ignore",
    call=lambda t, x: tg.losses.SparseCategoricalCrossentropy(True, ignore_class=2)(t, x),
    lacks=NO_EMPTY,
)

# ---- random numbers: what a seed gives is a function of it


def uniforms(seed: int, count: int, dtype: Any) -> Array:
    """Return multiples of 2**-m below 1, with m the bits of the type's mantissa."""
    if dtype == np.float64:
        return np.asarray((bits(seed, count) >> np.uint64(11)).astype(dtype) * 2.0**-53)
    m = {np.float32: 24, np.float16: 11}[dtype]
    return np.asarray((halves(seed, count) >> np.uint64(32 - m)).astype(dtype) * dtype(2.0**-m))


def box_muller(seed: int, count: int) -> Array:
    u, v = uniforms(seed, count + count % 2, np.float64).reshape(-1, 2).T
    radius, angle = np.sqrt(-2 * np.log(1 - u)), 2 * np.pi * v
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count]


FLOATS = (np.float16, np.float32, np.float64)
row(
    tg.random.uniform,
    lambda: [
        *[uniforms(5, 15, dtype).reshape(3, 5) for dtype in FLOATS],
        uniforms(5, 7, np.float64) * 3 - 1,
        np.floor(uniforms(5, 15, np.float64) * 17).astype(np.int32).reshape(3, 5) - 8,
    ],
    ((),),
    call=lambda: [
        *[tg.random.uniform((3, 5), dtype=dtype, seed=5) for dtype in FLOATS],
        tg.random.uniform(7, -1.0, 2.0, dtype=tg.float64, seed=5),
        tg.random.uniform((3, 5), -8, 9, dtype=tg.int32, seed=5),
    ],
    lacks=KINDS,
)
row(
    tg.random.normal,
    lambda: [box_muller(5, 15).reshape(3, 5), box_muller(5, 7) * 3 - 1],
    ((),),
    call=lambda: [
        tg.random.normal((3, 5), dtype=tg.float64, seed=5),
        tg.random.normal(7, -1.0, 3.0, dtype=tg.float64, seed=5),
    ],
    lacks=KINDS,
)
row(tg.random.permutation, lambda: np.argsort(bits(5, 9), kind="stable"), ((),),
    call=lambda: tg.random.permutation(9, seed=5), lacks=KINDS)  # fmt: skip
row(
    tg.random.shuffle,
    lambda x: x[np.argsort(bits(5, len(x)), kind="stable")],
    RANK1,
    ANY,
    call=lambda x: tg.random.shuffle(x, seed=5),
    lacks=NO_0D,
)

# ---- what operations refuse


@dataclass(frozen=True)
class Refusal:
    """A call that must fail: by which exception, with which message."""

    function: Callable[..., Any]
    exception: type[Exception]
    match: str
    call: Callable[[], Any]


REFUSALS: list[Refusal] = []


def refuses(
    function: Callable[..., Any],
    exception: type[Exception],
    match: str,
    *calls: Callable[[], Any],
) -> None:
    """Enter calls that must fail; `NAME` in the message stands for the function's, in brackets."""
    match = match.replace("NAME", rf"^\[{function.__name__}\]")
    REFUSALS.extend(Refusal(function, exception, match, call) for call in calls)


VECTOR, EMPTY, WIDE = np.ones(3), np.ones((0, 3)), np.ones((2, 3), np.int64)

for case in [c for c in CASES if c.name in vars(tg) and len(c.domains) == 1 and c.shapes is RANK0]:
    refuses(case.function, TypeError, "None", partial(case.call, None))
for case in [c for c in CASES if c.name in vars(tg) and c.shapes is PAIRS]:
    refuses(case.function, ValueError, r"NAME.*got int64\[2, 3\], int64\[4\]",
            partial(case.function, WIDE, np.ones(4, np.int64)))  # fmt: skip
    refuses(case.function, TypeError, "NAME argument 1 must be a tensor, an array, a number",
            partial(case.function, VECTOR, "two"))  # fmt: skip
for function in (tg.bitwise_and, tg.bitwise_or, tg.bitwise_xor):
    refuses(function, TypeError, "NAME.*not supported", partial(function, 1.5, 2))
refuses(tg.bitwise_invert, TypeError, "NAME.*not supported", lambda: tg.bitwise_invert(1.5))
refuses(tg.clip, ValueError, r"^\[clip_below\].*\[2, 3\]", lambda: tg.clip(X, np.zeros(2)))
refuses(tg.clip, ValueError, r"^\[clip_above\].*\[2, 3\]", lambda: tg.clip(X, None, np.zeros(2)))
refuses(tg.where, ValueError, r"NAME.*\[2, 3\]", lambda: tg.where(X > 1, X, np.ones(2)))
refuses(tg.astype, TypeError, "NAME.*nonsense", lambda: tg.astype(X, "nonsense"))
refuses(tg.astype, TypeError, "NAME dtype must be a real number", lambda: tg.astype(X, complex))

AXIS_NUMBER = (tg.argmax, tg.argmin, tg.cumulative_sum, tg.cumulative_prod, tg.argsort, tg.unstack,
               tg.nn.softmax, tg.nn.log_softmax)  # fmt: skip
AXIS_TUPLE = (tg.sum, tg.prod, tg.mean, tg.var, tg.std, tg.norm, tg.max, tg.min, tg.logsumexp,
              tg.all, tg.any, tg.flip, tg.squeeze)  # fmt: skip
for function in AXIS_NUMBER + AXIS_TUPLE:
    refuses(function, ValueError, "NAME axis 2 is out of bounds", partial(function, X, axis=2))
    refuses(function, ValueError, "NAME axis -3 is out of bounds", partial(function, X, axis=-3))
    refuses(function, TypeError, "NAME axis must be an int.*0.5", partial(function, X, axis=0.5))
for function in AXIS_TUPLE:
    refuses(function, ValueError, "NAME .*given twice", partial(function, X, axis=(0, -2)))
for function in (tg.max, tg.min, tg.logsumexp):
    refuses(function, ValueError, r"NAME.*\[0, 3\]", partial(function, EMPTY))
for function in (tg.argmax, tg.argmin):
    refuses(function, ValueError, "NAME.*empty", partial(function, EMPTY))
for function in (tg.cumulative_sum, tg.cumulative_prod):
    refuses(function, ValueError, r"NAME axis must be given .*\(2, 3\)", partial(function, X))

refuses(tg.reshape, ValueError, r"NAME 6 elements of \(2, 3\) cannot take shape",
        lambda: tg.reshape(X, (4, 2)), lambda: tg.reshape(X, (4, -1)),
        lambda: tg.reshape(X, (-1, -1)), lambda: tg.reshape(X, (-2, -3)))  # fmt: skip
refuses(tg.reshape, TypeError, "NAME a shape holds integers", lambda: tg.reshape(X, (2.0, 3)))
refuses(tg.permute_dims, ValueError, "NAME axes must name all 2", lambda: tg.permute_dims(X, (0,)))
refuses(tg.permute_dims, ValueError, "NAME .*twice", lambda: tg.permute_dims(X, (0, 0)))
refuses(tg.permute_dims, ValueError, "NAME axis 2 is out", lambda: tg.permute_dims(X, (0, 2)))
TWO_AXES = r"^\[\w+\] x must have at least two axes, got shape \(3,\)"
for function in (tg.matrix_transpose, tg.diagonal, tg.trace, tg.tril, tg.triu):
    refuses(function, ValueError, TWO_AXES, partial(function, VECTOR))
refuses(tg.moveaxis, ValueError, "NAME axis 2 is out of bounds", lambda: tg.moveaxis(X, 2, 0))
refuses(tg.moveaxis, ValueError, "NAME 2 source axes", lambda: tg.moveaxis(X, (0, 1), 0))
refuses(tg.expand_dims, ValueError, "NAME axis 3 is out", lambda: tg.expand_dims(X, 3))
refuses(tg.squeeze, ValueError, r"NAME axis 1 of shape \(2, 3\) has", lambda: tg.squeeze(X, 1))
refuses(tg.broadcast_to, ValueError, r"NAME.*\[2, 3\]", lambda: tg.broadcast_to(X, (2, 2)))
for function in (tg.concat, tg.stack):
    refuses(function, ValueError, "NAME needs at least one tensor", partial(function, []))
    refuses(function, ValueError, "NAME axis 3 is out of", partial(function, [X], axis=3))
    refuses(function, ValueError, r"NAME.*\[2, 3\].*\[3\]", partial(function, [X, X[0]]))
refuses(tg.split, ValueError, "NAME an axis of 3 does not", lambda: tg.split(X, 2, axis=1))
refuses(tg.split, ValueError, "NAME an axis of 2 does not", lambda: tg.split(X, 0))
refuses(tg.split, ValueError, "NAME axis 2 is out of", lambda: tg.split(X, 2, axis=2))
refuses(tg.roll, ValueError, "NAME axis 2 is out of bounds", lambda: tg.roll(X, 1, 2))
refuses(tg.roll, ValueError, "NAME 3 shifts for 2 axes", lambda: tg.roll(X, (1, 2, 3), (0, 1)))
refuses(tg.repeat, ValueError, "NAME repeats must be one number or 2", lambda: tg.repeat(X, -1, 0))
refuses(tg.repeat, ValueError, "NAME .* 3 numbers", lambda: tg.repeat(X, [1, 2], axis=1))
refuses(tg.repeat, ValueError, "NAME axis 2 is out of", lambda: tg.repeat(X, 2, axis=2))
refuses(tg.tile, ValueError, "NAME repetitions must be >= 0", lambda: tg.tile(X, -1))
refuses(tg.pad, ValueError, "NAME mode must be one of.*'wrap'", lambda: tg.pad(X, 1, mode="wrap"))
refuses(tg.pad, ValueError, "NAME widths must be a number", lambda: tg.pad(X, (1, 2, 3)))
refuses(tg.pad, ValueError, "NAME widths must be integers >= 0",
        lambda: tg.pad(X, -1), lambda: tg.pad(X, 0.5))  # fmt: skip
refuses(tg.pad, ValueError, r"NAME.*empty", lambda: tg.pad(EMPTY, 1, mode="edge"))
refuses(tg.pad, TypeError, "NAME value must be a number, got",
        lambda: tg.pad(X, ((1, 1), (0, 0)), value=(1.0, 2.0, 3.0)),
        lambda: tg.pad(X, 1, value=tg.constant(1.0)))  # fmt: skip

Y = tg.constant(X)
refuses(tg.getitem, IndexError, "NAME an index is an integer", lambda: Y[0.5], lambda: Y[[0.5]])
refuses(tg.getitem, IndexError, "NAME.*out of bounds", lambda: Y[2], lambda: Y[[0, 3]])
refuses(tg.getitem, IndexError, "NAME.*too many indices", lambda: Y[0, 0, 0])
refuses(tg.getitem, IndexError, "NAME.*ellipsis", lambda: Y[..., 0, ...])
refuses(tg.getitem, IndexError, "NAME.*boolean", lambda: Y[MASK4])
refuses(tg.getitem, IndexError, "NAME.*ragged", lambda: Y[[[0], [0, 1]]])
refuses(tg.take, ValueError, "NAME axis must be given", lambda: tg.take(X, [0]))
for function in (tg.take, tg.gather):
    refuses(function, ValueError, r"^\[take\] axis 2 is out", partial(function, X, [0], axis=2))
    refuses(function, IndexError, "out of bounds", partial(function, X, [2], axis=0))
    refuses(function, IndexError, "an index is an integer", partial(function, X, [0.5], axis=0))
    refuses(function, IndexError, "must be integers", partial(function, X, X[0] > 1, axis=1))
refuses(tg.take_along_axis, ValueError, r"NAME indices must have the rank of x, 2, got \(2,\)",
        lambda: tg.take_along_axis(X, [0, 1]))  # fmt: skip
refuses(tg.take_along_axis, IndexError, "out of bounds", lambda: tg.take_along_axis(X, [[0], [3]]))
refuses(tg.take_along_axis, ValueError, "NAME axis 2 is out",
        lambda: tg.take_along_axis(X, [[0]], axis=2))  # fmt: skip
refuses(tg.one_hot, TypeError, "NAME indices must be integers", lambda: tg.one_hot(0.5, 3))
refuses(tg.one_hot, ValueError, "NAME axis 2 is out", lambda: tg.one_hot([1], 3, axis=2))
refuses(tg.sort, ValueError, "axis 2 is out of bounds", lambda: tg.sort(X, axis=2))
refuses(tg.top_k, ValueError, "NAME k must be from 0 to 3", lambda: tg.top_k(X, 4),
        lambda: tg.top_k(X, -1))  # fmt: skip
refuses(tg.top_k, ValueError, "NAME", lambda: tg.top_k(1.0, 0))

refuses(tg.matmul, ValueError, r"NAME.*\(2, 3\) and \(2, 3\)", lambda: tg.matmul(X, X))
refuses(tg.matmul, ValueError, "NAME a 0-d tensor", lambda: X @ tg.constant(2.0))
refuses(tg.matmul, ValueError, "NAME.*2, 2, 3.*3, 3, 2",
        lambda: tg.matmul(np.ones((2, 2, 3)), np.ones((3, 3, 2))))  # fmt: skip
refuses(tg.outer, ValueError, r"NAME needs two vectors.*\(2, 3\)", lambda: tg.outer(X, X[0]))
refuses(tg.vecdot, ValueError, "NAME axis -1 must have one", lambda: tg.vecdot(X, X[:, :2]))
refuses(tg.vecdot, ValueError, "NAME axis", lambda: tg.vecdot(X, 1.0))
refuses(tg.vecdot, ValueError, "NAME axis", lambda: tg.vecdot(VECTOR, VECTOR, axis=-2))
refuses(tg.tensordot, ValueError, "NAME.*unlike lengths", lambda: tg.tensordot(X, X, axes=1))
refuses(tg.tensordot, ValueError, "NAME cannot sum", lambda: tg.tensordot(X, X, axes=3))
refuses(tg.tensordot, ValueError, "NAME axes", lambda: tg.tensordot(X, X, axes=((0, 1), (0,))))
refuses(tg.einsum, ValueError, "NAME .* 2 operands, got 1", lambda: tg.einsum("ij,jk", X))
refuses(tg.einsum, ValueError, "NAME the term 'i' does not fit", lambda: tg.einsum("i->i", X))
refuses(tg.einsum, ValueError, "NAME the output of", lambda: tg.einsum("ij->ii", X),
        lambda: tg.einsum("ij->k", X))  # fmt: skip
refuses(tg.einsum, ValueError, "NAME subscripts are letters", lambda: tg.einsum("i1", X))
refuses(tg.einsum, ValueError, "NAME", lambda: tg.einsum("ij,ij->i", X, X.T))
refuses(tg.einsum, ValueError, r"NAME 'i' has two lengths in 'ii', of shape \(1, 3\)",
        lambda: tg.einsum("ii->i", X[:1]), lambda: tg.einsum("ii", X[:1]))  # fmt: skip
refuses(tg.diagonal, ValueError, "NAME axis1 and axis2", lambda: tg.diagonal(X, axis1=1))
refuses(tg.diagonal, ValueError, "NAME axis 2 is out of", lambda: tg.diagonal(X, axis1=2))

refuses(tg.arange, ValueError, "NAME step must not be 0", lambda: tg.arange(1, 2, 0))
for function in (tg.zeros, tg.ones, tg.random.uniform, tg.random.normal):
    refuses(function, TypeError, r"a shape holds integers, got 2\.5", partial(function, 2.5))
refuses(tg.full, ValueError, "NAME value must be one number", lambda: tg.full(2, [1.0, 2.0]))
refuses(tg.full, TypeError, "a tensor holds numbers", lambda: tg.full(2, "x"))
refuses(tg.to_backend, ValueError, "backend must be.*'torch'", lambda: tg.to_backend(X, "torch"))
refuses(tg.asarray, ValueError, "NAME copy=False", lambda: tg.asarray(X, copy=False))
refuses(tg.from_dlpack, ValueError, "copies always", lambda: tg.from_dlpack(X, copy=False))
refuses(tg.constant, TypeError, "^a tensor holds numbers", lambda: tg.constant("one"),
        lambda: tg.constant(None), lambda: tg.constant({"a": 1.0}))  # fmt: skip
refuses(tg.constant, ValueError, "ragged", lambda: tg.constant([[1.0], [2.0, 3.0]]))
refuses(tg.constant, TypeError, r"tg\.stack", lambda: tg.constant([tg.constant(1.0)]))
refuses(tg.constant, ValueError, "^2 values cannot fill", lambda: tg.constant([1.0, 2.0], shape=3))

refuses(tg.nn.dropout, ValueError, "NAME rate must be at least 0 and below 1",
        lambda: tg.nn.dropout(X, 1.0), lambda: tg.nn.dropout(X, -0.1))  # fmt: skip
for function in (tg.nn.linear, tg.nn.linear_relu):
    refuses(function, ValueError, r"NAME x must be \(\.\.\., i\) and weight \(i, o\)",
            partial(function, X, X), partial(function, X, VECTOR),
            partial(function, 1.0, np.ones((1, 1))))  # fmt: skip
    refuses(function, ValueError, r"NAME bias must have shape \(2,\).*got \(3,\)",
            partial(function, X, np.ones((3, 2)), VECTOR))  # fmt: skip
for labels, match in [
    ([0], r"NAME labels must be integers of shape \(2,\).*got int64 of shape \(1,\)"),
    (X[:1], r"NAME labels must .* of shape \(2, 3\), got float64 of shape \(1, 3\)"),
    ([True, False], "NAME labels .*got bool"),
    ([0, 3], "NAME labels must be from 0 to 2, got 3"),
    ([0, -1], "NAME labels must be from 0 to 2, got -1"),
]:
    refuses(tg.nn.softmax_cross_entropy, ValueError, match.replace("NAME", r"^\[\w+_entropy\]"),
            partial(tg.nn.softmax_cross_entropy, X, labels))  # fmt: skip
for options, match in [
    ({"label_smoothing": 1.5}, r"label_smoothing must be from 0 to 1, got 1\.5"),
    ({"class_weights": [1.0, 2.0]}, r"class_weights must have shape \(3,\), got \(2,\)"),
    ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
]:
    refuses(tg.nn.softmax_cross_entropy, ValueError, f"NAME {match}",
            partial(tg.nn.softmax_cross_entropy, X, [0, 1], **options))  # fmt: skip
refuses(tg.nn.softmax_cross_entropy, ValueError, "NAME ignore_label goes with integer labels",
        lambda: tg.nn.softmax_cross_entropy(X, X, ignore_label=0))  # fmt: skip
refuses(tg.nn.softmax_cross_entropy, TypeError, "NAME logits must be floating",
        lambda: tg.nn.softmax_cross_entropy([[1, 2]], [0]),
        lambda: tg.nn.softmax_cross_entropy(1.0, 0))  # fmt: skip
refuses(tg.nn.sigmoid_cross_entropy, ValueError, r"NAME logits and targets .*\(2, 3\) and \(3,\)",
        lambda: tg.nn.sigmoid_cross_entropy(X, X[0]))  # fmt: skip
refuses(tg.nn.sigmoid_cross_entropy, ValueError, "NAME reduction must be",
        lambda: tg.nn.sigmoid_cross_entropy(X, X, reduction="max"))  # fmt: skip

for function, make in LOSS_CLASSES.items():
    refuses(function, ValueError, r"NAME y_true and y_pred must .*\(2, 3\) and \(3,\)",
            partial(function, X, X[0]))  # fmt: skip
    refuses(function, ValueError, "reduction must be 'sum_over", partial(make, reduction="mean"))
    refuses(function, ValueError, r"NAME sample_weight must have shape \(2,\), got \(3,\)",
            lambda make=make: make()(X, X, VECTOR))  # fmt: skip
refuses(tg.losses.huber, ValueError, "NAME delta must be above 0", lambda: tg.losses.huber(X, X, 0))
SPARSE = tg.losses.sparse_categorical_crossentropy
refuses(SPARSE, TypeError, "NAME labels must be integers, got float32.*categorical_crossentropy",
        lambda: SPARSE([0.5, 1.0], X))  # fmt: skip
refuses(SPARSE, ValueError, "got 9", lambda: SPARSE([0, 9], X))
refuses(SPARSE, ValueError, r"labels must .*\(2,\).*got .*\(1,\)", lambda: SPARSE([0], X))

INTS = {"dtype": tg.int64}
refuses(tg.random.uniform, ValueError, "NAME integers need maxval",
        lambda: tg.random.uniform(2, **INTS))  # fmt: skip
refuses(tg.random.uniform, ValueError, r"NAME minval must be below maxval by at most 2\*\*53",
        lambda: tg.random.uniform(2, 3, 3, **INTS),
        lambda: tg.random.uniform(2, 0, 2**53 + 1, **INTS))  # fmt: skip
refuses(tg.random.uniform, TypeError, "NAME dtype must be float",
        lambda: tg.random.uniform(2, dtype=tg.bool))  # fmt: skip
refuses(tg.random.normal, TypeError, "NAME dtype must be float",
        lambda: tg.random.normal(2, **INTS))  # fmt: skip
refuses(tg.random.shuffle, ValueError, "NAME a 0-d tensor", lambda: tg.random.shuffle(1.0))
