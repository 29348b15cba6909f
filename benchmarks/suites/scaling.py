"""Suite `scaling`: how a training step's time grows with batch, width and depth."""

from __future__ import annotations

from benchmarks.cases import Case, Suite
from benchmarks.problems import Net
from benchmarks.suites.steps import net_case


def _net(batch: int = 128, width: int = 256, depth: int = 3) -> Net:
    return Net((width,) * depth + (10,), batch, "sgd", 1e-3)


def _cases(tiny: bool) -> list[Case]:
    axes = {
        "batch": (2, 4) if tiny else (8, 32, 128, 512, 2048),
        "width": (4, 8) if tiny else (16, 64, 256, 1024, 2048),
        "depth": (1, 2) if tiny else (2, 4, 8, 16, 32),
    }
    base = {"batch": 2, "width": 4, "depth": 2} if tiny else {}
    return [
        net_case(_net(**(base | {axis: value})), f"{axis} {value}", x=(axis, value))
        for axis, values in axes.items()
        for value in values
    ]


SUITE = Suite(
    "scaling",
    "Scaling",
    "A step of a net with 3 layers of 256 at batch 128 (SGD), one of the three changed at a time. "
    "The exponent is the slope of log(time) against log(size), fitted to the upper three sizes.",
    ("numpy-by-hand", "tapegrad-cupy", "tapegrad"),
    _cases,
    frozenset(
        (
            "numpy-by-hand",
            "numpy",
            "cupy",
            "tapegrad",
            "tapegrad-compiled",
            "tapegrad-cupy",
            "tapegrad-cupy-compiled",
            "torch-thp",
            "torch-eager",
            "torch-compile",
            "torch-graph",
            "jax",
            "tensorflow-function",
        )
    ),
)
