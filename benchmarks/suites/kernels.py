"""Suite `kernels`: fused operations and updates, against the ceilings of memory and arithmetic."""

from __future__ import annotations

from benchmarks.cases import Case, Suite
from benchmarks.suites.steps import parts


def _linear_relu(rows: int, inputs: int, outputs: int) -> Case:
    return Case(
        f"linear + ReLU {rows} x {inputs} x {outputs}",
        "linear_relu",
        {"rows": rows, "inputs": inputs, "outputs": outputs},
        flops=6 * rows * inputs * outputs,
        bytes=4 * (2 * rows * inputs + 2 * inputs * outputs + 3 * rows * outputs),
    )


def _adam(size: int) -> Case:
    # Parameters, two moments: read and written; the gradient: read.
    name = f"Adam, {size:,} parameters"
    return Case(name, "adam_update", {"size": size}, bytes=4 * 7 * size, flops=12 * size)


def _cases(tiny: bool) -> list[Case]:
    copied, square = (1 << 10, 16) if tiny else (1 << 26, 2048)
    ceilings = [
        Case(f"copy {copied:,} numbers", "copy", {"size": copied}, bytes=8 * copied),
        Case(f"product {square} x {square}", "gemm", {"size": square}, flops=2 * square**3),
    ]
    if tiny:
        return [*ceilings, *parts(True), _linear_relu(4, 8, 6), _adam(100)]
    layers = [_linear_relu(128, 512, 512), _linear_relu(4096, 1024, 1024)]
    return [*ceilings, *parts(False), *layers, _adam(3_466), _adam(20_000_000)]


SUITE = Suite(
    "kernels",
    "Kernels",
    "Fused operations forward and backward, and updates, with the fraction that they reach of the "
    "ceiling: the larger of the times that their bytes and their products need at the best rates "
    "of any column in the first two lines.",
    ("numpy-by-hand", "tapegrad-cupy", "tapegrad"),
    _cases,
)
