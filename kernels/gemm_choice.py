"""Which way a product takes: candidates timed on the device, the times kept in a file."""

from __future__ import annotations

import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from tapegrad._files import atomic_write

from . import cublaslt
from ._build import Module

_FORMAT = 2  # 1: before our own kernels for small matrices were among the ways
_CLOSE = 1.2  # a candidate this much slower than the best is not timed again
_ROUNDS = 3


class Timed(NamedTuple):
    """The best of one way's candidates."""

    seconds: float
    algorithm: bytes = b""  # of cuBLASLt; empty where the way is CuPy's or our own
    workspace: int = 0  # bytes


class Candidate(NamedTuple):
    """One way with one algorithm, ready to run."""

    way: str
    run: Callable[[], object]
    algorithm: bytes = b""
    workspace: int = 0


def measure(
    candidates: Iterable[Candidate], timer: Callable[[Callable[[], object]], float]
) -> dict[str, Timed]:
    """Return for each way its fastest candidate; those that the library refuses are left out."""
    times: list[tuple[float, Candidate]] = []
    for candidate in candidates:
        try:
            candidate.run()  # what is built at first use is not timed
            times.append((timer(candidate.run), candidate))
        except cublaslt.CublasLtError:
            continue
    for _ in range(_ROUNDS - 1):
        limit = _CLOSE * min((seconds for seconds, _ in times), default=0.0)
        times = [
            (min(seconds, timer(candidate.run)) if seconds <= limit else seconds, candidate)
            for seconds, candidate in times
        ]
    best: dict[str, Timed] = {}
    for seconds, (way, _, algorithm, workspace) in times:
        if way not in best or seconds < best[way].seconds:
            best[way] = Timed(seconds, algorithm, workspace)
    return best


class DeviceTimer:
    """Times what runs on the current stream, by events.

    A launch from Python takes longer than a small product. So the stream is first given enough to
    do that the launches queue up behind it, and the device runs them without gaps.
    """

    _REPEATS = 10
    _LEAD = 0.5e-3  # seconds of other work, for Python to make that many launches in
    _BALLAST = 1 << 26  # bytes to fill: a launch of this takes far longer than to make it

    def __init__(self, xp: Module) -> None:
        self._cuda = xp.cuda
        self._ballast = xp.empty(self._BALLAST, "u1")
        self._fills = 1
        self._fill()
        once = self._between(self._fill)
        self._fills = max(1, math.ceil(self._LEAD / once))

    def _fill(self) -> None:
        for _ in range(self._fills):
            self._ballast.data.memset_async(0, self._BALLAST)

    def _between(self, work: Callable[[], object]) -> float:
        start, end = self._cuda.Event(), self._cuda.Event()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(self._cuda.get_elapsed_time(start, end)) * 1e-3

    def __call__(self, run: Callable[[], object]) -> float:
        """Return the seconds that one `run` takes on the device."""

        def repeat() -> None:
            for _ in range(self._REPEATS):
                run()

        self._fill()
        once = self._between(run)
        if once > self._LEAD:  # long enough to be measured alone
            return once
        self._fill()
        return self._between(repeat) / self._REPEATS


def scratch_memory(xp: Module) -> AbstractContextManager[Any]:
    """Let what is made in a `with` block lie in a pool that goes back to the device after it.

    The pool in use may be a captured graph's own, which keeps for good whatever it has once had.
    """
    manager: AbstractContextManager[Any] = xp.cuda.using_allocator(xp.cuda.MemoryPool().malloc)
    return manager


def folder() -> str:
    """Return where times are kept: `TAPEGRAD_CACHE`, else ~/.cache/tapegrad."""
    return os.environ.get("TAPEGRAD_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "tapegrad"
    )


class Times:
    """The times of one device's problems, in memory and in a file that processes share.

    A file that is not what this class wrote for this device is ignored, with one warning, and
    written anew. So is a folder that cannot be written.
    """

    def __init__(self, device: dict[str, str]) -> None:
        """Read what is known of a device, told by its name and the versions of what runs on it."""
        self._device = device
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(device.values()))
        self.path = os.path.join(folder(), f"gemm-{name}.json")
        self._lock = threading.Lock()
        self._warned = False
        self._times = self._read()

    def get(self, problem: str) -> dict[str, Timed] | None:
        """Return the times of each way that was timed for a problem, or None."""
        return self._times.get(problem)

    def put(self, problem: str, times: dict[str, Timed]) -> None:
        """Keep the times of a problem."""
        with self._lock:
            self._times[problem] = times
            # What other processes have timed meanwhile stays.
            self._times = self._read() | self._times
            self._write()

    def drop(self, problem: str, why: str) -> None:
        """Forget the times of a problem, which are not this device's."""
        self._times.pop(problem, None)
        self._warn(f"what it holds for {problem} is not of this device: {why}")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the file of timed products {self.path} is not used ({problem}): "
                "each process times them again",
                RuntimeWarning,
                stacklevel=2,
            )

    def _read(self) -> dict[str, dict[str, Timed]]:
        import json

        try:
            with open(self.path, encoding="utf-8") as file:
                found = json.load(file)
            return self._checked(found)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._warn(str(error))
            return {}

    def _checked(self, found: Any) -> dict[str, dict[str, Timed]]:
        head = {"format": _FORMAT, "device": self._device}
        if not isinstance(found, dict) or {key: found.get(key) for key in head} != head:
            raise ValueError("it was written for another device or by another version")
        problems: Any = found.get("problems")
        try:
            return {
                problem: {way: _timed(entry) for way, entry in ways.items()}
                for problem, ways in problems.items()
            }
        except (AttributeError, TypeError, ValueError):
            raise ValueError("its entries are damaged") from None

    def _write(self) -> None:
        import json

        problems = {
            problem: {way: [t.seconds, t.algorithm.hex(), t.workspace] for way, t in ways.items()}
            for problem, ways in self._times.items()
        }
        content = {"format": _FORMAT, "device": self._device, "problems": problems}
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(content, indent=1).encode())
        except OSError as error:
            self._warn(str(error))


def _timed(entry: Any) -> Timed:
    seconds, algorithm, workspace = entry
    made = Timed(float(seconds), bytes.fromhex(algorithm), workspace)
    right = (
        0 < made.seconds < math.inf
        and len(made.algorithm) in (0, cublaslt.ALGORITHM_BYTES)
        and type(workspace) is int
        and workspace >= 0
    )
    if not right:
        raise ValueError
    return made
