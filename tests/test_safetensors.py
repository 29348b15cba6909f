"""The safetensors reader and writer: agreement, refusals, and files that are whole or untouched."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import stat
import struct
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tapegrad import safetensors
from tapegrad.errors import FormatError

on_disk = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MEGABYTE = 1 << 20
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.safetensors"


def container(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: pathlib.Path, match: str, **options: Any) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        safetensors.load(path, **options)
    assert str(caught.value).startswith(f"{path}: byte ")
    assert len(str(caught.value)) < 1000


def peak(action: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy held at once during the action."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def same(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert result.keys() == expected.keys()
    for name, array in expected.items():
        assert result[name].dtype == array.dtype.newbyteorder("=")
        assert result[name].shape == array.shape
        assert result[name].dtype.isnative
        # As bytes, so that NaNs and negative zeros count.
        assert result[name].tobytes() == array.astype(result[name].dtype).tobytes()


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)
DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
ARRAYS = st.dictionaries(NAMES, hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0)))


# ---------------------------------------------------------------- writing and reading


@on_disk
@given(arrays=ARRAYS, metadata=st.dictionaries(NAMES, NAMES))
def test_round_trip(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    safetensors.save(path, arrays, metadata)
    result, texts = safetensors.load(path)
    same(result, arrays)
    assert texts == metadata
    assert all(array.flags.writeable for array in result.values())


def test_bytes_by_hand(path: pathlib.Path) -> None:
    """The layout of the specification, written out."""
    safetensors.save(path, {"a": np.array([[1, 258]], ">i2")}, {"k": "v"})
    text = b'{"__metadata__":{"k":"v"},"a":{"dtype":"I16","shape":[1,2],"data_offsets":[0,4]}}'
    padding = b" " * (-len(text) % 8)
    size = struct.pack("<Q", len(text) + len(padding))
    assert path.read_bytes() == size + text + padding + b"\1\0\2\1"


def test_order_of_names_follows_the_header(path: pathlib.Path) -> None:
    header = {"z": entry(offsets=(2, 4)), "a": entry(offsets=(0, 2))}
    path.write_bytes(container(header, b"\1\2\3\4"))
    arrays, _ = safetensors.load(path)
    assert {name: array.tolist() for name, array in arrays.items()} == {"z": [3, 4], "a": [1, 2]}
    assert [*arrays] == ["z", "a"]


def test_layouts_are_made_contiguous(path: pathlib.Path) -> None:
    base = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"t": base.T, "s": base[:, ::2, ::-1], "b": np.broadcast_to(base[0, 0], (3, 4))}
    safetensors.save(path, arrays)
    for name, array in safetensors.load(path)[0].items():
        np.testing.assert_array_equal(array, arrays[name])


def test_data_is_aligned(path: pathlib.Path) -> None:
    safetensors.save(path, {"a": np.ones(3, "u1"), "b": np.ones(3), "c": np.ones(3, "f2")})
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    for name, item in (("a", 1), ("b", 8), ("c", 2)):
        assert header[name]["data_offsets"][0] % item == 0


def test_bfloat16(path: pathlib.Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([[1.5, -2.0, np.inf]]).astype(ml_dtypes.bfloat16)
    safetensors.save(path, {"x": array})
    assert path.read_bytes().endswith(bytes.fromhex("c03f 00c0 807f"))
    same(safetensors.load(path)[0], {"x": array})


def test_bfloat16_without_ml_dtypes(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    path.write_bytes(container({"x": entry("BF16", [1])}, bytes(2)))
    with pytest.raises(ImportError, match="pip install ml_dtypes"):
        safetensors.load(path)


def test_peak_is_the_arrays(path: pathlib.Path) -> None:
    array = np.random.default_rng(0).standard_normal(MEGABYTE)
    assert peak(lambda: safetensors.save(path, {"x": array})) < MEGABYTE // 4
    assert peak(lambda: safetensors.load(path)) < array.nbytes + MEGABYTE // 4


# ---------------------------------------------------------------- the safetensors package


@on_disk
@given(arrays=ARRAYS, metadata=st.dictionaries(NAMES, NAMES, max_size=1))
def test_the_package_reads_and_writes_the_same_bytes(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    package = pytest.importorskip("safetensors.numpy")
    safe_open = pytest.importorskip("safetensors").safe_open
    safetensors.save(path, arrays, metadata)
    same(package.load(path.read_bytes()), arrays)
    with safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata
    theirs = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    theirs = {name: array.reshape(arrays[name].shape) for name, array in theirs.items()}
    assert path.read_bytes() == package.save(theirs, metadata or None)


@on_disk
@given(arrays=ARRAYS, metadata=st.dictionaries(NAMES, NAMES))
def test_reads_what_the_package_writes(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    package = pytest.importorskip("safetensors.numpy")
    # None: package 0.8 writes broken JSON for no arrays with an empty dict.
    path.write_bytes(package.save(arrays, metadata or None))
    result, texts = safetensors.load(path)
    same(result, arrays)
    assert texts == metadata


# ---------------------------------------------------------------- what may not be saved


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "match"),
    [
        ({"x": [1.0]}, None, TypeError, "'x' must be a NumPy array, got list; convert it"),
        ({"x": np.float32(1)}, None, TypeError, "'x' must be a NumPy array, got float32"),
        ({3: np.ones(1)}, None, TypeError, "names must be str, got 3"),
        ({"x": np.ones(1, "c16")}, None, TypeError, "'x' has dtype complex128; the format holds"),
        ({"x": np.ones(1, object)}, None, TypeError, "'x' has dtype object"),
        ({"x": np.ones(1, "<M8[s]")}, None, TypeError, "has dtype datetime64"),
        ({"x": np.ones(1, "U3")}, None, TypeError, "has dtype <U3"),
        ({"__metadata__": np.ones(1)}, None, ValueError, "reserved by the format; rename"),
        ({"\ud800": np.ones(1)}, None, ValueError, "half a character"),
        ({}, {"a": 1}, TypeError, "metadata must map str to str, got 'a': 1"),
        ({}, {1: "a"}, TypeError, "metadata must map str to str, got 1: 'a'"),
        ({}, {"a": "x" * 10_000_000}, ValueError, "at most 100000 and 10000000 can be read again"),
    ],
)
def test_save_refuses(
    path: pathlib.Path, arrays: Any, metadata: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        safetensors.save(path, arrays, metadata)
    assert not [*path.parent.iterdir()]


# ---------------------------------------------------------------- malformed files


def test_truncated_anywhere(path: pathlib.Path) -> None:
    safetensors.save(path, {"a": np.arange(3), "b": np.ones((2, 2), "f2")}, {"k": "v"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "truncated")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "truncated: the header's length takes 8 bytes, 0 are left"),
        (b"\xff" * 16, "byte 0: a header of 18446744073709551615 bytes; at most 10000000"),
        (struct.pack("<Q", 10_000_001), "a header of 10000001 bytes; at most 10000000"),
        (struct.pack("<Q", 9), "byte 8: truncated: the header takes 9 bytes, 0 are left"),
        (container(b""), "the header starts with b''"),
        (container(b" {}"), "the header starts with b' '"),
        (container(b"[]"), "the header starts with"),
        (container('{"é":1}'.encode("utf-16")), "the header starts with"),
        (container(b"{"), "unreadable header"),
        (container(b"{}x"), "unreadable header"),
        (container(b'{"\xff":1}'), "unreadable header"),
        (container(rb'{"\ud800":1}'), r"unreadable header \(.*surrogates not allowed"),
        (container(rb'{"__metadata__":{"a":"\udfff"}}'), "surrogates not allowed"),
        (container(b'{"a":1,"a":1}'), "'a' occurs twice"),
        (container(b'{"__metadata__":{"k":"1","k":"2"}}'), "'k' occurs twice"),
        (container(b'{"a":NaN}'), "NaN is not JSON"),
        (container(b'{"a":' + b"1" * 5000 + b"}"), "unreadable header"),
        (container(b'{"a":' + b"[" * 100_000), "unreadable header"),
        (container(b'{"a":' * 100_000), "unreadable header"),
        (container({"__metadata__": 1}), "__metadata__ must map text to text"),
        (container({"__metadata__": {"a": 1}}), "__metadata__ must map text to text"),
        (container({"x": 1}), "'x' must give dtype, shape and data_offsets and nothing else"),
        (container({"x": {"dtype": "U8", "shape": [2]}}, b"12"), "and nothing else"),
        (container({"x": entry() | {"device": "cpu"}}, b"12"), "and nothing else"),
        (container({"x": entry("F8_E4M3")}, b"12"), "'x' has the unknown dtype 'F8_E4M3'"),
        (container({"x": entry("u8")}, b"12"), "unknown dtype 'u8'"),
        (container({"x": entry(["U8"])}, b"12"), r"unknown dtype \['U8'\]"),
        (container({"x": entry(shape=2)}, b"12"), "no list of sizes"),
        (container({"x": entry(shape=[-1, -2])}, b"12"), "no list of sizes"),
        (container({"x": entry(shape=[2.0])}, b"12"), "no list of sizes"),
        (container({"x": entry(shape=[True, 2])}, b"12"), "no list of sizes"),
        (container({"x": entry(shape=["2"])}, b"12"), "no list of sizes"),
        (container({"x": entry(shape=[None])}, b"12"), "no list of sizes"),
        (container({"x": entry(offsets=None)}, b"12"), "no list of sizes"),
        (container({"x": entry(offsets=[False, 2])}, b"12"), "no list of sizes"),
        (container({"x": entry(offsets=[0, 2.0])}, b"12"), "no list of sizes"),
        (container({"x": entry(offsets=[-2, 0])}, b"12"), "no list of sizes"),
        (container({"x": entry(offsets=[0])}, b"12"), "'x' has 1 data_offsets, not 2"),
        (container({"x": entry(offsets=[0, 1, 2])}, b"12"), "'x' has 3 data_offsets, not 2"),
        (container({"x": entry(offsets=[2, 0])}, b"12"), "takes 2 bytes, its data_offsets are"),
        (container({"x": entry(shape=[3])}, b"12"), r"shape \[3\] and dtype U8 takes 3 bytes"),
        (container({"x": entry("I16")}, b"12"), "takes 4 bytes"),
        (container({"x": entry(shape=[1 << 32, 1 << 32])}, b"12"), "a size that no array can"),
        (container({"x": entry(shape=[10**4000] * 64)}, b"12"), "a size that no array can have"),
        (container({"x": entry(shape=[0, 1 << 62, 4], offsets=[0, 0])}), "a size that no array"),
        (container({"x": entry(shape=[1] * 65)}, b"12"), "a shape of 65 axes"),
        (container({"x": entry()}, b"123"), "trailing bytes: .* 2 bytes of data, 3 follow"),
        (container({"x": entry()}, b"1"), "truncated: .* 2 bytes of data, 1 follow"),
        (container({"x": entry(offsets=[1, 3])}, b"123"), "'x' starts at data byte 1, .* at 0"),
        (container({"x": entry(), "y": entry()}, b"12"), "'y' starts at data byte 0, .* at 2"),
        (container({"x": entry(), "y": entry(offsets=[1, 3])}, b"123"), "starts at data byte 1"),
        (container({"x": entry(), "y": entry(offsets=[3, 5])}, b"12345"), "starts at data byte 3"),
        (
            container({"x": entry(), "e": entry(shape=[0], offsets=[1, 1])}, b"12"),
            "'e' starts at data byte 1",
        ),
        (
            container({"x": entry(), "e": entry(shape=[0], offsets=[9, 9])}, b"12"),
            "'e' starts at data byte 9",
        ),
        (container({"x": entry("BOOL")}, b"\1\2"), "a boolean is neither 0 nor 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_malformed(path: pathlib.Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    refused(path, match)


def test_empty_arrays_may_stand_at_any_border(path: pathlib.Path) -> None:
    header = {
        "x": entry(),
        "a": entry(shape=[0], offsets=[0, 0]),
        "b": entry("F32", [3, 0], [2, 2]),
        "c": entry("F64", [0, 5], [2, 2]),
    }
    path.write_bytes(container(header, b"\7\7"))
    arrays, _ = safetensors.load(path)
    assert [array.shape for array in arrays.values()] == [(2,), (0,), (3, 0), (0, 5)]


def test_missing_file_and_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        safetensors.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        safetensors.save(tmp_path / "none" / "x", {})
    refused(tmp_path, "not a regular file")


def test_budget(path: pathlib.Path) -> None:
    safetensors.save(path, {"x": np.zeros(100)})
    assert safetensors.load(path, max_bytes=800)[0]["x"].nbytes == 800
    refused(path, "800 bytes of data, more than max_bytes=799", max_bytes=799)


def test_too_many_tensors(path: pathlib.Path) -> None:
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"{n:x}": empty for n in range(100_001)}, separators=(",", ":")).encode()
    path.write_bytes(container(text))
    refused(path, "100001 arrays; at most 100000 are read")


def test_as_many_tensors_as_are_allowed(path: pathlib.Path) -> None:
    arrays = {f"layer{n}": np.zeros(()) for n in range(100_000)}
    safetensors.save(path, arrays)
    assert len(safetensors.load(path)[0]) == 100_000
    with pytest.raises(ValueError, match=r"100001 arrays .*use several files"):
        safetensors.save(path, arrays | {"one more": np.zeros(())})


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
        b'{"a":[' + b"1," * 4_000_000 + b"1]}",
        b'{"__metadata__":{' + b'"a":"",' * 1_200_000 + b'"b":""}}',
    ],
    ids=["lists", "numbers", "texts"],
)
def test_header_bombs_cost_no_more_than_their_size(path: pathlib.Path, text: bytes) -> None:
    path.write_bytes(container(text))
    message = "a header of more than 1000000 items"
    assert peak(lambda: refused(path, message)) < 3 * len(text)


def test_shape_of_a_million_axes_is_refused_before_it_is_multiplied(path: pathlib.Path) -> None:
    path.write_bytes(container({"x": entry(shape=[1 << 60] * 400_000)}))
    refused(path, "a shape of 400000 axes")


EDITS = st.lists(
    st.tuples(st.integers(0, 600), st.integers(0, 3), st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


@settings(on_disk, max_examples=500)
@given(edits=EDITS)
def test_nothing_but_format_error_comes_out_of_a_damaged_file(
    path: pathlib.Path, edits: list[tuple[int, int, bytes]]
) -> None:
    arrays = {"a": np.arange(3), "b": np.ones((2, 2), "f2"), "c": np.array([True, False])}
    safetensors.save(path, arrays, {"k": "v"})
    content = path.read_bytes()
    for position, removed, inserted in edits:
        at = position % (len(content) + 1)
        content = content[:at] + inserted + content[at + removed :]
    path.write_bytes(content)
    with contextlib.suppress(FormatError):
        safetensors.load(path, max_bytes=MEGABYTE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["U8", "F32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@settings(on_disk, max_examples=500)
@given(
    entries=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F32", "BOOL"]),
                "shape": st.lists(st.integers(0, 3), max_size=2),
                "data_offsets": st.tuples(st.integers(0, 4), st.integers(0, 4)),
            }
        ),
    ),
    data=st.binary(max_size=8),
)
def test_accepts_no_header_that_the_package_refuses(
    path: pathlib.Path, entries: dict[str, Any], data: bytes
) -> None:
    package = pytest.importorskip("safetensors.numpy")
    content = container(entries, data)
    path.write_bytes(content)
    try:
        arrays, _ = safetensors.load(path)
    except FormatError:
        return
    same(package.load(content), arrays)


# ---------------------------------------------------------------- whole or untouched

STEPS = ["fsync", "replace"]


class Interrupt(BaseException):
    """Stands for Ctrl-C: no Exception."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError("disk full"), Interrupt()])
