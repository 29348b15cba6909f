"""Losses by Keras's names: functions that give one loss an example, classes that reduce them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad import nn
from tapegrad._targets import as_columns, labels_and_scores, over_features, pair
from tapegrad.ops import elementwise as ew
from tapegrad.ops import logic, reductions
from tapegrad.ops.arguments import as_tensor
from tapegrad.tensor import ArrayLike, Tensor

LossFunction = Callable[..., Tensor]


def mean_squared_error(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Return the mean of (y_true - y_pred)**2 over the last axis.

    Raises `ValueError` for unequal shapes.

    >>> print(tg.losses.mean_squared_error([[1.0, 2.0]], [[1.0, 4.0]]))
    tg.Tensor([2.], shape=(1,), dtype=float32)
    """
    t, p = pair("mean_squared_error", y_true, y_pred)
    return over_features(ew.square(ew.subtract(t, p)), reductions.mean)


def mean_absolute_error(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Return the mean of abs(y_true - y_pred) over the last axis.

    Raises `ValueError` for unequal shapes.

    >>> print(tg.losses.mean_absolute_error([[1.0, 2.0]], [[1.0, 4.0]]))
    tg.Tensor([1.], shape=(1,), dtype=float32)
    """
    t, p = pair("mean_absolute_error", y_true, y_pred)
    return over_features(ew.abs(ew.subtract(t, p)), reductions.mean)


def huber(y_true: ArrayLike, y_pred: ArrayLike, delta: float = 1.0) -> Tensor:
    """Return the mean over the last axis of e**2 / 2 where abs(e) <= delta, linear beyond.

    With e = y_true - y_pred the linear part is delta * (abs(e) - delta / 2) (P. J. Huber, 1964).
    Raises `ValueError` for unequal shapes and for delta <= 0.

    >>> print(tg.losses.huber([[0.0]], [[3.0]]))
    tg.Tensor([2.5], shape=(1,), dtype=float32)
    """
    if not delta > 0:
        raise ValueError(f"[huber] delta must be above 0, got {delta!r}")
    t, p = pair("huber", y_true, y_pred)
    error = ew.subtract(t, p)
    size = ew.abs(error)
    beyond = ew.multiply(ew.subtract(size, delta / 2), delta)
    # of the part within delta only: the square of a large error would overflow
    near = ew.multiply(ew.square(ew.clip(error, -delta, delta)), 0.5)
    return over_features(ew.where(logic.greater(size, delta), beyond, near), reductions.mean)


def _positive(p: Tensor) -> Tensor:
    """Keep probabilities from 0, whose logarithm is infinite."""
    return ew.clip(p, float(np.finfo(p.dtype).eps), 1.0)


def _logits(p: Tensor) -> Tensor:
    """Return logarithms: their softmax is the probabilities again, divided by their sum."""
    return ew.log(_positive(p))


def sparse_categorical_crossentropy(
    y_true: ArrayLike, y_pred: ArrayLike, from_logits: bool = False, ignore_class: int | None = None
) -> Tensor:
    """Return the cross-entropy of each example for integer labels.

    y_true        integers (...,).
    y_pred        (..., classes): probabilities, or with `from_logits` what a softmax makes them of.
    ignore_class  examples with this label have the loss 0.

    Probabilities are kept from 0 by the type's precision, and divided by their sum. Raises
    `ValueError` for shapes that do not fit and labels out of range.

    >>> print(tg.losses.sparse_categorical_crossentropy([1], [[0.5, 0.5]]))
    tg.Tensor([0.6931472], shape=(1,), dtype=float32)
    """
    t, p = labels_and_scores("sparse_categorical_crossentropy", y_true, y_pred)
    logits = p if from_logits else _logits(p)
    return nn.softmax_cross_entropy(logits, t, ignore_label=ignore_class, reduction="none")


def _check_smoothing(name: str, smoothing: float) -> None:
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"[{name}] label_smoothing must be from 0 to 1, got {smoothing!r}")


def categorical_crossentropy(
    y_true: ArrayLike, y_pred: ArrayLike, from_logits: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy of each example for target probabilities, one-hot or not.

    y_true, y_pred   (..., classes); y_pred are probabilities, or with `from_logits` logits.
    label_smoothing  s: the targets become (1 - s) * y_true + s / classes.

    Probabilities are kept from 0 by the type's precision, and divided by their sum. Raises
    `ValueError` for unequal shapes and a label_smoothing outside 0 to 1.

    >>> print(tg.losses.categorical_crossentropy([[0.0, 1.0]], [[0.5, 0.5]]))
    tg.Tensor([0.6931472], shape=(1,), dtype=float32)
    """
    _check_smoothing("categorical_crossentropy", label_smoothing)
    t, p = pair("categorical_crossentropy", y_true, y_pred)
    logits = p if from_logits else _logits(p)
    return nn.softmax_cross_entropy(logits, t, label_smoothing=label_smoothing, reduction="none")


def binary_crossentropy(
    y_true: ArrayLike, y_pred: ArrayLike, from_logits: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean over the last axis of -(t log p + (1 - t) log(1 - p)).

    y_true, y_pred   of one shape; y_pred are probabilities, or with `from_logits` logits.
    label_smoothing  s: the targets become (1 - s) * y_true + s / 2.

    Raises `ValueError` for unequal shapes and a label_smoothing outside 0 to 1.

    >>> print(tg.losses.binary_crossentropy([[1.0]], [[0.5]]))
    tg.Tensor([0.6931472], shape=(1,), dtype=float32)
    """
    _check_smoothing("binary_crossentropy", label_smoothing)
    t, p = pair("binary_crossentropy", y_true, y_pred)
    if label_smoothing:
        t = ew.add(ew.multiply(t, 1.0 - label_smoothing), label_smoothing / 2)
    if from_logits:
        losses = nn.sigmoid_cross_entropy(p, t, reduction="none")
    else:
        opposite = ew.xlogy(ew.subtract(1.0, t), _positive(ew.subtract(1.0, p)))
        losses = ew.negative(ew.add(ew.xlogy(t, _positive(p)), opposite))
    return over_features(losses, reductions.mean)


def kl_divergence(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Return the sum over the last axis of y_true * log(y_true / y_pred); terms of target 0 are 0.

    Raises `ValueError` for unequal shapes.

    >>> print(tg.losses.kl_divergence([[0.0, 1.0]], [[0.5, 0.5]]))
    tg.Tensor([0.6931472], shape=(1,), dtype=float32)
    """
    t, p = pair("kl_divergence", y_true, y_pred)
    return reductions.sum(ew.subtract(ew.xlogy(t, t), ew.xlogy(t, _positive(p))), axis=-1)


class Loss:
    """A loss that reduces over examples: called as `loss(y_true, y_pred, sample_weight=None)`.

    function   gives one loss an example from (y_true, y_pred).
    reduction  `"sum_over_batch_size"` (the mean), `"sum"` or `"none"`.
    name       as histories show it.

    Raises `ValueError` for another reduction; the call does for a mean of no examples.
    """

    def __init__(
        self,
        function: LossFunction,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        if reduction not in ("sum_over_batch_size", "sum", "none"):
            raise ValueError(
                f"reduction must be 'sum_over_batch_size', 'sum' or 'none', got {reduction!r}"
            )
        self.function = function
        self.reduction = reduction
        self.name = name or getattr(function, "__name__", type(self).__name__)

    def call(self, y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
        """Return one loss for each example."""
        return self.function(y_true, y_pred)

    def __call__(
        self, y_true: ArrayLike, y_pred: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Tensor:
        """Return the reduced loss; `sample_weight` multiplies each example's before."""
        losses = self.call(y_true, y_pred)
        if not losses.size and self.reduction == "sum_over_batch_size":
            # NaN, and after a step with it every weight would be NaN.
            raise ValueError(f"[{self.name}] there is no mean of no examples: y_pred is empty")
        if sample_weight is not None:
            weights = as_tensor(sample_weight)
            if weights.shape not in ((), losses.shape):
                raise ValueError(
                    f"[{self.name}] sample_weight must have shape {losses.shape}, "
                    f"got {weights.shape}"
                )
            losses = ew.multiply(losses, ew.astype(weights, losses.dtype))
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return reductions.sum(losses)
        return reductions.mean(losses)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} reduction={self.reduction!r}>"


class MeanSquaredError(Loss):
    """`mean_squared_error`, reduced over examples."""

    def __init__(self, reduction: str = "sum_over_batch_size") -> None:
        super().__init__(as_columns(mean_squared_error), reduction, "mean_squared_error")


class MeanAbsoluteError(Loss):
    """`mean_absolute_error`, reduced over examples."""

    def __init__(self, reduction: str = "sum_over_batch_size") -> None:
        super().__init__(as_columns(mean_absolute_error), reduction, "mean_absolute_error")


class Huber(Loss):
    """`huber`, reduced over examples."""

    def __init__(self, delta: float = 1.0, reduction: str = "sum_over_batch_size") -> None:
        super().__init__(as_columns(lambda t, p: huber(t, p, delta)), reduction, "huber")


class SparseCategoricalCrossentropy(Loss):
    """`sparse_categorical_crossentropy`, reduced over examples.

    The mean is over the examples that `ignore_class` leaves.
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: str = "sum_over_batch_size",
    ) -> None:
        super().__init__(
            lambda t, p: sparse_categorical_crossentropy(t, p, from_logits, ignore_class),
            reduction,
            "sparse_categorical_crossentropy",
        )
        self.from_logits = from_logits
        self.ignore_class = ignore_class

    def __call__(
        self, y_true: ArrayLike, y_pred: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Tensor:
        """Return the reduced loss; `sample_weight` multiplies each example's before."""
        y = super().__call__(y_true, y_pred, sample_weight)
        if self.ignore_class is None or self.reduction != "sum_over_batch_size":
            return y
        labels = as_tensor(y_true)
        counted = reductions.sum(ew.astype(logic.not_equal(labels, self.ignore_class), y.dtype))
        return ew.divide(ew.multiply(y, float(labels.size)), ew.maximum(counted, 1.0))


class CategoricalCrossentropy(Loss):
    """`categorical_crossentropy`, reduced over examples."""

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "sum_over_batch_size",
    ) -> None:
        super().__init__(
            lambda t, p: categorical_crossentropy(t, p, from_logits, label_smoothing),
            reduction,
            "categorical_crossentropy",
        )
        self.from_logits = from_logits


class BinaryCrossentropy(Loss):
    """`binary_crossentropy`, reduced over examples."""

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "sum_over_batch_size",
    ) -> None:
        super().__init__(
            as_columns(lambda t, p: binary_crossentropy(t, p, from_logits, label_smoothing)),
            reduction,
            "binary_crossentropy",
        )
        self.from_logits = from_logits


class KLDivergence(Loss):
    """`kl_divergence`, reduced over examples."""

    def __init__(self, reduction: str = "sum_over_batch_size") -> None:
        super().__init__(kl_divergence, reduction)


_BY_NAME: dict[str, Callable[[], Loss]] = {
    "mse": MeanSquaredError,
    "mean_squared_error": MeanSquaredError,
    "mae": MeanAbsoluteError,
    "mean_absolute_error": MeanAbsoluteError,
    "huber": Huber,
    "sparse_categorical_crossentropy": SparseCategoricalCrossentropy,
    "categorical_crossentropy": CategoricalCrossentropy,
    "binary_crossentropy": BinaryCrossentropy,
    "kl_divergence": KLDivergence,
}


def get(loss: Any) -> Loss:
    """Return the loss that a name, a function of (y_true, y_pred) or a `Loss` stands for.

    Raises `ValueError` for an unknown name.

    >>> tg.losses.get("mse")
    <MeanSquaredError mean_squared_error reduction='sum_over_batch_size'>
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in _BY_NAME:
        return _BY_NAME[loss]()
    if callable(loss) and not isinstance(loss, type):
        return Loss(loss)
    raise ValueError(
        f"loss must be a function, a Loss or one of {', '.join(_BY_NAME)}, got {loss!r}"
    )
