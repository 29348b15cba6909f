"""Run CUDA C++ kernels on the CPU: RawModule with CuPy's call signature, on NumPy arrays.

    module = RawModule(code=source, name_expressions=("softmax<float>",), mode="fast")
    module.get_function("softmax<float>")((blocks,), (threads,), (x, y, np.int32(n)))

Modes: "fast" is g++ -O2, in this process; "asan" AddressSanitizer and UndefinedBehaviorSanitizer,
"tsan" ThreadSanitizer with every CUDA thread a thread to it, both in a child process.

Arrays are written in place; one marked read-only must come back as it was. Arguments are checked
against the kernel's C++ parameters: CuPy passes the bytes it is given, so an int64 for an `int`
or a float64 for a `float` is a silent bug there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_HERE = Path(__file__).resolve().parent
_CACHE = Path(
    os.environ.get("CPU_CUDA_CACHE", Path(tempfile.gettempdir()) / f"cpu_cuda_{os.getuid()}")
)
# for the kernel; for src/cuda_shim.cpp, which is never instrumented; for the linker
_FLAGS = {
    "fast": (["-O2", "-fPIC"], ["-O2", "-fPIC"], ["-shared"]),
    "asan": (
        [
            *("-O1", "-g", "-fno-omit-frame-pointer"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        ],
        ["-O2", "-DCUSHIM_ASAN"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": (
        ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=thread"],
        ["-O2", "-DCUSHIM_TSAN"],
        ["-fsanitize=thread"],
    ),
}
_ENVIRONMENT = {
    "asan": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "tsan": {"TSAN_OPTIONS": "exitcode=66:history_size=4"},
}
MODES = tuple(_FLAGS)
_ERROR_BYTES = 512
# An array keeps its address modulo this, so that a load of 16 bytes is as misaligned in the child
# as it was here.
_ALIGNMENT = 256


class CompileError(Exception):
    """The kernel source did not compile."""


class KernelError(Exception):
    """The kernel did something a GPU would not survive, or a sanitizer objected."""


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def why_not(mode: str) -> str | None:
    """Return why kernels cannot run here in this mode, or None if they can."""
    if shutil.which(_compiler()) is None:
        return f"{_compiler()} is not installed"
    try:
        _machine(mode)
        RawModule('extern "C" __global__ void nothing() {}', mode=mode).get_function("nothing")(
            (1,), (1,), ()
        )
    except (CompileError, KernelError, OSError) as error:
        return f"{_compiler()} cannot build or run mode {mode!r}: {str(error).strip()[-300:]}"
    return None


def cached_file(suffix: str, key: Sequence[object]) -> Path:
    """Return where in the cache a file belongs that is made from `key` alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()
    return _CACHE / (digest[:24] + suffix)


def write_cached(target: Path, content: bytes) -> None:
    """Write a file of the cache at once, so that another process never reads half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o755)
    os.replace(file.name, target)


@functools.cache
def _headers() -> str:
    return "".join(p.read_text() for p in sorted((_HERE / "include").glob("*.h")))


def _compiled(suffix: str, flags: list[str], source: str, link: Path | None = None) -> Path:
    """Compile `source`, or find the result of having done so."""
    command = [_compiler(), "-std=c++20", "-w", f"-I{_HERE / 'include'}", *flags]
    target = cached_file(suffix, (command, link, _headers(), source))
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            text, out = Path(folder) / "kernel.cpp", Path(folder) / "out"
            text.write_text(source)
            extra = [str(link)] if link else []
            result = subprocess.run(
                [*command, str(text), *extra, "-o", str(out)],
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                raise CompileError(result.stderr)
            write_cached(target, out.read_bytes())
    return target


def _machine(mode: str) -> Path:
    flags = [*_FLAGS[mode][1], "-c"]
    return _compiled(".o", flags, (_HERE / "src" / "cuda_shim.cpp").read_text())


# ------------------------------------------------------------------ source rewriting
_SHARED = re.compile(r"(extern\s+)?__shared__\s+([^;]*?);", re.DOTALL)
_ALIGN = re.compile(r"(?:__align__|alignas)\s*\(([^)]*)\)\s*")
_DIMENSIONS = r"((?:\[[^\]]*\]\s*)*)"
_FIRST_DECLARATOR = re.compile(rf"(.*?)(\w+)\s*{_DIMENSIONS}$")
_DECLARATOR = re.compile(rf"^\s*(\w+)\s*{_DIMENSIONS}$")


def _rewrite_shared(source: str) -> str:
    """Turn each __shared__ declaration into a reference to memory that the block owns."""
    site = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal site
        extern, body = match[1], " ".join(match[2].split())
        unreadable = CompileError(f"cannot read the declaration `__shared__ {body}`")
        align = _ALIGN.match(body)
        if align:
            body = body[align.end() :]
        head, *rest = _split_commas(body)
        first = _FIRST_DECLARATOR.match(head)
        if not first:
            raise unreadable
        cpp_type = first[1].strip()
        declarators = [(first[2], first[3])]
        for text in rest:
            declarator = _DECLARATOR.match(text)
            if not declarator:
                raise unreadable
            declarators.append((declarator[1], declarator[2]))
        out = []
        for name, dimensions in declarators:
            if extern:
                out.append(
                    f"{cpp_type}* {name} = static_cast<{cpp_type}*>(cushim::shared_dynamic());"
                )
                continue
            site += 1
            alignment = align[1] if align else f"alignof({cpp_type})"
            out.append(
                f"auto& {name} = *static_cast<{cpp_type}(*){dimensions}>(cushim::shared_static("
                f"{site}, sizeof({cpp_type}{dimensions}), {alignment}));"
            )
        return " ".join(out) + "\n" * match[0].count("\n")

    return _SHARED.sub(replace, source)


def _split_commas(text: str) -> list[str]:
    """Split at commas outside <>, () and []."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "<([") - (c in ">)]")
        if c == "," and not depth:
            parts.append(text[last:i])
            last = i + 1
    return [*parts, text[last:]]


