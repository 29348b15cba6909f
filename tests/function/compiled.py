"""What the tests of `tg.function` share: bitwise comparison, eager against compiled, the switch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

import tapegrad as tg
from tapegrad._function import simplify
from tapegrad._structure import flatten_with_paths
from tapegrad.tensor import Operand


@contextlib.contextmanager
def rewritten(on: bool | Collection[str]) -> Iterator[None]:
    """Switch rewrites for what is compiled in a `with` block.

    True: all that are in the table; False: those alone that keep every bit; or the names of some.
    """
    names = {n for n, r in simplify.TABLE.items() if not r.bound} if on is False else on
    before = set(simplify.ENABLED)
    simplify.ENABLED.clear()
    simplify.ENABLED.update(simplify.TABLE if names is True else names)
    try:
        yield
    finally:
        simplify.ENABLED.clear()
        simplify.ENABLED.update(before)


def arrays_of(result: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a result with their paths, tensors as arrays of their own."""
    return [
        (path, leaf.numpy() if isinstance(leaf, Operand) else leaf)
        for path, leaf in flatten_with_paths(result, "result")
    ]


def assert_same(got: Any, want: Any, rtol: float | None = None) -> None:
    """Compare two results, bit for bit, or to a bound relative to the largest element."""
    pairs = list(zip(arrays_of(got), arrays_of(want), strict=True))
    for (path, a), (other, b) in pairs:
        assert path == other
        if not isinstance(b, np.ndarray):
            assert type(a) is type(b), path
            assert a is b or a == b, path
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        if rtol is None or b.dtype.kind not in "fV":
            assert _bits(a) == _bits(b), f"{path}: {a} is not {b}"
        else:
            scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=path)


def _bits(array: Any) -> bytes:
    if array.dtype.kind == "f":  # one NaN is as good as another
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return bytes(np.ascontiguousarray(array).tobytes())


def replayed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compile a function with two calls, and return the result of the third."""
    compiled = function if isinstance(function, type(tg.function(abs))) else tg.function(function)
    for _ in range(2):
        compiled(*args, **kwargs)
    assert len(compiled.programs) >= 1
    return compiled(*args, **kwargs)
