"""Device code: CUDA sources and the launchers beside them. Knows arrays, nothing of tensors.

A launcher takes the array module and its arrays, checks, allocates, launches, and answers None to
arrays it was not written for. Nothing is compiled, nor CuPy imported, before the first launch.
"""

from __future__ import annotations

if __name__ == "kernels":
    raise ImportError(
        "import tapegrad.kernels, not kernels: this folder is part of the package tapegrad"
    )

from . import (
    chains,
    elementwise,
    epilogues,
    gemm,
    linear_relu,
    optimizers,
    random,
    scatter_add,
    small_gemm,
    softmax_cross_entropy,
)
from ._build import kernel_names

__all__ = [
    "chains",
    "elementwise",
    "epilogues",
    "gemm",
    "kernel_names",
    "linear_relu",
    "optimizers",
    "random",
    "scatter_add",
    "small_gemm",
    "softmax_cross_entropy",
]
