"""Replay: a program's lines as one Python function, and what it needs around it to be run."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextvars
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad import _backend, _storage
from tapegrad._backend import Array
from tapegrad._function import (
    elementwise_calls,  # noqa: F401  fills the table of lowerings
    matrix_calls,  # noqa: F401  likewise
    shape_calls,  # noqa: F401  likewise
    simplify,
    softmax_calls,  # noqa: F401  likewise
    update_calls,  # noqa: F401  likewise
)
from tapegrad._function.blocks import in_blocks
from tapegrad._function.layout import Layout
from tapegrad._function.lease import Lease
from tapegrad._function.lowering import Line, Lowering, Place
from tapegrad._function.memory import allocate, place_in_arena
from tapegrad._function.own_calls import OWN_CALLS
from tapegrad._function.program import Program, Value
from tapegrad._function.rewrites import writes_last
from tapegrad._storage import lies_in_buffer
from tapegrad._structure import is_container, unflatten
from tapegrad.tensor import Tensor, next_id
from tapegrad.variable import Variable

_new = object.__new__


def _tensor(array: Array) -> Tensor:
    out = _new(Tensor)
    out._array = array
    out.id = next_id()
    return out


# What every program's text may name.
_NAMES: dict[str, Any] = {
    **{name: value for name, value in vars(np).items() if isinstance(value, np.ufunc)},
    **{f"{name}_reduce": getattr(np, name).reduce for name in ("add", "maximum", "minimum")},
    "np": np,
    "nan": np.nan,
    "broadcast_to": np.broadcast_to,
    "uint32": np.uint32,
    "uint64": np.uint64,
    **OWN_CALLS,
}


class Writes:
    """What surrounds the lines that change state: all of them run, or the Variables say so."""

    def __init__(self, program: Program, name: str) -> None:
        variables = {id(v): v for step in program.steps for v in step.writes}
        self._variables = list(variables.values())
        self._buffers = list({id(v._buffer): v._buffer for v in self._variables}.values())
        self._name = name
        self._interrupts: list[tuple[Any, ...]] = []
        self._hold = _noting_in(self._interrupts)
        self._previous: Any = None

    def begin(self) -> None:
        """Give a copy to everyone who still reads the old values, and hold Ctrl-C back."""
        for buffer in self._buffers:
            if buffer.shown:
                buffer.before_write(buffer.array)
        if _get_ident() == _main_thread:
            # Between two of NumPy's calls it would tear the update: 282 of 300 tries did. The
            # module under `signal` is asked, which takes 0.2 us where that takes 1.5.
            self._previous = _set_handler(_SIGINT, self._hold)

    def end(self) -> None:
        """Let Ctrl-C through, one that was held back too."""
        previous, self._previous = self._previous, None
        if previous is not None:
            _set_handler(_SIGINT, previous)
            if self._interrupts:
                first = self._interrupts[0]
                self._interrupts.clear()
                if callable(previous):
                    previous(*first)

    def failed(self, error: BaseException) -> None:
        """Mark the Variables as torn: some of them were written, others not."""
        text = f"{self._name} failed while it wrote its variables ({error!r})"
        for variable in self._variables:
            variable._tear(text)


def _noting_in(interrupts: list[tuple[Any, ...]]) -> Callable[..., None]:
    """Return a handler that notes what it is called with; a method would be made in every step."""
    return lambda *arguments: interrupts.append(arguments)


_main_thread = threading.main_thread().ident
_get_ident, _set_handler, _SIGINT = threading.get_ident, _signal.signal, _signal.SIGINT


class Replay:
    """A program that is ready to run.

    lock   held while it runs; the programs of one function share it.
    text   of the Python function that it runs.
    arena  how many bytes it has of its own.
    """

    def __init__(
        self, program: Program, name: str, lock: threading.RLock, *, leased: bool = False
    ) -> None:
        self._program = program
        self._name = name
        self._leased = leased
        self._leases: list[Lease] = []
        self._lock = lock
        self._first_write = writes_last(program)
        self._finish = _finisher(program)
        self._writes = self._first_write < len(program.steps)
        self._homes = [(v, _backend.module_of((v._array,))) for v in self.variables()]
        # A context of its own, in which NumPy does not warn: entering it costs a tenth of errstate.
        self._context = contextvars.copy_context()
        self._context.run(lambda: np.seterr(all="ignore"))
        self._prepare()

    def _prepare(self) -> None:
        """Make the program ready for where its Variables lie now."""
        placements = _storage.placements
        memory_of = [(v, v._array) for v in self.variables()]
        for _, array in memory_of:
            _ = array.shape  # raises where a failed call has lost the Variable's values
        self._plan()
        self._placements, self._memory_of = placements, memory_of

    def _plan(self) -> None:
        self._careful: Callable[..., Any] | None = None
        self._met = 0  # how often the quick way was given up
        layout = Layout(self._program if "layout" in simplify.ENABLED else None, self._first_write)
        self.text, self.arena, self._call = self._lower(layout)

    def _lower(self, layout: Layout) -> tuple[str, int, Callable[..., Any]]:
        program = self._program
        lowered = Lowering(program, self._first_write, layout, self._leased)
        results = [_result(lowered, x) for x in program.outputs]
        kept = [place for _, place in results if isinstance(place, Place)]
        lowered.kept = {place.root for place in kept}
        in_blocks(lowered)
        if lowered.speculates:
            _look_for_nan(lowered, _Carefully(self))
        lines = [*lowered.early, *lowered.late]
        arena = place_in_arena(lines, kept)
        memory = allocate([*lines, Line("", kept)], arena)
        text = _Text(len(program.inputs))
        structure = () if self._finish else program.structure
        writes = Writes(program, self._name)
        source = text.function(lowered, results, writes, structure=structure)
        tensor: Callable[[Array], Tensor] = _tensor
        if self._leased:
            tensor = Lease(memory, self._name)
            self._leases.append(tensor)
        return source, arena, text.compile(source, self._name, tensor)

    def _run_carefully(self, arrays: Sequence[Array]) -> Any:
        """Run the program with every check where it belongs: a NaN has been seen."""
        if self._careful is None:
            _, _, self._careful = self._lower(Layout(None))
        self._met += 1
        if self._met == _OFTEN:  # each such call has computed most things twice
            self._met = 0
            self._call = _ForAWhile(self, self._call, self._careful)
        return self._careful(arrays)

    def _run_quickly(self, call: Callable[..., Any]) -> None:
        self._call = call

    @property
    def hands_back_nothing(self) -> bool:
        """Whether none of the results is an argument, as it was given."""
        return all(x.kind != "input" for x in self._program.output_values())

    @property
    def structure(self) -> Any:
        """The structure of the result, with something in place of its leaves."""
        return self._program.structure

    def explain(self) -> str:
        """Return the text that runs, with the size of its memory."""
        return f"# {self._name}: {self.arena / 2**10:.1f} KiB of its own memory\n{self.text}"

    def variables(self) -> list[Variable]:
        """Return the Variables that the program reads or writes."""
        found: dict[int, Variable] = {}
        for step in self._program.steps:
            for v in (*step.writes, *(x.source for x in step.values() if x.kind == "read")):
                found[id(v)] = v
        for x in self._program.output_values():
            if x.kind == "read":
                found[id(x.source)] = x.source
        return list(found.values())

    def _check_placements(self) -> None:
        if not _backend.numpy_alone:
            for variable, xp in self._homes:
                variable._move(xp)  # a stream of random numbers goes to where it is drawn from
        placements = _storage.placements
        if any(v._array is not array for v, array in self._memory_of):
            self._leases.clear()
            self._prepare()
        self._placements = placements

    def run(self, arrays: Sequence[Array], tensors: Sequence[Any]) -> Any:
        """Run the program on the inputs' arrays; return the result in its structure."""
        if self._writes:
            for a in arrays:
                if a.base is not None:
                    # A view of a Variable keeps its values: what the program writes changes them.
                    arrays = [a.copy() if lies_in_buffer(a) else a for a in arrays]
                    break
        with self._lock:
            for lease in self._leases:
                arrays = lease.end(arrays)
            if self._placements != _storage.placements:
                self._check_placements()
            results = self._context.run(self._call, arrays)
        return results if self._finish is None else self._finish(results, tensors)


