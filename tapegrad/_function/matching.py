"""Matching: whether a call has the signature of the one before, asked by a function made for it.

Most calls of a compiled function are like the one before. Looking a signature up takes 1 us for
three arguments; the lines that compare them with what is known take a third.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array
from tapegrad.tensor import Tensor

Matcher = Callable[[tuple[Any, ...]], "list[Array] | None"]


def is_taken_as_it_is(x: Any) -> bool:
    """Tell whether x is an array that a program computes with, with no Tensor made of it."""
    if type(x) is not np.ndarray or not x.ndim:
        return False
    return _backend.numpy_alone or _backend.default_module() is np


def matcher(
    arguments: Sequence[Any], numbers: Callable[[], tuple[Any, ...]] | None
) -> Matcher | None:
    """Return a function that gives the arrays of arguments like these, and None for others.

    numbers  returns what else must be as it is now, if anything.

    Returns None where an argument is no tensor, NumPy array, None, True or False.
    """
    space: dict[str, Any] = {"Tensor": Tensor, "ndarray": np.ndarray}
    names = [f"x{i}" for i in range(len(arguments))]
    unpack = f"{', '.join(names)}{',' * (len(names) == 1)} = arguments" if names else "pass"
    lines = [f"if len(arguments) != {len(names)}: return None", unpack]
    if _backend.numpy_alone:
        space["backend"] = _backend
        lines.append("if not backend.numpy_alone: return None")
    else:
        space["chosen"] = _backend.chosen
        lines.append(f"if chosen() != {_backend.chosen()!r}: return None")
    if numbers is not None:
        space["now"], space["numbers"] = numbers, numbers()
        lines.append("if now() != numbers: return None")
    given = []
    for x, name in zip(arguments, names, strict=True):
        if x is None or x is True or x is False:
            lines.append(f"if {name} is not {x}: return None")
            continue
        if type(x) is Tensor:
            lines += [f"if type({name}) is not Tensor: return None", f"{name} = {name}._array"]
            x = x._array
        elif not is_taken_as_it_is(x):
            return None
        kind, dtype = f"kind_of_{name}", f"dtype_of_{name}"
        space[kind], space[dtype] = type(x), x.dtype
        lines.append(
            f"if type({name}) is not {kind} or {name}.shape != {x.shape} "
            f"or {name}.dtype is not {dtype}: return None"
        )
        given.append(name)
    text = "\n    ".join(["def match(arguments):", *lines, f"return [{', '.join(given)}]"])
    exec(compile(text, "<match of a signature>", "exec"), space)  # our own text alone
    # Taken out: a function whose own globals name it would be freed by the collector alone.
    match: Matcher = space.pop("match")
    return match
