"""The generated pages: benchmarks/README.md from benchmarks/results, and the README's table."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.fits import exponent
from benchmarks.peers import COLUMNS
from benchmarks.results import Cell, Results
from benchmarks.suites import SUITES
from benchmarks.words import amount, ratio

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# The README's table: a title, and the columns of which the fastest is shown.
_FRONT = {
    "tapegrad": ("tapegrad", "tapegrad-cupy"),
    "tapegrad compiled": ("tapegrad-compiled", "tapegrad-cupy-compiled"),
    "PyTorch": tuple(name for name in COLUMNS if name.startswith("torch-")),
    "JAX": ("jax",),
    "TensorFlow": tuple(name for name in COLUMNS if name.startswith("tensorflow-")),
    "MyGrad": ("mygrad",),
}

_INTRODUCTION = """\
# Benchmarks

This page is made from the files in [results](results) by `python -m benchmarks --report`; what is
not in them is not claimed. Ratios come first: on a machine that others use too, times change from
one run to the next, ratios of one run much less.

## How to repeat it

```console
$ make bench                                    # all suites, no peers
$ python -m benchmarks steps --peers torch,jax  # one suite, with peers that are installed
$ python -m benchmarks --list                   # suites, cases, peers
$ python -m benchmarks --quick                  # tiny sizes: does everything run?
$ python -m benchmarks --out new.json --compare old.json --limit 1.10
$ python -m benchmarks --peers all --keep       # what made this page
$ pytest benchmarks                             # micro-benchmarks, with pytest-benchmark
```

`pip install --group peers` installs the peers. A peer that needs other versions than the rest can
have an interpreter of its own: `--python mygrad=other/bin/python`.

## How it is measured

- Each column runs in a process of its own, which is stopped while another has its turn.
- Before anything is timed, results are compared: losses of the first 5 steps from the same
  weights on the same batches, values and gradients of everything else, to 1e-4. A column that
  disagrees has no time.
- Rounds are interleaved and begin with another column each time. A turn runs a case as often as
  fits into 0.05 s, after a run that is not counted. Times are the median of the turns, with half
  the distance of the quartiles. A ratio is the median, over the rounds, of the ratio of two turns
  of one round: seconds lie between them, in which a machine's clock changes little.
- All numbers are float32; on a GPU without TF32. Labels are int64. Data lie in the column's own
  arrays beforehand.
- On a GPU, `device` is the time between two events in its own queue; the rest is wall-clock time.
- PyTorch is shown with its default allocator, and with `THP_MEM_ALLOC_ENABLE=1` (huge pages),
  without which large results pay a page fault for every 4 kB. `torch.compile` has the latter. Its
  optimisers are the fused ones.
- *NumPy by hand* is the bar: the step written out by a person who knows the net and counts calls
  ([numpy_by_hand.py](peers/numpy_by_hand.py)). The file is frozen. *NumPy, plain* is what one
  writes at first ([array_library.py](peers/array_library.py)).
- `--compare` divides tapegrad's changes by what the other columns of the same case changed, and
  calls beyond the noise what has quartiles apart.
"""


def keep(root: Path, new: Results) -> Path:
    """File results under their kind of machine; suites that were not run keep their old ones."""
    path = root / "benchmarks" / "results" / f"{new.kind}.json"
    if path.exists():
        new = Results.load(path).updated(new)
    new.save(path)
    return path


def write(root: Path) -> list[Path]:
    """Write pictures, benchmarks/README.md and the README's table; return what was written."""
    folder = root / "benchmarks" / "results"
    found = [Results.load(path) for path in sorted(folder.glob("*.json"))]
    written: list[Path] = []
    parts = [_INTRODUCTION]
    for results in found:
        pictures: dict[str, Path] = {}
        if importlib.util.find_spec("matplotlib"):
            from benchmarks.pictures import draw

            pictures = draw(results, folder)
        else:  # those that are there stay
            known = {s: folder / f"{results.kind}-{s}.svg" for s in SUITES}
            pictures = {suite: path for suite, path in known.items() if path.exists()}
        written += pictures.values()
        parts.append(_machine(results))
        parts += [_suite(results, name, pictures.get(name)) for name in SUITES]
    page = root / "benchmarks" / "README.md"
    page.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    written.append(page)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        readme.write_text(f"{before}{BEGIN}\n{front(found)}\n{END}{after}", encoding="utf-8")
        written.append(readme)
    return written


