"""Lowering: a program's steps as lines of NumPy calls into planned memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array
from tapegrad._function.gradients import gathered
from tapegrad._function.layout import Layout, Pair, joined_arrays
from tapegrad._function.program import Program, Step, Value, users_of
from tapegrad._function.rewrites import ends
from tapegrad._host_memory import aligned
from tapegrad.primitive import MultiPrimitive, Update


class Place:
    """Where an array lies.

    kind   "arena": in the program's own memory, at an address that planning gives; "static": an
           array that is there before the program runs (a constant, a Variable's memory); "local":
           a name that a line binds while the program runs.
    view   makes this place's array of the root's.
    pending  how many uses of the memory are still to come (of a root).
    """

    __slots__ = (
        "_root",
        "array",
        "bits",
        "dtype",
        "holds",
        "kind",
        "name",
        "offset",
        "pending",
        "shape",
        "turned",
        "view",
    )  # fmt: skip

    def __init__(
        self,
        kind: str,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        root: Place | None = None,
        view: Callable[[Array], Array] | None = None,
        array: Array = None,
    ) -> None:
        self.kind = kind
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._root = root  # not itself: a cycle would keep the arrays until a collection
        self.view = view
        self.array = array
        self.pending = 0
        self.offset = -1
        self.bits: Any = None  # the integer type as which it shows all of its root's numbers
        self.turned = False  # the transpose of the whole of its root
        self.holds: tuple[Place, ...] = ()  # memory that a local array may show
        self.name = ""

    @property
    def root(self) -> Place:
        """The place whose memory this one shows; itself unless it is a view."""
        return self if self._root is None else self._root

    @property
    def nbytes(self) -> int:
        """The bytes that the array takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def bind(self) -> Array:
        """Return the array, once the root's memory has been given."""
        if self.array is None and self.view is not None:
            self.array = self.view(self.root.bind())
        return self.array


def static(array: Array) -> Place:
    """Return the place of an array that is there before the program runs."""
    return Place("static", array.shape, array.dtype, array=array)


def static_number(value: float, dtype: Any) -> Place:
    """Return the place of a number of a type."""
    return static(np.asarray(value, dtype))


class Fresh:
    """Makes arrays that a caller gets; a large one is used again once nobody holds it any more.

    New memory of some megabytes costs a page fault every 4 KiB: as much as writing it does.
    """

    __name__ = "fresh"

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._shape, self._dtype = shape, dtype
        self._large = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize >= _RECYCLED
        self._given: list[Array] = []

    def __call__(self) -> Array:
        """Return an array that nobody else holds."""
        if not self._large:
            return np.empty(self._shape, self._dtype)
        given = self._given
        for i in range(len(given)):
            if sys.getrefcount(given[i]) == _NOBODY:
                return given[i]
        array = np.empty(self._shape, self._dtype)
        if len(given) < 2:  # who keeps more results has use for them
            given.append(array)
        return array


_RECYCLED = 1 << 20  # bytes
_NOBODY = 2  # references that sys.getrefcount counts: the list's, and its own argument


class Line:
    """One line of the program's text: a format, and the places and objects that it names."""

    __slots__ = ("elementwise", "make", "operands", "sums_rows", "text")

    def __init__(self, text: str, operands: Sequence[Any], elementwise: bool = False) -> None:
        self.text = text
        self.operands = tuple(operands)
        self.elementwise = elementwise  # what it calls; then its last operand is written
        self.sums_rows = False  # whether it is a product of ones and a matrix, in any order
        self.make: Callable[[], Any] | None = None  # makes the first operand, once memory is there


Lower = Callable[["Lowering", Step], bool]
# How a primitive's step becomes lines: what its meaning does, bit for bit, with `out=` where that
# makes new arrays. Returns False to decline, and then the meaning is called.
lowerings: dict[str | type[object], Lower] = {}


# The primitives whose result shows the memory of their input.
VIEWS = frozenset(("broadcast_to", "getitem", "permute", "reshape", "row", "stop_gradient"))


_PRODUCTS = frozenset(("matmul", "linear", "linear_relu"))


def _is_foreign(step: Step) -> bool:
    """Tell whether a step computes with bfloat16, of which NumPy has no products with `out`."""
    if step.name in VIEWS or isinstance(step.primitive, Update):
        return False
    return any(x.dtype.kind == "V" for x in (*step.values(), *step.outputs))


def lowers(*primitives: str | type[object]) -> Callable[[Lower], Lower]:
    """Enter a function in the table of lowerings, for primitives of these names or kinds."""

    def enter(function: Lower) -> Lower:
        lowerings.update(dict.fromkeys(primitives, function))
        return function

    return enter


class Lowering:
    """Turns steps into lines, and keeps account of where every value lies."""

    def __init__(
        self, program: Program, first_write: int, layout: Layout, leased: bool = False
    ) -> None:
        self.program = program
        self.leased = leased  # whether results may lie in the program's own memory
        self.layout = layout
        self.extended: dict[Value, Array] = {}  # matrices with the ones beside them, transposed
        self._stacks = {y: s for s in map(_Stack, layout.stacks) for y in s.members}
        self.done: set[Step] = set()  # what came with an earlier step
        self.multiplies = any(step.name in _PRODUCTS for step in program.steps)
        self._users = users_of(program.steps)
        self.early: list[Line] = []  # lines that change nothing but the program's own memory
        self.late: list[Line] = []  # from the first that changes state on
        self._lines = self.early
        self.places: dict[Value, Place] = {}
        self.destinations: dict[Value, Place] = {}
        self._uses = program.uses()
        self._outputs = set(program.output_values())
        self._locals = 0
        self.copies = self._reads_to_copy()
        self.kept: set[Place] = set()  # whose values the results need
        self.speculates = False  # whether a NaN in a checked value sends a call the careful way
        self._choose_destinations()
        for position, step in enumerate(program.steps):
            if position == first_write:
                self._lines = self.late
            for x, end in self.copies.items():
                if end == position:
                    self.of(x)
            if step not in self.done:
                self._lower(step)
            for x in step.values():
                if x in self.places:
                    self.places[x].root.pending -= 1

    def _lower(self, step: Step) -> None:
        lower = lowerings.get(step.name) or lowerings.get(type(step.primitive))
        if lower is None or _is_foreign(step) or not lower(self, step):
            self.call_meaning(step)

    # ---- reading Variables

    def _reads_to_copy(self) -> dict[Value, int]:
        """Return the reads whose version ends before their last use, and by which step."""
        last: dict[Value, int] = {}
        roots: dict[Value, Value] = {}
        for position, step in enumerate(self.program.steps):
            for x in step.values():
                root = roots.get(x, x)
                if root.kind == "read":
                    last[root] = position
                    if step.name in VIEWS or step.name not in lowerings:  # it may be a view
                        roots.update((y, root) for y in step.outputs)
        for x in self._outputs:
            last[roots.get(x, x)] = len(self.program.steps)
        found: dict[Value, int] = {}
        for position, step in enumerate(self.program.steps):
            if isinstance(step.primitive, Update):
                for x, end in last.items():
                    if x.kind == "read" and end > position and x not in found and ends(step, x):
                        found[x] = position
        return found

    def _place_of_read(self, x: Value) -> Place:
        memory = static(x.source._array)
        if not x.shape:
            place = self.local(x.shape, x.dtype)
            self.line("{} = {}[()]", place, memory)  # a NumPy scalar: a value of its own
            return place
        if x not in self.copies and x not in self._outputs:
            return memory
        place = self.arena(x.shape, x.dtype)
        self.line("{}[...] = {}", place, memory)
        return place

    # ---- gradients that go straight into the optimiser's flat buffer

    def _choose_destinations(self) -> None:
        for x, part in gathered(self.program).items():
            if x not in self._outputs:
                self.destinations[x] = static(part)

    # ---- what lowerings build with

    def of(self, x: Any) -> Any:
        """Return the place of a Value, or the Python number that an input is."""
        if type(x) is not Value:
            return x
        place = self.places.get(x)
        if place is None:
            if x.kind == "constant":
                place = static(x.source._array)
            elif x.kind == "input":
                place = self.local(x.shape, x.dtype, f"x{x.source}")
                if x in self.layout.with_ones:
                    given, place = place, self._with_ones(x)
                    self.line("{}[...] = {}", place, given)
            else:
                place = self._place_of_read(x)
            self.set(x, place)
        return place

    def set(self, x: Value, place: Place) -> None:
        """Let a Value lie in a place."""
        self.places[x] = place
        place.root.pending += self._uses[x]

    def uses(self, x: Value) -> int:
        """Return how often a value is used, by steps and as an output."""
        return self._uses[x]

    def only_user(self, x: Value) -> Step | None:
        """Return the step that takes a value, if nobody else gets it."""
        users = self._users.get(x, [])
        return users[0] if len(users) == self._uses[x] == 1 else None

    def memory_of(self, x: Value) -> Any:
        """Return where a 0-d value lies, if it is a Variable's own memory, else its place."""
        if x.kind == "read" and x not in self.copies and x not in self.places:
            return static(x.source._array)
        return self.of(x)

    def must_be_written(self, y: Value) -> bool:
        """Tell whether a caller or an optimiser gets a value: then it is no view of another."""
        return y in self._outputs or y in self.destinations

    def local(self, shape: tuple[int, ...], dtype: Any, name: str | None = None) -> Place:
        """Return a place for what a line will bind."""
        place = Place("local", shape, dtype)
        place.name = name or f"t{self._locals}"
        self._locals += name is None
        return place

    def arena(self, shape: tuple[int, ...], dtype: Any) -> Place:
        """Return memory of the program's own, free again after its last use."""
        return Place("arena", shape, dtype)

    def view(self, place: Place, shape: tuple[int, ...], view: Callable[[Array], Array]) -> Place:
        """Return a view of a place that is no local."""
        root = place.root
        if place is root:
            through = view
        else:
            before = place.view
            assert before is not None
            through = lambda array: view(before(array))
        return Place(place.kind, shape, place.dtype, root=root, view=through)

    def rows(self, place: Place, first: int, end: int) -> Place:
        """Return a view of some rows of a matrix."""
        return self.view(place, (end - first, *place.shape[1:]), lambda array: array[first:end])

    def out(self, step: Step, *reuse: Any, position: int = 0) -> Place:
        """Return where a step's output is to be written, in the memory of an input if that may be.

        reuse  the inputs whose memory the step can write to while it reads them.
        """
        y = step.outputs[position]
        place = self._own_memory(y) or self._given_up(reuse, step, y) or self.like(y)
        self.set(y, place)
        return place

    def _own_memory(self, y: Value) -> Place | None:
        """Return memory that holds nothing but a value, where it needs such."""
        if y in self.destinations:
            return self.destinations[y]
        if y in self.layout.with_ones:
            return self._with_ones(y)
        if y in self._outputs and not self.leased:
            place = self.local(y.shape, y.dtype)
            self.line("{} = {}()", place, Fresh(y.shape, y.dtype))
            return place
        return None

    def _given_up(self, inputs: Sequence[Any], step: Step, y: Value) -> Place | None:
        """Return the memory of an input that nobody needs after a step, if a value fits in."""
        for x in inputs:
            place = self.places.get(x)
            if (
                place is not None
                and x not in self._outputs
                and place.kind == "arena"
                and (place.root is place or place.turned)
                and place.turned == (y in self.layout.feature_major)
                and (place.shape, place.dtype) == (y.shape, y.dtype)
                and place.root.pending == sum(other is x for other in step.values())
            ):
                return place
        return None

    def _with_ones(self, y: Value) -> Place:
        """Make memory of its own for a matrix with ones beside it, which stay there."""
        rows, columns = y.shape
        if y in self.layout.feature_major:
            stack = self._stacks.get(y)
            full = aligned((columns + 1, rows), y.dtype, 1) if stack is None else stack.part(y)
            self.extended[y] = full
            return static(full[:-1].T)
        full = aligned((rows, columns + 1), y.dtype, 1)
        self.extended[y] = full.T
        return static(full[:, :-1])

    def like(self, y: Value, dtype: Any = None) -> Place:
        """Return memory for a value's elements, stored as it is."""
        dtype = y.dtype if dtype is None else dtype
        if y not in self.layout.feature_major:
            return self.arena(y.shape, dtype)
        place = self.view(self.arena(y.shape[::-1], dtype), y.shape, np.transpose)
        place.turned = True
        return place

    def integers(self, place: Place) -> Place:
        """Return the bits of a place's numbers as unsigned integers of their size."""
        kind = np.dtype(f"u{place.dtype.itemsize}")
        if place.kind == "local":
            bits = Place("local", place.shape, kind, root=place.root)
            bits.name = f"{place.name}.view({kind.name})"
            bits.holds = place.holds
            bits.bits = kind
            return bits
        bits = self.view(place, place.shape, lambda array: array.view(kind))
        bits.dtype = kind
        bits.bits = kind if place.root is place else None
        return bits

    def positive(self, y: Value) -> Place:
        """Return 1 where the bits of a value are not 0, and 0 where they are, as integers.

        Unsigned ones: that is the faster sign.
        """
        stack = self._stacks.get(y)
        if stack is None or not all(x in self.places for x in stack.members):
            mask = self.integers(self.like(y))
            self.call("sign", self.integers(self.of(y)), mask)
            return mask
        if stack.mask is None:
            bits = self.integers(static(stack.array))
            stack.mask = self.arena(bits.shape, bits.dtype)
            self.call("sign", bits, stack.mask)
        rows = stack.rows[y]
        return self.view(stack.mask, y.shape, lambda mask: mask[rows].T)

    def pair_of_bias(self, bias: Value) -> Pair | None:
        """Return the pair with whose kernel a bias's gradient is computed, if it is."""
        pair = self.layout.pair_of_bias.get(bias)
        return pair if pair is not None and self.is_one_product(pair) else None

    def is_one_product(self, pair: Pair) -> bool:
        """Tell whether a pair's gradients are written where they lie together."""
        return (
            pair.activation in self.extended
            and pair.kernel in self.destinations
            and pair.bias in self.destinations
        )

    def joined_destination(self, pair: Pair) -> Array:
        """Return where a kernel's gradient and its bias's lie, as one matrix."""
        kernel, bias = self.destinations[pair.kernel].array, self.destinations[pair.bias].array
        both = joined_arrays(kernel, bias)
        assert both is not None
        return both

    def turned(self, place: Place) -> Place:
        """Return the transpose of a matrix's place."""
        if place.kind == "local":
            transpose = self.local(place.shape[::-1], place.dtype)
            transpose.holds = (place.root,)
            self.line("{} = {}.T", transpose, place)
            return transpose
        if place.kind == "static":
            return static(place.bind().T)
        return self.view(place, place.shape[::-1], np.transpose)

    def line(self, text: str, *operands: Any, elementwise: bool = False) -> Line:
        """Add a line; the operands take the place of its braces."""
        line = Line(text, operands, elementwise)
        self._lines.append(line)
        return line

    def call(self, function: str, *operands: Any) -> Line:
        """Add a call of one of NumPy's functions, by the name that the replay knows."""
        if function == "dot":  # the method: the function asks for overrides first, 0.12 us
            return self.line("{}.dot({}, {})", *operands)
        braces = ["{}"] * len(operands)
        if function in ("maximum", "minimum"):  # they take out by its name alone
            braces[-1] = "out={}"
        text = f"{function}({', '.join(braces)})"
        return self.line(text, *operands, elementwise=function != "matmul")

    def bound(
        self, function: Callable[..., Any], *operands: Any, result: Place | None = None
    ) -> None:
        """Add a call of any function, whose answer is bound to a local."""
        braces = ", ".join(["{}"] * len(operands))
        if result is None:
            self.line(f"{{}}({braces})", function, *operands)
        else:
            self.line(f"{{}} = {{}}({braces})", result, function, *operands)

    def call_meaning(self, step: Step) -> None:
        """Call a primitive's meaning, whose results are new arrays, or may show its inputs."""
        places = [self.of(x) for x in step.inputs]
        primitive = step.primitive
        if isinstance(primitive, Update):
            targets = [static(v._array) for v in step.writes]
            self.bound(meaning_of(step), *targets, *places)
            return
        held = tuple(p.root for p in places if isinstance(p, Place))
        results = []
        for y in step.outputs:
            place = self.local(y.shape, y.dtype)
            place.holds = held
            results.append(place)
        if not isinstance(primitive, MultiPrimitive):
            self.bound(meaning_of(step), *places, result=results[0])
        else:
            names = ", ".join(["{}"] * len(results)) + ("," if len(results) == 1 else "")
            braces = ", ".join(["{}"] * len(places))
            self.line(f"{names} = {{}}({braces})", *results, meaning_of(step), *places)
        for y, place in zip(step.outputs, results, strict=True):
            self.set(y, place)
            for root in held:
                root.pending += self._uses[y]


class _Stack:
    """Matrices stored feature by feature under each other, each with its row of ones.

    rows  where each lies, without its ones.
    mask  where the numbers are not 0, once that was computed.
    """

    def __init__(self, members: list[Value]) -> None:
        self.members = members
        self.mask: Place | None = None
        self.rows: dict[Value, slice] = {}
        end = 0
        for y in members:
            self.rows[y] = slice(end, end + y.shape[1])
            end += y.shape[1] + 1
        self.array = aligned((end, members[0].shape[0]), members[0].dtype, 1)

    def part(self, y: Value) -> Array:
        """Return a member's memory, with its ones."""
        rows = self.rows[y]
        return self.array[rows.start : rows.stop + 1]


def meaning_of(step: Step) -> Callable[..., Any]:
    """Return what computes a step's results, its settings given, of arrays."""

    def call(*arrays: Any) -> Any:
        return step.primitive.compute(arrays, step.params)

    call.__name__ = step.name
    return call
