"""Timing candidates and keeping the times: a fake clock, real files."""

from __future__ import annotations

import json
import os
import types
import warnings
from pathlib import Path

import pytest
from cublaslt_emulation import FakeCublasLt, cublaslt_on_cpu, fake

import tapegrad as tg
from tapegrad.kernels import gemm, gemm_choice
from tapegrad.kernels.cublaslt import CublasLtError
from tapegrad.kernels.gemm_choice import Candidate, DeviceTimer, Timed, Times
from tests.fake_cupy import FakeCupy
from tests.kernels.test_gemm import CUPY, LAYER, PLAIN, chosen, timed

DEVICE = {"gpu": "NVIDIA H200", "driver": "13000", "cublaslt": "131000"}
BLOB = bytes(range(64))
ENTRY = {"plain": Timed(2e-6, BLOB, 1024), "cupy": Timed(3e-6)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "of tapegrad"
    monkeypatch.setenv("TAPEGRAD_CACHE", str(folder))
    return folder


# ---- measuring


class Clock:
    """Each candidate takes the times of a list in turn, the last again and again."""

    def __init__(self, **times):
        self.times = {name: list(values) for name, values in times.items()}
        self.asked: list[str] = []

    def candidate(self, way, name):
        return Candidate(way, lambda: name, name.encode(), len(name))

    def __call__(self, run):
        name = run()
        self.asked.append(name)
        times = self.times[name]
        return times.pop(0) if len(times) > 1 else times[0]


def test_each_way_has_its_best_time():
    clock = Clock(a=[5, 3, 4], b=[4, 5, 6], c=[4.5, 3.5, 3.4], d=[9])
    ways = {"a": "plain", "b": "plain", "c": "fused", "d": "cupy"}
    found = gemm_choice.measure((clock.candidate(way, n) for n, way in ways.items()), clock)
    assert found == {
        "plain": Timed(4, b"b", 1),  # a, at 5, was too far behind 4 to be asked again
        "fused": Timed(3.4, b"c", 1),
        "cupy": Timed(9, b"d", 1),
    }
    assert clock.asked == ["a", "b", "c", "d", "b", "c", "b", "c"]


def test_what_is_refused_is_left_out():
    def refuse():
        raise CublasLtError("no")

    clock = Clock(a=[1])
    found = gemm_choice.measure([Candidate("fused", refuse), clock.candidate("plain", "a")], clock)
    assert found == {"plain": Timed(1, b"a", 1)}
    assert gemm_choice.measure([], clock) == {}


class Device:
    """A stand-in for a stream: a clock that what runs moves on; Python's own time is not on it."""

    def __init__(self, fill):
        self.now, self.fill, self.fills = 0.0, fill, 0
        self.cuda = types.SimpleNamespace(
            Event=lambda: Event(self), get_elapsed_time=lambda a, b: (b.at - a.at) * 1e3
        )

    def empty(self, size, dtype):
        def memset_async(value, count):
            assert count == size
            self.now += self.fill
            self.fills += 1

        return types.SimpleNamespace(data=types.SimpleNamespace(memset_async=memset_async))


class Event:
    def __init__(self, device):
        self.device, self.at, self.done = device, None, False

    def record(self):
        self.at = self.device.now

    def synchronize(self):
        self.done = True


@pytest.mark.parametrize(("seconds", "runs"), [(5e-6, 11), (36e-3, 1)])
def test_the_device_timer(seconds, runs):
    device, ran = Device(fill=16e-6), []

    def run():
        device.now += seconds
        ran.append(device.now)

    timer = DeviceTimer(device)
    assert device.fills == 2  # the first to get ready, the second timed
    assert timer(run) == pytest.approx(seconds)
    assert len(ran) == runs
    lead = -(-0.5e-3 // 16e-6)  # so many fills keep the device busy for half a millisecond
    assert device.fills == 2 + lead * (1 if runs == 1 else 2)


# ---- the file


def test_times_are_found_again(cache):
    times = Times(DEVICE)
    assert times.get("problem") is None
    times.put("problem", ENTRY)
    assert times.get("problem") == ENTRY
    again = Times(DEVICE)
    assert again.path == str(cache / "gemm-NVIDIA-H200-13000-131000.json")
    assert again.get("problem") == ENTRY
    assert again.get("another") is None
    assert [path.name for path in cache.iterdir()] == [os.path.basename(again.path)]


@pytest.mark.parametrize("part", DEVICE)
def test_another_device_has_another_file(cache, part):
    Times(DEVICE).put("problem", ENTRY)
    other = Times(DEVICE | {part: "other"})
    assert other.get("problem") is None
    other.put("problem", ENTRY)
    assert len(list(cache.iterdir())) == 2


def test_processes_keep_each_others_times(cache):
    first, second = Times(DEVICE), Times(DEVICE)
    first.put("a", ENTRY)
    second.put("b", {"cupy": Timed(1e-6)})
    first.put("c", ENTRY)
    assert {p for p in "abc" if Times(DEVICE).get(p)} == {"a", "b", "c"}
    assert first.get("b") == {"cupy": Timed(1e-6)}


def written(content):
    return lambda path: path.write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


def file_of(**problems):
    return {"format": 2, "device": DEVICE, "problems": problems}


DAMAGED = {
    "empty": written(""),
    "half": written('{"format": 2, "dev'),
    "no object": written([1, 2]),
    "another format": written(file_of() | {"format": 1}),
    "another device": written(file_of() | {"device": DEVICE | {"gpu": "NVIDIA A100"}}),
    "no problems": written({"format": 2, "device": DEVICE}),
    "problems are a list": written(file_of() | {"problems": [1]}),
    "ways are a number": written(file_of(problem=1)),
    "an entry too short": written(file_of(problem={"plain": [1.0]})),
    "no time": written(file_of(problem={"plain": ["soon", "", 0]})),
    "a negative time": written(file_of(problem={"plain": [-1.0, "", 0]})),
    "no number": written(file_of(problem={"plain": [float("nan"), "", 0]})),
    "a short algorithm": written(file_of(problem={"plain": [1.0, "00ff", 0]})),
    "no hexadecimal": written(file_of(problem={"plain": [1.0, "x" * 128, 0]})),
    "a negative workspace": written(file_of(problem={"plain": [1.0, "", -1]})),
    "half a byte of workspace": written(file_of(problem={"plain": [1.0, "", 0.5]})),
    "a workspace in text": written(file_of(problem={"plain": [1.0, "", "1"]})),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "deep": written("[" * 100_000),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning(cache, name):
    cache.mkdir(parents=True)
    path = cache / "gemm-NVIDIA-H200-13000-131000.json"
    DAMAGED[name](path)
    with warnings.catch_warnings(record=True, action="always") as caught:
        times = Times(DEVICE)
        assert times.get("problem") is None
        times.put("problem", ENTRY)
        times.put("another", ENTRY)
        assert times.get("problem") == ENTRY
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert str(caught[0].message).startswith(f"the file of timed products {path} is not used (")
    if path.is_file():  # written anew
        assert Times(DEVICE).get("problem") == ENTRY


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX file system")
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAPEGRAD_CACHE", str(tmp_path / "file" / "folder"))
    with warnings.catch_warnings(record=True, action="always") as caught:
        times = Times(DEVICE)
        times.put("problem", ENTRY)
        times.put("another", ENTRY)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert times.get("problem") == ENTRY  # in this process


def test_where_times_are_kept(monkeypatch):
    monkeypatch.setenv("TAPEGRAD_CACHE", "/somewhere")
    assert gemm_choice.folder() == "/somewhere"
    for value in ("", None):
        monkeypatch.setenv("TAPEGRAD_CACHE", "")
        if value is None:
            monkeypatch.delenv("TAPEGRAD_CACHE")
        assert gemm_choice.folder() == str(Path.home() / ".cache" / "tapegrad")


# ---- the file and the launchers


def run_with(folder, made, **seconds):
    """Return what a matmul launches in a new process, whose clock says other times."""
    xp = FakeCupy()
    with cublaslt_on_cpu(xp, folder, made, seconds=timed(**seconds)):
        return chosen(xp, made, gemm.matmul, LAYER[:2])[0]


def test_a_later_process_takes_the_times_of_an_earlier(tmp_path):
    made = FakeCublasLt()
    assert run_with(tmp_path, made, plain=[3, 1, 2], cupy=[9]) == [(PLAIN, 1)]
    assert len(made.timer.timed) > 0
    made = FakeCublasLt()
    assert run_with(tmp_path, made, plain=[1, 3, 3], cupy=[9]) == [(PLAIN, 1)]
    assert made.timer.timed == []
    made = FakeCublasLt(version=131100)  # another library: timed anew
    assert run_with(tmp_path, made, plain=[1, 3, 3], cupy=[9]) == [(PLAIN, 0)]


@pytest.mark.parametrize(
    "change",
    [
        lambda ways: ways["plain"].__setitem__(1, "07" * 64),  # an algorithm it does not know
        lambda ways: ways["plain"].__setitem__(2, 0),  # less workspace than it needs
        lambda ways: ways["plain"].__setitem__(2, 1 << 40),
        lambda ways: ways["plain"].__setitem__(1, ""),
        lambda ways: ways["plain"].__setitem__(slice(1, 3), ["0102" + "00" * 62, 2048]),
        lambda ways: ways.__setitem__("other", ways["plain"]),
    ],
)
def test_algorithms_of_a_foreign_file_are_not_launched(tmp_path, change):
    seconds = {"plain": [3, 1, 2], "cupy": [9]}
    run_with(tmp_path, FakeCublasLt(), **seconds)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    (ways,) = content["problems"].values()
    change(ways)
    path.write_text(json.dumps(content))
    made = FakeCublasLt()
    made.known = {bytes([PLAIN, i] + [0] * 62) for i in range(3)}
    made.unusable = {2}
    with pytest.warns(RuntimeWarning, match="is not of this device"):
        assert run_with(tmp_path, made, **seconds) == [(PLAIN, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_with(tmp_path, made, **seconds) == [(PLAIN, 1)]  # timed anew and written


def test_the_way_of_cupy_is_kept_too(tmp_path):
    assert run_with(tmp_path, FakeCublasLt(), plain=[3, 2, 4], cupy=[1]) == []
    made = FakeCublasLt()
    assert run_with(tmp_path, made, plain=[1, 1, 1], cupy=[2]) == []
    assert made.timer.timed == []


def test_problems_have_names_of_their_own(tmp_path, monkeypatch):
    """Whatever changes what cuBLASLt is asked for changes the name."""
    xp = FakeCupy()
    x, w, b = LAYER
    with cublaslt_on_cpu(xp, tmp_path) as made:
        seen = set()
        for launcher, arrays in [
            (gemm.matmul, (x, w)), (gemm.linear, (x, w, b)), (gemm.matmul, (x[:2], w)),
            (gemm.matmul, (x, w.T.copy().T)), (gemm.matmul, (x.T.copy().T, w)),
            (gemm.matmul, (x.astype("f2"), w.astype("f2"))), (gemm.matmul, (x, w[:, :3])),
            (gemm.matmul, (x[None, :, :].repeat(2, 0), w[None].repeat(2, 0))),
        ]:  # fmt: skip
            launcher(xp, *map(fake, arrays))
            (path,) = tmp_path.iterdir()
            names = set(json.loads(path.read_text())["problems"])
            assert len(names - seen) == 1
            seen = names
        assert (CUPY, 0) in made.timer.timed
        monkeypatch.setattr(tg.config, "tf32", True)
        gemm.matmul(xp, fake(x), fake(w))
        assert len(set(json.loads(path.read_text())["problems"]) - seen) == 1
