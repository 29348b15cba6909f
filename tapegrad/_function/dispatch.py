"""Function: what `tg.function` makes; when a call is recorded, and when it is replayed."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, overload

import numpy as np

from tapegrad import _backend
from tapegrad._function.device import DeviceReplay
from tapegrad._function.matching import Matcher, is_taken_as_it_is, matcher
from tapegrad._function.program import Program, difference
from tapegrad._function.recording import Recording
from tapegrad._function.replay import Replay
from tapegrad._function.simplify import simplify
from tapegrad._recording import alone, state
from tapegrad._structure import children_of, flatten, is_container, unflatten
from tapegrad.errors import FunctionError, TapeWarning
from tapegrad.tensor import Tensor, wrap
from tapegrad.variable import Variable

_NUMBERS = (int, float, bool, str, bytes, type(None))
_MOST_PROGRAMS = 32
_MANY_PROGRAMS = 8  # from here on a warning names what keeps changing
_MOST_RECORDINGS = 5


class _Entry:
    """What is known of one signature: the last recording, then a program, or why there is none."""

    __slots__ = ("asked", "calls", "held", "match", "problem", "recorded", "replay")

    def __init__(self, held: Any) -> None:
        self.held = held  # keeps objects alive that the signature names by id
        self.calls = 0
        self.recorded: Program | None = None
        self.replay: Replay | None = None
        self.match: Matcher | None = None
        self.asked = False  # whether it was tried to make the match
        self.problem: str | None = None


class Function:
    """A function whose calls are recorded twice, and from then on replayed; see `function`."""

    def __init__(
        self, function: Callable[..., Any], *, strict: bool = True, lease_results: bool = False
    ) -> None:
        if not callable(function):
            raise TypeError(f"tg.function needs a function, got {function!r}")
        functools.update_wrapper(self, function)
        self._function = function
        self._strict = strict
        self._leased = lease_results
        self._name = getattr(function, "__qualname__", type(function).__name__)
        self._entries: dict[Any, _Entry] = {}
        self._lock = threading.RLock()
        self._warned = False
        # By id: objects may be equal, or have no hash.
        self._bound: dict[int, tuple[weakref.ref[Any], Function]] = {}
        self._numbers = _Surroundings(function)
        self._has_numbers = bool(self._numbers)
        # What tells calls like the last one that was replayed, and its program.
        self._last: tuple[Matcher, Replay] | None = None

    def __get__(self, instance: Any, owner: Any = None) -> Function | Method:
        """Return the function of an object's own method: each object has programs of its own."""
        if instance is None:
            return self
        found = self._bound.get(id(instance))
        if found is None or found[0]() is not instance:
            if not _binds(self._function, instance):
                return self
            found = self._bind(instance)
        return Method(instance, found[1])

    def _bind(self, instance: Any) -> tuple[weakref.ref[Any], Function]:
        bound, key = self._bound, id(instance)
        try:
            owner = weakref.ref(instance, lambda _: bound.pop(key, None))
        except TypeError:
            raise TypeError(
                f"{self._name} needs weak references to its {type(instance).__name__}: "
                "add '__weakref__' to the __slots__"
            ) from None
        made = Function(
            _method(self._function, owner), strict=self._strict, lease_results=self._leased
        )
        with self._lock:
            found = bound.get(key)
            if found is None or found[0]() is not instance:
                found = bound[key] = owner, made
        return found

    def __reduce__(self) -> Any:
        if getattr(sys.modules.get(self.__module__), self._name, None) is self:
            return self._name  # as Python's functions are copied and pickled
        remade = functools.partial(Function, strict=self._strict, lease_results=self._leased)
        return remade, (self._function,)

    def __repr__(self) -> str:
        return f"<tg.function {self._name}, {len(self.programs)} programs>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the program of these arguments, or record the call while there is none."""
        if state.recorders:  # a tape listens, or another function's recording: it hears everything
            return self._function(*args, **kwargs)
        last = self._last
        if last is not None and not kwargs:
            found = last[0](args)
            if found is not None:
                return last[1].run(found, args)
        arrays: list[Any] = []
        tensors: list[Any] = []
        key = self._key(args, kwargs, arrays, tensors)
        entry = self._entries.get(key)
        if entry is None and self._numbers.look():
            self._has_numbers, self._last = bool(self._numbers), None
            return self(*args, **kwargs)
        if entry is not None and entry.replay is not None:
            if not kwargs:
                self._last = self._match(entry, args, len(arrays))
            return entry.replay.run(arrays, tensors)
        if entry is not None and entry.problem is not None:
            return self._function(*args, **kwargs)
        # Programs and recordings take turns: they may write the same Variables.
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.replay is None:
                return self._record(key, args, kwargs)
        return self(*args, **kwargs)  # another thread has compiled it meanwhile

    def _key(
        self, args: Any, kwargs: dict[str, Any], arrays: list[Any], tensors: list[Any]
    ) -> tuple[Any, ...]:
        """Return the signature of a call, and collect its tensors and their arrays."""
        # Where new arrays are made comes first.
        key: list[Any] = [np if _backend.numpy_alone else _backend.default_module()]
        if self._has_numbers:
            key.append(self._numbers.now())
        for x in args:
            if type(x) is Tensor:
                array = x._array
                key.append((array.shape, array.dtype, type(array)))
                arrays.append(array)
                tensors.append(x)
            else:
                _signature(x, key, arrays, tensors)
        for name in kwargs:
            key.append(name)
            _signature(kwargs[name], key, arrays, tensors)
        return tuple(key)

    def _match(self, entry: _Entry, args: Any, tensors: int) -> tuple[Matcher, Replay] | None:
        """Return what tells calls like this one, and their program; None where none does."""
        assert entry.replay is not None
        if not entry.asked:
            entry.asked = True
            # What the program hands back as it was given is counted among the tensors alone.
            if len(args) == tensors or entry.replay.hands_back_nothing:
                entry.match = matcher(args, self._numbers.now if self._has_numbers else None)
        return None if entry.match is None else (entry.match, entry.replay)

    def _replay_of(self, args: Any, kwargs: dict[str, Any]) -> Replay | None:
        entry = self._entries.get(self._key(args, kwargs, [], []))
        return None if entry is None else entry.replay

    # ---- recording

    def _record(self, key: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        entry = self._entry(key, (args, kwargs))
        leaves = flatten((args, kwargs))
        inputs = []
        originals: dict[int, Tensor] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = wrap(leaf._array)  # one of its own: f(x, x) has two inputs
                originals[leaves[i].id] = leaf
            elif _is_array(leaf):
                leaves[i] = Tensor(leaf)
            else:
                continue
            inputs.append(leaves[i])
        recording = Recording(self._name, inputs, self._strict, founding=entry.calls == 0)
        args, kwargs = unflatten((args, kwargs), leaves)
        given = _contents((args, kwargs))
        with alone(recording):
            result = self._function(*args, **kwargs)
        if _contents((args, kwargs)) != given:
            recording.refuse(
                f"{self._name} changes a list, dict or object that it was given, which for the "
                "caller neither this call does nor a compiled one: change a copy, and return what "
                "is new"
            )
        entry.calls += 1  # a call that failed is none
        if recording.problem is not None:
            self._stay_eager(entry, recording.problem)
        elif not recording.created_variables:
            self._compare(entry, recording.program(result))
        return unflatten(
            result,
            [
                originals.get(leaf.id, leaf) if isinstance(leaf, Tensor) else leaf
                for leaf in flatten(result)
            ],
        )

    def _entry(self, key: Any, held: Any) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(_without_arrays(held))
            if len(self._entries) > _MANY_PROGRAMS and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._name} was called with {len(self._entries)} signatures, and each "
                    f"is compiled anew: {self._what_changes()}",
                    TapeWarning,
                    stacklevel=4,
                )
            if len(self._entries) > _MOST_PROGRAMS:
                del self._entries[next(iter(self._entries))]
        return entry

    def _what_changes(self) -> str:
        keys = list(self._entries)
        first, last = keys[-2], keys[-1]
        if len(first) != len(last):
            return "the number of arguments changes"
        changed = [f"{a} then {b}" for a, b in zip(first, last, strict=True) if a != b]
        return (
            "what changes is " + "; ".join(changed) + ". Pass a number that changes as "
            "tg.constant(number) or keep it in a tg.Variable, and let batches have one shape"
        )

    def _compare(self, entry: _Entry, program: Program) -> None:
        """Compile the program if it is that of the call before."""
        earlier, entry.recorded = entry.recorded, program
        if earlier is None:
            program.forget_makers()
            return
        found = difference(earlier, program)
        if found is None:
            simplify(program)
            kind = Replay if program.on_host else DeviceReplay
            entry.replay = kind(program, self._name, self._lock, leased=self._leased)
            entry.recorded = None
            return
        program.forget_makers()
        if found.of_constants or entry.calls >= _MOST_RECORDINGS:
            problem = (
                f"{self._name} does not do the same in every call: {found.text}. A value that "
                "changes must be an argument (a tensor) or a tg.Variable; random numbers must come "
                "from tg.random"
            )
            if self._strict:
                raise FunctionError(problem)
            self._stay_eager(entry, problem)

    def _stay_eager(self, entry: _Entry, problem: str) -> None:
        entry.problem = problem
        entry.recorded = None
        warnings.warn(f"{problem}. It is not compiled", TapeWarning, stacklevel=4)

    # ---- looking at it

    @property
    def programs(self) -> list[Replay]:
        """The programs that were compiled, one for each signature."""
        entries = list(self._entries.values())  # another thread may add to them
        return [e.replay for e in entries if e.replay is not None]

    def explain_program(self) -> str:
        """Return the text of the programs: what a call runs, with the memory it uses."""
        return "\n".join(replay.explain() for replay in self.programs)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Run the function eagerly and by replay from the same state, and compare.

        Raises `FunctionError` where results or Variables differ, as they do when the function
        depends on something that is no argument, Variable or number of its own surroundings.
        """
        from tapegrad._function.checking import check

        check(self, args, kwargs)


class Method:
    """A `Function` of one object, which it keeps alive as Python's own methods do."""

    __slots__ = ("__self__", "_bound")

    def __init__(self, instance: Any, bound: Function) -> None:
        self.__self__ = instance
        self._bound = bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function of this object."""
        return self._bound(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bound, name)

    def __reduce__(self) -> Any:
        return getattr, (self.__self__, self.__name__)

    def __repr__(self) -> str:
        return repr(self._bound)


class _Surroundings:
    """The numbers that a function finds around itself: its closure, defaults and globals."""

    def __init__(self, function: Any) -> None:
        self._functions = list(_functions_in(function))
        self._closure = [cell for f in self._functions for cell in f.__closure__ or ()]
        self._all_names = [
            (f.__globals__, n) for f in self._functions for n in sorted(set(_names(f.__code__)))
        ]
        self._cells: list[Any] = []
        self._names: list[tuple[dict[str, Any], str]] = []

    def look(self) -> bool:
        """Look where else numbers stand now; tell whether there are such places.

        A global may be defined after the function is. Places that held a number stay: two keys
        that leave out different ones would be equal where the numbers are.
        """
        before = self._known()
        self._cells = [cell for cell in self._closure if id(cell) in before or _holds_number(cell)]
        self._names = [
            (space, name)
            for space, name in self._all_names
            if (id(space), name) in before or type(space.get(name, ...)) in _NUMBERS
        ]
        return before != self._known()

    def _known(self) -> list[Any]:
        return [*map(id, self._cells), *((id(space), name) for space, name in self._names)]

    def __bool__(self) -> bool:
        return bool(self._cells or self._names or self._defaults())

    def _defaults(self) -> list[Any]:
        found: list[Any] = []
        for f in self._functions:
            found += f.__defaults__ or ()
            found += (f.__kwdefaults__ or {}).values()
        return found

    def now(self) -> tuple[Any, ...]:
        """Return the numbers as they are now, and None in the places of what is none."""
        found: list[Any] = []
        for cell in self._cells:
            try:
                found.append(cell.cell_contents)
            except ValueError:  # deleted
                found.append(...)
        found += [space.get(name, ...) for space, name in self._names]
        found += self._defaults()
        return tuple([_number(x) if type(x) in _NUMBERS else None for x in found])


def _functions_in(x: Any) -> Iterator[Any]:
    """Yield the functions in Python that calling x calls: what it wraps, binds or completes."""
    wrappers: list[Any] = []
    innermost = inspect.unwrap(x, stop=wrappers.append)
    for f in (*wrappers, innermost):
        if isinstance(f, functools.partial):
            yield from _functions_in(f.func)
            continue
        function = getattr(f, "__func__", f)
        if not hasattr(function, "__code__"):
            function = type(f).__call__
        if hasattr(function, "__code__"):
            yield function


def _number(x: Any) -> tuple[Any, ...]:
    """Return what tells a number from all others: 0.0 equals -0.0, and NaN not itself."""
    return type(x), x if x and x == x else repr(x)


def _exactly(x: Any) -> Any:
    """Return what tells a key of a mapping from those that it equals: 1 from 1.0 and True."""
    if type(x) is tuple:
        return tuple(map(_exactly, x))
    return _number(x) if type(x) in _NUMBERS else (type(x), x)


def _holds_number(cell: Any) -> bool:
    try:
        return type(cell.cell_contents) in _NUMBERS
    except ValueError:  # not assigned yet
        return False


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


def _binds(function: Callable[..., Any], instance: Any) -> bool:
    """Tell whether a function that is found in an object's class is given the object."""
    bind = getattr(type(function), "__get__", None)  # a static method's gives the function alone
    if bind is None:
        return False
    return getattr(bind(function, instance, type(instance)), "__self__", None) is instance


