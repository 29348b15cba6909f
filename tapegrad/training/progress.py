"""The progress line of `fit`: one line that is written over while an epoch runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

_BAR = 20
_EVERY = 0.1  # seconds between two drawings: more often costs time and shows nothing


class Progress:
    """Shows how far an epoch is: a bar, counts, times, rate, and the numbers so far.

    verbose  0 shows nothing, 1 a line that is written over, 2 one line at the end of each epoch;
             "auto" is 1 on a terminal and 0 elsewhere.
    """

    def __init__(self, verbose: int | str, epochs: int, stream: TextIO | None = None) -> None:
        if verbose not in (0, 1, 2, "auto"):
            raise ValueError(f"verbose must be 0, 1, 2 or 'auto', got {verbose!r}")
        self._stream = sys.stderr if stream is None else stream
        if verbose == "auto":
            verbose = 1 if self._stream.isatty() else 0
        self._verbose = int(verbose)
        self._epochs = epochs
        self._drawn = 0  # the length of the line on the screen

    def begin(self, epoch: int, total: int | None, unit: str = "batch") -> None:
        """Begin an epoch of so many batches (None: not known)."""
        self._epoch, self._total, self._unit = epoch, total, unit
        self._start = self._last = time.perf_counter()

    def update(self, done: int, numbers: Callable[[], Mapping[str, float]]) -> None:
        """Show that so many batches are done; `numbers` is asked only when something is drawn."""
        now = time.perf_counter()
        if self._verbose == 1 and now - self._last >= _EVERY:
            self._last = now
            self._draw(done, numbers())

    def end(self, done: int, numbers: Mapping[str, float]) -> None:
        """Show the epoch's last line, and leave it on the screen."""
        if self._verbose == 1:
            self._draw(done, numbers)
            self._stream.write("\n")
        elif self._verbose == 2:
            self._stream.write(self._text(done, numbers, bar=False) + "\n")
        self._stream.flush()
        self._drawn = 0

    def say(self, text: str) -> None:
        """Write a line of its own, if anything is shown at all."""
        if self._verbose:
            self._stream.write(("\n" if self._drawn else "") + text + "\n")
            self._stream.flush()
            self._drawn = 0

    def _draw(self, done: int, numbers: Mapping[str, float]) -> None:
        # A line that wraps cannot be written over: the bar goes first, then what is too long.
        width = _width(self._stream) - 1
        text = self._text(done, numbers, bar=True)
        if len(text) > width:
            text = self._text(done, numbers, bar=False)[:width]
        self._stream.write("\r" + text + " " * (self._drawn - len(text)))
        self._stream.flush()
        self._drawn = len(text)

    def _text(self, done: int, numbers: Mapping[str, float], bar: bool) -> str:
        elapsed = time.perf_counter() - self._start
        rate = done / elapsed if elapsed > 0 else 0.0
        parts = [f"Epoch {self._epoch}/{self._epochs}"]
        left = ""
        if self._total:
            if bar:
                filled = min(_BAR, _BAR * done // self._total)
                parts.append(f"|{'█' * filled}{'·' * (_BAR - filled)}|")
            if done < self._total and rate > 0:
                left = f"<{_clock((self._total - done) / rate)}"
            parts.append(f"{done}/{self._total}")
        else:
            parts.append(f"{done} {self._unit}")
        parts.append(f"[{_clock(elapsed)}{left}, {rate:.4g} {self._unit}/s]")
        parts += [f"{name}={value:.4f}" for name, value in numbers.items()]
        return " ".join(parts)


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
