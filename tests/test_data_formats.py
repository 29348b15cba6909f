"""The readers of untrusted files: what they read, what they refuse, and what it costs them."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pathlib
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tapegrad.data import read_csv, read_idx, read_npz
from tapegrad.errors import FormatError

# The file is overwritten by each example, so one folder serves them all.
on_disk = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MEGABYTE = 1 << 20

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array: np.ndarray) -> bytes:
    code = IDX_CODES[array.dtype.str[1:]]
    head = struct.pack(f">2x2B{array.ndim}I", code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def npy(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def header(descr: str = "'<f4'", fortran: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def npz(*, compressed: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def peak(action: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy held at once during the action."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(read: Callable[..., Any], path: pathlib.Path, match: str, **options: Any) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        read(path, **options)
    assert str(caught.value).startswith(str(path))


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "file"


# ---------------------------------------------------------------- every reader

READERS = [read_idx, read_npz, read_csv]


@pytest.mark.parametrize("read", READERS)
def test_missing_file_stays_file_not_found(read: Any, path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_folder_is_refused(read: Any, tmp_path: pathlib.Path) -> None:
    refused(read, tmp_path, "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
@pytest.mark.parametrize("read", READERS)
def test_pipe_is_refused_without_waiting_for_a_writer(read: Any, path: pathlib.Path) -> None:
    os.mkfifo(path)
    refused(read, path, "not a regular file")


@pytest.mark.parametrize("read", READERS)
def test_empty_file(read: Any, path: pathlib.Path) -> None:
    path.write_bytes(b"")
    refused(read, path, "truncated|no data")


def test_messages_stay_short_when_the_file_is_not(path: pathlib.Path) -> None:
    path.write_bytes(archive({"n" * 60_000 + ".txt": b""}))
    with pytest.raises(FormatError) as caught:
        read_npz(path)
    assert len(str(caught.value)) < 1000


# ---------------------------------------------------------------- IDX


@on_disk
@given(
    array=hnp.arrays(st.sampled_from([*IDX_CODES]), hnp.array_shapes(min_dims=0, min_side=0)),
    compressed=st.booleans(),
)
def test_idx_round_trip(path: pathlib.Path, array: np.ndarray, compressed: bool) -> None:
    content = idx(array)
    path.write_bytes(gzip.compress(content) if compressed else content)
    result = read_idx(path)
    assert result.dtype == array.dtype
    assert result.dtype.isnative
    assert result.flags.writeable
    np.testing.assert_array_equal(result, array)


def test_idx_bytes_by_hand(path: pathlib.Path) -> None:
    path.write_bytes(bytes.fromhex("0000 0b02 00000002 00000001 0102 fffe"))
    np.testing.assert_array_equal(read_idx(path), np.array([[258], [-2]], np.int16))


def test_idx_truncated_anywhere(path: pathlib.Path) -> None:
    content = idx(np.arange(6, dtype="i2").reshape(2, 3))
    for whole in (content, gzip.compress(content)):
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            refused(read_idx, path, "truncated|not an IDX file")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\1\0\x08\1\0\0\0\0", "byte 0.*not an IDX file: starts with 01 00"),
        (b"\0\0\x0a\1\0\0\0\0", "byte 2.*unknown IDX type 0x0a; known are 0x08"),
        (b"\0\0\x08\2\0\0\0\1", "byte [48].*truncated: a shape of 2 axes takes 8 bytes"),
        (b"\0\0\x08\1\0\0\0\2\7", "truncated"),
        (b"\0\0\x08\1\0\0\0\2\7\7\7", "trailing bytes"),
        (b"\0\0\x0e\2" + b"\xff" * 8, "a size that no array can have"),
        (b"\0\0\x08\3" + b"\0" * 4 + b"\xff" * 8, "a size that no array can have"),
        (b"\0\0\x08\x41" + b"\0\0\0\1" * 65 + b"\0", "a shape of 65 axes"),
    ],
)
def test_idx_malformed(
    path: pathlib.Path, compress: Callable[[bytes], bytes], content: bytes, match: str
) -> None:
    path.write_bytes(compress(content))
    refused(read_idx, path, match)


def test_idx_damaged_gzip(path: pathlib.Path) -> None:
    whole = gzip.compress(idx(np.arange(100, dtype="u1")))
    path.write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    refused(read_idx, path, r"damaged compressed data \(.*incorrect data check\)")
    path.write_bytes(whole + b"more")
    refused(read_idx, path, "4 after the end of the compressed data")
    path.write_bytes(whole + whole)
    refused(read_idx, path, "after the end of the compressed data")


def test_idx_budget(path: pathlib.Path) -> None:
    array = np.zeros(1000, "f4")
    path.write_bytes(idx(array))
    assert read_idx(path, max_bytes=4000).nbytes == 4000
    refused(read_idx, path, "needs 4000 bytes, more than max_bytes=3999", max_bytes=3999)


def test_idx_lies_cost_nothing(path: pathlib.Path) -> None:
    def claims(megabytes: int) -> bytes:
        return b"\0\0\x08\1" + struct.pack(">I", megabytes * MEGABYTE)

    for content in (
        claims(1000),
        claims(100) + os.urandom(MEGABYTE),
        gzip.compress(claims(1000)),
        gzip.compress(claims(10)),
        gzip.compress(claims(1000) + bytes(50 * MEGABYTE)),
    ):
        path.write_bytes(content)
        assert peak(lambda: refused(read_idx, path, "truncated|more than 200:1")) < MEGABYTE


def test_idx_bomb_behind_an_honest_header(path: pathlib.Path) -> None:
    path.write_bytes(gzip.compress(idx(np.zeros(10, "u1")) + bytes(50 * MEGABYTE)))
    assert peak(lambda: refused(read_idx, path, "trailing bytes")) < 2 * MEGABYTE


def test_idx_peak_is_the_array(path: pathlib.Path) -> None:
    array = np.random.default_rng(0).standard_normal(MEGABYTE)
    path.write_bytes(gzip.compress(idx(array), 1))
    assert peak(lambda: read_idx(path)) < array.nbytes + 2 * MEGABYTE


def test_idx_file_that_shrinks_while_it_is_read(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(idx(np.zeros(100_000, "u1")))
    empty = np.empty

    def truncate_then_allocate(*args: Any, **options: Any) -> np.ndarray:
        os.truncate(path, 20_000)
        return empty(*args, **options)

    monkeypatch.setattr(np, "empty", truncate_then_allocate)
    refused(read_idx, path, "truncated: the data takes 100000 bytes, 19992 were found")


# ---------------------------------------------------------------- NPZ

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
)
KEYS = st.text(min_size=1, max_size=8).filter(lambda key: key.isprintable() and key != "file")


@on_disk
@given(
    arrays=st.dictionaries(KEYS, hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, min_side=0))),
    compressed=st.booleans(),
    fortran=st.booleans(),
)
def test_npz_reads_what_numpy_writes(
    path: pathlib.Path, arrays: dict[str, Any], compressed: bool, fortran: bool
) -> None:
    if fortran:
        arrays = {key: np.asfortranarray(array) for key, array in arrays.items()}
    path.write_bytes(npz(compressed=compressed, **arrays))
    result = read_npz(path)
    assert list(result) == list(arrays)
    for key, array in arrays.items():
        assert result[key].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(result[key], array, strict=False)
        assert result[key].shape == array.shape


def test_npz_agrees_with_numpy_on_layout(path: pathlib.Path) -> None:
    arrays: dict[str, Any] = {
        "c": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.ones((3, 2))),
    }
    path.write_bytes(npz(**arrays))
    with np.load(path) as expected:
        for key, array in read_npz(path).items():
            assert array.flags.f_contiguous == expected[key].flags.f_contiguous


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_truncated_anywhere(path: pathlib.Path, compressed: bool) -> None:
    whole = npz(compressed=compressed, x=np.arange(3), y=np.ones((2, 2)))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(read_npz, path, "truncated|trailing|zip64|directory")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_every_single_byte_matters_or_is_metadata(path: pathlib.Path, compressed: bool) -> None:
    array = np.arange(40, dtype="u1")
    whole = npz(compressed=compressed, x=array)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            (result,) = read_npz(path).values()
        except FormatError:
            continue
        # Versions, dates and attributes may change; the CRC sees to it that the data may not.
        np.testing.assert_array_equal(result, array)


def test_npz_forms_that_other_writers_use(path: pathlib.Path) -> None:
    data = np.array([1, 2], "<f4").tobytes()
    texts = [
        "{'shape': (2,), 'fortran_order': False, 'descr': '<f4'}",
        " { 'descr' : '<f4' ,'fortran_order':False,'shape':( 2 , ) , } ",
        "{'descr':'<f4','fortran_order':True,'shape':(1,2)}",
    ]
    for version in (1, 2, 3):
        for text in texts:
            path.write_bytes(archive({"x.npy": npy(text, data, version)}))
            assert read_npz(path)["x"].ravel().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "unreadable header"),
        ("{}", "must give descr, fortran_order and shape"),
        (header().replace("'shape'", "'size'"), "unreadable header"),
        (header(shape="2"), "unreadable header"),
        (header(shape="(2)"), "unreadable header"),
        (header(shape="(-2,)"), "unreadable header"),
        (header(shape="(2.0,)"), "unreadable header"),
        (header(shape="(True,)"), "unreadable header"),
        (header(shape="(2,)+(3,)"), "unreadable header"),
        (header(shape="(" + "9" * 5000 + ",)"), "unreadable header"),
        (header(shape="(99999999999999999999,)"), "a size that no array can have"),
        (header(shape="(1099511627776, 1099511627776)"), "a size that no array can have"),
        (header(shape="(0, 4611686018427387904, 4)"), "a size that no array can have"),
        (header(shape="(" + "1," * 65 + ")"), "a shape of 65 axes"),
        (header(shape="(1,)"), "trailing bytes: the header promises 4 bytes of data, 8 follow"),
        (header(shape="(3,)"), "truncated: the header promises 12 bytes of data, 8 follow"),
        (header(fortran="1"), "unreadable header"),
        (header("'|O'"), r"dtype '\|O' is not read.*never Python objects"),
        (header("'<U2'"), "dtype '<U2' is not read"),
        (header("'<M8[ns]'"), "is not read"),
        (header("'<f16'"), "is not read"),
        (header("'=f4'"), "is not read"),
        (header("'float32'"), "is not read"),
        (header("[('a', '<f4')]"), "structured arrays are not read"),
        (header("__import__('os').abort()"), "unreadable header"),
        ("(" * 60_000, "unreadable header"),
        ("{" + "'shape': (2,), " * 4000, "unreadable header"),
        ("-" * 60_000 + "1", "unreadable header"),
    ],
)
def test_npz_malformed_array_header(path: pathlib.Path, text: str, match: str) -> None:
    path.write_bytes(archive({"x.npy": npy(text, bytes(8))}))
    refused(read_npz, path, match)


def test_npz_malformed_array(path: pathlib.Path) -> None:
    good = npy(header(), bytes(8))
    flags = len(npy(header("'|b1'")))
    for content, match in [
        (good[1:], "'x': byte 0 .*not an NPY array of version 1 to 3"),
        (good.replace(b"Y\1", b"Y\4"), "not an NPY array of version 1 to 3"),
        (good[:9], "byte 8 .*truncated: the header's size takes 2 bytes, 1 are left"),
        (good[:20], "truncated: the header takes"),
        (npy(header("'|b1'"), b"\1\2"), f"byte {flags + 1} .*a boolean is neither 0 nor 1"),
    ]:
        path.write_bytes(archive({"x.npy": content}))
        refused(read_npz, path, match)


def test_npz_python_objects_are_never_unpickled(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (tmp_path / "executed",)

    path.write_bytes(npz(x=np.array([Payload()], dtype=object)))
    refused(read_npz, path, "never Python objects")
    assert not (tmp_path / "executed").exists()


def test_npz_giant_header_is_refused_unread(path: pathlib.Path) -> None:
    text = header() + " " * (64 * MEGABYTE)
    path.write_bytes(
        archive({"x.npy": npy(text, bytes(8), version=2), "y.npy": os.urandom(MEGABYTE)})
    )
    assert path.stat().st_size < 2 * MEGABYTE
    message = "a header of 6710.* bytes; at most 65536 are read"
    assert peak(lambda: refused(read_npz, path, message)) < 2 * MEGABYTE


def test_npz_bomb(path: pathlib.Path) -> None:
    path.write_bytes(npz(compressed=True, x=np.zeros(64 * MEGABYTE, "u1")))
    message = "claim to hold 67108992, more than 200:1; store the file uncompressed"
    assert peak(lambda: refused(read_npz, path, message)) < MEGABYTE


def test_npz_small_zeros_are_no_bomb(path: pathlib.Path) -> None:
    path.write_bytes(npz(compressed=True, x=np.zeros(8 * MEGABYTE, "u1")))
    assert not read_npz(path)["x"].any()


def test_npz_budget_counts_all_members(path: pathlib.Path) -> None:
    path.write_bytes(npz(x=np.zeros(1000), y=np.zeros(1000)))
    assert len(read_npz(path, max_bytes=16_256)) == 2  # NumPy's headers have 128 bytes
    refused(read_npz, path, "needs 16256 bytes, more than max_bytes=16255", max_bytes=16_255)


def test_npz_peak_is_the_arrays(path: pathlib.Path) -> None:
    array = np.random.default_rng(0).standard_normal(MEGABYTE)
    for compressed in (False, True):
        path.write_bytes(npz(compressed=compressed, x=array))
        assert peak(lambda: read_npz(path)) < array.nbytes + 2 * MEGABYTE


def test_npz_deflate_that_yields_more_or_less_than_declared(path: pathlib.Path) -> None:
    content = npy(header(), bytes(8))
    whole = archive({"x.npy": content})
    sizes = struct.pack("<2I", len(zlib.compress(content, 6)) - 6, len(content))
    assert whole.count(sizes) == 2
    for declared, match in [
        (len(content) - 4, "truncated: the header promises 8 bytes of data, 4 follow"),
        (len(content) + 4, "trailing bytes: the header promises 8 bytes of data, 12 follow"),
    ]:
        path.write_bytes(whole.replace(sizes, sizes[:4] + struct.pack("<I", declared)))
        refused(read_npz, path, match)
    shorter = npy(header(shape="(1,)"), bytes(8))
    whole = archive({"x.npy": shorter})
    sizes = struct.pack("<2I", len(zlib.compress(shorter, 6)) - 6, len(shorter))
    path.write_bytes(whole.replace(sizes, sizes[:4] + struct.pack("<I", len(shorter) - 4)))
    refused(read_npz, path, "more data than the header promises")


def test_npz_names(path: pathlib.Path) -> None:
    for name in ("x", "x.npy.txt", ".npy", "a\tb.npy", "../x.npy\n"):
        path.write_bytes(archive({name: npy(header(), bytes(8))}))
        refused(read_npz, path, "the name must end in .npy")
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as file:
        warnings.simplefilter("ignore")
        file.writestr("x.npy", npy(header(), bytes(8)))
        file.writestr("x.npy", npy(header(), bytes(8)))
    path.write_bytes(buffer.getvalue())
    refused(read_npz, path, "two members are called 'x'")


def test_npz_archive_structure(path: pathlib.Path) -> None:
    good = archive({"x.npy": npy(header(), bytes(8)), "y.npy": npy(header(), bytes(8))})
    second = good.index(b"PK\3\4", 4)
    directory = good.index(b"PK\1\2")
    last = good.index(b"PK\1\2", directory + 4)
    end = good.index(b"PK\5\6")

    def patched(offset: int, content: bytes) -> bytes:
        return good[:offset] + content + good[offset + len(content) :]

    for content, match in [
        (b"PK" * 30, "not a zip archive"),
        (good + b"garbage", "trailing bytes after its end"),
        (patched(end + 20, b"\7\0") + b"comment", "trailing bytes after its end"),
        (b"garbage" + good, r"the directory should end here, not at byte"),
        (patched(end + 20, b"\7\0"), "trailing bytes after its end"),
        (patched(end + 4, b"\1\0"), "one part of an archive in several"),
        (patched(end + 10, b"\3\0"), "one part of an archive in several"),
        (patched(end + 8, b"\1\0\1\0"), "trailing bytes in the directory"),
        (patched(end + 8, b"\3\0\3\0"), "truncated directory"),
        (patched(end + 8, b"\xff\xff\xff\xff"), "a directory of 65535 members"),
        (patched(directory, b"PK\1\3"), "damaged directory entry"),
        (patched(directory + 8, b"\1\0"), "'x' is encrypted"),
        (patched(directory + 10, b"\x0e\0"), "'x' is encrypted, or compressed by other"),
        (patched(directory + 28, b"\xff\xff"), "damaged directory entry"),
        (patched(last + 42, b"\0\0\0\0"), "'y' does not start where the member before it ends"),
        (patched(directory + 42, b"\xff\xff\0\0"), "'x' does not start where"),
        (patched(directory + 20, b"\xff\xff\xff\xff"), "without its zip64 sizes"),
        (patched(0, b"PK\3\5"), "the header of 'x' is not what the directory says"),
        (patched(8, b"\0\0"), "the header of 'x' is not what the directory says"),
        (patched(30, b"z"), "the header of 'x' is not what the directory says"),
        (patched(second + 28, b"\1\0"), "does not start where the last member ends"),
        (patched(directory + 16, b"\0\0\0\0"), "CRC-32 is 0x.*0x00000000 was promised"),
        (patched(35, b"\0"), "damaged compressed data|not an NPY|CRC-32|unreadable|truncated"),
    ]:
        path.write_bytes(content)
        refused(read_npz, path, match)


def test_npz_stored_member_of_two_sizes(path: pathlib.Path) -> None:
    content = npy(header(), bytes(8))
    good = archive({"x.npy": content, "y.npy": content}, zipfile.ZIP_STORED)
    sizes = struct.pack("<2I", len(content), len(content))
    lie = struct.pack("<2I", len(content), len(content) + 1)
    path.write_bytes(good.replace(sizes, lie))
    refused(read_npz, path, "'x' is encrypted, or compressed by other than deflate")


def test_npz_bad_utf8_name(path: pathlib.Path) -> None:
    good = archive({"é.npy": npy(header(), bytes(8))})
    path.write_bytes(good.replace("é".encode(), b"\xff\xfe"))
    refused(read_npz, path, "a member's name is not UTF-8")


def test_npz_overlapping_members_are_no_bomb(path: pathlib.Path) -> None:
    """Many directory entries that share one member's bytes: 46 bytes each for a megabyte."""
    single = archive({"x.npy": bytes(MEGABYTE)})
    directory = single.index(b"PK\1\2")
    entry, end = single[directory:-22], single[-22:]
    entries = b"".join(entry[:46] + f"{number:04}.npy".encode() for number in range(1000)).replace(
        b"\5\0\0\0\0\0", b"\x08\0\0\0\0\0"
    )
    record = bytearray(end)
    struct.pack_into("<2H2I", record, 8, 1000, 1000, len(entries), directory)
    path.write_bytes(single[:directory] + entries + record)
    message = "does not start where|is not what the directory says"
    assert peak(lambda: refused(read_npz, path, message)) < MEGABYTE