def _method(function: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """Return a method of an object that does not keep the object alive."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return function(owner(), *args, **kwargs)

    return method


def _is_array(x: Any) -> bool:
    return isinstance(x, np.generic) or _backend.is_array(x)


def _signature(x: Any, key: list[Any], arrays: list[Any], tensors: list[Any]) -> None:
    """Add to the key what a program depends on, and collect the arrays of the tensors in x."""
    if isinstance(x, Tensor):
        array = x._array
        key.append((array.shape, array.dtype, type(array)))
        arrays.append(array)
        tensors.append(x)
    elif _is_array(x):
        array = x if is_taken_as_it_is(x) else Tensor(x)._array
        key.append((array.shape, array.dtype, type(array)))
        arrays.append(array)
        tensors.append(array)
    elif is_container(x):
        children = children_of(x)
        names = tuple(map(_exactly, x)) if isinstance(x, Mapping) else None
        key.append((type(x), len(children), names))
        for child in children:
            _signature(child, key, arrays, tensors)
    elif isinstance(x, Variable):
        key.append(("variable", x.id))
    elif type(x) in _NUMBERS:
        key.append(_number(x))
    else:
        key.append((type(x), id(x)))


def _contents(arguments: Any) -> tuple[list[Any], list[int]]:
    """Return what a function that changes its arguments makes another."""
    key: list[Any] = []
    tensors: list[Any] = []
    _signature(arguments, key, [], tensors)
    return key, list(map(id, tensors))


def _without_arrays(structure: Any) -> list[Any]:
    return [x for x in flatten(structure) if not isinstance(x, Tensor) and not _is_array(x)]


@overload
def function(
    function: Callable[..., Any], *, strict: bool = True, lease_results: bool = False
) -> Function: ...
@overload
def function(
    *, strict: bool = True, lease_results: bool = False
) -> Callable[[Callable[..., Any]], Function]: ...
def function(function: Any = None, *, strict: bool = True, lease_results: bool = False) -> Any:
    """Compile a function of tensors: record what it does, and from then on replay it.

    The first two calls of each signature run as they are, and are recorded. If both did the same,
    further calls run the recorded operations as straight-line NumPy in memory of their own, without
    tape, rules and Python's bookkeeping; on a GPU they are captured as a CUDA graph, which one
    launch replays (`tg.config.cuda_graphs`). Variables are read and written in place. A whole
    training step belongs inside: forward pass, loss, `tape.gradient`, the optimiser's update,
    metrics.

    strict         whether a function that cannot be compiled raises `FunctionError`; with False it
                   stays as it is, with one warning.
    lease_results  whether results may lie in the program's own memory, which saves making them
                   anew: a replayed call's results and views of them are valid until the next call
                   of that signature, from whatever thread, and reading one later raises
                   `RuntimeError`. They may be arguments of that call. What is to last is copied
                   with `y.numpy()` or `+y`. By default, and always on a GPU, results are the
                   caller's own.

    A signature is the structure of the arguments, shapes and types of the tensors in them, the
    values of numbers and strings, which objects all others are, and the chosen backend: a Python
    number that changes makes a new program. Numbers in the function's own closure, defaults and
    globals count too. All else that it finds outside or in objects (attributes, lists) is taken as
    it was when it was recorded: `check` finds what should not be. A tensor that is passed twice is
    two arguments: the gradient with respect to one leaves the other out.
    What is no operation of tapegrad (printing, appending to a list) happens while recording only.
    On a GPU an index out of range stops no call, unless it is a constant: what is taken is NaN, and
    `IndexError` is raised when values are next looked at, or by a later call of the function. With
    `tg.config.debug = True` the call itself raises, before anything is written.
    A tape that listens around a call hears the operations one by one: then nothing is replayed.

    Raises `FunctionError` where a value that depends on the inputs becomes a Python number
    (`float`, `if`, `.numpy()`) or decides about a shape, where two calls do not do the same, and
    where a list, dict or object that is an argument is changed.

    >>> w = tg.Variable(3.0)
    >>> @tg.function
    ... def step(x):
    ...     with tg.GradientTape() as tape:
    ...         loss = (w * x - 1.0) ** 2
    ...     w.assign_sub(0.1 * tape.gradient(loss, w))
    ...     return loss
    >>> [round(float(step(tg.constant(1.0))), 3) for _ in range(4)]
    [4.0, 2.56, 1.638, 1.049]
    """
    if function is None:
        return functools.partial(Function, strict=strict, lease_results=lease_results)
    return Function(function, strict=strict, lease_results=lease_results)
