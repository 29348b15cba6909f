"""Files: reading untrusted ones at bounded memory, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tapegrad.errors import FormatError

DEFAULT_MAX_BYTES = 1 << 30

# Image data stays below 20:1; a small result may be as empty as it likes, up to what deflate can.
_MAX_RATIO = 200
_MAX_DEFLATE_RATIO = 1032
_RATIO_FREE_BYTES = 16 << 20
_CHUNK = 1 << 18
_MAX_DIMENSIONS = 64  # NumPy's own limit


class Source:
    """Reads a file, or a compressed stretch of one, forwards; every failure names its place."""

    def __init__(
        self,
        file: io.BufferedReader,
        name: str,
        start: int,
        stored: int,
        *,
        length: int | None,
        wbits: int | None = None,
        crc: int | None = None,
    ) -> None:
        """
        Args:
            file: the open file.
            name: what error messages call it.
            start: the offset of its first byte in the file.
            stored: how many bytes it takes in the file.
            length: how many bytes it must deliver; None if only the compressed data tells.
            wbits: zlib's code for the compression; None for plain bytes.
            crc: the CRC-32 of what it delivers, checked by `finish`.
        """
        self.file = file
        self.name = name
        self.start = start
        self.stored = stored
        self.length = length
        self.position = 0
        self._inflater = None if wbits is None else zlib.decompressobj(wbits)
        self._pending = b""
        self._unread = stored
        self._expected_crc = crc
        self._crc = 0
        file.seek(start)

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        """Raises FormatError for the byte `at`, or for the next one to be read."""
        offset = self.position if at is None else at
        if self._inflater is None:
            place = f"byte {self.start + offset}"
        else:
            place = f"byte {offset} of the decompressed data"
        # What it quotes from the file may be millions of characters long.
        raise FormatError(f"{self.name}: {place}: {what[:500]}")

    def _inflate(self, limit: int) -> bytes:
        """At most `limit` decompressed bytes, and none at the end of the compressed data only."""
        assert self._inflater is not None
        while not self._inflater.eof:
            data = self._pending or self.file.read(min(_CHUNK, self._unread))
            if not self._pending:
                self._unread -= len(data)
            try:
                piece = self._inflater.decompress(data, limit)
            except zlib.error as error:
                self.fail(f"damaged compressed data ({error})")
            self._pending = self._inflater.unconsumed_tail
            if piece:
                return piece
            if not data:
                self.fail("truncated: the compressed data ends too early")
        return b""

    def _fill(self, view: memoryview, what: str) -> None:
        wanted = len(view)
        done = 0
        while done < wanted:
            if self._inflater is None:
                count = self.file.readinto(view[done:])
            else:
                piece = self._inflate(min(_CHUNK, wanted - done))
                count = len(piece)
                view[done : done + count] = piece
            if not count:
                self.fail(f"truncated: {what} takes {wanted} bytes, {done} were found")
            done += count
            self.position += count
        if self._expected_crc is not None:
            self._crc = zlib.crc32(view, self._crc)

    def _check_room(self, count: int, what: str) -> None:
        """Refuses what cannot be there, before anything is allocated for it."""
        if self.length is not None and count > self.length - self.position:
            rest = self.length - self.position
            self.fail(f"truncated: {what} takes {count} bytes, {rest} are left")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; the caller has bounded `count`."""
        self._check_room(count, what)
        buffer = bytearray(count)
        self._fill(memoryview(buffer), what)
        return bytes(buffer)

    def array_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """The bytes that an array takes, refusing shapes that NumPy cannot hold."""
        # The rank comes first: the product of a million axes takes hours. NumPy overflows on
        # (0, 2**40, 2**40) too, so zeros count as ones.
        if (
            len(shape) > _MAX_DIMENSIONS
            or math.prod(max(extent, 1) for extent in shape) * itemsize > sys.maxsize
        ):
            self.fail(f"a shape of {len(shape)} axes and a size that no array can have")
        return math.prod(shape) * itemsize

    def check_rest(self, nbytes: int) -> None:
        """Refuses data that is not exactly the rest, before anything is allocated for it."""
        if self.length is not None and nbytes != self.length - self.position:
            rest = self.length - self.position
            problem = "truncated" if rest < nbytes else "trailing bytes"
            self.fail(f"{problem}: the header promises {nbytes} bytes of data, {rest} follow")

    def read_array(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], *, fortran: bool = False
    ) -> NDArray[Any]:
        """Reads an array, in native byte order; the caller has bounded its size."""
        result = np.empty(shape, dtype, order="F" if fortran else "C")
        data = (result.T if fortran else result).reshape(-1).view(np.uint8)
        start = self.position
        self._fill(data.data, "the data")
        if dtype == np.bool_ and data.max(initial=0) > 1:
            self.fail("a boolean is neither 0 nor 1", at=start + int(np.argmax(data > 1)))
        if not dtype.isnative:
            result = result.byteswap(inplace=True).view(dtype.newbyteorder())
        return result

    def finish(self) -> None:
        """Refuses bytes after the end, and data whose CRC is not the promised one."""
        if self.length is not None and self.position != self.length:
            self.fail(f"trailing bytes: {self.length - self.position} after the end of the data")
        if self._inflater is not None:
            if self._inflate(1):
                self.fail("trailing bytes: more data than the header promises")
            extra = len(self._inflater.unused_data) + self._unread
            if extra:
                self.fail(f"trailing bytes: {extra} after the end of the compressed data")
        if self._expected_crc is not None and self._crc != self._expected_crc:
            self.fail(f"CRC-32 is {self._crc:#010x}, {self._expected_crc:#010x} was promised")


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Opens a regular file as a `Source`; anything else (a pipe would block) is refused."""
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise FormatError(f"{name}: byte 0: not a regular file")
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield Source(file, name, 0, size, length=size)


def check_size(source: Source, nbytes: int, max_bytes: int) -> None:
    """Refuses data that is larger than allowed, or than its compressed form can well hold."""
    if nbytes > max_bytes:
        source.fail(
            f"the data needs {nbytes} bytes, more than max_bytes={max_bytes}; "
            "pass a larger max_bytes if you trust the file"
        )
    likely = max(_RATIO_FREE_BYTES, _MAX_RATIO * source.stored)
    if nbytes > min(likely, _MAX_DEFLATE_RATIO * source.stored):
        source.fail(
            f"{source.stored} bytes claim to hold {nbytes}, more than {_MAX_RATIO}:1; "
            "store the file uncompressed if that is right"
        )


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[io.BufferedWriter]:
    """Opens a file for writing that takes the place of `path` when the block ends, or never.

    Whatever happens, `path` holds either its old content or the whole new one, on disk. The file
    behind a symbolic link is replaced, the link stays. Permissions follow the umask.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: if any step fails; the temporary file is removed first. Also if `path` is there and
            no file: /dev/null would become one.

    >>> import pathlib, tempfile
    >>> from tapegrad._files import atomic_write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     target = pathlib.Path(folder, "notes.txt")
    ...     with atomic_write(target) as file:
    ...         _ = file.write(b"whole")
    ...     target.read_bytes()
    b'whole'
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(errno.EINVAL, "cannot be replaced by a file", os.fspath(path))
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".tapegrad-{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Puts the renaming itself on disk; Windows has no such call, some file systems refuse it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
