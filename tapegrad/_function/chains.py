"""Chains: elementwise steps of a program on a GPU, gathered into one kernel each.

Ten operations read and write memory ten times and launch ten kernels; the kernel of their chain
reads what comes from outside, writes what goes there, and sums rows (a bias's gradient) on the way.
What an earlier chain has computed is computed again rather than stored for a later one: arithmetic
costs nothing beside memory. On a CPU the blocks of blocks.py do the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._function.program import Program, Step, Value, users_of
from tapegrad._function.rewrites import Rewrite
from tapegrad.kernels import chains as kernels
from tapegrad.kernels.chains import OPERATIONS, Chain, Input
from tapegrad.primitive import MultiPrimitive, Update
from tapegrad.tensor import wrap

_TYPE_NAMES = {
    "float32": "float",
    "float64": "double",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
}
_MOST_STEPS = 48  # of a group: far more would not fit into a thread's registers
_MOST_AGAIN = 16  # operations that are computed again rather than stored

_Kind = tuple[Any, tuple[int, ...]]  # a group's floating type and shape


class _Group:
    """Steps that one kernel takes over; it runs where the last of them ran."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        self.dtype, self.shape = kind
        self.steps: list[Step] = []
        self.sums: list[Step] = []
        self.open = True  # until something else needs what it makes

    def members(self) -> list[Step]:
        """Return all its steps."""
        return [*self.steps, *self.sums]

    def last(self) -> Step:
        """Return the step at whose place it runs: all it reads is there, nothing waits yet."""
        return max(self.members(), key=lambda step: step.order)


def _gather_chains(program: Program) -> None:
    """Replace the chains of elementwise steps of a program on a GPU by one step each."""
    if program.on_host:
        return
    _shrink_constants(program)
    groups = _groups(program)
    group_of = {step: group for group in groups for step in group.members()}
    again = _computed_again(program, group_of)
    steps: list[Step] = []
    for step in program.steps:
        group = group_of.get(step)
        if group is None:
            steps.append(step)
        elif step is group.last():
            made = _Writer(group, again).step()
            if made is not None:
                steps.append(made)
    program.steps = steps


def _shrink_constants(program: Program) -> None:
    """Let constants that hold one number everywhere be that number: a kernel reads it once.

    The gradient of a mean is such a constant, one number for each row.
    """
    known: dict[Value, Value] = {}

    def shrunk(x: Any) -> Any:
        if type(x) is not Value or x.kind != "constant" or x.size < 2:
            return x
        if x not in known:
            number = x.number()
            known[x] = x if number is None else Value("constant", (), x.dtype, wrap(number.copy()))
        return known[x]

    for step in program.steps:
        if step.name not in OPERATIONS or isinstance(step.primitive, Update):
            continue
        shape = step.outputs[0].shape
        if any(x.kind != "constant" and x.shape == shape for x in step.values()):
            step.inputs = tuple(map(shrunk, step.inputs))


def _groups(program: Program) -> list[_Group]:
    """Return the groups: connected, and free of what runs between their steps."""
    users = users_of(program.steps)
    outputs = set(program.output_values())
    groups: list[_Group] = []
    home: dict[Value, _Group] = {}
    for step in program.steps:
        kind = _kind(step)
        if step.name == "broadcast_to":  # a view, unless it is only a step on the way
            (y,) = step.outputs
            if y in outputs or any(_kind(user) != kind for user in users.get(y, ())):
                kind = None
        near = [home[x] for x in step.values() if x in home and home[x].open]
        own: _Group | None = None
        if kind is not None:
            own = _Group(kind)
            groups.append(own)
            for group in dict.fromkeys(near):
                if group.kind == kind and len(own.steps) + len(group.steps) < _MOST_STEPS:
                    own.steps += group.steps
                    own.sums += group.sums
                    home.update((y, own) for s in group.members() for y in s.outputs)
                    groups.remove(group)
            own.steps.append(step)
        elif near and _sums_rows(step, near[0]):
            own = near[0]
            own.sums.append(step)
        for group in near:  # those that did not join must have run by now
            group.open = group is own
        if own is not None:
            home.update((y, own) for y in step.outputs)
    return groups


def _kind(step: Step) -> _Kind | None:
    """Return the floating type and the shape of a step that a chain can hold, else None."""
    if isinstance(step.primitive, Update) or step.name not in OPERATIONS:
        return None
    signature = OPERATIONS[step.name][0]
    kinds, result = signature[:-1], signature[-1]
    (y,) = step.outputs
    if not y.shape or not y.size or len(step.inputs) != len(kinds) or _letter(y) != result:
        return None
    floats = {y.dtype} if result == "f" else set()
    for x, kind in zip(step.inputs, kinds, strict=True):
        if type(x) is not Value:
            if kind != "f" or not kernels.is_literal(x):
                return None
        elif _letter(x) != kind or _place(x, y.shape) is None:
            return None
        elif kind == "f":
            floats.add(x.dtype)
    return (floats.pop(), y.shape) if len(floats) == 1 else None