def _strip_comments(source: str) -> str:
    return re.sub(
        r"//[^\n]*|/\*.*?\*/",
        lambda match: "\n" * match[0].count("\n") or " ",
        source,
        flags=re.DOTALL,
    )


def _extern_c_kernels(source: str) -> list[str]:
    bounds = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
    return re.findall(rf'extern\s+"C"\s+__global__\s+void\s+{bounds}(\w+)\s*\(', source)


# ------------------------------------------------------------------ modules and kernels
class _Config(ctypes.Structure):  # Config in cuda_shim.cpp
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("resident", ctypes.c_uint),
        ("order", ctypes.c_int),
        ("skip", ctypes.c_ulonglong),
    )


class RawModule:
    """Kernels of one source, built for the CPU.

    `order` is that of a kernel's threads where its call names none.
    """

    def __init__(
        self,
        code: str,
        *,
        options: Sequence[str] = (),
        name_expressions: Sequence[str] = (),
        mode: str = "fast",
        order: int = 0,
    ) -> None:
        self.mode, self.order = mode, order
        plain = _strip_comments(code)
        self.names = list(dict.fromkeys([*_extern_c_kernels(plain), *name_expressions]))
        if not self.names:
            raise CompileError('no extern "C" __global__ function and no name_expressions')
        table = ",\n".join(f'  cushim::Bind<&{k}>::entry("{k}")' for k in self.names)
        self._source = (
            f'#include "cuda_shim.h"\n#line 1 "kernel.cu"\n{_rewrite_shared(plain)}\n'
            '#line 1 "launch table"\nextern const cushim::Entry cushim_kernels[];\n'
            f"const cushim::Entry cushim_kernels[] = {{\n{table}\n}};\n"
        )
        self._options = [o for o in options if o.startswith(("-D", "-U", "-I"))]
        self._binary = self._build(mode)

    def _build(self, mode: str) -> Path:
        kernel_flags, _, link_flags = _FLAGS[mode]
        flags = [*kernel_flags, *self._options, *link_flags]
        suffix = ".so" if mode == "fast" else ".exe"
        return _compiled(suffix, flags, self._source, link=_machine(mode))

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        # a sanitized build cannot be loaded into this process: its signatures come from a plain one
        library = ctypes.CDLL(str(self._binary if self.mode == "fast" else self._build("fast")))
        library.cushim_signature.restype = ctypes.c_char_p
        library.cushim_run.argtypes = (
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_char_p, ctypes.c_size_t),
        )
        return library

    def get_function(self, name: str) -> RawKernel:
        """Return one of its kernels, by the name it was asked for with."""
        return RawKernel(self, name)

    def signature(self, index: int) -> list[str]:
        """Return the kind and the bytes of each parameter of a kernel, as in "p8" or "i4"."""
        text: bytes = self._library.cushim_signature(index)
        return text.decode().split()

    def run(self, index: int, config: _Config, arguments: list[_Argument]) -> None:
        """Run a kernel on checked arguments and write its results into their arrays."""
        read_only = [
            (i, a.array.tobytes())
            for i, a in enumerate(arguments)
            if a.is_pointer and not a.array.flags.writeable
        ]
        if self.mode == "fast":
            self._run_here(index, config, arguments)
        else:
            self._run_child(index, config, arguments)
        for i, before in read_only:
            if arguments[i].array.tobytes() != before:
                raise KernelError(f"{self.names[index]} wrote to argument {i}, which is read-only")

    def _run_here(self, index: int, config: _Config, arguments: list[_Argument]) -> None:
        # a pointer is passed as the address of a cell that holds it
        cells = [ctypes.c_void_p(a.array.ctypes.data) for a in arguments]
        parameters = (ctypes.c_void_p * max(1, len(arguments)))()
        for i, (cell, a) in enumerate(zip(cells, arguments, strict=True)):
            parameters[i] = ctypes.addressof(cell) if a.is_pointer else a.array.ctypes.data
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._library.cushim_run(
            index, ctypes.addressof(config), parameters, error, _ERROR_BYTES
        ):
            raise KernelError(error.value.decode())

    def _run_child(self, index: int, config: _Config, arguments: list[_Argument]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            call = [struct.pack("=i", index), bytes(config), struct.pack("=i", len(arguments))]
            seen: dict[tuple[int, int], int] = {}
            own = []  # arrays but for those that came before (a kernel that works in place)
            for i, (array, is_pointer) in enumerate(arguments):
                address = array.ctypes.data
                first = seen.setdefault((address, array.nbytes), i) if is_pointer else i
                if first != i:
                    call.append(struct.pack("=QQQ", 2 + first, 0, 0))
                    continue
                data = array.tobytes()
                offset = address % _ALIGNMENT if is_pointer else 0
                call += [struct.pack("=QQQ", int(is_pointer), len(data), offset), data]
                if is_pointer:
                    own.append(array)
            Path(folder, "in").write_bytes(b"".join(call))
            command = [str(self._binary), f"{folder}/in", f"{folder}/out"]
            if self.mode == "tsan" and shutil.which("setarch"):
                # some kernels' random address layout upsets libtsan
                command = ["setarch", "-R", *command]
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **_ENVIRONMENT[self.mode]},
            )
            if result.returncode:
                raise KernelError(result.stderr)
            out = Path(folder, "out").read_bytes()
        at = 0
        for array in own:
            ctypes.memmove(array.ctypes.data, out[at : at + array.nbytes], array.nbytes)
            at += array.nbytes


