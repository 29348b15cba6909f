"""Readers of untrusted IDX and CSV files at bounded memory."""

from __future__ import annotations

import csv
import os
import re
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from tapegrad._files import DEFAULT_MAX_BYTES, Source, check_size, open_source
from tapegrad.errors import FormatError

_MAX_LINE = 1 << 20
_CHUNK = 1 << 18

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> NDArray[np.generic]:
    """Reads an IDX file, the format of MNIST, plain or gzipped.

    Args:
        path: the file; gzip is recognised by its content, not by its name.
        max_bytes: the most bytes that the array may take.

    Returns:
        An array of the file's shape; uint8, int8, int16, int32, float32 or float64 in native order.

    Raises:
        FormatError: if the file is not exactly one well-formed array, or too large.
        FileNotFoundError: if there is no such file.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "labels-idx1-ubyte")
    ...     _ = path.write_bytes(b"\\0\\0\\x08\\x01" + b"\\0\\0\\0\\x03" + b"\\x07\\x02\\x01")
    ...     tg.data.read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    with open_source(path) as source:
        if source.file.peek(2)[:2] == b"\x1f\x8b":
            source = Source(source.file, source.name, 0, source.stored, length=None, wbits=31)
        magic = source.take(4, "the IDX magic number")
        if magic[:2] != b"\0\0":
            source.fail(f"not an IDX file: starts with {magic[:2].hex(' ')}, not 00 00", at=0)
        if magic[2] not in _IDX_DTYPES:
            known = ", ".join(f"{code:#04x}" for code in _IDX_DTYPES)
            source.fail(f"unknown IDX type {magic[2]:#04x}; known are {known}", at=2)
        dtype = np.dtype(_IDX_DTYPES[magic[2]])
        rank = magic[3]
        shape = struct.unpack(f">{rank}I", source.take(4 * rank, f"a shape of {rank} axes"))
        nbytes = source.array_bytes(shape, dtype.itemsize)
        source.check_rest(nbytes)
        check_size(source, nbytes, max_bytes)
        result = source.read_array(shape, dtype)
        source.finish()
        return result


class Table(NamedTuple):
    """What `read_csv` returns: features (rows, columns), labels (rows,) and the class names."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]


