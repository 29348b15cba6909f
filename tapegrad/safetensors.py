"""Reading and writing the safetensors format: named arrays and text, and never any code."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from tapegrad._files import Source, atomic_write, open_source

DEFAULT_MAX_BYTES = 1 << 32

_METADATA = "__metadata__"
_MAX_HEADER = 10_000_000
_MAX_TENSORS = 100_000
# JSON takes about 100 bytes of memory for each of these characters; a tensor needs about nine.
_MAX_TOKENS = 1_000_000

# In the format's order of alignment: files are written from the last to the first, so that with
# the header padded to 8 bytes every array starts at a multiple of its item's size.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(_DTYPES)}


def save(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named arrays to a safetensors file, whole or not at all.

    Args:
        path: the file; what was there stays intact until the new one is complete on disk.
        arrays: NumPy arrays of any shape: bool, integers, float16/32/64, or ml_dtypes' bfloat16.
        metadata: text to keep beside them.

    Raises:
        TypeError: if an array is no NumPy array, has another dtype, or a text is no str.
        ValueError: if a name cannot be stored, or there are too many.
        OSError: if writing fails; the old file is untouched then.

    Format: https://huggingface.co/docs/safetensors: the header's length as 8 bytes, little-endian,
    a JSON header with dtype, shape and data_offsets of each array, the arrays' bytes.

    >>> import pathlib, tempfile
    >>> from tapegrad import safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "model.safetensors")
    ...     safetensors.save(path, {"bias": np.zeros(2)}, {"epoch": "3"})
    ...     safetensors.load(path)
    ({'bias': array([0., 0.])}, {'epoch': '3'})
    """
    header: dict[str, Any] = {}
    if metadata:
        for key, text in metadata.items():
            if not isinstance(key, str) or not isinstance(text, str):
                raise TypeError(f"[save] metadata must map str to str, got {key!r}: {text!r}")
        header[_METADATA] = dict(metadata)
    codes = {name: _code(name, array) for name, array in arrays.items()}
    names = sorted(arrays, key=lambda name: (-_RANKS[codes[name]], name))
    offset = 0
    for name in names:
        end = offset + arrays[name].nbytes
        header[name] = {
            "dtype": codes[name],
            "shape": list(arrays[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    try:
        encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"[save] a name or text holds half a character: {error}") from None
    if len(encoded) > _MAX_HEADER or len(names) > _MAX_TENSORS or _tokens(encoded) > _MAX_TOKENS:
        raise ValueError(
            f"[save] {len(names)} arrays and a header of {len(encoded)} bytes; "
            f"at most {_MAX_TENSORS} and {_MAX_HEADER} can be read again: use several files"
        )
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            array = arrays[name]
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)


def _code(name: str, array: NDArray[Any]) -> str:
    """The format's name for an array's dtype."""
    if not isinstance(name, str):
        raise TypeError(f"[save] names must be str, got {name!r}")
    if name == _METADATA:
        raise ValueError(f"[save] {_METADATA!r} is reserved by the format; rename the array")
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"[save] {name!r} must be a NumPy array, got {type(array).__name__}; "
            "convert it with np.asarray"
        )
    if array.dtype.name not in _CODES:
        raise TypeError(
            f"[save] {name!r} has dtype {array.dtype}; the format holds {', '.join(_CODES)}"
        )
    return _CODES[array.dtype.name]


def _tokens(header: bytes) -> int:
    return sum(header.count(mark) for mark in (b",", b"[", b"{"))


