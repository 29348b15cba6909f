"""Cases: what is measured, with its sizes, and how its time is turned into work done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Case:
    """One line of a table.

    kind        the method of `Peer` that prepares it, with `parameters`.
    measure     "time": many runs in rounds; "cold": one run in a fresh process; "memory": the peak
                over set-up and a few runs in a fresh process; "import" and "size": of the peer.
    flops       floating-point operations of a run, and
    bytes       what a run must move at the least: both for the fractions of the ceilings.
    divisor     how many equal parts a run has, where the time of one is wanted.
    alive       bytes that must live at once, for memory.
    x           what the case's cost is fitted against in `scaling`: (axis, value).
    """

    name: str
    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    measure: str = "time"
    flops: float = 0
    bytes: float = 0
    divisor: int = 1
    alive: float = 0
    x: tuple[str, float] | None = None

    @property
    def unit(self) -> str:
        """Return what the numbers are: seconds or bytes."""
        return "B" if self.measure in ("memory", "size") else "s"


class Suite(NamedTuple):
    """Cases that belong in one table.

    references  columns that ratios are taken against: the first that has a result.
    columns     the columns that make sense here; None: all.
    """

    name: str
    title: str
    about: str
    references: tuple[str, ...]
    cases: Callable[[bool], list[Case]]  # of whether sizes shall be tiny, for tests
    columns: frozenset[str] | None = None
