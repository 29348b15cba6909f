"""DeviceReplay: a program on a GPU, launched step by step at first, then as one CUDA graph."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tapegrad import _backend, _storage
from tapegrad._backend import Array, Module, byte_bounds, owner_of
from tapegrad._function.gradients import gathered
from tapegrad._function.graphs import Graph, Workplace
from tapegrad._function.lookups import Lookups
from tapegrad._function.program import Program, Step, Value
from tapegrad._function.replay import Replay, Writes, _tensor
from tapegrad._function.schedule import MAIN, SECOND, START, Schedule
from tapegrad._storage import lies_in_buffer
from tapegrad.config import config
from tapegrad.errors import TapeWarning
from tapegrad.primitive import MultiPrimitive, Update
from tapegrad.tensor import wrap
from tapegrad.variable import Variable

# Launches a program in a workplace, for these inputs; returns the result arrays.
Issue = Callable[..., list[Array]]

# What was warned of: each fit makes its function anew, of the same name.
_told: set[tuple[str, str]] = set()


# For how many feeds a program keeps a graph: training and validation, say. Each has memory.
_MOST_LOOPS = 4


class DeviceReplay(Replay):
    """A program whose steps run on a GPU.

    Its first call launches the steps one by one on the streams that capture them in the second
    call; from then on one launch replays all of them. Where a capture fails, or while
    `tg.config.cuda_graphs` is False, the steps are launched one by one on the caller's stream.
    """

    _why_plain: str | None = None

    def __init__(
        self, program: Program, name: str, lock: threading.RLock, *, leased: bool = False
    ) -> None:
        self._xp = _backend.module_named("cupy")
        _move_constants(program, self._xp)
        self._lookups = Lookups(program, name, self._xp)
        super().__init__(program, name, lock, leased=leased)

    def _plan(self) -> None:
        """Plan the launches; what was captured before reads Variables where they were."""
        program = self._program
        self._schedule = Schedule(program, self._first_write)
        self._destinations = gathered(program)
        self._given_out = [x for x in program.output_values() if x.kind in ("result", "read")]
        self._around = _Writes(program, self._name)
        used = {x for step in program.steps for x in step.values()}
        self._used = [x in used for x in program.inputs]
        self._workplace: Workplace | None = None
        self._graph: Graph | None = None
        # A feed that nobody has any more takes its loop along.
        self._loops: weakref.WeakKeyDictionary[Feed, _Loop] = weakref.WeakKeyDictionary()
        self._current: Launches | None = None  # what is being launched, for its errors
        self.arena = 0
        self.text = _listing(program, self._schedule)

    # ---- running

    def run(self, arrays: Sequence[Array], tensors: Sequence[Any]) -> Any:
        """Run the program on the inputs' arrays; return the result in its structure."""
        with self._lock:
            self._look_back()
            found = iter(self._results(arrays))
        leaves: list[Any] = []
        for x in self._program.outputs:
            if type(x) is not Value:
                leaves.append(x)
            elif x.kind == "constant":
                leaves.append(x.source)
            else:
                leaves.append(None if x.kind == "input" else _tensor(next(found)))
        if self._finish is not None:
            return self._finish(tuple(leaves), tensors)
        kind = type(self._program.structure)
        return kind(leaves) if kind in (list, tuple) else leaves[0]

    def _look_back(self) -> None:
        """See to what has happened since the last call."""
        self._lookups.look()
        if self._placements != _storage.placements:
            self._check_placements()

    def _results(self, arrays: Sequence[Array]) -> list[Array]:
        """Return what the program gives, in memory of the caller's own."""
        graphs = self._uses_graphs()
        if graphs and self._workplace is not None:
            if self._graph is None:
                inputs = [a if used else None for a, used in zip(arrays, self._used, strict=True)]
                self._graph = self._capture(self._workplace, self._issue, inputs)
                self.arena = 0 if self._graph is None else self._graph.nbytes
            if self._graph is not None:
                return self._followed(self._graph.launch(arrays, self._around))
            graphs = False
        if self._writes:
            # A view of a Variable keeps its values: the program's own writes would change them.
            arrays = [a.copy() if lies_in_buffer(a) else a for a in arrays]
        if graphs:
            results, self._workplace = self._warm_up(self._issue, arrays)
            if results is not None:
                return results
        self._lookups.at_once = True
        launches = Launches(self._schedule, self._destinations, arrays)
        results = launches.run(self._given_out, self._around)
        return [a.copy() if _is_shared(a, arrays) else a for a in results]

    def _uses_graphs(self) -> bool:
        if self._why_plain is not None or not config.cuda_graphs or config.debug:
            return False
        # A caller who captures a graph of their own gets the launches into it.
        return not self._xp.cuda.get_current_stream().is_capturing()

    def _issue(
        self, place: Workplace, inputs: Sequence[Array], around: Writes | None = None
    ) -> list[Array]:
        """Launch the program in a workplace; return what is given out of it."""
        self._lookups.at_once = False
        self._current = Launches(self._schedule, self._destinations, inputs, place)
        return self._current.run(self._given_out, around) + self._lookups.told

    def _warm_up(
        self, issue: Issue, inputs: Sequence[Array]
    ) -> tuple[list[Array] | None, Workplace | None]:
        """Launch a program where it will be captured: return its results, and the workplace.

        None for the workplace where it cannot be captured, and for the results where nothing was
        done: beside the memory of other graphs there may be no room for one more.
        """
        self._around.begun = False
        try:
            place = Workplace(self._xp)
            # Laid out as the graph's own inputs will be: for others there may be other kernels to
            # build and other products to plan.
            with place.allocator():
                mine = [x.copy() for x in inputs]
            with place.turn():
                results = place.launch(lambda: issue(place, mine, self._around))
            if self._current is not None and self._current.on_host is not None:
                self._stay_plain("it computes with NumPy's arrays too", self._current.on_host)
        except MemoryError:
            if self._around.begun:
                raise
            self._stay_plain("there is no memory left for a graph of its own", None)
            return None, None
        finally:
            self._current = None
        return self._followed(results), place if self._why_plain is None else None

    def _followed(self, results: list[Array]) -> list[Array]:
        """Return the results of a launch without what tells of its lookups."""
        if self._lookups.told:
            self._lookups.follow(results.pop())
        return results

    def _capture(
        self,
        place: Workplace,
        issue: Issue,
        inputs: Sequence[Array | None],
        kept: Sequence[Array] = (),
    ) -> Graph | None:
        """Return the graph of a program, or None where it cannot be captured, which is told."""
        try:
            return Graph(place, lambda mine: issue(place, mine), inputs, kept)
        except Exception as error:
            step = None if self._current is None else self._current.step
            self._stay_plain(f"{type(error).__name__}: {error}", step)
            return None
        finally:
            self._current = None

    # ---- several batches a launch

    def run_many(self, feed: Feed, first: int) -> list[Any] | None:
        """Run the program on some batches of a feed by one launch.

        first  the number of the first batch.

        Returns the leaves of the result, tensors stacked with one entry a batch; None where the
        program is not replayed as a graph.
        """
        with self._lock:
            self._look_back()
            if not self._uses_graphs():
                return None
            stacks = self._stacks(feed, first)
        if stacks is None:
            return None
        found = iter(stacks)
        return [_tensor(next(found)) if type(x) is Value else x for x in self._program.outputs]

    def _stacks(self, feed: Feed, first: int) -> list[Array] | None:
        loop = self._loops.pop(feed, None)
        if loop is not None:
            self._loops[feed] = loop  # the last to have been used
        issue = functools.partial(self._issue_many, feed)
        if loop is None:
            position = self._xp.full((), first, np.int64)
            results, place = self._warm_up(issue, [feed.order, position])
            if place is not None:
                self._loops[feed] = _Loop(place, feed.count)
                if len(self._loops) > _MOST_LOOPS:
                    del self._loops[next(iter(self._loops))]
            return results
        if loop.graph is None:
            like = [feed.order, self._xp.empty((), np.int64)]
            loop.graph = self._capture(loop.place, issue, like, feed.arrays)
            if loop.graph is None:
                return None
        order = None if loop.order is feed.order else feed.order
        results = self._followed(loop.graph.launch([order, first], self._around))
        loop.order = feed.order
        return results

    def _issue_many(
        self, feed: Feed, place: Workplace, inputs: Sequence[Array], around: Writes | None = None
    ) -> list[Array]:
        """Launch the program on batch after batch; return its results, stacked."""
        xp = self._xp
        self._lookups.at_once = False
        order, position = inputs
        places = xp.take(order, position + xp.arange(feed.count), axis=0)
        values = list(self._program.output_values())
        stacks = [xp.empty((feed.count, *x.shape), x.dtype) for x in values]
        for k in range(feed.count):
            batch = [xp.take(x, places[k], axis=0) for x in feed.arrays]
            self._current = Launches(self._schedule, self._destinations, batch, place)
            for stack, y in zip(stacks, self._current.run(values, around), strict=True):
                stack[k] = y
        return stacks + self._lookups.told

    # ---- where there is no graph

    def _stay_plain(self, cause: str, step: Step | None) -> None:
        where = "" if step is None else f" ({step.name} at {step.where})"
        self._why_plain = f"{cause}{where}"
        self._workplace = self._graph = None
        self._loops.clear()
        key = self._name, self._why_plain
        if key not in _told:
            _told.add(key)
            warnings.warn(
                f"{self._name} cannot be replayed as a CUDA graph, and its operations are "
                f"launched one by one: {self._why_plain}. tg.config.cuda_graphs = False does so "
                "without this warning",
                TapeWarning,
                stacklevel=6,
            )

    # ---- looking at it

    def explain(self) -> str:
        """Return the steps in their order, and how they are replayed."""
        steps = len(self._schedule.launches)
        second = self._schedule.on_second_branch
        beside = f", {second} of them on a second branch" if second else ""
        if self._why_plain is not None:
            how = f"plain launches of {steps} steps: {self._why_plain}"
        elif not config.cuda_graphs:
            how = f"plain launches of {steps} steps: tg.config.cuda_graphs is False"
        elif config.debug:
            how = f"plain launches of {steps} steps: tg.config.debug is True"
        elif self._graph is None:
            how = f"{steps} steps{beside}, to be captured as a CUDA graph in the next calls"
        else:
            size = f"{self.arena / 2**10:.1f} KiB of its own memory"
            how = f"a CUDA graph of {steps} steps{beside}; {size}"
        for loop in self._loops.values():
            if loop.graph is not None:
                size = f"{loop.graph.nbytes / 2**10:.1f} KiB"
                how += f"; another of {loop.count} batches, {size}"
        return f"# {self._name}: {how}\n{self.text}"


