"""The text of a reverse program: written by a recording that hears one reverse pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad._index import SLOT
from tapegrad._recording import PassRecorder
from tapegrad._storage import lies_in_buffer, register_view
from tapegrad._tape_arguments import is_floating
from tapegrad.primitive import Binary, Primitive, Unary, primitives
from tapegrad.tensor import Operand, Tensor, next_id
from tapegrad.variable import Variable

# A program keeps all arrays until it ends, where the reverse pass lets go of them one by one. So
# much more memory matters to nobody; and for tapes that hold more, overhead does not: a step of a
# network 784-256-256-10, 3.2 MiB for a batch of 128, is 3 % faster by a program, a small one 28 %.
MOST_BYTES = 4 << 20
MOST_CONSTANTS = 1 << 16  # bytes that a program keeps for ever


def can_be_replayed(primitive: Primitive) -> bool:
    """Tell whether a primitive is one of the table, and not made for one call."""
    return primitives.get(primitive.name) is primitive


class Refused(Exception):
    """A reverse pass that cannot be written down."""


# What these meanings are on NumPy's arrays: a call less.
WRITTEN_OUT = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "power": "{} ** {}",
    "negative": "-{}",
    "square": "{0} * {0}",
}
_OF_SHAPES = frozenset(("ones_like", "zeros_like"))  # constants, whatever their inputs are


class Recording(PassRecorder):
    """Writes down one reverse pass: what its tape is like, then every primitive that is called.

    Values have names: x2_1 is input 1 of node 2, y2_0 its output 0, a5 an array, t7 a result. What
    else the text names (primitives, types, constants) is in `space`.
    """

    def __init__(
        self,
        tape: Any,
        targets: Sequence[Operand],
        sources: Sequence[Operand],
        weights: Sequence[Tensor | None],
    ) -> None:
        self._space: dict[str, Any] = {
            "np": np, "new": object.__new__, "Tensor": Tensor, "next_id": next_id,
            "register_view": register_view, "same": same,
        }  # fmt: skip
        self._kept: dict[int, str] = {}  # the names of what is in the space, by address
        self._lines = ["nodes, versions = tape._nodes, tape._versions"]
        self._known: dict[int, tuple[str, Any]] = {}  # by id: a value's first name, and itself
        self._tensors: dict[int, str] = {}  # by id: a name under which a node keeps the Tensor
        self._arrays: dict[int, str] = {}  # by id: the name of its array
        self._leaves: dict[int, str] = {}  # by id: what is watched and no node's output
        self._made: set[int] = set()  # the ids of the outputs
        self._ones: set[int] = set()  # the ids of what ones_like gave
        self._bytes = 0
        self._constants: dict[str, int] = {}  # the bytes of each
        self._refused = False
        for n, node in enumerate(tape._nodes):
            self._node(n, node, tape)
        self._operands(targets, sources, weights, tape)
        if self._bytes > MOST_BYTES:
            raise Refused

    # ---- the form of the tape

    def _node(self, n: int, node: Any, tape: Any) -> None:
        """Write what a node of this form is like."""
        primitive, inputs, outputs, params, mask, _ = node
        if not can_be_replayed(primitive):
            raise Refused
        xs = [f"x{n}_{i}" for i in range(len(inputs))]
        ys = [f"y{n}_{i}" for i in range(len(outputs))]
        takes_none = isinstance(primitive, (Unary, Binary))
        settings = "_" if takes_none else f"k{n}"
        self._lines.append(
            f"p{n}, ({', '.join(xs)},), ({', '.join(ys)},), {settings}, m{n}, _ = nodes[{n}]"
        )
        misses = [f"p{n} is not {self._name(primitive, primitive.name)}", f"m{n} != {mask}"]
        if not takes_none:
            misses.append(f"len(k{n}) != {len(params)}")
        for key, value in params.items():
            misses.append(self._unlike(f"k{n}[{key!r}]", value))
        for i, (x, name) in enumerate(zip(inputs, xs, strict=True)):
            if type(x) is float or type(x) is int:
                misses.append(self._unlike(name, x))
                continue
            misses += self._occurrence(x, name, entering=True)
            if mask >> i & 1 and x.id not in self._made:
                if x.id not in tape._leaves:
                    raise Refused  # watched by another tape alone
                self._leaves.setdefault(x.id, name)
        # Shapes follow from the shapes of the inputs, unless an index of booleans chooses them.
        chosen = any(not is_floating(x.dtype) for x in inputs if not isinstance(x, (float, int)))
        for y, name in zip(outputs, ys, strict=True):
            misses += self._occurrence(y, name, entering=chosen)
            self._made.add(y.id)
        self._miss(misses)

    def _occurrence(self, x: Any, name: str, *, entering: bool) -> list[str]:
        """Return when a value is not what it was: the one of another name, or of this type."""
        if type(x) is Tensor:
            self._tensors.setdefault(x.id, name)
        first = self._known.get(x.id)
        if first is None:
            self._known[x.id] = name, x
            if type(x) is Tensor:
                self._bytes += x._array.nbytes
            return [self._unlike_type(x, name)] if entering else []
        both_tensors = first[1] is x and type(x) is Tensor
        return [f"{name} is not {first[0]}" if both_tensors else f"{name}.id != {first[0]}.id"]

    def _unlike_type(self, x: Any, name: str) -> str:
        if type(x) is not Tensor:  # all that is known of it are shape and dtype
            return self._unlike_array(name, x)
        array = x._array
        bound = self._arrays[x.id] = f"a{len(self._arrays)}"
        if isinstance(array, np.generic):
            kind = self._name(type(array), type(array).__name__)
            return f"type({bound} := {name}._array) is not {kind}"
        facts = self._unlike_array(f"({bound} := {name}._array)", array, bound)
        return facts if array.ndim else f"{facts} or type({bound}) is not {self._name(np.ndarray)}"

    def _unlike_array(self, first: str, x: Any, then: str = "") -> str:
        """Return when shape or dtype are others; equal dtypes are one object, but not unpickled."""
        dtype, then = self._name(x.dtype, "dtype"), then or first
        return f"{first}.shape != {x.shape} or {then}.dtype is not {dtype} != {then}.dtype"

    def _operands(
        self,
        targets: Sequence[Operand],
        sources: Sequence[Operand],
        weights: Sequence[Tensor | None],
        tape: Any,
    ) -> None:
        """Write what is asked for: which of the tape's values are the targets and the sources."""
        misses: list[str] = []
        for kind, values in (("target", targets), ("weight", weights), ("source", sources)):
            names = [f"{kind}{i}" for i in range(len(values))]
            self._lines.append(f"[{', '.join(names)}] = {kind}s")
        for i, (y, weight) in enumerate(zip(targets, weights, strict=True)):
            if y.id not in self._made:
                raise Refused
            misses += self._occurrence(y, f"target{i}", entering=False)
            if weight is None:
                misses.append(f"weight{i} is not None")
            else:
                misses += self._occurrence(weight, f"weight{i}", entering=True)
        leaves = {key: f"{name}.id" for key, name in self._leaves.items()}
        certain = set()  # which are leaves because Variables' versions never are anything else
        for i, x in enumerate(sources):
            key = x.id
            if isinstance(x, Variable):
                keys = tape._versions.get(key, ())
                if len(keys) != 1:
                    raise Refused  # not read, or assigned to in between
                key = keys[0]
                self._lines.append(f"[version{i}] = versions[source{i}.id]")
            if key not in leaves and key not in self._made:
                raise Refused  # not connected
            name = f"version{i}" if isinstance(x, Variable) else f"source{i}.id"
            misses.append(f"{name} != {self._known[key][0]}.id")
            if key in leaves:
                leaves[key] = name
                if isinstance(x, Variable):
                    certain.add(key)
        # Else a source could come in at a place where something else did, or at two.
        misses += [f"{name} not in tape._leaves" for key, name in leaves.items()
                   if key not in certain]  # fmt: skip
        if len(leaves) > 1:
            misses.append(f"len({{{', '.join(leaves.values())}}}) != {len(leaves)}")
        self._miss(misses)

    def _miss(self, conditions: list[str]) -> None:
        self._lines.append(f"if {' or '.join(conditions)}: return None")

    def _name(self, value: Any, of: str = "c") -> str:
        """Return the name of a value in the text; it is part of the text which values are one."""
        name = self._kept.get(id(value))
        if name is None:
            name = self._kept[id(value)] = f"{of}_{len(self._kept)}"
            self._space[name] = value
        return name

    def _unlike(self, place: str, value: Any) -> str:
        """Return when a number or a setting is not `value`: mostly it is the very same object."""
        if not _is_fixed(value):
            raise Refused
        name = self._name(value)
        return f"{place} is not {name} and not same({place}, {name})"

    # ---- the calls

    def record(
        self,
        primitive: Primitive,
        inputs: Sequence[Any],
        outputs: tuple[Tensor, ...],
        params: dict[str, Any],
        node: Any,
    ) -> Any:
        """Write down one call, unless its result is a constant."""
        self._bytes += sum(y._array.nbytes for y in outputs)
        if self._bytes > MOST_BYTES or not can_be_replayed(primitive):
            self._refused = True
        if primitive.name == "ones_like":
            self._ones.add(outputs[0].id)
        if not self._refused and primitive.name not in _OF_SHAPES:
            varying = [x for x in inputs if type(x) is Tensor and self._varies(x)]
            if varying:
                self._call(primitive, inputs, outputs, params, len(varying))
        return node

    def _varies(self, x: Tensor) -> bool:
        return x.id in self._arrays or x.id in self._known

    def _call(
        self,
        primitive: Primitive,
        inputs: Sequence[Any],
        outputs: tuple[Tensor, ...],
        params: dict[str, Any],
        varying: int,
    ) -> None:
        places = [self._place(x) for x in inputs]
        y = outputs[0]
        of_ones = type(inputs[0]) is Tensor and inputs[0].id in self._ones
        if primitive.name == "scale" and of_ones and _kind(inputs[1]) == _kind(y):
            self._arrays[y.id] = places[1]  # 1 * d: what comes of the seed
            return
        results = []
        for part in outputs:
            self._arrays[part.id] = f"t{len(self._arrays)}"
            results.append(self._arrays[part.id])
        result = ", ".join(results)
        settings = [f"{key}={self._name(value)}" for key, value in params.items()]
        meaning = self._name(primitive.forward, primitive.name)
        call = f"{meaning}({', '.join(['np', *places, *settings])})"
        if primitive.name == "scale" and varying == 2 and not y.ndim:  # repaired if it is NaN
            self._lines.append(f"{result} = {places[0]} * {places[1]}")
            self._lines.append(f"if {result} != {result}: {result} = {call}")
        else:
            text = WRITTEN_OUT.get(primitive.name, call).format(*places)
            self._lines.append(f"{result} = {text}")

    def _place(self, x: Any) -> str:
        """Return the name of an operand's array, or of a number."""
        if type(x) is not Tensor:
            return f"({x!r})" if type(x) is int or math.isfinite(x) else self._name(x)
        name = self._arrays.get(x.id)
        if name is not None:
            return name
        if x.id in self._known:
            if x.id not in self._tensors:  # the nodes of such tapes keep no values of it
                self._refused = True
                return ""
            name = self._arrays[x.id] = f"a{len(self._arrays)}"
            self._lines.append(f"{name} = {self._tensors[x.id]}._array")
            return name
        name = self._name(x._array)
        self._constants[name] = x._array.nbytes
        if lies_in_buffer(x._array) or sum(self._constants.values()) > MOST_CONSTANTS:
            self._refused = True
        return name

    def _refuse(self, *_: Any) -> None:
        self._refused = True

    # What reads, writes or makes state, prints, or looks at values may do another thing each time.
    accessed = writing = updated = leaving = copied = created = _refuse

    # ---- the text

    def finished(self, answers: Sequence[Tensor | None]) -> tuple[str, dict[str, Any]] | None:
        """Return the program's text and what it names, if all of the reverse pass is in it."""
        results: dict[int, str] = {}
        for g in answers:
            if g is None:
                self._refused = True
            elif g.id not in results:
                results[g.id] = self._result(g, f"g{len(results)}")
        if self._refused:
            return None
        listed = ", ".join([results[g.id] for g in answers if g is not None])
        lines = [*self._lines, f"return [{listed}]"]
        text = "\n    ".join(["def replay(tape, targets, sources, weights):", *lines])
        return text, self._space

    def _result(self, g: Tensor, name: str) -> str:
        """Write how an answer becomes a Tensor, and return its name."""
        array = self._place(g)
        self._lines += [f"{name} = new(Tensor)", f"{name}._array, {name}.id = {array}, next_id()"]
        if not isinstance(g._array, np.generic):
            self._lines.append(f"if {array}.base is not None: register_view({name})")
        return name


def _kind(x: Any) -> tuple[Any, ...]:
    return (type(x._array), x.shape, x.dtype) if type(x) is Tensor else ()


_FIXED = (type(None), bool, int, float, str, type, np.dtype, np.generic, type(...), type(SLOT))


def _is_fixed(value: Any) -> bool:
    """Tell whether a value never changes, and can be compared."""
    if isinstance(value, (tuple, slice)):
        return all(map(_is_fixed, _parts(value)))
    return isinstance(value, _FIXED)


def _parts(value: Any) -> tuple[Any, ...]:
    return (value.start, value.stop, value.step) if isinstance(value, slice) else tuple(value)


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are the same to the last bit, and of one type: 1, 1.0 and True."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)
    if isinstance(a, (int, str, np.dtype)):
        return bool(a == b)
    if isinstance(a, (tuple, slice)):
        first, second = _parts(a), _parts(b)
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (np.ndarray, np.generic)):
        facts = (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)
        return facts and a.tobytes() == b.tobytes()
    return False
