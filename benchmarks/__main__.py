"""Command line: python -m benchmarks [suite ...]."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import page, tables
from benchmarks.peers import COLUMNS, Column, groups, installed
from benchmarks.results import (
    FormatProblem,
    Results,
    commit,
    compare,
    gpu,
    machine,
    now,
    regressions,
)
from benchmarks.runner import ROOT, Settings, run
from benchmarks.suites import SUITES


class BadInput(Exception):
    """What was asked for is not there: one line, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 1 for a regression, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return _main(options)
    except (BadInput, FormatProblem) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What tapegrad costs, beside what one would use instead.",
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; default: all")
    add("--peers", default="", metavar="A,B", help=f"of {', '.join(groups())}; or all (installed)")
    add("--rounds", type=_positive, default=None, help="turns of each column (15)")
    add("--quick", action="store_true", help="tiny sizes: does everything run?")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto")
    add("--threads", type=_positive, help="of the arithmetic libraries")
    add(
        "--python",
        action="append",
        default=[],
        metavar="PEER=EXECUTABLE",
        help="an interpreter for a peer that needs other versions than the rest",
    )
    add("--out", type=Path, metavar="FILE.json", help="write results there")
    add(
        "--keep",
        action="store_true",
        help="write results to benchmarks/results, replacing the "
        "suites that were run, and the page that is made of them",
    )
    add("--compare", type=Path, metavar="OLD.json", help="say what changed since")
    add("--limit", type=float, default=1.10, help="slowdown that is a regression (1.10): exit 1")
    add(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="measure nothing: show or compare these results",
    )
    add("--report", action="store_true", help="make the page of benchmarks/results, and stop")
    add("--list", action="store_true", help="show suites, cases and peers, and stop")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _main(options: argparse.Namespace) -> int:
    names = options.suites or list(SUITES)
    for name in names:
        if name not in SUITES:
            raise BadInput(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    if options.keep and options.quick:
        raise BadInput("--keep wants real sizes: leave out --quick")
    old = Results.load(options.compare) if options.compare else None
    pythons = _pythons(options.python)
    device = _device(options.device)
    columns = _columns(options.peers, device, pythons)
    if options.list:
        print(_listing(names, columns, options.quick))
        return 0
    if options.report:
        print("\n".join(f"wrote {path}" for path in page.write(ROOT)))
        return 0
    if options.results:
        new = Results.load(options.results)
        for suite in SUITES.values():
            cells = [cell for cell in new.cells if cell.suite == suite.name]
            if cells and suite.name in names:
                print(tables.terminal(suite, cells))
    else:
        new = _measure(options, names, columns, device, pythons)
    if options.out:
        new.save(options.out)
    if options.keep:
        page.keep(ROOT, new)
        print("\n".join(f"wrote {path}" for path in page.write(ROOT)))
    if old is None:
        return 0
    found = compare(old, new)
    if old.machine.get("cpu") != new.machine.get("cpu"):
        print(f"the old results are from another machine: {old.machine.get('cpu')}")
    print(tables.changes(found, options.limit))
    return 1 if regressions(found, options.limit) else 0


def _measure(
    options: argparse.Namespace,
    names: Sequence[str],
    columns: Sequence[Column],
    device: str,
    pythons: dict[str, str],
) -> Results:
    rounds = options.rounds or (2 if options.quick else 15)
    turn = 0.002 if options.quick else 0.05
    settings = Settings(
        rounds=rounds, turn=turn, threads=options.threads, device=device, pythons=pythons
    )
    where = machine() | {"gpu": gpu() if device == "gpu" else None}
    if where.get("load_before", 0) > 0.5:
        _note(f"the machine is busy (load {where['load_before']}): expect noise")
    chosen = [(SUITES[name], SUITES[name].cases(options.quick)) for name in names]
    begin = time.monotonic()
    with _Progress() as progress:

        def finished(suite: object, cells: object) -> None:
            progress.clear()
            print(tables.terminal(suite, cells), flush=True)  # type: ignore[arg-type]

        cells, versions = run(chosen, columns, settings, progress.say, finished)
    _note(f"{time.monotonic() - begin:.0f} s")
    described = {
        "precision": "float32, no TF32",
        "rounds": rounds,
        "turn_seconds": turn,
        "threads": options.threads,
        "device": device,
        "quick": options.quick,
    }
    revision, dirty = commit(ROOT)
    a_run = {"commit": revision, "dirty": dirty, "date": now(), "load": where.get("load_before")}
    return Results(cells, where, versions, described, dict.fromkeys(names, a_run))


def _pythons(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, separator, executable = text.partition("=")
        if not separator or name not in {*groups(), *COLUMNS}:
            raise BadInput(
                f"--python takes PEER=EXECUTABLE, of {', '.join(groups())}; got {text!r}"
            )
        found[name] = executable
    return found


def _device(asked: str) -> str:
    name = gpu() if asked != "cpu" else None
    if asked == "gpu" and name is None:
        raise BadInput("--device gpu: CuPy finds no GPU here; --device cpu measures without")
    return "gpu" if name else "cpu"


def _columns(peers: str, device: str, pythons: dict[str, str]) -> list[Column]:
    known = groups()
    asked = [name.strip() for name in peers.split(",") if name.strip()]
    wanted: set[str] = set()
    here = [n for n in known if n in pythons or installed(COLUMNS[known[n][0]].needs)]
    for name in asked:
        if name == "all":
            wanted.update(c for group in here for c in known[group])
            continue
        group = name if name in known else None
        column = COLUMNS.get(name)
        if group is None and (column is None or column.own):
            raise BadInput(f"there is no peer {name!r}; there are {', '.join(known)}")
        module = group or column.module  # type: ignore[union-attr]
        if module not in here:
            raise BadInput(
                f"{module} is not installed; installed are {', '.join(here) or 'no peers'}"
            )
        wanted.update(known[group] if group else [name])
    return [
        column
        for column in COLUMNS.values()
        if column.device in ("any", device) and (column.own or column.name in wanted)
    ]


def _listing(names: Sequence[str], columns: Sequence[Column], quick: bool) -> str:
    lines = []
    for name in names:
        lines.append(f"{name}: {SUITES[name].title}")
        lines += [f"    {case.name}" for case in SUITES[name].cases(quick)]
    lines.append("peers:")
    for group, members in groups().items():
        state = "installed" if installed(COLUMNS[members[0]].needs) else "not installed"
        lines.append(f"    {group} ({state}): {', '.join(members)}")
    lines.append(f"columns now: {', '.join(column.name for column in columns)}")
    return "\n".join(lines)


def _note(text: str) -> None:
    print(f"benchmarks: {text}", file=sys.stderr)


class _Progress:
    """One line on the terminal that says what is being done; silent elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        """Show what is going on."""
        if self._shown:
            seconds = int(time.monotonic() - self._begin)
            line = f"{seconds // 60}:{seconds % 60:02d}  {text}"[:110]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()


if __name__ == "__main__":
    sys.exit(main())