class _Writes(Writes):
    """What surrounds launches that change state; `begun` says whether there were any."""

    begun = False

    def begin(self) -> None:
        """Note it, and do what else there is to do before."""
        self.begun = True
        super().begin()


class Feed:
    """Arrays on a device of which a program is given batches, several a launch.

    arrays  the program's inputs with all their rows.
    order   the rows of each batch, (batches, batch size); a new array where it changes.
    count   batches a launch.
    """

    def __init__(self, arrays: Sequence[Array], order: Array, count: int) -> None:
        # What lies in a Variable may be written by the program.
        self.arrays = [a.copy() if lies_in_buffer(a) else a for a in arrays]
        self.order = order
        self.count = count


class _Loop:
    """A graph of several steps on the batches of a feed, or what becomes one."""

    def __init__(self, place: Workplace, count: int) -> None:
        self.place = place
        self.count = count
        self.graph: Graph | None = None
        self.order: Array | None = None  # what the graph was given last


class Launches:
    """One run through a schedule's launches: the values, and where they lie.

    destinations  where values are to be written, if the kernel can: gradients, to where they are
             gathered.
    place    with streams for both branches; None for all on the caller's stream.
    step     the step that is being launched.
    on_host  a step that took or gave an array of NumPy, which no graph can hold.
    """

    def __init__(
        self,
        schedule: Schedule,
        destinations: Mapping[Value, Array],
        inputs: Sequence[Array],
        place: Workplace | None = None,
    ) -> None:
        self._schedule = schedule
        self._destinations = destinations
        self._inputs = inputs
        self._place = place
        self._arrays: dict[Value, Array] = {}
        self._events: dict[int, Any] = {}
        self.step: Step | None = None
        self.on_host: Step | None = None

    def run(self, results: Sequence[Value], around: Writes | None = None) -> list[Array]:
        """Launch everything, and return the arrays of the results, which may show Variables.

        around  what surrounds the launches that write; None where they are but captured.
        """
        schedule = self._schedule
        place, end = self._place, len(schedule.launches)
        if place is not None and START in schedule.awaited:
            self._events[START] = place.record(MAIN)
        if around is None or schedule.late == end:
            self._launch(0, end)
        else:
            self._launch(0, schedule.late)
            around.begin()
            try:
                self._launch(schedule.late, end)
            except BaseException as error:
                around.failed(error)
                raise
            finally:
                around.end()
        if place is not None and schedule.end is not None:
            place.streams[MAIN].wait_event(self._events[schedule.end])
        return [self._array(x) for x in results]

    def _launch(self, begin: int, end: int) -> None:
        schedule, place = self._schedule, self._place
        for position in range(begin, end):
            step, branch, after = schedule.launches[position]
            if place is None:
                self._do(step, position)
                continue
            stream = place.streams[branch]
            if after is not None:
                stream.wait_event(self._events[after])
            with stream:
                self._do(step, position)
            if position in schedule.awaited:
                self._events[position] = place.record(branch)

    def _do(self, step: Step, position: int) -> None:
        self.step = step
        for x in self._schedule.keeps.get(position, ()):
            self._keep(x, step.writes)
        arrays = [self._array(x) if type(x) is Value else x for x in step.inputs]
        primitive = step.primitive
        if isinstance(primitive, Update):
            primitive.compute([*(v._array for v in step.writes), *arrays], step.params)
        else:
            found = primitive.compute(arrays, step.params, self._out(step))
            outputs = found if isinstance(primitive, MultiPrimitive) else (found,)
            self._arrays.update(zip(step.outputs, outputs, strict=True))
            arrays.extend(outputs)
        if any(type(a) is np.ndarray or isinstance(a, np.generic) for a in arrays):
            self.on_host = self.on_host or step
        for x in self._schedule.drops[position]:
            self._arrays.pop(x, None)

    def _array(self, x: Value) -> Array:
        found = self._arrays.get(x)
        if found is not None:
            return found
        if x.kind == "input":
            return self._inputs[x.source]
        return x.source._array

    def _out(self, step: Step) -> list[Array | None] | None:
        out = [self._destinations.get(y) for y in step.outputs]
        return None if all(array is None for array in out) else out

    def _keep(self, x: Value, writes: Sequence[Variable]) -> None:
        """Move a value out of the memory that is written next, unless it is what is written."""
        array = self._array(x)
        if array is self._destinations.get(x):
            return
        if any(_overlap(array, v._array) for v in writes):
            self._arrays[x] = array.copy()


