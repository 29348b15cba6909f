"""Numbers and errors in few words."""

from __future__ import annotations

import math
import re


def without_folders(text: str) -> str:
    """Return the text with each absolute path cut to its last part."""
    return re.sub(r"(?<![\w.:/])(/[^\s/'\",:;]+)+/", "", text)


def brief(error: BaseException | str) -> str:
    """Return an error as one short line that says nothing about this machine's folders."""
    text, kind = str(error), ""
    if isinstance(error, BaseException) and type(error).__name__ != "Unsupported":
        kind = type(error).__name__ + ": " * bool(text)
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return (kind + without_folders(line))[:160]


def amount(value: float, unit: str) -> str:
    """Return seconds or bytes to three digits: 1.23 ms, 45.6 MB."""
    if unit == "B":
        steps = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")]
    else:
        steps = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")]
    size, name = next(((s, n) for s, n in steps if abs(value) >= s * 0.9995), steps[-1])
    return f"{three_digits(value / size)} {name}"


def three_digits(value: float) -> str:
    """Return a number to three significant digits, without an exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    value = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ratio(value: float) -> str:
    """Return a ratio: two decimals where it is near 1, fewer where it is large."""
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
