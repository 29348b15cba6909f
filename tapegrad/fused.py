"""The fused primitives of an MLP: meaning, rule and kernel together.

A kernel is only a faster way to the values of the meaning beside it; the node and the rule are the
same on both backends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._blocks import LARGE, for_rows, lanes, loss_rows
from tapegrad._recording import state
from tapegrad.config import config
from tapegrad.formulas import one_launch
from tapegrad.kernels import elementwise as elementwise_kernels
from tapegrad.kernels import gemm as gemm_kernels
from tapegrad.kernels import linear_relu as linear_kernels
from tapegrad.kernels import softmax_cross_entropy as loss_kernels
from tapegrad.linear import broadcast_to as _broadcast_to
from tapegrad.linear import reshape as _reshape
from tapegrad.linear import sum_over
from tapegrad.linear import sum_to as _sum_to
from tapegrad.ops import elementwise as ew
from tapegrad.ops import indexing, linear_algebra, logic, reductions
from tapegrad.primitive import MultiPrimitive, Primitive, multi_primitive, primitive
from tapegrad.tensor import Tensor

# ---- relu


def _at_least_zero(xp: Module, x: Array, out: Array | None = None) -> Array:
    # Against zeros in an array, not the number 0: NumPy is three times faster so. Against as many
    # of them as x has it is twice as fast again, while they stay in cache.
    few = xp is np and x.size <= 1 << 14
    zeros = _zeros(x.shape, x.dtype) if few else xp.zeros(x.shape[-1:], x.dtype)
    return xp.maximum(x, zeros) if out is None else xp.maximum(x, zeros, out=out)


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return np.zeros(shape, dtype)


def _relu_grad_forward(xp: Module, g: Array, y: Array) -> Array:
    if xp is np:
        # A product with 0 and 1: where takes ten times as long. They are the sign of relu's output,
        # or whether it is above 0: half the time, but for the few elements that a call costs.
        gx = g * (np.sign(y) if y.size < 1 << 13 else y > 0)
        if not ew.holds_nan(gx):
            return gx
        positive = y > 0
        return ew.with_zeros(np, g * positive, ~positive)
    return xp.where(y > 0, g, xp.result_type(g, y).type(0))


# g where y > 0, else 0, whatever g and y are (NaN and infinities too). Reads relu's output, so
# that the input need not be kept.
relu_grad: Primitive = primitive(
    "relu_grad",
    _relu_grad_forward,
    lambda G, _gx, _g, y: relu_grad(G, y),
    None,
    kernel=elementwise_kernels.relu_grad,
)
relu: Primitive = primitive(
    "relu",
    lambda xp, x: _at_least_zero(xp, x),
    lambda g, y, _x: relu_grad(g, y),
    kernel=one_launch("relu"),
)


# ---- linear layers: x (n, i), w (i, o), b (o,)


def _linear_forward(xp: Module, x: Array, w: Array, b: Array) -> Array:
    y = linear_algebra.product(xp, x, w)
    if y.dtype == b.dtype:
        y += b  # into the product's own memory
        return y
    return y + b


def _linear_vjp(
    needs: tuple[bool, ...], g: Tensor, _y: Any, x: Tensor, w: Tensor, _b: Any
) -> tuple[Tensor | None, ...]:
    return _linear_grads(needs, g, _sum_to(g, shape=_b.shape) if needs[2] else None, x, w)


def _linear_grads(
    needs: tuple[bool, ...], gz: Tensor, gb: Tensor | None, x: Tensor, w: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w and b from that of the product."""
    return (
        linear_algebra.matmul_nt(gz, w) if needs[0] else None,
        linear_algebra.matmul_tn(x, gz) if needs[1] else None,
        gb,
    )


linear: Primitive = primitive(
    "linear", _linear_forward, joint_vjp=_linear_vjp, kernel=gemm_kernels.linear
)


def _linear_relu_forward(xp: Module, x: Array, w: Array, b: Array) -> Array:
    z = _linear_forward(xp, x, w, b)
    return _at_least_zero(xp, z, out=z)


def _linear_relu_vjp(
    needs: tuple[bool, ...], g: Tensor, y: Tensor, x: Tensor, w: Tensor, _b: Any
) -> tuple[Tensor | None, ...]:
    gz, gb = linear_relu_grad(g, y)
    return _linear_grads(needs, gz, gb if needs[2] else None, x, w)


