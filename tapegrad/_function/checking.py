"""check: a function eagerly and by replay, from the same state, compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tapegrad import _backend
from tapegrad._recording import no_record
from tapegrad._structure import flatten, flatten_with_paths
from tapegrad.errors import FunctionError
from tapegrad.tensor import Operand

if TYPE_CHECKING:
    from tapegrad._function.dispatch import Function


def check(function: Function, args: Any, kwargs: Any) -> None:
    """Compare one eager call with one replay; the Variables end as after the replay."""
    for _ in range(8):
        if function._replay_of(args, kwargs) is not None:
            break
        function(*args, **kwargs)
    replay = function._replay_of(args, kwargs)
    if replay is None:
        raise FunctionError(f"{function._name} is not compiled for these arguments")
    variables = replay.variables()
    with no_record():
        before = [v.numpy() for v in variables]
        eager = function._function(*args, **kwargs)
        wanted = [v.numpy() for v in variables]
        for v, value in zip(variables, before, strict=True):
            v.assign(value)
        compiled = function(*args, **kwargs)
    names = [path for path, _ in flatten_with_paths(eager, "the result")]
    for path, a, b in zip(names, flatten(eager), flatten(compiled), strict=True):
        if isinstance(a, Operand):
            _compare(function._name, path, a.numpy(), b.numpy())
    for v, value in zip(variables, wanted, strict=True):
        _compare(function._name, f"variable {v.name!r}", value, _backend.to_numpy(v._array))


def _compare(name: str, what: str, eager: Any, compiled: Any) -> None:
    exact = eager.dtype.kind not in "fV"
    wide = eager.dtype if exact else np.promote_types(eager.dtype, np.float32)
    tolerance = 0.0 if exact else 1000 * float(np.finfo(wide).eps)
    if wide != eager.dtype:  # a kernel computes in float32 what is rounded after every operation
        one = eager.dtype.type(1)
        tolerance = 16 * (float(np.nextafter(one, one + one)) - 1)
    scale = 0.0 if exact or not eager.size else float(np.nanmax(np.abs(eager.astype(wide))))
    if not np.allclose(
        compiled.astype(wide), eager.astype(wide), tolerance, tolerance * scale, equal_nan=True
    ):
        raise FunctionError(
            f"{name}: {what} is {eager} computed eagerly and {compiled} by replay: the function "
            "depends on something that is neither an argument nor a Variable (an attribute, a "
            "list, a counter), which a replay keeps as it was when it was recorded"
        )
