"""Checking gradients: against finite differences in float64, to second order, as our tests do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._structure import flatten
from tapegrad._tape_arguments import is_floating
from tapegrad.ops import elementwise as ew
from tapegrad.ops import reductions
from tapegrad.tape import GradientTape
from tapegrad.tensor import Operand, Tensor, constant

# Relative errors that rounding alone explains, by the type computed in.
TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 2e-5, "float64": 1e-12}


def check_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    order: int = 2,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    step: float = 1e-3,
    seed: int = 0,
) -> None:
    """Raise `AssertionError` unless a function's gradients agree with finite differences.

    function    takes tensors, returns a tensor or a structure of them.
    inputs      arrays or tensors; the floating ones are checked, in float64.
    order       1: the gradient; 2: the gradient of the gradient too; and so on.
    rtol, atol  of the comparison: a directional derivative by the tape, against central differences
                with Richardson's extrapolation, whose error is of the order step**4.
    step        the larger of the two distances at which the function is evaluated.
    seed        of the random directions and of the weights that make the result a scalar.

    The inputs must lie further than `step` from kinks and poles. Raises `ValueError` when there is
    no floating input.

    >>> tg.testing.check_gradients(lambda x, y: tg.sin(x) * y, [[0.1, 0.2], 3.0])
    """
    rng = np.random.default_rng(seed)
    arrays = [x.numpy() if isinstance(x, Operand) else np.asarray(x) for x in inputs]
    arrays = [a.astype(np.float64) if _differentiable(a) else a for a in arrays]
    where = [i for i, a in enumerate(arrays) if _differentiable(a)]
    if not where:
        raise ValueError("check_gradients needs at least one floating input")
    weights: dict[int, np.ndarray[Any, Any]] = {}

    def scalar(*xs: Tensor) -> Tensor:
        """Weigh all elements of the result, with weights that stay the same from call to call."""
        total: Any = 0.0
        for i, y in enumerate(flatten(function(*xs))):
            if isinstance(y, Operand) and is_floating(y.dtype):
                if i not in weights:
                    weights[i] = rng.uniform(0.5, 1.5, y.shape)
                total = ew.add(total, reductions.sum(ew.multiply(y, constant(weights[i]))))
        return constant(total) if isinstance(total, float) else total

    _check(scalar, arrays, where, order, rtol, atol, step, rng, level=1)


def _differentiable(array: np.ndarray[Any, Any]) -> bool:
    return is_floating(array.dtype)


def _direction(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return a random direction without a tiny component, which would hide an error there."""
    return np.asarray(rng.uniform(0.5, 1.0, shape) * rng.choice([-1.0, 1.0], shape))


def _check(
    scalar: Callable[..., Tensor],
    arrays: list[np.ndarray[Any, Any]],
    where: list[int],
    order: int,
    rtol: float,
    atol: float,
    step: float,
    rng: np.random.Generator,
    level: int,
) -> None:
    directions = {i: _direction(arrays[i].shape, rng) for i in where}

    def slope(*xs: Tensor) -> Tensor:
        """Return the derivative in the chosen direction, by the tape."""
        with GradientTape() as tape:
            watched = [xs[i] for i in where]
            tape.watch(watched)
            y = scalar(*xs)
        gradients = tape.gradient(y, watched, unconnected_gradients="zero")
        total: Any = 0.0
        for i, g in zip(where, gradients, strict=True):
            if g.shape != arrays[i].shape or g.dtype != arrays[i].dtype:
                raise AssertionError(
                    f"order {level}: the gradient of input {i} has shape {g.shape} and dtype "
                    f"{g.dtype}, the input {arrays[i].shape} and {arrays[i].dtype}"
                )
            total = ew.add(total, reductions.sum(ew.multiply(g, constant(directions[i]))))
        return total  # type: ignore[no-any-return]

    def along(distance: float) -> float:
        moved = [
            a + distance * directions[i] if i in directions else a for i, a in enumerate(arrays)
        ]
        return float(scalar(*map(constant, moved)))

    coarse = (along(step) - along(-step)) / (2 * step)
    fine = (along(step / 2) - along(-step / 2)) / step
    want = (4 * fine - coarse) / 3  # L. F. Richardson: the error of the order step**2 cancels
    got = float(slope(*map(constant, arrays)))
    if not abs(got - want) <= atol + rtol * abs(want):
        raise AssertionError(
            f"order {level}: the tape gives {got!r}, finite differences {want!r} "
            f"(difference {got - want:.3g}, allowed {atol + rtol * abs(want):.3g})"
        )
    if order > level:
        _check(slope, arrays, where, order, rtol, atol, step, rng, level + 1)
