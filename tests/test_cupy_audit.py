"""Everything that tapegrad takes from the array module exists in CuPy, with the same call.

Read from the sources, without a GPU: CuPy imports without one. Runs where CuPy is installed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tapegrad
import tapegrad.kernels
from tapegrad import _backend
from tests import fake_cupy

cupy = pytest.importorskip("cupy", reason="needs CuPy, but no GPU")

# The kernels' folder is a link, which rglob does not follow.
FOLDERS = [Path(module.__file__ or "").parent for module in (tapegrad, tapegrad.kernels)]
FILES = sorted({file for folder in FOLDERS for file in folder.rglob("*.py")})
# What names the array module, and what answers it.
MODULES = {"xp", "_xp", "cupy", "_cupy"}
ANSWERS = {"default_module", "module_of", "module_named", "_require_cupy", "_automatic"}
# cupy.ufunc's own, which no signature tells (cupy/_core/_kernel.pyx).
UFUNC_KEYWORDS = {"out", "where", "dtype", "casting"}
# NumPy's, where CuPy takes other values than NumPy: {function: {keyword: values that both take}}.
VALUES: dict[str, dict[str, set[Any]]] = {"argsort": {"kind": {"stable"}}}


class Use(NamedTuple):
    """`xp.name` in a source; the call is None where it is not called at once."""

    place: str
    name: str
    call: ast.Call | None


def is_module(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else function
        return (name.id if isinstance(name, ast.Name) else name) in ANSWERS
    return (node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)) in MODULES


def dotted(node: ast.Attribute) -> str | None:
    """Return `a.b` of `xp.a.b`, or None where the root is not the array module."""
    if is_module(node.value):
        return node.attr
    if isinstance(node.value, ast.Attribute):
        root = dotted(node.value)
        return None if root is None else f"{root}.{node.attr}"
    return None


def uses(source: str, file: str) -> Iterator[Use]:
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)) is not None:
            yield Use(f"{file}:{node.lineno}", name, calls.get(id(node)))


def array_attributes(source: str, file: str) -> Iterator[tuple[str, str]]:
    """Yield (place, attribute) of what meanings and launchers ask of their array parameters."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        names = [a.arg for a in node.args.args]
        if "xp" not in names:
            continue
        arrays = set(names[names.index("xp") + 1 :])
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and not part.attr.startswith("_"):
                value = part.value
                if isinstance(value, ast.Name) and value.id in arrays:
                    yield f"{file}:{part.lineno}", part.attr


def complaint(use: Use) -> str | None:
    """Return what is wrong with a use, or None."""
    value: Any = cupy
    for part in use.name.split("."):
        if not hasattr(value, part):
            # What CuPy's object has only where there is a device cannot be asked here.
            return f"{use.place}: cupy has no {use.name}" if value is cupy else None
        value = getattr(value, part)
    call = use.call
    if call is None or not callable(value):
        return None
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    keywords = {k.arg: k.value for k in call.keywords if k.arg is not None}
    for name, allowed in VALUES.get(use.name, {}).items():
        given = keywords.get(name)
        if given is not None and getattr(given, "value", None) not in allowed:
            return f"{use.place}: cupy.{use.name} takes {name} in {allowed} only"
    if isinstance(value, cupy.ufunc):
        if keywords.keys() - UFUNC_KEYWORDS:
            return f"{use.place}: cupy.{use.name} takes no {keywords.keys() - UFUNC_KEYWORDS}"
        if not starred and not value.nin <= len(call.args) <= value.nargs:
            return f"{use.place}: cupy.{use.name} takes {value.nin} arrays"
        return None
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):
        return None
    try:
        arguments = [a for a in call.args if not isinstance(a, ast.Starred)]
        partial = starred or any(k.arg is None for k in call.keywords)
        (signature.bind_partial if partial else signature.bind)(*arguments, **keywords)
    except TypeError as error:
        return f"{use.place}: cupy.{use.name}{signature}: {error}"
    return None


def test_everything_taken_from_the_array_module_is_in_cupy() -> None:
    found = [use for f in FILES for use in uses(f.read_text(), f.name)]
    assert len(found) > 200
    assert len({use.name for use in found}) > 80
    assert [text for use in found if (text := complaint(use)) is not None] == []


def test_everything_asked_of_arrays_is_in_cupy() -> None:
    found = [asked for f in FILES for asked in array_attributes(f.read_text(), f.name)]
    assert {"astype", "reshape", "sum", "flags"} <= {name for _, name in found}
    assert [asked for asked in found if not hasattr(cupy.ndarray, asked[1])] == []


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("lambda xp, x: xp.something_cupy_lacks(x)", "has no something_cupy_lacks"),
        ("lambda xp, x: xp.trapezoid_(x)", "has no trapezoid_"),
        ("f = _backend.default_module().no_such_thing", "has no no_such_thing"),
        ("lambda self, x: self._xp.strings.upper(x)", "has no strings"),
        ("lambda xp, x: xp.argsort(x, kind='quicksort')", "takes kind"),
        ("lambda xp, x: xp.argsort(x, stable=True)", "stable"),
        ("lambda xp, x: xp.sum(x, 0, where=x > 0)", "where"),
        ("lambda xp, x: xp.max(x, initial=0)", "initial"),
        ("lambda xp, x: xp.exp(x, subok=False)", "takes no {'subok'}"),
        ("lambda xp, x: xp.exp(x, x, x)", "takes 1 arrays"),
        ("lambda xp, x, y: xp.where(x, y, y, y)", "too many positional arguments"),
    ],
)
def test_the_audit_finds(source: str, match: str) -> None:
    text = next(text for use in uses(source, "f.py") if (text := complaint(use)) is not None)
    assert match in text
    assert text.startswith("f.py:1: ")


def test_the_audit_finds_what_arrays_lack() -> None:
    source = "lambda xp, x: x.itemset(0, 1) + x.sum()"
    asked = list(array_attributes(source, "f.py"))
    assert [name for _, name in asked if not hasattr(cupy.ndarray, name)] == ["itemset"]


def test_the_stand_in_offers_nothing_that_cupy_lacks() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    pairs = {
        fake_cupy.FakeArray: cupy.ndarray,
        fake_cupy.Event: cupy.cuda.Event,
        fake_cupy.Graph: cupy.cuda.Graph,
        fake_cupy.MemoryPool: cupy.cuda.MemoryPool,
        fake_cupy.Stream: cupy.cuda.Stream,
    }
    for mine, theirs in pairs.items():
        assert {name for name in public(mine) if not hasattr(theirs, name)} == set(), mine
    assert len(public(fake_cupy.FakeArray)) > 30
    assert "begin_capture" in public(fake_cupy.Stream)
    stand_in = fake_cupy.FakeCupy()
    assert {name for name in vars(stand_in.cuda) if not hasattr(cupy.cuda, name)} == set()
    for kind in ("Event", "Stream"):
        inspect.signature(getattr(cupy.cuda, kind)).bind(
            **{"Event": {"disable_timing": True}, "Stream": {"non_blocking": True}}[kind]
        )


def test_types_are_weak_beside_python_numbers() -> None:
    """CuPy 13, without NEP 50, is refused."""
    assert int(cupy.__version__.split(".")[0]) >= _backend._OLDEST_CUPY
    assert cupy.result_type(np.dtype("f2"), 1e30) == np.float16
    assert cupy.result_type(np.dtype("f4"), 1) == np.float32
    assert cupy.result_type(np.dtype("i1"), 1.5) == np.float64
