"""Pictures of results: bars of ratios, the roofline, scaling curves. The one user of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.fits import exponent
from benchmarks.results import Cell, Results
from benchmarks.suites import SUITES
from benchmarks.tables import Ceilings, by_case, label, reference, relative
from benchmarks.words import amount, ratio

_INK, _SOFT, _GRID = "#22262b", "#6b7280", "#e6e8eb"
_COLOURS = {
    "tapegrad": "#c8323c",
    "numpy": "#4b5563",
    "cupy": "#4b5563",
    "torch": "#e08a3c",
    "jax": "#3f7fc1",
    "tensorflow": "#caa63a",
    "autograd": "#7a9e5f",
    "mygrad": "#5f9e94",
    "tinygrad": "#9a7fb8",
    "sklearn": "#b08a78",
}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _INK,
    "figure.facecolor": "white",
    "svg.hashsalt": "tapegrad",  # equal results give an equal file
}


def draw(results: Results, folder: Path, suffix: str = "svg") -> dict[str, Path]:
    """Draw what there are results for; return the picture of each suite."""
    pictures = {"steps": _bars, "kernels": _roofline, "scaling": _scaling, "ops": _overhead}
    written = {}
    with plt.rc_context(_STYLE):
        for suite, picture in pictures.items():
            cells = [c for c in results.cells if c.suite == suite and c.median]
            figure = picture(cells) if cells else None
            if figure is None:
                continue
            path = folder / f"{results.kind}-{suite}.{suffix}"
            options = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 110}
            figure.savefig(path, bbox_inches="tight", **options)
            plt.close(figure)
            written[suite] = path
    return written


def _colour(column: str) -> str:
    return _COLOURS.get(column.split("-")[0], _SOFT)


def _strong(column: str) -> bool:
    return column.startswith("tapegrad")


def _bars(cells: Sequence[Cell]) -> Any:
    """Draw, for each case, how many times as long as the reference each column takes."""
    cases = by_case(cells)
    columns = 2
    rows = math.ceil(len(cases) / columns)
    tallest = max(len(row) for row in cases.values())
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, rows * (0.9 + 0.21 * tallest)), squeeze=False
    )
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    for axis, (case, row) in zip(axes.flat, cases.items(), strict=False):
        base = reference(row, SUITES["steps"].references)
        pairs = [(relative(cell, base) or math.nan, cell) for cell in row]
        pairs.sort(key=lambda pair: pair[0], reverse=True)
        low = min(0.9, *(r for r, _ in pairs)) / 1.05
        high = max(1.5, *(r for r, _ in pairs))
        axis.set_xscale("log")
        axis.set_xlim(low, high * (high / low) ** 0.42)  # room for the numbers
        for i, (value, cell) in enumerate(pairs):
            axis.barh(
                i,
                value - 1,
                left=1,  # on a log axis only the distance from 1 means something
                height=0.68,
                color=_colour(cell.column),
                alpha=1.0 if _strong(cell.column) else 0.75,
            )
            axis.text(
                max(value, 1) * (high / low) ** 0.015,
                i,
                f"{ratio(value)}   {amount(cell.median or 0, 's')}",
                va="center",
                fontsize=8,
                fontweight="bold" if _strong(cell.column) else "normal",
            )
        axis.axvline(1, color=_INK, linewidth=0.8)
        axis.set_yticks(range(len(pairs)), [label(cell.column) for _, cell in pairs])
        for tick, (_, cell) in zip(axis.get_yticklabels(), pairs, strict=True):
            tick.set_fontweight("bold" if _strong(cell.column) else "normal")
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(-0.6, tallest - 0.4 - (tallest - len(pairs)))
        _ratio_ticks(axis, low, high)
        axis.set_title(case, pad=6)
    figure.suptitle(
        f"Time over that of {label(SUITES['steps'].references[0])}, or of tapegrad where that has "
        "none; log scale; to the left is faster",
        x=0.01,
        ha="left",
        fontsize=10,
        color=_SOFT,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=1.8, w_pad=2)
    return figure


def _ratio_ticks(axis: Any, low: float, high: float) -> None:
    steps = (1, 2, 5) if high / low < 50 else (1,)
    ticks = [s * 10.0**e for e in range(-3, 6) for s in steps]
    axis.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="x", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _scaling(cells: Sequence[Cell]) -> Any:
    """Draw the time of a step against batch, width and depth; lines end in name and exponent."""
    names = list(dict.fromkeys(c.x[0] for c in cells if c.x))
    figure, axes = plt.subplots(1, len(names), figsize=(13, 4.6), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            if cell.x and cell.x[0] == name and cell.median:
                lines.setdefault(cell.column, []).append((cell.x[1], cell.median))
        _lines(axis, lines, with_exponent=True)
        axis.set_title(f"{name}")
        axis.set_xlabel(name)
    axes[0][0].set_ylabel("time of a step")
    figure.tight_layout(w_pad=1.5)
    return figure


def _overhead(cells: Sequence[Cell]) -> Any:
    """Draw the time of one addition against its length, in the three modes."""
    modes = ("off the tape", "recorded", "with its gradient")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True)
    for axis, mode in zip(axes, modes, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            what, size, how = cell.case.split(", ", 2)[0], *cell.case.rsplit(", ", 1)
            if what == "add" and how == mode and cell.median:
                elements = float(size.split(", ", 1)[1].split()[0].replace(",", ""))
                lines.setdefault(cell.column, []).append((elements, cell.median))
        _lines(axis, lines, with_exponent=False)
        axis.set_title(f"x + y, {mode}")
        axis.set_xlabel("elements")
    axes[0].set_ylabel("time of an operation")
    figure.tight_layout(w_pad=1.5)
    return figure


def _lines(axis: Any, lines: dict[str, list[tuple[float, float]]], *, with_exponent: bool) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    ends = []
    for column, points in lines.items():
        points.sort()
        xs, ys = [x for x, _ in points], [y for _, y in points]
        strong = _strong(column)
        axis.plot(
            xs,
            ys,
            color=_colour(column),
            linewidth=2.4 if strong else 1.3,
            linestyle="--" if column.endswith(("compiled", "compile", "thp")) else "-",
            marker="o",
            markersize=4 if strong else 3,
            zorder=3 if strong else 2,
        )
        words = label(column)
        if with_exponent and len(points) > 2:
            words += f"  {exponent(points):.2f}"
        ends.append((ys[-1], xs[-1], words, column))
    _end_labels(axis, ends)
    sizes = sorted({x for points in lines.values() for x, _ in points})
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.tick_params(axis="x", labelsize=8)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value, "s")))
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _end_labels(axis: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name at its end, moved apart where they would lie on each other."""
    if not ends:
        return
    low, high = (math.log10(y) for y in axis.get_ylim())
    gap = (high - low) * 0.047
    ends.sort()
    places: list[float] = []
    for y, *_ in ends:
        at = math.log10(y)
        places.append(max(at, places[-1] + gap) if places else at)
    excess = places[-1] - (high - gap / 2)
    if excess > 0:
        places[-1] -= excess
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    for place, (y, x, words, column) in zip(places, ends, strict=True):
        axis.annotate(
            words,
            (x, y),
            xytext=(1.04, (place - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=_colour(column),
            fontweight="bold" if _strong(column) else "normal",
            arrowprops={"arrowstyle": "-", "color": _colour(column), "lw": 0.6, "alpha": 0.6},
        )


def _short(size: float) -> str:
    """Return a size in so few letters that two neighbours do not touch."""
    if size >= 1e6:
        return f"{size / 1e6:g}M"
    return f"{size / 1e3:g}k" if size >= 1e4 else f"{size:g}"


def _roofline(cells: Sequence[Cell]) -> Any:
    """Draw what rate each case reaches under the ceilings of memory and arithmetic."""
    ceilings = Ceilings(cells)
    work = [c for c in cells if c.flops and c.bytes]
    if not (ceilings.bytes and ceilings.flops and work):
        return None
    figure, axis = plt.subplots(figsize=(10, 5.4))
    intensities = [c.flops / c.bytes for c in work]
    low, high = min(intensities) / 2.5, max(*intensities, 2 * ceilings.flops / ceilings.bytes) * 2.5
    ridge = ceilings.flops / ceilings.bytes
    axis.plot(
        [low, ridge, high],
        [low * ceilings.bytes, ceilings.flops, ceilings.flops],
        color=_INK,
        linewidth=1.4,
    )
    axis.text(
        high, ceilings.flops * 1.12, f"product: {ceilings.flops / 1e9:,.0f} GFLOP/s", ha="right"
    )
    axis.text(
        low * 1.1,
        low * ceilings.bytes * 1.9,
        f"copy: {ceilings.bytes / 1e9:.1f} GB/s",
        rotation=0,
        ha="left",
    )
    shown: dict[str, str] = {}
    named: dict[float, tuple[float, str]] = {}  # cases of one intensity share a place
    for case, row in by_case(work).items():
        x = row[0].flops / row[0].bytes
        rates = [(c.flops / c.median, c.column) for c in row if c.median]
        for rate, column in rates:
            shown[column] = label(column)
            axis.plot(
                x,
                rate,
                marker="o" if _strong(column) else "D" if column == "numpy-by-hand" else "s",
                markersize=8 if _strong(column) else 5,
                color=_colour(column),
                markerfacecolor="white"
                if column.endswith(("thp", "compiled", "compile"))
                else None,
                linestyle="",
                zorder=3 if _strong(column) else 2,
            )
        low_before, names = named.get(x, (math.inf, ""))
        lowest = min(low_before, *[rate for rate, _ in rates])
        named[x] = lowest, f"{names}\n{case}".strip()
    for x, (lowest, names) in named.items():
        axis.annotate(
            names,
            (x, lowest),
            xytext=(0, -9),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="top",
            fontsize=7,
            color=_SOFT,
        )
    for column, words in shown.items():
        axis.plot(
            [],
            [],
            marker="o" if _strong(column) else "D" if column == "numpy-by-hand" else "s",
            color=_colour(column),
            markerfacecolor="white" if column.endswith(("thp", "compiled", "compile")) else None,
            linestyle="",
            label=words,
        )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom / 200, top * 1.6)  # room for the names below
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("operations per byte that must be moved")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e9:g} GFLOP/s"))
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title("Roofline: higher is faster, the line is the ceiling measured in the same run")
    figure.tight_layout()
    return figure
