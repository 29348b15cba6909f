from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, tables
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.fits import exponent
from benchmarks.peers import COLUMNS, numpy_by_hand
from benchmarks.problems import Net
from benchmarks.results import Cell, Results, compare, regressions
from benchmarks.runner import Settings, disagreements, run
from benchmarks.suites import SUITES
from benchmarks.words import amount, brief, ratio

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every suite at tiny sizes, with no peers but NumPy."""
    path = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    assert main(["--quick", "--rounds", "1", "--device", "cpu", "--out", str(path)]) == 0
    return path


def made_up(**times: list[float]) -> Results:
    """Results of one case with the given samples; underscores stand for the names' dashes."""
    cells = [
        Cell("steps", "a case", name.replace("_", "-"), samples=samples)
        for name, samples in times.items()
    ]
    machine = {"cpu": "a processor", "cores": 2, "memory_GiB": 8, "system": "S", "python": "3.11"}
    settings = {"device": "cpu", "precision": "float32", "rounds": 3, "turn_seconds": 0.05}
    a_run = {"commit": "0123456789ab", "dirty": False, "date": "2026-01-01", "load": 0.0}
    return Results(cells, machine, {"numpy": "2.0"}, settings, {"steps": a_run})


# ---- every suite runs


def test_every_suite_has_results_in_every_column(quick: Path) -> None:
    cells = Results.load(quick).cells
    assert {cell.suite for cell in cells} == set(SUITES)
    wrong = [(c.suite, c.case, c.column, c.error) for c in cells if c.error and not c.unsupported]
    assert wrong == []
    for suite in SUITES:
        have = {c.column for c in cells if c.suite == suite and c.median}
        assert "tapegrad" in have
    compared = {c.column for c in cells if c.suite == "steps" and c.median}
    assert {"tapegrad", "numpy", "numpy-by-hand"} <= compared


def test_results_say_where_they_are_from_and_name_no_folder(quick: Path) -> None:
    results = Results.load(quick)
    assert set(results.machine) >= {"cpu", "cores", "memory_GiB", "python", "gpu"}
    assert set(results.versions) == {"numpy", "tapegrad"}
    assert set(results.runs) == set(SUITES)
    text = quick.read_text()
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


def test_results_are_shown_again_and_equal_themselves(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["steps", "--results", str(quick), "--compare", str(quick)]) == 0
    shown = capsys.readouterr().out
    assert "Training steps: ratio to NumPy by hand" in shown
    assert "nothing changed" in shown


def test_sizes_and_names_of_the_bars_are_those_that_are_promised() -> None:
    names = {case.name for suite in SUITES.values() for case in suite.cases(False)}
    assert {
        "(x² + y²)² with gradient",
        "64-32-32-10, batch 32, Adam",
        "784-512-512-10, batch 128, SGD",
        "784-2048-2048-10, batch 512, Adam",
        "60 hidden layers of 512, batch 4096, SGD",
        "softmax cross-entropy 4096 x 1000",
        "softmax cross-entropy 8192 x 4000",
        "bias + ReLU 4096 x 4096",
    } <= names


@pytest.mark.parametrize("suite", SUITES)
def test_cases_of_a_suite_have_different_names(suite: str) -> None:
    for tiny in (True, False):
        names = [case.name for case in SUITES[suite].cases(tiny)]
        assert len(set(names)) == len(names)


def test_work_of_a_net_is_counted_by_hand() -> None:
    net = Net((3, 4, 2), 5, "adam", 0.1)
    assert net.parameters == 3 * 4 + 4 + 4 * 2 + 2
    assert net.flops == 2 * 5 * (2 * 3 * 4 + 3 * 4 * 2)  # no gradient of the input
    assert net.bytes_alive == 4 * (4 * 26 + 5 * (4 + 2 * 4))


# ---- agreement


