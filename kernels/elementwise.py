"""Elementwise kernels that broadcast and take any layout, written by CuPy around one line each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._build import Array, Elementwise, Module

_SCALE = Elementwise("T g, T d", "T out", "out = g == T(0) ? T(0) : T(g * d)", "tapegrad_scale")
_RELU_GRAD = Elementwise("T g, T y", "T out", "out = y > T(0) ? g : T(0)", "tapegrad_relu_grad")


def scale(xp: Module, g: Array, d: Array) -> Array | None:
    """Return g * d, but exactly 0 where g is 0, whatever d is there; shapes broadcast.

    None unless both are CuPy arrays of one floating dtype.
    """
    return _apply(_SCALE, xp, g, d)


def relu_grad(xp: Module, g: Array, y: Array) -> Array | None:
    """Return g where y > 0 and exactly 0 elsewhere, also where y is NaN; shapes broadcast.

    None unless both are CuPy arrays of one floating dtype.
    """
    return _apply(_RELU_GRAD, xp, g, y)


def _apply(kernel: Elementwise, xp: Module, *arrays: Any) -> Array | None:
    if xp is np or not all(isinstance(array, xp.ndarray) for array in arrays):
        return None
    dtype = arrays[0].dtype
    if dtype.kind != "f" or any(array.dtype != dtype for array in arrays):
        return None
    return kernel(*arrays)
