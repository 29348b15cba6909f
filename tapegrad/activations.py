"""The primitives of activation functions: each, and its gradient, one launch on a GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad.formulas import formula, formula_with_share, gradient_formula, one_launch
from tapegrad.primitive import Primitive, primitive

# G. Klambauer et al., "Self-normalizing neural networks" (2017), equation 14.
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805
_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715  # of D. Hendrycks and K. Gimpel, "Gaussian error linear units" (2016)


# ---- of two branches: what is not taken gets no gradient, whatever it is

_relu6_grad = gradient_formula(
    "relu6_grad",
    lambda o, g, y: o.relu_grad(o.where(o.greater_equal(y, 6), 0, g), y),
    curved=False,
)


def _relu6(o: Any, x: Any) -> Any:
    y = o.relu(x)
    return o.where(o.greater_equal(y, 6), 6, y)


relu6 = formula("relu6", _relu6, lambda g, y, _x: _relu6_grad(g, y))

_leaky_relu_grad = gradient_formula(
    "leaky_relu_grad",
    lambda o, g, x, *, alpha: o.where(o.greater(x, 0), g, o.multiply(g, alpha)),
    curved=False,
)
leaky_relu = formula(
    "leaky_relu",
    lambda o, x, *, alpha: o.where(o.greater(x, 0), x, o.multiply(x, alpha)),
    lambda g, _y, x, *, alpha: _leaky_relu_grad(g, x, alpha=alpha),
)


def _elu(o: Any, x: Any, *, alpha: float) -> Any:
    # exp is given negative numbers only: it would overflow for the large ones that are not taken
    below = o.expm1(o.minimum(x, 0))
    return o.where(o.greater_equal(x, 0), x, o.multiply(below, alpha))


def _elu_gradient(o: Any, g: Any, x: Any, *, alpha: float) -> Any:
    below = o.scale(g, o.multiply(o.exp(o.minimum(x, 0)), alpha))
    return o.where(o.greater_equal(x, 0), g, below)


_elu_grad = gradient_formula("elu_grad", _elu_gradient)
elu = formula("elu", _elu, lambda g, _y, x, *, alpha: _elu_grad(g, x, alpha=alpha))

_selu_grad = gradient_formula(
    "selu_grad",
    lambda o, g, x: _elu_gradient(o, o.multiply(g, _SELU_SCALE), x, alpha=_SELU_ALPHA),
)
selu = formula(
    "selu",
    lambda o, x: o.multiply(_elu(o, x, alpha=_SELU_ALPHA), _SELU_SCALE),
    lambda g, _y, x: _selu_grad(g, x),
)


# ---- sigmoid and its kin


def _sigmoid_forward(xp: Module, x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(1000) is inf, and 1 / inf the right answer
        return 1 / (1 + xp.exp(-x))


_sigmoid_grad = gradient_formula(
    "sigmoid_grad", lambda o, g, y: o.scale(g, o.multiply(y, o.subtract(1, y)))
)
sigmoid: Primitive = primitive(
    "sigmoid",
    _sigmoid_forward,
    lambda g, y, _x: _sigmoid_grad(g, y),
    kernel=one_launch("sigmoid"),
)
_softplus_grad = gradient_formula("softplus_grad", lambda o, g, x: o.scale(g, o.sigmoid(x)))
softplus: Primitive = primitive(
    "softplus",
    lambda xp, x: xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))),
    lambda g, _y, x: _softplus_grad(g, x),
    kernel=one_launch("softplus"),
)
_log_sigmoid_grad = gradient_formula(
    "log_sigmoid_grad", lambda o, g, x: o.scale(g, o.sigmoid(o.negative(x)))
)
log_sigmoid = formula(
    "log_sigmoid",
    lambda o, x: o.negative(o.softplus(o.negative(x))),
    lambda g, _y, x: _log_sigmoid_grad(g, x),
)


# ---- x times a share of it, which is a result of its own: the gradient reads it again


def _silu_gradient(o: Any, g: Any, x: Any, share: Any) -> Any:
    # scale: where the share no longer changes, it does not matter how large x is
    rise = o.scale(o.multiply(share, o.subtract(1, share)), x)
    return o.scale(g, o.add(share, rise))


def _silu(o: Any, x: Any) -> tuple[Any, Any]:
    share = o.sigmoid(x)
    return o.multiply(x, share), share


silu = formula_with_share("silu", _silu, gradient_formula("silu_grad", _silu_gradient))


def _gelu(o: Any, x: Any) -> tuple[Any, Any]:
    share = o.erf(o.divide(x, math.sqrt(2)))
    return o.multiply(o.multiply(x, 0.5), o.add(share, 1)), share


def _gelu_gradient(o: Any, g: Any, x: Any, share: Any) -> Any:
    rise = o.scale(o.exp(o.multiply(o.square(x), -0.5)), o.multiply(x, 0.5 * _ROOT))
    return o.scale(g, o.add(o.multiply(o.add(share, 1), 0.5), rise))


gelu = formula_with_share("gelu", _gelu, gradient_formula("gelu_grad", _gelu_gradient))


def _gelu_tanh(o: Any, x: Any) -> tuple[Any, Any]:
    cubic = o.add(x, o.multiply(o.power(x, 3), _CUBIC))
    share = o.tanh(o.multiply(cubic, _ROOT))
    return o.multiply(o.multiply(x, 0.5), o.add(share, 1)), share


def _gelu_tanh_gradient(o: Any, g: Any, x: Any, share: Any) -> Any:
    inner = o.add(o.multiply(o.square(x), 3 * _CUBIC), 1)
    rise = o.scale(o.subtract(1, o.square(share)), o.multiply(o.multiply(x, 0.5 * _ROOT), inner))
    return o.scale(g, o.add(o.multiply(o.add(share, 1), 0.5), rise))


gelu_tanh = formula_with_share(
    "gelu_tanh", _gelu_tanh, gradient_formula("gelu_tanh_grad", _gelu_tanh_gradient)
)

_softsign_grad = gradient_formula(
    "softsign_grad", lambda o, g, x: o.scale(g, o.reciprocal(o.square(o.add(o.abs(x), 1))))
)
softsign = formula(
    "softsign",
    lambda o, x: o.divide(x, o.add(o.abs(x), 1)),
    lambda g, _y, x: _softsign_grad(g, x),
)