def load(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Reads a safetensors file, trusting nothing in it.

    The file is read, never mapped into memory: a mapped file that is replaced or lost on a network
    drive changes or kills the program later.

    Args:
        path: the file.
        max_bytes: the most bytes that all arrays together may take.

    Returns:
        The arrays by name, in the header's order, writable; and the metadata.

    Raises:
        FormatError: if the file is malformed, truncated or too large.
        FileNotFoundError: if there is no such file.
        ImportError: if it holds bfloat16 and ml_dtypes is not installed.

    >>> import pathlib, tempfile
    >>> from tapegrad import safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "model.safetensors")
    ...     safetensors.save(path, {"weight": np.ones((1, 2), np.float32), "steps": np.array(7)})
    ...     safetensors.load(path)[0]
    {'steps': array(7), 'weight': array([[1., 1.]], dtype=float32)}
    """
    with open_source(path) as source:
        (header_size,) = struct.unpack("<Q", source.take(8, "the header's length"))
        if header_size > _MAX_HEADER:
            source.fail(f"a header of {header_size} bytes; at most {_MAX_HEADER} are read", at=0)
        header = _parse_header(source, source.take(header_size, "the header"))
        metadata = header.pop(_METADATA, {})
        if not (type(metadata) is dict and all(type(text) is str for text in metadata.values())):
            source.fail(f"{_METADATA} must map text to text", at=8)
        if len(header) > _MAX_TENSORS:
            source.fail(f"{len(header)} arrays; at most {_MAX_TENSORS} are read", at=8)
        entries = {name: _check_entry(source, name, entry) for name, entry in header.items()}
        data_bytes = source.stored - 8 - header_size
        tiles = _check_tiling(source, entries, data_bytes)
        if data_bytes > max_bytes:
            source.fail(
                f"{data_bytes} bytes of data, more than max_bytes={max_bytes}; "
                "pass a larger max_bytes if you trust the file"
            )
        arrays = {
            name: source.read_array(entries[name].shape, entries[name].dtype) for name in tiles
        }
        return {name: arrays[name] for name in entries}, metadata


class _Entry(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _parse_header(source: Source, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        source.fail(f"not a safetensors file: the header starts with {text[:1]!r}, not '{{'", at=8)
    if _tokens(text) > _MAX_TOKENS:
        source.fail(f"a header of more than {_MAX_TOKENS} items", at=8)
    try:
        header: dict[str, Any] = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    # ValueError: bad UTF-8, bad JSON, integers of above 4,300 digits, and the two hooks below.
    except (ValueError, RecursionError) as error:
        source.fail(f"unreadable header ({error})", at=8)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} occurs twice")
        # JSON can spell half a character, which no program can print or store: encode() refuses.
        for part in (key, value):
            if isinstance(part, str):
                part.encode()
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_entry(source: Source, name: str, entry: Any) -> _Entry:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        source.fail(f"{name!r} must give dtype, shape and data_offsets and nothing else", at=8)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in _DTYPES:
        source.fail(f"{name!r} has the unknown dtype {code!r}", at=8)
    for field in (shape, offsets):
        # bool is an int to Python, and 1.0 equals 1: neither is a size.
        if type(field) is not list or not all(type(n) is int and n >= 0 for n in field):
            source.fail(f"{name!r} has a shape or data_offsets that is no list of sizes", at=8)
    if len(offsets) != 2:
        source.fail(f"{name!r} has {len(offsets)} data_offsets, not 2", at=8)
    dtype = _dtype(code)
    nbytes = source.array_bytes(tuple(shape), dtype.itemsize)
    if offsets[1] - offsets[0] != nbytes:
        source.fail(
            f"{name!r} of shape {shape} and dtype {code} takes {nbytes} bytes, "
            f"its data_offsets are {offsets}",
            at=8,
        )
    return _Entry(dtype, tuple(shape), *offsets)


def _dtype(code: str) -> np.dtype[Any]:
    if code == "BF16":
        try:
            dtype: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
        except ImportError as error:
            raise ImportError(
                "the file holds bfloat16, which NumPy reads with ml_dtypes: pip install ml_dtypes"
            ) from error
        return dtype
    return np.dtype(_DTYPES[code]).newbyteorder("<")


def _check_tiling(source: Source, entries: dict[str, _Entry], data_bytes: int) -> list[str]:
    """The names in the order of their data, which must fill the file without gap or overlap."""
    names = sorted(entries, key=lambda name: entries[name][2:])
    end = 0
    for name in names:
        if entries[name].begin != end:
            source.fail(
                f"{name!r} starts at data byte {entries[name].begin}, "
                f"but the data before it ends at {end}",
                at=8,
            )
        end = entries[name].end
    source.check_rest(end)
    return names
