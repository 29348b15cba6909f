"""The arguments of GradientTape's methods, checked before anything runs."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import numpy as np

from tapegrad import _backend
from tapegrad._structure import flatten, flatten_with_paths, leaves_where, refuse_unordered
from tapegrad.config import config
from tapegrad.errors import TapeWarning
from tapegrad.linear import cast
from tapegrad.tensor import Operand, Tensor, as_array, wrap
from tapegrad.variable import Variable


class UnconnectedGradients(enum.StrEnum):
    """What `gradient` answers for a source that the target does not depend on."""

    NONE = "none"
    ZERO = "zero"
    RAISE = "raise"


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Tell whether values of this type can have a derivative."""
    kind = dtype.kind
    return kind == "f" or (kind == "V" and dtype.name == "bfloat16")  # a name takes NumPy 2 us


def check_unconnected(value: Any) -> UnconnectedGradients:
    """Return the member that a name stands for."""
    if type(value) is UnconnectedGradients:
        return value
    try:
        return UnconnectedGradients(value)
    except ValueError:
        raise ValueError(f"Unknown value for unconnected_gradients: {value!r}") from None


def check_flag(name: str, value: Any) -> bool:
    """Return what is True or False, NumPy's too, as Python's own."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def describe_kind(value: Any) -> str:
    """Return how a message calls a value that should have been a tensor."""
    kind = type(value).__name__
    return "None" if value is None else f"{value!r}, a {kind}" if kind == "float" else f"a {kind}"


_OPERANDS = frozenset((Tensor, Variable))  # asked for first: that takes a quarter of the time


def _is_operand(x: Any) -> bool:
    return isinstance(x, Operand)


def check_targets(target: Any) -> list[Operand]:
    """Return the leaves of a target, each of them a Tensor or Variable."""
    if type(target) is Tensor:
        return [target]
    leaves = flatten(target)
    if not _OPERANDS.issuperset(map(type, leaves)) and not all(map(_is_operand, leaves)):
        refuse_unordered(target, "target")
        for path, leaf in flatten_with_paths(target, "target"):
            if leaf is None:
                raise TypeError(
                    f"{path} is None: it must be a tensor or a structure of tensors; "
                    "did your loss function forget to return?"
                )
            if not isinstance(leaf, Operand):
                raise TypeError(
                    f"{path} is {describe_kind(leaf)}, not a tensor: some step left tapegrad, "
                    "as float(), .numpy() and NumPy's own functions do"
                )
    return leaves


def check_sources(sources: Any) -> list[Operand]:
    """Return the leaves of the sources, each of them a Tensor or Variable; a list as it is."""
    if type(sources) is list and _OPERANDS.issuperset(map(type, sources)):
        return sources
    leaves = flatten(sources)
    if not _OPERANDS.issuperset(map(type, leaves)) and not all(map(_is_operand, leaves)):
        refuse_unordered(sources, "sources")
        for path, leaf in flatten_with_paths(sources, "sources"):
            if not isinstance(leaf, Operand):
                raise TypeError(
                    f"{path} is {describe_kind(leaf)}: a source must be a Variable, or a Tensor "
                    "that the tape watches (x = tg.constant(...); tape.watch(x))"
                )
    return leaves


def check_chunk(
    chunk_size: int | None, parallel_iterations: int | None, use_pfor: bool
) -> int | None:
    """Return how many rows of a Jacobian to compute at a time; None leaves it to us."""
    sizes = {"chunk_size": chunk_size, "parallel_iterations": parallel_iterations}
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"{name} must be a whole number above 0 or None, got {value!r}")
    return (chunk_size or parallel_iterations) if use_pfor else 1


def check_scalar_targets(targets: list[Operand], weights: list[Tensor | None]) -> None:
    """Object, if the settings say so, to targets whose elements would be summed silently."""
    if config.scalar_targets == "sum":
        return
    for y, weight in zip(targets, weights, strict=True):
        if y.size != 1 and weight is None:
            message = (
                f"the target has shape {y.shape}: its gradient is that of the sum of its elements; "
                "reduce it first, pass output_gradients, or use tape.jacobian"
            )
            if config.scalar_targets == "raise":
                raise ValueError(message)
            warnings.warn(message, TapeWarning, stacklevel=3)


def match_weights(target: Any, weights: Any) -> list[Tensor | None]:
    """Return a weight for each leaf of the target: None for ones, else a Tensor of its shape."""
    if weights is None and type(target) is Tensor:
        return [None]
    targets = flatten(target)
    if weights is None:
        return [None] * len(targets)
    paths = [path for path, _ in flatten_with_paths(target, "output_gradients")]
    found = leaves_where(target, weights, "target", "output_gradients")
    return [_weight(y, w, path) for y, w, path in zip(targets, found, paths, strict=True)]


def _weight(y: Operand, weight: Any, path: str) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Operand):
        weight = wrap(as_array(weight, xp=_backend.module_of((y._array,))))
    if weight.shape != y.shape:
        raise ValueError(
            f"{path} has shape {weight.shape}, its target has shape {y.shape}: they must be equal"
        )
    weight = weight._read()
    return weight if weight.dtype == y.dtype else cast(weight, dtype=y.dtype)
