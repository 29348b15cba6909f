"""The columns of the tables: which peer, in which variant and environment."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple


class Column(NamedTuple):
    """A peer as it is measured.

    module   the file beside this one; `needs` is what must be installed for it.
    device   "cpu", "gpu", or "any": where the column is shown.
    own      whether it is shown without being asked for.
    """

    name: str
    label: str
    module: str
    needs: str
    variant: str = "eager"
    device: str = "any"
    own: bool = False
    environment: tuple[tuple[str, str], ...] = ()


_NUMPY = (("TAPEGRAD_BACKEND", "numpy"),)
_CUPY = (("TAPEGRAD_BACKEND", "cupy"),)
# PyTorch's default allocator gives large results fresh pages each time and pays a page fault for
# each 4 kB; with this it asks for huge pages, as NumPy does.
_THP = (("THP_MEM_ALLOC_ENABLE", "1"),)

COLUMNS = {
    column.name: column
    for column in (
        Column("tapegrad", "tapegrad", "tapegrad", "numpy", own=True, environment=_NUMPY),
        Column(
            "tapegrad-compiled",
            "tapegrad compiled",
            "tapegrad",
            "numpy",
            "compiled",
            own=True,
            environment=_NUMPY,
        ),
        Column(
            "tapegrad-cupy",
            "tapegrad on CuPy",
            "tapegrad",
            "cupy",
            device="gpu",
            own=True,
            environment=_CUPY,
        ),
        Column(
            "tapegrad-cupy-compiled",
            "tapegrad on CuPy, compiled",
            "tapegrad",
            "cupy",
            "compiled",
            "gpu",
            True,
            _CUPY,
        ),
        Column(
            "tapegrad-cupy-kernels-off",
            "tapegrad on CuPy, kernels off",
            "tapegrad",
            "cupy",
            device="gpu",
            own=True,
            environment=(*_CUPY, ("TAPEGRAD_KERNELS", "0")),
        ),
        Column("numpy-by-hand", "NumPy by hand", "numpy_by_hand", "numpy", own=True),
        Column("numpy", "NumPy, plain", "array_library", "numpy", "numpy", own=True),
        Column("cupy", "CuPy, plain", "array_library", "cupy", "cupy", "gpu", True),
        Column("torch-eager", "PyTorch", "torch", "torch"),
        Column("torch-thp", "PyTorch, huge pages", "torch", "torch", "eager", "cpu", False, _THP),
        Column("torch-compile", "torch.compile", "torch", "torch", "compile", environment=_THP),
        Column(
            "torch-reduce-overhead",
            "torch.compile, reduce-overhead",
            "torch",
            "torch",
            "reduce-overhead",
            "gpu",
        ),
        Column(
            "torch-max-autotune",
            "torch.compile, max-autotune",
            "torch",
            "torch",
            "max-autotune",
            "gpu",
        ),
        Column("torch-graph", "PyTorch, CUDA graph", "torch", "torch", "graph", "gpu"),
        Column("jax", "JAX jit", "jax", "jax"),
        Column("triton", "Triton", "triton", "triton", device="gpu"),
        Column("tensorflow-eager", "TensorFlow", "tensorflow", "tensorflow"),
        Column("tensorflow-function", "tf.function", "tensorflow", "tensorflow", "function"),
        Column("tensorflow-xla", "tf.function, XLA", "tensorflow", "tensorflow", "xla"),
        Column("autograd", "HIPS autograd", "autograd", "autograd", device="cpu"),
        Column("mygrad", "MyGrad", "mygrad", "mygrad", device="cpu"),
        Column("tinygrad", "tinygrad", "tinygrad", "tinygrad", environment=(("TRAINING", "1"),)),
        Column("sklearn", "scikit-learn", "sklearn", "sklearn", device="cpu"),
    )
}


def groups() -> dict[str, list[str]]:
    """Return the peers that can be asked for, each with its columns: "torch" has several."""
    found: dict[str, list[str]] = {}
    for column in COLUMNS.values():
        if not column.own:
            found.setdefault(column.module, []).append(column.name)
    return found


def installed(module: str) -> bool:
    """Tell whether this interpreter could import a module, without importing it."""
    return importlib.util.find_spec(module) is not None
