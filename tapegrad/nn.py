"""What layers are made of: activations, dropout, linear maps, cross-entropies."""

from __future__ import annotations

import math
from typing import Any

from tapegrad import activations, fused
from tapegrad._recording import is_recording
from tapegrad.formulas import formulas
from tapegrad.linear import reshape as _reshape
from tapegrad.ops import elementwise as ew
from tapegrad.ops import indexing, linear_algebra, logic, reductions
from tapegrad.ops.arguments import as_floating, as_tensor, normalize_axis
from tapegrad.primitive import Primitive
from tapegrad.random import Generator, default_generator
from tapegrad.tensor import ArrayLike, Tensor

# ---- activations


def relu(x: ArrayLike, /) -> Tensor:
    """Return max(x, 0), NaN for NaN; the derivative at 0 is 0.

    >>> print(tg.nn.relu([-1.0, 2.0]))
    tg.Tensor([0. 2.], shape=(2,), dtype=float32)
    """
    return fused.relu(x)


def relu6(x: ArrayLike, /) -> Tensor:
    """Return min(max(x, 0), 6); the derivative at 0 and at 6 is 0.

    >>> print(tg.nn.relu6([-1.0, 2.0, 9.0]))
    tg.Tensor([0. 2. 6.], shape=(3,), dtype=float32)
    """
    return activations.relu6(x)


def leaky_relu(x: ArrayLike, /, alpha: float = 0.2) -> Tensor:
    """Return x where x > 0, else alpha * x; the derivative at 0 is alpha.

    >>> print(tg.nn.leaky_relu([-1.0, 2.0]))
    tg.Tensor([-0.2  2. ], shape=(2,), dtype=float32)
    """
    return _with_alpha(activations.leaky_relu, as_floating(x), alpha)


def elu(x: ArrayLike, /, alpha: float = 1.0) -> Tensor:
    """Return x where x >= 0, else alpha * (exp(x) - 1); the derivative at 0 is 1.

    >>> print(tg.nn.elu([0.0, 2.0]))
    tg.Tensor([0. 2.], shape=(2,), dtype=float32)
    """
    return _with_alpha(activations.elu, as_floating(x), alpha)


def _with_alpha(function: Primitive, x: Tensor, alpha: Any) -> Tensor:
    if isinstance(alpha, (float, int)):
        return function(x, alpha=float(alpha))
    y: Tensor = formulas[function.name].of_tensors(x, alpha=alpha)
    return y


def selu(x: ArrayLike, /) -> Tensor:
    """Return 1.0507 * elu(x, alpha=1.67326), which keeps mean 0 and variance 1 (Klambauer 2017).

    The derivative at 0 is 1.0507.

    >>> print(tg.nn.selu([0.0, 1.0]))
    tg.Tensor([0.       1.050701], shape=(2,), dtype=float32)
    """
    return activations.selu(as_floating(x))


def gelu(x: ArrayLike, /, approximate: bool = False) -> Tensor:
    """Return x * P(X <= x) for a standard normal X (Hendrycks and Gimpel, 2016).

    approximate  whether to compute 0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3))).

    >>> print(tg.nn.gelu([0.0, 10.0]))
    tg.Tensor([ 0. 10.], shape=(2,), dtype=float32)
    """
    return (activations.gelu_tanh if approximate else activations.gelu)(as_floating(x))[0]


def sigmoid(x: ArrayLike, /) -> Tensor:
    """Return 1 / (1 + exp(-x)), element by element, without overflow.

    >>> print(tg.nn.sigmoid([-1000.0, 0.0]))
    tg.Tensor([0.  0.5], shape=(2,), dtype=float32)
    """
    return activations.sigmoid(as_floating(x))


def log_sigmoid(x: ArrayLike, /) -> Tensor:
    """Return log(sigmoid(x)) = -softplus(-x), accurate for large negative x.

    >>> print(tg.nn.log_sigmoid([-1000.0]))
    tg.Tensor([-1000.], shape=(1,), dtype=float32)
    """
    return activations.log_sigmoid(as_floating(x))


def silu(x: ArrayLike, /) -> Tensor:
    """Return x * sigmoid(x), also called swish.

    >>> print(tg.nn.silu([0.0]))
    tg.Tensor([0.], shape=(1,), dtype=float32)
    """
    return activations.silu(as_floating(x))[0]


def tanh(x: ArrayLike, /) -> Tensor:
    """Return the hyperbolic tangent of each element.

    >>> print(tg.nn.tanh([0.0]))
    tg.Tensor([0.], shape=(1,), dtype=float32)
    """
    return ew.tanh(as_floating(x))


def softplus(x: ArrayLike, /) -> Tensor:
    """Return log(1 + exp(x)), without overflow; the derivative is sigmoid(x).

    >>> print(tg.nn.softplus([1000.0]))
    tg.Tensor([1000.], shape=(1,), dtype=float32)
    """
    return activations.softplus(as_floating(x))