class _Carefully:
    """Runs a program carefully; holds it weakly, for the program's text holds this."""

    __name__ = "carefully"

    def __init__(self, replay: Replay) -> None:
        self._replay = weakref.ref(replay)

    def __call__(self, arrays: Sequence[Array]) -> Any:
        replay = self._replay()
        assert replay is not None
        return replay._run_carefully(arrays)


_OFTEN = 8  # calls that were sent the careful way, until some are begun there
_WHILE = 128  # calls that then are


class _ForAWhile:
    """Runs a program carefully from the beginning, some times, and then gives the other way back.

    A net whose logits lie far apart, or whose loss is NaN, would pay for both ways in every step.
    """

    def __init__(
        self, replay: Replay, quickly: Callable[..., Any], carefully: Callable[..., Any]
    ) -> None:
        self._replay = weakref.ref(replay)
        self._quickly, self._carefully = quickly, carefully
        self._left = _WHILE

    def __call__(self, arrays: Sequence[Array]) -> Any:
        self._left -= 1
        if not self._left:
            replay = self._replay()
            assert replay is not None
            replay._run_quickly(self._quickly)
        return self._carefully(arrays)


def _finisher(program: Program) -> Callable[[Any, Sequence[Any]], Any] | None:
    """Return what puts the results into their structure; None where there is but one tensor."""
    outputs, structure = program.outputs, program.structure
    given = {i: x.source for i, x in enumerate(outputs) if type(x) is Value and x.kind == "input"}
    plain = len(outputs) == 1 and not is_container(structure)
    if not given and (plain or _is_flat(structure)):
        return None  # the program's text says it

    def finish(results: tuple[Any, ...], tensors: Sequence[Any]) -> Any:
        leaves = list(results)
        for i, source in given.items():
            leaves[i] = _given(tensors[source])
        return unflatten(structure, leaves)

    return finish


def _is_flat(structure: Any) -> bool:
    return type(structure) in (tuple, list) and not any(is_container(x) for x in structure)


def _look_for_nan(lowered: Lowering, careful: Callable[..., Any]) -> None:
    """Send the call the careful way, before anything is written, where a checked value is NaN."""
    names = [place.name for x in lowered.layout.checked if (place := lowered.of(x)).kind == "local"]
    test = " or ".join(f"{name} != {name}" for name in names)
    lowered.early.append(Line(f"if {test}: return {{}}(arrays)", (careful,)))


def _given(x: Any) -> Tensor:
    """Return an argument as the tensor that it is handed out as."""
    return x if isinstance(x, Tensor) else Tensor(x)


def _result(lowered: Lowering, x: Any) -> tuple[str, Any]:
    """Return how an output is handed out: text with braces, and what stands in them."""
    if type(x) is not Value:
        return "{}", x
    if x.kind == "constant":
        return "{}", x.source
    if x.kind == "input":
        return "None", None
    place = lowered.of(x)
    if place.kind == "local" and not place.holds:
        return "tensor({})", place
    if lowered.leased and place.kind == "arena":
        return "tensor({})", place
    return ("tensor({}.copy())" if x.shape else "tensor({}[()])"), place


class _Text:
    """Writes the lines of a function, and collects the objects that they name."""

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._names: dict[int, str] = {}
        self._objects: dict[str, Any] = {}
        self._arrays: dict[Any, Array] = {}

    def function(
        self,
        lowered: Lowering,
        results: Sequence[tuple[str, Any]],
        writes: Writes,
        *,
        structure: Any,
    ) -> str:
        leaves = [
            self._line(Line(text, (place,) if "{}" in text else ())) for text, place in results
        ]
        if type(structure) is list and _is_flat(structure):
            answer = f"return [{', '.join(leaves)}]"
        elif len(leaves) == 1 and not is_container(structure):
            answer = f"return {leaves[0]}"
        else:
            answer = f"return ({''.join(f'{x}, ' for x in leaves)})"
        # One argument: spreading a list over several takes 0.08 us more than unpacking it.
        names = "".join(f"x{i}, " for i in range(self._inputs))
        unpack = [f"    {names[: -1 if self._inputs == 1 else -2]} = arrays"] if names else []
        lines = self._lines(lowered.early, "    ")
        if lowered.late:
            begin, end, failed = (
                self._name(f, "w") for f in (writes.begin, writes.end, writes.failed)
            )
            lines += [f"    {begin}()", "    try:"]
            lines += self._lines(lowered.late, "        ")
            lines += ["    except BaseException as error:", f"        {failed}(error)"]
            lines += ["        raise", "    finally:", f"        {end}()"]
        lines.append(f"    {answer}")
        return "\n".join(["def replay(arrays):", *unpack, *lines, ""])

    def _lines(self, lines: Sequence[Line], indent: str) -> list[str]:
        return [indent + text for line in lines for text in self._line(line).split("\n")]

    def _line(self, line: Line) -> str:
        operands = line.operands if line.make is None else (line.make(), *line.operands[1:])
        return line.text.format(*map(self._operand, operands))

    def _operand(self, x: Any) -> str:
        if isinstance(x, Place):
            if x.kind == "local":
                return x.name
            return self._name(self._only(x.bind()), "a" if x.kind == "arena" else "c")
        if x is None or type(x) in (int, bool, str) or _is_plain_tuple(x):
            return f"({x})" if type(x) is int and x < 0 else repr(x)  # -2 ** y is -(2 ** y)
        return self._name(x, getattr(x, "__name__", None) or "k")

    def _only(self, array: Array) -> Array:
        """Return the array that stands for all that show the same numbers.

        A ufunc whose output is an input's memory, but another object, takes 0.25 us more. NumPy's
        scalars have no address that lasts.
        """
        if not isinstance(array, np.ndarray):
            return array
        data = array.__array_interface__["data"], array.shape, array.strides, array.dtype
        return self._arrays.setdefault(data, array)

    def _name(self, x: Any, prefix: str) -> str:
        name = self._names.get(id(x))
        if name is None:
            base = prefix if prefix.isidentifier() else "f"
            name = self._names[id(x)] = f"{base}{len(self._names)}"
            self._objects[name] = x
        return name

    def compile(
        self, text: str, name: str, tensor: Callable[[Array], Tensor]
    ) -> Callable[..., Any]:
        space = _NAMES | self._objects | {"tensor": tensor}
        exec(compile(text, f"<replay of {name}>", "exec"), space)  # our own text alone
        # Taken out: a function whose own globals name it would be freed by the collector alone.
        function: Callable[..., Any] = space.pop("replay")
        return function


def _is_plain_tuple(x: Any) -> bool:
    return type(x) is tuple and all(type(part) is int or part is None for part in x)
