"""Expansions: steps that have a kernel on a GPU, as the smaller steps that a CPU does better.

The lowerings write those into planned memory, and run them block by block in cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tapegrad._function.program import Program, Step, Value
from tapegrad.primitive import primitives


def expand(program: Program) -> None:
    """Replace the steps of a program on the host that are worth it."""
    steps: list[Step] = []
    for step in program.steps:
        steps += _dropout(step) if step.name == "dropout" else [step]
    program.steps = steps


def _dropout(step: Step) -> list[Step]:
    """Return the steps of dropout's meaning: bits, mask, factors, product."""
    x, counter, key = step.inputs
    y, factors = step.outputs
    kept = 1.0 - step.params["rate"]
    count = -(-x.size // 2)
    bits = Value("result", (count,), np.dtype(np.uint64))
    mask = Value("result", x.shape, np.dtype(np.bool_))
    floating = Value("result", x.shape, x.dtype)

    def one(name: str, inputs: tuple[Any, ...], output: Value, **params: Any) -> Step:
        return Step(primitives[name], inputs, (output,), params, step.where, order=step.order)

    return [
        one("random_bits", (counter, key), bits, count=count),
        one("random_mask", (bits,), mask, shape=x.shape, threshold=round(kept * 2**32)),
        one("cast", (mask,), floating, dtype=x.dtype),
        one("divide", (floating, kept), factors),
        one("multiply", (x, factors), y),
    ]
