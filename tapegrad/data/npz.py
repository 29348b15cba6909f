"""The reader of NPZ archives: zip and array headers are checked before NumPy sees any of them."""

from __future__ import annotations

import os
import re
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapegrad._files import DEFAULT_MAX_BYTES, Source, check_size, open_source

# np.load reads a 512 MiB header before refusing it (1 GiB of memory, 14 s); a real one has 128.
_MAX_NPY_HEADER = 1 << 16
_MAX_MEMBERS = 10_000
_MAX_DIRECTORY = 4 << 20

_NPY_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16)")


def read_npz(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> dict[str, NDArray[Any]]:
    """Reads the arrays of an .npz file, without NumPy's loader and without pickle.

    Args:
        path: the file, as `numpy.savez` or `numpy.savez_compressed` writes it.
        max_bytes: the most bytes that all members together may take, their headers included.

    Returns:
        The arrays by name, in the archive's order: booleans, integers, floats and complex numbers.

    Raises:
        FormatError: if the archive, a header or the data is malformed, untrue or too large, or if
            an array holds Python objects, structures or text.
        FileNotFoundError: if there is no such file.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "arrays.npz")
    ...     np.savez(path, x=np.arange(3), y=np.ones(2))
    ...     tg.data.read_npz(path)
    {'x': array([0, 1, 2]), 'y': array([1., 1.])}
    """
    with open_source(path) as source:
        members = _zip_members(source)
        check_size(source, sum(member.length for member in members), max_bytes)
        return {member.key: _read_npy(source, member) for member in members}


class _Member(NamedTuple):
    key: str
    start: int
    stored: int
    length: int
    crc: int
    deflated: bool


_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_WIDE = 0xFFFFFFFF  # in a 32-bit field: see the zip64 record
_FLAG_DESCRIPTOR, _FLAG_UTF8 = 0x8, 0x800
_FLAGS_KNOWN = _FLAG_DESCRIPTOR | _FLAG_UTF8 | 0x6  # 0x6: the compressor's effort


def _read_at(source: Source, offset: int, count: int, what: str) -> bytes:
    if not 0 <= offset <= source.stored - count:
        source.fail(f"truncated: no room for {what} of {count} bytes", at=max(offset, 0))
    return Source(source.file, source.name, offset, count, length=count).take(count, what)


def _directory(source: Source) -> tuple[int, int, int]:
    """Offset, size and number of entries of a zip archive's directory."""
    end = source.stored - _END.size
    record = _read_at(source, end, _END.size, "a zip archive's end record")
    signature, *disks, count, size, offset, comment = _END.unpack(record)
    if signature != b"PK\5\6" or comment:
        source.fail("not a zip archive, or truncated, or trailing bytes after its end", at=end)
    # Python writes zip64 records from 2 GiB on, where the end record itself still tells the truth.
    place = end - _END64_LOCATOR.size
    if place >= 0 and _read_at(source, place, 4, "a zip64 locator") == b"PK\6\7":
        record = _read_at(source, place, _END64_LOCATOR.size, "a zip64 locator")
        _, disk, end, _ = _END64_LOCATOR.unpack(record)
        if disk or end != place - _END64.size:
            source.fail("damaged zip64 locator", at=place)
        record = _read_at(source, end, _END64.size, "a zip64 end record")
        signature, length, _, _, *disks, count, size, offset = _END64.unpack(record)
        if signature != b"PK\6\6" or length != _END64.size - 12:
            source.fail("damaged zip64 end record", at=end)
    if disks != [0, 0, count]:
        source.fail("one part of an archive in several", at=end)
    if offset + size != end:
        source.fail(f"the directory should end here, not at byte {offset + size}", at=end)
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        source.fail(
            f"a directory of {count} members and {size} bytes; at most {_MAX_MEMBERS} members "
            f"and {_MAX_DIRECTORY} bytes are read",
            at=offset,
        )
    return offset, size, count


def _zip_members(source: Source) -> list[_Member]:
    """The members of a zip archive, which must fill it, in order, up to its directory."""
    directory, size, count = _directory(source)
    data = _read_at(source, directory, size, "the directory")
    members: dict[str, _Member] = {}
    cursor = 0
    # Overlapping members would let a small archive hold a large one many times over.
    expected = {0}
    for _ in range(count):
        at = directory + cursor
        if size - cursor < _ENTRY.size:
            source.fail("truncated directory", at=at)
        signature, _, _, flags, method, _, _, crc, stored, length, *lengths, _, _, _, offset = (
            _ENTRY.unpack_from(data, cursor)
        )
        name_end = cursor + _ENTRY.size + lengths[0]
        extra_end = name_end + lengths[1]
        raw_name = data[cursor + _ENTRY.size : name_end]
        extra = data[name_end:extra_end]
        cursor = extra_end + lengths[2]
        if signature != b"PK\1\2" or cursor > size:
            source.fail("damaged directory entry", at=at)
        length, stored, offset = _zip64_sizes(source, at, extra, (length, stored, offset))
        key = _member_key(source, at, raw_name, utf8=bool(flags & _FLAG_UTF8))
        if key in members:
            source.fail(f"two members are called {key!r}", at=at)
        if flags & ~_FLAGS_KNOWN or method not in (0, 8) or (method == 0 and stored != length):
            source.fail(f"{key!r} is encrypted, or compressed by other than deflate", at=at)
        if offset not in expected:
            source.fail(f"{key!r} does not start where the member before it ends", at=offset)
        local = _read_at(source, offset, _LOCAL.size, "a member's header")
        signature, _, _, local_method, *_, name_size, extra_size = _LOCAL.unpack(local)
        name_start = offset + _LOCAL.size
        local_name = _read_at(source, name_start, name_size, "a member's name")
        if (signature, local_method, local_name) != (b"PK\3\4", method, raw_name):
            source.fail(f"the header of {key!r} is not what the directory says", at=offset)
        start = name_start + name_size + extra_size
        end = start + stored
        expected = {end + n for n in (12, 16, 20, 24)} if flags & _FLAG_DESCRIPTOR else {end}
        members[key] = _Member(key, start, stored, length, crc, deflated=method == 8)
    if cursor != size:
        source.fail("trailing bytes in the directory", at=directory + cursor)
    if directory not in expected:
        source.fail("the directory does not start where the last member ends", at=directory)
    return list(members.values())


def _zip64_sizes(source: Source, at: int, extra: bytes, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a directory entry, with those that do not fit it taken from its extra field."""
    wide = sizes.count(_WIDE)
    if not wide:
        return sizes
    cursor = 0
    while cursor + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, cursor)
        if kind == 1 and 8 * wide <= length <= len(extra) - cursor - 4:
            values = iter(struct.unpack_from(f"<{wide}Q", extra, cursor + 4))
            return tuple(next(values) if size == _WIDE else size for size in sizes)
        cursor += 4 + length
    return source.fail("a directory entry without its zip64 sizes", at=at)


def _member_key(source: Source, at: int, raw_name: bytes, *, utf8: bool) -> str:
    try:
        name = raw_name.decode("utf-8" if utf8 else "cp437")
    except UnicodeDecodeError:
        source.fail("a member's name is not UTF-8", at=at)
    key = name.removesuffix(".npy")
    if not key or key == name or not key.isprintable():
        source.fail(f"member {name!r} is not an array: the name must end in .npy", at=at)
    return key


def _read_npy(archive: Source, member: _Member) -> NDArray[Any]:
    source = Source(
        archive.file,
        f"{archive.name}: {member.key!r}",
        member.start,
        member.stored,
        length=member.length,
        wbits=-zlib.MAX_WBITS if member.deflated else None,
        crc=member.crc,
    )
    magic = source.take(8, "the NPY magic number")
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        source.fail(f"not an NPY array of version 1 to 3: starts with {magic.hex(' ')}", at=0)
    size_field = "<H" if magic[6] == 1 else "<I"
    (header_size,) = struct.unpack(
        size_field, source.take(struct.calcsize(size_field), "the header's size")
    )
    if header_size > _MAX_NPY_HEADER:
        source.fail(f"a header of {header_size} bytes; at most {_MAX_NPY_HEADER} are read", at=8)
    dtype, fortran, shape = _parse_npy_header(source, source.take(header_size, "the header"))
    nbytes = source.array_bytes(shape, dtype.itemsize)
    source.check_rest(nbytes)
    result = source.read_array(shape, dtype, fortran=fortran)
    source.finish()
    return result


# The header is a Python dict, its keys in any order. Python's own parser can be crashed by deep
# nesting and refuses an int of 4,300 digits its own way, so only what array headers need is read.
_NPY_HEADER = re.compile(
    rb"""\s*\{\s*(?:(?:
        'descr'\s*:\s*'(?P<descr>[^'\\]*)'
        |'fortran_order'\s*:\s*(?P<fortran_order>True|False)
        |'shape'\s*:\s*\((?P<shape>\s*|(?:\s*\d{1,20}\s*,)+(?:\s*\d{1,20})?\s*)\)
    )\s*(?:,\s*|(?=\})))*\}\s*""",
    re.VERBOSE,
)


def _parse_npy_header(source: Source, header: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    at = source.position - len(header)
    match = _NPY_HEADER.fullmatch(header)
    if match is None or None in match.groups():
        source.fail(
            f"unreadable header {header[:60]!r}; it must give descr, fortran_order and shape, "
            "and structured arrays are not read",
            at=at,
        )
    descr = match["descr"].decode("latin-1")
    if not _NPY_DTYPE.fullmatch(descr):
        source.fail(
            f"dtype {descr!r} is not read, only booleans, integers, floats and complex numbers; "
            "never Python objects",
            at=at,
        )
    shape = tuple(int(extent) for extent in re.findall(rb"\d+", match["shape"]))
    return np.dtype(descr), match["fortran_order"] == b"True", shape
