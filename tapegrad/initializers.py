"""How weights begin: He, Glorot and LeCun initialisers, constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tapegrad.ops.creation import full
from tapegrad.random import Generator, default_generator
from tapegrad.tensor import DEFAULT_FLOAT, Tensor

Initializer = Callable[..., Tensor]


class VarianceScaling:
    """Random numbers whose variance is `scale` over a layer's number of inputs, outputs or both.

    scale         the numerator; must be above 0.
    mode          `"fan_in"`, `"fan_out"` or `"fan_avg"`, the mean of the two.
    distribution  `"normal"` or `"uniform"`, both with mean 0.
    seed          None draws from the common stream; a number gives the same numbers every time.

    Called with a shape (inputs, outputs) and a dtype. Raises `ValueError` for unknown names.

    >>> tg.initializers.VarianceScaling(2.0, "fan_in", "normal")((3, 4)).shape
    (3, 4)
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "normal",
        seed: int | None = None,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale!r}")
        if mode not in ("fan_in", "fan_out", "fan_avg"):
            raise ValueError(f"mode must be 'fan_in', 'fan_out' or 'fan_avg', got {mode!r}")
        if distribution not in ("normal", "uniform"):
            raise ValueError(f"distribution must be 'normal' or 'uniform', got {distribution!r}")
        self.scale, self.mode, self.distribution, self.seed = scale, mode, distribution, seed

    def __call__(self, shape: tuple[int, ...], dtype: Any = DEFAULT_FLOAT) -> Tensor:
        """Return a tensor of that shape."""
        fan_in, fan_out = _fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        deviation = math.sqrt(self.scale / max(1.0, fan))
        stream = default_generator() if self.seed is None else Generator(self.seed)
        if self.distribution == "normal":
            return stream.normal(shape, stddev=deviation, dtype=dtype)
        bound = math.sqrt(3.0) * deviation
        return stream.uniform(shape, -bound, bound, dtype=dtype)

    def __repr__(self) -> str:
        return f"VarianceScaling({self.scale}, {self.mode!r}, {self.distribution!r})"


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        size = math.prod(shape)
        return size, size
    return math.prod(shape[:-1]), shape[-1]


def he_normal(seed: int | None = None) -> VarianceScaling:
    """Return an initialiser of variance 2 / inputs, normal (K. He et al., 2015): for relu.

    >>> tg.initializers.he_normal()
    VarianceScaling(2.0, 'fan_in', 'normal')
    """
    return VarianceScaling(2.0, "fan_in", "normal", seed)


def he_uniform(seed: int | None = None) -> VarianceScaling:
    """Return an initialiser of variance 2 / inputs, uniform (K. He et al., 2015): for relu.

    >>> tg.initializers.he_uniform()
    VarianceScaling(2.0, 'fan_in', 'uniform')
    """
    return VarianceScaling(2.0, "fan_in", "uniform", seed)


def glorot_normal(seed: int | None = None) -> VarianceScaling:
    """Return an initialiser of variance 2 / (inputs + outputs), normal (Glorot, Bengio, 2010).

    >>> tg.initializers.glorot_normal()
    VarianceScaling(1.0, 'fan_avg', 'normal')
    """
    return VarianceScaling(1.0, "fan_avg", "normal", seed)


def glorot_uniform(seed: int | None = None) -> VarianceScaling:
    """Return an initialiser of variance 2 / (inputs + outputs), uniform (Glorot, Bengio, 2010).

    >>> tg.initializers.glorot_uniform()
    VarianceScaling(1.0, 'fan_avg', 'uniform')
    """
    return VarianceScaling(1.0, "fan_avg", "uniform", seed)


def lecun_normal(seed: int | None = None) -> VarianceScaling:
    """Return an initialiser of variance 1 / inputs, normal (Y. LeCun et al., 1998): for selu.

    >>> tg.initializers.lecun_normal()
    VarianceScaling(1.0, 'fan_in', 'normal')
    """
    return VarianceScaling(1.0, "fan_in", "normal", seed)


def lecun_uniform(seed: int | None = None) -> VarianceScaling:
    """Return an initialiser of variance 1 / inputs, uniform (Y. LeCun et al., 1998).

    >>> tg.initializers.lecun_uniform()
    VarianceScaling(1.0, 'fan_in', 'uniform')
    """
    return VarianceScaling(1.0, "fan_in", "uniform", seed)


def constant(value: float) -> Initializer:
    """Return an initialiser that gives `value` everywhere.

    >>> print(tg.initializers.constant(3.0)((2,)))
    tg.Tensor([3. 3.], shape=(2,), dtype=float32)
    """
    return lambda shape, dtype=DEFAULT_FLOAT: full(shape, value, dtype=dtype)


def zeros() -> Initializer:
    """Return an initialiser that gives zeros.

    >>> print(tg.initializers.zeros()((2,)))
    tg.Tensor([0. 0.], shape=(2,), dtype=float32)
    """
    return constant(0.0)


def ones() -> Initializer:
    """Return an initialiser that gives ones.

    >>> print(tg.initializers.ones()((2,)))
    tg.Tensor([1. 1.], shape=(2,), dtype=float32)
    """
    return constant(1.0)


_BY_NAME: dict[str, Callable[[], Initializer]] = {
    "he_normal": he_normal,
    "he_uniform": he_uniform,
    "glorot_normal": glorot_normal,
    "glorot_uniform": glorot_uniform,
    "lecun_normal": lecun_normal,
    "lecun_uniform": lecun_uniform,
    "zeros": zeros,
    "ones": ones,
}


def get(initializer: Any) -> Initializer:
    """Return the initialiser that a name or a function of (shape, dtype) stands for.

    `he_normal` stands for `he_normal()`, and so on. Raises `ValueError` for an unknown name.

    >>> tg.initializers.get("he_normal")
    VarianceScaling(2.0, 'fan_in', 'normal')
    """
    if isinstance(initializer, str) and initializer in _BY_NAME:
        return _BY_NAME[initializer]()
    if any(initializer is make for make in _BY_NAME.values()):
        return initializer()  # type: ignore[no-any-return]
    if callable(initializer) and not isinstance(initializer, type):
        return initializer  # type: ignore[no-any-return]
    names = ", ".join(_BY_NAME)
    raise ValueError(f"initializer must be a function or one of {names}, got {initializer!r}")
