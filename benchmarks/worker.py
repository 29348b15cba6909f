"""The process in which one peer runs: takes commands as lines of JSON, answers in the same way.

It needs only NumPy and the peer, so that a peer may have an interpreter of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import COLUMNS
from benchmarks.problems import Net
from benchmarks.words import brief


def main() -> None:
    """Answer commands until the input ends."""
    _end_with_parent()
    # Libraries print to standard output: the protocol keeps the real one for itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    worker = Worker(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": brief(error), "unsupported": type(error).__name__ == "Unsupported"}
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent is gone: stopped, it would stay for ever."""
    if sys.platform == "linux":
        set_signal_of_parents_death = 1
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)


class Worker:
    """One column; the peer is imported by the first command that needs it."""

    def __init__(self, column: str, device: str) -> None:
        self._column = COLUMNS[column]
        self._device = device
        self._peer: Any = None
        self._run: Callable[[], Any] | None = None

    def _load(self) -> Any:
        if self._peer is None:
            module = importlib.import_module(f"benchmarks.peers.{self._column.module}")
            self._peer = module.PEER(self._column.variant, self._device)
        return self._peer

    def versions(self) -> dict[str, Any]:
        """Import the peer and return the versions of its packages."""
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for package in self._load().packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # a checkout that is on the path, not installed
                module = importlib.import_module(package)
                found[package] = getattr(module, "__version__", "not known")
        return {"versions": found}

    def prepare(self, kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Build a case, run what is to be compared, and return its numbers."""
        prepared = self._build(kind, parameters)
        return {"result": prepared.result()}

    def _build(self, kind: str, parameters: dict[str, Any]) -> Any:
        peer = self._load()
        self.release()
        prepared = getattr(peer, kind)(**parameters)
        self._run = prepared.run
        return prepared

    def release(self) -> dict[str, Any]:
        """Forget the case."""
        self._run = None
        gc.collect()
        return {}

    def measure(self, runs: int, warm: int = 1) -> dict[str, Any]:
        """Time `runs` runs in a row, after some that are not counted; seconds for one."""
        from benchmarks.device import device_clock

        peer, run = self._peer, self._run
        assert run is not None
        for _ in range(warm):
            result = run()
        if warm:
            peer.wait(result)
        clock = device_clock(peer.clock)
        gc.disable()  # a collection falls where it likes
        try:
            if clock:
                clock.start()
            start = time.perf_counter()
            for _ in range(runs):
                result = run()
            if clock:
                clock.stop()
            peer.wait(result)
            wall = time.perf_counter() - start
        finally:
            gc.enable()
        return {"wall": wall / runs, "device": clock.seconds() / runs if clock else None}

    def cold(self, kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Time one run with nothing warm but the imports, and return its numbers."""
        prepared = self._build(kind, parameters)
        return self.measure(1, warm=0) | {"result": prepared.result()}

    def memory(self, kind: str, parameters: dict[str, Any], runs: int = 1) -> dict[str, Any]:
        """Return the peak of resident memory above what it was when the data were there."""
        peer, net = self._load(), Net(**parameters)
        assert net.data  # made before, and kept: the peer finds it
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        peer.watch_memory()
        prepared = getattr(peer, kind)(**parameters)
        result = prepared.result()
        for _ in range(runs):
            peer.wait(prepared.run())
        peak = _status("VmHWM") - before
        return {"bytes": peak, "device_bytes": peer.device_bytes(), "result": result}

    def startup(self) -> dict[str, Any]:
        """Return the seconds that the peer's import takes in a process that has NumPy already."""
        module = self._column.module if self._column.own else self._column.needs
        module = {"array_library": self._column.needs}.get(module, module)
        first = "" if module == "numpy" else ", numpy"
        code = (
            f"import time{first}; start = time.perf_counter(); import {module}; "
            "print(time.perf_counter() - start)"
        )
        # Twice: an installed package has its bytecode, a fresh checkout writes it the first time.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=environment
            )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return {"wall": float(done.stdout.split()[-1])}

    def size(self) -> dict[str, Any]:
        """Return the bytes on disk of the peer's packages and of all that they require."""
        sizes: dict[str, int] = {}
        for package in self._load().packages:
            _add_sizes(package, sizes)
        return {"bytes": sum(sizes.values())}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _add_sizes(package: str, sizes: dict[str, int]) -> None:
    from importlib.metadata import PackageNotFoundError, distribution

    key = re.sub(r"[-_.]+", "-", package).lower()
    if key in sizes:
        return
    if key == "tapegrad":  # a checkout has it beside it; an editable installation lists no files
        folder = Path(importlib.import_module(key).__file__ or "").parent
        walked = os.walk(folder, followlinks=True)
        files = [Path(at) / name for at, _, names in walked for name in names]
        requirements = []
    else:
        try:
            found = distribution(package)
        except PackageNotFoundError:  # required elsewhere, on another system
            return
        files = [Path(str(path.locate())) for path in found.files or []]
        requirements = found.requires or []
    sizes[key] = sum(p.stat().st_size for p in files if p.suffix != ".pyc" and p.is_file())
    for requirement in requirements:
        if "extra ==" not in requirement:
            _add_sizes(re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0], sizes)


if __name__ == "__main__":
    main()
