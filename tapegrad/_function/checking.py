"""check: a function eagerly and by replay, from the same state, compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tapegrad import _backend
from tapegrad._recording import no_record
from tapegrad._structure import differ_in_leaves_alone, flatten, flatten_with_paths
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
    if not differ_in_leaves_alone(eager, compiled):
        _refuse(function._name, "the result is", _outline(eager), _outline(compiled))
    leaves = flatten_with_paths(eager, "the result")
    for (path, a), b in zip(leaves, flatten(compiled), strict=True):
        if _has_values(a) and _has_values(b):
            _compare(function._name, path, _values(a), _values(b))
        elif type(a) is not type(b) or (a is not b and repr(a) != repr(b)):  # NaN is not itself
            _refuse(function._name, f"{path} is", a, b)
    for v, value in zip(variables, wanted, strict=True):
        _compare(function._name, f"variable {v.name!r}", value, _backend.to_numpy(v._array))


def _outline(result: Any) -> str:
    paths = [path for path, _ in flatten_with_paths(result, "result")]
    return f"a {type(result).__name__} of {', '.join(paths) or 'nothing'}"


def _has_values(x: Any) -> bool:
    # NumPy's too: an argument of it that is handed out is a tensor in a compiled call alone.
    return isinstance(x, (Operand, np.generic)) or _backend.is_array(x)


def _values(x: Any) -> Any:
    return x.numpy() if isinstance(x, Operand) else _backend.to_numpy(x)


def _compare(name: str, what: str, eager: Any, compiled: Any) -> None:
    kinds = [f"{x.dtype}{list(x.shape)}" for x in (eager, compiled)]
    if kinds[0] != kinds[1]:
        _refuse(name, f"{what} is", *kinds)
    exact = eager.dtype.kind not in "fV"
    wide = eager.dtype if exact else np.promote_types(eager.dtype, np.float32)
    tolerance = 0.0 if exact else 1000 * float(np.finfo(wide).eps)
    if wide != eager.dtype:  # a kernel computes in float32 what is rounded after every operation
        one = eager.dtype.type(1)
        tolerance = 16 * (float(np.nextafter(one, one + one)) - 1)
    values = eager.astype(wide)
    scale = 0.0 if exact else float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    if not np.allclose(compiled.astype(wide), values, tolerance, tolerance * scale, equal_nan=True):
        _refuse(name, f"{what} is", eager, compiled)


def _refuse(name: str, what: str, eager: Any, compiled: Any) -> NoReturn:
    raise FunctionError(
        f"{name}: {what} {eager} computed eagerly and {compiled} by replay: the function "
        "depends on something that is neither an argument nor a Variable (an attribute, a "
        "list, a counter), which a replay keeps as it was when it was recorded"
    )