def _letter(x: Value) -> str | None:
    """Return the kind of a value's elements, as OPERATIONS names it."""
    return "b" if x.dtype == np.bool_ else "f" if x.dtype.name in _TYPE_NAMES else None


def _place(x: Value, shape: tuple[int, ...]) -> str | None:
    """Return what kind of Input a value is to a chain of this shape, if it can be one."""
    if x.shape == shape:
        return "each"
    if x.size == 1:
        return "one"
    return "row" if x.shape == shape[-1:] else None


def _sums_rows(step: Step, group: _Group) -> bool:
    """Tell whether a step sums what the group makes over all axes but the last."""
    if step.name != "sum_to" or len(group.shape) < 2:
        return False
    (x,) = step.values()
    return (x.dtype, x.shape) == group.kind and step.params["shape"] == x.shape[-1:]


def _computed_again(program: Program, group_of: dict[Step, _Group]) -> dict[Value, Step]:
    """Return the values that no chain writes to memory, with the steps that compute them."""
    made_in = {y: group for step, group in group_of.items() for y in step.outputs}
    stored = set(program.output_values())
    crossing: set[Value] = set()
    for step in program.steps:
        group = group_of.get(step)
        for x in step.values():
            home = made_in.get(x)
            if group is None or (home is not None and home.kind != group.kind):
                stored.add(x)
            elif home is not group:
                crossing.add(x)
    again: dict[Value, Step] = {}
    cost: dict[Value, int] = {}
    for step in program.steps:
        group = group_of.get(step)
        if group is None or step in group.sums:
            continue
        (y,) = step.outputs
        cost[y] = min(1 + sum(cost[x] for x in step.values() if x in again), _MOST_AGAIN + 1)
        if y not in stored and not (y in crossing and cost[y] > _MOST_AGAIN):
            again[y] = step
    return again


class _Writer:
    """Writes a group as a Chain."""

    def __init__(self, group: _Group, again: dict[Value, Step]) -> None:
        self._group = group
        self._made_here = {y: step for step in group.steps for y in step.outputs}
        self._again = again
        self._inputs: dict[Value, None] = {}
        self._order: dict[Step, None] = {}

    def step(self) -> Step | None:
        """Return the step that does what the group does; None if all of it is done elsewhere."""
        group = self._group
        outputs = [y for y in self._made_here if y not in self._again]
        if not outputs and not group.sums:
            return None
        summed = [x for step in group.sums for x in step.values()]
        for y in (*outputs, *summed):
            self._visit(y)
        if len(self._order) + len(group.sums) == 1:
            return group.last()
        inputs, order = list(self._inputs), list(self._order)
        number = {x: i for i, x in enumerate((*inputs, *(y for s in order for y in s.outputs)))}
        chain = Chain(
            _TYPE_NAMES[group.dtype.name],
            tuple(Input(_place(x, group.shape) or "", x.dtype == np.bool_) for x in inputs),
            tuple(
                kernels.Step(
                    s.name, tuple(number[x] if type(x) is Value else float(x) for x in s.inputs)
                )
                for s in order
            ),
            tuple(number[y] for y in outputs),
            tuple(number[x] for x in summed),
        )
        results = [*outputs, *(y for step in group.sums for y in step.outputs)]
        primitive = _primitive(chain, group.shape, inputs, [*order, *group.sums], results)
        return group.last().instead(primitive, inputs, results)

    def _visit(self, y: Value) -> None:
        """Put the steps that compute a value in order, and note what they read from outside."""
        step = self._made_here.get(y) or self._again.get(y)
        if step is None:
            self._inputs.setdefault(y)
        elif step not in self._order:
            for x in step.values():
                self._visit(x)
            self._order.setdefault(step)


def _primitive(
    chain: Chain,
    shape: tuple[int, ...],
    inputs: Sequence[Value],
    steps: Sequence[Step],
    results: Sequence[Value],
) -> MultiPrimitive:
    """Return the primitive of a chain, whose meaning is its steps one by one."""

    def meaning(xp: Module, *arrays: Array) -> tuple[Array, ...]:
        known = dict(zip(inputs, arrays, strict=True))
        for step in steps:
            given = [known[x] if type(x) is Value else x for x in step.inputs]
            known[step.outputs[0]] = step.primitive.compute(given, step.params)
        return tuple([known[y] for y in results])

    kernel = functools.partial(kernels.run, chain, shape)
    return MultiPrimitive("chain", meaning, kernel=kernel, fills=True)


REWRITES = {
    "chains": Rewrite(_gather_chains, "on a GPU the roundings to 16 bits between two operations")
}
