"""Targets and predictions that belong together: what losses and metrics check of them first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapegrad.linear import reshape as _reshape
from tapegrad.ops import elementwise as ew
from tapegrad.ops.arguments import as_tensor
from tapegrad.tensor import ArrayLike, Tensor


def pair(name: str, y_true: ArrayLike, y_pred: ArrayLike) -> tuple[Tensor, Tensor]:
    """Return targets and predictions of one shape and floating type; (n,) goes with (n, 1)."""
    t, p = as_tensor(y_true), as_tensor(y_pred)
    if t.shape == (*p.shape, 1) or p.shape == (*t.shape, 1):
        t = _reshape(t, shape=p.shape)
    if t.shape != p.shape:
        raise ValueError(
            f"[{name}] y_true and y_pred must have one shape, got {t.shape} and {p.shape}"
        )
    dtype = p.dtype if p.dtype.kind == "f" else np.result_type(p.dtype, np.float32)
    return ew.astype(t, dtype, copy=False), ew.astype(p, dtype, copy=False)


def labels_and_scores(name: str, y_true: ArrayLike, y_pred: ArrayLike) -> tuple[Tensor, Tensor]:
    """Return integer labels (...,), given so or as (..., 1), and scores (..., classes)."""
    t, p = as_tensor(y_true), as_tensor(y_pred)
    if t.dtype.kind not in "iu":
        raise TypeError(
            f"[{name}] labels must be integers, got {t.dtype}: "
            f"for probabilities use {name.removeprefix('sparse_')}"
        )
    if p.ndim and t.shape == (*p.shape[:-1], 1):
        t = _reshape(t, shape=p.shape[:-1])
    if not p.ndim or t.shape != p.shape[:-1]:
        raise ValueError(f"[{name}] labels must have shape {p.shape[:-1]}, got {t.shape}")
    return t, p


def over_features(losses: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce the last axis, if there is one: what remains is one number an example."""
    return losses if losses.ndim == 0 else reduce(losses, axis=-1)


def as_columns(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let vectors of targets and predictions mean one number an example, not one example."""

    def call(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
        t, p = as_tensor(y_true), as_tensor(y_pred)
        if t.ndim == 1 and p.ndim == 1:
            t, p = (_reshape(x, shape=(*x.shape, 1)) for x in (t, p))
        return function(t, p)

    return call