def test_failure_leaves_the_old_file_and_no_other(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    safetensors.save(path, {"x": np.zeros(3)})
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)) as caught:
        safetensors.save(path, {"x": np.ones(3)})
    assert caught.value is error
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_failure_while_writing(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.save(path, {"x": np.zeros(3)})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        assert len([*path.parent.iterdir()]) == 2
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(np, "ascontiguousarray", fail)
    with pytest.raises(MemoryError):
        safetensors.save(path, {"x": np.ones(3)})
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_data_is_on_disk_before_the_name_changes(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order: sync the file, rename it, sync the folder."""
    calls: list[str] = []
    written: list[int] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not folder:
            (temporary,) = path.parent.iterdir()
            written.append(temporary.stat().st_size)
        calls.append("fsync folder" if folder else "fsync file")
        fsync(descriptor)

    def traced_replace(source: str, target: str) -> None:
        assert os.path.dirname(source) == os.path.dirname(target)
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    safetensors.save(path, {"x": np.zeros(3)})
    assert written == [path.stat().st_size]
    expected = ["fsync file", "replace", "fsync folder"]
    assert calls == (expected if hasattr(os, "O_DIRECTORY") else expected[:2])


@posix
@pytest.mark.parametrize(("code", "raises"), [("EINVAL", False), ("ENOTSUP", False), ("EIO", True)])
def test_folder_that_cannot_be_synced(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, code: str, raises: bool
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(getattr(errno, code), "simulated")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if raises:
        with pytest.raises(OSError, match="simulated"):
            safetensors.save(path, {})
    else:
        safetensors.save(path, {})
    assert path.exists()


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_permissions_follow_the_umask(path: pathlib.Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        safetensors.save(path, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@posix
@pytest.mark.parametrize("dangling", [False, True])
def test_link_stays_a_link(path: pathlib.Path, dangling: bool) -> None:
    folder = path.parent / "elsewhere"
    folder.mkdir()
    target = folder / "real"
    if not dangling:
        target.write_bytes(b"old")
    path.symlink_to(target)
    safetensors.save(path, {"x": np.ones(2)})
    assert path.is_symlink()
    assert safetensors.load(target)[0]["x"].tolist() == [1, 1]
    assert [*folder.iterdir()] == [target]


@posix
def test_only_files_are_replaced(tmp_path: pathlib.Path) -> None:
    # Who is root would have made /dev/null a file.
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    for path in (pipe, folder, link):
        with pytest.raises(OSError, match=f"cannot be replaced by a file: '{path}'"):
            safetensors.save(path, {"a": np.ones(2)})
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["folder", "link", "pipe"]
