"""Schedule: a program's steps for a device, on two branches, and who waits for whom.

A gradient of weights is needed by the update alone, while the next layer's gradient waits for the
input gradient beside it. So products whose result no other product needs go to a second branch,
which the device may run at the same time. The branch begins each of its steps when all that the
main one was given before is done, and the main one waits for the branch before it uses what was
computed there. What lies in memory that a branch reads or writes is held until then: given back
earlier, it would be written again while the branch still runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tapegrad._function.program import Program, Step, Value, users_of
from tapegrad._function.rewrites import ends

# The primitives that are a matrix product in the main: only these are worth a branch.
PRODUCTS = frozenset(
    (
        *("matmul", "matmul_nt", "matmul_tn", "einsum", "linear", "linear_relu"),
        *("linear_relu_with_mask", "matmul_linear_relu_grad", "matmul_with_sums"),
    )
)

MAIN, SECOND = 0, 1
START = -1  # the position before the first launch

# How many steps of the second branch may be unfinished while the main one goes on. Each holds its
# inputs: without a bound, a deep network would hold the gradients of all its activations.
_UNFINISHED = 2


class Launch(NamedTuple):
    """One step in its place.

    branch  MAIN or SECOND.
    after   the position of a launch of the other branch that must be done first; START for the
            beginning, None for nothing.
    """

    step: Step
    branch: int
    after: int | None


class Schedule:
    """The order of a program's launches.

    launches  all of them.
    late      the position of the first that depends on a write, or writes.
    awaited   the positions that another launch waits for.
    end       the position of a launch that must be done before the results are read, or None.
    drops     for each launch, the values that nobody needs any more once it was given.
    keeps     for each launch that writes Variables, the values from before that are needed by it
              or after it: those that lie in what it writes must be moved first.
    """

    def __init__(self, program: Program, first_write: int) -> None:
        early, late = program.steps[:first_write], program.steps[first_write:]
        second = _on_second_branch(early)
        delayed = _depending(early, second)
        order = [step for step in early if step not in delayed]
        self.gathering = len(order)  # from here on the second branch is waited for as a whole
        order += [step for step in early if step in delayed]
        self.late = len(order)
        order += late
        self._place(order, second)
        until = self._last_needed(program)
        self.drops: list[list[Value]] = [[] for _ in order]
        for x, position in until.items():
            if position < len(order):
                self.drops[position].append(x)
        self.keeps = self._needed_across_writes(until)

    @property
    def on_second_branch(self) -> int:
        """How many steps the second branch has."""
        return sum(launch.branch == SECOND for launch in self.launches)

    def _place(self, order: Sequence[Step], second: set[Step]) -> None:
        self.launches: list[Launch] = []
        unfinished: list[int] = []
        main = START  # the main branch's last launch
        known: int | None = None  # the one that the second branch has waited for
        for position, step in enumerate(order):
            after: int | None = None
            if step in second:
                if known != main:
                    after = known = main
                unfinished.append(position)
                self.launches.append(Launch(step, SECOND, after))
                continue
            bound = 0 if position >= self.gathering else _UNFINISHED
            if len(unfinished) > bound:
                after = unfinished[-bound - 1]
                unfinished = unfinished[len(unfinished) - bound :]
            main = position
            self.launches.append(Launch(step, MAIN, after))
        self.end = unfinished[-1] if unfinished else None
        self.awaited = {x.after for x in self.launches if x.after is not None}
        if self.end is not None:
            self.awaited.add(self.end)

    def _last_needed(self, program: Program) -> dict[Value, int]:
        """Return for each value after which launch it can be forgotten."""
        end = len(self.launches)
        until = dict.fromkeys((x for x in program.output_values()), end)
        for position, launch in enumerate(self.launches):
            done = position if launch.branch == MAIN else self._known_done(position)
            for x in (*launch.step.values(), *launch.step.outputs):
                until[x] = max(done, until.get(x, done))
        return {x: at for x, at in until.items() if x.kind in ("result", "read")}

    def _needed_across_writes(self, until: dict[Value, int]) -> dict[int, list[Value]]:
        made: list[Value] = []
        found: dict[int, list[Value]] = {}
        for position, launch in enumerate(self.launches):
            step = launch.step
            if step.writes:
                found[position] = [x for x in made if until[x] >= position] + [
                    x
                    for x, last in until.items()
                    if x.kind == "read" and last >= position and ends(step, x)
                ]
            made += step.outputs
        return found

    def _known_done(self, position: int) -> int:
        """Return at which main launch a launch of the second branch is known to be done."""
        for later in range(position + 1, len(self.launches)):
            launch = self.launches[later]
            if launch.branch == MAIN and launch.after is not None and launch.after >= position:
                return later
        return len(self.launches)


def _on_second_branch(steps: Sequence[Step]) -> set[Step]:
    """Return the products that no other product waits for, and that have one to run beside."""
    users = users_of(steps)
    leads: set[Step] = set()  # to a product
    found: set[Step] = set()
    beside = False  # whether the main branch has a product after this step
    for step in reversed(steps):
        later = [user for y in step.outputs for user in users.get(y, ())]
        if any(user.name in PRODUCTS or user in leads for user in later):
            leads.add(step)
        if step.name in PRODUCTS:
            if step not in leads and beside:
                found.add(step)
            else:
                beside = True
    return found


def _depending(steps: Sequence[Step], on: set[Step]) -> set[Step]:
    """Return the steps that need a result of some others, directly or not."""
    values = {y for step in on for y in step.outputs}
    found: set[Step] = set()
    for step in steps:
        if step not in on and any(x in values for x in step.values()):
            found.add(step)
            values.update(step.outputs)
    return found
