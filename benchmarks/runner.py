"""Starts the peers' processes, checks that they agree, and times them in interleaved rounds."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Suite
from benchmarks.peers import Column
from benchmarks.results import Cell
from benchmarks.words import brief

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    rounds   how often each column has its turn; `turn` is how many seconds a turn takes.
    budget   seconds for the rounds of one column in one case: what is slow has fewer, but 3.
    limit    seconds after which a column that does not answer is given up.
    pythons  interpreters of columns that cannot share ours.
    """

    rounds: int = 15
    turn: float = 0.05
    budget: float = 20.0
    limit: float = 300.0
    threads: int | None = None
    device: str = "cpu"
    pythons: dict[str, str] = field(default_factory=dict)


class Failure(Exception):
    """A column cannot do a case; `unsupported` if that is no fault."""

    def __init__(self, why: str, unsupported: bool = False) -> None:
        super().__init__(why)
        self.unsupported = unsupported


class Process:
    """A column's process. It is stopped whenever it is not its turn.

    Libraries' threads go on spinning for a while after their work is done, on cores that the next
    column needs.
    """

    def __init__(self, column: Column, settings: Settings) -> None:
        self.column = column
        self._limit = settings.limit
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        python = settings.pythons.get(column.name) or settings.pythons.get(column.module)
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, "-m", "benchmarks.worker", column.name, settings.device],
                cwd=ROOT,
                env=_environment(column, settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise Failure(brief(f"cannot start {python}: {error.strerror}")) from None
        self._timed_out = False

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command, wait for the answer and return it; raise `Failure` if there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(self._limit, self._give_up)
        watchdog.start()
        try:
            self._signal("SIGCONT")
            print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise Failure(self._last_words())
        self._signal("SIGSTOP")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            self._process.kill()
            raise Failure(brief(f"answered {line.strip()!r}")) from None
        if "error" in answer:
            raise Failure(answer["error"], answer["unsupported"])
        return answer

    def _give_up(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _last_words(self) -> str:
        code = self._process.wait()
        if self._timed_out:
            return f"no answer within {self._limit:.0f} s"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return brief(f"{how}: {lines[-1]}") if lines else how

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def alive(self) -> bool:
        """Tell whether the process can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def _environment(column: Column, settings: Settings) -> dict[str, str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "TAPEGRAD_BACKEND": "numpy",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # a cold start compiles
        # Else the first of them to start would take a GPU's memory, which all columns share.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    if settings.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    if settings.threads:
        environment |= dict.fromkeys(_THREAD_VARIABLES, str(settings.threads))
    return environment | dict(column.environment)


class Crew:
    """The processes of all columns, started when needed and again after they died."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: dict[str, Process] = {}

    def process(self, column: Column) -> Process:
        """Return the column's process."""
        known = self._processes.get(column.name)
        if known is None or not known.alive():
            if known is not None:
                known.close()
            known = self._processes[column.name] = Process(column, self._settings)
        return known

    def fresh(self, column: Column) -> Process:
        """Return a process that nothing has run in."""
        self.forget(column)
        return self.process(column)

    def forget(self, column: Column) -> None:
        """End the column's process, if it has one."""
        if column.name in self._processes:
            self._processes.pop(column.name).close()

    def release(self) -> None:
        """Have all processes forget their case: the next one's columns need the memory."""
        for process in self._processes.values():
            if process.alive():
                with suppress(Failure):
                    process.ask("release")

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


Report = Callable[[str], None]


def run(
    suites: Iterable[tuple[Suite, Sequence[Case]]],
    columns: Sequence[Column],
    settings: Settings,
    report: Report,
    finished: Callable[[Suite, list[Cell]], None],
) -> tuple[list[Cell], dict[str, str]]:
    """Run suites; return all cells, and the versions of the peers' packages.

    report    is told, in a few words, what is going on.
    finished  is told each suite's cells when it is done.
    """
    cells: list[Cell] = []
    versions: dict[str, str] = {}
    measured: dict[str, list[Cell]] = {}  # a case that two suites have is measured once
    with Crew(settings) as crew:
        for column in columns:
            report(f"starting {column.label}")
            with suppress(Failure):  # each of its cells will say why
                versions |= crew.process(column).ask("versions")["versions"]
        for suite, cases in suites:
            ours: list[Cell] = []
            wanted = [c for c in columns if suite.columns is None or c.name in suite.columns]
            for i, case in enumerate(cases, 1):
                key = json.dumps([case.kind, case.parameters, case.measure], sort_keys=True)
                if key not in measured:
                    prefix = f"{suite.name} {i}/{len(cases)}  {case.name}"
                    measured[key] = _case(
                        crew, case, wanted, settings, lambda what, p=prefix: report(f"{p}: {what}")
                    )
                ours += [cell.filed(suite.name, case) for cell in measured[key]]
            finished(suite, ours)
            cells += ours
    return cells, versions


def _case(
    crew: Crew, case: Case, columns: Sequence[Column], settings: Settings, report: Report
) -> list[Cell]:
    if case.measure == "time":
        return _timed(crew, case, columns, settings, report)
    return _fresh(crew, case, columns, settings, report)


def _timed(
    crew: Crew, case: Case, columns: Sequence[Column], settings: Settings, report: Report
) -> list[Cell]:
    """Measure a case, with as many columns at once as the memory holds."""
    cells = []
    together = _fitting(case.alive)
    for first in range(0, len(columns), together):
        cells += _interleaved(crew, case, columns[first : first + together], settings, report)
        if together < len(columns):
            crew.close()
    return cells


def _fitting(alive: float) -> int:
    """Return how many processes of a case may live at once: in half of the memory."""
    if not hasattr(os, "sysconf") or alive < 1e8:
        return 1_000
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(2, int(memory / 2 / (3 * alive)))


def _interleaved(
    crew: Crew, case: Case, columns: Sequence[Column], settings: Settings, report: Report
) -> list[Cell]:
    cells = {column.name: Cell.of(case, column.name) for column in columns}
    results: dict[str, list[float]] = {}
    turns: dict[str, tuple[int, int]] = {}  # runs in a turn, rounds
    for column in columns:
        report(f"preparing {column.label}")
        try:
            process = crew.process(column)
            asked = process.ask("prepare", kind=case.kind, parameters=dict(case.parameters))
            results[column.name] = asked["result"]
            turns[column.name] = _calibrated(process, settings)
        except Failure as failure:
            cells[column.name].fail(str(failure), failure.unsupported)
    for name, why in disagreements(results).items():
        cells[name].fail(why)
    turns = {name: turn for name, turn in turns.items() if not cells[name].error}
    most = max((rounds for _, rounds in turns.values()), default=0)
    for number in range(most):
        report(f"round {number + 1} of {most}")
        order = [column for column in columns if column.name in turns]
        shift = number % max(1, len(order))
        for column in order[shift:] + order[:shift]:  # none always follows the same
            runs, rounds = turns[column.name]
            if number >= rounds or cells[column.name].error:
                continue
            try:
                answer = crew.process(column).ask("measure", runs=runs)
            except Failure as failure:
                cells[column.name].fail(str(failure))
                continue
            cells[column.name].add(answer["wall"] / case.divisor)
            if answer["device"] is not None:
                cells[column.name].device_samples.append(answer["device"] / case.divisor)
    crew.release()
    return list(cells.values())


def _calibrated(process: Process, settings: Settings) -> tuple[int, int]:
    """Return how many runs fill a turn, and how many rounds the budget allows."""
    runs = 1
    while True:
        taken = process.ask("measure", runs=runs)["wall"] * runs
        if taken > settings.turn / 4 or runs >= 1 << 20:
            break
        runs *= 4
    one = taken / runs
    runs = max(1, round(settings.turn / one))
    a_round = one * (runs + 1)
    return runs, max(3, min(settings.rounds, math.floor(settings.budget / a_round)))


def _fresh(
    crew: Crew, case: Case, columns: Sequence[Column], settings: Settings, report: Report
) -> list[Cell]:
    """Measure what needs a process of its own each time."""
    cells = {column.name: Cell.of(case, column.name) for column in columns}
    results: dict[str, list[float]] = {}
    rounds = {"size": 1, "memory": 2}.get(case.measure, 5)
    command = {"import": "startup"}.get(case.measure, case.measure)
    arguments = {"kind": case.kind, "parameters": dict(case.parameters)}
    for number in range(min(rounds, settings.rounds)):
        for column in columns:
            cell = cells[column.name]
            if cell.error:
                continue
            report(f"round {number + 1} of {rounds}, {column.label}")
            try:
                process = crew.fresh(column)
                if case.measure in ("cold", "memory"):
                    process.ask("versions")  # imports
                    answer = process.ask(command, **arguments)
                    results[column.name] = answer["result"]
                else:
                    answer = process.ask(command)
            except Failure as failure:
                cell.fail(str(failure), failure.unsupported)
                continue
            finally:
                crew.forget(column)
            cell.add(answer["bytes"] if case.unit == "B" else answer["wall"])
            if answer.get("device_bytes") is not None:
                cell.device_samples.append(answer["device_bytes"])
    for name, why in disagreements(results).items():
        cells[name].fail(why)
    return list(cells.values())


def disagreements(results: dict[str, list[float]]) -> dict[str, str]:
    """Return the columns whose numbers are not those of the majority, and how they differ.

    Each number is compared with the median over the columns, to 1e-4 of the largest number of its
    kind; two columns that differ from each other are both named.
    """
    found: dict[str, str] = {}
    lengths = [len(numbers) for numbers in results.values()]
    usual = statistics.mode(lengths) if lengths else 0
    same = {name: numbers for name, numbers in results.items() if len(numbers) == usual}
    for name in results.keys() - same.keys():
        found[name] = f"disagrees: {len(results[name])} numbers, others {usual}"
    for i in range(usual):
        finite = [numbers[i] for numbers in same.values() if math.isfinite(numbers[i])]
        middle = statistics.median(finite) if finite else math.nan
        for name, numbers in same.items():
            if not abs(numbers[i] - middle) <= TOLERANCE * max(abs(middle), 1e-6):
                found.setdefault(name, f"disagrees: {numbers[i]:.6g}, others {middle:.6g}")
    return found