def test_npz_too_many_members(path: pathlib.Path) -> None:
    path.write_bytes(archive({f"{number}.npy": b"" for number in range(10_001)}))
    assert peak(lambda: refused(read_npz, path, "at most 10000 members")) < MEGABYTE


def test_npz_zip64(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python's zipfile writes for archives above 4 GiB, here with its limits lowered."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    arrays: dict[str, Any] = {"x": np.arange(5), "y": np.ones(3), "z": np.zeros((2, 2))}
    whole = npz(**arrays)
    assert b"PK\6\6" in whole
    path.write_bytes(whole)
    result = read_npz(path)
    for key, array in arrays.items():
        np.testing.assert_array_equal(result[key], array)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(read_npz, path, "truncated|zip64|directory")
    extra = whole.index(b"\1\0", whole.index(b"PK\1\2") + 46)
    path.write_bytes(whole[:extra] + b"\2" + whole[extra + 1 :])
    refused(read_npz, path, "without its zip64 sizes")
    locator = whole.index(b"PK\6\7")
    path.write_bytes(whole[: locator + 8] + b"\0" + whole[locator + 9 :])
    refused(read_npz, path, "damaged zip64 locator")
    record = whole.index(b"PK\6\6")
    for offset in (0, 4):
        path.write_bytes(whole[: record + offset] + b"?" + whole[record + offset + 1 :])
        refused(read_npz, path, "damaged zip64 end record")


def test_npz_written_to_a_pipe(path: pathlib.Path) -> None:
    """Without seeking, zipfile puts sizes and CRC behind the data."""

    class Pipe(io.RawIOBase):
        content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as file:
        file.writestr("x.npy", npy(header(), bytes(8)))
        file.writestr("y.npy", npy(header(), bytes(8)))
    path.write_bytes(pipe.content)
    assert [*read_npz(path)] == ["x", "y"]


# ---------------------------------------------------------------- CSV


def test_csv_without_header(path: pathlib.Path) -> None:
    path.write_text("1,2.5,7\r\n-3,4e2,9\r\n\r\n")
    features, labels, classes = read_csv(path)
    np.testing.assert_array_equal(features, np.array([[1, 2.5], [-3, 400]], np.float32))
    np.testing.assert_array_equal(labels, np.array([7, 9]))
    assert features.dtype == np.float32
    assert labels is not None
    assert labels.dtype == np.int64
    assert classes == ()
    assert features.flags.writeable


@pytest.mark.parametrize("label_column", ["first", 0, -3, "kind"])
def test_csv_label_column(path: pathlib.Path, label_column: Any) -> None:
    path.write_text('\ufeff kind,"x, in m",y\n b ,1,2\na,3,4\nb, 5 ,6', encoding="utf-8")
    table = read_csv(path, label_column=label_column)
    np.testing.assert_array_equal(table.features, np.array([[1, 2], [3, 4], [5, 6]], "f4"))
    np.testing.assert_array_equal(table.labels, [1, 0, 1])
    assert table.classes == ("a", "b")


@pytest.mark.parametrize("label_column", ["last", 2, -1])
def test_csv_header_is_told_by_its_features(path: pathlib.Path, label_column: Any) -> None:
    path.write_text("a,b,2020\n  \n1,2,3\n")
    table = read_csv(path, label_column=label_column)
    assert table.features.tolist() == [[1, 2]]
    assert table.labels is not None
    assert table.labels.tolist() == [3]


def test_csv_without_labels(path: pathlib.Path) -> None:
    path.write_text("a,b\n1,nan\n3,-inf\n")
    table = read_csv(path, label_column=None)
    np.testing.assert_array_equal(table.features, np.array([[1, np.nan], [3, -np.inf]], "f4"))
    assert table.labels is None


def test_csv_named_column_means_a_header_whatever_it_looks_like(path: pathlib.Path) -> None:
    path.write_text("0,1,2\n5,6,7\n")
    table = read_csv(path, label_column="1")
    assert table.features.tolist() == [[5, 7]]
    assert table.labels is not None
    assert table.labels.tolist() == [6]


@on_disk
@given(
    values=hnp.arrays("f4", hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(width=32)),
    data=st.data(),
)
def test_csv_round_trip(path: pathlib.Path, values: np.ndarray, data: st.DataObject) -> None:
    integers = st.integers(-(10**18) + 1, 10**18 - 1)
    labels = data.draw(hnp.arrays("i8", len(values), elements=integers))
    rows = zip(values.tolist(), labels.tolist(), strict=True)
    path.write_text("".join(",".join(map(repr, [*row, label])) + "\n" for row, label in rows))
    table = read_csv(path)
    np.testing.assert_array_equal(table.features, values)
    np.testing.assert_array_equal(table.labels, labels)


def test_csv_many_blocks(path: pathlib.Path) -> None:
    """More cells than are narrowed at once, with a blank line and an overflow late in them."""
    values = np.random.default_rng(0).standard_normal((30_000, 3))
    lines = [",".join(map(repr, row)) + ",1" for row in values.tolist()]
    lines.insert(100, "")
    path.write_text("\n".join(lines))
    np.testing.assert_array_equal(read_csv(path).features, values.astype(np.float32))
    lines[20_000] = "1,-1e39,3,1"
    path.write_text("\n".join(lines))
    refused(read_csv, path, "line 20001: a number beyond float32")


@pytest.mark.parametrize(
    ("content", "options", "match"),
    [
        ("", {}, "line 1: no data in the file"),
        ("\n\n", {}, "line 1: no data in the file"),
        ("a,b\n", {}, "no data, only a header"),
        ("1\n", {}, "line 1: no feature columns; cells are separated by commas"),
        ("1;2;3\n", {}, "no feature columns"),
        ("1,2\n1,2,3\n", {}, "line 2: 3 cells, 2 in the lines before"),
        ("1,2\n\n1\n", {}, "line 3: 1 cells, 2 in the lines before"),
        ("1,2,3\n1,x,3\n", {}, "line 2: 'x' is not a number"),
        ("1,x,3\n1,2,3\n", {}, "line 1: 'x' is not a number"),
        ("a,b\n,1\n", {}, "line 2: '' is not a number"),
        ("1,2\n1_0,2\n", {}, "line 2: '1_0' is not a number"),
        ("1,2\n\u0661,2\n", {}, "is not a number"),
        ("1,2\n1\0,2\n", {}, "is not a number"),
        ("1,2\n1,\n", {}, "line 2: the label is empty"),
        ("1,2\n1, \n", {}, "line 2: the label is empty"),
        ("1,2\n1,2.5\n", {}, "line 2: the label '2.5' is a number, but no integer"),
        ("1,2\n1,9999999999999999999\n", {}, "no integer of up to 18 digits"),
        ("1e39,2\n", {}, "line 1: a number beyond float32"),
        ('1,2\n1,"2\n', {}, "line 2: not one record of UTF-8 text"),
        ('1,2\n1,"2"x\n', {}, "line 2: not one record of UTF-8 text"),
        ("1,2\r1,2\r", {}, "line 1: not one record of UTF-8 text"),
        (b"1,2\n1,\xff\n", {}, "line 2: not one record of UTF-8 text"),
        ("1,2\n", {"label_column": 2}, "line 1: no column 2, there are 2"),
        ("1,2\n", {"label_column": -3}, "line 1: no column -3"),
        ("a,b\n1,2\n", {"label_column": "c"}, r"0 columns are called 'c' in \['a', 'b'\]"),
        ("a,a\n1,2\n", {"label_column": "a"}, "2 columns are called 'a'"),
        ("1,2\n3,4\n", {"max_bytes": 31, "label_column": None}, "line 2: the table takes more"),
        ("1,2\n3,4\n", {"max_bytes": 100}, "line 1: the table takes more than max_bytes=100"),
    ],
)
def test_csv_malformed(
    path: pathlib.Path, content: str | bytes, options: dict[str, Any], match: str
) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(read_csv, path, match, **options)


def test_csv_endless_line(path: pathlib.Path) -> None:
    path.write_bytes(b"1," * (10 * MEGABYTE))
    assert peak(lambda: refused(read_csv, path, "longer than 1048576 bytes")) < 4 * MEGABYTE


def test_csv_quoted_cells_that_run_over_all_lines(path: pathlib.Path) -> None:
    path.write_bytes(b'1,"' + b'a\n","' * MEGABYTE)
    assert peak(lambda: refused(read_csv, path, "line 1: not one record")) < MEGABYTE


def test_csv_ever_new_labels_count_against_the_budget(path: pathlib.Path) -> None:
    path.write_text("".join(f"1,label{number}\n" for number in range(100_000)))
    message = "takes more than max_bytes=1048576"
    assert peak(lambda: refused(read_csv, path, message, max_bytes=MEGABYTE)) < 2 * MEGABYTE


def test_csv_peak_is_near_the_table(path: pathlib.Path) -> None:
    path.write_text("1.5,2.5,3.5,4.5,1\n" * 50_000)
    table_bytes = 50_000 * (4 * 4 + 8)
    assert peak(lambda: read_csv(path)) < 2 * table_bytes + 3 * MEGABYTE


# ---------------------------------------------------------------- noise

SEEDS = [
    (read_idx, idx(np.arange(6, dtype="f4").reshape(2, 3))),
    (read_idx, gzip.compress(idx(np.arange(6, dtype="i2")))),
    (read_npz, npz(x=np.arange(3), y=np.ones((2, 2), "f4"))),
    (read_npz, npz(compressed=True, x=np.arange(30), flags=np.array([True, False]))),
    (read_npz, archive({"x.npy": npy(header(), bytes(8))}, zipfile.ZIP_STORED)),
    (read_csv, b'a,"b",kind\n1,2.5,x\n-3e4,nan,"y"\n'),
]
EDITS = st.lists(
    st.tuples(st.integers(0, 600), st.integers(0, 3), st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


@settings(on_disk, max_examples=600)
@given(case=st.sampled_from(SEEDS), edits=EDITS)
def test_nothing_but_format_error_comes_out_of_a_damaged_file(
    path: pathlib.Path, case: tuple[Any, bytes], edits: list[tuple[int, int, bytes]]
) -> None:
    read, content = case
    for position, removed, inserted in edits:
        at = position % (len(content) + 1)
        content = content[:at] + inserted + content[at + removed :]
    path.write_bytes(content)
    with contextlib.suppress(FormatError):
        read(path, max_bytes=MEGABYTE)


@settings(on_disk, max_examples=300)
@given(read=st.sampled_from(READERS), content=st.binary(max_size=200))
def test_nothing_but_format_error_comes_out_of_noise(
    path: pathlib.Path, read: Any, content: bytes
) -> None:
    path.write_bytes(content)
    with contextlib.suppress(FormatError):
        read(path, max_bytes=MEGABYTE)
