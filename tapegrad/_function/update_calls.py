"""How writes to Variables become calls of NumPy: an optimiser's numbers first, then its rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tapegrad._backend import Array, byte_bounds
from tapegrad._blocks import BLOCK
from tapegrad._flat_update import FlatUpdate, computed_in, spares
from tapegrad._function.lowering import Lowering, Place, lowers, static, static_number
from tapegrad._function.program import Step, Value
from tapegrad._host_memory import aligned, following, spanning

# The ufunc; on NumPy scalars the operator takes a tenth of what it takes.
_ASSIGNS = {"assign_add": ("add", "+"), "assign_sub": ("subtract", "-")}


@lowers("assign", "assign_add", "assign_sub")
def _assign(b: Lowering, step: Step) -> bool:
    if step.params.get("index", ...) is not ...:
        return False
    (variable,) = step.writes
    target = static(variable._array)
    value = b.of(step.inputs[0])
    if step.name == "assign":
        b.line("{}[...] = {}", target, value)
    else:
        ufunc, operator = _ASSIGNS[step.name]
        if type(step.inputs[0]) is not Value and variable.dtype.kind in "fiu":
            value = static_number(value, variable.dtype)
        same = getattr(value, "dtype", None) == variable.dtype
        if same and not variable.shape and not value.shape:
            if value.kind == "static":
                value = value.array[()]
            b.line(f"{{}}[()] = {{}}[()] {operator} {{}}", target, target, value)
            return True
        casting = "" if same else ", casting='same_kind'"
        b.line(f"{ufunc}({{}}, {{}}, {{}}{casting})", target, value, target)
    return True


@lowers("gather_gradients")
def _gather(b: Lowering, step: Step) -> bool:
    flat = step.writes[0]._array
    for x, start in zip(step.inputs, step.params["places"], strict=True):
        place = b.of(x)
        part = flat[start : start + x.size].reshape(x.shape)
        there = b.destinations.get(x)
        if there is not None and place is there and there.array.ctypes.data == part.ctypes.data:
            continue  # it was computed there
        b.line("{}[...] = {}", static(part), place)
    return True


@lowers(FlatUpdate)
def _flat_update(b: Lowering, step: Step) -> bool:
    update = step.primitive
    assert isinstance(update, FlatUpdate)
    g, *settings = step.inputs
    if len(settings) > update.settings:  # the gradient has a factor
        return False
    dtype = step.writes[0].dtype
    places = [*(static(v._array) for v in step.writes), b.of(g)]
    if places[-1].kind != "static":
        return False
    arrays = [place.bind() for place in places]
    wide = computed_in(dtype)
    units, params = update.split(step.params)
    hyperparameters = [b.memory_of(x) for x in settings]
    count = hyperparameters.pop(0) if update.counts else None
    numbers = _Numbers(update, units, wide, *_known(hyperparameters, count))
    row = _in_a_row(b, hyperparameters)
    b.line("if {}.tobytes() != {}.settings: {}.renew({}, {})", row, numbers, numbers, row, count)
    if count is not None:
        left = ", ".join(["{}[()]"] * len(numbers.changing))
        b.line(left + " = {}.at({}.item())", *map(static, numbers.changing), numbers, count)
    if g.size > BLOCK or dtype != wide:
        scratch = spares(np, g.size, wide, beside_products=b.multiplies)
        rule = functools.partial(update.update_blocks, np, arrays, scratch, numbers.all, **params)
        b.bound(_named(step.name, rule))
        return True
    spare = following(arrays[-1])
    if spare is None:
        spare = aligned(g.size, wide, 0)
    rule = functools.partial(update.rule, np, *arrays, spare, *numbers.all, **params)
    calls = _calls_of(update.rule, [*arrays, spare], numbers.all, params)
    if calls is None:
        b.bound(_named(step.name, rule))
        return True
    calls = _joined(calls, numbers)
    texts = [f"{call.ufunc}({', '.join(['{}'] * len(call.operands))})" for call in calls]
    b.line(
        "if {}.unlike: {}()\nelse:\n    " + "\n    ".join(texts),
        numbers,
        _named(step.name, rule),
        *[static(array) for call in calls for array in call.operands],
    )
    return True


def _known(hyperparameters: list[Any], count: Any) -> tuple[list[float], int]:
    """Return the hyper-parameters and the step count as they may be when the program runs."""
    places = [*hyperparameters, *([] if count is None else [count])]
    if any(place.kind != "static" for place in places):
        return [0.5] * len(hyperparameters), 1
    now = [place.array.item() for place in hyperparameters]
    return now, 1 if count is None else max(1, count.array.item())  # a step that was taken


def _in_a_row(b: Lowering, numbers: list[Any]) -> Place:
    """Return numbers as one array: that in which they lie, if they lie in a row."""
    arrays = [place.array for place in numbers if place.kind == "static"]
    if len(arrays) == len(numbers):
        base = arrays[0].base if arrays[0].base is not None else arrays[0]
        begins = [byte_bounds(array)[0] for array in arrays]
        first = (begins[0] - byte_bounds(base)[0]) // base.itemsize
        if base.ndim == 1 and begins == [begins[0] + i * base.itemsize for i in range(len(begins))]:
            return static(base[first : first + len(arrays)])
    row = b.local((len(numbers),), np.float64)
    b.line(f"{{}} = np.array([{', '.join(['{}'] * len(numbers))}])", row, *numbers)
    return row


class _Numbers:
    """The numbers of an update, as 0-d arrays; made anew where the hyper-parameters change.

    all       the arrays, `changing` those of them that the step count decides too.
    at        gives the numbers of these for a step count.
    settings  the bytes of the hyper-parameters that they were made from.
    unlike    whether another number is 0 or 1 than at first: the rule may make other calls then.
    """

    __name__ = "numbers"

    def __init__(
        self,
        update: FlatUpdate,
        units: dict[str, float],
        dtype: np.dtype[Any],
        settings: list[float],
        step: int,
    ) -> None:
        self._update, self._units = update, units
        constant, changing = self._of(settings, step)
        self._constant = [np.array(number, dtype) for number in constant]
        self.changing = [np.array(number, dtype) for number in changing]
        self.all = [*self._constant, *self.changing]
        self._special = [_special(array) for array in self.all]
        self._spread: list[tuple[Array, Array]] = []  # of a number, and where it stands often
        self.unlike = False
        self.settings = b""

    def _of(self, settings: list[float], step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        constant, self.at = self._update.split_numbers(settings, self._units)
        return constant, () if self.at is None else self.at(step)

    def spread(self, first: Array, second: Array, size: int) -> Array | None:
        """Return two of the numbers, each `size` times: for those that hardly ever change."""
        if not all(any(x is number for number in self._constant) for x in (first, second)):
            return None
        both = aligned((2, size), first.dtype, 0)
        self._spread += [(first, both[0]), (second, both[1])]
        for number, part in self._spread:
            part[...] = number
        return both.reshape(-1)

    def renew(self, settings: Array, count: Any) -> None:
        """Set the numbers that these hyper-parameters and this step count give."""
        constant, changing = self._of(settings.tolist(), 1 if count is None else count.item())
        for array, number in zip(self.all, (*constant, *changing), strict=True):
            array[()] = number
        for array, part in self._spread:
            part[...] = array
        self.unlike = [_special(array) for array in self.all] != self._special
        self.settings = settings.tobytes()


def _special(array: Array) -> Any:
    """Return a number if it is 0 or 1 in its own type, else None."""
    value = array.item()
    return value if value == 0 or value == 1 else None


class _Call(NamedTuple):
    """A call of a ufunc; the last operand is written."""

    ufunc: str
    operands: list[Array]


def _calls_of(
    rule: Callable[..., None],
    arrays: list[Array],
    numbers: list[Array],
    params: dict[str, Any],
) -> list[_Call] | None:
    """Return the calls of ufuncs that a rule makes for numbers like these, if it makes no others.

    Written out they take 0.7 us less than the rule's own Python.
    """
    told: list[_Call] = []
    try:
        rule(np, *[_Told(array, told) for array in arrays], *numbers, **params)
    except _NoUfunc:
        return None
    return told


class _NoUfunc(Exception):
    """A rule does something with its arrays beside giving them to ufuncs."""


class _Told:
    """Stands for an array, and notes the ufuncs that it is given to."""

    def __init__(self, array: Array, told: list[_Call]) -> None:
        self._shown, self._notes = array, told

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Any, ...] = (), **options: Any
    ) -> Any:
        if method != "__call__" or options or len(out) != 1:
            raise _NoUfunc
        operands = [x._shown if type(x) is _Told else x for x in (*inputs, *out)]
        self._notes.append(_Call(ufunc.__name__, operands))
        return out[0]

    def __getattr__(self, name: str) -> Any:
        raise _NoUfunc


def _joined(calls: list[_Call], numbers: _Numbers) -> list[_Call]:
    """Let two calls of one function on arrays that lie side by side be one: 0.2 us less.

    Adam's averages of g and g**2 are: their factors, and what is added to them.
    """
    calls = list(calls)
    for second in range(len(calls)):
        for first in range(second):
            at = _together(calls, first, second)
            both = None if at is None else _over_both(calls[first], calls[second], numbers)
            if at is not None and both is not None:
                calls[at] = both
                del calls[first + second - at]
                return _joined(calls, numbers)
    return calls


def _together(calls: list[_Call], first: int, second: int) -> int | None:
    """Return where of their two places two calls can be made together, if it changes nothing."""
    between = calls[first + 1 : second]
    if not _disjoint(calls[first], calls[second]):
        return None
    if all(_disjoint(call, calls[second]) for call in between):
        return first
    return second if all(_disjoint(call, calls[first]) for call in between) else None


def _disjoint(a: _Call, b: _Call) -> bool:
    """Tell whether neither of two calls writes what the other one reads or writes."""
    return not any(
        np.may_share_memory(x.operands[-1], operand)
        for x, y in ((a, b), (b, a))
        for operand in y.operands
    )


def _over_both(first: _Call, second: _Call, numbers: _Numbers) -> _Call | None:
    if first.ufunc != second.ufunc or len(first.operands) != len(second.operands):
        return None
    operands = []
    for x, y in zip(first.operands, second.operands, strict=True):
        both = spanning(x, y) if x.ndim else numbers.spread(x, y, first.operands[-1].size)
        if both is None:
            return None
        operands.append(both)
    return _Call(first.ufunc, operands)


def _named(name: str, function: Any) -> Any:
    function.__name__ = name
    return function