def softsign(x: ArrayLike, /) -> Tensor:
    """Return x / (1 + abs(x)); the derivative is 1 / (1 + abs(x))**2.

    >>> print(tg.nn.softsign([1.0]))
    tg.Tensor([0.5], shape=(1,), dtype=float32)
    """
    return activations.softsign(as_floating(x))


def softmax(x: ArrayLike, /, axis: int = -1) -> Tensor:
    """Return exp(x) / sum(exp(x)) along an axis, without overflow; -inf gives 0.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.nn.softmax([1.0, 1.0]))
    tg.Tensor([0.5 0.5], shape=(2,), dtype=float32)
    """
    x = as_floating(x)
    return fused.softmax(x, axis=normalize_axis("softmax", axis, x.ndim))


def log_softmax(x: ArrayLike, /, axis: int = -1) -> Tensor:
    """Return x - logsumexp(x) along an axis, without overflow.

    Raises `ValueError` for an axis that x does not have.

    >>> print(tg.nn.log_softmax([1000.0, 0.0]))
    tg.Tensor([    0. -1000.], shape=(2,), dtype=float32)
    """
    x = as_floating(x)
    return fused.log_softmax(x, axis=normalize_axis("log_softmax", axis, x.ndim))


def dropout(x: ArrayLike, /, rate: float, *, generator: Generator | None = None) -> Tensor:
    """Return x with each element set to 0 with probability `rate`, the others divided by 1 - rate.

    generator  the stream of random numbers; None draws from the common one (`tg.random.seed`).

    Raises `ValueError` for a rate outside 0 <= rate < 1.

    >>> print(tg.nn.dropout([1.0, 2.0], 0.0))
    tg.Tensor([1. 2.], shape=(2,), dtype=float32)
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"[dropout] rate must be at least 0 and below 1, got {rate!r}")
    x = as_tensor(x)
    if rate == 0.0:
        return ew.positive(x)
    stream = default_generator() if generator is None else generator
    return stream.dropout(x, float(rate))


# ---- linear maps


def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, /) -> Tensor:
    """Return x @ weight + bias, fused.

    x (..., i), weight (i, o), bias (o,) or None; the result is (..., o). Raises `ValueError` for
    shapes that do not fit.

    >>> print(tg.nn.linear([[1.0, 2.0]], [[1.0], [1.0]], [0.5]))
    tg.Tensor([[3.5]], shape=(1, 1), dtype=float32)
    """
    return _linear("linear", fused.linear, x, weight, bias)


def linear_relu(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, /) -> Tensor:
    """Return relu(x @ weight + bias), fused; arguments and errors as for `linear`.

    >>> print(tg.nn.linear_relu([[1.0, 2.0]], [[1.0], [-1.0]], [0.5]))
    tg.Tensor([[0.]], shape=(1, 1), dtype=float32)
    """
    return _linear("linear_relu", fused.linear_relu, x, weight, bias)


def _linear(name: str, fusion: Any, x: Any, weight: Any, bias: Any) -> Tensor:
    x, weight = as_tensor(x), as_tensor(weight)
    shape, of_weight = x._array.shape, weight._array.shape
    if len(of_weight) != 2 or not shape or shape[-1] != of_weight[0]:
        raise ValueError(
            f"[{name}] x must be (..., i) and weight (i, o), got shapes {shape}, {of_weight}"
        )
    rows = x if len(shape) == 2 else _reshape(x, shape=(math.prod(shape[:-1]), shape[-1]))
    if bias is None:
        y = linear_algebra.matmul(rows, weight)
        y = relu(y) if fusion is fused.linear_relu else y
    else:
        bias = as_tensor(bias)
        if bias._array.shape != of_weight[1:]:
            raise ValueError(
                f"[{name}] bias must have shape {of_weight[1:]} to go with weight "
                f"{of_weight}, got {bias.shape}"
            )
        y = fusion(rows, weight, bias)
    return y if len(shape) == 2 else _reshape(y, shape=(*shape[:-1], of_weight[1]))


# ---- cross-entropies


def _reduced(name: str, losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce the losses of examples: the mean is by the sum of their weights."""
    if reduction == "none":
        return losses
    total = reductions.sum(losses)
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"[{name}] reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return ew.divide(total, losses.size if weight is None else reductions.sum(weight))


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    /,
    *,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy between targets and softmax(logits), fused with its gradient.

    logits           (..., classes).
    labels           integers (...,), or probabilities (..., classes) of a floating type.
    label_smoothing  s: the target is (1 - s) * target + s / classes.
    ignore_label     examples with this integer label count nothing, in the mean's divisor neither.
    class_weights    (classes,): each class's term, -target * log(p), is multiplied by its weight.
    reduction        `"mean"` (by the number of examples; with class weights and integer labels by
                     the sum of the labels' weights), `"sum"` or `"none"`, one loss an example.

    The loss is sum_c w_c t_c (logsumexp(x) - x_c), where a term of target 0 counts 0 even if its
    logit is -inf. Raises `ValueError` for shapes that do not fit and labels out of range, which on
    a GPU instead give a NaN loss, unless `tg.config.debug` is True.

    >>> print(tg.nn.softmax_cross_entropy([[0.0, 0.0]], [1]))
    tg.Tensor(0.6931472, shape=(), dtype=float32)
    """
    x, t = as_tensor(logits), as_tensor(labels)
    shape, of_labels, kind = x._array.shape, t._array.shape, t._array.dtype.kind
    if not shape or x._array.dtype.kind not in "fV":
        raise TypeError(
            f"[softmax_cross_entropy] logits must be floating, (..., classes), got "
            f"{x.dtype} of shape {x.shape}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"[softmax_cross_entropy] label_smoothing must be from 0 to 1, got {label_smoothing!r}"
        )
    classes = shape[-1]
    weights = None if class_weights is None else ew.astype(as_tensor(class_weights), x.dtype)
    if weights is not None and weights.shape != (classes,):
        raise ValueError(
            f"[softmax_cross_entropy] class_weights must have shape ({classes},), "
            f"got {weights.shape}"
        )
    integers = kind in "iu"
    if of_labels != (shape[:-1] if integers else shape) or kind == "b":
        raise ValueError(
            f"[softmax_cross_entropy] labels must be integers of shape {x.shape[:-1]} or "
            f"probabilities of shape {x.shape}, got {t.dtype} of shape {t.shape}"
        )
    n = math.prod(shape[:-1])
    rows = x if len(shape) == 2 else _reshape(x, shape=(n, classes))
    if integers:
        flat = t if len(of_labels) == 1 else _reshape(t, shape=(n,))
        plain = ignore_label is None and weights is None
        if plain and n and reduction == "mean" and is_recording(rows):
            return fused.mean_label_cross_entropy_with_grad(
                rows, flat, label_smoothing=float(label_smoothing), ignore_label=None
            )[0]
        losses, weight = _from_labels(rows, flat, label_smoothing, ignore_label, weights)
    else:
        if ignore_label is not None:
            raise ValueError("[softmax_cross_entropy] ignore_label goes with integer labels")
        flat = t if len(shape) == 2 else _reshape(t, shape=(n, classes))
        flat = ew.astype(flat, x.dtype, copy=False)
        losses, weight = _from_targets(rows, flat, label_smoothing, weights), None
    if len(shape) != 2 and reduction == "none":
        losses = _reshape(losses, shape=shape[:-1])
    return _reduced("softmax_cross_entropy", losses, weight, reduction)


def _from_labels(
    rows: Tensor, labels: Tensor, smoothing: float, ignore: int | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return each row's loss, and what each row counts in a mean (None: one)."""
    counted = None if ignore is None else ew.astype(logic.not_equal(labels, ignore), rows.dtype)
    options = {"label_smoothing": float(smoothing), "ignore_label": ignore}
    if weights is None:
        if is_recording(rows):
            losses, _ = fused.label_cross_entropy_with_grad(rows, labels, **options)
        else:
            losses = fused.label_cross_entropy(rows, labels, **options)
        return losses, counted
    if is_recording(rows, weights):
        losses, _ = fused.weighted_label_cross_entropy_with_grad(rows, labels, weights, **options)
    else:
        losses = fused.weighted_label_cross_entropy(rows, labels, weights, **options)
    # What each row counts is its label's weight: of a label that is no class any will do, for its
    # loss says that it is none.
    none = logic.logical_or(logic.less(labels, 0), logic.greater_equal(labels, rows.shape[1]))
    if ignore is not None:
        none = logic.logical_or(none, logic.equal(labels, ignore))
    weight = indexing.rows_at(weights, ew.where(none, 0, labels))
    return losses, weight if counted is None else ew.multiply(weight, counted)


def _from_targets(
    rows: Tensor, targets: Tensor, smoothing: float, weights: Tensor | None
) -> Tensor:
    if smoothing:
        targets = ew.add(ew.multiply(targets, 1.0 - smoothing), smoothing / rows.shape[1])
    if weights is not None:
        targets = ew.multiply(targets, weights)
    if is_recording(rows, targets):
        return fused.probability_cross_entropy_with_grad(rows, targets)[0]
    return fused.probability_cross_entropy(rows, targets)


def sigmoid_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, /, *, reduction: str = "mean"
) -> Tensor:
    """Return the binary cross-entropy between targets and sigmoid(logits), element by element.

    logits, targets  of one shape; targets are probabilities from 0 to 1, or 0 and 1.
    reduction        `"mean"` over all elements, `"sum"` or `"none"`.

    The loss is softplus(x) - x * t, which overflows nowhere; its derivative is sigmoid(x) - t.
    Raises `ValueError` for unequal shapes.

    >>> print(tg.nn.sigmoid_cross_entropy([0.0], [1.0]))
    tg.Tensor(0.6931472, shape=(), dtype=float32)
    """
    x, t = as_floating(logits), as_tensor(targets)
    if x.shape != t.shape:
        raise ValueError(
            f"[sigmoid_cross_entropy] logits and targets must have one shape, "
            f"got {x.shape} and {t.shape}"
        )
    losses = ew.subtract(activations.softplus(x), ew.multiply(x, ew.astype(t, x.dtype)))
    return _reduced("sigmoid_cross_entropy", losses, None, reduction)
