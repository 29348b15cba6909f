"""Metrics by Keras's names: averages that grow batch by batch, in float64, where the data is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad import losses
from tapegrad._recording import no_record
from tapegrad._targets import as_columns, labels_and_scores, pair
from tapegrad.linear import reshape as _reshape
from tapegrad.ops import elementwise as ew
from tapegrad.ops import indexing, logic, reductions
from tapegrad.ops.arguments import as_tensor
from tapegrad.ops.creation import zeros_like
from tapegrad.tensor import ArrayLike, Tensor
from tapegrad.variable import Variable


class Mean:
    """The weighted mean of all values since the last reset, a float64 sum by a float64 count.

    >>> mean = tg.metrics.Mean()
    >>> mean.update_state([1.0, 3.0])
    >>> mean.update_state(5.0)
    >>> float(mean.result())
    3.0
    """

    def __init__(self, name: str = "mean") -> None:
        self.name = name
        self._state: tuple[Variable, Variable] | None = None

    def update_state(self, values: ArrayLike, sample_weight: ArrayLike | None = None) -> None:
        """Take in values, each with its weight (1 for None); `ValueError` for unequal shapes."""
        with no_record():
            x = ew.astype(as_tensor(values), np.float64)
            if sample_weight is None:
                self._add(reductions.sum(x), float(x.size))
                return
            weight = ew.astype(as_tensor(sample_weight), np.float64)
            if weight.shape != x.shape[: weight.ndim]:
                raise ValueError(
                    f"[{self.name}] sample_weight must have shape {x.shape}, got {weight.shape}"
                )
            # one weight an example counts for each of its values
            weight = _reshape(weight, shape=weight.shape + (1,) * (x.ndim - weight.ndim))
            weight = ew.add(zeros_like(x), weight)
            self._add(reductions.sum(ew.multiply(x, weight)), reductions.sum(weight))

    def _add(self, total: Tensor, count: Tensor | float) -> None:
        if self._state is None or self._state[0].backend != total.backend:
            zero = zeros_like(total)
            self._state = Variable(zero, trainable=False), Variable(zero, trainable=False)
        self._state[0].assign_add(total)
        self._state[1].assign_add(count)

    def result(self) -> Tensor:
        """Return the mean so far, a float64 scalar; 0 where nothing was taken in."""
        if self._state is None:
            return Tensor(0.0, np.float64)
        with no_record():
            total, count = self._state
            empty = logic.equal(count, 0)
            return ew.where(empty, 0.0, ew.divide(total, ew.where(empty, 1.0, count)))

    def reset_state(self) -> None:
        """Forget everything taken in."""
        # In place: a compiled step goes on to write to these Variables.
        for variable in self._state or ():
            variable.assign(0.0)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}={float(self.result()):.6g}>"


class Metric(Mean):
    """The mean over examples of a function of (y_true, y_pred).

    function  gives one number an example.
    name      as histories show it.
    """

    def __init__(self, function: Callable[..., Tensor], name: str | None = None) -> None:
        super().__init__(name or str(getattr(function, "__name__", "metric")))
        self.function = function

    def update_state(  # type: ignore[override]
        self, y_true: ArrayLike, y_pred: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> None:
        """Take in a batch."""
        with no_record():
            values = self.function(y_true, y_pred)
        super().update_state(values, sample_weight)


# ---- functions: 1 where a prediction is right, 0 where it is wrong


def sparse_categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Return whether the class of the largest prediction is the integer label, as 1 or 0.

    y_true (...,) integers, y_pred (..., classes). Raises `ValueError` for other shapes.

    >>> print(tg.metrics.sparse_categorical_accuracy([1, 0], [[0.1, 0.9], [0.2, 0.8]]))
    tg.Tensor([1. 0.], shape=(2,), dtype=float32)
    """
    t, p = labels_and_scores("sparse_categorical_accuracy", y_true, y_pred)
    return ew.astype(logic.equal(reductions.argmax(p, axis=-1), t), np.float32)


def categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Return whether target and prediction are largest in one class, as 1 or 0.

    Both (..., classes). Raises `ValueError` for unequal shapes.

    >>> print(tg.metrics.categorical_accuracy([[0.0, 1.0]], [[0.1, 0.9]]))
    tg.Tensor([1.], shape=(1,), dtype=float32)
    """
    t, p = pair("categorical_accuracy", y_true, y_pred)
    return sparse_categorical_accuracy(reductions.argmax(t, axis=-1), p)


def binary_accuracy(y_true: ArrayLike, y_pred: ArrayLike, threshold: float = 0.5) -> Tensor:
    """Return whether prediction > threshold is what the target (0 or 1) says, as 1 or 0.

    threshold  0.5 for probabilities, 0 for logits. Raises `ValueError` for unequal shapes.

    >>> print(tg.metrics.binary_accuracy([1.0, 0.0], [0.9, 0.8]))
    tg.Tensor([1. 0.], shape=(2,), dtype=float32)
    """
    t, p = pair("binary_accuracy", y_true, y_pred)
    return ew.astype(logic.equal(logic.greater(p, threshold), logic.greater(t, 0.5)), np.float32)


def top_k_accuracy(y_true: ArrayLike, y_pred: ArrayLike, k: int = 5) -> Tensor:
    """Return whether the integer label is among the k largest predictions, as 1 or 0.

    y_true (...,) integers, y_pred (..., classes). Raises `ValueError` when there are fewer classes.

    >>> print(tg.metrics.top_k_accuracy([1], [[0.5, 0.3, 0.2]], k=2))
    tg.Tensor([1.], shape=(1,), dtype=float32)
    """
    t, p = labels_and_scores("top_k_accuracy", y_true, y_pred)
    found = indexing.top_k(p, k).indices
    hits = logic.equal(found, _reshape(t, shape=(*t.shape, 1)))
    return ew.astype(reductions.any(hits, axis=-1), np.float32)


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Return whether predictions are right, as 1 or 0, by the accuracy that fits the shapes.

    Integer labels (...,) for (..., classes): sparse categorical; one shape of several classes:
    categorical; one shape of one class: binary.

    >>> print(tg.metrics.accuracy([1], [[0.1, 0.9]]))
    tg.Tensor([1.], shape=(1,), dtype=float32)
    """
    t, p = as_tensor(y_true), as_tensor(y_pred)
    if p.ndim and p.shape[-1] > 1 and t.shape != p.shape:
        return sparse_categorical_accuracy(t, p)
    if p.ndim > 1 and p.shape[-1] > 1:
        return categorical_accuracy(t, p)
    return binary_accuracy(t, p)


class Accuracy(Metric):
    """The share of right predictions; see `accuracy`."""

    def __init__(self, name: str = "accuracy") -> None:
        super().__init__(accuracy, name)


class SparseCategoricalAccuracy(Metric):
    """The share of examples whose largest prediction is at the integer label."""

    def __init__(self, name: str = "sparse_categorical_accuracy") -> None:
        super().__init__(sparse_categorical_accuracy, name)


class CategoricalAccuracy(Metric):
    """The share of examples whose largest prediction is where the target is largest."""

    def __init__(self, name: str = "categorical_accuracy") -> None:
        super().__init__(categorical_accuracy, name)


class BinaryAccuracy(Metric):
    """The share of predictions on the right side of a threshold: 0.5, or 0 for logits."""

    def __init__(self, threshold: float = 0.5, name: str = "binary_accuracy") -> None:
        super().__init__(lambda t, p: binary_accuracy(t, p, threshold), name)


class TopKAccuracy(Metric):
    """The share of examples whose integer label is among the k largest predictions."""

    def __init__(self, k: int = 5, name: str = "top_k_accuracy") -> None:
        super().__init__(lambda t, p: top_k_accuracy(t, p, k), name)


class MeanSquaredError(Metric):
    """The mean of `losses.mean_squared_error`."""

    def __init__(self, name: str = "mean_squared_error") -> None:
        super().__init__(as_columns(losses.mean_squared_error), name)


class MeanAbsoluteError(Metric):
    """The mean of `losses.mean_absolute_error`."""

    def __init__(self, name: str = "mean_absolute_error") -> None:
        super().__init__(as_columns(losses.mean_absolute_error), name)


_BY_NAME: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "acc": Accuracy,
    "sparse_categorical_accuracy": SparseCategoricalAccuracy,
    "categorical_accuracy": CategoricalAccuracy,
    "binary_accuracy": BinaryAccuracy,
    "top_k_accuracy": TopKAccuracy,
    "mse": MeanSquaredError,
    "mean_squared_error": MeanSquaredError,
    "mae": MeanAbsoluteError,
    "mean_absolute_error": MeanAbsoluteError,
}


def get(metric: Any) -> Metric:
    """Return the metric that a name, a function of (y_true, y_pred) or a metric stands for.

    Raises `ValueError` for an unknown name.

    >>> tg.metrics.get("accuracy")
    <Accuracy accuracy=0>
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str) and metric in _BY_NAME:
        return _BY_NAME[metric]()
    if callable(metric) and not isinstance(metric, type):
        return Metric(metric)
    names = ", ".join(_BY_NAME)
    raise ValueError(f"metric must be a function, a metric or one of {names}, got {metric!r}")
