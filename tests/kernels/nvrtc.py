"""Compile CUDA C++ to machine code with NVRTC, on a machine without driver or GPU.

Needs the wheels cuda-bindings, nvidia-cuda-nvrtc, nvidia-cuda-runtime (headers) and
nvidia-cuda-cuobjdump (registers and spills), all of CUDA 13.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_cuda import cached_file, write_cached

ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


@functools.cache
def _root() -> Path | None:
    """Return the folder that CUDA's wheels share."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(p) / "cu13" for p in (found.submodule_search_locations or [])] if found else []
    return next((folder for folder in folders if folder.is_dir()), None)


def why_not() -> str | None:
    """Return what is missing for `resource_usage`, or None."""
    root = _root()
    wheels = {
        "cuda-bindings": _installed("cuda.bindings.nvrtc"),
        "nvidia-cuda-nvrtc": root is not None and any(root.glob("lib/libnvrtc.so*")),
        "nvidia-cuda-runtime": root is not None and (root / "include" / "cuda_fp16.h").exists(),
        "nvidia-cuda-cuobjdump": root is not None and (root / "bin" / "cuobjdump").exists(),
    }
    missing = [name for name, there in wheels.items() if not there]
    return f"not installed, or not of CUDA 13: {', '.join(missing)}" if missing else None


def _compile(source: str, flags: Sequence[str], names: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    def result(answer: tuple[Any, ...]) -> Any:
        error, *values = answer
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(str(error))
        return values[0] if values else None

    program = result(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None))
    for name in names:
        result(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * result(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode())
    cubin: bytes = b" " * result(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def resource_usage(
    source: str, architecture: str, names: Sequence[str] = (), options: Sequence[str] = ()
) -> dict[str, dict[str, int]]:
    """Return registers, stack, shared and local memory of each kernel, by its mangled name.

    A stack or local size that is not 0 means spilling. The answer is kept on disk.
    """
    from cuda.bindings import nvrtc

    root = _root()
    assert root is not None
    # what CuPy passes as well: denormals are zero, functions are the device's
    flags = [
        *(f"-arch={architecture}", f"-I{root / 'include'}", "-ftz=true"),
        *("--device-as-default-execution-space", *options),
    ]
    cached = cached_file(".json", (source, flags, names, nvrtc.nvrtcVersion()))
    if not cached.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(_compile(source, flags, names))
            file.flush()
            text = subprocess.run(
                [root / "bin" / "cuobjdump", "--dump-resource-usage", file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        number = r"(\d+)"
        found = re.findall(
            rf"Function (\S+):\s+REG:{number} STACK:{number} SHARED:{number} LOCAL:{number}", text
        )
        keys = ("registers", "stack", "shared", "local")
        usage = {name: dict(zip(keys, map(int, rest), strict=True)) for name, *rest in found}
        write_cached(cached, json.dumps(usage).encode())
    result: dict[str, dict[str, int]] = json.loads(cached.read_text())
    return result
