"""Results: cells, the machine they were measured on, files, and the comparison of two files."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.words import without_folders

FORMAT = 1
_STEERING = re.compile(r"(OMP|OPENBLAS|MKL|BLIS|KMP|XLA|NPY|DNNL|ONEDNN)_")


@dataclass
class Cell:
    """One case in one column: the samples' median and quartiles, or why there are none."""

    suite: str
    case: str
    column: str
    unit: str = "s"
    samples: list[float] = field(default_factory=list)
    device_samples: list[float] = field(default_factory=list)
    error: str | None = None
    unsupported: bool = False
    flops: float = 0
    bytes: float = 0
    alive: float = 0
    x: tuple[str, float] | None = None

    @classmethod
    def of(cls, case: Case, column: str) -> Cell:
        """Return an empty cell."""
        return cls("", case.name, column, case.unit).filed("", case)

    def filed(self, suite: str, case: Case) -> Cell:
        """Return this cell under a suite's name."""
        new = Cell(**vars(self))
        new.suite, new.case = suite, case.name
        new.flops, new.bytes = case.flops / case.divisor, case.bytes / case.divisor
        new.alive, new.x = case.alive, case.x
        return new

    def add(self, sample: float) -> None:
        """Take a sample in."""
        self.samples.append(sample)

    def fail(self, why: str, unsupported: bool = False) -> None:
        """Say why there is no number."""
        self.error, self.unsupported = why, unsupported
        self.samples, self.device_samples = [], []

    @property
    def median(self) -> float | None:
        """Return the median; None without samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the first and the third quartile, NaN without samples."""
        if not self.samples:
            return math.nan, math.nan
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def device(self) -> float | None:
        """Return the median on the device's own clock, or of its memory."""
        return statistics.median(self.device_samples) if self.device_samples else None


class FormatProblem(Exception):
    """A results file that this version cannot read."""


@dataclass
class Results:
    """What a results file holds; `runs` says of each suite when and of which commit it was run."""

    cells: list[Cell]
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]]

    def save(self, path: Path) -> None:
        """Write the file, one cell a line."""
        head = {key: value for key, value in vars(self).items() if key != "cells"}
        lines = ",\n  ".join(json.dumps(_compact(cell)) for cell in self.cells)
        text = json.dumps({"format": FORMAT} | head, indent=1)[:-2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{text},\n "cells": [\n  {lines}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file; raise `FormatProblem` with one clear line for what is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FormatProblem(f"{path}: {error.strerror}") from None
        except ValueError:
            raise FormatProblem(f"{path} is no JSON file of results") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise FormatProblem(
                f"{path} has format {found!r}, this version reads format {FORMAT}: "
                "run the benchmarks again"
            )
        del content["format"]
        try:
            cells = [Cell(**cell) for cell in content.pop("cells")]
            return cls(cells, **content)
        except (KeyError, TypeError) as error:
            raise FormatProblem(f"{path} is not complete: {error}") from None

    def updated(self, new: Results) -> Results:
        """Return these results with the suites that `new` has replaced by its own."""
        kept = [cell for cell in self.cells if cell.suite not in new.runs]
        return Results(
            kept + new.cells,
            new.machine,
            self.versions | new.versions,
            new.settings,
            self.runs | new.runs,
        )

    @property
    def kind(self) -> str:
        """Return the kind of machine, as results files are named by it."""
        gpu = self.machine.get("gpu") if self.settings.get("device") == "gpu" else None
        name = f"gpu-{gpu}" if gpu else f"cpu-{self.machine['cores']}-cores"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _compact(cell: Cell) -> dict[str, Any]:
    """Return a cell's fields, without those that say nothing, numbers to six digits."""
    plain = {key: value for key, value in asdict(cell).items() if value or key == "suite"}
    for key in ("samples", "device_samples"):
        if key in plain:
            plain[key] = [float(f"{sample:.6g}") for sample in plain[key]]
    return plain


# ---- where it was measured


def machine() -> dict[str, Any]:
    """Describe the machine: what decides speed, nothing that names it."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_GiB": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": None,
    }
    # Settings of the arithmetic libraries that the caller's shell brings along.
    found["environment"] = {
        name: without_folders(value)
        for name, value in sorted(os.environ.items())
        if _STEERING.match(name)
    }
    if hasattr(os, "getloadavg"):
        found["load_before"] = round(os.getloadavg()[0], 2)
    return found


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    widest = next((f for f in ("avx512f", "avx2", "avx") if flags and f in flags[1].split()), "")
    return f"{model[1].strip() if model else platform.machine()} {widest}".strip()


def _memory() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None


def gpu() -> str | None:
    """Return the GPU's name if CuPy can use one."""
    try:
        import cupy

        return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    except Exception:
        return None


def commit(root: Path) -> tuple[str, bool]:
    """Return the commit that is checked out, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True
        ).stdout.strip()

    try:
        # Results that are being written do not make the code another one.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD"), bool(changed)
    except OSError:
        return "", False


def now() -> str:
    """Return the date, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


# ---- what changed


class Change(NamedTuple):
    """A cell's new time over its old one, with what the machine itself changed taken out."""

    cell: Cell
    ratio: float
    drift: float
    beyond_noise: bool


def compare(old: Results, new: Results) -> list[Change]:
    """Return the change of every cell that both have, the largest slowdown first.

    On a machine that is busier today everything is slower. So each of tapegrad's ratios is divided
    by the drift of its case: the median ratio of the case's other columns whose packages have the
    same versions. A change is beyond the noise where the quartiles do not overlap.
    """
    before = {(c.suite, c.case, c.column): c for c in old.cells if c.median}
    pairs = [
        (before[key], cell)
        for cell in new.cells
        if cell.median and (key := (cell.suite, cell.case, cell.column)) in before
    ]
    steady = _steady(old, new)
    drifts: dict[tuple[str, str], list[float]] = {}
    for a, b in pairs:
        if steady(b.column) and a.median and b.median and b.unit == "s":
            drifts.setdefault((b.suite, b.case), []).append(b.median / a.median)
    changes = []
    for a, b in pairs:
        assert a.median is not None
        assert b.median is not None
        others = drifts.get((b.suite, b.case)) if b.column.startswith("tapegrad") else None
        drift = statistics.median(others) if others else 1.0
        (low, high), (new_low, new_high) = a.quartiles, b.quartiles
        apart = new_low > high * drift or new_high < low * drift
        changes.append(Change(b, b.median / a.median / drift, drift, apart))
    return sorted(changes, key=lambda change: -change.ratio)


def _steady(old: Results, new: Results) -> Any:
    """Return a function that tells whether a column is other people's and has not changed."""
    from benchmarks.peers import COLUMNS

    def steady(column: str) -> bool:
        if column.startswith("tapegrad") or column not in COLUMNS:
            return False
        package = COLUMNS[column].needs
        return old.versions.get(package) == new.versions.get(package)

    return steady


def regressions(changes: Iterable[Change], limit: float) -> list[Change]:
    """Return tapegrad's changes that are beyond the noise and over the limit."""
    return [
        c
        for c in changes
        if c.cell.column.startswith("tapegrad") and c.beyond_noise and c.ratio > limit
    ]