linear_relu: Primitive = primitive(
    "linear_relu",
    _linear_relu_forward,
    joint_vjp=_linear_relu_vjp,
    kernel=linear_kernels.linear_relu,
)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two parts of a gradient, of which either may be missing."""
    return b if a is None else a if b is None else ew.add(a, b)


def of_matrix_and_sums(
    of_matrix: Tensor | None, of_sums: Tensor | None, shape: tuple[int, ...]
) -> Tensor | None:
    """Return the gradient of a matrix by itself and by the sums of its columns."""
    if of_matrix is None and of_sums is not None:
        return _broadcast_to(of_sums, shape=shape)
    return _plus(of_matrix, of_sums)


def _linear_relu_grad_forward(xp: Module, g: Array, y: Array) -> tuple[Array, Array]:
    gz = _relu_grad_forward(xp, g, y)
    return gz, _sum_to.forward(xp, gz, shape=gz.shape[1:])


def _linear_relu_grad_vjp(
    needs: tuple[bool, ...], G: tuple[Tensor | None, Tensor | None], _out: Any, _g: Any, y: Tensor
) -> tuple[Tensor | None, None]:
    total = of_matrix_and_sums(*G, y.shape) if needs[0] else None
    return (None if total is None else relu_grad(total, y)), None


# From relu's upstream gradient and output: the gradient of the sum before it, and of the bias.
linear_relu_grad: MultiPrimitive = multi_primitive(
    "linear_relu_grad",
    _linear_relu_grad_forward,
    joint_vjp=_linear_relu_grad_vjp,
    kernel=linear_kernels.linear_relu_grad,
    fills=True,
)


# ---- softmax


def _softmax_forward(xp: Module, x: Array, *, axis: int) -> Array:
    y = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    y /= sum_over(xp, y, axis, keepdims=True)
    return y


def _softmax_product(g: Tensor, p: Tensor, axis: int) -> Tensor:
    """Return p * (g - sum(p * g)): the derivative of softmax, and of a gradient by logits."""
    product = ew.scale(g, p)
    total = reductions.sum(product, axis=axis, keepdims=True)
    return ew.subtract(product, ew.scale(total, p))


softmax: Primitive = primitive(
    "softmax",
    _softmax_forward,
    lambda g, y, _x, *, axis: _softmax_product(g, y, axis),
)


def _log_softmax_forward(xp: Module, x: Array, *, axis: int) -> Array:
    shifted = x - xp.max(x, axis=axis, keepdims=True)
    shifted -= xp.log(sum_over(xp, xp.exp(shifted), axis, keepdims=True))
    return shifted


log_softmax: Primitive = primitive(
    "log_softmax",
    _log_softmax_forward,
    lambda g, y, _x, *, axis: ew.subtract(
        g, ew.scale(reductions.sum(g, axis=axis, keepdims=True), ew.exp(y))
    ),
)


# ---- softmax cross-entropy: logits (n, c); the loss of each row, and its gradient


def _shifted(xp: Module, logits: Array) -> tuple[Array, Array, Array]:
    """Return x - max(x), exp of that, and the sums of the latter, (n, 1)."""
    top = xp.max(logits, axis=1, keepdims=True)
    top = xp.where(top == -math.inf, top.dtype.type(0), top)  # all masked: log(0), not NaN
    shifted = logits - top
    exponentials = xp.exp(shifted)
    return shifted, exponentials, sum_over(xp, exponentials, 1, keepdims=True)


def _plain_label_loss(
    logits: Array, labels: Array, with_grad: bool, share: Any
) -> tuple[Array, Array | None] | None:
    """Do what `_label_loss` does for labels alone, where no row is special; else return None."""
    n, classes = logits.shape
    if not _in_range(labels, classes):
        return None
    if logits.size < LARGE or not logits.flags.c_contiguous:
        return _plain_rows(logits, labels, with_grad, share)
    losses = np.empty(n, logits.dtype)
    gradient = np.empty_like(logits) if with_grad else None
    special = []

    def work(rows: slice, _lane: int) -> None:
        p = None if gradient is None else gradient[rows]
        answer = _plain_rows(logits[rows], labels[rows], with_grad, share, p)
        if answer is None:
            special.append(rows)
        else:
            losses[rows] = answer[0]

    for_rows(n, loss_rows(classes), lanes(logits.size), work)
    return None if special else (losses, gradient)


def _plain_rows(
    logits: Array, labels: Array, with_grad: bool, share: Any, out: Array | None = None
) -> tuple[Array, Array | None] | None:
    """Return the losses of some rows and their gradient, in `out` if that is given."""
    top = np.maximum.reduce(logits, 1, keepdims=True)
    p = logits - top if out is None else np.subtract(logits, top, out)
    chosen = np.add(labels, _row_starts(*logits.shape), dtype=np.int64)  # of uint64 too
    picked = p.take(chosen)
    np.exp(p, p)
    total = sum_over(np, p, 1, keepdims=True)
    if ew.holds_nan(total):  # of a row with a NaN, or of -inf alone: as the long way says
        return None
    loss = np.log(total).reshape(-1) - picked
    if not with_grad:
        return loss, None
    p /= total
    p.put(chosen, p.take(chosen) - p.dtype.type(1))
    if share is not None:
        p *= share
    return loss, p


def _in_range(labels: Array, classes: int) -> bool:
    if labels.dtype == np.int64:  # the negative ones are the largest as unsigned numbers
        labels = labels.view(np.uint64)
    elif labels.dtype.kind == "i" and np.minimum.reduce(labels) < 0:
        return False
    return bool(np.maximum.reduce(labels) < classes)


@functools.lru_cache(maxsize=64)
def _few_row_starts(rows: int, classes: int) -> Array:
    return np.arange(0, rows * classes, classes)


def _row_starts(rows: int, classes: int) -> Array:
    """Return the place of each row's first element, kept for the next time if they are few."""
    few = rows <= 1 << 14
    return _few_row_starts(rows, classes) if few else np.arange(0, rows * classes, classes)


