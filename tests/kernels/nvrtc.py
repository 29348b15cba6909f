"""Compile CUDA C++ to machine code with NVRTC, on a machine without driver or GPU.

Needs the wheels cuda-bindings, nvidia-cuda-nvrtc and nvidia-cuda-runtime (headers), of CUDA 12
(there their names end in -cu12) or 13.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_cuda import cached_file, write_cached


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


@functools.cache
def _version() -> tuple[int, int] | None:
    """Return the version of the NVRTC that is used, if there is one."""
    if not _installed("cuda.bindings.nvrtc"):
        return None
    try:
        _, major, minor = _nvrtc().nvrtcVersion()
    except Exception:  # the library is missing; which exception says so depends on the version
        return None
    return major, minor


@functools.cache
def _headers() -> Path | None:
    """Return the folder of CUDA's headers that belong to the NVRTC."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    version = _version()
    name = "cuda_runtime" if version is not None and version[0] < 13 else "cu13"
    folders = [root / name / "include" for root in roots]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def why_not() -> str | None:
    """Return what is missing for `resource_usage`, or None."""
    if _version() is None:
        return "not installed: cuda-bindings and nvidia-cuda-nvrtc"
    return None if _headers() else "not installed: nvidia-cuda-runtime of NVRTC's CUDA version"


def _architectures() -> tuple[str, ...]:
    version = _version()
    volta = ("sm_70",) if version is not None and version[0] < 13 else ()  # gone in CUDA 13
    return *volta, "sm_75", "sm_80", "sm_89", "sm_90", "sm_100"


ARCHITECTURES = _architectures()


def _compile(source: str, flags: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """Return what the compiler tells of the kernels, and their PTX."""
    nvrtc = _nvrtc()

    def result(answer: tuple[Any, ...]) -> Any:
        error, *values = answer
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(str(error))
        return values[0] if values else None

    program = result(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None))
    for name in names:
        result(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
    log = b" " * result(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(log.decode())
    text = b" " * result(nvrtc.nvrtcGetPTXSize(program))
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return log.decode(), text.decode()


def _flags(architecture: str, options: Sequence[str]) -> list[str]:
    # what CuPy passes as well: denormals are zero, functions are the device's
    return [
        *(f"-arch={architecture}", f"-I{_headers()}", "-ftz=true", "--ptxas-options=-v"),
        *("--device-as-default-execution-space", *options),
    ]


def ptx(
    source: str, architecture: str, names: Sequence[str] = (), options: Sequence[str] = ()
) -> str:
    """Return what the compiler makes of the kernels before it is a device's machine code."""
    return _compile(source, _flags(architecture, options), names)[1]


# What ptxas says of a kernel, over three lines.
_NUMBERS = re.compile(
    r"Function properties for (\w+)\n"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers([^\n]*)"
)
_SHARED = re.compile(r"(\d+) bytes smem")


def resource_usage(
    source: str, architecture: str, names: Sequence[str] = (), options: Sequence[str] = ()
) -> dict[str, dict[str, int]]:
    """Return registers, stack, spilled bytes and shared memory of each kernel, by mangled name.

    The answer is kept on disk.
    """
    flags = _flags(architecture, options)
    cached = cached_file(".json", (source, flags, names, _version()))
    if not cached.exists():
        usage = {}
        for name, stack, stores, loads, registers, rest in _NUMBERS.findall(
            _compile(source, flags, names)[0]
        ):
            shared = _SHARED.search(rest)
            usage[name] = {
                "registers": int(registers),
                "stack": int(stack),
                "spilled": int(stores) + int(loads),
                "shared": int(shared[1]) if shared else 0,
            }
        write_cached(cached, json.dumps(usage).encode())
    result: dict[str, dict[str, int]] = json.loads(cached.read_text())
    return result
