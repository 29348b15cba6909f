"""Random numbers by counting: the same on both backends, and the same again after the same seed.

Philox4x64-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011)
turns a key and a counter into bits. The key is the seed, the counter a Variable that every draw
advances. Bits, integers, uniforms, masks and permutations are equal on NumPy and CuPy; normals
agree to a few units in the last place.
"""

from __future__ import annotations

import contextlib
import math
import operator
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad._recording import no_record
from tapegrad.kernels import random as kernels
from tapegrad.ops import elementwise as ew
from tapegrad.ops import indexing
from tapegrad.ops.arguments import as_tensor, normalize_shape
from tapegrad.ops.creation import Shape, to_backend
from tapegrad.primitive import MultiPrimitive, Primitive, multi_primitive, primitive
from tapegrad.tensor import DEFAULT_FLOAT, ArrayLike, Tensor
from tapegrad.variable import Variable


def _bits_forward(xp: Module, counter: Array, key: Array, *, count: int) -> Array:
    if count == 0:  # a device need not be asked
        return xp.empty(0, np.uint64)
    bits = np.random.Philox(key=_number(key), counter=int(counter)).random_raw(count)
    return bits if xp is np else xp.asarray(bits)


def _number(key: Array) -> int:
    low, high = key.tolist()
    return int(high) << 64 | int(low)


# `count` words of 64 bits; four words make one step of the counter. Counter and key are inputs, so
# that a compiled program sees them change.
_bits: Primitive = primitive("random_bits", _bits_forward, None, None, kernel=kernels.philox_bits)

_WORDS_A_STEP = 4
# How many bits a number between 0 and 1 takes: as many as its type can tell apart.
_MANTISSA = {np.dtype(np.float64): 53, np.dtype(np.float32): 24, np.dtype(np.float16): 11}


def _fractions(bits: Array, count: int, dtype: Any) -> Array:
    """Return `count` numbers k * 2**-m, 0 <= k < 2**m, with m the bits of the mantissa."""
    mantissa = _MANTISSA[dtype]
    if dtype != np.float64:
        bits = bits.view(np.uint32)
    shift = bits.dtype.type(8 * bits.dtype.itemsize - mantissa)
    return (bits[:count] >> shift).astype(dtype) * dtype.type(2.0**-mantissa)


def _uniform_forward(
    xp: Module, bits: Array, *, shape: tuple[int, ...], dtype: Any, low: float, high: float
) -> Array:
    y = _fractions(bits, math.prod(shape), dtype).reshape(shape)
    if low == 0.0 and high == 1.0:
        return y
    bottom, top = dtype.type(low), dtype.type(high)
    y = y * (top - bottom) + bottom
    # Rounding may reach the upper bound, which is not to be given.
    return xp.minimum(y, np.nextafter(top, bottom)) if low < high else y


def _normal_forward(xp: Module, bits: Array, *, shape: tuple[int, ...], dtype: Any) -> Array:
    # G. E. P. Box and M. E. Muller (1958): two uniforms give two normals.
    count = math.prod(shape)
    wide = np.promote_types(dtype, np.float32)
    pairs = _fractions(bits, count + count % 2, wide).reshape(-1, 2)
    # 1 - u is never 0, so the logarithm is finite
    radius = xp.sqrt(-2 * xp.log(1 - pairs[:, 0]))
    angle = wide.type(2 * math.pi) * pairs[:, 1]
    y = xp.stack([radius * xp.cos(angle), radius * xp.sin(angle)], axis=1)
    return y.reshape(-1)[:count].reshape(shape).astype(dtype)


def _integers_forward(
    xp: Module, bits: Array, *, shape: tuple[int, ...], low: int, high: int, dtype: Any
) -> Array:
    fractions = _fractions(bits, math.prod(shape), np.dtype(np.float64))
    return (xp.floor(fractions * (high - low)).astype(np.int64) + low).astype(dtype).reshape(shape)


def _mask_forward(xp: Module, bits: Array, *, shape: tuple[int, ...], threshold: int) -> Array:
    return (bits.view(np.uint32)[: math.prod(shape)] < threshold).reshape(shape)


