"""Simplify: the table of rewrites that can be switched off, in the order in which they are done."""

from __future__ import annotations

from tapegrad._function import (
    algebra,
    chains,
    epilogues,
    handwritten,
    layout,
    learning_rates,
    updates,
)
from tapegrad._function.program import Program
from tapegrad._function.rewrites import Rewrite, without_dead_steps, without_repeated_steps

# Patterns first: they are of the steps that a tape records, as it records them.
TABLE: dict[str, Rewrite] = {
    **handwritten.REWRITES,
    **algebra.REWRITES,
    **learning_rates.REWRITES,
    **chains.REWRITES,
    **updates.REWRITES,
    **epilogues.REWRITES,
    "layout": layout.REWRITE,
}
ENABLED: set[str] = set(TABLE)  # the names of those that are done: all, but for tests


def simplify(program: Program) -> None:
    """Do the rewrites of the table, between two rounds of tidying up."""
    without_repeated_steps(program)
    without_dead_steps(program)
    for name, rewrite in TABLE.items():
        if name in ENABLED and rewrite.run is not None:
            rewrite.run(program)
            without_dead_steps(program)
    without_repeated_steps(program)
    without_dead_steps(program)
    program.forget_makers()
