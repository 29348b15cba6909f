"""Suite `training`: time to a given accuracy from a cold start, and seconds per epoch."""

from __future__ import annotations

from benchmarks.cases import Case, Suite
from benchmarks.problems import Net


def _cases(tiny: bool) -> list[Case]:
    digits = Net((64, 128, 10), 32, "adam", 5e-3)
    fashion = Net((784, 8, 10) if tiny else (784, 256, 10), 128, "adam", 1e-3)
    accuracy = 0.5 if tiny else 0.97
    return [
        Case(
            f"digits to {accuracy:.0%}, 64-128-10, batch 32, Adam, cold",
            "train_until",
            vars(digits) | {"data": "digits", "accuracy": accuracy, "epochs": 60},
            measure="cold",
        ),
        Case(
            f"Fashion-MNIST, one epoch, {'-'.join(map(str, fashion.widths))}, batch 128, Adam",
            "epoch",
            vars(fashion) | {"data": "fashion-mnist", "rows": 512 if tiny else None},
        ),
    ]


SUITE = Suite(
    "training",
    "Training",
    "Time until a net classifies so many of the test digits rightly, in a fresh process: imports "
    "and reading the data are not counted, building and compiling are. Seconds for an epoch of "
    "Fashion-MNIST, the shuffled batches' gathering included.",
    ("tapegrad", "tapegrad-cupy"),
    _cases,
)
