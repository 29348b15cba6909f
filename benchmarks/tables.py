"""Tables: ratios first, then medians and spread; for the terminal and for pages."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.cases import Suite
from benchmarks.peers import COLUMNS
from benchmarks.results import Cell, Change
from benchmarks.words import amount, ratio

_MANY = 12  # cases from which on a table is a matrix


def label(column: str) -> str:
    """Return a column's title."""
    return COLUMNS[column].label if column in COLUMNS else column


def by_case(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each case, in order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.case, []).append(cell)
    return found


def reference(cells: Sequence[Cell], references: Sequence[str]) -> Cell | None:
    """Return the cell that a case's ratios are taken against; None where none has a number."""
    numbers = {cell.column: cell for cell in cells if cell.median}
    for name in references:
        if name in numbers:
            return numbers[name]
    return next(iter(numbers.values()), None)


def relative(cell: Cell, base: Cell | None) -> float | None:
    """Return the median of the cell's ratios to the reference, each of two turns of one round.

    Turns of a round are seconds apart. Over a run a shared machine's clock may change by a half,
    and the ratio of two medians then tells which column had the faster minutes.
    """
    if base is None or not base.median or cell.median is None:
        return None
    return statistics.median(a / b for a, b in zip(cell.samples, base.samples, strict=False))


def spread(cell: Cell) -> str:
    """Return half the distance of the quartiles, in per cent of the median."""
    low, high = cell.quartiles
    return f"± {50 * (high - low) / cell.median:.0f} %" if cell.median else ""


class Ceilings:
    """The best rates that any column reached in the two lines that measure nothing else.

    Of their fastest turns, not of their medians: nothing is above a ceiling.
    """

    def __init__(self, cells: Iterable[Cell]) -> None:
        cells = list(cells)
        self.bytes = max((c.bytes / min(c.samples) for c in cells if _is(c, "copy")), default=0.0)
        self.flops = max(
            (c.flops / min(c.samples) for c in cells if _is(c, "product")), default=0.0
        )

    def fraction(self, cell: Cell) -> float | None:
        """Return the share of the ceiling that a cell reaches; None where it has no work."""
        if not (self.bytes and self.flops and cell.median and (cell.bytes or cell.flops)):
            return None
        return max(cell.bytes / self.bytes, cell.flops / self.flops) / cell.median


def _is(cell: Cell, kind: str) -> bool:
    return cell.suite == "kernels" and cell.case.startswith(kind + " ") and bool(cell.median)


def facts(cell: Cell, ceilings: Ceilings | None) -> str:
    """Return what is known of a cell beside its ratio."""
    if cell.median is None:
        return cell.error or "no result"
    parts = [f"{amount(cell.median, cell.unit)} {spread(cell)}"]
    if cell.device is not None:
        parts.append(f"device {amount(cell.device, cell.unit)}")
    if cell.unit == "B" and cell.alive:
        parts.append(f"{cell.median / cell.alive:.2f} of what must live")
    fraction = ceilings.fraction(cell) if ceilings else None
    if fraction is not None:
        parts.append(f"{100 * fraction:.0f} % of the ceiling")
    return ", ".join(parts)


def terminal(suite: Suite, cells: Sequence[Cell]) -> str:
    """Return a suite's table for a terminal."""
    lines = [f"{suite.title}: ratio to {label(suite.references[0])}, median, spread", ""]
    cases = by_case(cells)
    ceilings = Ceilings(cells) if suite.name == "kernels" else None
    if len(cases) > _MANY:
        return "\n".join([*lines, *_matrix(suite, cases)])
    width = max((len(label(cell.column)) for cell in cells), default=0)
    for case, row in cases.items():
        base = reference(row, suite.references)
        lines.append(case)
        for cell in row:
            if cell.unsupported:
                continue
            against = relative(cell, base)
            number = "-" if against is None else ratio(against)
            lines.append(f"  {number:>7}  {label(cell.column):{width}}  {facts(cell, ceilings)}")
        lines.append("")
    return "\n".join(lines)


def _matrix(suite: Suite, cases: dict[str, list[Cell]]) -> list[str]:
    columns = list(dict.fromkeys(cell.column for row in cases.values() for cell in row))
    columns = [
        c for c in columns if any(x.column == c and x.median for r in cases.values() for x in r)
    ]
    width = max(map(len, cases))
    head = [label(c)[:12] for c in columns]
    lines = [" " * width + f"  {'reference':>9}  " + "  ".join(f"{h:>12}" for h in head)]
    for case, row in cases.items():
        base = reference(row, suite.references)
        given = {cell.column: cell for cell in row}
        numbers = []
        for column in columns:
            against = relative(given[column], base) if column in given else None
            numbers.append(f"{'-' if against is None else ratio(against):>12}")
        time = amount(base.median, base.unit) if base and base.median else "-"
        lines.append(f"{case:{width}}  {time:>9}  " + "  ".join(numbers))
    return lines


def markdown(suite: Suite, cells: Sequence[Cell]) -> str:
    """Return a suite's table for a page: whichever there are more of, cases or columns, down."""
    cases = by_case(cells)
    columns = [
        c
        for c in dict.fromkeys(cell.column for cell in cells)
        if any(x.column == c and not x.unsupported for x in cells)
    ]
    ceilings = Ceilings(cells) if suite.name == "kernels" else None
    text: dict[tuple[str, str], str] = {}
    notes: list[str] = []
    for case, row in cases.items():
        base = reference(row, suite.references)
        for cell in row:
            text[case, cell.column] = _entry(cell, base, ceilings, notes)
    if len(cases) > len(columns):
        head, down = [label(c) for c in columns], [(case, case) for case in cases]
        body = [[text.get((case, c), "") for c in columns] for case, _ in down]
    else:
        head, down = list(cases), [(c, label(c)) for c in columns]
        body = [[text.get((case, c), "") for case in cases] for c, _ in down]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    lines += [f"| {n} | " + " | ".join(r) + " |" for (_, n), r in zip(down, body, strict=True)]
    if notes:
        lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines)


def _entry(cell: Cell, base: Cell | None, ceilings: Ceilings | None, notes: list[str]) -> str:
    if cell.unsupported:
        return "–"
    if cell.median is None:
        why = f"{label(cell.column)}: {cell.error}".replace("|", "/").replace("<", "&lt;")
        if why not in notes:
            notes.append(why)
        return f"({notes.index(why) + 1})"
    against = relative(cell, base)
    first = "" if against is None else f"**{ratio(against)}**<br>"
    return first + facts(cell, ceilings).replace(", ", "<br>")


def changes(found: Sequence[Change], limit: float) -> str:
    """Return what changed beyond the noise, one line a change."""
    lines = []
    for change in found:
        if not change.beyond_noise or (0.98 < change.ratio < 1.02):
            continue
        mark = "slower" if change.ratio > 1 else "faster"
        over = "  over the limit" if change.ratio > limit else ""
        drift = "" if change.drift == 1 else f" (others {change.drift:.2f})"
        cell = change.cell
        lines.append(
            f"  {ratio(change.ratio):>6}  {mark}  {cell.suite}: {cell.case}, "
            f"{label(cell.column)}{drift}{over}"
        )
    head = f"{len(found)} results in common; new over old, beyond the noise:"
    return "\n".join([head, *(lines or ["  nothing changed"])])
