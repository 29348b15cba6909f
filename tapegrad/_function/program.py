"""Program: one recorded call of a function, as a list of steps on values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tapegrad._backend import Array
from tapegrad._structure import differ_in_leaves_alone
from tapegrad.primitive import Primitive, Update
from tapegrad.tensor import Tensor
from tapegrad.variable import Variable

Kind = Literal["input", "constant", "read", "result"]


class Value:
    """What a step takes or gives.

    kind    "input" of the function, "constant", "read" of a Variable's version, or a step's
            "result".
    source  an input's position, a constant's Tensor, a read's Variable; None for a result.
    since   of a read, how many steps had run: it is the version after the writes among them.
    """

    __slots__ = ("dtype", "kind", "shape", "since", "source")

    def __init__(
        self, kind: Kind, shape: tuple[int, ...], dtype: Any, source: Any = None, since: int = 0
    ) -> None:
        self.kind = kind
        self.since = since
        self.shape = shape
        self.dtype: np.dtype[Any] = dtype
        self.source = source

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def number(self) -> Array | None:
        """Return, as an array without axes, the number that a constant holds everywhere, if any.

        Compared are bits: 0.0 equals -0.0, and what is divided by them differs.
        """
        if self.kind != "constant" or not self.size:
            return None
        array = self.source._array
        bits = _on_host(self.source).tobytes()
        same = bits == bits[: self.dtype.itemsize] * self.size
        return array.reshape(-1)[:1].reshape(()) if same else None

    def __repr__(self) -> str:
        return f"<{self.kind} {self.dtype}{list(self.shape)}>"


class Step:
    """One call: of a Primitive, or of an Update, which writes Variables and has no outputs.

    inputs  Values and Python numbers; of an Update only what it reads beside its targets.
    writes  the Variables that an Update writes.
    where   file:line of the user's call.
    order   its place in the recording.
    """

    __slots__ = ("inputs", "order", "outputs", "params", "primitive", "where", "writes")

    def __init__(
        self,
        primitive: Primitive | Update,
        inputs: Sequence[Any],
        outputs: Sequence[Value],
        params: dict[str, Any],
        where: str,
        writes: Sequence[Variable] = (),
        order: int = 0,
    ) -> None:
        self.primitive = primitive
        self.order = order
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.params = params
        self.where = where
        self.writes = tuple(writes)

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    def values(self) -> Iterator[Value]:
        """Yield the inputs that are Values."""
        return (x for x in self.inputs if type(x) is Value)

    def instead(
        self,
        primitive: Primitive | Update,
        inputs: Sequence[Any],
        outputs: Sequence[Value] = (),
        params: dict[str, Any] | None = None,
        writes: Sequence[Variable] = (),
    ) -> Step:
        """Return another call for the place of this one."""
        return Step(primitive, inputs, outputs, params or {}, self.where, writes, self.order)

    def __repr__(self) -> str:
        return f"<Step {self.name} at {self.where}>"


def makers_of(steps: Sequence[Step]) -> dict[Value, Step]:
    """Return which step makes a value."""
    return {y: step for step in steps for y in step.outputs}


def users_of(steps: Sequence[Step]) -> dict[Value, list[Step]]:
    """Return which steps take a value, one that takes it twice two times."""
    found: dict[Value, list[Step]] = {}
    for step in steps:
        for x in step.values():
            found.setdefault(x, []).append(step)
    return found


def replaced(operands: Iterable[Any], instead: Mapping[Value, Value]) -> Iterator[Any]:
    """Yield what a step takes, or a program gives, with other Values in the places of some."""
    return (instead.get(x, x) if type(x) is Value else x for x in operands)


class Program:
    """The steps of one call, in the order in which they ran.

    inputs     the Values of the tensor arguments.
    outputs    the leaves of the result: Values, and anything else as it was.
    structure  the result, whose leaves `outputs` replaces.
    on_host    whether all of it is NumPy's; else a device's launches replay it.
    maker_of   returns the step that gave a constant while it was recorded, if one did.
    """

    def __init__(
        self,
        inputs: Sequence[Value],
        steps: Sequence[Step],
        outputs: Sequence[Any],
        structure: Any,
        on_host: bool = True,
    ) -> None:
        self.on_host = on_host
        self.inputs = list(inputs)
        self.steps = list(steps)
        self.outputs = list(outputs)
        self.structure = structure
        self.forget_makers()

    def forget_makers(self) -> None:
        """Let go of what constants were made of, when there are no patterns to be found."""
        self.maker_of: Callable[[Value], Step | None] = lambda _: None

    def output_values(self) -> Iterator[Value]:
        """Yield the outputs that are Values."""
        return (x for x in self.outputs if type(x) is Value)

    def uses(self) -> Counter[Value]:
        """Return how often a value is used, by steps and as an output."""
        found = Counter(x for step in self.steps for x in step.values())
        found.update(self.output_values())
        return found


class Difference:
    """Where two recordings of one function part.

    of_constants  whether only the value of a constant differs: then no third call will agree.
    text          what differs, for people.
    """

    def __init__(self, of_constants: bool, text: str) -> None:
        self.of_constants = of_constants
        self.text = text


def difference(first: Program, second: Program) -> Difference | None:
    """Return the first difference between two recorded calls, or None if there is none.

    One of constants only where there is no other.
    """
    of_constants: Difference | None = None
    for found in _differences(first, second):
        if not found.of_constants:
            return found
        of_constants = of_constants or found
    return of_constants


def _differences(first: Program, second: Program) -> Iterator[Difference]:
    """Yield the differences, up to the first that is not of constants."""
    if len(first.steps) != len(second.steps):
        yield Difference(
            False, f"one call ran {len(first.steps)} operations, the next {len(second.steps)}"
        )
    known = dict(zip(second.inputs, first.inputs, strict=True))
    for a, b in zip(first.steps, second.steps, strict=True):
        if a.primitive is not b.primitive or len(a.inputs) != len(b.inputs):
            yield Difference(False, f"{a.name} ran at {a.where}, then {b.name} at {b.where}")
        for x, y in zip(a.inputs, b.inputs, strict=True):
            yield from _differences_of_inputs(x, y, b.where, known)
        if not _same_params(a.params, b.params):
            yield Difference(
                True, f"{b.name} at {b.where} had the settings {a.params}, then {b.params}"
            )
        if [id(v) for v in a.writes] != [id(v) for v in b.writes]:
            yield Difference(False, f"{b.name} at {b.where} wrote other variables")
        for y, z in zip(a.outputs, b.outputs, strict=True):
            if y.shape != z.shape or y.dtype != z.dtype:
                yield Difference(False, f"{b.name} at {b.where} gave {y!r}, then {z!r}")
            known[z] = y
    if not differ_in_leaves_alone(first.structure, second.structure):
        yield Difference(False, "the results had another structure")
    for leaf, other in zip(first.outputs, second.outputs, strict=True):
        if type(leaf) is Value and type(other) is Value:
            yield from _differences_of_inputs(leaf, other, "the return", known)
        elif leaf is other:
            continue
        elif isinstance(other, np.ndarray):
            yield Difference(True, "the function returned another NumPy array: return tensors")
        elif type(leaf) is not type(other) or (
            repr(leaf) != repr(other)  # 0.0 equals -0.0, and NaN not itself
            if isinstance(leaf, (int, float, np.generic))
            else leaf != other
        ):
            yield Difference(True, f"the function returned {leaf!r}, then {other!r}")


def _differences_of_inputs(
    a: Any, b: Any, where: str, known: dict[Value, Value]
) -> Iterator[Difference]:
    """Yield how two inputs of one step differ, if they do.

    known  which values of the first call those of the second are.
    """
    if type(a) is not Value or type(b) is not Value:
        if type(a) is type(b) and repr(a) == repr(b):  # 0.0 equals -0.0, and NaN not itself
            return
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            yield Difference(True, f"a number at {where} was {a}, then {b}")
        else:
            yield Difference(False, f"an argument at {where} was {a!r}, then {b!r}")
    elif a.kind != b.kind or a.shape != b.shape or a.dtype != b.dtype:
        yield Difference(False, f"an input at {where} was {a!r}, then {b!r}")
    elif a.kind == "constant":
        if not _equal(a.source, b.source):
            yield Difference(True, f"a constant used at {where} was {_brief(a)}, then {_brief(b)}")
    elif a.kind == "read":
        if a.source is not b.source:
            yield Difference(False, f"another variable was read at {where}")
        elif a.since != b.since:
            yield Difference(False, f"a variable was read at another time, at {where}")
    elif known[b] is not a:
        yield Difference(False, f"an operation at {where} took another result")


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    x, y = np.asarray(_on_host(a)), np.asarray(_on_host(b))
    return bool(x.tobytes() == y.tobytes())


def _on_host(x: Tensor) -> Any:
    return x._array if isinstance(x._array, (np.ndarray, np.generic)) else x._array.get()


def _same_params(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(a[k] is b[k] or (type(a[k]) is type(b[k]) and bool(np.all(a[k] == b[k]))) for k in a)


def _brief(value: Value) -> str:
    tensor = value.source
    return str(_on_host(tensor)) if value.size == 1 else f"an array of shape {value.shape}"