def _checked_labels(
    xp: Module, labels: Array, classes: int, ignore_label: int | None
) -> tuple[Array, Array]:
    """Return which rows are not ignored, and which labels are classes.

    On a GPU a wrong label is seen only by the kernel: its row has the loss NaN and no gradient.
    Asking would wait for the device, which is what `tg.config.debug` is for.
    """
    used = xp.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    known = (labels >= 0) & (labels < classes)
    if (xp is np or config.debug) and not (known | ~used).all():
        wrong = labels[used & ~known][0]
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {wrong}")
    return used, known


def _label_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that looks at its labels first in debug mode."""

    def launch(xp: Module, logits: Array, labels: Array, *weights: Array, **options: Any) -> Any:
        if config.debug:
            _checked_labels(xp, labels, logits.shape[-1], options["ignore_label"])
        return kernel(xp, logits, labels, *weights, **options)

    return launch


def _label_loss(
    xp: Module,
    logits: Array,
    labels: Array,
    *,
    label_smoothing: float,
    ignore_label: int | None,
    with_grad: bool,
    share: Any = None,
) -> tuple[Array, Array | None]:
    """Return the losses of rows, and their gradient, multiplied by `share` if it is given."""
    n, classes = logits.shape
    if xp is np and not label_smoothing and ignore_label is None and n:
        answer = _plain_label_loss(logits, labels, with_grad, share)
        if answer is not None:
            return answer
    used, known = _checked_labels(xp, labels, classes, ignore_label)
    rows = xp.arange(n)
    column = xp.where(known & used, labels, 0)
    s = label_smoothing
    shifted, p, total = _shifted(xp, logits)
    with np.errstate(divide="ignore"):  # log(0) for a row that is masked whole
        log_total = xp.log(total)[:, 0]
    loss = log_total - (1 - s) * shifted[rows, column]
    if s:
        loss = loss - s / classes * sum_over(xp, shifted, 1)
    zero, nan = loss.dtype.type(0), loss.dtype.type(math.nan)
    loss = xp.where(used, xp.where(known, loss, nan), zero)
    if not with_grad:
        return loss, None
    p /= total
    if s:
        p -= p.dtype.type(s / classes)
    p[rows, column] -= p.dtype.type(1 - s)
    counted = used & known
    if not (xp is np and counted.all()):
        p = xp.where(counted[:, None], p, zero)
    if share is not None:
        p *= share
    return loss, p


def _label_hessian(logits: Tensor, labels: Tensor, G: Tensor, ignore_label: int | None) -> Tensor:
    """Return the Hessian of each row's loss times G: p * (G - sum(p * G)), 0 for ignored rows."""
    product = _softmax_product(G, softmax(logits, axis=1), 1)
    return ew.where(_counted(labels, logits.shape[1], ignore_label), product, 0)


