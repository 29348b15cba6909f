"""What people write by hand, and the fused primitives that are put in its place: a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tapegrad._function.patterns import Pattern, rewrite_by
from tapegrad._function.rewrites import Rewrite
from tapegrad._recording import is_recording
from tapegrad.custom import stop_gradient
from tapegrad.fused import (
    label_cross_entropy,
    label_cross_entropy_with_grad,
    linear,
    linear_relu,
    linear_relu_grad,
    log_softmax,
    probability_cross_entropy,
    probability_cross_entropy_with_grad,
    relu,
    relu_grad,
    softmax,
)
from tapegrad.linear import reshape, sum_to
from tapegrad.ops import elementwise as ew
from tapegrad.ops.indexing import _row_numbers, getitem, take_along_axis
from tapegrad.ops.linear_algebra import matmul
from tapegrad.ops.reductions import logsumexp, max, sum
from tapegrad.tensor import Tensor

# ---- dense layers


def _relu_grad_and_sum(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    gz = relu_grad(g, y)
    return sum_to(gz, shape=y.shape[1:]), gz


REWRITES: dict[str, Rewrite] = {
    "linear": rewrite_by(
        [Pattern(lambda x, w, b: ew.add(matmul(x, w), b), linear, "ni", "io", "o")], "matmul"
    ),
    "linear_relu": rewrite_by(
        [Pattern(lambda x, w, b: relu(linear(x, w, b)), linear_relu, "ni", "io", "o")], "linear"
    ),
    # Not where its gradient is taken, for which the sum is needed: at 0 it is one half.
    "linear_relu of maximum": rewrite_by(
        [
            Pattern(lambda x, w, b: ew.maximum(linear(x, w, b), 0), linear_relu, "ni", "io", "o"),
            Pattern(lambda x, w, b: ew.maximum(linear(x, w, b), 0.0), linear_relu, "ni", "io", "o"),
        ],
        "maximum",
        bound="the sign of a zero",
    ),
    "linear_relu_grad": rewrite_by(
        [Pattern(_relu_grad_and_sum, lambda g, y: linear_relu_grad(g, y)[::-1], "no", "no")],
        "relu_grad",
    ),
}


# ---- softmax and cross-entropy: logits z (n, c); probabilities t (n, c), or labels

_Function = Callable[[Tensor], Tensor]


def _total(x: Tensor) -> Tensor:
    return sum(x, axis=1, keepdims=True)


def _shares(e: Tensor) -> Tensor:
    return ew.divide(e, _total(e))


def _minus_top(z: Tensor) -> Tensor:
    return ew.subtract(z, max(z, axis=1, keepdims=True))


def _minus_constant_top(z: Tensor) -> Tensor:
    return ew.subtract(z, stop_gradient(max(z, axis=1, keepdims=True)))


def _minus_log_total(z: Tensor) -> Tensor:
    return ew.subtract(z, ew.log(_total(ew.exp(z))))


# The longer ones first: they hold others.
_SOFTMAXES: list[_Function] = [
    lambda z: softmax(z, axis=1),
    lambda z: _shares(ew.exp(_minus_top(z))),
    lambda z: _shares(ew.exp(_minus_constant_top(z))),
    lambda z: _shares(ew.exp(z)),
    lambda z: ew.divide(ew.exp(z), _total(ew.exp(z))),
]
_LOG_SOFTMAXES: list[_Function] = [
    lambda z: log_softmax(z, axis=1),
    *(lambda z, of=of: ew.log(of(z)) for of in _SOFTMAXES),
    lambda z: ew.subtract(z, logsumexp(z, axis=1, keepdims=True)),
    lambda z: _minus_log_total(_minus_top(z)),
    lambda z: _minus_log_total(_minus_constant_top(z)),
    _minus_log_total,
]


def _loss_of_targets(z: Tensor, t: Tensor) -> Tensor:
    if is_recording(z):
        return probability_cross_entropy_with_grad(z, t)[0]
    return probability_cross_entropy(z, t)


def _loss_of_labels(z: Tensor, labels: Tensor) -> Tensor:
    options = {"label_smoothing": 0.0, "ignore_label": None}
    rows = _row_numbers(labels, rows=z.shape[1])  # of a column too; the index -1 is the last class
    if is_recording(z):
        return label_cross_entropy_with_grad(z, rows, **options)[0]
    return label_cross_entropy(z, rows, **options)


def _column(x: Tensor) -> Tensor:
    return reshape(x, shape=(*x.shape, 1))


def _patterns_of_targets() -> Iterator[Pattern]:
    """Yield sum(t * log(p)) over the classes or over everything."""
    sums: list[tuple[_Function, _Function]] = [
        (lambda x: sum(x, axis=1), ew.positive),
        (_total, _column),
        (sum, sum),
    ]
    for logs, (total, of_losses) in itertools.product(_LOG_SOFTMAXES, sums):

        def before(z: Tensor, t: Tensor, logs: Any = logs, total: Any = total) -> Tensor:
            return total(ew.multiply(t, logs(z)))  # type: ignore[no-any-return]

        def after(z: Tensor, t: Tensor, of_losses: Any = of_losses) -> Tensor:
            return ew.negative(of_losses(_loss_of_targets(z, t)))

        yield Pattern(before, after, "nc", "nc", wrt=True, types="fd")


def _pick(x: Tensor, labels: Tensor) -> Tensor:
    """Return each row's element that a label names, in the shape of the labels."""
    if labels.ndim == 2:
        return take_along_axis(x, labels, axis=1)
    return getitem(x, (np.arange(x.shape[0]), labels))


def _patterns_of_labels() -> Iterator[Pattern]:
    """Yield log(p)[range, labels], log(p[range, labels]) and logsumexp(z) - z[range, labels]."""
    befores: list[tuple[Callable[[Tensor, Tensor], Tensor], bool]] = [
        *((lambda z, k, of=of: _pick(of(z), k), True) for of in _LOG_SOFTMAXES),
        *((lambda z, k, of=of: ew.log(_pick(of(z), k)), True) for of in _SOFTMAXES),
        (lambda z, k: ew.subtract(logsumexp(z, axis=1, keepdims=k.ndim == 2), _pick(z, k)), False),
        (
            lambda z, k: ew.subtract(
                ew.log(sum(ew.exp(z), axis=1, keepdims=k.ndim == 2)), _pick(z, k)
            ),
            False,
        ),
    ]
    for (before, negative), labels in itertools.product(befores, ("N", "N1")):

        def after(z: Tensor, k: Tensor, negative: bool = negative) -> Tensor:
            losses = _loss_of_labels(z, k)
            losses = _column(losses) if k.ndim == 2 else losses
            return ew.negative(losses) if negative else losses

        yield Pattern(before, after, "nc", labels, wrt=True, types="fd")


# Written by hand, p = 0 for a logit far below the largest (by 104 in single precision, 746 in
# double), exp overflows for large ones (89, 710) where nothing is subtracted, and 0 * -inf is NaN.
# The fused losses are finite there, and differ elsewhere by what a hand-written one has rounded.
_ROUNDING = "units in the last place of 1 + the loss; finite where exp over- or underflows"
_LOGARITHMS = "log log_softmax logsumexp"
REWRITES["cross-entropy of targets"] = rewrite_by(
    list(_patterns_of_targets()), _LOGARITHMS, "multiply", bound=_ROUNDING
)
REWRITES["cross-entropy of labels"] = rewrite_by(
    list(_patterns_of_labels()), _LOGARITHMS, "getitem", bound=_ROUNDING
)
