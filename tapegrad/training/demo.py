"""Demonstrations of the command line: the lectures' gradient descent, as a table and a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tapegrad.tape import GradientTape
from tapegrad.training.history import new_figure
from tapegrad.variable import Variable


class Step(NamedTuple):
    """One row of the table: the point, the value, the slopes and the steps."""

    k: int
    x: float
    y: float
    z: float
    dz_dx: float
    step_x: float
    dz_dy: float
    step_y: float


def descent(learning_rate: float, steps: int) -> list[Step]:
    """Go down z = x**2 + y**2 from (-75, 75), in float64, and return every step."""
    x, y = Variable(-75.0, dtype=np.float64), Variable(75.0, dtype=np.float64)
    path = []
    for k in range(steps):
        with GradientTape() as tape:
            z = x**2 + y**2
        dz_dx, dz_dy = tape.gradient(z, [x, y])
        step_x, step_y = learning_rate * dz_dx, learning_rate * dz_dy
        path.append(Step(k, *map(float, (x, y, z, dz_dx, step_x, dz_dy, step_y))))
        x.assign_sub(step_x)
        y.assign_sub(step_y)
    return path


def table(path: list[Step]) -> str:
    """Return the steps as the lectures print them, to one decimal."""
    head = ("k", "x", "y", "z", "dz/dx", "lr*dz/dx", "dz/dy", "lr*dz/dy")
    rows = [(str(step.k), *[f"{value:.1f}" for value in step[1:]]) for step in path]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
             for row in (head, *rows)]  # fmt: skip
    return "\n".join(lines)


def draw(path: list[Step], file: str | os.PathLike[str]) -> None:
    """Draw the path over the level lines of z into a picture.

    Raises `ImportError` with the cure where matplotlib is not installed, `ValueError` for a path
    that leaves the numbers.
    """
    if not np.isfinite([step[1:] for step in path]).all():
        raise ValueError("the steps grow past all numbers: take a learning rate below 1")
    figure, (axis,) = new_figure(1, 5.2, 4.6)
    reach = 1.1 * max(max(abs(step.x), abs(step.y)) for step in path)
    ticks = np.linspace(-reach, reach, 200)
    z: Any = ticks**2 + ticks[:, None] ** 2
    levels = axis.contourf(ticks, ticks, z, levels=16, cmap="Blues_r")
    figure.colorbar(levels, label="z = x² + y²")
    xs, ys = [step.x for step in path], [step.y for step in path]
    axis.plot(xs, ys, "-", color="#c44e52", linewidth=1.5)
    axis.plot(xs, ys, "o", color="#c44e52", markersize=5)
    for step in path[:4]:
        axis.annotate(f"{step.k}", (step.x, step.y), (6, 4), textcoords="offset points")
    axis.plot(0, 0, "+", color="black", markersize=10)
    axis.set_xlabel("x")
    axis.set_ylabel("y")
    axis.set_aspect("equal")
    axis.set_title("Gradient descent")
    figure.savefig(Path(file), dpi=120)
