"""The order of a program's launches on two branches, looked over by rules of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function import schedule as schedule_module
from tapegrad._function.program import Program, Value
from tapegrad._function.schedule import MAIN, PRODUCTS, SECOND, START, Schedule
from tests.function.programs import Training


def planned(function: Callable[..., Any], *args: Any) -> tuple[Program, Schedule]:
    f = tg.function(function)
    for _ in range(3):
        f(*args)
    replay = f.programs[-1]
    return replay._program, Schedule(replay._program, replay._first_write)


def done_before(schedule: Schedule) -> list[set[int]]:
    """Return for each launch which others are done when it begins; for the end too."""
    known: list[set[int]] = []
    latest: dict[int, set[int]] = {MAIN: set(), SECOND: set()}
    for position, launch in enumerate(schedule.launches):
        before = set(latest[launch.branch])
        if launch.after is not None and launch.after != START:
            assert launch.after < position
            assert schedule.launches[launch.after].branch != launch.branch
            before |= known[launch.after] | {launch.after}
        known.append(before)
        latest[launch.branch] = before | {position}
    end = set(latest[MAIN])
    if schedule.end is not None:
        end |= known[schedule.end] | {schedule.end}
    return [*known, end]


def look_over(program: Program, schedule: Schedule) -> None:
    launches = schedule.launches
    assert sorted(id(x.step) for x in launches) == sorted(map(id, program.steps))
    known = done_before(schedule)
    everything = set(range(len(launches)))
    assert known[-1] == everything
    assert schedule.awaited >= {x.after for x in launches if x.after is not None}
    made: dict[Value, int] = {}
    users: dict[Value, list[int]] = {}
    for position, launch in enumerate(launches):
        for x in launch.step.values():
            users.setdefault(x, []).append(position)
            if x.kind == "result":
                assert made[x] in known[position], "used before it is computed"
        for y in launch.step.outputs:
            made[y] = position
        if launch.step.writes:
            assert position >= schedule.late
            second = {i for i in range(position) if launches[i].branch == SECOND}
            assert second <= known[position], "written while the second branch reads"
    kept = set(program.output_values())
    dropped: dict[Value, int] = {}
    for position, values in enumerate(schedule.drops):
        for x in values:
            assert x not in dropped
            assert x not in kept
            dropped[x] = position
    for x, position in made.items():
        if x in kept or x not in dropped:
            last = [*users.get(x, []), position]
            assert x in kept or any(launches[i].branch == SECOND for i in last)
            continue
        touching = {position, *users.get(x, [])}
        for later in range(dropped[x] + 1, len(launches)):
            # Its memory may be taken for what this launch computes.
            if launches[later].branch == launches[position].branch:
                assert touching <= known[later], f"{x} is overwritten while it is read"


def mlp(layers: int, tail: Callable[..., Any] | None = None) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    w = [tg.Variable(rng.normal(size=(4, 4)).astype("f4"), name=f"w{i}") for i in range(layers)]
    optimizer = tg.optimizers.Adam(0.01)

    def step(x: Any) -> Any:
        with tg.GradientTape() as tape:
            y = x
            for v in w:
                y = tg.tanh(y @ v)
            loss = tg.sum(y * y)
        gradients = tape.gradient(loss, w)
        if tail is not None:
            gradients = tail(gradients)
        optimizer.apply_gradients(zip(gradients, w, strict=True))
        return loss

    return step, tg.constant(rng.normal(size=(4, 4)).astype("f4"))


def clipped(gradients: list[Any]) -> list[Any]:
    norm = tg.sqrt(sum(tg.sum(g * g) for g in gradients))
    return [g / tg.maximum(norm, 1.0) for g in gradients]


@pytest.mark.parametrize("tail", [None, clipped])
@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_gradients_of_weights_go_to_the_second_branch(layers: int, tail: Any) -> None:
    program, schedule = planned(*mlp(layers, tail))
    look_over(program, schedule)
    products = [x for x in schedule.launches if x.step.name in PRODUCTS]
    assert len(products) == 3 * layers - 1  # forward, and two backward but for the first layer
    second = [x for x in products if x.branch == SECOND]
    # Of each layer but the first, beside whose gradient nothing is left to do.
    assert len(second) == schedule.on_second_branch == layers - 1
    assert products[-1].branch == MAIN
    for launch in second:
        others = program.steps[: schedule.late]
        users = [s for s in others if any(y in s.values() for y in launch.step.outputs)]
        assert bool(users) == (tail is not None)
        assert all(s.name not in PRODUCTS for s in users)
    joined = [x for x in schedule.launches if x.branch == MAIN and x.after is not None]
    assert len(joined) == (0 if layers == 1 else max(1, layers - 1 - 2) + (layers > 3))


def test_what_the_second_branch_leaves_unfinished_is_bounded() -> None:
    _, schedule = planned(*mlp(12))
    known = done_before(schedule)
    second = [i for i, x in enumerate(schedule.launches) if x.branch == SECOND]
    for position, launch in enumerate(schedule.launches):
        if launch.branch == MAIN:
            open_ = [i for i in second if i < position and i not in known[position]]
            assert len(open_) <= schedule_module._UNFINISHED
    assert len(second) == 11


def test_nothing_to_run_beside() -> None:
    a, b = tg.ones((3, 3)), tg.ones((3, 3))
    for function in (
        lambda x: x * 2.0,
        lambda x: x @ a,
        lambda x: (x @ a) @ b,
        lambda x: tg.sum(x @ a) + 1.0,
    ):
        program, schedule = planned(function, tg.ones((3, 3)))
        look_over(program, schedule)
        assert schedule.on_second_branch == 0
        assert schedule.awaited == set()
        assert schedule.end is None


def test_products_beside_each_other_that_are_given_out() -> None:
    a = tg.Variable(np.eye(3, dtype="f4"))
    program, schedule = planned(lambda x: (x @ a, (x + 1.0) @ a), tg.ones((3, 3)))
    look_over(program, schedule)
    assert [x.branch for x in schedule.launches] == [SECOND, MAIN, MAIN]
    assert [x.after for x in schedule.launches] == [START, None, None]
    assert schedule.end == 0


def test_values_that_a_write_would_change_are_named() -> None:
    v, w = tg.Variable([1.0, 2.0]), tg.Variable([3.0, 4.0])

    def step(x: Any) -> Any:
        old, twice = v.value(), v * 2.0
        v.assign(x)
        w.assign_add(v)
        return old, twice, v

    program, schedule = planned(step, tg.ones(2))
    old, twice, new = program.outputs
    first, second = schedule.keeps.items()
    assert set(first[1]) == {old, twice}
    assert new not in first[1]
    assert new not in second[1]  # w is another variable
    assert schedule.launches[first[0]].step.writes == (v,)


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed: int) -> None:
    training = Training(seed)
    tg.random.seed(0)
    batches = list(training.batches(3))
    f = tg.function(training.step)
    with np.errstate(all="ignore"):
        for x, t in batches:
            f(x, t)
    (replay,) = f.programs
    look_over(replay._program, Schedule(replay._program, replay._first_write))
