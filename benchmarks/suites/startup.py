"""Suite `startup`: what an import costs, and what an installation takes on the disk."""

from __future__ import annotations

from benchmarks.cases import Case, Suite


def _cases(_tiny: bool) -> list[Case]:
    return [
        Case("import, after NumPy", "import", measure="import"),
        Case("installed size, with what it requires", "size", measure="size"),
    ]


SUITE = Suite(
    "startup",
    "Start",
    "The time of the import in a fresh process in which NumPy is imported already; the size of the "
    "installed files, of the package and of all that it requires, NumPy included.",
    ("tapegrad", "tapegrad-cupy"),
    _cases,
    frozenset(
        (
            "tapegrad",
            "torch-eager",
            "jax",
            "tensorflow-eager",
            "autograd",
            "mygrad",
            "tinygrad",
            "sklearn",
            "numpy",
            "cupy",
            "tapegrad-cupy",
        )
    ),
)