def _dropout_forward(
    xp: Module, x: Array, counter: Array, key: Array, *, rate: float
) -> tuple[Array, Array]:
    count = -(-x.size // 2)
    bits = None
    if _bits.kernel is not None and _backend.runs_kernels(xp):  # the meaning would ask the device
        bits = _bits.kernel(xp, counter, key, count=count)
    if bits is None:
        bits = _bits_forward(xp, counter, key, count=count)
    kept = _mask_forward(xp, bits, shape=x.shape, threshold=_threshold(1.0 - rate))
    factors = kept.astype(x.dtype) / (1.0 - rate)
    return x * factors, factors


def _threshold(probability: float) -> int:
    """Return the number below which so large a share of all 32-bit numbers is."""
    return round(probability * 2**32)


_uniform: Primitive = primitive("random_uniform", _uniform_forward, None)
_normal: Primitive = primitive("random_normal", _normal_forward, None)
_integers: Primitive = primitive("random_integers", _integers_forward, None)
_mask: Primitive = primitive("random_mask", _mask_forward, None)
# x times 0 or 1 / (1 - rate), and these factors, constants to whoever differentiates.
_dropout: MultiPrimitive = multi_primitive(
    "dropout",
    _dropout_forward,
    joint_vjp=lambda needs, g, y, _x, _counter, _key, *, rate: (
        None if g[0] is None else ew.scale(g[0], y[1]),
        None,
        None,
    ),
    kernel=kernels.dropout,
)


class Generator:
    """A stream of random numbers with a seed of its own.

    seed  an int >= 0; None takes one from the operating system.

    The stream's place is `counter`, a Variable that lies where numbers are drawn. Drawing from
    several threads is safe, though their order then is not fixed.

    >>> a, b = tg.random.Generator(7), tg.random.Generator(7)
    >>> bool(tg.all(a.normal(3) == b.normal(3)))
    True
    """

    def __init__(self, seed: int | None = None) -> None:
        self._lock = threading.Lock()
        with _backend.backend("numpy"):
            self.counter = Variable(np.int64(0), trainable=False, name="random_counter")
            self._key = Variable(np.zeros(2, np.uint64), trainable=False, name="random_key")
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Begin the stream of another seed, or the same one anew."""
        if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
            raise ValueError(f"a seed is an integer >= 0 or None, got {seed!r}")
        # The operating system's randomness waits until it is needed: importing asks for none.
        self._unseeded = seed is None
        if seed is not None:
            self._set_key(seed)
        self.counter.assign(0)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy goes on from: the same numbers follow in both."""
        if self._unseeded:
            self._set_key(None)
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _set_key(self, seed: int | None) -> None:
        words = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        with no_record():  # whoever draws again wants this key, no other
            self._key.assign(words)
        self._unseeded = False

    @property
    def key(self) -> int:
        """The stream's 128-bit key, made of the seed."""
        if self._unseeded:
            self._set_key(None)
        return _number(self._key._array)

    def _draw(self, numbers: int, bits_each: int) -> Tensor:
        """Return bits for so many numbers, and move on."""
        words = -(-numbers * bits_each // 64)
        with self._drawing(_backend.default_module(), words):
            return _bits(self.counter, self._key, count=words)

    @contextlib.contextmanager
    def _drawing(self, xp: Module, words: int) -> Iterator[None]:
        """Let counter and key be where `xp` is, for nobody else, and move on by so many words."""
        with self._lock:
            if self._unseeded:
                self._set_key(None)
            self.counter._move(xp)
            self._key._move(xp)
            yield
            self.counter.assign_add(-(-words // _WORDS_A_STEP))

    def uniform(
        self,
        shape: Shape = (),
        minval: float = 0.0,
        maxval: float | None = None,
        dtype: Any = DEFAULT_FLOAT,
    ) -> Tensor:
        """Return numbers evenly spread over minval <= x < maxval; see `tapegrad.random.uniform`."""
        kind, lengths = np.dtype(dtype), _lengths("uniform", shape)
        if kind.kind in "iu":
            if maxval is None:
                raise ValueError("[uniform] integers need maxval, the number above the largest")
            return self._integers(lengths, minval, maxval, kind)
        width = _float_width("uniform", kind)
        low, high = float(minval), 1.0 if maxval is None else float(maxval)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(
                f"[uniform] minval must be at most maxval, both finite, got {low} and {high}"
            )
        with np.errstate(over="ignore"):
            # An infinite one would give the same number every time.
            if not np.isfinite(kind.type(high) - kind.type(low)):
                raise ValueError(f"[uniform] {low} to {high} is a range too wide for {kind}")
        bits = self._draw(math.prod(lengths), width)
        return _uniform(bits, shape=lengths, dtype=kind, low=low, high=high)

    def _integers(self, shape: tuple[int, ...], low: Any, high: Any, dtype: Any) -> Tensor:
        low, high = operator.index(low), operator.index(high)
        if not 0 < high - low <= 2**53:
            raise ValueError(
                f"[uniform] minval must be below maxval by at most 2**53, got {low} and {high}"
            )
        limits = np.iinfo(dtype)
        if low < limits.min or high - 1 > limits.max:
            raise ValueError(
                f"[uniform] {dtype} holds {limits.min} to {limits.max}, "
                f"asked for {low} to {high - 1}"
            )
        bits = self._draw(math.prod(shape), 64)
        return _integers(bits, shape=shape, low=low, high=high, dtype=dtype)

    def normal(
        self,
        shape: Shape = (),
        mean: float = 0.0,
        stddev: float = 1.0,
        dtype: Any = DEFAULT_FLOAT,
    ) -> Tensor:
        """Return normally distributed numbers; see `tapegrad.random.normal`."""
        kind, lengths = np.dtype(dtype), _lengths("normal", shape)
        _float_width("normal", kind)
        if isinstance(stddev, (int, float)) and not stddev >= 0:
            raise ValueError(f"[normal] stddev must be a number >= 0, got {stddev!r}")
        count = math.prod(lengths)
        bits = self._draw(count + count % 2, 64 if kind == np.float64 else 32)
        y = _normal(bits, shape=lengths, dtype=kind)
        y = y if stddev == 1.0 else ew.multiply(y, stddev)
        return y if mean == 0.0 else ew.add(y, mean)

    def mask(self, shape: Shape, probability: float) -> Tensor:
        """Return booleans that are True with a probability (to 2**-32)."""
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"[mask] probability must be from 0 to 1, got {probability!r}")
        lengths = _lengths("mask", shape)
        bits = self._draw(math.prod(lengths), 32)
        return _mask(bits, shape=lengths, threshold=_threshold(probability))

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """Return x with each element 0 with probability `rate`; see `tapegrad.nn.dropout`."""
        with self._drawing(_backend.module_of((x._array,)), -(-x.size // 2)):
            y, _ = _dropout(x, self.counter, self._key, rate=rate)
        return y

    def permutation(self, n: int) -> Tensor:
        """Return the integers from 0 to n - 1 in a random order."""
        (count,) = _lengths("permutation", operator.index(n))
        return indexing.argsort(self._draw(count, 64))

    def shuffle(self, x: ArrayLike) -> Tensor:
        """Return the rows of x (its slices along axis 0) in a random order."""
        x = as_tensor(x)
        if x.ndim == 0:
            raise ValueError("[shuffle] a 0-d tensor has no rows")
        order = self.permutation(x.shape[0])
        return indexing.take(x, _at(order, x), axis=0)


def _at(index: Tensor, x: Tensor) -> Tensor:
    """Bring an index to where x is."""
    return index if index.backend == x.backend else to_backend(index, x.backend)


def _lengths(name: str, shape: Shape) -> tuple[int, ...]:
    """Return a shape that numbers can be drawn for."""
    lengths = normalize_shape(name, shape)
    if any(length < 0 for length in lengths):
        raise ValueError(f"[{name}] an axis has no length below 0, got shape {lengths}")
    return lengths


def _float_width(name: str, dtype: np.dtype[Any]) -> int:
    if dtype not in _MANTISSA:
        raise TypeError(f"[{name}] dtype must be float16, float32 or float64, got {dtype}")
    return 64 if dtype == np.float64 else 32


_default = Generator()


def seed(seed: int | None) -> None:
    """Seed the stream that initialisers, dropout, shuffles and this module's functions draw from.

    Raises `ValueError` for anything but an integer >= 0 or None (from the operating system).

    >>> tg.random.seed(1)
    >>> a = tg.random.normal((2,))
    >>> tg.random.seed(1)
    >>> bool(tg.all(a == tg.random.normal((2,))))
    True
    """
    _default.seed(seed)


def default_generator() -> Generator:
    """Return the generator that `seed` seeds."""
    return _default


def _stream(seed: int | None) -> Generator:
    return _default if seed is None else Generator(seed)


def uniform(
    shape: Shape = (),
    minval: float = 0.0,
    maxval: float | None = None,
    dtype: Any = DEFAULT_FLOAT,
    seed: int | None = None,
) -> Tensor:
    """Return numbers evenly spread over minval <= x < maxval (1 for None).

    dtype  float16, float32, float64, or an integer type, which needs maxval.
    seed   None draws from the common stream; a number gives the same numbers every time.

    Raises `ValueError` for an empty range of integers and one of floats that is too wide for
    dtype, `TypeError` for another dtype.

    >>> tg.random.uniform((2, 3)).shape
    (2, 3)
    """
    return _stream(seed).uniform(shape, minval, maxval, dtype)


def normal(
    shape: Shape = (),
    mean: float = 0.0,
    stddev: float = 1.0,
    dtype: Any = DEFAULT_FLOAT,
    seed: int | None = None,
) -> Tensor:
    """Return normally distributed numbers; `dtype` and `seed` as for `uniform`.

    Raises `ValueError` for a stddev below 0, `TypeError` for a dtype that is no floating type.

    >>> tg.random.normal((2, 3)).shape
    (2, 3)
    """
    return _stream(seed).normal(shape, mean, stddev, dtype)


def permutation(n: int, seed: int | None = None) -> Tensor:
    """Return the integers from 0 to n - 1 in a random order.

    >>> sorted(tg.random.permutation(3).tolist())
    [0, 1, 2]
    """
    return _stream(seed).permutation(n)


def shuffle(x: ArrayLike, seed: int | None = None) -> Tensor:
    """Return the rows of x (its slices along axis 0) in a random order.

    Raises `ValueError` for a 0-d tensor.

    >>> sorted(tg.random.shuffle([3, 1, 2]).tolist())
    [1, 2, 3]
    """
    return _stream(seed).shuffle(x)
