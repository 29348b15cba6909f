"""Nested structures: lists, tuples, named tuples, mappings and dataclasses of leaves.

Whatever takes sources, targets or parameters takes structures, and answers in the same structure.
Everything that is not a container is a leaf, `None` too. Mappings keep their insertion order.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

Path = tuple[str, ...]


# What types are, found once for each: the question is asked of every leaf.
_leaf_types: set[type] = set()
_container_types: set[type] = {list, tuple, dict}


def is_container(value: Any) -> bool:
    """Tell whether `value` is a container whose leaves are meant, and not a leaf itself."""
    kind = type(value)
    if kind in _leaf_types:
        return False
    if kind in _container_types:
        return True
    known = issubclass(kind, (list, tuple, Mapping, ValuesView)) or dataclasses.is_dataclass(kind)
    (_container_types if known else _leaf_types).add(kind)
    return known


def _holds_leaves(sequence: Sequence[Any]) -> bool:
    """Tell whether there is no container in a list or tuple."""
    return _leaf_types.issuperset(map(type, sequence)) or not any(map(is_container, sequence))


def children_of(value: Any) -> list[Any]:
    """Return what a container holds, in order."""
    if isinstance(value, Mapping):
        return [value[key] for key in value]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Return pairs of a container's children: (how it is written, the child)."""
    children = children_of(value)
    if isinstance(value, Mapping):
        steps = [f"[{key!r}]" for key in value]
    elif dataclasses.is_dataclass(value):
        steps = [f".{field.name}" for field in dataclasses.fields(value)]
    elif hasattr(value, "_fields"):
        steps = [f".{name}" for name in value._fields]
    else:
        steps = [f"[{i}]" for i in range(len(children))]
    return zip(steps, children, strict=True)


def flatten_with_paths(structure: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the leaves with the way to each, as one would write it: `name['dense'][1]`."""
    if not is_container(structure):
        return [(name, structure)]
    leaves: list[tuple[str, Any]] = []
    for step, child in _items(structure):
        leaves += flatten_with_paths(child, name + step)
    return leaves


def flatten(structure: Any) -> list[Any]:
    """Return the leaves, in order."""
    kind = type(structure)
    if (kind is list or kind is tuple) and _holds_leaves(structure):
        return list(structure)
    if not is_container(structure):
        return [structure]
    leaves: list[Any] = []
    for child in structure if kind is list or kind is tuple else children_of(structure):
        if is_container(child):
            leaves += flatten(child)
        else:
            leaves.append(child)
    return leaves


def map_structure(function: Callable[[Any], Any], structure: Any) -> Any:
    """Return the structure with each leaf replaced by `function(leaf)`."""
    if not is_container(structure):
        return function(structure)
    if type(structure) is list:
        return [map_structure(function, child) for child in structure]
    children = [map_structure(function, child) for child in children_of(structure)]
    return _rebuild(structure, children)


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """Return the structure with its leaves replaced, in order, by `leaves`."""
    kind = type(structure)
    if (kind is list or kind is tuple) and _holds_leaves(structure):
        return kind(leaves)  # most structures are plain lists
    replacement = iter(leaves)
    return map_structure(lambda _: next(replacement), structure)


def _rebuild(structure: Any, children: list[Any]) -> Any:
    """Return a container like this one with other children.

    None is initialised anew: `__post_init__` would change twice what it changes, and Counter count.
    """
    kind: Any = type(structure)
    if isinstance(structure, ValuesView):
        return children
    if kind is dict:
        return dict(zip(structure, children, strict=True))
    if isinstance(structure, (dict, list)):
        made: Any = copy.copy(structure)  # with what else a class of one's own keeps in it
        places = structure if isinstance(structure, dict) else range(len(structure))
        for place, child in zip(places, children, strict=True):
            made[place] = child
        return made
    if isinstance(structure, Mapping):
        return kind(dict(zip(structure, children, strict=True)))
    if dataclasses.is_dataclass(structure):
        made = kind.__new__(kind)
        for name, value in getattr(structure, "__dict__", {}).items():
            if not any(map(_is_computed, flatten(value))):  # maybe from the children
                object.__setattr__(made, name, value)
        for field, child in zip(dataclasses.fields(structure), children, strict=True):
            object.__setattr__(made, field.name, child)  # a frozen one's too
        return made
    if hasattr(structure, "_fields"):
        return structure._make(children)
    return kind(children)


def _is_computed(x: Any) -> bool:
    return hasattr(x, "__array__") and not hasattr(x, "assign")  # no Variable, which is state


def differ_in_leaves_alone(structure: Any, other: Any) -> bool:
    """Tell whether two structures have the same containers, names and order."""
    if not (is_container(structure) and is_container(other)):
        return is_container(structure) == is_container(other)
    if type(structure) is not type(other):
        return False
    # In sets, keys are compared if their hashes agree: that of Variables asks for their values.
    names, other_names = (
        [{(type(key), key)} for key in x] if isinstance(x, Mapping) else None
        for x in (structure, other)
    )
    children, others = children_of(structure), children_of(other)
    return (
        names == other_names
        and len(children) == len(others)
        and all(map(differ_in_leaves_alone, children, others))
    )


def leaves_where(structure: Any, other: Any, name: str, other_name: str) -> list[Any]:
    """Return what `other` holds in the places where `structure` has its leaves.

    Mappings are matched by key. Raises `ValueError` where the containers differ.
    """
    if not is_container(structure):
        return [other]
    pairs: list[tuple[str, Any, Any]] = []
    if is_container(other) and isinstance(structure, Mapping) == isinstance(other, Mapping):
        if isinstance(structure, Mapping):
            if structure.keys() == other.keys():
                pairs = [(f"[{key!r}]", structure[key], other[key]) for key in structure]
        else:
            mine, theirs = list(_items(structure)), list(_items(other))
            if len(mine) == len(theirs):
                pairs = [(step, a, b) for (step, a), (_, b) in zip(mine, theirs, strict=True)]
    if not pairs and (
        is_container(other) != is_container(structure) or _size(structure) or _size(other)
    ):
        raise ValueError(
            f"{other_name} must have the structure of {name}: {name} is {_describe(structure)}, "
            f"{other_name} is {_describe(other)}"
        )
    return [
        leaf for step, a, b in pairs for leaf in leaves_where(a, b, name + step, other_name + step)
    ]


def _size(value: Any) -> int:
    return len(children_of(value)) if is_container(value) else 1


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} with keys {', '.join(map(repr, value))}"
    return f"a {kind} of {_size(value)}" if is_container(value) else f"a {kind}"


def refuse_unordered(value: Any, name: str) -> None:
    """Raise `TypeError` for what looks like a collection and is not a structure."""
    if is_container(value):
        return
    if isinstance(value, (set, frozenset, KeysView, Iterator)):
        kind = "generator" if isinstance(value, Iterator) else type(value).__name__
        raise TypeError(
            f"{name} must be a tensor, a variable or a list, tuple or dict of them, "
            f"got a {kind}; wrap it in list(...)"
        )