def _move_constants(program: Program, xp: Module) -> None:
    """Bring the constants that rewrites have made of NumPy's arrays to where the program runs.

    A program that goes to the host and back itself has constants on both sides: it keeps them.
    """
    if any(step.name == "transfer" for step in program.steps):
        return
    moved: dict[Value, Value] = {}  # patterns share theirs between programs

    def here(x: Any) -> Any:
        if type(x) is not Value or x.kind != "constant" or type(x.source._array) is xp.ndarray:
            return x
        if x not in moved:
            moved[x] = Value("constant", x.shape, x.dtype, wrap(xp.asarray(x.source._array)))
        return moved[x]

    for step in program.steps:
        step.inputs = tuple(map(here, step.inputs))
    program.outputs = list(map(here, program.outputs))


def _overlap(a: Array, b: Array) -> bool:
    if owner_of(a) is not owner_of(b):
        return False
    (low, high), (first, end) = byte_bounds(a), byte_bounds(b)
    return low < end and first < high


def _is_shared(array: Array, inputs: Sequence[Array]) -> bool:
    return array.base is not None or any(array is x for x in inputs)


def _listing(program: Program, schedule: Schedule) -> str:
    """Return the steps for people to read; those of the second branch are marked by a bar."""
    names: dict[Value, str] = {x: f"x{x.source}" for x in program.inputs}

    def name(x: Any) -> str:
        if type(x) is not Value:
            return repr(x)
        if x.kind == "read":
            return f"{x.source.name!r}"
        return names.get(x, "constant" if x.kind == "constant" else "?")

    lines = []
    for launch in schedule.launches:
        step = launch.step
        for y in step.outputs:
            names[y] = f"t{len(names) - len(program.inputs)}"
        results = ", ".join(names[y] for y in step.outputs)
        written = [repr(v.name) for v in step.writes]
        call = f"{step.name}({', '.join([*written, *map(name, step.inputs)])})"
        shapes = ", ".join(f"{y.dtype}{list(y.shape)}" for y in step.outputs)
        bar = "|" if launch.branch == SECOND else " "
        lines.append(f"  {bar} {results} = {call}  {shapes}" if results else f"  {bar} {call}")
    results = ", ".join(name(x) for x in program.outputs)
    return "\n".join([*lines, f"    return {results}", ""])
