"""A training run from the command line: its settings, its model, and the folder that it leaves."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapegrad import data, layers, losses, optimizers, random
from tapegrad._backend import backend
from tapegrad._files import atomic_write
from tapegrad.errors import FormatError
from tapegrad.training.history import History
from tapegrad.training.model import Sequential

WEIGHTS, SETTINGS, HISTORY, CURVES = (
    "weights.safetensors",
    "settings.json",
    "history.json",
    "curves.png",
)
OPTIMIZERS: dict[str, Callable[[float], optimizers.Optimizer]] = {
    "sgd": optimizers.SGD,
    "momentum": lambda rate: optimizers.SGD(rate, momentum=0.9),
    "nesterov": lambda rate: optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "adagrad": optimizers.Adagrad,
    "rmsprop": optimizers.RMSprop,
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
}
# What a name means when no rate is given: gradient descent needs larger steps than Adam.
LEARNING_RATES = {"sgd": 0.1, "momentum": 0.02, "nesterov": 0.02, "adagrad": 0.02}


@dataclass(frozen=True)
class Settings:
    """What decides a run: the same settings give the same weights on the same machine."""

    data: str = "digits"
    hidden: tuple[int, ...] = (128,)
    activation: str = "relu"
    dropout: float = 0.0
    optimizer: str = "adam"
    learning_rate: float | None = None
    batch_size: int = 128
    epochs: int = 10
    seed: int = 0

    @property
    def rate(self) -> float:
        """The learning rate, the optimiser's usual one if none was given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES.get(self.optimizer, 1e-3)


def build(settings: Settings, features: int, classes: int) -> Sequential:
    """Return the multi-layer perceptron that the settings describe, with its Variables made."""
    stack: list[layers.Layer] = []
    for units in settings.hidden:
        stack.append(layers.Dense(units, settings.activation, kernel_initializer="he_normal"))
        if settings.dropout:
            stack.append(layers.Dropout(settings.dropout))
    stack.append(layers.Dense(classes))
    model = Sequential(stack)
    model.build((None, features))
    model.compile(
        OPTIMIZERS[settings.optimizer](settings.rate),
        losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    )
    return model


def train(
    settings: Settings,
    dataset: data.Dataset,
    output: Path,
    backend_name: str | None,
    verbose: int,
) -> tuple[History, dict[str, float]]:
    """Train, evaluate on the test images after each epoch, and write the run's folder.

    Returns the history, and the loss and accuracy on the test images at the end.
    """
    if not dataset.classes:
        raise ValueError(
            f"{dataset.name}: the labels do not number classes: they must be 0, 1, 2, ..."
        )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass  # a folder that cannot be written to is refused now, not when all is trained
    with _chosen(backend_name):
        random.seed(settings.seed)
        model = build(settings, dataset.train_images.shape[1], len(dataset.classes))
        held_out = (dataset.test_images, dataset.test_labels)
        history = model.fit(
            dataset.train_images,
            dataset.train_labels,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            validation_data=held_out,
            verbose=verbose,
        )
        final = model.evaluate(*held_out, batch_size=1024, return_dict=True)
    model.save_weights(output / WEIGHTS)
    history.save(output / HISTORY)
    facts = {"features": dataset.train_images.shape[1], "classes": dataset.classes}
    with atomic_write(output / SETTINGS) as file:
        file.write(json.dumps(asdict(settings) | facts, indent=1).encode())
    return history, final


def evaluate(folder: Path, dataset: data.Dataset, backend_name: str | None) -> dict[str, float]:
    """Return the test loss and accuracy of the model that a run's folder holds.

    Raises `FormatError` for a folder whose settings are broken, `FileNotFoundError` for none,
    `ValueError` for a data set that is not of the model's width and classes.
    """
    settings, features, classes = read_settings(folder)
    if dataset.test_images.shape[1] != features:
        raise ValueError(
            f"the model in {folder} takes {features} numbers an image, "
            f"{dataset.name} has {dataset.test_images.shape[1]}"
        )
    labels = dataset.test_labels
    if dataset.classes:  # they may be some of the model's only, and then have other numbers
        place = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in dataset.classes if name not in place]
        if unknown:
            raise ValueError(
                f"the model in {folder} does not know the classes {', '.join(unknown):.80} of "
                f"{dataset.name}, only {', '.join(classes):.80}"
            )
        labels = np.array([place[name] for name in dataset.classes])[labels]
    with _chosen(backend_name):
        model = build(settings, features, len(classes))
        model.load_weights(folder / WEIGHTS)
        found: dict[str, float] = model.evaluate(
            dataset.test_images, labels, batch_size=1024, return_dict=True
        )
    return found


def _chosen(backend_name: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend_name is None else backend(backend_name)


def read_settings(folder: Path) -> tuple[Settings, int, tuple[str, ...]]:
    """Return a run's settings, its model's number of inputs, and the names of its classes."""
    path = folder / SETTINGS
    if os.path.getsize(path) > 1 << 24:
        raise FormatError(f"{path}: byte 0: settings take at most 16 MiB")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: byte {getattr(error, 'pos', 0)}: no JSON: {error}") from None
    wrong = _what_is_wrong(found)
    if wrong:
        raise FormatError(f"{path}: byte 0: {wrong}")
    features, classes = found.pop("features"), found.pop("classes")
    sizes = [features, *found["hidden"], len(classes)]
    numbers = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    # Before anything of that size is made; smaller ones are better judged by the weights file.
    if 4 * numbers > max(os.path.getsize(folder / WEIGHTS), 1 << 26):
        raise FormatError(
            f"{path}: byte 0: a model of {numbers} parameters, more than {WEIGHTS} beside it holds"
        )
    return Settings(**{**found, "hidden": tuple(found["hidden"])}), features, tuple(classes)


def _what_is_wrong(found: Any) -> str | None:
    """Return what in a settings file is not as `train` writes it."""

    def size(value: Any) -> bool:
        return type(value) is int and 0 < value < 1 << 24

    def number(value: Any, low: float, high: float) -> bool:
        return type(value) in (int, float) and low <= value < high

    checks: dict[str, Callable[[Any], bool]] = {
        "data": lambda v: isinstance(v, str),
        "hidden": lambda v: isinstance(v, list) and all(map(size, v)),
        "activation": lambda v: isinstance(v, str) and v in layers.ACTIVATIONS,
        "dropout": lambda v: number(v, 0, 1),
        "optimizer": lambda v: isinstance(v, str) and v in OPTIMIZERS,
        "learning_rate": lambda v: v is None or number(v, 0, float("inf")),
        "batch_size": size,
        "epochs": size,
        "seed": lambda v: type(v) is int and v >= 0,
        "features": size,
        "classes": lambda v: isinstance(v, list) and {type(name) for name in v} == {str},
    }
    if not isinstance(found, dict) or found.keys() != checks.keys():
        return f"settings must name exactly {', '.join(checks)}"
    return next(
        (f"{n} cannot be {found[n]!r:.80}" for n, good in checks.items() if not good(found[n])),
        None,
    )


def describe(settings: Settings) -> str:
    """Return the settings in one line."""
    given: dict[str, Any] = asdict(settings) | {"learning_rate": settings.rate}
    given["hidden"] = "-".join(map(str, settings.hidden))
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