def test_the_column_that_disagrees_is_named_and_the_others_are_not() -> None:
    results = {"a": [1.0, 2.0], "b": [1.0, 2.00001], "c": [1.0, 2.001]}
    assert disagreements(results) == {"c": "disagrees: 2.001, others 2.00001"}
    assert disagreements({"a": [1.0], "b": [1.1]}).keys() == {"a", "b"}
    assert disagreements({"a": [1.0], "b": [1.0], "c": [math.nan]}).keys() == {"c"}
    assert disagreements({"a": [1.0], "b": [1.0], "c": [1.0, 1.0]}).keys() == {"c"}
    assert disagreements({"a": [1.0]}) == disagreements({}) == {}


def test_long_arrays_by_hand_give_what_short_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers() -> list[list[float]]:
        peer = numpy_by_hand.NumPyByHand("eager", "cpu")
        net = {"widths": (8, 6, 6, 4), "batch": 4, "learning_rate": 1e-2}
        return [
            peer.mlp_step(**net, optimizer="adam").result(),
            peer.mlp_step(**net, optimizer="sgd").result(),
            peer.softmax_cross_entropy(10, 4).result(),
            peer.bias_relu(10, 4).result(),
            peer.adam_update(50).result(),
        ]

    whole = numbers()
    monkeypatch.setattr(numpy_by_hand, "BLOCK", 8)
    monkeypatch.setattr(numpy_by_hand, "THREADED", 16)
    assert numbers() == [pytest.approx(part, rel=1e-6) for part in whole]


# ---- peers that fail


def interpreter(folder: Path, program: str) -> str:
    """An executable that is started instead of a peer's interpreter."""
    path = folder / "interpreter"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import sys; sys.exit('no such library')", "exited with 1: no such library"),
        ("import os; os.abort()", "died of SIGABRT"),
        ("print('hello', flush=True); input()", "answered 'hello'"),
        ("import time; time.sleep(600)", "no answer within 1 s"),
        (None, "cannot start"),
    ],
)
def test_a_peer_that_fails_says_why_and_the_rest_goes_on(
    program: str | None, why: str, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, program) if program else str(tmp_path / "nothing")
    limit = 1.0 if program and "sleep" in program else 30.0
    settings = Settings(rounds=1, turn=0.001, limit=limit, pythons={"numpy": python})
    columns = [COLUMNS["numpy"], COLUMNS["numpy-by-hand"]]
    case = Case("tiny", "bias_relu", {"rows": 2, "columns": 3})
    suite = SUITES["steps"]
    said: list[str] = []
    if limit == 1.0:
        columns = columns[:1]  # the others may take longer than that to start
    cells, _ = run([(suite, [case])], columns, settings, said.append, lambda *_: None)
    assert cells[0].error is not None
    assert why in cells[0].error
    assert cells[0].median is None
    assert all(cell.median for cell in cells[1:])
    assert f"  {cells[0].error}" in tables.terminal(suite, cells)
    assert str(tmp_path) not in cells[0].error


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends them")
def test_no_process_is_left_when_the_benchmarks_are_killed() -> None:
    program = """
import os, signal
from benchmarks.peers import COLUMNS
from benchmarks.runner import Process, Settings
process = Process(COLUMNS["numpy"], Settings())
process.ask("versions")
print(process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    status = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(500):
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the process is still there")


def test_an_error_is_one_line_without_folders() -> None:
    error = ImportError("\n  /a/b/c.so: cannot open /x/y/lib.so.1\nmore")
    assert brief(error) == "ImportError: c.so: cannot open lib.so.1"
    assert brief("see https://example.org/a/b") == "see https://example.org/a/b"


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz"], "there is no suite 'stepz'; there are steps, kernels"),
        (["--peers", "keras"], "there is no peer 'keras'; there are torch, jax"),
        (["--peers", "tapegrad"], "there is no peer 'tapegrad'; there are torch"),
        (["--python", "jax"], "--python takes PEER=EXECUTABLE"),
        (["--keep", "--quick"], "--keep wants real sizes"),
        (["--compare", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_peer_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.installed", lambda module: module == "jax")
    assert main(["--peers", "torch", "--device", "cpu"]) == 2
    assert "torch is not installed; installed are jax" in capsys.readouterr().err
    assert main(["--peers", "all", "--list", "--device", "cpu"]) == 0
    assert "numpy, jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 0, "cells": []}', "has format 0, this version reads format 1"),
        ("[]", "has format None"),
        ("not JSON", "is no JSON file of results"),
        ('{"format": 1, "cells": [{"speed": 1}]}', "is not complete"),
        ('{"format": 1}', "is not complete"),
    ],
)
def test_a_file_of_another_version_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    assert main(["--compare", str(path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


# ---- comparison


def compared(tmp_path: Path, old: Results, new: Results, *arguments: str) -> int:
    old.save(tmp_path / "old.json")
    new.save(tmp_path / "new.json")
    files = ["--results", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json")]
    return main([*files, "--device", "cpu", *arguments])


def test_a_regression_over_the_limit_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = made_up(tapegrad=[1.0, 1.01, 1.02]), made_up(tapegrad=[1.2, 1.21, 1.22])
    assert compared(tmp_path, old, new) == 1
    assert "1.20  slower  steps: a case, tapegrad  over the limit" in capsys.readouterr().out
    assert compared(tmp_path, old, new, "--limit", "1.3") == 0
    assert compared(tmp_path, new, old) == 0
    assert "0.83  faster" in capsys.readouterr().out


def test_a_change_within_the_noise_is_none() -> None:
    old, new = made_up(tapegrad=[0.8, 1.0, 1.4]), made_up(tapegrad=[0.9, 1.25, 1.5])
    (change,) = compare(old, new)
    assert not change.beyond_noise
    assert regressions([change], 1.1) == []


def test_what_the_machine_changed_is_taken_out() -> None:
    old = made_up(tapegrad=[1.0, 1.0], numpy_by_hand=[1.0, 1.0], numpy=[2.0, 2.0])
    new = made_up(tapegrad=[2.0, 2.0], numpy_by_hand=[2.0, 2.0], numpy=[4.0, 4.0])
    changes = {change.cell.column: change for change in compare(old, new)}
    assert changes["tapegrad"].ratio == 1.0
    assert changes["numpy"].ratio == 2.0  # shown as it is, but no regression of ours
    assert regressions(changes.values(), 1.1) == []
    new.versions["numpy"] = "3.0"  # another NumPy is no yardstick
    assert regressions(compare(old, new), 1.1)[0].cell.column == "tapegrad"


# ---- tables and pages


def test_ratios_are_to_the_first_reference_that_has_a_result() -> None:
    cells = made_up(tapegrad=[2.0], numpy_by_hand=[1.0]).cells
    base = tables.reference(cells, ("numpy-by-hand", "tapegrad"))
    assert [tables.relative(cell, base) for cell in cells] == [2.0, 1.0]
    cells[1].fail("broken")
    assert tables.reference(cells, ("numpy-by-hand", "tapegrad")) is cells[0]


def test_a_clock_that_changes_between_rounds_does_not_change_ratios() -> None:
    # Of medians the ratio would be 3: the reference had three fast rounds, the other two of five.
    reference, other = made_up(
        numpy_by_hand=[1.0, 1.0, 1.0, 2.0, 2.0], tapegrad=[1.5, 1.5, 3.0, 3.0, 3.0]
    ).cells
    assert tables.relative(other, reference) == 1.5
    other.samples = [1.2, 1.2, 1.2]  # a slow column has fewer rounds: the first ones
    assert tables.relative(other, reference) == 1.2


def test_the_page_and_the_front_table_are_made_of_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = made_up(tapegrad=[2e-3, 2.2e-3], numpy_by_hand=[1e-3, 1e-3], jax=[])
    results.cells[2].fail("disagrees: 1, others 2")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.BEGIN}\nearlier\n{page.END}\nafter\n")
    page.keep(tmp_path, results)
    written = page.write(tmp_path)
    assert [path.name for path in written] == ["cpu-2-cores-steps.svg", "README.md", "README.md"]
    text = (tmp_path / "benchmarks" / "README.md").read_text()
    assert "**2.10**<br>2.10 ms ± 2 %" in text
    assert "1. JAX jit: disagrees: 1, others 2" in text
    assert "(results/cpu-2-cores-steps.svg)" in text
    assert "commit 0123456789ab" in text
    front = readme.read_text()
    assert front.startswith(f"before\n{page.BEGIN}\n")
    assert front.endswith(f"{page.END}\nafter\n")
    assert "| a case | 1.00 ms | **2.10** 2.10 ms |" in front
    assert "earlier" not in front


def test_suites_that_were_not_run_keep_their_results(tmp_path: Path) -> None:
    first = made_up(tapegrad=[1.0])
    first.cells.append(Cell("tape", "another", "tapegrad", samples=[3.0]))
    first.runs["tape"] = first.runs["steps"]
    path = page.keep(tmp_path, first)
    page.keep(tmp_path, made_up(tapegrad=[2.0]))
    found = {(cell.suite, cell.median) for cell in Results.load(path).cells}
    assert found == {("steps", 2.0), ("tape", 3.0)}


def test_all_pictures_can_be_drawn(quick: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.pictures import draw

    drawn = draw(Results.load(quick), tmp_path)
    assert set(drawn) == {"steps", "kernels", "scaling", "ops"}
    for path in drawn.values():
        assert path.read_text().startswith("<?xml")


def test_saved_results_come_back_as_they_were(tmp_path: Path) -> None:
    results = made_up(tapegrad=[0.123456789], numpy=[])
    results.cells[1].fail("why")
    results.save(tmp_path / "a.json")
    again = Results.load(tmp_path / "a.json")
    assert again.cells[0].samples == [0.123457]
    assert again.cells[1].error == "why"
    assert vars(again) | {"cells": 0} == vars(results) | {"cells": 0}
    assert json.loads((tmp_path / "a.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (1.234e-3, "s", "1.23 ms"),
        (9.996e-4, "s", "1.00 ms"),
        (45.67e-6, "s", "45.7 µs"),
        (250.0, "s", "250 s"),
        (6.45e8, "B", "645 MB"),
    ],
)
def test_numbers_have_three_digits(number: float, unit: str, text: str) -> None:
    assert amount(number, unit) == text


def test_ratios_have_two_decimals_where_it_matters() -> None:
    assert [ratio(x) for x in (0.994, 1.0, 12.34, 1234.5)] == ["0.99", "1.00", "12.3", "1,234"]


def test_an_exponent_is_a_slope_over_the_largest_sizes() -> None:
    points: list[Any] = [(x, 7 * x**1.5) for x in (4, 8, 16)]
    assert math.isclose(exponent(points), 1.5)
    assert math.isclose(exponent([(1, 1e9), *points]), 1.5)


TRITON = """
import numpy as np
from benchmarks.peers.numpy_by_hand import NumPyByHand
from benchmarks.peers.triton import Triton

for kind, sizes in [
    ("softmax_cross_entropy", {"rows": 7, "classes": 10}),
    ("softmax_cross_entropy", {"rows": 5, "classes": 33}),
    ("bias_relu", {"rows": 130, "columns": 9}),
    ("bias_relu", {"rows": 3, "columns": 1500}),
    ("adam_update", {"size": 3000}),
]:
    got, want = (getattr(p("eager", "cpu"), kind)(**sizes).result() for p in (Triton, NumPyByHand))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
assert Triton("eager", "cpu").copy(5000).result() == [1.0, 0.0]
"""


def test_triton_agrees_with_the_program_by_hand() -> None:
    """By its interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", TRITON], check=True, env=environment, timeout=300)