def read_csv(
    path: str | os.PathLike[str],
    *,
    label_column: int | str | None = "last",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Table:
    """Reads a comma-separated table of numbers with one column of labels.

    The first line is a header if none of its feature cells is a number. Each record is one line of
    UTF-8; blank lines are skipped; nan and inf are numbers, an empty cell is not.

    Args:
        path: the file.
        label_column: "last", "first", an index, the name of a column (then there must be a
            header), or None: every column is a feature.
        max_bytes: the most bytes that the result may take.

    Returns:
        `Table(features, labels, classes)`: float32 features of shape (rows, columns). Integer
        labels are int64 and `classes` is empty; text labels are int64 codes into the sorted
        `classes`. Without a label column, labels is None.

    Raises:
        FormatError: naming the line, if the file is malformed or too large.
        FileNotFoundError: if there is no such file.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "points.csv")
    ...     _ = path.write_text("x,y,kind\\n1,2,out\\n3,4.5,in\\n")
    ...     table = tg.data.read_csv(path)
    >>> table.features
    array([[1. , 2. ],
           [3. , 4.5]], dtype=float32)
    >>> table.labels, table.classes
    (array([1, 0]), ('in', 'out'))
    """
    with open_source(path) as source:
        rows = _csv_rows(source)
        first = next(rows, None)
        if first is None:
            _fail_line(source, 1, "no data in the file")
        width = len(first.cells)
        label = _label_index(source, first, label_column)
        if width == (label is not None):
            _fail_line(source, first.line, "no feature columns; cells are separated by commas")
        builder = _TableBuilder(source, width, label, max_bytes)
        named = isinstance(label_column, str) and label_column not in ("first", "last")
        if not named and any(_is_number(c) for i, c in enumerate(first.cells) if i != label):
            builder.add(first)
        for row in rows:
            builder.add(row)
        return builder.table()


class _Row(NamedTuple):
    line: int
    cells: list[str]
    plain: bool


def _fail_line(source: Source, line: int, what: str) -> NoReturn:
    raise FormatError(f"{source.name}: line {line}: {what}")


def _csv_rows(source: Source) -> Iterator[_Row]:
    line = 0
    while data := source.file.readline(_MAX_LINE + 1):
        line += 1
        if len(data) > _MAX_LINE:
            _fail_line(source, line, f"longer than {_MAX_LINE} bytes")
        try:
            text = data.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
            if not text.strip():
                continue
            # A reader of one line: a quoted cell that runs on would take the whole file with it.
            cells = next(csv.reader((text,), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            _fail_line(source, line, f"not one record of UTF-8 text ({error})")
        yield _Row(line, cells, plain="_" not in text and text.isascii())


def _strict_float(cell: str) -> float:
    """A number as other programs write it; Python also takes 1_000 and other scripts' digits."""
    if "_" in cell or not cell.isascii():
        raise ValueError(f"could not convert string to float: {cell!r}")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        _strict_float(cell)
    except ValueError:
        return False
    return True


def _label_index(source: Source, first: _Row, label_column: int | str | None) -> int | None:
    width = len(first.cells)
    if label_column is None:
        return None
    if isinstance(label_column, str):
        if label_column in ("first", "last"):
            return 0 if label_column == "first" else width - 1
        names = [cell.strip() for cell in first.cells]
        if names.count(label_column) != 1:
            _fail_line(
                source,
                first.line,
                f"{names.count(label_column)} columns are called {label_column!r} in {names[:20]}",
            )
        return names.index(label_column)
    if not -width <= label_column < width:
        _fail_line(source, first.line, f"no column {label_column}, there are {width}")
    return label_column % width


_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)  # 18 digits always fit an int64


class _TableBuilder:
    def __init__(self, source: Source, width: int, label: int | None, max_bytes: int) -> None:
        self._source = source
        self._width = width
        self._label = label
        self._max_bytes = max_bytes
        self._used = 0
        self._features = array("f")
        # Cells wait here as float64, so that NumPy narrows and checks many at once.
        self._block = array("d")
        self._block_lines: list[int] = []
        self._codes = array("q")
        self._code_of: dict[str, int] = {}
        self._first_line: list[int] = []

    def add(self, row: _Row) -> None:
        if len(row.cells) != self._width:
            self._fail(row.line, f"{len(row.cells)} cells, {self._width} in the lines before")
        self._charge(row.line, 4 * len(row.cells) + 8)
        if self._label is not None:
            self._add_label(row.line, row.cells.pop(self._label).strip())
        try:
            self._block.extend(map(float if row.plain else _strict_float, row.cells))
        except ValueError:
            cell = next(cell for cell in row.cells if not _is_number(cell))
            self._fail(row.line, f"{cell[:40]!r} is not a number")
        self._block_lines.append(row.line)
        if len(self._block) >= _CHUNK // 8:
            self._narrow_block()

    def _fail(self, line: int, what: str) -> NoReturn:
        _fail_line(self._source, line, what)

    def _charge(self, line: int, nbytes: int) -> None:
        self._used += nbytes
        if self._used > self._max_bytes:
            self._fail(
                line,
                f"the table takes more than max_bytes={self._max_bytes}; "
                "pass a larger max_bytes if you trust the file",
            )

    def _add_label(self, line: int, name: str) -> None:
        if not name:
            self._fail(line, "the label is empty")
        code = self._code_of.setdefault(name, len(self._code_of))
        if code == len(self._first_line):
            self._first_line.append(line)
            self._charge(line, sys.getsizeof(name) + 128)  # 128: its places in dict and list
        self._codes.append(code)

    def _narrow_block(self) -> None:
        wide = np.frombuffer(self._block, np.float64).reshape(len(self._block_lines), -1)
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        overflowed = (np.isinf(narrow) & np.isfinite(wide)).any(axis=1)
        if overflowed.any():
            self._fail(self._block_lines[int(overflowed.argmax())], "a number beyond float32")
        self._features.frombytes(narrow.tobytes())
        self._block, self._block_lines = array("d"), []

    def table(self) -> Table:
        if self._block_lines:
            self._narrow_block()
        if not self._features:
            self._fail(1, "no data, only a header")
        width = self._width - (self._label is not None)
        features = np.frombuffer(self._features, np.float32).reshape(-1, width)
        if self._label is None:
            return Table(features, None, ())
        values, classes = self._label_values(list(self._code_of))
        return Table(
            features, np.array(values, np.int64)[np.frombuffer(self._codes, np.int64)], classes
        )

    def _label_values(self, names: list[str]) -> tuple[list[int], tuple[str, ...]]:
        """The integer for each distinct label, in order of appearance, and the class names."""
        if all(map(_INTEGER.fullmatch, names)):
            return [int(name) for name in names], ()
        if all(map(_is_number, names)):
            code = next(i for i, name in enumerate(names) if not _INTEGER.fullmatch(name))
            self._fail(
                self._first_line[code],
                f"the label {names[code][:40]!r} is a number, but no integer of up to 18 digits; "
                "read targets with label_column=None",
            )
        classes = tuple(sorted(names))
        rank = {name: code for code, name in enumerate(classes)}
        return [rank[name] for name in names], classes
