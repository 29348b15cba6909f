"""What `fit` returns: the numbers of every epoch, as lists, a file or a picture."""

from __future__ import annotations

import os
from typing import Any


class History:
    """The losses and metrics of training, by name: one number an epoch.

    history      `{"loss": [...], "accuracy": [...], "val_loss": [...], ...}`.
    epoch        the numbers of the epochs, from 0.
    interrupted  whether Ctrl-C ended the training.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}
        self.epoch: list[int] = []
        self.interrupted = False

    def append(self, epoch: int, numbers: dict[str, float]) -> None:
        """Add an epoch's numbers."""
        self.epoch.append(epoch)
        for name, value in numbers.items():
            self.history.setdefault(name, []).append(value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history as JSON."""
        import json

        from tapegrad._files import atomic_write

        text = json.dumps({"epoch": self.epoch, **self.history}, indent=1)
        with atomic_write(path) as file:
            file.write(text.encode())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves into a picture, of the kind that the path's ending names.

        Raises `ImportError` with the cure where matplotlib is not installed.
        """
        figure = _curves(self)
        figure.savefig(os.fspath(path), dpi=120)

    def __repr__(self) -> str:
        last = ", ".join(f"{name}={values[-1]:.4g}" for name, values in self.history.items())
        return f"<History of {len(self.epoch)} epochs{': ' + last if last else ''}>"


def new_figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure with a row of axes, made without a screen or global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('pictures need matplotlib: pip install "tapegrad[plot]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _curves(history: History) -> Any:
    names = [name for name in history.history if not name.startswith("val_")] or ["loss"]
    figure, axes = new_figure(len(names), 5.0 * len(names), 3.6)
    epochs = [epoch + 1 for epoch in history.epoch]
    for axis, name in zip(axes, names, strict=True):
        for key, label, style in ((name, "training", "-"), (f"val_{name}", "validation", "--")):
            values = history.history.get(key)
            if values:
                axis.plot(
                    epochs, values, style, label=label, marker="." if len(values) < 30 else ""
                )
        axis.set_xlabel("epoch")
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
        if f"val_{name}" in history.history:
            axis.legend()
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure
