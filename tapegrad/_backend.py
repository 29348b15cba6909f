"""The only door to CuPy: which array module, moving arrays between the two, facts about the device.

Operations run where their arrays are (`module_of`). The backend that a user chooses only says where
*new* arrays are made: values given as Python numbers, lists or NumPy arrays.
"""

from __future__ import annotations

import os
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

# An array of either module. CuPy has no types to import where it is not installed.
Array = Any
Module = Any
_T = TypeVar("_T")

NAMES = ("auto", "numpy", "cupy")

# CuPy's array class once CuPy is loaded. Until then every array is NumPy's, and no operation
# pays for asking.
cupy_ndarray: type | None = None
numpy_alone = True  # no array is CuPy's, and no kernel is tried

_cupy: types.ModuleType | None = None
_tried: types.ModuleType | None = None  # CuPy that has computed something here
_setting: str | None = None  # of set_backend; None: the environment variable decides
_auto: Module = None  # what "auto" came to, found once
_kernels_enabled = os.environ.get("TAPEGRAD_KERNELS", "1") != "0"


class _Override(threading.local):
    def __init__(self) -> None:
        self.names: list[str] = []


_override = _Override()


def _check_name(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


def set_backend(name: str) -> None:
    """Choose where new arrays are made, for all threads: `"auto"`, `"numpy"` or `"cupy"`.

    Raises `ValueError` for another name, `RuntimeError` with the cause and the cure when CuPy is
    asked for by name and cannot run here.

    >>> import tapegrad as tg
    >>> tg.set_backend("numpy")
    """
    global _setting
    if _check_name(name, "set_backend(name)") == "cupy":
        _require_cupy()
    _setting = name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose where new arrays are made, for this thread, inside a `with` block.

    Raises what `set_backend` raises.

    >>> import tapegrad as tg
    >>> with tg.backend("numpy"):
    ...     x = tg.constant([1.0, 2.0])
    """
    if _check_name(name, "backend(name)") == "cupy":
        _require_cupy()
    _override.names.append(name)
    try:
        yield
    finally:
        _override.names.pop()


def get_backend() -> str:
    """Return where new arrays are made now: `"numpy"` or `"cupy"`.

    >>> import tapegrad as tg
    >>> with tg.backend("numpy"):
    ...     tg.get_backend()
    'numpy'
    """
    return name_of(default_module())


def chosen() -> str | None:
    """Return the name that was chosen last for this thread; None: the environment decides."""
    return _override.names[-1] if _override.names else _setting


def default_module() -> Module:
    """Return the array module in which new arrays are made."""
    name = chosen()
    if name is None:
        name = os.environ.get("TAPEGRAD_BACKEND", "auto")
        _check_name(name, "the environment variable TAPEGRAD_BACKEND")
    if name == "numpy":
        return np
    return _require_cupy() if name == "cupy" else _automatic()


def _automatic() -> Module:
    """Return CuPy where a usable GPU is, else NumPy; asked once, for it costs up to a second."""
    global _auto
    if _auto is None:
        cupy, problem, installed = _usable_cupy()
        if problem is not None and installed:
            warnings.warn(
                f"CuPy is installed but cannot be used ({problem}): tapegrad uses NumPy. "
                'Call tapegrad.set_backend("numpy") or set TAPEGRAD_BACKEND=numpy to choose it '
                "without this warning.",
                RuntimeWarning,
                stacklevel=2,
            )
        _auto = np if cupy is None else cupy
    return _auto


def _usable_cupy() -> tuple[Module | None, str | None, bool]:
    """Return (CuPy or None, why it cannot run, whether it is installed)."""
    global _tried
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return None, "CuPy is not installed", False
        return None, f"importing it failed: {error}", True
    except Exception as error:  # built for another NumPy, say
        return None, f"importing it failed: {type(error).__name__}: {error}", True
    if cupy is _tried:  # each new array asks: it must not cost a launch
        return cupy, None, True
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return None, "no CUDA device was found", True
        # The driver may be too old for this CuPy, or CUDA's compiler and headers missing: without
        # them there is memory but not one operation.
        cupy.empty(1) + 1
        _load(cupy)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}", True
    _tried = cupy
    return cupy, None, True


def _require_cupy() -> Module:
    cupy, problem, installed = _usable_cupy()
    if cupy is None:
        cure = (
            "check the NVIDIA driver with nvidia-smi"
            if installed
            else 'install it with pip install "tapegrad[cuda13]" (or [cuda12])'
        )
        raise RuntimeError(
            f'the backend "cupy" cannot be used: {problem}; {cure}, or use the backend "numpy"'
        )
    return cupy


_OLDEST_CUPY = 14  # before, a Python number beside an array had a type of its own


def _load(cupy: types.ModuleType) -> None:
    global _cupy, cupy_ndarray, numpy_alone
    if int(cupy.__version__.split(".")[0]) < _OLDEST_CUPY:
        raise RuntimeError(
            f"this is CuPy {cupy.__version__}, and tapegrad needs {_OLDEST_CUPY} or later: "
            'pip install --upgrade "tapegrad[cuda13]" (or [cuda12])'
        )
    _cupy, cupy_ndarray, numpy_alone = cupy, cupy.ndarray, False


def facts() -> dict[str, str]:
    """Return backend, device, versions, and whether kernels are in use, for people to read."""
    import platform

    from tapegrad.kernels import gemm, kernel_names

    xp = default_module()
    found = {
        "backend": name_of(xp),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "numpy": np.__version__,
    }
    if xp is np:
        cupy, problem, _ = _usable_cupy()
        found["cupy"] = "usable, not chosen" if cupy is not None else f"not used: {problem}"
        state = "not in use: NumPy computes the same values"
    else:
        runtime = xp.cuda.runtime
        device = xp.cuda.Device()
        properties = runtime.getDeviceProperties(device.id)
        free, total = device.mem_info
        found["cupy"] = xp.__version__
        found["device"] = f"{properties['name'].decode()}, sm_{device.compute_capability}"
        found["memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found["cuda"] = (
            f"driver {_version(runtime.driverGetVersion())}, "
            f"runtime {_version(runtime.runtimeGetVersion())}"
        )
        state = "in use" if _kernels_enabled else "turned off by TAPEGRAD_KERNELS=0"
    on = _kernels_enabled or xp is np
    found["cublaslt"] = gemm.describe(xp) if on else state
    for source, names in kernel_names().items():
        found[f"kernels {source}"] = f"{len(names)} {state}"
    return found


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def is_array(value: object) -> bool:
    """Tell whether `value` is an array of either module (NumPy's scalars are not)."""
    if isinstance(value, np.ndarray):
        return True
    kind = type(value)
    if kind.__name__ == "ndarray" and kind.__module__.split(".")[0] == "cupy":
        if _cupy is None:  # the user imported CuPy, tapegrad has not yet needed it
            import cupy

            _load(cupy)
        return True
    return False


def module_of(arrays: Iterable[Array]) -> Module:
    """Return the module of `arrays`, which may hold Python numbers too.

    Raises `TypeError` when some are NumPy's and some CuPy's.
    """
    if cupy_ndarray is None:
        return np
    found: Module = None
    for array in arrays:
        if isinstance(array, cupy_ndarray):
            here = _cupy
        elif isinstance(array, (np.ndarray, np.generic)):
            here = np
        else:
            continue
        if found is None:
            found = here
        elif found is not here:
            raise TypeError(_describe_mixture(arrays))
    return np if found is None else found


def _describe_mixture(arrays: Iterable[Array]) -> str:
    places = ", ".join(
        f"argument {i} ({name_of(module_of([a]))}, shape {a.shape})"
        for i, a in enumerate(arrays)
        if hasattr(a, "shape")
    )
    return (
        f"arguments are on different backends: {places}; nothing is copied silently: "
        'make them on one backend, or move one with tapegrad.to_backend(x, "numpy" or "cupy")'
    )


def name_of(module: Module) -> str:
    """Return a module's name as users write it."""
    return "cupy" if module is _cupy and module is not None else "numpy"


def module_named(name: str) -> Module:
    """Return the module that a user's `name` stands for."""
    if _check_name(name, "backend") == "numpy":
        return np
    return _require_cupy() if name == "cupy" else _automatic()


def runs_kernels(xp: Module) -> bool:
    """Tell whether primitives try their kernels on arrays of this module.

    `TAPEGRAD_KERNELS=0` turns all of them off, for debugging and for benchmarks.
    """
    return _kernels_enabled and xp is not np


# Called when the host has waited for a device; they raise where something has gone wrong there.
after_waiting: list[Callable[[], None]] = []


def waited(value: _T) -> _T:
    """Return what the host may have waited for, unless something went wrong on the device."""
    if after_waiting:
        for look in tuple(after_waiting):
            look()
    return value


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """Return the values as a NumPy array of the caller's own."""
    if _is_cupy(array):
        return waited(np.asarray(array.get()))
    return np.array(array)


def to_module(array: Array, xp: Module) -> Array:
    """Copy an array into memory of its own in the module `xp`."""
    if xp is np:
        return to_numpy(array)
    return xp.array(array, copy=True)


def owner_of(array: Array) -> Array:
    """Return the array that owns the memory which `array` shows."""
    while True:
        base = array.base
        if base is None or not hasattr(base, "base"):
            return array
        array = base


def byte_bounds(array: Array) -> tuple[int, int]:
    """Return the first address of the memory that `array` shows, and the one past its last."""
    low = high = array.data.ptr if _is_cupy(array) else array.__array_interface__["data"][0]
    if array.size == 0:
        return low, low
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        low, high = (low + reach, high) if stride < 0 else (low, high + reach)
    return low, high + array.itemsize


def out_of_memory(error: MemoryError, name: str) -> MemoryError:
    """Return CuPy's complaint with the operation's name and what is free; NumPy's as it is."""
    if _cupy is None or not isinstance(error, _cupy.cuda.memory.OutOfMemoryError):
        return error
    text = str(error).rstrip(".")
    free, total = _cupy.cuda.Device().mem_info
    unused = _cupy.get_default_memory_pool().free_bytes()
    return MemoryError(
        f"[{name}] {text[:1].lower()}{text[1:]}: {free + unused:,} of the GPU's {total:,} bytes "
        "are free; take smaller batches, or let go of tensors and tapes that are not needed"
    )


def _is_cupy(array: Array) -> bool:
    return cupy_ndarray is not None and isinstance(array, cupy_ndarray)


_JOINED_AT_ONCE = 8


def concatenated(xp: Module, arrays: Sequence[Array], axis: int = 0) -> Array:
    """Return the arrays one after the other along an axis that they have.

    Of more than 8 small ones CuPy copies the addresses to the device, which it refuses to do while
    a graph is captured. So there they are joined by eights.
    """
    while xp is not np and len(arrays) > _JOINED_AT_ONCE:
        starts = range(0, len(arrays), _JOINED_AT_ONCE)
        arrays = [xp.concatenate(arrays[i : i + _JOINED_AT_ONCE], axis=axis) for i in starts]
    return xp.concatenate(arrays, axis=axis)


def is_short(dtype: np.dtype[Any]) -> bool:
    """Tell whether floating numbers have 16 bits, and so are summed in float32.

    NumPy would add them up as they are: in float16 2048 + 1 is 2048, in bfloat16 256 + 1 is 256.
    """
    return dtype.itemsize == 2 and dtype.kind in "fV"


def scatter_add(xp: Module, values: Array, index: Array, rows: int) -> Array:
    """Return an array of `rows` rows in which row index[i] is the sum of the values[i].

    Deterministic on both backends: NumPy's `add.at` adds in order; CuPy's uses atomics, whose
    order changes the last bits from run to run, so there equal indices are brought together by
    a stable sort and summed by doubling strides (log2(n) passes, no atomics).
    """
    short = xp is np and is_short(values.dtype)
    out = xp.zeros((rows, *values.shape[1:]), np.float32 if short else values.dtype)
    if xp is np:
        np.add.at(out, index, values)
        return out.astype(values.dtype, copy=False)
    if index.size == 0:
        return out
    order = xp.argsort(index, kind="stable")
    key, total = index[order], values[order]
    column = (-1,) + (1,) * (values.ndim - 1)
    step = 1
    while step < key.size:
        same = (key[step:] == key[:-step]).reshape(column)
        total = xp.concatenate([total[:step], total[step:] + xp.where(same, total[:-step], 0)])
        step *= 2
    out[key] = total[_last_of_equals(xp, key)]
    return out


def _last_of_equals(xp: Module, key: Array) -> Array:
    """Return for each element of a sorted array the place of the last that is equal to it.

    What is written to a place that is named twice is then the same both times. To leave out the
    others would make an array whose size the host must wait for.
    """
    return xp.searchsorted(key, key, side="right") - 1


def write_at(xp: Module, target: Array, index: Any, value: Any) -> None:
    """Do `target[index] = value`; where a place is named twice, the last value stays.

    So it is in NumPy. In CuPy any of them may, and another one in the next run.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if xp is np or not any(getattr(part, "dtype", np.dtype(bool)).kind in "iu" for part in parts):
        target[index] = value
        return
    places = xp.arange(target.size).reshape(target.shape)[index]
    values = xp.broadcast_to(xp.asarray(value, target.dtype), places.shape).reshape(-1)
    if places.size == 0:
        return
    order = xp.argsort(places.reshape(-1), kind="stable")
    key = places.reshape(-1)[order]
    flat = target.reshape(-1)  # a view, or a copy that is put back
    flat[key] = values[order[_last_of_equals(xp, key)]]
    target[...] = flat.reshape(target.shape)