def _counted(labels: Tensor, classes: int, ignore_label: int | None) -> Tensor:
    """Tell of each row, (n, 1), whether its label is a class and not ignored."""
    counted = logic.logical_and(logic.greater_equal(labels, 0), logic.less(labels, classes))
    if ignore_label is not None:
        counted = logic.logical_and(counted, logic.not_equal(labels, ignore_label))
    return _column(counted)


def _column(x: Tensor) -> Tensor:
    return _reshape(x, shape=(*x.shape, 1))


def _label_vjp(
    needs: tuple[bool, ...],
    g: tuple[Tensor | None, Tensor | None],
    y: tuple[Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    ignore_label: int | None,
) -> tuple[Tensor | None, None]:
    of_loss, of_gradient = g
    total = None if of_loss is None else ew.scale(_column(of_loss), y[1])
    if of_gradient is not None:
        total = _plus(total, _label_hessian(logits, labels, of_gradient, ignore_label))
    return total, None


# The loss alone, for evaluation: nothing of it is differentiated.
label_cross_entropy: Primitive = primitive(
    "label_cross_entropy",
    lambda xp, logits, labels, **options: _label_loss(
        xp, logits, labels, **options, with_grad=False
    )[0],
    None,
    None,
    kernel=_label_kernel(loss_kernels.softmax_cross_entropy),
)
# The loss and, of the same exponentials, its gradient for the logits: an output of its own, with
# its own rule, so that the reverse pass has only to scale it.
label_cross_entropy_with_grad: MultiPrimitive = multi_primitive(
    "label_cross_entropy_with_grad",
    lambda xp, logits, labels, **options: _label_loss(
        xp, logits, labels, **options, with_grad=True
    ),
    joint_vjp=_label_vjp,
    kernel=_label_kernel(loss_kernels.softmax_cross_entropy_with_grad),
)


def _mean_label_loss(
    xp: Module, logits: Array, labels: Array, **options: Any
) -> tuple[Array, Array]:
    share = logits.dtype.type(1) / len(logits)
    loss, gradient = _label_loss(xp, logits, labels, **options, with_grad=True, share=share)
    return sum_over(xp, loss, 0) / len(loss), gradient


def _mean_label_kernel(
    xp: Module, logits: Array, labels: Array, **options: Any
) -> tuple[Array, Array] | None:
    answer = loss_kernels.softmax_cross_entropy_with_grad(xp, logits, labels, **options)
    if answer is None:
        return None
    loss, gradient = answer
    gradient *= gradient.dtype.type(1) / len(loss)
    return loss.sum() / len(loss), gradient


def _mean_label_vjp(
    needs: tuple[bool, ...],
    g: tuple[Tensor | None, Tensor | None],
    y: tuple[Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    ignore_label: int | None,
) -> tuple[Tensor | None, None]:
    of_mean, of_gradient = g
    total = None
    if of_mean is not None:
        total = y[1] if _is_plain_one(of_mean) else ew.scale(of_mean, y[1])
    if of_gradient is not None:
        part = ew.divide(of_gradient, len(logits))
        total = _plus(total, _label_hessian(logits, labels, part, ignore_label))
    return total, None


def _is_plain_one(g: Tensor) -> bool:
    """Tell whether a product with g need not be computed: it is 1, and nobody records."""
    return isinstance(g._array, np.generic) and bool(g._array == 1) and not state.recorders


# What a training step takes of the two above: the mean of the losses, and its gradient. In one
# primitive the reverse pass has no sum, division and product to go back through.
mean_label_cross_entropy_with_grad: MultiPrimitive = multi_primitive(
    "mean_label_cross_entropy_with_grad",
    _mean_label_loss,
    joint_vjp=_mean_label_vjp,
    kernel=_label_kernel(_mean_label_kernel),
)


def _probability_loss(
    xp: Module, logits: Array, targets: Array, *, with_grad: bool
) -> tuple[Array, Array | None]:
    shifted, p, total = _shifted(xp, logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = targets * (xp.log(total) - shifted)
        # A target of 0 counts nothing, also where the logit is -inf.
        terms = xp.where(targets == 0, terms.dtype.type(0), terms)
    loss = sum_over(xp, terms, 1)
    if not with_grad:
        return loss, None
    return loss, p * (sum_over(xp, targets, 1, keepdims=True) / total) - targets


def _probability_vjp(
    needs: tuple[bool, ...],
    g: tuple[Tensor | None, Tensor | None],
    y: tuple[Tensor, Tensor],
    logits: Tensor,
    targets: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    of_loss, of_gradient = g
    of_logits = of_targets = None
    if of_loss is not None:
        column = _column(of_loss)
        if needs[0]:
            of_logits = ew.scale(column, y[1])
        if needs[1]:
            of_targets = ew.negative(ew.scale(column, log_softmax(logits, axis=1)))
    if of_gradient is not None:
        p = softmax(logits, axis=1)
        if needs[0]:
            weight = reductions.sum(targets, axis=1, keepdims=True)
            part = ew.multiply(weight, _softmax_product(of_gradient, p, 1))
            of_logits = _plus(of_logits, part)
        if needs[1]:
            inner = reductions.sum(ew.scale(of_gradient, p), axis=1, keepdims=True)
            of_targets = _plus(of_targets, ew.subtract(inner, of_gradient))
    return of_logits, of_targets


probability_cross_entropy: Primitive = primitive(
    "probability_cross_entropy",
    lambda xp, logits, targets: _probability_loss(xp, logits, targets, with_grad=False)[0],
    None,
    None,
    kernel=loss_kernels.probability_cross_entropy,
)
probability_cross_entropy_with_grad: MultiPrimitive = multi_primitive(
    "probability_cross_entropy_with_grad",
    lambda xp, logits, targets: _probability_loss(xp, logits, targets, with_grad=True),
    joint_vjp=_probability_vjp,
    kernel=loss_kernels.probability_cross_entropy_with_grad,
)


# ---- the same for labels with a weight for each class: terms of probabilities, targets * weights


def _weighted_label_loss(
    xp: Module,
    logits: Array,
    labels: Array,
    weights: Array,
    *,
    label_smoothing: float,
    ignore_label: int | None,
    with_grad: bool,
) -> tuple[Array, Array | None]:
    n, classes = logits.shape
    used, known = _checked_labels(xp, labels, classes, ignore_label)
    targets = xp.full(logits.shape, label_smoothing / classes, logits.dtype)
    targets[xp.arange(n), xp.where(known & used, labels, 0)] += logits.dtype.type(
        1 - label_smoothing
    )
    targets *= weights
    loss, grad = _probability_loss(xp, logits, targets, with_grad=with_grad)
    zero, nan = loss.dtype.type(0), loss.dtype.type(math.nan)
    loss = xp.where(used, xp.where(known, loss, nan), zero)
    return loss, None if grad is None else xp.where((used & known)[:, None], grad, zero)


def _weighted_label_vjp(
    needs: tuple[bool, ...],
    g: tuple[Tensor | None, Tensor | None],
    y: tuple[Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    label_smoothing: float,
    ignore_label: int | None,
) -> tuple[Tensor | None, None, Tensor | None]:
    of_loss, of_gradient = g
    if of_gradient is None and of_loss is not None and not needs[2]:
        return ew.scale(_column(of_loss), y[1]), None, None
    classes = logits.shape[1]
    counted = _counted(labels, classes, ignore_label)
    safe = ew.where(_reshape(counted, shape=labels.shape), labels, 0)
    one_hot = indexing.one_hot(safe, classes, dtype=logits.dtype)
    smoothed = ew.add(ew.multiply(one_hot, 1.0 - label_smoothing), label_smoothing / classes)
    targets = ew.where(counted, smoothed, 0)
    of_logits, of_products = _probability_vjp(
        (needs[0], needs[2]), g, y, logits, ew.multiply(targets, weights)
    )
    if of_logits is not None:
        of_logits = ew.where(counted, of_logits, 0)
    if of_products is None:
        return of_logits, None, None
    # 0 where the target is 0, also where the logarithm of its probability is infinite.
    return of_logits, None, _sum_to(ew.scale_both(of_products, targets), shape=weights.shape)


weighted_label_cross_entropy: Primitive = primitive(
    "weighted_label_cross_entropy",
    lambda xp, logits, labels, weights, **options: _weighted_label_loss(
        xp, logits, labels, weights, **options, with_grad=False
    )[0],
    None,
    None,
    None,
    kernel=_label_kernel(loss_kernels.softmax_cross_entropy),
)
weighted_label_cross_entropy_with_grad: MultiPrimitive = multi_primitive(
    "weighted_label_cross_entropy_with_grad",
    lambda xp, logits, labels, weights, **options: _weighted_label_loss(
        xp, logits, labels, weights, **options, with_grad=True
    ),
    joint_vjp=_weighted_label_vjp,
    kernel=_label_kernel(loss_kernels.softmax_cross_entropy_with_grad),
)