def _machine(results: Results) -> str:
    machine = results.machine
    packages = ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items()))
    steered = ", ".join(f"`{k}={v}`" for k, v in machine.get("environment", {}).items())
    lines = [
        f"\n## {_title(results)}\n",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_GiB']} GiB, "
        f"{machine['system']}" + (f"; {machine['gpu']}" if machine.get("gpu") else ""),
        f"- Python {machine['python']}; {packages}",
        f"- {results.settings['precision']}; {results.settings['rounds']} rounds of "
        f"{results.settings['turn_seconds']} s",
    ]
    if steered:
        lines.append(f"- the environment had {steered}")
    return "\n".join(lines) + "\n"


def _title(results: Results) -> str:
    machine = results.machine
    if results.settings["device"] == "gpu":
        return str(machine["gpu"])
    return f"{machine['cores']} CPU cores, {machine['cpu']}"


def _suite(results: Results, name: str, picture: Path | None) -> str:
    cells = [cell for cell in results.cells if cell.suite == name]
    if not cells:
        return ""
    suite, run = SUITES[name], results.runs[name]
    changed = " with changes that are not committed" if run["dirty"] else ""
    load = f", load before {run['load']}" if run.get("load") is not None else ""
    lines = [
        f"### {suite.title}\n",
        f"`python -m benchmarks {name}` · {run['date']}, commit {run['commit']}{changed}{load}\n",
        suite.about,
        f"Ratios are to {tables.label(suite.references[0])}, where it has a result.\n",
    ]
    if picture:
        lines.append(f"![{suite.title}](results/{picture.name})\n")
    if name == "scaling":
        lines.append(_exponents(cells) + "\n")
    lines.append(tables.markdown(suite, cells) + "\n")
    return "\n".join(lines)


def _exponents(cells: Sequence[Cell]) -> str:
    """Return the table of fitted exponents."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in cells:
        if cell.x and cell.median:
            points.setdefault((cell.column, cell.x[0]), []).append((cell.x[1], cell.median))
    columns = list(dict.fromkeys(column for column, _ in points))
    axes = list(dict.fromkeys(axis for _, axis in points))
    lines = ["| exponent in | " + " | ".join(axes) + " |", "|---|" + "---:|" * len(axes)]
    for column in columns:
        fits = [points.get((column, axis), []) for axis in axes]
        numbers = [f"{exponent(p):.2f}" if len(p) > 2 else "" for p in fits]
        lines.append(f"| {tables.label(column)} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def front(found: Sequence[Results]) -> str:
    """Return the README's table: training steps, the fastest column of each library."""
    parts = []
    for results in found:
        cells = [cell for cell in results.cells if cell.suite == "steps"]
        if not cells:
            continue
        titles = [
            title
            for title, names in _FRONT.items()
            if any(c.column in names and c.median for c in cells)
        ]
        lines = [
            f"One step on {_title(results)}, float32: the median time and, in bold, the\nmedian "
            "ratio to straight-line NumPy written by hand in the same round; of PyTorch and "
            "TensorFlow\nthe fastest of their ways. More, and how to repeat it: "
            "[benchmarks](benchmarks/README.md).\n",
            "| | NumPy by hand | " + " | ".join(titles) + " |",
            "|---|" + "---:|" * (len(titles) + 1),
        ]
        for case, row in tables.by_case(cells).items():
            base = tables.reference(row, SUITES["steps"].references)
            bar = next((c for c in row if c.column == "numpy-by-hand" and c.median), None)
            entries = [amount(bar.median, "s") if bar and bar.median else ""]
            for title in titles:
                there = [c for c in row if c.column in _FRONT[title] and c.median]
                best = min(there, key=lambda c: tables.relative(c, base) or 0.0, default=None)
                against = tables.relative(best, base) if best else None
                entries.append(
                    f"**{ratio(against)}** {amount(best.median, 's')}"
                    if best and best.median and against is not None
                    else ""
                )
            lines.append(f"| {case} | " + " | ".join(entries) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