class _Argument(NamedTuple):
    array: np.ndarray[Any, Any]  # a scalar's is 0-d
    is_pointer: bool


class RawKernel:
    """One kernel; called as cupy.RawKernel is."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.module, self.name = module, name
        try:
            self.index = module.names.index(name)
        except ValueError:
            raise KeyError(f"{name!r} is none of {module.names}") from None

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        resident: int = 1,
        order: int | None = None,
        skip: int = 0,
    ) -> None:
        """Run it.

        `resident`: blocks in flight at once, 0 for all of them (a cooperative launch). `order`: 0
        threads in index order, 1 reversed, otherwise the seed of a random order. `skip`: so many
        blocks at the grid's start do not run, to see the end of a grid too large to run whole.
        """
        order = self.module.order if order is None else order
        config = _Config(shared_bytes=shared_mem, resident=resident, order=order, skip=skip)
        config.grid[:] = (*grid, 1, 1)[:3]
        config.block[:] = (*block, 1, 1)[:3]
        self.module.run(self.index, config, self._checked(args))

    def _checked(self, args: Sequence[Any]) -> list[_Argument]:
        parameters = self.module.signature(self.index)
        if len(args) != len(parameters):
            raise TypeError(
                f"{self.name} has {len(parameters)} parameters, {len(args)} arguments given"
            )
        return [
            self._checked_one(i, a, p)
            for i, (a, p) in enumerate(zip(args, parameters, strict=True))
        ]

    def _checked_one(self, i: int, value: Any, parameter: str) -> _Argument:
        kind, size = parameter[0], int(parameter[1:])
        is_pointer = isinstance(value, np.ndarray)
        array = np.asarray(np.uint64(0) if value is None else value)  # None: a null pointer
        scalar_kind = {"f": "f", "i": "i", "u": "i", "b": "i"}.get(array.dtype.kind, "s")
        got = "p" if is_pointer or value is None else scalar_kind
        if got != kind or (not is_pointer and array.itemsize != size):
            what = "an array" if is_pointer else f"a {array.dtype} scalar"
            raise TypeError(
                f"{self.name}: argument {i} is {what}, the parameter is {parameter} "
                "(kind and size in bytes)"
            )
        if is_pointer and not array.flags.c_contiguous:
            raise TypeError(f"{self.name}: argument {i} is not contiguous")
        return _Argument(array, is_pointer)
