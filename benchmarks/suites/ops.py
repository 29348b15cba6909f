"""Suite `ops`: what one operation costs off the tape, recorded, and with its gradient."""

from __future__ import annotations

from benchmarks.cases import Case, Suite

_MODES = {"plain": "off the tape", "recorded": "recorded", "gradient": "with its gradient"}
_ELEMENTS_KEPT = 1_000_000  # results of a chain live at once: fewer operations where they are long
_MAX_MATMUL = 1_000_000


def _cases(tiny: bool) -> list[Case]:
    cases = []
    names = ("add", "multiply", "tanh", "minus mean", "matmul")
    for name in names[:1] + names[-1:] if tiny else names:
        for size in (1, 100) if tiny else (1, 100, 10_000, 1_000_000, 10_000_000):
            if name == "matmul" and size > _MAX_MATMUL:
                continue
            count = min(100, max(1, _ELEMENTS_KEPT // size))
            for mode, words in _MODES.items():
                cases.append(
                    Case(
                        f"{name}, {size:,} element{'s' * (size > 1)}, {words}",
                        "operation",
                        {"name": name, "size": size, "mode": mode, "count": count},
                        divisor=count,
                    )
                )
    return cases


SUITE = Suite(
    "ops",
    "Operations",
    "Time per operation in a chain of equal ones: off the tape, recorded by a tape, and with the "
    "reverse pass over it. `minus mean` is a mean and a subtraction; `matmul` has square matrices "
    "of so many elements.",
    ("tapegrad", "tapegrad-cupy"),
    _cases,
    frozenset(
        (
            "numpy",
            "cupy",
            "tapegrad",
            "tapegrad-compiled",
            "tapegrad-cupy",
            "tapegrad-cupy-compiled",
            "tapegrad-cupy-kernels-off",
            "torch-eager",
            "torch-thp",
            "jax",
            "tensorflow-eager",
            "autograd",
            "mygrad",
        )
    ),
)
