"""The exception and warning classes of tapegrad, beyond Python's own."""

from __future__ import annotations


class FormatError(ValueError):
    """A file does not hold what its format promises; the message names the file and the offset."""


class FunctionError(RuntimeError):
    """A function cannot be compiled: the message names the line, the reason and the remedy."""


class TapeWarning(UserWarning):
    """Something about a tape is legal but probably not what was meant."""
